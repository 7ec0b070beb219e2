"""The ablations' commands on the kept figures: tables and verdicts follow, files are refused."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("rl", "hardware", "weights", "static", "targets")


@pytest.fixture(scope="module")
def script():
    """The benchmark's modules, which import each other as neighbours of a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import ablation_pages
        import ablations

        yield SimpleNamespace(command=ablations, pages=ablation_pages, **ablations.PARTS)
        for name in [name for name in sys.modules if name.startswith("ablation")]:
            del sys.modules[name]


def cells(table):
    """A table's rows by their first cell."""
    return {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}


@pytest.mark.parametrize("name", NAMES)
def test_prints_within_a_terminal_and_writes_what_is_committed(script, name, tmp_path, capsys):
    assert script.command.main([name, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    written = (tmp_path / f"{name}.md").read_text()
    assert written == (RESULTS / "ablations" / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_what_the_commands_print(script):
    found = [part.ablation(RESULTS) for part in script.command.PARTS.values()]
    assert script.command.page(found) == (ROOT / "docs" / "ablations.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused_in_one_sentence(script, name, tmp_path, capsys):
    assert script.command.main([name, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert str(tmp_path) in error
    assert "python benchmarks/" in error


@pytest.mark.parametrize("name", ["rl", "hardware"])
def test_what_is_measured_elsewhere_names_its_command(script, name, capsys):
    assert script.command.main([name, "--run"]) == 2
    assert "measures nothing itself" in capsys.readouterr().err


def test_a_page_without_its_table_is_refused(script, tmp_path):
    (tmp_path / "page.md").write_text("# Errors elsewhere\n")
    with pytest.raises(script.pages.InputError, match="no table of errors"):
        script.hardware.read_profiles(tmp_path / "page.md")


def test_a_table_too_wide_for_a_terminal_is_a_bug(script):
    table = script.pages.Table("wide", ("a" * 50, "b" * 50), (("1", "2"),))
    with pytest.raises(AssertionError, match="too wide"):
        table.plain()


def test_rl_follows_from_the_outcomes(script):
    found = script.rl.ablation(RESULTS)
    outcomes = pd.read_csv(RESULTS / "referee" / "reference" / "outcomes.csv")
    pairs = cells(found.tables[1])
    for other, contest, head in (
        ("gemq", "m2-max:latency=94%", "lat 94%"),
        ("mckp", "bits=3", "3 bits"),
        ("frequency", "bits=2.5", "2.5 bits"),
    ):
        own = outcomes[outcomes.contest == contest].pivot_table(
            index="seed", columns="agent", values="kl"
        )
        both = own[["ppo", other]].dropna()
        over = 100 * (both.ppo / both[other] - 1).mean()
        assert float(pairs[other][head]) == pytest.approx(over, abs=0.051)
    rows = pd.DataFrame(json.loads((RESULTS / "allocators.json").read_text()))
    kl = rows[rows.budget == 3.0].pivot_table(index="seed", columns="method", values="heldout_kl")
    over = 100 * (kl.ppo / kl.mckp - 1)
    half = 2.776445 * over.std() / np.sqrt(len(over))
    mean, low, high = (over.mean(), over.mean() - half, over.mean() + half)
    assert cells(found.tables[-1])["ppo"]["3 bits"] == f"{mean:+.1f} ({low:+.1f}, {high:+.1f})"
    knapsack = next(one for one in found.verdicts if "knapsack" in one.question)
    assert knapsack.answer == "at some budgets"  # as the README says


def test_rl_verdicts_turn_with_the_figures(script, tmp_path):
    shutil.copytree(RESULTS / "referee", tmp_path / "referee")
    shutil.copy(RESULTS / "allocators.json", tmp_path)
    for grid in ("reference", "qwen2_moe"):
        path = tmp_path / "referee" / grid / "outcomes.csv"
        rows = pd.read_csv(path)
        rows.loc[rows.agent == "ppo", "kl"] *= 0.5
        rows.to_csv(path, index=False)
    published, _, searches, _ = script.rl.ablation(tmp_path).verdicts
    assert published.answer == "yes"
    assert searches.answer != "no"


def test_hardware_follows_from_the_measurements(script):
    found = script.hardware.ablation(RESULTS)
    loop = json.loads((RESULTS / "hardware_loop_host.json").read_text())
    rows = cells(found.tables[0])
    errors = loop["predictions"]["isolated kernels"]
    assert rows["isolated kernels"]["error"] == f"{100 * errors['mape']:.1f}"
    seconds, _ = loop["searches"]["analytical (cpu)"][0]
    over = 100 * (seconds / loop["limits_s"][0] - 1)
    assert rows["analytical"]["1st"] == f"{over:+.1f}"
    assert cells(found.tables[2])["isolated kernels"]["1st"] == "no map"
    page = (ROOT / "docs" / "hardware_calibration.md").read_text()
    said = page.partition("Reached by ")[2].partition(" profiles in MAPE")[0]
    assert found.verdicts[-1].answer.startswith(said)


def test_weights_mark_what_nothing_beats(script):
    points = pd.read_csv(RESULTS / script.weights.FILE)
    for setting in script.weights.SETTINGS:
        part = points[points.hw == setting.hw].reset_index(drop=True)
        best = script.weights.front(part, setting.cost)
        for i, one in part.iterrows():
            others = part.drop(index=i)
            no_worse = (others.heldout_kl <= one.heldout_kl) & (
                others[setting.cost] <= one[setting.cost]
            )
            better = (others.heldout_kl < one.heldout_kl) | (
                others[setting.cost] < one[setting.cost]
            )
            assert best[i] == (not (no_worse & better).any())
        assert sorted(part[part.name == "ppo"][setting.term]) == sorted(setting.values)


def test_static_follows_from_the_maps(script):
    found = script.static.ablation(RESULTS)
    rows = pd.read_csv(RESULTS / script.static.FILE)
    for budget, table in zip(script.static.BUDGETS, found.tables[1:], strict=True):
        own = rows[rows.budget == budget]
        assert (own.bits <= budget).all()
        assert table.rows[0][0] == own.loc[own.kl.idxmin()].allocation
        assert len(table.rows) == len(own)
    kl = rows[rows.budget == 3.0].set_index("allocation").kl
    over = 100 * (kl["ppo"] / kl["uniform-fractional"] - 1)
    assert f"{over:+.1f}% at 3 " in found.verdicts[0].because
    assert (found.verdicts[0].answer == "yes") == all(
        own.kl["ppo"] < own.kl["uniform-fractional"]
        for _, part in rows[rows.budget > 0].groupby("budget")
        for own in [part.set_index("allocation")]
    )


def test_targets_follow_from_the_figures(script):
    found = script.targets.ablation(RESULTS)
    memory = json.loads((RESULTS / "memory_target.json").read_text())["rows"]
    own, eight = memory[-1], memory[1]
    share = own["checkpoint_bytes"] / eight["checkpoint_bytes"]
    assert found.verdicts[0].answer == ("yes" if share <= 0.6 else "no")
    rows = pd.read_csv(RESULTS / script.targets.FILE)
    times = rows[(rows.hw == "h100/vllm") & (rows.model == "mixtral-8x7b") & (rows.batch == 1)]
    times = times.set_index("allocation").latency_s
    table = found.tables[3]
    row = next(row for row in table.rows if row[:2] == ("h100/vllm", "1"))
    assert row[table.head.index("4 bits")] == f"{times['8'] / times['4']:.2f}"
    at = ["hw", "model", "batch"]
    every = rows.pivot_table(index=at, columns="allocation", values="latency_s")
    uniform = every[["2", "3", "4", "8", "16"]].min(axis=1)
    assert (every["bound"] <= uniform * (1 + 1e-9)).all()
    eights = rows.groupby("hw").own_eight.first()
    sound = every[
        eights[every.index.get_level_values("hw")].to_numpy() & (every["8"] < every["16"])
    ]
    fast = (sound["8"] / sound["bound"] >= 2).groupby("hw").any()
    assert found.verdicts[-1].answer.startswith(f"on {fast.sum()} of {len(fast)} ")
    assert f"at most {(sound['8'] / sound['4']).max():.2f} times" in found.verdicts[-1].because


def test_the_bound_holds_for_random_maps(script):
    from dmpq.formats import Menu
    from dmpq.hw_models import Workload, load_hardware
    from dmpq.profile import reference_profile
    from dmpq.spec import load_geometry

    profile, menu = reference_profile(), Menu.parse("2,3,4,8,16")
    spec = profile.spec.with_widths_of(load_geometry("olmoe-1b-7b"))
    rng = np.random.default_rng(0)
    maps = rng.integers(len(menu), size=(200, spec.num_experts))
    for hw in ("raspberry-pi-5", "h100/vllm", str(ROOT / "hw_models/recorded/host-amd-epyc.json")):
        hardware, work = load_hardware(hw), Workload(batch=16)
        least = script.targets.least(hardware, spec, menu, work, profile.frequency)
        cost = hardware.cost(spec, menu, maps, work, inclusion=profile.frequency)
        assert least <= cost.latency_s.min()
