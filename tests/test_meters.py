"""Energy meters: the rule for every failure, through the real NVML binding and fake RAPL files."""

import pytest

from dmpq.errors import InputError
from dmpq.hw_models.meters import NvmlMeter, PowerMeasurement, RaplMeter, open_rapl
from dmpq.testing import FakeClock, FakeGpu, FakeNvml, fake_nvml
from dmpq.testing.nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    LIB_RM_VERSION_MISMATCH,
    NO_PERMISSION,
    NOT_SUPPORTED,
)

ENERGY = "nvmlDeviceGetTotalEnergyConsumption"


class Scripted:
    """A meter that reads what it is told to, and a clock that work moves."""

    origin = "nvml"

    def __init__(self, clock, readings):
        self.clock, self.readings = clock, iter(readings)

    def read_j(self):
        return next(self.readings)


def measurement(clock, **more):
    return PowerMeasurement(clock=clock, sleep=clock.sleep, **more)


def sentence(error):
    text = str(error.value)
    assert text[0].isupper()
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("watts", [0.5, 300.0])
def test_power_is_that_of_the_work_above_idle(watts):
    gpu = FakeGpu(idle_w=70, busy_w=70 + watts)
    with fake_nvml(FakeNvml([gpu])):
        read = measurement(gpu.clock).measure(NvmlMeter(), gpu.work)
    assert read.mean_w == pytest.approx(watts, rel=1e-3)
    assert read.idle_w == pytest.approx(70)
    assert read.std_w == pytest.approx(0, abs=1e-3)
    assert read.n == 5
    assert read.window_s >= 5


def test_spread_over_windows_is_the_sample_standard_deviation():
    clock = FakeClock()
    idle, load = [0, 50], [0, 800, 0, 816, 0, 832, 0, 848, 0, 864]
    read = measurement(clock).measure(Scripted(clock, idle + load), lambda: clock.sleep(8))
    assert (read.idle_w, read.mean_w) == (10, pytest.approx(104 - 10))
    assert read.std_w == pytest.approx(10**0.5)


def test_a_counter_that_is_reset_repeats_the_window():
    clock = FakeClock()
    idle, reset, good = [0, 50], [1000, 20], [20, 820]
    readings = [*idle, *reset, *good * 5]
    read = measurement(clock).measure(Scripted(clock, readings), lambda: clock.sleep(8))
    assert (read.mean_w, read.n) == (pytest.approx(90), 5)


def test_a_real_counter_that_is_reset_repeats_the_window():
    gpu, resets = FakeGpu(), [True]

    def work():
        gpu.work()
        if resets and gpu.clock.now > 7:
            gpu.energy_j = 0.0
            resets.pop()

    with fake_nvml(FakeNvml([gpu])):
        read = measurement(gpu.clock).measure(NvmlMeter(), work)
    assert not resets
    assert (read.mean_w, read.std_w) == (pytest.approx(300), pytest.approx(0, abs=1e-6))


def test_a_counter_that_goes_backwards_again_and_again_is_refused():
    clock = FakeClock()
    with pytest.raises(InputError, match="backwards") as error:
        measurement(clock).measure(Scripted(clock, [0, 50, *[9, 1] * 3]), lambda: clock.sleep(5))
    sentence(error)


@pytest.mark.parametrize("readings", [[7, 7], [0, 50, 7, 7]], ids=["idle", "load"])
def test_a_counter_that_stands_still_is_refused(readings):
    clock = FakeClock()
    with pytest.raises(InputError, match="stood still") as error:
        measurement(clock).measure(Scripted(clock, readings), lambda: clock.sleep(5))
    sentence(error)


def test_load_that_draws_no_more_than_idle_is_refused():
    gpu = FakeGpu(idle_w=70, busy_w=60)
    with fake_nvml(FakeNvml([gpu])), pytest.raises(InputError, match="no more under load"):
        measurement(gpu.clock).measure(NvmlMeter(), gpu.work)


@pytest.mark.parametrize(
    "wrong", [{"window_s": 4.9}, {"window_s": float("nan")}, {"trials": 4}, {"trials": 0}]
)
def test_short_or_few_windows_are_refused(wrong):
    with pytest.raises(InputError):
        PowerMeasurement(**wrong)


@pytest.mark.parametrize(
    ("function", "code", "said"),
    [
        (ENERGY, NOT_SUPPORTED, "does not support"),
        (ENERGY, NO_PERMISSION, "no permission"),
        (ENERGY, GPU_IS_LOST, "lost"),
        (ENERGY, 999, "Unknown Error"),
        ("nvmlInitWithFlags", DRIVER_NOT_LOADED, "not loaded"),
        ("nvmlInitWithFlags", LIB_RM_VERSION_MISMATCH, "different versions"),
        ("nvmlDeviceGetCount_v2", NOT_SUPPORTED, "does not support"),
    ],
)
def test_every_fault_is_one_sentence(function, code, said):
    with (
        fake_nvml(FakeNvml(faults={function: code})),
        pytest.raises(InputError, match=said) as error,
    ):
        NvmlMeter().read_j()
    sentence(error)


