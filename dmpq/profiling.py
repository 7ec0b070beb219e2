"""Measuring a profile: one pass with gradients, then one evaluation per variant.

The second part is what costs: as many forwards as there are variants. Without it, sensitivities
are half the squared product of output error and loss gradient, the KL's second-order term by the
diagonal of the empirical Fisher matrix at the expert's output (GEMQ's cost, arXiv 2605.23078): one
forward and backward pass, whatever the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dmpq.bank import LayerBank
from dmpq.checkpoints.expert_sums import STATISTICS, ExpertSums, Seen, weight_statistics
from dmpq.data import CalibrationText, Draw
from dmpq.errors import InputError
from dmpq.experts import run_stacked
from dmpq.model_evaluator import ModelEvaluator, expert_share
from dmpq.moe import MoEModel
from dmpq.profile import Profile, Signal
from dmpq.spec import ModelSpec

BACKWARD_COST: Final = 2.0
"""FLOPs of a backward pass in those of a forward pass."""

Progress = Callable[[int, int], None]


@dataclass
class _Capture:
    """What one layer's experts saw in one forward pass, and the gradient of their output."""

    hidden: torch.Tensor | None = None
    index: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    output: torch.Tensor | None = None

    def __call__(self, module: Any, hidden: Any, index: Any, weights: Any) -> torch.Tensor:
        """Run the experts as the model would; the signature of the experts interface."""
        self.hidden, self.index, self.weights = hidden.detach(), index, weights.detach()
        self.output = run_stacked(module, hidden, index, weights)
        self.output.retain_grad()
        return self.output

    def taken(self) -> tuple[torch.Tensor, ...]:
        """Return hidden (T, H), index and weights (T, K), output and its gradient (T, H)."""
        assert self.hidden is not None
        assert self.index is not None
        assert self.weights is not None
        assert self.output is not None
        assert self.output.grad is not None
        return self.hidden, self.index, self.weights, self.output.detach(), self.output.grad


def measure_profile(
    evaluator: ModelEvaluator,
    *,
    text: str,
    drawn: Draw | None = None,
    calibrated_by: CalibrationText | None = None,
    projections: bool = False,
    signal: Signal = "sensitivity",
    progress: Progress | None = None,
) -> Profile:
    """Profile every expert of the evaluator's model on the evaluator's text.

    Args:
        evaluator: Holds the bank and the profiling text.
        text: What the text is, in words.
        drawn: Which windows of it the evaluator has; a search on the profile uses others.
        calibrated_by: What GPTQ was calibrated by; ``None`` for other quantizers.
        projections: Measure sensitivities of gate+up and down apart as well.
        signal: Measure each variant's KL, or take it from gradients.
        progress: Called with the number of variants measured, and of all variants; with gradients,
            of batches.

    Raises:
        InputError: If projections are to be told apart on a menu with pruned experts.
    """
    if projections and evaluator.bank.menu.pruned.any():
        raise InputError(
            "Projections are to be measured apart, but the menu offers pruned experts (0), which "
            "are pruned whole; leave 0 out, or measure whole experts."
        )
    gradient = signal == "gradient"
    sums = _gradient_pass(
        evaluator, apart=gradient and projections, progress=progress if gradient else None
    )
    found = (
        estimated(sums, evaluator.bank.moe.spec, len(evaluator.bank.menu))
        if gradient
        else _measured(evaluator, sums, projections=projections, progress=progress)
    )
    moe, calibration = evaluator.bank.moe, evaluator.bank.calibration
    return Profile(
        spec=moe.spec,
        menu=evaluator.bank.menu,
        tokens=evaluator.tokens,
        text=text,
        fingerprint=moe.fingerprint,
        full_nll=found.full_nll,
        cost_tokens=found.cost_tokens + (0 if calibration is None else calibration.forwarded),
        hits=sums.hits,
        frequency=sums.hits / sums.tokens,
        routing_weight=sums.routing_weight / sums.tokens,
        contribution=sums.contribution / np.maximum(sums.hits, 1),
        sensitivity=found.sensitivity,
        projection_sensitivity=found.apart,
        output_error=sums.output_error / sums.tokens,
        proxy=sums.proxy / sums.tokens,
        uniform_kl=found.uniform_kl,
        drawn=drawn,
        calibration=calibrated_by,
        signal=signal,
        **_weight_statistics(moe),
        **router_norms(moe, [container.router for container in moe.containers]),
    )


@dataclass(frozen=True)
class MeasuredSignal:
    """What tells variants apart, and what it cost; N experts, B formats."""

    sensitivity: NDArray[np.float64]
    apart: NDArray[np.float64] | None
    uniform_kl: NDArray[np.float64]
    full_nll: float
    cost_tokens: float


def _measured(
    evaluator: ModelEvaluator, sums: ExpertSums, *, projections: bool, progress: Progress | None
) -> MeasuredSignal:
    """Evaluate every variant by itself."""
    spec, formats = evaluator.bank.moe.spec, len(evaluator.bank.menu)
    counter = _Counter(progress, spec.num_experts * formats * (3 if projections else 1))
    base = _widest(evaluator)
    sensitivity = _sensitivities(evaluator, base, [0, 1], counter)
    apart = None
    if projections:
        sides = [_sensitivities(evaluator, base, [side], counter) for side in (0, 1)]
        apart = np.stack(sides, axis=1)
    uniform = np.arange(formats)[:, None].repeat(spec.num_experts, 1)
    uniform_kl = evaluator.evaluate(uniform).kl
    return MeasuredSignal(
        sensitivity=sensitivity,
        apart=apart,
        uniform_kl=uniform_kl,
        full_nll=evaluator.full_nll(),
        cost_tokens=evaluator.tokens_spent + sums.tokens * gradient_cost(spec, formats),
    )


