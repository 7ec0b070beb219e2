"""What GPTQ is calibrated by: the inputs of every expert's projections, from one recorded forward.

The forward is the full-precision model's. GPTQ's authors quantize layer by layer and feed each
layer what the quantized ones before it give; here one bank serves every mixture of widths, so
that there is no one quantized model before a layer, and every layer sees its exact inputs.

Two options are MoEQuant's (arXiv 2505.03804). Affinity: the Hessian is ``sum c x x^T``, with c the
routing weight that the token gives the expert. Balance: the authors have the model write text by
a beam search that prefers even usage of the experts (``ebss``, :mod:`dmpq.ebss`); ``balanced``
chooses windows of real text so, one after another, which needs no generation and keeps to text
that is at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dmpq.data import CalibrationText, redrawn
from dmpq.ebss import cost_tokens, rewritten
from dmpq.errors import InputError
from dmpq.experts import Experts, run_stacked
from dmpq.moe import MoEModel
from dmpq.quantization import inverse_factor
from dmpq.quantizer import Quantizer

BATCH_TOKENS: Final = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What one layer's experts see of the calibration text; T tokens, K experts each.

    Attributes:
        experts: The layer's container.
        hidden: (T, H), inputs of gate and up.
        index: int64 (T, K), the experts that each token selects.
        weights: (T, K), their routing weights.
    """

    experts: Experts
    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor

    def hessians(self, expert: int, *, affinity: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``sum x x^T`` over the inputs of gate+up and over those of down.

        An expert with fewer tokens than a projection has inputs leaves directions unseen. The
        missing ones come from all tokens of the layer, taken to be routed to it: each counts by
        the share of a token that makes up the number. So an expert that no token selects is
        calibrated by its layer, and one with tokens enough by its own alone.

        Args:
            expert: Index in the layer.
            affinity: Whether tokens weigh by their routing weight (their mean set to 1).

        Returns:
            float64 (H, H) and (I, I).
        """
        tokens, slots = torch.where(self.index == expert)
        own = torch.ones(len(tokens), dtype=torch.float64, device=self.hidden.device)
        if affinity and len(tokens):
            own = self.weights[tokens, slots].double()
            mean = own.mean()
            own = own / mean if mean > 0 else torch.ones_like(own)
        widths = self.experts.gate_up.shape[2], self.experts.down.shape[2]
        sums = tuple(
            torch.zeros(w, w, dtype=torch.float64, device=self.hidden.device) for w in widths
        )
        _add(sums, self._parts(expert, self.hidden[tokens], own), shares=(1.0, 1.0))
        missing = [max(0, w - len(tokens)) / max(1, len(self.hidden)) for w in widths]
        if any(missing):
            ones = torch.ones(len(self.hidden), dtype=torch.float64, device=self.hidden.device)
            _add(sums, self._parts(expert, self.hidden, ones), shares=missing)
        return sums[0], sums[1]

    def _parts(
        self, expert: int, hidden: torch.Tensor, weights: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield inputs of gate+up, inputs of down, and weights, a batch of tokens at a time."""
        for rows, weight in zip(
            hidden.split(BATCH_TOKENS), weights.split(BATCH_TOKENS), strict=True
        ):
            yield rows, activations(self.experts, expert, rows), weight


def _add(
    sums: tuple[torch.Tensor, ...],
    parts: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    shares: Any,
) -> None:
    for up, down, weight in parts:
        for total, inputs, share in zip(sums, (up, down), shares, strict=True):
            if share:
                exact = inputs.double()
                total.add_(exact.mT @ (exact * weight[:, None]), alpha=share)


def activations(experts: Experts, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return what one expert's down projection is given, (T, I), for hidden states (T, H)."""
    up, down = experts.gate_up[expert], experts.down[expert]
    view = experts.stacked(up[None], down[None], only=expert)
    between = hidden @ up.mT
    if view.has_bias:
        name = "gate_up_proj_bias" if view.has_gate else "up_proj_bias"
        between = between + getattr(view, name)[0]
    result: torch.Tensor = view._apply_gate(between) if view.has_gate else view.act_fn(between)
    return result


class Calibration:
    """The recorded inputs of all layers, and what GPTQ takes from them.

    Attributes:
        quantizer: Whose options it follows.
        digest: SHA-256 of the text and of these options.
        forwarded: Tokens that the model was run on, those it read to write the text included.
        layers: The inputs of each MoE layer.

    Args:
        moe: The model.
        windows: int64 (windows, length), the calibration text; their order makes no difference.
            With ``ebss``: what the model wrote.
        quantizer: Its options.
        progress: Called with the number of batches recorded, and of all.

    Raises:
        InputError: If there is no text, or less than the quantizer asks for.
    """

    def __init__(
        self,
        moe: MoEModel,
        windows: NDArray[np.int64],
        quantizer: Quantizer,
        *,
        progress: Progress | None = None,
    ) -> None:
        if not windows.size:
            raise InputError(
                f"The quantizer {str(quantizer)!r} needs calibration text, and has none; give it "
                "at least one window of tokens."
            )
        length, asked = windows.shape[1], quantizer.tokens
        wanted = len(windows) if asked is None else -(-asked // length)
        if wanted > len(windows):
            raise InputError(
                f"The quantizer {str(quantizer)!r} asks for more tokens than the calibration text "
                f"has ({windows.size:,}); give more (--profile-tokens), or ask for fewer."
            )
        self.quantizer = quantizer
        ordered = windows[np.lexsort(windows.T[::-1])]
        digest = hashlib.sha256(f"{quantizer}{ordered.shape}".encode())
        digest.update(np.ascontiguousarray(ordered).tobytes())
        self.digest = digest.hexdigest()
        if wanted < len(ordered) and not quantizer.balanced:
            drawn = np.random.default_rng(0).permutation(len(ordered))[:wanted]
            ordered = ordered[np.sort(drawn)]
        self.forwarded = ordered.size
        if quantizer.ebss:
            self.forwarded += cost_tokens(windows.shape, beams=quantizer.beams)
        layers = _record(moe, ordered, progress)
        if wanted < len(ordered):
            chosen = balanced_windows(layers, len(ordered), wanted)
            layers = _of_windows(layers, len(ordered), chosen)
        self.layers = layers

    @property
    def tokens(self) -> int:
        """Number of tokens that calibrate."""
        return len(self.layers[0].hidden)

    @cached_property
    def hits(self) -> NDArray[np.int64]:
        """How many tokens select each expert, (N,)."""
        counts = [
            torch.bincount(layer.index.flatten(), minlength=layer.experts.num_experts)
            for layer in self.layers
        ]
        hits: NDArray[np.int64] = torch.cat(counts).cpu().numpy()
        return hits

    def factors(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what GPTQ takes for gate+up and down of one expert, float64 (in, in) each.

        Args:
            layer: Ordinal of the MoE layer.
            expert: Index in the layer.

        Raises:
            InputError: If the model overflows on the calibration text.
        """
        with torch.inference_mode():
            up, down = self.layers[layer].hessians(expert, affinity=self.quantizer.affinity)
            damping = self.quantizer.damping
            return inverse_factor(up, damping=damping), inverse_factor(down, damping=damping)

    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of it, one sentence each."""
        widest = max(
            max(layer.experts.gate_up.shape[2], layer.experts.down.shape[2])
            for layer in self.layers
        )
        few = int((self.hits < widest).sum())
        wrote = " that the model wrote" if self.quantizer.ebss else ""
        read = f"{self.quantizer} is calibrated on {self.tokens:,} tokens{wrote}"
        if not few:
            return (read,)
        return (
            read,
            f"{few} of {len(self.hits)} experts have fewer calibration tokens than the {widest} "
            f"inputs of a projection ({int((self.hits == 0).sum())} have none); their layer's "
            "tokens make up the number",
        )


def calibrating_windows(
    text: CalibrationText,
    moe: MoEModel,
    tokenizer: Any,
    quantizer: Quantizer,
    *,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """Draw or write again the windows that a map or a profile says it was calibrated by.

    Args:
        text: What it says.
        moe: The model.
        tokenizer: The model's.
        quantizer: Whose options hold.
        progress: Called with steps done and all steps, where the model writes.

    Returns:
        int64 (windows, length).

    Raises:
        InputError: If the text is another by now, or cannot be read or written.
    """
    if quantizer.ebss:
        return rewritten(moe, text, quantizer, progress=progress)
    return redrawn(text.dataset, tokenizer, text.draw)


class _Recorder:
    """Runs a layer's experts as the model would, and keeps what they see."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(
        self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts; the signature of the experts interface."""
        self.seen.append((hidden, index, weights))
        return run_stacked(module, hidden, index, weights)


def _record(
    moe: MoEModel, windows: NDArray[np.int64], progress: Progress | None
) -> tuple[LayerInputs, ...]:
    recorders = [_Recorder() for _ in moe.containers]
    rows = max(1, BATCH_TOKENS // windows.shape[1])
    batches = torch.from_numpy(windows).to(moe.model.device).split(rows)
    with torch.inference_mode(), moe.experts_forward(recorders):
        for done, ids in enumerate(batches, start=1):
            moe.logits(ids)
            if progress is not None:
                progress(done, len(batches))
    return tuple(
        LayerInputs(experts, *(torch.cat(parts) for parts in zip(*recorder.seen, strict=True)))
        for experts, recorder in zip(moe.containers, recorders, strict=True)
    )


def balanced_windows(
    layers: tuple[LayerInputs, ...], windows: int, wanted: int
) -> NDArray[np.int64]:
    """Choose windows that together use the experts of each layer evenly, greedily.

    Args:
        layers: The recorded inputs of all windows.
        windows: Number of windows recorded.
        wanted: Number to choose.

    Returns:
        Ascending numbers of windows, (wanted,). Each was the one by which the spread (standard
        deviation over a layer's experts of their shares of the tokens, averaged over layers) of
        all chosen so far came out least.
    """
    usage = [_usage(layer, windows) for layer in layers]
    totals = [np.zeros(counts.shape[1]) for counts in usage]
    left = np.ones(windows, np.bool_)
    for _ in range(wanted):
        spread = np.zeros(windows)
        for counts, total in zip(usage, totals, strict=True):
            together = counts + total
            spread += (together / together.sum(1, keepdims=True)).std(1)
        best = int(np.where(left, spread, np.inf).argmin())
        left[best] = False
        totals = [total + counts[best] for counts, total in zip(usage, totals, strict=True)]
    return np.flatnonzero(~left)


def _usage(layer: LayerInputs, windows: int) -> NDArray[np.float64]:
    """Return how often each window's tokens select each expert, (windows, E)."""
    experts = layer.experts.num_experts
    index = layer.index.reshape(windows, -1)
    rows = torch.arange(windows, device=index.device)[:, None]
    flat = (rows * experts + index).flatten()
    counts = torch.bincount(flat, minlength=windows * experts).reshape(windows, -1)
    usage: NDArray[np.float64] = counts.double().cpu().numpy()
    return usage


def _of_windows(
    layers: tuple[LayerInputs, ...], windows: int, chosen: NDArray[np.int64]
) -> tuple[LayerInputs, ...]:
    """Return the recorded inputs of some of the windows alone."""
    numbers = torch.from_numpy(chosen)

    def of(rows: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = rows.unflatten(0, (windows, -1))[numbers.to(rows.device)]
        return kept.flatten(0, 1)

    return tuple(
        LayerInputs(layer.experts, of(layer.hidden), of(layer.index), of(layer.weights))
        for layer in layers
    )