def test_a_jetson_answers_nothing_after_init():
    fake = FakeNvml()
    fake.faults = dict.fromkeys(
        [
            "nvmlDeviceGetCount_v2",
            "nvmlDeviceGetHandleByIndex_v2",
            "nvmlDeviceGetHandleByUUID",
            "nvmlDeviceGetName",
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetMigMode",
            ENERGY,
        ],
        NOT_SUPPORTED,
    )
    with fake_nvml(fake), pytest.raises(InputError, match="Jetson"):
        NvmlMeter().read_j()


def test_a_driver_without_the_counter_is_too_old():
    with (
        fake_nvml(FakeNvml(absent=frozenset({ENERGY}))),
        pytest.raises(InputError, match="too old") as error,
    ):
        NvmlMeter().read_j()
    sentence(error)


def test_a_driver_from_before_mig_still_counts():
    with fake_nvml(FakeNvml(absent=frozenset({"nvmlDeviceGetMigMode"}))):
        assert NvmlMeter().read_j() == 1000


def test_the_energy_of_a_mig_instance_cannot_be_told():
    with fake_nvml(FakeNvml([FakeGpu(mig=True)])), pytest.raises(InputError, match="MIG") as error:
        NvmlMeter().read_j()
    sentence(error)


def test_a_machine_without_a_driver(monkeypatch):
    import pynvml

    def missing(_name):
        raise OSError("no such file")

    monkeypatch.setattr(pynvml, "CDLL", missing)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    with pytest.raises(InputError, match="no NVIDIA driver") as error:
        NvmlMeter()
    sentence(error)


def test_gpus_are_told_apart_by_id_and_by_index():
    gpus = [FakeGpu(name=f"GPU {i}", uuid=f"GPU-{i}", energy_j=i) for i in range(3)]
    with fake_nvml(FakeNvml(gpus)):
        assert NvmlMeter(uuid="GPU-2").name == "GPU 2"
        assert NvmlMeter(index=1).read_j() == 1
        for wrong in ({"index": 3}, {"index": -1}, {"uuid": "GPU-9"}):
            with pytest.raises(InputError):
                NvmlMeter(**wrong)


def test_memory_in_use_and_in_all():
    with fake_nvml(FakeNvml([FakeGpu(memory_bytes=(3 << 30, 24 << 30))])):
        assert NvmlMeter().memory_bytes() == (3 << 30, 24 << 30)


def test_the_fake_leaves_the_binding_as_it_was():
    import pynvml

    before = pynvml.nvmlLib
    with fake_nvml():
        NvmlMeter()
    assert pynvml.nvmlLib is before
    assert ENERGY not in pynvml._nvmlGetFunctionPointer_cache


def package(root, zone, energy_uj, *, name="package-0", wraps_at=1_000_000_000):
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (
        ("name", name),
        ("energy_uj", energy_uj),
        ("max_energy_range_uj", wraps_at),
    ):
        (folder / file).write_text(f"{text}\n")


def test_rapl_adds_packages_and_nothing_twice(tmp_path):
    package(tmp_path, "intel-rapl:0", 10)
    package(tmp_path, "intel-rapl:1", 20, name="package-1")
    package(tmp_path, "intel-rapl:0:0", 30, name="core")
    package(tmp_path, "intel-rapl:2", 40, name="psys")
    meter = RaplMeter(tmp_path)
    assert meter.read_j() == 0
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl:2"):
        (tmp_path / zone / "energy_uj").write_text("2000020")
    assert meter.read_j() == pytest.approx((2000010 + 2000000) / 1e6)


def test_rapl_wraps_around(tmp_path):
    package(tmp_path, "intel-rapl:0", 999_000_000)
    meter = RaplMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("4000000")
    assert meter.read_j() == 5
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("6000000")
    assert meter.read_j() == 7


def test_rapl_measures_power(tmp_path):
    clock = FakeClock()
    package(tmp_path, "intel-rapl:0", 0, wraps_at=10**9)
    counter = tmp_path / "intel-rapl:0" / "energy_uj"

    def passes(seconds, watts):
        clock.sleep(seconds)
        counter.write_text(str((int(counter.read_text()) + int(watts * seconds * 1e6)) % 10**9))

    measured = PowerMeasurement(clock=clock, sleep=lambda s: passes(s, 30))
    read = measured.measure(RaplMeter(tmp_path), lambda: passes(0.25, 130))
    assert (read.mean_w, read.idle_w) == (pytest.approx(100, abs=0.01), pytest.approx(30))


def test_no_rapl_has_a_reason(tmp_path):
    meter, reason = open_rapl(tmp_path / "nowhere")
    assert meter is None
    assert "no RAPL counter" in reason


def test_rapl_that_may_not_be_read_has_a_reason(tmp_path, monkeypatch):
    from pathlib import Path

    package(tmp_path, "intel-rapl:0", 0)
    read_text = Path.read_text

    def refused(path, *arguments, **more):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", refused)
    meter, reason = open_rapl(tmp_path)
    assert meter is None
    assert "no permission" in reason


@pytest.mark.parametrize("text", ["", "-5", "many", "1e9", "\xff"])
def test_rapl_that_is_no_number_is_refused(tmp_path, text):
    package(tmp_path, "intel-rapl:0", text)
    with pytest.raises(InputError) as error:
        RaplMeter(tmp_path)
    sentence(error)
