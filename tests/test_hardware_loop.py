"""Whole maps measured, costs corrected by them, and a search that does both."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from dmpq.agents import Recorder
from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hw_models import Cost, Workload, load_hardware
from dmpq.hw_models.bench import host_bench
from dmpq.hw_models.corrected import DEVIATION, CorrectedModel, live_base
from dmpq.hw_models.live import LiveModel
from dmpq.hw_models.timing import Rig
from dmpq.hw_models.whole import WholeMaps, WholeTiming, drawn
from dmpq.objective import Constraints
from dmpq.problem import Problem
from dmpq.profile import reference_profile
from dmpq.search import main
from dmpq.session import Session
from dmpq.spec import ModelSpec, MoELayer, load_geometry
from dmpq.testing.hardware import HardwareModelContract

OLMOE = load_geometry("olmoe-1b-7b")
MENU = Menu()
TINY = ModelSpec(
    name="tiny",
    model_type="olmoe",
    hidden_size=64,
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=256,
    tie_word_embeddings=False,
    dense_intermediate_size=48,
    moe_layers=(MoELayer("a", 4, 2, 64, 32), MoELayer("b", 4, 2, 64, 32)),
)
SMALL_MENU = Menu.parse("2,4g32,8,16")


def quick_bench():
    return host_bench(threads=1, rig=Rig(cache_bytes=1 << 14, seconds=0.0, repetitions=3))


def tiny_maps(**more):
    return WholeMaps(quick_bench(), TINY, SMALL_MENU, Workload(), **more)


class Table:
    """A base whose experts take known times: seconds[b] each, and a second for all the rest."""

    name = device = stack = source = "table"
    deterministic = calibrated = True
    capacity_bytes = 1e12

    def __init__(self, seconds):
        self.seconds = np.asarray(seconds, float)

    def cost(self, spec, menu, assignments, workload, *, inclusion=None):
        split = assignments.shape[1] // spec.num_experts
        latency = 1 + self.seconds[assignments].sum(1) / split
        return Cost(latency, np.ones(len(latency)), 10 * latency)

    def expert_latency(self, spec, menu, workload, *, inclusion=None):
        return np.broadcast_to(self.seconds / 2, (spec.num_experts, 2, len(menu)))

    def stored_bits(self, spec, menu):
        return spec.stored_bits(menu)

    def unsupported(self, menu):
        return ()

    def kernels(self, menu):
        return dict.fromkeys(menu.keys, "table")

    def notes(self):
        return ()


def observed(model, maps, factors, *, noise=0.0, rng=None):
    """Let a model see maps whose experts take its base's times, multiplied by factors."""
    truth = model.base.seconds * factors
    for one in maps:
        error = 1 if rng is None else 1 + noise * rng.standard_normal()
        model.observe(TINY, SMALL_MENU, one, Workload(), truth[one].sum() * error)
    return model


def maps_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, len(SMALL_MENU), (count, TINY.num_experts))


class TestUncorrected(HardwareModelContract):
    def make_model(self):
        return CorrectedModel(load_hardware("cpu"))


class TestCorrected(HardwareModelContract):
    def make_model(self):
        model = CorrectedModel(load_hardware("cpu"))
        for i in range(len(MENU)):
            one = np.full(OLMOE.num_experts, i)
            model.observe(OLMOE, MENU, one, Workload(), 0.01 * (1 + i))
        return model


def test_before_a_measurement_costs_are_the_base_s():
    base = load_hardware("a100")
    maps = np.random.default_rng(0).integers(0, 5, (3, OLMOE.num_experts))
    ours, theirs = (m.cost(OLMOE, MENU, maps, Workload()) for m in (CorrectedModel(base), base))
    np.testing.assert_array_equal(ours.latency_s, theirs.latency_s)
    np.testing.assert_array_equal(ours.energy_j, theirs.energy_j)
    assert CorrectedModel(base).correction.of("4") == 1.0


