"""Times the real expert forward, the other matrices and memory, on the CPU or a CUDA device.

Each repetition takes the next of several copies of the weights, together larger than the
last-level cache: in a step of a real model, an expert's weights come from memory. On a CPU every
call is timed by itself. On CUDA a pass over all copies is captured as one graph, so that launches
do not hide the kernels, and timed between two events; a call's time is its share of the pass.
torch is imported when something is timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dmpq.hw_models.kernels import Kernel, Stored
from dmpq.hw_models.measurements import (
    CopyTiming,
    ExpertTiming,
    GatherTiming,
    MatrixTiming,
    Point,
)

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[[], object]
Expert = tuple[Stored, Stored]

ROTATION: Final = 4
"""Size of all copies in last-level caches."""
_WARM_UP: Final = 3
_PATIENCE: Final = 5
_COPIED_BYTES: Final = 8 << 20
_WEIGHT_SCALE: Final = 0.02
_WORK_S: Final = 0.02
"""Least time of a piece of work on CUDA, so that waiting for its end does not count."""


@dataclass(frozen=True)
class Samples:
    """Times of one thing.

    Attributes:
        seconds: One per repetition.
        preempted: How many of them another process interrupted.
    """

    seconds: tuple[float, ...]
    preempted: int

    def summary(self) -> dict[str, Any]:
        """Return what a record keeps of them: count, median, distance between the quartiles."""
        low, median, high = np.percentile(self.seconds, (25, 50, 75))
        return {
            "n": len(self.seconds),
            "median_s": float(median),
            "iqr_s": float(high - low),
            "preempted": self.preempted,
        }


@dataclass(frozen=True)
class Rig:
    """Where and how long to time.

    Attributes:
        device: ``"cpu"`` or a CUDA device of torch.
        threads: CPU threads that compute.
        cache_bytes: Last-level cache of the device.
        seconds: Least time spent on each point, after warming up.
        repetitions: Least repetitions of each point.
    """

    device: str = "cpu"
    threads: int = 1
    cache_bytes: int = 32 << 20
    seconds: float = 0.2
    repetitions: int = 5

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a CUDA device."""
        return self.device.startswith("cuda")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Set the threads, and no gradients, while the block lasts."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    def allocated_bytes(self) -> int:
        """Return what torch's allocator has given out on a CUDA device; 0 on a CPU."""
        import torch

        return torch.cuda.memory_allocated(self.device) if self.on_cuda else 0

    def copies(self, item_bytes: int) -> int:
        """Return how many copies of a thing exceed the cache."""
        return max(1, -(-ROTATION * self.cache_bytes // max(item_bytes, 1)))

    def samples(self, calls: Sequence[Call]) -> Samples:
        """Return the times of calls taken in turn.

        A repetition during which the system gave the CPU to somebody else is left out, unless
        five times the time does not bring enough others. Then all count, such ones with their
        CPU time where one thread computes, and it is said how many were such.
        """
        sample = self._cuda_sampler(calls) if self.on_cuda else _cpu_sampler(calls)
        own: list[float] = []
        preempted: list[float] = []
        begin = time.perf_counter()
        while True:
            spent, count = time.perf_counter() - begin, len(own) + len(preempted)
            enough = len(own) >= self.repetitions and spent >= self.seconds
            if enough or (count >= self.repetitions and spent >= _PATIENCE * self.seconds):
                break
            before, busy = _preemptions(), time.thread_time()
            seconds = sample()
            if self.on_cuda or _preemptions() == before:
                own.append(seconds)
            else:
                busy = time.thread_time() - busy
                preempted.append(busy if self.threads == 1 else seconds)
        if len(own) >= self.repetitions:
            return Samples(tuple(own), 0)
        return Samples((*own, *preempted), len(preempted))

    def point(self, tokens: int, calls: Sequence[Call]) -> Point:
        """Return the time of calls at a number of tokens."""
        return Point(tokens, **self.samples(calls).summary())

    def captured(self, calls: Sequence[Call]) -> Call:
        """Return the replay of calls that are captured as one CUDA graph; it does not wait."""
        import torch

        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # Triton tunes itself here, which no graph can capture
            for call in (*calls, *calls[:_WARM_UP]):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def _cuda_sampler(self, calls: Sequence[Call]) -> Callable[[], float]:
        import torch

        replay = self.captured(calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            begin.record()
            replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / len(calls)

        for _ in range(_WARM_UP):
            sample()
        return sample


def time_expert(
    rig: Rig,
    kernel: Kernel,
    shape: tuple[int, int, bool],
    *,
    group: int,
    tokens: Sequence[int],
) -> ExpertTiming:
    """Time one expert's forward.

    Args:
        rig: Where.
        kernel: Multiplies.
        shape: Hidden width, intermediate width, and whether the expert has a gate.
        group: Group size to ask the kernel for.
        tokens: Rows of the activations, rising from 1.
    """
    hidden, inner, gated = shape
    with rig.running():
        before = rig.allocated_bytes()
        experts = _copied_experts(rig, kernel, shape, group)
        allocated = (rig.allocated_bytes() - before) // len(experts)
        parts: tuple[list[Point], ...] = ([], [], [])
        for rows in tokens:
            x, h = _random(rig, rows, hidden), _random(rig, rows, inner)
            calls = (
                [_bound(expert_forward, kernel, x, expert, gated) for expert in experts],
                [_bound(_first_half, kernel, x, expert[0], gated) for expert in experts],
                [_bound(kernel, h, expert[1]) for expert in experts],
            )
            for points, timed in zip(parts, calls, strict=True):
                points.append(rig.point(rows, timed))
    return ExpertTiming(
        hidden_size=hidden,
        intermediate_size=inner,
        gated=gated,
        bits=kernel.bits,
        group_size=kernel.group_size(group),
        kernel=kernel.name,
        stored_bytes=allocated or sum(map(stored_bytes, experts[0])),
        whole=tuple(parts[0]),
        gate_up=tuple(parts[1]),
        down=tuple(parts[2]),
    )


def expert_work(
    rig: Rig, kernel: Kernel, shape: tuple[int, int, bool], *, group: int, tokens: int
) -> Callable[[], None]:
    """Return a piece of work that runs many experts and is done when it returns.

    On CUDA it replays a graph of them, as their times are measured: launched one by one, small
    experts would leave the GPU idle most of the time.
    """
    import torch

    with rig.running():
        experts = _copied_experts(rig, kernel, shape, group)
        x = _random(rig, tokens, shape[0])
        calls = [_bound(expert_forward, kernel, x, expert, shape[2]) for expert in experts]
        if not rig.on_cuda:
            replay, passes = None, 1
        else:
            replay = rig.captured(calls)
            passes = 1 + int(_WORK_S / (len(calls) * rig.samples(calls).summary()["median_s"]))

    def work() -> None:
        with rig.running():
            for _ in range(passes):
                for call in calls if replay is None else (replay,):
                    call()
            if rig.on_cuda:
                torch.cuda.synchronize(rig.device)

    return work


def time_matrix(
    rig: Rig, kernel: Kernel, shape: tuple[int, int], *, tokens: Sequence[int]
) -> MatrixTiming:
    """Time a matrix at full width, of shape (out, in)."""
    with rig.running():
        weight = _random(rig, *shape)
        stored = kernel.store(weight, shape[1])
        count = rig.copies(stored_bytes(stored))
        copies = [stored, *(copy.deepcopy(stored) for _ in range(count - 1))]
        points = []
        for rows in tokens:
            x = _random(rig, rows, shape[1])
            points.append(rig.point(rows, [_bound(kernel, x, one) for one in copies]))
    return MatrixTiming(shape[0], shape[1], kernel.name, tuple(points))


def time_gather(rig: Rig, hidden_size: int, *, tokens: Sequence[int]) -> GatherTiming:
    """Time fetching an expert's tokens, weighting what it returns, and adding it up."""
    import torch

    with rig.running():
        points: list[Point] = []
        for rows in tokens:
            stream, out = _random(rig, rows, hidden_size), _random(rig, rows, hidden_size)
            index = torch.randperm(rows).to(rig.device)
            weight = torch.rand(rows, 1).bfloat16().to(rig.device)

            def move(
                stream: Tensor = stream,
                out: Tensor = out,
                index: Tensor = index,
                weight: Tensor = weight,
            ) -> object:
                return out.index_add_(0, index, stream[index] * weight)

            points.append(rig.point(rows, [move]))
    return GatherTiming(hidden_size, tuple(points))


def time_copy(rig: Rig) -> CopyTiming:
    """Time a copy in memory that no cache can hold."""
    import torch

    with rig.running():
        chunks = [
            torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=rig.device)
            for _ in range(2 * rig.copies(_COPIED_BYTES))
        ]
        pairs = zip(chunks[::2], chunks[1::2], strict=True)
        samples = rig.samples([_bound(target.copy_, source) for source, target in pairs])
    return CopyTiming(_COPIED_BYTES, **samples.summary())


def expert_matrices(shape: tuple[int, int, bool]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return an expert's matrices, (out, in): gate and up, stacked; then down."""
    hidden, inner, gated = shape
    return ((2 if gated else 1) * inner, hidden), (hidden, inner)


def expert_forward(kernel: Kernel, x: Tensor, expert: Expert, gated: bool) -> Tensor:
    """Return what an expert makes of (tokens, hidden): gate and up, SwiGLU, down."""
    gate_up, down = expert
    return kernel(_first_half(kernel, x, gate_up, gated), down)


def stored_bytes(stored: Stored) -> int:
    """Return the bytes of all tensors that a kernel stores."""
    import torch

    total = 0
    for part in stored:
        tensors = part.state_dict().values() if isinstance(part, torch.nn.Module) else [part]
        total += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    return total


def _first_half(kernel: Kernel, x: Tensor, gate_up: Stored, gated: bool) -> Tensor:
    from torch.nn.functional import silu

    inner = kernel(x, gate_up)
    if not gated:
        return silu(inner)
    gate, up = inner.chunk(2, dim=-1)
    return silu(gate) * up


def _copied_experts(
    rig: Rig, kernel: Kernel, shape: tuple[int, int, bool], group: int
) -> list[Expert]:
    gate_up, down = (
        kernel.store(_random(rig, rows, columns), min(group, columns))
        for rows, columns in expert_matrices(shape)
    )
    first = gate_up, down
    count = rig.copies(sum(map(stored_bytes, first)))
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def _bound(function: Callable[..., Any], *arguments: Any) -> Call:
    return lambda: function(*arguments)


def _random(rig: Rig, rows: int, columns: int) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(rows * 31 + columns)
    values = torch.randn(rows, columns, generator=generator)
    return (values * _WEIGHT_SCALE).bfloat16().to(rig.device)


def _cpu_sampler(calls: Sequence[Call]) -> Callable[[], float]:
    for call in calls[:_WARM_UP]:
        call()
    turn = 0

    def sample() -> float:
        nonlocal turn
        call = calls[turn % len(calls)]
        turn += 1
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return sample


def _preemptions() -> int:
    """Return how often the system has taken the CPU from this process; 0 where it does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
