"""The measured model: its formula written out, its contract, this machine, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmpq import hardware
from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.formats import Format, Menu
from dmpq.hw_models import Workload, bench, load_hardware, machine
from dmpq.hw_models.bench import PowerSource, cuda_bench, host_bench
from dmpq.hw_models.live import LiveModel, cuda_model
from dmpq.hw_models.measured import MeasuredModel
from dmpq.hw_models.measurements import read_measurements
from dmpq.hw_models.meters import PowerMeasurement
from dmpq.hw_models.needs import MOST_TOKENS, grid, needs, seconds_at
from dmpq.hw_models.resident import (
    cache_bytes,
    head_shape,
    resident_bytes,
    resident_matrices,
    score_flops,
    score_rows,
)
from dmpq.hw_models.routing import inclusion_probabilities
from dmpq.hw_models.timing import Rig
from dmpq.search import main as search
from dmpq.session import Session
from dmpq.spec import GEOMETRIES, ModelSpec, MoELayer, load_geometry
from dmpq.testing import FakeClock, FakeGpu, FakeNvml, fake_nvml
from dmpq.testing.hardware import HardwareModelContract

OLMOE = load_geometry("olmoe-1b-7b")
MENU = Menu()
RECORDED = Path(__file__).parents[1] / "hw_models" / "recorded" / "host-amd-epyc.json"
TINY = ModelSpec(
    name="tiny",
    model_type="olmoe",
    hidden_size=64,
    num_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=256,
    tie_word_embeddings=False,
    dense_intermediate_size=48,
    moe_layers=(
        MoELayer("a", num_experts=4, top_k=2, hidden_size=64, intermediate_size=32),
        MoELayer("b", 4, 2, 64, 32, shared_intermediate_size=32),
    ),
)
SMALL_MENU = Menu.parse("2,4g32,8,16")


def quick_bench(**more):
    rig = Rig(cache_bytes=1 << 14, seconds=0.0, repetitions=3)
    return replace(host_bench(threads=1, rig=rig), **more)


@pytest.fixture
def live(tmp_path):
    return LiveModel(quick_bench(), folder=tmp_path)


@pytest.fixture(scope="module")
def recorded():
    return MeasuredModel(read_measurements(RECORDED))


class TestReplayed(HardwareModelContract):
    def make_model(self):
        return load_hardware(str(RECORDED))


class TestLive(HardwareModelContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.model = LiveModel(quick_bench(), folder=tmp_path)

    def make_model(self):
        return self.model

    def make_spec(self):
        return TINY

    def make_menu(self):
        return SMALL_MENU


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


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("workload", [Workload(), Workload("prefill", 2, 300)], ids=str)
def test_memory_is_that_of_the_analytical_model(geometry, workload):
    spec = load_geometry(geometry)
    maps = np.zeros((1, spec.num_experts), int)
    parts = load_hardware("a100").breakdown(spec, MENU, maps, workload)
    assert resident_bytes(spec, workload) == parts.resident_bytes


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_resident_matrices_hold_the_resident_weights(geometry):
    spec = load_geometry(geometry)
    held = sum(count * out * columns for (out, columns), count in resident_matrices(spec).items())
    head = np.prod(head_shape(spec))
    outside = spec.other_parameters - (1 if spec.tie_word_embeddings else 2) * head
    assert held == pytest.approx(outside, rel=1e-3)  # norms and biases are no matrices


def test_latent_attention_counts_as_one_matrix_of_as_many_weights():
    spec = replace(TINY, attention_parameters=6400, cache_values=40)
    assert resident_matrices(spec)[100, 64] == 3
    assert cache_bytes(spec, Workload(batch=2, context=10)) == 2 * 10 * 40 * 3 * 2


def test_queries_that_share_a_part_of_the_cache():
    assert score_rows(TINY, Workload(batch=8)) == 2
    assert score_rows(TINY, Workload("prefill", 8, 300)) == 300


def test_scores_read_the_whole_context_in_decode_and_half_in_prefill():
    decode = score_flops(TINY, Workload(batch=1, context=100))
    assert decode == 3 * 4 * 100 * 64
    assert score_flops(TINY, Workload("prefill", 1, 100)) == decode * 50


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


def maps_of(spec, menu=SMALL_MENU):
    return np.repeat(np.arange(len(menu))[:, None], spec.num_experts, axis=1)


def test_this_machine_is_measured_once_and_kept(live, tmp_path, monkeypatch):
    first = live.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
    (kept,) = tmp_path.glob("host-*.json")

    def never(*_arguments, **_more):
        raise AssertionError("measured again")

    for name in ("time_expert", "time_matrix", "time_gather", "time_copy"):
        monkeypatch.setattr(bench, name, never)
    again = LiveModel(quick_bench(), folder=tmp_path)
    for model in (live, again, load_hardware(str(kept))):
        cost = model.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
        assert cost.latency_s.tolist() == first.latency_s.tolist()
        assert cost.energy_j.tolist() == first.energy_j.tolist()


def test_more_tokens_add_points_and_change_none(live, tmp_path):
    before = live.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
    (kept,) = tmp_path.glob("host-*.json")
    old = {e.label: e.whole for e in read_measurements(kept).experts}
    live.cost(TINY, SMALL_MENU, maps_of(TINY), Workload(batch=16))
    after = live.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
    assert after.latency_s.tolist() == before.latency_s.tolist()
    new = {e.label: e.whole for e in read_measurements(kept).experts}
    assert all(new[label][: len(old[label])] == old[label] for label in old)
    assert [p.tokens for p in new["16"]] == [1, 2, 4, 8, 16]


def test_kernels_are_those_that_times_are_of(live):
    """Groups of 16 suit no 4-bit kernel here, but are priced with the nearest that was timed."""
    menu = Menu.parse("4g16,4g32,16")
    assert live.kernels(menu)["4g16"] == "torch aten._weight_int8pack_mm, one scale per row"
    live.cost(TINY, menu, maps_of(TINY, menu), Workload())
    kept = live.measured(TINY, menu, Workload())
    assert live.kernels(menu) == kept.kernels(menu)
    assert live.unsupported(menu) == kept.unsupported(menu)


def test_more_formats_add_kernels(live, tmp_path):
    live.cost(TINY, Menu.parse("16"), maps_of(TINY, Menu.parse("16")), Workload())
    live.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
    (kept,) = tmp_path.glob("host-*.json")
    assert [e.label for e in read_measurements(kept).experts] == ["4g32", "4g64", "8", "16"]


def test_other_threads_are_another_machine(live, tmp_path):
    wanted = needs(TINY, SMALL_MENU, Workload(), inclusion_probabilities(TINY, None))
    rig = replace(live.bench.rig, threads=2)
    other = replace(live.bench, rig=rig)
    assert other.fingerprint(wanted) != live.bench.fingerprint(wanted)


def test_a_record_that_was_tampered_with_is_refused(live, tmp_path):
    live.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
    (kept,) = tmp_path.glob("host-*.json")
    kept.write_text("{}")
    fresh = LiveModel(quick_bench(), folder=tmp_path)
    with pytest.raises(InputError, match=r"refused: .*; delete that file, and") as refused:
        fresh.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
    assert str(kept) in str(refused.value)
    assert str(refused.value).count(". ") == 0
    kept.unlink()
    assert (fresh.cost(TINY, SMALL_MENU, maps_of(TINY), Workload()).latency_s > 0).all()


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"schema": "dmpq.measurements/99"}'])
def test_a_damaged_record_ends_the_search_with_two_and_a_remedy(
    damage, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("dmpq.hw_models.live.host_bench", lambda threads: quick_bench())
    monkeypatch.setattr("dmpq.hw_models.live.Bench.fingerprint", lambda *_: "kept")
    kept = machine.cache_folder() / "host-kept.json"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(damage)
    assert search(["--hw=host", f"--out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "delete that file" in said
    assert (said.startswith("error: "), said.count("\n")) == (True, 1)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    model = LiveModel(quick_bench(), folder=tmp_path / "file" / "folder")
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        model.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())


def test_progress_is_told(tmp_path):
    told = []
    model = LiveModel(quick_bench(), folder=tmp_path, progress=lambda *step: told.append(step))
    model.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2] == len(told) - 1


class Meter:
    """Counts the fake clock's seconds at a power that depends on what runs."""

    origin = "rapl"

    def __init__(self):
        self.clock, self.joules, self.watts = FakeClock(), 0.0, 10.0

    def read_j(self):
        return self.joules

    def passes(self, seconds, watts=10.0):
        self.clock.sleep(seconds)
        self.joules += watts * seconds


