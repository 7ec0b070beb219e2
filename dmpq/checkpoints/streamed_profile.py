"""A profile of a checkpoint that is larger than memory: one pass with gradients, layer by layer.

What each layer's experts saw, gave, and are blamed for goes to files; then every expert is read
once more, quantized to every format, and judged on the tokens that selected it. The result is the
profile of ``--signal gradient`` (:mod:`dmpq.profiling`), to rounding.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.expert_sums import STATISTICS, ExpertSums, Seen, weight_statistics
from dmpq.checkpoints.heap import return_freed_memory
from dmpq.checkpoints.streamed_model import StreamedModel
from dmpq.checkpoints.streamed_record import LotLoss, Record, disk_needed
from dmpq.checkpoints.tensor_files import TensorFile
from dmpq.data import Draw, Windows
from dmpq.errors import InputError
from dmpq.experts import Experts
from dmpq.formats import Menu
from dmpq.moe import MoEModel
from dmpq.profile import Profile
from dmpq.profiling import embeddings_require_gradients, estimated, router_norms
from dmpq.quantization import quantize

BATCH_TOKENS: Final = 2048
"""Tokens of one forward, unless a window is longer."""
_LOGITS: Final = 5
"""Copies of a batch's logits in fp32 that the loss and its gradient take, at most."""
_HIDDEN: Final = 60
"""Vectors of the hidden width in fp32 per token that a layer takes, about."""
_KEPT: Final = 10
"""Vectors of the hidden width in fp32 per token that each layer leaves for the backward pass."""
_MATRICES: Final = 12
"""Copies of an expert's larger matrix in fp32 that quantizing and running it take, at most."""
_FLOATS: Final = ("hidden", "output", "gradient")
_STATISTICS: Final = "statistics"

Progress = Callable[[str, int, int], None]


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Show nothing."""


def streamed_profile(
    source: Checkpoint,
    menu: Menu,
    windows: Windows,
    *,
    text: str,
    drawn: Draw | None = None,
    lot: int = BATCH_TOKENS,
    kept: Path | None = None,
    progress: Progress = _silent,
) -> Profile:
    """Profile every expert of a checkpoint without loading it.

    Args:
        source: The checkpoint.
        menu: Formats on offer.
        windows: int64 (W, length), token ids.
        text: What the text is, in words.
        drawn: Which windows of it these are.
        lot: Tokens of one forward, unless a window is longer.
        kept: Folder, of nothing else, for what the layers saw (:func:`scratch_bytes`). What an
            interrupted run of the same weights, text and options left there is gone on with, and
            the result is the same to the bit; whatever else is there is removed. The caller
            removes it when the profile is safe. ``None`` for a temporary one.
        progress: Called with a stage's name, steps done, and all steps.

    Raises:
        InputError: If the model cannot be run that way, or gives values that are not finite.
    """
    return_freed_memory()
    spec = source.moe.spec
    fingerprint = source.fingerprint(lambda i, n: progress("reading the weights", i, n))
    lots = _lots(windows, lot)
    sums = ExpertSums.zeros(spec.num_experts, len(menu), apart=False)
    statistics = np.zeros((spec.num_experts, len(STATISTICS)))
    with ExitStack() as stack:
        folder = kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        state = _state(source, menu, windows, lots, fingerprint=fingerprint)
        record = Record(source, folder, windows.size, lots[0].numel(), state)
        stack.callback(record.close)
        _run(source, lots, record, sums, progress)
        start = 0
        for number, experts in enumerate(source.moe.containers):
            own = slice(start, start + experts.num_experts)
            done = record.sums(number)
            if done is None:
                _profile_layer(source, menu, record, number, sums, statistics, start, progress)
                record.keep_sums(number, {**sums.rows(own), _STATISTICS: statistics[own]})
            else:
                statistics[own] = done.pop(_STATISTICS)
                sums.set_rows(own, done)
            start = own.stop
            progress("profiling", start, spec.num_experts)
    found = estimated(sums, spec, len(menu))
    return Profile(
        spec=spec,
        menu=menu,
        tokens=sums.tokens,
        text=text,
        fingerprint=fingerprint,
        full_nll=found.full_nll,
        cost_tokens=found.cost_tokens,
        hits=sums.hits,
        frequency=sums.hits / sums.tokens,
        routing_weight=sums.routing_weight / sums.tokens,
        contribution=sums.contribution / np.maximum(sums.hits, 1),
        sensitivity=found.sensitivity,
        projection_sensitivity=None,
        output_error=sums.output_error / sums.tokens,
        proxy=sums.proxy / sums.tokens,
        uniform_kl=found.uniform_kl,
        drawn=drawn,
        calibration=None,
        signal="gradient",
        **dict(zip(STATISTICS, statistics.T, strict=True)),
        **router_norms(source.moe, [_router(source, one) for one in source.moe.containers]),
    )


def _router(source: Checkpoint, experts: Experts) -> torch.Tensor | None:
    """Return a router's weight (E, H), where it can be told."""
    if experts.router is None:
        return None
    names = {id(parameter): name for name, parameter in source.moe.model.named_parameters()}
    return source.parameter(names[id(experts.router)])


