"""Real kernels against dequantized matmuls, and how they are timed."""

import time

import pytest
import torch

from dmpq.formats import Format
from dmpq.hw_models import timing
from dmpq.hw_models.kernels import TOLERANCE, Kernel, choose, fault, kernels, quantize
from dmpq.hw_models.timing import (
    ROTATION,
    Rig,
    expert_forward,
    expert_matrices,
    stored_bytes,
    time_copy,
    time_expert,
    time_gather,
    time_matrix,
)

QUICK = Rig(cache_bytes=1 << 14, seconds=0.0, repetitions=3)
CPU = {kernel.bits: kernel for kernel in kernels("cpu")[0]}
SHAPE = (128, 64, True)

cpu_kernels = pytest.mark.parametrize("bits", sorted(CPU))


def weight(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()


def dequantized(kernel, matrix, group):
    return matrix.float() if kernel.bits == 16 else kernel.codes(matrix, group).weight()


def test_this_torch_has_kernels_of_4_8_and_16_bits():
    found, notes = kernels("cpu")
    assert [kernel.bits for kernel in found] == [4, 8, 16]
    assert notes == ()


@cpu_kernels
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3, 17, 64])
def test_products_are_those_of_the_dequantized_weights(bits, group, tokens):
    kernel, matrix = CPU[bits], weight(48, 256)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.float() @ dequantized(kernel, matrix, group).T
    got = kernel(x, kernel.store(matrix, group)).float()
    assert got.shape == (tokens, 48)
    assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()


@cpu_kernels
def test_an_expert_is_gate_up_silu_down(bits):
    kernel = CPU[bits]
    gate_up, down = (weight(*shape, seed=i) for i, shape in enumerate(expert_matrices(SHAPE)))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    gate, up = (x.float() @ dequantized(kernel, gate_up, 64).T).chunk(2, dim=1)
    expected = (torch.nn.functional.silu(gate) * up) @ dequantized(kernel, down, 64).T
    stored = kernel.store(gate_up, 64), kernel.store(down, 64)
    got = expert_forward(kernel, x, stored, True).float()
    assert (got - expected).abs().max() < 2 * TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, None])
