"""Times whole bit maps: the routed experts of a step, one after the other, as a map assigns them.

Every expert that a step may wake has weights of its own, so that what a step reads comes from
memory as far as it does when the map is served. Tokens are drawn once, by systematic sampling
(Madow 1949), which gives each expert exactly its probability; all maps see the same draws.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.formats import FULL_WIDTH, Format, Menu
from dmpq.hw_models.base import NOTHING_RUNS, Floats, Workload
from dmpq.hw_models.bench import Bench
from dmpq.hw_models.kernels import Kernel, Stored, keep_tuning
from dmpq.hw_models.maps import checked_maps
from dmpq.hw_models.routing import inclusion_probabilities
from dmpq.hw_models.timing import expert_forward, expert_matrices, stored_bytes
from dmpq.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES: Final = 2 << 30
"""Memory of a CPU that the weights of a map may take, unless told otherwise."""
GPU_SHARE: Final = 0.5
"""Share of a GPU's free memory, likewise."""
DRAWN_TOKENS: Final = 16
"""Tokens that are drawn at least: as many steps as it takes."""
_WEIGHT_SCALE: Final = 0.02

Routes = tuple[tuple[int, NDArray[np.int64]], ...]
"""Experts of a layer that a step wakes, each with its tokens."""


@dataclass(frozen=True)
class WholeTiming:
    """The measured time of a map's routed experts.

    Attributes:
        seconds: Of a step: the median.
        iqr_s: Distance between the quartiles.
        n: Repetitions.
        preempted: How many of them another process interrupted.
    """

    seconds: float
    iqr_s: float
    n: int
    preempted: int


def _assigned() -> Kernel:
    """Return the kernel that runs what each matrix was stored for: a map mixes kernels."""
    return Kernel(
        name="as assigned",
        bits=FULL_WIDTH,
        fits=lambda _shape, _group: True,
        grouped=False,
        pack=lambda weight, _group: (weight,),
        multiply=lambda x, kernel, *stored: kernel(x, stored),
    )