def test_a_single_map_sets_the_common_ratio_for_every_format():
    model = observed(CorrectedModel(Table([1, 2, 3, 4])), [np.full(8, 1)], 1.5)
    assert model.correction.of("4g32") == pytest.approx(1.5)
    assert model.correction.of("16") == pytest.approx(1.5)
    cost = model.cost(TINY, SMALL_MENU, np.full((1, 8), 3), Workload())
    assert cost.latency_s[0] == pytest.approx(1 + 1.5 * 8 * 4)
    assert cost.energy_j[0] == pytest.approx(10 * cost.latency_s[0])


def test_factors_of_formats_are_recovered_and_predict_other_maps():
    factors = np.array([0.9, 1.0, 1.3, 1.1])
    model = observed(CorrectedModel(Table([1, 2, 3, 4])), maps_of(40), factors)
    others = maps_of(20, seed=1)
    predicted = model.cost(TINY, SMALL_MENU, others, Workload()).latency_s
    truth = 1 + (np.array([1, 2, 3, 4]) * factors)[others].sum(1)
    np.testing.assert_allclose(predicted, truth, rtol=0.01)
    assert model.correction.error_after < 0.01 < model.correction.error_before
    np.testing.assert_allclose(
        model.expert_latency(TINY, SMALL_MENU, Workload()).sum(1)[0],
        [
            model.correction.of(key) * s
            for key, s in zip(SMALL_MENU.keys, [1, 2, 3, 4], strict=True)
        ],
    )


def test_the_ridge_is_the_written_out_minimum():
    """Against a general least-squares solver on the stacked system."""
    base, noise = [1.0, 2, 3, 4], 0.03
    maps, factors = maps_of(6), np.array([1.0, 1.02, 1.04, 1.0])
    model = observed(CorrectedModel(Table(base)), maps, factors)
    parts = np.array([[(one == i).sum() * base[i] for i in range(4)] for one in maps])
    seconds = (parts * factors).sum(1)
    ratio = np.median(seconds / parts.sum(1))
    shares = ratio * parts / seconds[:, None]
    rows = np.vstack([shares / noise, np.eye(4) / DEVIATION])
    left = np.concatenate([(1 - shares.sum(1)) / noise, np.zeros(4)])
    deviations = np.linalg.lstsq(rows, left, rcond=None)[0]
    for key, deviation in zip(SMALL_MENU.keys, deviations, strict=True):
        assert model.correction.of(key) == pytest.approx(ratio * (1 + deviation))


def test_spread_falls_with_measurements_and_covers_the_truth():
    rng, factors = np.random.default_rng(0), np.array([0.9, 1.0, 1.3, 1.1])
    few, many = (
        observed(CorrectedModel(Table([1, 2, 3, 4])), maps_of(n), factors, noise=0.03, rng=rng)
        for n in (8, 200)
    )
    for i, key in enumerate(SMALL_MENU.keys):
        factor = many.correction.factors[key]
        assert factor.deviation < few.correction.factors[key].deviation
        assert abs(factor.value - factors[i]) < 4 * factor.deviation


def test_formats_of_one_kernel_share_a_factor():
    def kernel(fmt):
        return "narrow" if fmt.bits <= 4 else "wide"

    model = CorrectedModel(Table([1, 2, 3, 4]), kernel)
    observed(model, maps_of(20), np.array([1.0, 1.0, 2.0, 2.0]))
    assert set(model.correction.factors) == {"narrow", "wide"}
    assert model.correction.of("wide") > 1.5 > model.correction.of("narrow")


def test_projections_may_differ():
    model = CorrectedModel(Table([1, 2, 3, 4]))
    model.observe(TINY, SMALL_MENU, np.tile([0, 3], 8), Workload(), 8 * 2.5 * 2)
    cost = model.cost(TINY, SMALL_MENU, np.tile([0, 3], 8)[None], Workload())
    assert cost.latency_s[0] == pytest.approx(1 + 40)


