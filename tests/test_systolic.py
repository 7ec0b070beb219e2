"""Simulated accelerators: descriptions, exact cost arithmetic, SCALE-Sim itself, its cache."""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import make_spec

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hw_models import Workload, list_hardware, load_hardware, scale_sim
from dmpq.hw_models.accelerator import (
    list_accelerators,
    read_accelerator,
    shipped_accelerator,
)
from dmpq.hw_models.scale_sim import Fold, Layer, ScaleSim
from dmpq.hw_models.systolic import SystolicModel
from dmpq.hw_models.traffic import Product, offchip_bytes
from dmpq.search import main
from dmpq.spec import load_geometry
from dmpq.testing.hardware import HardwareModelContract

OLMOE = load_geometry("olmoe-1b-7b")
MENU = Menu()
EDGE, GENERIC = shipped_accelerator("edge-tpu-like"), shipped_accelerator("generic-128x128")
FILES = Path(__file__).parents[1] / "hw_models" / "accelerators"
FLOWS = ("ws", "os", "is")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Nothing is written into, or read from, the folder of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def counted(tokens, inputs, outputs):
    """Stand in for a simulator: no two products alike."""
    return Layer(5 * tokens * inputs + outputs, tokens + inputs, inputs * outputs, 3 * outputs)


class TestGeneric(HardwareModelContract):
    def make_model(self):
        return SystolicModel(GENERIC, counted)


class TestEdge(HardwareModelContract):
    def make_model(self):
        return SystolicModel(EDGE, counted)


class TestSimulated(HardwareModelContract):
    def make_model(self):
        pytest.importorskip("scalesim")
        return load_hardware("generic-128x128")


@pytest.mark.parametrize("inclusion", [None, np.linspace(0, 1, 16)])
@pytest.mark.parametrize("name", list_accelerators())
def test_latency_and_energy_match_the_formula_written_out(name, inclusion):
    facts, spec, workload = shipped_accelerator(name), make_spec(), Workload(batch=5, context=7)
    model = SystolicModel(facts, counted)
    maps = np.random.default_rng(0).integers(0, 5, (1, 2 * spec.num_experts))
    share = np.full(16, 2 / 8) if inclusion is None else inclusion
    activation = facts.activation_bits / 8

    def product(tokens, inputs, outputs, weight_bytes, passes):
        layer = counted(tokens, inputs, outputs)
        # All of it fits on the chip, so that everything moves once.
        moved = weight_bytes + tokens * (inputs + outputs) * activation
        time = max(layer.cycles * passes / facts.clock_hz, moved / facts.bandwidth_bytes_per_s)
        onchip = moved + layer.filter_reads * weight_bytes / (inputs * outputs)
        onchip += passes * (layer.ifmap_reads * activation + layer.ofmap_writes * 4)
        pj = passes * tokens * inputs * outputs * facts.mac_pj
        pj += onchip * facts.sram_pj_per_byte + moved * facts.dram_pj_per_byte
        return np.array([time, pj * 1e-12 + facts.static_w * time])

    expected = np.zeros(2)
    for e in range(spec.num_experts):
        active = 1 - (1 - share[e]) ** 5
        tokens = math.ceil(5 * share[e] / active - 1e-9) if active else 0
        for p, (outputs, inputs) in enumerate(((512, 256), (256, 256))):
            fmt = facts.stored_as(MENU.formats[maps[0, 2 * e + p]])
            size = Menu((fmt,)).stored_bits((outputs, inputs))[0] / 8
            if active:
                passes = facts.passes(fmt.bits)
                expected += active * product(tokens, inputs, outputs, size, passes)
    wide = facts.resident_bits / 8
    for _layer in range(2):
        for inputs, outputs in ((256, 3 * 256), (256, 256), (256, 8)):
            expected += product(5, inputs, outputs, inputs * outputs * wide, 1)
        for inputs, outputs in ((64, 7), (7, 64)):
            scores = product(1, inputs, outputs, inputs * outputs * activation, 1)
            expected += 5 * 4 * scores
    expected += product(5, 256, 512, 256 * 512 * wide, 1)
    cost = model.cost(spec, MENU, maps, workload, inclusion=inclusion)
    assert cost.latency_s[0] == pytest.approx(expected[0], rel=1e-12)
    assert cost.energy_j[0] == pytest.approx(expected[1], rel=1e-12)