def _state(
    source: Checkpoint,
    menu: Menu,
    windows: Windows,
    lots: Sequence[torch.Tensor],
    *,
    fingerprint: str,
) -> dict[str, Any]:
    """Return all that a record depends on: to the bit, the number of threads is a part of it."""
    return {
        "weights": fingerprint,
        "windows": [list(windows.shape), hashlib.sha256(windows.tobytes()).hexdigest()],
        "lot": lots[0].numel(),
        "menu": [list(menu.keys), menu.quantizer, menu.symmetric],
        "layers": [one.path for one in source.moe.containers],
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("dmpq", "torch", "transformers", "torchao")},
    }


def _profile_layer(
    source: Checkpoint,
    menu: Menu,
    record: Record,
    number: int,
    sums: ExpertSums,
    statistics: NDArray[np.float64],
    start: int,
    progress: Progress,
) -> None:
    """Judge every expert of a layer on the tokens that select it."""
    experts, saw = source.moe.containers[number], record.saw(number)
    for index in range(experts.num_experts):
        variants = _Variants(source, experts, menu)
        sums.add(start + index, variants, index, _seen(saw, index))
        statistics[start + index] = weight_statistics(*variants.variant(index, None))
        progress("profiling", start + index + 1, source.moe.spec.num_experts)


def _run(
    source: Checkpoint,
    lots: Sequence[torch.Tensor],
    record: Record,
    sums: ExpertSums,
    progress: Progress,
) -> None:
    """Run the model forward and backward over the text, a lot of windows after the other."""
    moe = source.moe
    losses: list[LotLoss] = []
    with ExitStack() as stack:
        running = False
        for number, ids in enumerate(lots, 1):
            row = sum(one.tokens for one in losses)
            loss = record.loss(row)
            if loss is None and not running:
                stack.enter_context(StreamedModel(source).streaming(record))
                # After it, so that its hooks stand behind those that cast what was looked up.
                stack.enter_context(embeddings_require_gradients(moe))
                running = True
            if loss is None:
                record.start(row)
                loss = _forward_and_backward(moe, ids)
                record.finish(loss)
            losses.append(loss)
            progress("forward and backward", number, len(lots))
    sums.tokens = sum(one.tokens for one in losses)
    sums.nll = sum(one.nll for one in losses)
    sums.predicted = sum(one.predicted for one in losses)


def _forward_and_backward(moe: MoEModel, ids: torch.Tensor) -> LotLoss:
    targets = moe.read(ids)[:, 1:]
    with torch.enable_grad():
        logits = moe.logits(ids)
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
        )
        torch.autograd.backward(loss)
    if not torch.isfinite(loss):
        raise InputError(
            f"{moe.name} gives a loss that is not finite on this text; use other text, or get the "
            "checkpoint again."
        )
    return LotLoss(ids.numel(), float(loss.detach()), targets.numel())


