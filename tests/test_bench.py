"""What the machine is: its kernels' libraries, its meters, its files, and a GPU that fails."""

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from benches import SMALL_MENU, TINY, quick_bench

import dmpq
from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.hw_models import Workload, bench, load_hardware, machine
from dmpq.hw_models.bench import cuda_bench, host_bench
from dmpq.hw_models.live import cuda_model
from dmpq.hw_models.needs import needs
from dmpq.hw_models.routing import inclusion_probabilities
from dmpq.revision import git_revision
from dmpq.search import main as search
from dmpq.session import Session
from dmpq.testing import FakeGpu, FakeNvml, fake_nvml


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


def test_a_power_has_a_run_folder_of_its_own():
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


def test_hw_models_import_no_torch():
    code = (
        "import sys, dmpq.hw_models, dmpq.hw_models.live, dmpq.hw_models.timing\n"
        "import dmpq.hw_models.meters\n"
        "assert 'torch' not in sys.modules and 'pynvml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_record_says_when_and_by_what_it_was_made():
    selected = inclusion_probabilities(TINY, None)
    before = datetime.now(UTC).date()
    found = quick_bench().measure(needs(TINY, SMALL_MENU, Workload(), selected))
    days = {before.isoformat(), datetime.now(UTC).date().isoformat()}
    day, code = re.search(r"begun on (\S+) \(UTC\) by (.+)$", found.provenance).groups()
    assert day in days
    assert code.startswith(f"dmpq {dmpq.__version__}")
    if revision := git_revision():
        assert code.endswith(f"revision {revision}")