@dataclass(frozen=True, eq=False)
class WholeMaps:
    """Measures the whole maps of one model and workload on a machine.

    Attributes:
        bench: The machine.
        spec: Geometry of the model.
        menu: Formats that maps index.
        workload: What a step is.
        inclusion: (N,), probability that a token selects each expert; ``None`` for uniform.
        seed: Of the draw of tokens.
        memory_bytes: That the weights may take; where a map's widest would take more, layers
            spread evenly over the model are timed instead of all. ``None`` for 2 GiB on a CPU,
            and half of what is free on a GPU.
    """

    bench: Bench
    spec: ModelSpec
    menu: Menu
    workload: Workload
    inclusion: NDArray[np.floating] | None = None
    seed: int = 0
    memory_bytes: float | None = None
    _templates: dict[Any, Stored] = field(default_factory=dict, repr=False)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The MoE layers that are timed.

        Raises:
            InputError: If not even one fits into the memory.
        """
        worst = max(self._layer_bytes(layer) for layer in range(len(self.spec.moe_layers)))
        usable = self._usable_bytes
        count = min(len(self.spec.moe_layers), int(usable // worst))
        if count < 1:
            raise InputError(
                f"The experts of one layer of {self.spec.name} take {worst / 1e9:.3g} GB and "
                f"{usable / 1e9:.3g} GB may be used to measure whole maps; choose a "
                "smaller --cost-geometry."
            )
        spread = np.linspace(0, len(self.spec.moe_layers) - 1, count)
        return tuple(spread.round().astype(int).tolist())

    @cached_property
    def steps(self) -> int:
        """Steps that are drawn."""
        return max(1, DRAWN_TOKENS // self.workload.tokens)

    @cached_property
    def digest(self) -> str:
        """What a measured time depends on but the map, as a hash."""
        bench = self.bench
        kernels = [(fmt.key, self.kernel_of(fmt)) for fmt in self.menu.formats]
        facts = [bench.device, bench.rig.threads, dict(bench.versions), kernels, self.layers]
        selected = inclusion_probabilities(self.spec, self.inclusion)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(f"{self.spec}{self.menu}{self.workload}{self.seed}{self.steps}".encode())
        digest.update(selected.tobytes())
        return digest.hexdigest()[:16]

    def kernel_of(self, fmt: Format) -> str:
        """Return the name of the kernel that runs a format."""
        if fmt.is_pruned:
            return NOTHING_RUNS
        kernel, group = self.bench.kernel(fmt, self._shape(0))
        return f"{kernel.name}, groups of {group}" if group else kernel.name

    def measure(self, assignment: NDArray[np.integer]) -> WholeTiming:
        """Return the time of a map's routed experts in a step, all timed layers together.

        Args:
            assignment: (N,), or (2N,) with each expert's gate+up before its down.

        Raises:
            InputError: If it does not fit the model or the menu.
        """
        maps = checked_maps(np.asarray(assignment)[None], self.spec, self.menu)
        experts = self.spec.num_experts
        formats = np.broadcast_to(maps.reshape(experts, -1), (experts, 2))
        rig, layers = self.bench.rig, self.layers
        with rig.running():
            stored = {
                expert: self._stored(layer, formats[expert])
                for layer in layers
                for expert in self._awake(layer)
                if not self.menu.pruned[formats[expert]].any()
            }
            works = [
                self._work(layer, self._routes[layer][step], stored)
                for step in range(self.steps)
                for layer in layers
            ]

            def every_step() -> None:
                for work in works:
                    work()

            found = rig.samples([every_step])
        keep_tuning(rig.device)
        low, median, high = np.percentile(found.seconds, (25, 50, 75)) / self.steps
        return WholeTiming(
            seconds=float(median),
            iqr_s=float(high - low),
            n=len(found.seconds),
            preempted=found.preempted,
        )

    @cached_property
    def _routes(self) -> tuple[tuple[Routes, ...], ...]:
        """Which experts each layer's steps wake, and with which tokens: by layer, by step."""
        selected = inclusion_probabilities(self.spec, self.inclusion)
        rng = np.random.default_rng(self.seed)
        found = []
        for ordinal, layer in enumerate(self.spec.moe_layers):
            experts = np.flatnonzero(self.spec.layer_of_expert == ordinal)
            taken = drawn(
                selected[experts], layer.top_k, self.steps * self.workload.tokens, rng
            ).reshape(self.steps, self.workload.tokens, -1)
            found.append(
                tuple(
                    tuple(
                        (int(expert), np.flatnonzero(step[:, i]))
                        for i, expert in enumerate(experts)
                        if step[:, i].any()
                    )
                    for step in taken
                )
            )
        return tuple(found)

    @property
    def _usable_bytes(self) -> float:
        """The memory that the weights may take."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        bench = self.bench
        if bench.rig.on_cuda:
            return GPU_SHARE * (bench.capacity_bytes - bench.runtime_bytes)
        return MOST_BYTES

    def _awake(self, layer: int) -> list[int]:
        """Return the experts of a layer that any step wakes."""
        return sorted({expert for step in self._routes[layer] for expert, _ in step})

    def _shape(self, layer: int) -> tuple[int, int, bool]:
        one = self.spec.moe_layers[layer]
        return one.hidden_size, one.intermediate_size, one.gated

    def _layer_bytes(self, layer: int) -> float:
        """Return the memory of a layer's experts in the widest format there is."""
        widest = max(
            sum(stored_bytes(self._template(layer, fmt, projection)[1:]) for projection in (0, 1))
            for fmt in (self.menu.formats[index] for index in self.menu.stored)
        )
        return float(widest * len(self._awake(layer)))

    def _template(self, layer: int, fmt: Format, projection: int) -> Stored:
        """Return random weights of a projection as a format's kernel stores them, kernel first."""
        shape = self._shape(layer)
        kernel, group = self.bench.kernel(fmt, shape)
        rows, columns = expert_matrices(shape)[projection]
        key = kernel.name, group, rows, columns
        if key not in self._templates:
            weight = _normal(self.bench.rig.device, rows, columns)
            stored = kernel.store(weight, min(group or fmt.group_size, columns))
            self._templates[key] = (kernel, *stored)
        return self._templates[key]

    def _stored(self, layer: int, formats: NDArray[np.integer]) -> tuple[Stored, Stored]:
        """Return weights of an expert's own, by the formats of its projections, (2,)."""

        def own(projection: int) -> Stored:
            fmt = self.menu.formats[int(formats[projection])]
            kernel, *stored = self._template(layer, fmt, projection)
            return kernel, *copy.deepcopy(stored)

        return own(0), own(1)

    def _work(
        self, layer: int, routes: Routes, stored: dict[int, tuple[Stored, Stored]]
    ) -> Callable[[], None]:
        """Return a step of a layer: fetch each expert's tokens, run it, add up what it returns."""
        import torch

        hidden, _, gated = self._shape(layer)
        device, tokens, kernel = self.bench.rig.device, self.workload.tokens, _assigned()
        stream, out = _normal(device, tokens, hidden), _normal(device, tokens, hidden)
        calls: list[tuple[tuple[Stored, Stored], Tensor, Tensor]] = [
            (
                stored[expert],
                torch.from_numpy(rows).to(device),
                torch.full((len(rows), 1), 1 / len(routes)).bfloat16().to(device),
            )
            for expert, rows in routes
            if expert in stored  # the others are pruned
        ]

        def work() -> None:
            for expert, index, weight in calls:
                made = expert_forward(kernel, stream[index], expert, gated)
                out.index_add_(0, index, made * weight)

        return work


def drawn(
    probabilities: Floats, top_k: int, count: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Return which experts each token selects, (count, E): ``top_k`` each, by systematic sampling.

    Tokens' starting points are spread evenly, so that each expert's share of all tokens is its
    probability to within one token.

    Args:
        probabilities: (E,), of being selected; scaled to sum to ``top_k``, as they do where they
            were measured.
        top_k: Experts per token.
        count: Tokens.
        rng: Orders experts and tokens.
    """
    order = rng.permutation(len(probabilities))
    total = probabilities.sum()
    even = np.full(len(order), top_k / len(order))
    scaled = np.minimum(probabilities * (top_k / total), 1.0) if total > 0 else even
    ends = np.cumsum(scaled[order])
    ends[-1] = top_k
    starts = (rng.permutation(count) + 0.5) / count
    passed = np.floor(ends[None, :] - starts[:, None])
    before = np.concatenate([np.full((count, 1), -1.0), passed[:, :-1]], axis=1)
    taken = np.empty((count, len(order)), np.bool_)
    taken[:, order] = passed > before
    return taken


def _normal(device: str, rows: int, columns: int) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(rows * 31 + columns)
    values = torch.randn(rows, columns, generator=generator) * _WEIGHT_SCALE
    return values.bfloat16().to(device)
