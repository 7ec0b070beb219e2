"""The measured model: its formula written out, its contract, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmpq.errors import InputError
from dmpq.formats import Format, Menu
from dmpq.hw_models import Workload, load_hardware
from dmpq.hw_models.measured import MeasuredModel
from dmpq.hw_models.measurements import read_measurements
from dmpq.hw_models.needs import MOST_TOKENS, grid, seconds_at
from dmpq.spec import load_geometry
from dmpq.testing.hardware import HardwareModelContract

OLMOE = load_geometry("olmoe-1b-7b")
MENU = Menu()
RECORDED = Path(__file__).parents[1] / "hw_models" / "recorded" / "host-amd-epyc.json"


@pytest.fixture(scope="module")
def recorded():
    return MeasuredModel(read_measurements(RECORDED))


class TestReplayed(HardwareModelContract):
    def make_model(self):
        return load_hardware(str(RECORDED))


def test_latency_and_energy_match_the_formula_written_out(recorded):
    record, workload = recorded.record, Workload(batch=4)
    maps = np.random.default_rng(1).integers(0, 5, (1, 2 * OLMOE.num_experts))
    cost = recorded.cost(OLMOE, MENU, maps, workload)
    active = 1 - (1 - 8 / 64) ** 4
    rows = np.array([4 * (8 / 64) / active])

    def at(points, tokens):
        return float(seconds_at(points, np.asarray(tokens, float))[0])

    gather = at(record.gathers[0].points, rows)
    total = 0.0
    for column, b in enumerate(maps[0]):
        timing = record.expert((2048, 1024, True), MENU.formats[b])
        first, second = at(timing.gate_up, rows), at(timing.down, rows)
        half = (first, second)[column % 2] / (first + second)
        total += active * (half * at(timing.whole, rows) + gather / 2)
    matrices = {m.shape: m.points for m in record.matrices}
    for shape in ((6144, 2048), (2048, 2048), (64, 2048)):
        total += 16 * at(matrices[shape], [4])
    total += at(matrices[50304, 2048], [4])
    read = 4 * 2048 * 2 * 2048 * 2 * 16 / record.copy.bandwidth_bytes_per_s
    rate = 2 * 6144 * 2048 / at(matrices[6144, 2048], [1])
    total += max(read, 16 * 4 * 4 * 2048 * 2048 / rate)
    assert cost.latency_s[0] == pytest.approx(total)
    assert cost.energy_j[0] == pytest.approx(record.energy.assumed_w * total)


def test_times_are_interpolated_in_the_logarithm_of_tokens(recorded):
    points = recorded.record.expert((2048, 1024, True), Format(4)).whole
    exact = np.array([float(point.tokens) for point in points])
    np.testing.assert_allclose(seconds_at(points, exact), [p.median_s for p in points])
    between = seconds_at(points, np.array([2**0.5]))[0]
    assert between == pytest.approx((points[0].median_s * points[1].median_s) ** 0.5)
    last = points[-1]
    assert seconds_at(points, exact[-1:] * 3)[0] == pytest.approx(3 * last.median_s)


def test_the_grid_doubles_up_to_the_first_that_suffices():
    assert grid(1) == (1,)
    assert grid(2) == (1, 2)
    assert grid(5) == (1, 2, 4, 8)
    assert grid(10**9)[-1] == MOST_TOKENS


def test_an_expert_that_is_never_selected_costs_no_time(recorded):
    inclusion = np.tile([1.0] * 8 + [0.0] * 56, 16)
    seconds = recorded.expert_latency(OLMOE, MENU, Workload(), inclusion=inclusion)
    assert not seconds[8:64].any()
    assert (seconds[:8] > 0).all()


def test_two_and_three_bits_are_stored_packed_and_timed_as_four(recorded):
    maps = np.stack([np.full(OLMOE.num_experts, MENU.index(k)) for k in ("2", "3", "4")])
    cost = recorded.cost(OLMOE, MENU, maps, Workload())
    assert len(set(cost.latency_s)) == 1
    assert (np.diff(cost.memory_bytes) > 0).all()
    notes = {text.partition(":")[0]: text for text in recorded.unsupported(MENU)}
    assert set(notes) == {"2", "3", "8"}
    assert "no 3-bit kernel; stored packed at 3 bits, timed as 4 bits" in notes["3"]
    assert "one scale per row" in notes["8"]


def test_kernels_are_those_that_were_timed(recorded):
    kernels = recorded.kernels(MENU)
    four = "torch aten._weight_int4pack_mm_for_cpu, groups of 128"
    assert kernels == {
        "2": four,
        "3": four,
        "4": four,
        "8": "torch aten._weight_int8pack_mm, one scale per row",
        "16": "torch linear (bf16)",
    }


def test_experts_of_two_shapes_may_have_two_kernels(recorded):
    record = recorded.record
    full = record.expert((2048, 1024, True), Format(16))
    odd = replace(full, hidden_size=2000)
    two = MeasuredModel(replace(record, experts=(*record.experts, odd)))
    assert two.kernels(MENU)["4"].endswith(", groups of 128; or torch linear (bf16)")
    assert [note for note in two.unsupported(MENU) if note.startswith("4:")]


def test_it_says_what_was_measured_on_what(recorded):
    assert recorded.deterministic
    assert recorded.calibrated
    assert recorded.record.device in recorded.source
    assert "not measured" in recorded.source


def test_a_workload_beyond_the_record_is_refused(recorded):
    maps = np.zeros((1, OLMOE.num_experts), int)
    short = replace(
        recorded.record,
        matrices=tuple(
            replace(matrix, points=matrix.points[:2]) for matrix in recorded.record.matrices
        ),
    )
    assert MeasuredModel(short).cost(OLMOE, MENU, maps, Workload(batch=2)).latency_s[0] > 0
    with pytest.raises(InputError, match=r"no time of a .* matrix at 3 tokens"):
        MeasuredModel(short).cost(OLMOE, MENU, maps, Workload(batch=3))


def test_another_geometry_than_the_record_is_refused(recorded):
    spec = load_geometry("mixtral-8x7b")
    with pytest.raises(InputError, match="measure it with"):
        recorded.cost(spec, MENU, np.zeros((1, spec.num_experts), int), Workload())


@pytest.mark.parametrize(
    "maps",
    [np.zeros((1, 3), int), np.zeros((1, 1024)), np.full((1, 1024), 5), np.zeros(1024, int)],
)
def test_maps_that_do_not_fit_are_refused(recorded, maps):
    with pytest.raises(InputError):
        recorded.cost(OLMOE, MENU, maps, Workload())


def test_no_maps_cost_nothing(recorded):
    cost = recorded.cost(OLMOE, MENU, np.zeros((0, OLMOE.num_experts), int), Workload())
    assert cost.latency_s.shape == cost.energy_j.shape == cost.memory_bytes.shape == (0,)