def test_memory_is_that_of_the_analytical_model_at_the_same_widths():
    workload = Workload(batch=3, context=100)
    maps = np.random.default_rng(0).integers(0, 5, (4, OLMOE.num_experts))
    mine = SystolicModel(GENERIC, counted).cost(OLMOE, MENU, maps, workload).memory_bytes
    other = load_hardware("a100").cost(OLMOE, MENU, maps, workload).memory_bytes
    np.testing.assert_allclose(mine, other, rtol=1e-12)


@pytest.mark.parametrize("workload", [Workload(), Workload("prefill", 2, 64)])
def test_lower_widths_cost_exactly_what_8_bits_cost_where_8_is_all_there_is(workload):
    menu = Menu.parse("2,3,4,4g32,8,8g32,16")
    maps = np.repeat(np.arange(len(menu))[:, None], OLMOE.num_experts, axis=1)
    cost = SystolicModel(EDGE, counted).cost(OLMOE, menu, maps, workload)
    for values in (cost.latency_s, cost.memory_bytes, cost.energy_j):
        by_key = dict(zip(menu.keys, values, strict=True))
        assert by_key["2"] == by_key["3"] == by_key["4"] == by_key["8"] < by_key["16"]
        assert by_key["4g32"] == by_key["8g32"] > by_key["8"] or values is cost.latency_s
    notes = SystolicModel(EDGE, counted).unsupported(menu)
    assert [note.partition(":")[0] for note in notes] == ["2", "3", "4", "4g32", "16"]
    assert "2 planes of 8 bits" in notes[-1]
    kernels = SystolicModel(EDGE, counted).kernels(menu)
    assert kernels["4"] == "SCALE-Sim, simulated at 8 bits"
    assert kernels["16"] == "SCALE-Sim, simulated at 2 x 8 bits"


def test_linearised_latency_is_exact():
    model, rng = SystolicModel(GENERIC, counted), np.random.default_rng(0)
    maps = rng.integers(0, 5, (2, 2 * OLMOE.num_experts))
    latency = model.cost(OLMOE, MENU, maps, Workload()).latency_s
    linear = model.expert_latency(OLMOE, MENU, Workload()).reshape(-1, 5)
    own = linear[np.arange(len(linear)), maps].sum(axis=1)
    assert latency[1] - latency[0] == pytest.approx(own[1] - own[0])


def test_latent_attention_shared_experts_and_dense_layers_are_counted():
    plain = make_spec()
    shared = [replace(layer, shared_intermediate_size=64) for layer in plain.moe_layers]
    specs = (
        replace(plain, attention_parameters=10**6, cache_values=100),
        replace(plain, moe_layers=tuple(shared)),
        replace(plain, num_layers=3, dense_intermediate_size=512),
    )
    model, maps = SystolicModel(GENERIC, counted), np.zeros((1, 16), int)
    base = model.cost(plain, MENU, maps, Workload()).latency_s[0]
    for spec in specs:
        assert model.cost(spec, MENU, maps, Workload()).latency_s[0] > base


@pytest.mark.parametrize(
    ("flow", "memory", "expected"),
    [
        # 20 tokens, 30 inputs, 40 outputs on an 8 x 16 array; partial sums of 4 bytes.
        ("ws", 1 << 20, 1200 + 600 + 800),
        ("ws", 1199, 1200 + 3 * 600 + 800 + 2 * 3 * 3200),
        ("ws", 1200, 1200 + 600 + 800 + 2 * 3 * 3200),
        ("os", 1 << 20, 1200 + 600 + 800),
        ("os", 959, 3 * 1200 + 3 * 600 + 800),
        ("os", 960, 1200 + 3 * 600 + 800),
        ("is", 1 << 20, 1200 + 600 + 800),
        ("is", 2399, 2 * 1200 + 600 + 800 + 2 * 3 * 3200),
        ("is", 2400, 1200 + 600 + 800 + 2 * 3 * 3200),
    ],
)
def test_operands_that_do_not_fit_are_fetched_again(flow, memory, expected):
    facts = replace(
        EDGE,
        dataflow=flow,
        array_rows=8,
        array_columns=16,
        ifmap_sram_bytes=memory,
        filter_sram_bytes=memory,
        ofmap_sram_bytes=memory,
    )
    assert offchip_bytes(facts, Product(20, 30, 40), 1200) == expected


