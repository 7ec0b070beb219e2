"""Curvature of the loss with respect to each expert's weights: empirical Fisher, Hessian trace.

Both are measured at full precision on an evaluator's text, and counted in its forwarded tokens.
The loss is the negative log-likelihood in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmpq.bank import Bank
from dmpq.batches import Batch
from dmpq.experts import Experts, run_stacked
from dmpq.model_evaluator import ModelEvaluator
from dmpq.profiling import BACKWARD_COST

Floats = NDArray[np.float64]

HESSIAN_PRODUCT_COST: Final = BACKWARD_COST * (1 + BACKWARD_COST)
"""FLOPs of a Hessian-vector product in those of a forward pass: a backward pass through both the
forward and the backward pass, which are kept."""

FISHER_COST: Final = 1 + BACKWARD_COST
"""What :func:`empirical_fisher` costs, in forwards of its text."""


def squared_perturbation(bank: Bank) -> Floats:
    """Return the squared change of each expert's weights in each format, (N, B)."""
    weights = [
        tuple(torch.ones_like(w[:1, :1, :1]) for w in (layer.experts.gate_up, layer.experts.down))
        for layer in bank.layers
    ]
    return _weighed_perturbation(bank, weights)


def empirical_fisher(evaluator: ModelEvaluator) -> Floats:
    """Return ``sum_i g_i^2 dW_i^2`` of each expert in each format, (N, B).

    The diagonal of the empirical Fisher information, a stand-in for that of the Hessian, with
    windows as samples: ``g`` is the gradient of one window's mean loss, and its square is averaged
    over the windows (as in LLM-MQ and SqueezeLLM, arXiv 2306.07629). Twice the loss
    increase that this model of it predicts. Takes two copies of the experts' weights in memory.
    """
    shape = (evaluator.bank.moe.spec.num_experts, len(evaluator.bank.menu))
    found = _journaled(evaluator, "fisher", shape, lambda: _fisher(evaluator))
    evaluator.charge(evaluator.tokens * FISHER_COST)
    return found


def _fisher(evaluator: ModelEvaluator) -> Floats:
    bank = evaluator.bank
    windows = [window for inputs in evaluator.batches for window in inputs.split()]
    squares = [
        tuple(torch.zeros_like(p, dtype=torch.float32) for p in layer.experts.parameters)
        for layer in bank.layers
    ]
    with _differentiable(bank) as parameters:
        for window in windows:
            gradients = torch.autograd.grad(_mean_nll(bank, window), parameters)
            flat = (square for pair in squares for square in pair)
            for square, gradient in zip(flat, gradients, strict=True):
                square.add_(gradient.float().square(), alpha=1 / len(windows))
    oriented = [
        tuple(layer.experts.oriented(square) for square in pair)
        for layer, pair in zip(bank.layers, squares, strict=True)
    ]
    return _weighed_perturbation(bank, oriented)


def hessian_cost(probes: int) -> float:
    """Return what :func:`hessian_trace` costs, in forwards of its text."""
    return 1 + BACKWARD_COST + probes * HESSIAN_PRODUCT_COST


def hessian_trace(evaluator: ModelEvaluator, *, probes: int = 16, seed: int = 0) -> Floats:
    """Return the trace of each expert's block of the loss's Hessian, (N,), estimated.

    Hutchinson's method (HAWQ-V2, arXiv 1911.03852): the mean of ``v^T H v`` over
    random signs ``v``. One product serves all experts: what the other experts' signs contribute to
    an expert's part has a mean of 0. The Hessian is that of the mean loss per token, with routing
    as it is; its trace need not be positive where the model is not at a minimum.

    Args:
        evaluator: Holds the model and the text.
        probes: Number of random vectors.
        seed: Of the random signs.
    """
    shape = (evaluator.bank.moe.spec.num_experts,)
    name = f"hessian, {probes} probes, seed {seed}"
    found = _journaled(evaluator, name, shape, lambda: _trace(evaluator, probes, seed))
    evaluator.charge(evaluator.tokens * hessian_cost(probes))
    return found


def _journaled(
    evaluator: ModelEvaluator, name: str, shape: tuple[int, ...], measure: Callable[[], Floats]
) -> Floats:
    """Return what was measured on an evaluator's text before, or measure it and keep it.

    Args:
        evaluator: Has the text, and the journal, if any.
        name: Of what is measured.
        shape: Of the result.
        measure: Measures it.
    """
    for record in evaluator.journal or ():
        match record:
            case {"text": evaluator.text_key, "curvature": str(of), "values": list(values)} if (
                of == name
            ):
                try:
                    known = np.array(values, np.float64)
                except (TypeError, ValueError):
                    continue  # a damaged line is measured again
                if known.shape == shape and np.isfinite(known).all():
                    return known
    found = measure()
    if evaluator.journal is not None and np.isfinite(found).all():
        evaluator.journal.append(
            {"text": evaluator.text_key, "curvature": name, "values": found.tolist()}
        )
    return found


def _trace(evaluator: ModelEvaluator, probes: int, seed: int) -> Floats:
    bank = evaluator.bank
    counts = [layer.experts.num_experts for layer in bank.layers]
    trace = np.zeros(sum(counts))
    predicted = sum(inputs.predicted for inputs in evaluator.batches)
    # Only the plain attention has a second derivative.
    with _differentiable(bank) as parameters, sdpa_kernel(SDPBackend.MATH):
        for inputs in evaluator.batches:
            loss = _mean_nll(bank, inputs) * (inputs.predicted / predicted)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(probes):
                signs = [_signs(parameter, generator) for parameter in parameters]
                products = torch.autograd.grad(
                    gradients, parameters, grad_outputs=signs, retain_graph=True
                )
                parts = [
                    (sign * product).sum((1, 2), dtype=torch.float64).cpu().numpy()
                    for sign, product in zip(signs, products, strict=True)
                ]
                both = zip(parts[::2], parts[1::2], strict=True)
                trace += np.concatenate([up + down for up, down in both]) / probes
    return trace


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random signs, drawn on the CPU so that they are the same on every device."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype).mul_(2).sub_(1)


@contextmanager
def _differentiable(bank: Bank) -> Iterator[list[nn.Parameter]]:
    """Give the experts' weights gradients while the block lasts, and yield them layer by layer."""
    parameters = [p for layer in bank.layers for p in layer.experts.parameters]
    forwards = [run_stacked] * len(bank.layers)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), bank.moe.experts_forward(forwards):
            yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _mean_nll(bank: Bank, inputs: Batch) -> torch.Tensor:
    return inputs.loss(inputs.logits(bank.moe), reduction="mean")


def _weighed_perturbation(bank: Bank, weights: list[tuple[torch.Tensor, ...]]) -> Floats:
    """Return the change of each expert's weights, squared, weighed and summed, (N, B).

    Args:
        bank: Holds the variants.
        weights: Per layer, of gate+up and of down, broadcast to (E, out, in).
    """
    rows = []
    for layer, pair in zip(bank.layers, weights, strict=True):
        experts: Experts = layer.experts
        own = [w.expand(experts.num_experts, -1, -1) for w in pair]
        for expert in range(experts.num_experts):
            exact = layer.variant(expert, None)
            row = [
                sum(
                    float(((v.float() - e.float()).square() * w[expert]).sum(dtype=torch.float64))
                    for v, e, w in zip(layer.variant(expert, fmt), exact, own, strict=True)
                )
                for fmt in range(len(bank.menu))
            ]
            rows.append(row)
    return np.array(rows)
