"""Measuring a profile: one pass with gradients, then one evaluation per variant.

The second part is what costs: as many forwards as there are variants. Without it, sensitivities
are half the squared product of output error and loss gradient, the KL's second-order term by the
diagonal of the empirical Fisher matrix at the expert's output (GEMQ's cost, arXiv 2605.23078): one
forward and backward pass, whatever the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations.moe import grouped_mm_experts_forward

from dmpq.bank import LayerBank
from dmpq.data import Draw
from dmpq.errors import InputError
from dmpq.model_evaluator import ModelEvaluator, expert_share
from dmpq.moe import MoEModel, run_stacked
from dmpq.profile import Profile, Signal
from dmpq.pruning import pruning_error
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
        self.output = grouped_mm_experts_forward(module, hidden, index, weights)
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


@dataclass
class _Sums:
    """Sums over tokens, (N,) or (N, B)."""

    hits: NDArray[np.int64]
    routing_weight: NDArray[np.float64]
    contribution: NDArray[np.float64]
    output_error: NDArray[np.float64]
    proxy: NDArray[np.float64]
    side_proxy: NDArray[np.float64] | None
    nll: float = 0.0
    predicted: int = 0
    tokens: int = 0


def measure_profile(
    evaluator: ModelEvaluator,
    *,
    text: str,
    drawn: Draw | None = None,
    projections: bool = False,
    signal: Signal = "sensitivity",
    progress: Progress | None = None,
) -> Profile:
    """Profile every expert of the evaluator's model on the evaluator's text.

    Args:
        evaluator: Holds the bank and the profiling text.
        text: What the text is, in words.
        drawn: Which windows of it the evaluator has; a search on the profile uses others.
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
        _estimated(evaluator, sums)
        if gradient
        else _measured(evaluator, sums, projections=projections, progress=progress)
    )
    moe = evaluator.bank.moe
    return Profile(
        spec=moe.spec,
        menu=evaluator.bank.menu,
        tokens=evaluator.tokens,
        text=text,
        fingerprint=moe.fingerprint,
        full_nll=found.full_nll,
        cost_tokens=found.cost_tokens,
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
        signal=signal,
        **_weight_statistics(moe),
        **_router_norms(moe),
    )


@dataclass(frozen=True)
class _Signal:
    """What tells variants apart, and what it cost; N experts, B formats."""

    sensitivity: NDArray[np.float64]
    apart: NDArray[np.float64] | None
    uniform_kl: NDArray[np.float64]
    full_nll: float
    cost_tokens: float


def _measured(
    evaluator: ModelEvaluator, sums: _Sums, *, projections: bool, progress: Progress | None
) -> _Signal:
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
    return _Signal(
        sensitivity=sensitivity,
        apart=apart,
        uniform_kl=uniform_kl,
        full_nll=evaluator.full_nll(),
        cost_tokens=evaluator.tokens_spent + sums.tokens * gradient_cost(spec, formats),
    )