def test_measured_power_prices_energy_by_kernel(tmp_path, monkeypatch):
    meter = Meter()
    monkeypatch.setattr(
        bench,
        "expert_work",
        lambda _rig, kernel, *_shape, **_more: lambda: meter.passes(2.5, 10 + kernel.bits),
    )
    power = PowerSource(
        "rapl",
        "a meter",
        meter=meter,
        measurement=PowerMeasurement(5.0, 5, meter.clock, meter.passes),
    )
    model = LiveModel(quick_bench(power=power), folder=tmp_path)
    cost = model.cost(TINY, SMALL_MENU, maps_of(TINY), Workload())
    (kept,) = tmp_path.glob("*.json")
    powers = read_measurements(kept).energy.powers
    assert {p.bits: round(p.mean_w, 6) for p in powers} == {4: 4, 8: 8, 16: 16}
    assert all((p.n, p.idle_w) == (5, 10) for p in powers)
    seconds = model.expert_latency(TINY, SMALL_MENU, Workload()).sum(axis=(0, 1))
    other = cost.latency_s[-1] - seconds[-1]
    gather = 2 * 2 * seconds_at(read_measurements(kept).gathers[0].points, np.array([1.0]))[0]
    for b, bits in enumerate((4, 4, 8, 16)):
        expected = bits * (seconds[b] - gather) + 16 * (other + gather)
        assert cost.energy_j[b] == pytest.approx(expected)