def estimated(sums: ExpertSums, spec: ModelSpec, formats: int) -> MeasuredSignal:
    """Take half the proxy of every variant: losses are then taken to add up."""
    cost = gradient_cost(spec, formats, projections=sums.side_proxy is not None)
    kl = sums.proxy / sums.tokens / 2
    above = kl - kl[:, -1:]
    apart = None
    if sums.side_proxy is not None:
        sides = sums.side_proxy / sums.tokens / 2
        apart = sides - sides[:, :, -1:]
    return MeasuredSignal(
        sensitivity=above,
        apart=apart,
        uniform_kl=kl.sum(0),
        full_nll=sums.nll / sums.predicted,
        cost_tokens=sums.tokens * cost,
    )


def gradient_cost(spec: ModelSpec, formats: int, *, projections: bool = False) -> float:
    """Return what a gradient profile takes, in forwarded tokens per token of its text.

    Forward and backward, and one more run of the experts per format for their output errors; two
    more where projections are told apart.

    Args:
        spec: Geometry of the model.
        formats: Number of formats on the menu.
        projections: Whether projections are told apart.
    """
    runs = formats * (3 if projections else 1)
    return 1 + BACKWARD_COST + runs * expert_share(spec)


class _Counter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _widest(evaluator: ModelEvaluator) -> NDArray[np.int64]:
    """Return the map that stays closest to full precision, (N, 2)."""
    experts = evaluator.bank.moe.spec.num_experts
    return np.full((experts, 2), len(evaluator.bank.menu) - 1)


def _sensitivities(
    evaluator: ModelEvaluator, base: NDArray[np.int64], sides: list[int], counter: _Counter
) -> NDArray[np.float64]:
    """Return the KL that each change of one expert adds to that of ``base``, (N, B)."""
    experts, formats = len(base), len(evaluator.bank.menu)
    evaluator.hold(base.ravel())
    floor = evaluator.evaluate(base.reshape(1, -1)).kl[0]
    result = np.zeros((experts, formats))
    for expert in range(experts):
        for fmt in range(formats):
            changed = base.copy()
            changed[expert, sides] = fmt
            result[expert, fmt] = evaluator.evaluate(changed.reshape(1, -1)).kl[0] - floor
            counter()
    return result


def _gradient_pass(
    evaluator: ModelEvaluator, *, apart: bool, progress: Progress | None
) -> ExpertSums:
    """Run the model forward and backward over the text, layer by layer collecting sums.

    Args:
        evaluator: Holds the bank and the text.
        apart: Whether errors of gate+up alone and of down alone are wanted too.
        progress: Called with the number of batches done, and of all.
    """
    bank = evaluator.bank
    experts, formats = bank.moe.spec.num_experts, len(bank.menu)
    sums = ExpertSums.zeros(experts, formats, apart=apart)
    counter = _Counter(progress, len(evaluator.batches))
    for inputs in evaluator.batches:
        captures = [_Capture() for _ in bank.layers]
        with (
            torch.enable_grad(),
            embeddings_require_gradients(bank.moe),
            bank.moe.experts_forward(captures),
        ):
            loss = inputs.loss(inputs.logits(bank.moe), reduction="sum")
            torch.autograd.backward(loss)
        sums.tokens += inputs.tokens
        sums.nll += float(loss.detach())
        sums.predicted += inputs.predicted
        start = 0
        for layer, capture in zip(bank.layers, captures, strict=True):
            with torch.inference_mode():
                real = [inputs.real(part, layer.experts) for part in capture.taken()]
                _collect(sums, start, layer, real)
            start += layer.experts.num_experts
        counter()
    return sums


@contextmanager
def embeddings_require_gradients(moe: MoEModel) -> Iterator[None]:
    """Let gradients reach every layer while the block lasts, though no weight asks for any."""
    weight = moe.model.get_input_embeddings().weight
    tables = [
        module
        for module in moe.model.modules()
        if isinstance(module, nn.Embedding) and module.weight is weight
    ]
    handles = [
        table.register_forward_hook(lambda _module, _ids, output: output.detach().requires_grad_())
        for table in tables
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _collect(sums: ExpertSums, start: int, layer: LayerBank, taken: list[torch.Tensor]) -> None:
    hidden, index, weights, output, gradient = taken
    for expert in range(layer.experts.num_experts):
        # A weight of 0 stands for a token that was dropped or skips its experts.
        tokens, slots = torch.where((index == expert) & (weights != 0))
        weight = weights[tokens, slots]
        others = weights[tokens].sum(1) - weight
        seen = Seen(hidden[tokens], weight, others, output[tokens], gradient[tokens])
        sums.add(start + expert, layer, expert, seen)


def _weight_statistics(moe: MoEModel) -> dict[str, NDArray[np.float64]]:
    rows = [
        weight_statistics(up, down)
        for container in moe.containers
        for up, down in zip(container.gate_up, container.down, strict=True)
    ]
    return dict(zip(STATISTICS, np.array(rows).T, strict=True))


def router_norms(
    moe: MoEModel, routers: Sequence[torch.Tensor | None]
) -> dict[str, NDArray[np.float64]]:
    """Return router row norms, and their change where the checkpoint tells the initial ones.

    Args:
        moe: The model.
        routers: Of its containers, (E, H) each, where they can be told.
    """
    norms = [
        np.full(container.num_experts, 0.0)
        if router is None
        else router.double().norm(dim=1).cpu().numpy()
        for container, router in zip(moe.containers, routers, strict=True)
    ]
    norm = np.concatenate(norms)
    initial = moe.model.config.to_dict().get("router_init_norms")
    change = np.full_like(norm, np.nan) if initial is None else norm - np.concatenate(initial)
    return {"router_norm": norm, "router_norm_change": change}