def _estimated(evaluator: ModelEvaluator, sums: _Sums) -> _Signal:
    """Take half the proxy of every variant: losses are then taken to add up."""
    cost = gradient_cost(
        evaluator.bank.moe.spec,
        len(evaluator.bank.menu),
        projections=sums.side_proxy is not None,
    )
    kl = sums.proxy / sums.tokens / 2
    above = kl - kl[:, -1:]
    apart = None
    if sums.side_proxy is not None:
        sides = sums.side_proxy / sums.tokens / 2
        apart = sides - sides[:, :, -1:]
    return _Signal(
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


def _gradient_pass(evaluator: ModelEvaluator, *, apart: bool, progress: Progress | None) -> _Sums:
    """Run the model forward and backward over the text, layer by layer collecting sums.

    Args:
        evaluator: Holds the bank and the text.
        apart: Whether errors of gate+up alone and of down alone are wanted too.
        progress: Called with the number of batches done, and of all.
    """
    bank = evaluator.bank
    experts, formats = bank.moe.spec.num_experts, len(bank.menu)
    sums = _Sums(
        hits=np.zeros(experts, np.int64),
        routing_weight=np.zeros(experts),
        contribution=np.zeros(experts),
        output_error=np.zeros((experts, formats)),
        proxy=np.zeros((experts, formats)),
        side_proxy=np.zeros((experts, 2, formats)) if apart else None,
    )
    counter = _Counter(progress, len(evaluator.batches))
    embed = bank.moe.model.get_input_embeddings()
    for inputs in evaluator.batches:
        captures = [_Capture() for _ in bank.layers]
        # Models with a head find their last token by the ids, so that embeddings cannot be given.
        hook = embed.register_forward_hook(lambda _m, _i, output: output.detach().requires_grad_())
        try:
            with torch.enable_grad(), bank.moe.experts_forward(captures):
                loss = inputs.loss(inputs.logits(bank.moe), reduction="sum")
                torch.autograd.backward(loss)
        finally:
            hook.remove()
        sums.tokens += inputs.tokens
        sums.nll += float(loss.detach())
        sums.predicted += inputs.predicted
        start = 0
        for layer, capture in zip(bank.layers, captures, strict=True):
            with torch.inference_mode():
                _collect(sums, start, layer, [inputs.real(part) for part in capture.taken()])
            start += layer.experts.num_experts
        counter()
    return sums


def _collect(sums: _Sums, start: int, layer: LayerBank, taken: list[torch.Tensor]) -> None:
    hidden, index, weights, output, gradient = taken
    for expert in range(layer.experts.num_experts):
        tokens, slots = torch.where(index == expert)
        row = start + expert
        sums.hits[row] += len(tokens)
        if not len(tokens):
            continue
        weight = weights[tokens, slots]
        sums.routing_weight[row] += float(weight.double().sum())
        slope = gradient[tokens]
        magnitude = (slope * weight[:, None]).abs().mean(-1)
        sums.contribution[row] += float(magnitude.double().sum())
        full = layer.variant(expert, None)
        exact = _one_expert(layer, expert, full, hidden[tokens], weight)
        for fmt in range(len(layer.menu)):
            if layer.menu.formats[fmt].is_full:
                continue
            up, down = layer.variant(expert, fmt)
            if layer.menu.formats[fmt].is_pruned:
                others = weights[tokens].sum(1) - weight
                error = pruning_error(output[tokens], exact, weight, others)
            else:
                error = _one_expert(layer, expert, (up, down), hidden[tokens], weight) - exact
            sums.output_error[row, fmt] += float(error.square().sum(dtype=torch.float64))
            sums.proxy[row, fmt] += _damage(error, slope)
            if sums.side_proxy is not None:
                for side, pair in enumerate(((up, full[1]), (full[0], down))):
                    error = _one_expert(layer, expert, pair, hidden[tokens], weight) - exact
                    sums.side_proxy[row, side, fmt] += _damage(error, slope)


def _damage(error: torch.Tensor, slope: torch.Tensor) -> float:
    """Return the summed squared product of output errors and loss gradients, both (T, H)."""
    return float((error * slope).square().sum(dtype=torch.float64))


def _one_expert(
    layer: LayerBank,
    expert: int,
    matrices: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Return one expert's weighted output, (T, H), with such gate+up and down weights."""
    up, down = matrices
    view = layer.experts.stacked(up[None], down[None], only=expert)
    index = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
    return run_stacked(view, hidden, index, weight[:, None])


def _weight_statistics(moe: MoEModel) -> dict[str, NDArray[np.float64]]:
    rows = []
    for container in moe.containers:
        for up, down in zip(container.gate_up, container.down, strict=True):
            matrices = [up.double(), down.double()]
            flat = torch.cat([m.flatten() for m in matrices])
            centred = flat - flat.mean()
            variance = centred.square().mean()
            # An expert of zeros, pruned before it came here, has neither tails nor outliers.
            kurtosis = centred.pow(4).mean() / variance.square() - 3 if variance > 0 else 0.0
            outlier = max(
                float(m.abs().max() / m.abs().mean()) if m.any() else 1.0 for m in matrices
            )
            row_variance = matrices[0].var(dim=1, unbiased=False).max()
            rows.append((float(flat.norm()), float(kurtosis), outlier, float(row_variance)))
    names = ("weight_norm", "kurtosis", "outlier_ratio", "max_row_variance")
    return dict(zip(names, np.array(rows).T, strict=True))


def _router_norms(moe: MoEModel) -> dict[str, NDArray[np.float64]]:
    """Return router row norms, and their change where the checkpoint tells the initial ones."""
    norms = [
        np.full(c.num_experts, 0.0)
        if c.router is None
        else c.router.double().norm(dim=1).cpu().numpy()
        for c in moe.containers
    ]
    norm = np.concatenate(norms)
    initial = moe.model.config.to_dict().get("router_init_norms")
    change = np.full_like(norm, np.nan) if initial is None else norm - np.concatenate(initial)
    return {"router_norm": norm, "router_norm_change": change}
