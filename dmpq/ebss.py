"""EBSS: calibration text that the model writes itself, and that uses its experts evenly.

MoEQuant (arXiv 2505.03804), "expert-balanced self-sampling": a beam search of width w from random
start tokens. An extension of a prefix x by a token v is the better the lower

    -(log p(x) + log p(v | x)) / tokens written + sigma(x) / tau

with sigma the standard deviation over a layer's experts of their shares of the prefix's tokens,
averaged over layers: how likely the text is per token, and how evenly it uses the experts. The
routing of v itself is not known before it is read, so that its imbalance counts from the next step
on (the authors' "deferred"). The authors take w = 4 and tau = 1.2. Their published generator is
plain beam search of transformers, without sigma; the formula here is the paper's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dmpq.data import CalibrationText, Draw
from dmpq.errors import InputError, first_line
from dmpq.experts import run_stacked
from dmpq.moe import MoEModel
from dmpq.quantizer import DEFAULT_BEAMS, DEFAULT_TAU, Quantizer

DATASET: Final = "ebss"
"""What a bit map gives as the data set of a text that the model wrote."""

_ROWS: Final = 256
"""Prefixes that are read at once; the last digits of products, so texts, may change with it."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Prefixes:
    """What is kept of each beam; S windows of w beams each.

    Attributes:
        tokens: int64 (S, w, n), the start token and what was written after it.
        log_p: float64 (S, w), log-probability of what was written, nats.
        counts: Per layer: float64 (S, w, E), how often the tokens read select each expert.
    """

    tokens: torch.Tensor
    log_p: torch.Tensor
    counts: tuple[torch.Tensor, ...]

    def extended(self, log_p: torch.Tensor, *, tau: float) -> tuple[Prefixes, torch.Tensor]:
        """Return the best extensions by one token, and the beams that they extend.

        Args:
            log_p: (S, w, V), log-probabilities of the next token, nats.
            tau: Larger values weigh balance less.

        Returns:
            The w best of each window, best first, and int64 (S, w), the beams in which their
            prefixes stood.
        """
        windows, beams, written = self.tokens.shape
        together = self.log_p[..., None] + log_p.double()
        score = imbalance(self.counts)[..., None] / tau - together / written
        if written == 1:
            score[:, 1:] = torch.inf  # every beam is the start token yet
        best = score.flatten(1).topk(beams, dim=1, largest=False).indices
        beam, token = best // log_p.shape[2], best % log_p.shape[2]
        rows = torch.arange(windows, device=beam.device)[:, None]
        tokens = torch.cat([self.tokens[rows, beam], token[..., None]], 2)
        counts = tuple(layer[rows, beam] for layer in self.counts)
        return Prefixes(tokens, together.flatten(1).gather(1, best), counts), beam