def test_energy_without_a_meter_is_assumed_and_says_so(tmp_path):
    found = host_bench(threads=1, rapl=tmp_path)
    assert found.power.origin == "analytical"
    assert found.power.assumed_w == 0.75 * load_hardware("cpu").facts.tdp_w
    assert "not measured" in found.power.source
    assert "assumed" in found.power.source


def test_energy_with_rapl_is_measured(tmp_path):
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    for name, text in (("name", "package-0"), ("energy_uj", 1), ("max_energy_range_uj", 9)):
        (folder / name).write_text(str(text))
    found = host_bench(threads=1, rapl=tmp_path)
    assert (found.power.origin, found.power.assumed_w) == ("rapl", None)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads):
    with pytest.raises(InputError, match="threads"):
        host_bench(threads=threads)


class FakeTorchCuda:
    """Just enough of ``torch.cuda`` for the facts of a device."""

    L2_cache_size, name, uuid = 1 << 20, "Fake", "0"

    def __init__(self, error=None):
        self.error = error

    def init(self):
        if self.error is not None:
            raise self.error

    def current_device(self):
        return 0

    def get_device_properties(self, _index):
        return self

    def memory_reserved(self, _index):
        return 1 << 20


@pytest.fixture
def with_cuda(monkeypatch):
    import torch

    def install(error=None):
        monkeypatch.setattr(torch, "cuda", FakeTorchCuda(error))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(bench, "kernels", lambda _device: ((), ()))

    return install


def test_a_torch_without_cuda_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="needs a torch with CUDA"):
        load_hardware("cuda")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Update"),
        RuntimeError("No CUDA GPUs are available"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_no_gpu_and_an_old_driver_are_one_sentence(with_cuda, error):
    with_cuda(error)
    with pytest.raises(InputError, match="cannot use a GPU here") as refused:
        load_hardware("cuda")
    assert str(error).partition(". ")[0] in str(refused.value)


def test_a_gpu_is_described_by_torch_and_nvml(with_cuda):
    with_cuda()
    gpus = [FakeGpu(uuid="GPU-1"), FakeGpu(uuid="GPU-0", memory_bytes=(3 << 20, 9 << 20))]
    with fake_nvml(FakeNvml(gpus)):
        found = cuda_bench()
    assert (found.capacity_bytes, found.runtime_bytes) == (9 << 20, 2 << 20)
    assert found.power.origin == "nvml"
    assert "driver 600.00.00" in found.device


@pytest.mark.parametrize("code", [3, 4, 15])
def test_energy_that_cannot_be_read_is_refused_unless_power_is_given(with_cuda, code):
    with_cuda()
    fake = FakeNvml([FakeGpu(uuid="GPU-0")])
    fake.faults["nvmlDeviceGetTotalEnergyConsumption"] = code
    with fake_nvml(fake):
        with pytest.raises(InputError):
            cuda_bench()
        found = cuda_bench(tdp_w=60)
    assert (found.power.origin, found.power.assumed_w) == ("analytical", 45)
    assert "--tdp-w" in found.power.source


@pytest.mark.parametrize("code", [3, 4])
def test_a_search_with_the_power_given_finds_what_the_command_measured(with_cuda, code):
    with_cuda()
    fake = FakeNvml([FakeGpu(uuid="GPU-0")])
    fake.faults["nvmlDeviceGetTotalEnergyConsumption"] = code
    wanted = needs(TINY, SMALL_MENU, Workload(), inclusion_probabilities(TINY, None))
    with fake_nvml(fake):
        with pytest.raises(InputError, match=r"state the power \(--tdp-w\)"):
            _ = Session(SearchConfig(hw="cuda")).hardware
        searched = Session(SearchConfig(hw="cuda", tdp_w=60)).hardware
        measured = cuda_model(tdp_w=60)
    assert searched.bench.power.assumed_w == 45
    assert searched.bench.fingerprint(wanted) == measured.bench.fingerprint(wanted)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hw=a100", "--tdp-w=300"], "the GPU at hand, not of a100; give it with --hw cuda"),
        (["--hw=host", "--tdp-w=300"], "not of host; give it with --hw cuda"),
        (["--hw=cuda", "--tdp-w=nan"], "nan W (--tdp-w) makes no sense"),
        (["--hw=cuda", "--tdp-w=0"], "0 W (--tdp-w) makes no sense"),
        (["--hw=cuda", "--tdp-w=1e5"], "give watts above 0 and below 100,000"),
        (["--tdp-w=x"], "--tdp-w"),
    ],
)
def test_a_search_refuses_a_power_of_no_sense_in_one_line(flags, said, tmp_path, capsys):
    try:
        code = search([*flags, f"--out={tmp_path / 'run'}"])
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_power_that_is_not_given_leaves_a_run_its_folder():
    assert SearchConfig().digest() == "0cf9012ab3e0"
    assert SearchConfig(hw="cuda").digest() != SearchConfig(hw="cuda", tdp_w=60).digest()