def test_layers_that_were_not_timed_do_not_count():
    model = CorrectedModel(Table([1, 2, 3, 4]))
    model.observe(TINY, SMALL_MENU, np.zeros(8, int), Workload(), 4 * 3.0, layers=[1])
    assert model.correction.ratio == pytest.approx(3.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, np.nan, np.inf])
def test_a_time_that_is_none_is_refused(seconds):
    with pytest.raises(InputError, match="give a time above 0"):
        CorrectedModel(Table([1, 2, 3, 4])).observe(
            TINY, SMALL_MENU, np.zeros(8, int), Workload(), seconds
        )


def test_every_token_selects_top_k_and_every_expert_gets_its_share():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(16, 5)) * 4
    shares = np.minimum(shares, 1)
    shares *= 4 / shares.sum()
    taken = drawn(shares, 4, 1000, rng)
    assert (taken.sum(1) == 4).all()
    np.testing.assert_allclose(taken.mean(0), shares, atol=2e-3)


def test_drawing_takes_any_probabilities():
    rng = np.random.default_rng(0)
    assert (drawn(np.zeros(4), 2, 8, rng).sum(1) == 2).all()
    assert (drawn(np.ones(4), 4, 8, rng)).all()
    certain = drawn(np.array([1.0, 1.0, 0.0, 0.0]), 2, 8, rng)
    assert certain[:, :2].all()
    assert not certain[:, 2:].any()


def test_a_whole_map_is_timed_experts_and_projections():
    whole = tiny_maps()
    rng = np.random.default_rng(0)
    for columns in (8, 16):
        found = whole.measure(rng.integers(0, 4, columns))
        assert 0 < found.seconds < 1
        assert found.n >= 3
    with pytest.raises(InputError, match="assignments have shape"):
        whole.measure(np.zeros(7, int))