def test_each_fold_is_simulated_once_and_kept_on_disk(monkeypatch, cache_folder):
    simulated = []

    def fake(array, fold):
        simulated.append(fold)
        return Layer(*fold, 7)

    monkeypatch.setattr(scale_sim, "simulate_fold", fake)
    monkeypatch.setattr(scale_sim, "scale_sim_version", lambda: "9.9")
    array = ScaleSim(8, 16, "ws")
    # 30 inputs: three folds of 8 rows and one of 6; 40 outputs: two of 16 columns and one of 8.
    total = array(5, 30, 40)
    assert simulated == [Fold(8, 16, 5), Fold(8, 8, 5), Fold(6, 16, 5), Fold(6, 8, 5)]
    assert total == Layer(3 * 30, 4 * 40, 4 * 3 * 5, 4 * 3 * 7)
    assert array(5, 30, 40) == total
    assert array(5, 16, 16).times(2) == array(5, 32, 16) == array(5, 16, 32)
    assert len(simulated) == 4
    (file,) = (cache_folder / "dmpq" / "systolic").iterdir()
    assert file.name == "ws-8x16-scalesim-9.9.jsonl"
    lines = file.read_text().splitlines()
    damaged = ['{"fold": [6, 8, 5], "layer": [1, 2]}', '{"fold": "x"}', "[]", '{"fold": [1.5, ']
    file.write_text("\n".join([*lines[:3], *damaged]))
    scale_sim._recorded.cache_clear()
    assert array(5, 30, 40) == total
    assert simulated[4:] == [Fold(6, 8, 5)]


def test_without_a_cache_folder_all_is_kept_in_memory(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(scale_sim, "simulate_fold", lambda array, fold: Layer(1, 1, 1, 1))
    monkeypatch.setattr(scale_sim, "scale_sim_version", lambda: "9.9")
    assert ScaleSim(4, 4, "os")(4, 4, 4) == Layer(1, 1, 1, 1)


def closed_form(flow, rows, columns, tokens, inputs, outputs):
    """Return the cycles of folds that fill and drain the whole array, one after the other."""
    down, across, steps = ScaleSim(rows, columns, flow).spread(tokens, inputs, outputs)
    fill = rows + columns - 2 + (0 if flow == "os" else rows)
    return math.ceil(down / rows) * math.ceil(across / columns) * (fill + steps)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 20, 30), (9, 8, 7), (17, 16, 24)])
def test_real_cycles_are_those_of_the_closed_form(flow, shape):
    pytest.importorskip("scalesim")
    assert ScaleSim(8, 6, flow)(*shape).cycles == closed_form(flow, 8, 6, *shape)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("shape", [(3, 20, 30), (9, 8, 7), (600, 9, 10), (9, 600, 5), (5, 9, 600)])
def test_folds_add_up_to_the_whole_layer(flow, shape):
    pytest.importorskip("scalesim")
    array = ScaleSim(8, 6, flow)
    whole = scale_sim.simulate_fold(array, Fold(*array.spread(*shape)))
    assert array(*shape) == whole
    tokens, inputs, outputs = shape
    if flow == "ws":
        assert whole.filter_reads == inputs * outputs
    if flow == "os":
        assert whole.ofmap_writes == tokens * outputs
    if flow == "is":
        assert whole.ifmap_reads == tokens * inputs


def test_the_simulator_prints_nothing_and_writes_nothing_here(monkeypatch, tmp_path, capfd):
    pytest.importorskip("scalesim")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    ScaleSim(5, 5, "ws")(7, 8, 9)
    assert capfd.readouterr() == ("", "")
    assert os.listdir(here) == []


@pytest.fixture
def no_scale_sim(monkeypatch):
    """Make SCALE-Sim look as if it were not installed."""

    version = importlib.metadata.version

    def missing(name):
        if name == "scalesim":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)