@pytest.mark.parametrize("watts", [0, -1, float("nan"), float("inf")])
def test_a_power_of_no_sense_is_refused(watts):
    with pytest.raises(InputError, match="no sense"):
        cuda_bench(tdp_w=watts)


def test_the_cpu_is_described_by_its_files(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some   CPU\n\nmodel name\t: Other\n")
    assert machine.cpu_name(info) == "Some CPU"
    assert machine.cpu_name(tmp_path / "none")
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        for index, level, size in ((0, 1, "48K"), (3, 3, "32M")):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{text}\n")
    assert machine.cpu_cache_bytes(tmp_path) == 64 << 20
    assert machine.cpu_cache_bytes(tmp_path / "none") == machine.UNKNOWN_CACHE_BYTES


def test_measurements_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.cache_folder() == tmp_path / "dmpq" / "measurements"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says: ignore it
    assert machine.cache_folder() == Path.home() / ".cache" / "dmpq" / "measurements"


@pytest.fixture
def tiny_config(tmp_path, monkeypatch):
    config = {
        "model_type": "olmoe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("dmpq.hw_models.live.host_bench", lambda threads: quick_bench())
    return path


def test_the_command_measures_prints_and_writes(tiny_config, tmp_path, capsys):
    out = tmp_path / "record.json"
    flags = ["--model", str(tiny_config), "--batch", "4", "--out", str(out)]
    assert hardware.main(["measure", *flags]) == 0
    said = capsys.readouterr().out
    assert "expert 64 x 32" in said
    assert "not measured" in said
    spec = load_geometry(str(tiny_config))
    cost = load_hardware(str(out)).cost(spec, MENU, maps_of(spec, MENU), Workload(batch=4))
    assert (cost.latency_s > 0).all()


@pytest.mark.parametrize(
    "flags",
    [
        ["--hw", "hots"],
        ["--hw", "a100"],
        ["--threads", "0"],
        ["--threads", "x"],
        ["--tdp-w", "5"],
        ["--hw", "cuda", "--tdp-w", "nan"],
        ["--cost-geometry", "olmo"],
        ["--model", "no/such/model"],
        ["--bits", "5"],
        ["--phase", "decoding"],
        ["--batch", "0"],
        ["--out", "record.txt"],
        ["--out", "no/such/folder/record.json"],
    ],
)
def test_the_command_refuses_in_one_line(flags, capsys):
    try:
        code = hardware.main(["measure", *flags])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_hw_models_import_no_torch():
    code = (
        "import sys, dmpq.hw_models, dmpq.hw_models.live, dmpq.hw_models.timing\n"
        "import dmpq.hw_models.meters\n"
        "assert 'torch' not in sys.modules and 'pynvml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_real_gpu_is_measured_and_replayed(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = cuda_bench(tdp_w=300, rig=Rig(cache_bytes=1 << 20, seconds=0.0, repetitions=3))
    spec, menu = replace(OLMOE, moe_layers=OLMOE.moe_layers[:1]), Menu.parse(["4", "16"])
    model = LiveModel(found, folder=tmp_path)
    cost = model.cost(spec, menu, maps_of(spec, menu), Workload())
    assert (cost.energy_j > 0).all()
    (kept,) = tmp_path.glob("cuda-*.json")
    again = load_hardware(str(kept)).cost(spec, menu, maps_of(spec, menu), Workload())
    assert again.latency_s.tolist() == cost.latency_s.tolist()