def scratch_bytes(source: Checkpoint, windows: Windows, lot: int) -> int:
    """Return what a profile keeps on disk until it is done, bytes.

    12 per token, layer and hidden value; 4 more per token of one forward, and the routing.

    Args:
        source: The checkpoint.
        windows: int64 (W, length), token ids.
        lot: Tokens of one forward, unless a window is longer.
    """
    return disk_needed(source, windows.size, _lots(windows, lot)[0].numel())


def batch_tokens(source: Checkpoint, length: int, allowed: float | None) -> int:
    """Return how many tokens a forward may have.

    Args:
        source: The checkpoint.
        length: Tokens of a window.
        allowed: Bytes beside the imports, by an estimate; ``None`` for no limit.

    Raises:
        InputError: If not even one window fits.
    """
    if allowed is None:
        return BATCH_TOKENS
    fixed, each = memory_needed(source)
    tokens = int((allowed - fixed) // each) // length * length
    if tokens < length:
        raise InputError(
            f"Streaming {source.name} takes about {(fixed + each * length) / 1e9:.2f} GB beside "
            f"the imports with windows of {length} tokens, and --max-memory allows "
            f"{allowed / 1e9:.2f}; allow more, or give a shorter --sequence-length."
        )
    return min(tokens, max(length, BATCH_TOKENS // length * length))


def memory_needed(source: Checkpoint) -> tuple[float, float]:
    """Return the bytes that streaming takes, and what each token of a batch adds; estimates.

    The largest of what is there at one time: the output head or a decoder layer in fp32 beside
    itself as stored, the table of embeddings, and one expert in fp32 in several copies.
    """
    spec, model = source.moe.spec, source.moe.model
    experts = {id(weight) for one in source.moe.containers for weight in one.parameters}
    tables = {
        id(one.weight): one.weight.numel()
        for one in (model.get_input_embeddings(), model.get_output_embeddings())
        if one is not None
    }
    layers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in experts | tables.keys():
            number = next((part for part in name.split(".") if part.isdigit()), "")
            layers[number] = layers.get(number, 0) + parameter.numel()
    stored = source.dtype.itemsize
    largest = max([*tables.values(), *layers.values()])
    matrix = max(
        math.prod(shape)
        for layer in spec.moe_layers
        for shape in (layer.gate_up_shape, layer.down_shape)
    )
    fixed = largest * (4 + stored) + matrix * 4 * _MATRICES
    vectors = _HIDDEN + _KEPT * spec.num_layers
    each = 4.0 * (_LOGITS * spec.vocab_size + vectors * spec.hidden_size)
    return float(fixed), each


def _lots(windows: NDArray[np.int64], tokens: int) -> Sequence[torch.Tensor]:
    count = max(1, tokens // windows.shape[1])
    return list(torch.from_numpy(windows).split(count))


def _seen(saw: TensorFile, expert: int) -> Seen:
    """Return what the tokens that select an expert saw."""
    chosen = (saw.read("index") == expert) & (saw.read("weights") != 0)
    tokens, slots = torch.where(chosen)
    rows = {name: saw.rows(name, tokens.tolist()) for name in (*_FLOATS, "weights")}
    weight = rows["weights"][torch.arange(len(slots)), slots]
    others = rows["weights"].sum(1) - weight
    return Seen(rows["hidden"], weight, others, rows["output"], rows["gradient"])


class _Variants:
    """One expert in every format, quantized as it is asked for, like a layer of the bank's."""

    def __init__(self, source: Checkpoint, experts: Experts, menu: Menu) -> None:
        self._source = source
        self.experts = experts
        self.menu = menu
        self._own: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def variant(self, expert: int, fmt: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's matrices in a format; ``None`` for the checkpoint's own."""
        if self._own is None or self._own[0] != expert:
            up, down = (self._source.expert(self.experts, s, expert) for s in ("gate_up", "down"))
            self._own = expert, (up.float(), down.float())
        own = self._own[1]
        if fmt is None or self.menu.formats[fmt].is_full:
            return own
        if self.menu.formats[fmt].is_pruned:
            return torch.zeros_like(own[0]), torch.zeros_like(own[1])
        found = self.menu.formats[fmt]
        up, down = (quantize(weight, found, self.menu).dequantize() for weight in own)
        return self.experts.laid_out(up), self.experts.laid_out(down)
