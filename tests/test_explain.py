"""Explanations: the parts sum to the cost, and the command shows them for any device."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from factories import make_problem, write_bitmap

from dmpq.console import CommandParser, plain_console
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hardware.explain import add_parser
from dmpq.hw_models import (
    Explainable,
    Part,
    Workload,
    explainable,
    list_hardware,
    load_hardware,
)
from dmpq.hw_models.itemised import shared_time
from dmpq.hw_models.tables import power_mean
from dmpq.spec import load_geometry

MENU = Menu()
WORKLOADS = [Workload(), Workload(batch=64, context=300), Workload("prefill", 3, 700)]


def shared_and_dense():
    """A geometry with shared experts, a dense layer and a tied head."""
    spec = load_geometry("qwen3-30b-a3b")
    layers = tuple(replace(layer, shared_intermediate_size=512) for layer in spec.moe_layers[:4])
    return replace(
        spec,
        num_layers=5,
        moe_layers=layers,
        dense_intermediate_size=4096,
        tie_word_embeddings=True,
    )


SPECS = [load_geometry("olmoe-1b-7b"), shared_and_dense()]


@pytest.mark.parametrize("hardware", list_hardware())
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("spec", SPECS, ids=["olmoe", "shared"])
@pytest.mark.parametrize("columns", [1, 2])
def test_the_parts_sum_to_the_cost(hardware, workload, spec, columns):
    rng = np.random.default_rng(0)
    one = rng.integers(0, len(MENU), columns * spec.num_experts)
    inclusion = rng.uniform(0, 0.2, spec.num_experts)
    model = load_hardware(hardware)
    explanation = model.explain(spec, MENU, one, workload, inclusion=inclusion)
    total = Part.total(explanation.parts)
    cost = model.cost(spec, MENU, one[None], workload, inclusion=inclusion)
    parts = model.breakdown(spec, MENU, one[None], workload, inclusion=inclusion)
    assert total.latency_s == pytest.approx(cost.latency_s[0], rel=1e-12)
    assert total.energy_j == pytest.approx(cost.energy_j[0], rel=1e-12)
    assert total.stored_bytes == pytest.approx(cost.memory_bytes[0], rel=1e-12)
    assert total.traffic_bytes == pytest.approx(parts.traffic_bytes[0], rel=1e-12)
    assert total.flops == pytest.approx(parts.flops[0], rel=1e-12)
    by_name = {}
    for part in explanation.parts:
        by_name[part.name] = by_name.get(part.name, 0.0) + part.latency_s
    assert by_name["experts"] == pytest.approx(parts.experts_s.sum(), rel=1e-12)
    assert by_name["launches"] == pytest.approx(parts.launches_s.sum(), rel=1e-12)
    assert by_name["head"] == pytest.approx(parts.head_s, rel=1e-12)
    over = sum(time for name, time in by_name.items() if name.endswith("overhead"))
    assert over == pytest.approx(parts.overhead_s, rel=1e-12)
    assert sum(use.experts for use in explanation.formats) == spec.num_experts
    active = 1 - (1 - inclusion) ** workload.tokens
    assert sum(use.active for use in explanation.formats) == pytest.approx(active.sum())


def test_formats_that_do_not_occur_have_no_part():
    spec = SPECS[0]
    one = np.full(spec.num_experts, MENU.index("4"))
    one[:3] = MENU.index("8")
    explanation = load_hardware("a100").explain(spec, MENU, one, Workload())
    assert [use.key for use in explanation.formats] == ["4", "8"]
    assert [use.launches for use in explanation.formats] == [32, 2]
    assert {part.key for part in explanation.parts} == {"", "4", "8"}


def test_what_an_expert_waits_for_is_named():
    spec, model = SPECS[0], load_hardware("a100")
    for key, workload, bound in (
        ("16", Workload(), "memory"),
        ("4", Workload(), "unpack"),
        ("4", Workload("prefill", 4, 2048), "compute"),
    ):
        one = np.full(spec.num_experts, MENU.index(key))
        first = model.explain(spec, MENU, one, workload).parts[0]
        assert (first.name, first.bound_by) == ("experts", bound)


def test_shares_of_a_wait_are_its_derivatives():
    rng = np.random.default_rng(0)
    times = rng.uniform(0, 1, (3, 5))
    times[:, 0] = 0
    shares = shared_time(*times)
    np.testing.assert_allclose(shares.sum(0), power_mean(*times))
    step = 1e-7
    for i in range(3):
        more = times.copy()
        more[i] *= 1 + step
        slope = (power_mean(*more) - power_mean(*times)) / step
        np.testing.assert_allclose(shares[i], slope, atol=1e-6)


def test_a_cost_without_parts_is_said_so():
    class Table:
        name, source = "table", "a table; of somebody's"

    assert isinstance(load_hardware("a100"), Explainable)
    with pytest.raises(InputError, match=r"table \(a table\) have no parts to explain"):
        explainable(Table())


@pytest.fixture
def bitmap(tmp_path):
    """A bit map of a synthetic problem, in a file."""
    return write_bitmap(tmp_path)


def explain(*arguments):
    parser = CommandParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["explain", *map(str, arguments)])
    return parsed.run(parsed, plain_console(stderr=parsed.json))


def test_the_command_explains_for_any_device_as_json(bitmap, capsys):
    assert explain(bitmap, "--json") == 0
    (own,) = json.loads(capsys.readouterr().out)
    assert any("assumed, for want of published figures" in note for note in own["notes"])
    assert (own["stack"], own["workload"]["batch"], own["routing"]) == ("sglang", 2, "uniform")
    assert explain(bitmap, "--hw", "h100", "rtx4090", "--batch", "4", "--json") == 0
    both = json.loads(capsys.readouterr().out)
    assert "rtx4090/gemlite is not calibrated" in both[1]["notes"]
    kernels = {use["kernel"] for use in both[1]["formats"]}
    assert "gemlite, modelled at 4 bits" in kernels
    assert ["H100" in both[0]["device"], "4090" in both[1]["device"]] == [True, True]
    assert both[0]["workload"] == {"phase": "decode", "batch": 4, "context": 128}
    for one in (own, *both):
        for name, value in one["total"].items():
            if isinstance(value, float):
                assert value == pytest.approx(sum(part[name] for part in one["parts"]))


def test_a_profile_gives_the_measured_routing(bitmap, capsys):
    assert explain(bitmap, "--json", "--profile", bitmap.parent / "profile.safetensors") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["routing"].startswith("as measured")
    problem = make_problem(hw="a100/sglang", workload=Workload(batch=2, context=128))
    written = make_problem().mckp()
    expected = problem.costs(written[None]).latency_s[0]
    assert found["total"]["latency_s"] == pytest.approx(expected)


def test_the_tables_fit_a_terminal_of_80_columns(bitmap, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert explain(bitmap, "--hw", "a100", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("experts at 2", "KV cache, scores", "sequence overhead", "total", "unpack"):
        assert any(name in line for line in lines), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hw", "a10o"], "did you mean 'a100'"),
        (["--batch", "0"], "batch is 0"),
        (["--phase", "decod"], "did you mean 'decode'"),
        (["--profile", "nothing.safetensors"], "There is no profile"),
    ],
)
def test_bad_input_is_refused(bitmap, arguments, message):
    with pytest.raises(InputError, match=message):
        explain(bitmap, *arguments)


def test_a_map_for_an_unknown_device_needs_a_name(bitmap):
    text = bitmap.read_text().replace('"name": "a100"', '"name": "abacus"')
    bitmap.write_text(text)
    with pytest.raises(InputError, match="made for abacus with stack sglang"):
        explain(bitmap)


def test_a_profile_of_other_weights_is_refused(bitmap):
    text = bitmap.read_text().replace("0" * 64, "1" * 64)
    bitmap.write_text(text)
    with pytest.raises(InputError, match="other weights than the bit map's"):
        explain(bitmap, "--profile", bitmap.parent / "profile.safetensors")


def test_add_parser_adds_one_command():
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    assert parser.parse_args(["explain", "map.json"]).hw is None