def test_codes_are_within_half_a_step(bits, group):
    matrix = weight(16, 64)
    codes = quantize(matrix, bits, group)
    assert 0 <= codes.codes.min() <= codes.codes.max() <= 2**bits - 1
    step = codes.scale.float().repeat_interleave(64 // codes.scale.shape[1], dim=1)
    # bf16 scales and shifts may move the ends of the range by another step.
    assert ((codes.weight() - matrix.float()).abs() <= 1.5 * step).all()


def test_a_matrix_of_zeros_stays_zero():
    assert not quantize(torch.zeros(4, 32).bfloat16(), 4, 32).weight().any()
    assert not quantize(torch.zeros(4, 32).bfloat16(), 8, None).weight().any()


@pytest.mark.parametrize(
    ("key", "shape", "bits", "group"),
    [
        ("2", (2048, 1024, True), 4, 128),
        ("3g32", (2048, 1024, True), 4, 32),
        ("4", (2048, 1024, True), 4, 128),
        ("4g32", (2048, 1024, True), 4, 32),
        ("4", (64, 32, True), 4, 64),
        ("4g16", (2048, 1024, True), 8, 0),
        ("4", (2040, 1024, True), 8, 0),
        ("2", (40, 24, False), 8, 0),
        ("8", (2048, 1024, True), 8, 0),
        ("16", (2048, 1024, True), 16, 0),
    ],
)
def test_formats_run_on_their_own_kernel_or_the_next_wider(key, shape, bits, group):
    kernel, got = choose(kernels("cpu")[0], Format.parse(key), expert_matrices(shape))
    assert (kernel.bits, got) == (bits, group)


def broken(multiply):
    return Kernel("broken", 16, lambda *_: True, False, lambda w, _: (w,), multiply)


def test_kernels_that_are_wrong_or_missing_are_found_out():
    assert fault(broken(torch.nn.functional.linear), "cpu") is None
    assert "off by" in fault(broken(lambda x, w: 1.1 * torch.nn.functional.linear(x, w)), "cpu")
    assert "off by" in fault(broken(lambda x, w: torch.full((len(x), 256), torch.nan)), "cpu")

    def missing(_x, _w):
        raise RuntimeError("no such kernel. Traceback follows")

    assert fault(broken(missing), "cpu") == "no such kernel"


@cpu_kernels
def test_an_expert_is_timed_whole_and_in_halves(bits):
    got = time_expert(QUICK, CPU[bits], SHAPE, group=64, tokens=(1, 2, 8))
    assert got.shape == SHAPE
    assert (got.bits, got.kernel) == (bits, CPU[bits].name)
    assert got.group_size == (64 if bits == 4 else 0)
    for part in (got.whole, got.gate_up, got.down):
        assert [point.tokens for point in part] == [1, 2, 8]
        assert all(point.median_s > 0 and point.n >= 3 for point in part)


@pytest.mark.parametrize(("bits", "per_weight"), [(4, 0.5 + 4 / 64), (8, 1.0), (16, 2.0)])
def test_what_a_kernel_stores_is_counted(bits, per_weight):
    rows, columns = 64, 128
    got = stored_bytes(CPU[bits].store(weight(rows, columns), 64))
    scales = 2 * rows if bits == 8 else 0
    assert got == rows * columns * per_weight + scales


def test_weights_rotate_among_more_than_the_cache(monkeypatch):
    seen = set()
    linear = CPU[16]

    def watched(x, stored):
        seen.add(stored.data_ptr())
        return torch.nn.functional.linear(x, stored)

    kernel = Kernel("watched", 16, linear.fits, False, linear.pack, watched)
    rig = Rig(cache_bytes=1 << 16, seconds=0.0, repetitions=40)
    time_matrix(rig, kernel, (64, 128), tokens=(1,))
    assert len(seen) * 64 * 128 * 2 >= ROTATION * rig.cache_bytes


def test_large_weights_need_no_copies():
    assert QUICK.copies(ROTATION * QUICK.cache_bytes) == 1
    assert QUICK.copies(1 << 40) == 1
    assert QUICK.copies(ROTATION * QUICK.cache_bytes - 1) == 2


def test_threads_are_set_while_timing_and_put_back():
    before = torch.get_num_threads()
    with Rig(threads=before + 1).running():
        assert torch.get_num_threads() == before + 1
        assert torch.is_inference_mode_enabled()
    assert torch.get_num_threads() == before


def test_median_and_quartiles_are_of_the_samples():
    samples = timing.Samples((5.0, 1.0, 2.0, 4.0, 3.0), 1)
    assert samples.summary() == {"n": 5, "median_s": 3.0, "iqr_s": 2.0, "preempted": 1}


def test_interrupted_repetitions_are_left_out(monkeypatch):
    asked = []

    def every_third():
        asked.append(None)
        return len(asked) // 6

    monkeypatch.setattr(timing, "_preemptions", every_third)
    rig = Rig(seconds=0.02, repetitions=3)
    got = rig.samples([lambda: None])
    taken = len(asked) // 2
    assert got.preempted == 0
    assert len(got.seconds) == taken - taken // 3


def test_a_busy_machine_is_timed_all_the_same_and_told(monkeypatch):
    counter = iter(range(10_000))
    monkeypatch.setattr(timing, "_preemptions", lambda: next(counter))
    got = Rig(seconds=0.001, repetitions=3).samples([lambda: None])
    assert got.preempted == len(got.seconds) >= 3


def test_an_interrupted_repetition_counts_with_its_cpu_time(monkeypatch):
    counter = iter(range(10_000))
    monkeypatch.setattr(timing, "_preemptions", lambda: next(counter))
    got = Rig(threads=1, seconds=0.0, repetitions=3).samples([lambda: time.sleep(0.01)])
    assert got.preempted == 3
    assert max(got.seconds) < 0.01
    got = Rig(threads=2, seconds=0.0, repetitions=3).samples([lambda: time.sleep(0.01)])
    assert min(got.seconds) >= 0.01


def test_gathers_and_copies_are_timed():
    got = time_gather(QUICK, 64, tokens=(1, 4))
    assert [point.tokens for point in got.points] == [1, 4]
    copied = time_copy(QUICK)
    assert copied.bandwidth_bytes_per_s == 2 * copied.copied_bytes / copied.median_s


@pytest.mark.gpu
def test_cuda_kernels_are_right_and_timed():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found, _ = kernels("cuda")
    assert found[-1].bits == 16
    for kernel in found:
        assert fault(kernel, "cuda") is None
        rig = Rig(device="cuda", cache_bytes=1 << 20, seconds=0.0, repetitions=3)
        got = time_expert(rig, kernel, (2048, 1024, True), group=128, tokens=(1, 16))
        assert all(point.median_s > 0 for point in got.whole)