@pytest.mark.parametrize("hardware", [*list_accelerators(), str(FILES / "edge-tpu-like.json")])
@pytest.mark.usefixtures("no_scale_sim")
def test_without_scale_sim_one_sentence_says_which_extra(hardware):
    with pytest.raises(InputError, match=r"pip install 'dmpq\[simulate\]'") as caught:
        load_hardware(hardware)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_scale_sim")
def test_without_scale_sim_the_command_ends_with_code_2(tmp_path, capsys):
    assert main(["--hw=edge-tpu-like", f"--out={tmp_path / 'out'}"]) == 2
    assert "dmpq[simulate]" in capsys.readouterr().err


def test_a_scale_sim_that_cannot_be_imported_is_named(monkeypatch):
    def broken(name):
        raise ImportError("no layouts")

    monkeypatch.setattr(scale_sim.importlib, "import_module", broken)
    monkeypatch.setattr(scale_sim, "scale_sim_version", lambda: "2.0.2")
    with pytest.raises(InputError, match=r"SCALE-Sim 2\.0\.2 has no working scale_config"):
        ScaleSim(4, 4, "ws")(4, 4, 4)


def test_the_page_on_accelerators_is_what_its_benchmark_prints(cache_folder):
    pytest.importorskip("scalesim")
    benchmark = Path(__file__).parents[1] / "benchmarks" / "systolic.py"
    done = subprocess.run(
        [sys.executable, benchmark, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    assert list(cache_folder.rglob("*.jsonl")), "nothing was simulated"


def test_accelerators_load_by_name_and_by_path(monkeypatch):
    monkeypatch.setattr("dmpq.hw_models.systolic.scale_sim_version", lambda: "3.0.0")
    by_name = load_hardware("edge-tpu-like")
    assert by_name == load_hardware(str(FILES / "edge-tpu-like.json"))
    assert by_name.stack == "scale-sim"
    assert not by_name.calibrated
    assert "assumed: array_rows" in by_name.source
    assert not set(list_accelerators()) & set(list_hardware())
    with pytest.raises(InputError, match="did you mean 'edge-tpu-like'"):
        load_hardware("edge-tpu-lik")


@pytest.mark.parametrize("name", list_accelerators())
def test_shipped_files_name_themselves_and_only_known_figures(name):
    facts = shipped_accelerator(name)
    assert facts.name == name
    assert {*facts.sources, *facts.assumed} <= set(type(facts).__dataclass_fields__)


def _broken(**changes):
    data = json.loads((FILES / "edge-tpu-like.json").read_text())
    for name, value in changes.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "schema"),
        ("[" * 100_000, "cannot be read"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read"),
        ('{"schema": "dmpq.accelerator/2"}', "schema"),
        ('{"schema": "dmpq.accelerator/1", "name": "x", "name": "y"}', "written twice"),
        (_broken(clock_hz=480), "unit of its name"),
        (_broken(clock_hz=float("nan")), "finite number"),
        (_broken(bandwidth_bytes_per_s=12.8), "unit of its name"),
        (_broken(mac_pj=-1), "unit of its name"),
        (_broken(array_rows=0), "unit of its name"),
        (_broken(array_rows=64.0), "whole number"),
        (_broken(array_rows=True), "whole number"),
        (_broken(array_rows=10**9), "unit of its name"),
        (_broken(dataflow="rs"), "must be one of ws, os, is"),
        (_broken(weight_bits=[]), "weight_bits are"),
        (_broken(weight_bits=[8, 4]), "narrowest first"),
        (_broken(weight_bits=[8, 8]), "each once"),
        (_broken(weight_bits=[5]), "give some of"),
        (_broken(weight_bits=["8"]), "whole number"),
        (_broken(weight_bits=[4]), "resident_bits is 8"),
        (_broken(accumulator_bits=None), "has no accumulator_bits"),
        (_broken(activation_bits=32, accumulator_bits=16), "partial sums are at least as wide"),
        (_broken(static_power=1), "Unknown name"),
        (_broken(assumed=[]), "neither a source"),
        (_broken(sources={}), "neither a source"),
        (_broken(sources={"mac_pj": 1}), "must be text"),
    ],
)
def test_hostile_accelerator_files_end_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "accelerator.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_accelerator(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"The (device|accelerator) file"):
        load_hardware(str(file))