def imbalance(counts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return sigma: the spread of the experts' shares of the tokens, averaged over layers.

    Args:
        counts: Per layer: (..., E), how often each expert is selected; not all zero.

    Returns:
        float64 (...).
    """
    spreads = [
        (layer.double() / layer.double().sum(-1, keepdim=True)).std(-1, correction=0)
        for layer in counts
    ]
    return torch.stack(spreads).mean(0)


def start_tokens(
    moe: MoEModel, tokenizer: Any, *, tokens: int, length: int, seed: int
) -> tuple[int, ...]:
    """Draw the tokens that windows start with, ascending, each at most once.

    Args:
        moe: The model.
        tokenizer: The model's; special tokens beyond its vocabulary are not drawn.
        tokens: Number of tokens to write, rounded up to whole windows.
        length: Tokens per window.
        seed: Of the draw.

    Raises:
        InputError: If there are fewer tokens to start with than windows.
    """
    vocabulary = min(tokenizer.vocab_size, moe.model.get_input_embeddings().weight.shape[0])
    windows = -(-tokens // length)
    if windows > vocabulary:
        raise InputError(
            f"EBSS starts each of {windows} windows by a token of its own, and the vocabulary has "
            f"{vocabulary}; ask for fewer tokens, as in gptq,tokens=4096,ebss, or for longer "
            "windows (--sequence-length)."
        )
    drawn = np.random.default_rng(seed).choice(vocabulary, windows, replace=False)
    return tuple(sorted(drawn.tolist()))


def cost_tokens(shape: tuple[int, ...], *, beams: int) -> int:
    """Return how many tokens the model reads to write windows of a shape, (windows, length)."""
    return beams * shape[0] * (shape[1] - 1)


def written(
    moe: MoEModel,
    starts: tuple[int, ...],
    quantizer: Quantizer,
    *,
    length: int,
    progress: Progress | None = None,
) -> tuple[NDArray[np.int64], CalibrationText]:
    """Let the model write the text that calibrates it, and say by what it can be written again.

    Args:
        moe: The model.
        starts: First tokens of the windows.
        quantizer: Its beams and tau.
        length: Tokens per window.
        progress: Called with steps done and all steps.

    Returns:
        int64 (windows, length), and what a bit map tells of it.

    Raises:
        InputError: If the model cannot write.
    """
    windows = beam_search(
        moe, starts, length=length, beams=quantizer.beams, tau=quantizer.tau, progress=progress
    )
    stream = hashlib.sha256(windows.tobytes()).hexdigest()
    return windows, CalibrationText(DATASET, Draw(stream, length, starts))


def rewritten(
    moe: MoEModel,
    text: CalibrationText,
    quantizer: Quantizer,
    *,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """Let the model write a text again.

    Args:
        moe: The model.
        text: What :func:`written` said of it.
        quantizer: Its beams and tau.
        progress: Called with steps done and all steps.

    Returns:
        int64 (windows, length).

    Raises:
        InputError: If the model writes another text, or cannot write.
    """
    starts, known = text.draw.windows, moe.model.get_input_embeddings().weight.shape[0]
    if text.dataset != DATASET or not starts or max(starts) >= known:
        raise InputError(
            f"The calibration text {text.dataset!r} is none that {moe.name} wrote "
            f"({len(starts)} windows, the model knows {known} tokens); search the map again."
        )
    windows, found = written(moe, starts, quantizer, length=text.draw.length, progress=progress)
    if found != text:
        raise InputError(
            f"{moe.name} writes another calibration text here than the one told (its tokens hash "
            f"to {found.draw.stream[:12]}..., not {text.draw.stream[:12]}...); use the same "
            "weights, on a machine and with libraries of the same kind, or search the map again."
        )
    return windows


def beam_search(
    moe: MoEModel,
    starts: tuple[int, ...],
    *,
    length: int,
    beams: int = DEFAULT_BEAMS,
    tau: float = DEFAULT_TAU,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """Let the model write one window from each start token.

    It reads ``beams * (length - 1)`` tokens for each. The same model and starts give the same
    text; on another machine, whose products differ in their last digits, it may be another.

    Args:
        moe: The model, a decoder.
        starts: First tokens.
        length: Tokens per window, the start included.
        beams: Prefixes kept of each window, w.
        tau: Larger values weigh balance less; infinity for plain beam search.
        progress: Called with tokens written of each window, over all batches, and of all.

    Returns:
        int64 (windows, length), the best beam of each.

    Raises:
        InputError: If the model has no cache to write with, cannot use it, or overflows.
    """
    if moe.model.config.is_encoder_decoder:
        raise InputError(
            f"{moe.name} is an encoder-decoder, which writes no text of its own; calibrate by "
            "given text: leave out ebss."
        )
    batches = torch.tensor(starts, device=moe.model.device).split(max(1, _ROWS // beams))
    found = []
    with torch.inference_mode():
        for number, batch in enumerate(batches):

            def step(done: int, number: int = number) -> None:
                if progress is not None:
                    progress(number * (length - 1) + done, len(batches) * (length - 1))

            found.append(_write(moe, batch, length, beams, tau, step))
    text: NDArray[np.int64] = torch.cat(found).cpu().numpy()
    return text


def _write(
    moe: MoEModel,
    starts: torch.Tensor,
    length: int,
    beams: int,
    tau: float,
    progress: Callable[[int], None],
) -> torch.Tensor:
    """Write one batch of windows, int64 (S, length)."""
    windows, counters = len(starts), [_Counter() for _ in moe.containers]
    prefixes = Prefixes(
        starts[:, None, None].expand(-1, beams, 1),
        torch.zeros(windows, beams, dtype=torch.float64, device=starts.device),
        tuple(
            torch.zeros(windows, beams, e.num_experts, dtype=torch.float64, device=starts.device)
            for e in moe.containers
        ),
    )
    cache: Any = None
    with moe.experts_forward(counters):
        for done in range(1, length):
            try:
                output = moe.model(
                    input_ids=prefixes.tokens[..., -1].flatten()[:, None],
                    past_key_values=cache,
                    use_cache=True,
                )
            except ValueError as error:  # a cache of linear attention alone has no length
                raise InputError(
                    f"{moe.name} cannot read on from its cache ({first_line(error)}), and EBSS "
                    "writes token by token; calibrate by given text: leave out ebss."
                ) from error
            cache = output.get("past_key_values")
            if cache is None:
                raise InputError(
                    f"{moe.name} keeps no cache of what it has read, and EBSS writes token by "
                    "token; calibrate by given text: leave out ebss."
                )
            for counter, total in zip(counters, prefixes.counts, strict=True):
                total.add_(counter.count(total.shape))
            log_p = output.logits[:, -1].float().log_softmax(-1).unflatten(0, (windows, beams))
            if log_p.isnan().any():
                raise InputError(
                    f"{moe.name} overflows on the text that it writes; calibrate by given text: "
                    "leave out ebss."
                )
            prefixes, beam = prefixes.extended(log_p, tau=tau)
            rows = beams * torch.arange(windows, device=beam.device)[:, None] + beam
            cache.reorder_cache(rows.flatten())
            progress(done)
    return prefixes.tokens[:, 0]


class _Counter:
    """Runs a layer's experts as the model would, and keeps which ones were selected last."""

    def __init__(self) -> None:
        self.index = torch.empty(0, 0, dtype=torch.int64)

    def __call__(
        self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts; the signature of the experts interface."""
        self.index = index
        return run_stacked(module, hidden, index, weights)

    def count(self, shape: torch.Size) -> torch.Tensor:
        """Return how often each row's token selected each expert, float64 (S, w, E)."""
        ones = torch.ones_like(self.index, dtype=torch.float64)
        zeros = torch.zeros(len(self.index), shape[-1], dtype=torch.float64, device=ones.device)
        return zeros.scatter_add_(1, self.index, ones).view(shape)