def test_a_step_runs_each_awake_expert_with_its_own_weights_and_tokens(monkeypatch):
    ran = []

    def forward(kernel, x, expert, gated):
        ran.append((id(expert[0][1]), expert[0][0].bits, expert[1][0].bits, len(x)))
        return x

    monkeypatch.setattr("dmpq.hw_models.whole.expert_forward", forward)
    whole = replace(tiny_maps(), workload=Workload(batch=8))
    whole.measure(np.tile([1, 3], 8))
    assert {(first, second) for _, first, second, _ in ran} == {(4, 16)}
    routes = [one for layer in whole._routes for step in layer for one in step]
    assert sum(len(rows) for _, rows in routes) == whole.steps * 8 * 2 * 2
    assert len({weights for weights, *_ in ran}) == sum(len(whole._awake(i)) for i in (0, 1))
    assert [rows for *_, rows in ran[: len(ran) // 4]] == [
        len(rows) for step in zip(*whole._routes, strict=True) for one in step for _, rows in one
    ]  # a pass to warm up, then three that are timed


def test_where_memory_is_short_some_layers_are_timed():
    one = tiny_maps()._layer_bytes(0)
    assert tiny_maps().layers == (0, 1)
    assert tiny_maps(memory_bytes=1.5 * one).layers == (0,)
    with pytest.raises(InputError, match="smaller --cost-geometry"):
        _ = tiny_maps(memory_bytes=one / 2).layers


def test_what_times_depend_on_is_in_the_digest():
    digests = {
        tiny_maps().digest,
        tiny_maps(seed=1).digest,
        tiny_maps(inclusion=np.tile([1.0, 1, 0, 0], 2)).digest,
        replace(tiny_maps(), workload=Workload(batch=2)).digest,
        tiny_maps(memory_bytes=1.5 * tiny_maps()._layer_bytes(0)).digest,
    }
    assert len(digests) == 5
    assert tiny_maps().digest in digests


QUICK = [
    "--profile-tokens=256",
    "--search-tokens=512",
    "--selection-tokens=256",
    "--heldout-tokens=512",
    "--evaluations=6",
    "--bits=2,4,16",
    "--threads=1",
    "--cost-geometry=own",
    "--hw=host",
    "--measure-every=2",
]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A quick bench whose whole maps take 2 s, and up to 1 s more at 16 bits; keeps them."""
    calls = []

    def measure(self, assignment):
        calls.append(assignment)
        wide = np.mean(assignment == len(self.menu) - 1)
        return WholeTiming(2.0 + float(wide), 0.01, 5, 0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("dmpq.hw_models.live.host_bench", lambda threads: quick_bench())
    monkeypatch.setattr(WholeMaps, "measure", measure)
    return calls


def test_a_search_measures_every_k_th_map_and_reports_all_three(machine, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*QUICK, f"--out={out}"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    found = summary["measured_maps"]
    assert found["correction"]["measured"] == 2 + 3  # two kernels' uniform maps, three of six
    assert len(machine) in (5, 6)  # the chosen map may be one of them
    assert found["corrected_s"] == pytest.approx(summary["rows"][-1]["latency_s"])
    assert found["corrected_s"] == pytest.approx(found["measured_s"], rel=0.1)
    assert found["predicted_s"] < found["measured_s"] / 2
    assert "corrected by 5 measured maps" in summary["hardware"]["source"]
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("predicted", "corrected", "measured", "±"):
        assert word in shown


def test_an_interrupted_search_goes_on_to_the_same_result(machine, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*QUICK, f"--out={whole}"]) == 0
    measured, honest = len(machine), WholeMaps.measure
    machine.clear()

    def interrupted(self, assignment):
        if len(machine) == 3:
            raise KeyboardInterrupt
        return honest(self, assignment)

    monkeypatch.setattr(WholeMaps, "measure", interrupted)
    assert main([*QUICK, f"--out={broken}"]) == 130
    assert not (broken / "bitmap.json").exists()
    monkeypatch.setattr(WholeMaps, "measure", honest)
    assert main([*QUICK, f"--out={broken}"]) == 0
    assert len(machine) == measured
    for name in ("bitmap.json", "history.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_damaged_journal_is_measured_anew(machine, tmp_path):
    out = tmp_path / "run"
    assert main([*QUICK, f"--out={out}"]) == 0
    before, count = (out / "bitmap.json").read_bytes(), len(machine)
    lines = (out / "journal.jsonl").read_text().splitlines()
    kept = [
        line.replace('"seconds": ', '"seconds": -') if "whole" in line else line for line in lines
    ]
    assert kept != lines
    (out / "journal.jsonl").write_text("\n".join(kept) + "\n")
    assert main([*QUICK, f"--out={out}"]) == 0
    assert len(machine) == 2 * count
    assert (out / "bitmap.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hw=a100", "--measure-every=4"], "--hw a100 is not it; give --hw host or --hw cuda"),
        (["--hw=host", "--measure-every=0"], "--measure-every 0 makes no sense"),
        (["--latency-ms=9", "--evaluations=1", "--measure-every=1"], "give 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, said, tmp_path, capsys):
    assert main([*QUICK[:6], *flags, f"--out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_limits_that_measurement_makes_impossible_are_said(machine, tmp_path, capsys):
    """The table alone says that everything fits; whole maps take 2 s and more."""
    flags = [*QUICK, "--latency-ms=1500", "--agent=mckp", f"--out={tmp_path / 'run'}"]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "--latency-ms" in error
    assert error.count("\n") == 1


def test_a_search_ends_when_its_own_measurements_leave_no_map(
    machine, tmp_path, capsys, monkeypatch
):
    """The first maps are fast, as on a machine that then gets busy."""
    honest = WholeMaps.measure

    def measure(self, assignment):
        found = honest(self, assignment)
        return replace(found, seconds=1.0) if len(machine) <= 2 else found

    monkeypatch.setattr(WholeMaps, "measure", measure)
    flags = ["--latency-ms=1100", "--measure-every=1", f"--out={tmp_path / 'run'}"]
    assert main([*QUICK, *flags]) == 2
    assert len(machine) > 2
    assert "at the corrected costs no map is known" in capsys.readouterr().err


def test_maps_that_a_correction_puts_beyond_a_limit_are_brought_within_it(
    machine, tmp_path, monkeypatch
):
    """Later maps are slower than the first ones say, so that no map that was evaluated is left."""
    honest = WholeMaps.measure

    def measure(self, assignment):
        found = honest(self, assignment)
        return replace(found, seconds=found.seconds * (1.0 if len(machine) <= 2 else 1.1))

    monkeypatch.setattr(WholeMaps, "measure", measure)
    out = tmp_path / "run"
    flags = ["--latency-ms=2500", "--measure-every=1", "--agent=mckp", "--weights=acc=1"]
    assert main([*QUICK, *flags, f"--out={out}"]) == 0
    row = json.loads((out / "summary.json").read_text())["rows"][-1]
    assert row["latency_s"] <= 2.5
    assert row["evaluations"] == 2
    first, second = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    pairs = zip(first["assignment"], second["assignment"], strict=True)
    assert 1 <= sum(one != other for one, other in pairs) <= 16


class UsesAll:
    """Spends every evaluation on a map that uses the limits up."""

    name = "uses-all"

    def search(self, problem, *, evaluations, seed, on_candidate=None):
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        best = problem.mckp()
        for decision in np.flatnonzero(best)[:evaluations]:
            one = best.copy()
            one[decision] = 0
            recorder.evaluate(one[None])
        return recorder.result()


def test_a_map_brought_within_a_limit_is_one_of_the_evaluations(machine, tmp_path, monkeypatch):
    honest = WholeMaps.measure

    def measure(self, assignment):
        found = honest(self, assignment)
        return replace(found, seconds=found.seconds * (1.0 if len(machine) <= 2 else 1.1))

    monkeypatch.setattr(WholeMaps, "measure", measure)
    out = tmp_path / "run"
    flags = ["--latency-ms=2500", "--measure-every=1", f"--agent={__name__}:UsesAll"]
    assert main([*QUICK, *flags, "--weights=acc=1", "--evaluations=3", f"--out={out}"]) == 0
    row = json.loads((out / "summary.json").read_text())["rows"][-1]
    assert row["latency_s"] <= 2.5
    assert row["evaluations"] == 3
    assert len((out / "history.jsonl").read_text().splitlines()) == 3


def test_only_the_machine_at_hand_is_corrected(tmp_path):
    live = LiveModel(quick_bench(), folder=tmp_path)
    assert live_base(CorrectedModel(live)) is live
    with pytest.raises(InputError, match="only with --measure-every"):
        _ = Session(SearchConfig()).corrected


def test_the_final_choice_is_made_at_the_last_costs():
    """A candidate priced before a measurement is scored again after it."""
    profile = reference_profile()
    model = CorrectedModel(load_hardware("a100"))
    problem = Problem(
        profile=profile,
        hardware=model,
        cost_spec=profile.spec,
        constraints=Constraints(avg_bits=16.0),
    )
    recorder = Recorder(problem, evaluations=2)
    recorder.evaluate(np.stack([problem.uniform("16"), problem.uniform("2")]))
    old = [one.reward for one in recorder.history]
    for i in range(5):
        model.observe(profile.spec, profile.menu, np.full(64, i), Workload(), 1e-6 * 10**i)
    result = recorder.result()
    now = problem.evaluate(np.array([one.assignment for one in result.history]))
    assert [one.reward for one in result.history] == now.reward.tolist()
    assert now.reward.tolist() != old
    assert recorder.history == result.history


def test_nothing_here_imports_torch_before_it_measures():
    import subprocess

    code = (
        "import sys, dmpq.hw_models.whole, dmpq.hw_models.corrected, dmpq.hardware.loop\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
