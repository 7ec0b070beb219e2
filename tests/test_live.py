"""This machine as a hardware model: measured once, kept, found again, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from benches import SMALL_MENU, TINY, maps_of, quick_bench

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hw_models import Workload, bench, load_hardware, machine
from dmpq.hw_models.bench import PowerSource, cuda_bench
from dmpq.hw_models.live import LiveModel
from dmpq.hw_models.measurements import read_measurements
from dmpq.hw_models.meters import PowerMeasurement
from dmpq.hw_models.needs import needs, seconds_at
from dmpq.hw_models.routing import inclusion_probabilities
from dmpq.hw_models.timing import Rig
from dmpq.search import main as search
from dmpq.spec import load_geometry
from dmpq.testing import FakeClock
from dmpq.testing.hardware import HardwareModelContract

OLMOE = load_geometry("olmoe-1b-7b")


@pytest.fixture
def live(tmp_path):
    return LiveModel(quick_bench(), folder=tmp_path)


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


@pytest.mark.gpu
def test_a_real_gpu_is_measured_and_replayed(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = cuda_bench(rig=Rig(cache_bytes=1 << 20, seconds=0.0, repetitions=3))
    spec, menu = replace(OLMOE, moe_layers=OLMOE.moe_layers[:1]), Menu.parse(["4", "16"])
    model = LiveModel(found, folder=tmp_path)
    cost = model.cost(spec, menu, maps_of(spec, menu), Workload())
    assert (cost.energy_j > 0).all()
    (kept,) = tmp_path.glob("cuda-*.json")
    again = load_hardware(str(kept)).cost(spec, menu, maps_of(spec, menu), Workload())
    assert again.latency_s.tolist() == cost.latency_s.tolist()
