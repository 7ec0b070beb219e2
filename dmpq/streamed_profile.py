"""A profile of a checkpoint that is larger than memory: one pass with gradients, layer by layer.

What each layer's experts saw, gave, and are blamed for goes to files; then every expert is read
once more, quantized to every format, and judged on the tokens that selected it. The result is the
profile of ``--signal gradient`` (:mod:`dmpq.profiling`), to rounding.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dmpq.checkpoint import Checkpoint
from dmpq.data import Draw, Windows
from dmpq.errors import InputError
from dmpq.expert_sums import STATISTICS, ExpertSums, Seen, weight_statistics
from dmpq.experts import Experts
from dmpq.formats import Menu
from dmpq.profile import Profile
from dmpq.profiling import embeddings_require_gradients, estimated, router_norms
from dmpq.quantization import quantize
from dmpq.streamed_model import StreamedModel
from dmpq.tensor_files import TensorFile, TensorFileWriter, TensorInfo

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
    scratch: Path | None = None,
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
        scratch: Folder for what the layers saw, 12 bytes per token, layer and hidden value; the
            system's own for temporary files where ``None``.
        progress: Called with a stage's name, steps done, and all steps.

    Raises:
        InputError: If the model cannot be run that way, or gives values that are not finite.
    """
    spec = source.moe.spec
    fingerprint = source.fingerprint(lambda i, n: progress("reading the weights", i, n))
    sums = ExpertSums.zeros(spec.num_experts, len(menu), apart=False)
    statistics: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        record = _Record(source, Path(folder), windows.size)
        _run(StreamedModel(source), _lots(windows, lot), record, sums, progress)
        row = 0
        for number, experts in enumerate(source.moe.containers):
            saw = TensorFile(record.path(number))
            for index in range(experts.num_experts):
                variants = _Variants(source, experts, menu)
                sums.add(row, variants, index, _seen(saw, index))
                statistics.append(weight_statistics(*variants.variant(index, None)))
                row += 1
                progress("profiling", row, spec.num_experts)
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
        **dict(zip(STATISTICS, np.array(statistics).T, strict=True)),
        **router_norms(source.moe, [_router(source, one) for one in source.moe.containers]),
    )


def _router(source: Checkpoint, experts: Experts) -> torch.Tensor | None:
    """Return a router's weight (E, H), where it can be told."""
    if experts.router is None:
        return None
    names = {id(parameter): name for name, parameter in source.moe.model.named_parameters()}
    return source.parameter(names[id(experts.router)])


@dataclass(eq=False)
class _Record:
    """Files of what each layer's experts saw, written while the model runs.

    Args:
        source: The checkpoint.
        folder: Where to.
        tokens: All of them.
    """

    source: Checkpoint
    folder: Path
    tokens: int
    _writers: list[TensorFileWriter] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)
    _row: int = 0

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.source.moe.spec.moe_layers):
            wide = TensorInfo(torch.float32, (self.tokens, layer.hidden_size))
            tensors = dict.fromkeys(_FLOATS, wide)
            tensors["weights"] = TensorInfo(torch.float32, (self.tokens, layer.top_k))
            tensors["index"] = TensorInfo(torch.int64, (self.tokens, layer.top_k))
            self._writers.append(TensorFileWriter(self.path(number), tensors, {}))

    def path(self, number: int) -> Path:
        """Return a layer's file."""
        return self.folder / f"layer-{number}.safetensors"

    def start(self, row: int) -> None:
        """Begin a forward whose first token has this number."""
        self._row, self._seen = row, set()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers:
            writer.close()

    def __call__(
        self,
        number: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Write what a container saw; the backward pass runs it again, and tells nothing new."""
        if number in self._seen:
            return
        self._seen.add(number)
        writer, row = self._writers[number], self._row
        writer.write("hidden", hidden.float(), row=row)
        writer.write("index", index.long(), row=row)
        writer.write("weights", weights.float(), row=row)
        writer.write("output", output.detach().float(), row=row)
        output.register_hook(lambda slope: writer.write("gradient", slope.float(), row=row))


def _run(
    streamed: StreamedModel,
    lots: Sequence[torch.Tensor],
    record: _Record,
    sums: ExpertSums,
    progress: Progress,
) -> None:
    """Run the model forward and backward over the text, a lot of windows after the other."""
    moe = streamed.source.moe
    try:
        # Within, so that the hooks stand behind those that cast what was looked up.
        with streamed.streaming(record), embeddings_require_gradients(moe):
            for number, ids in enumerate(lots, 1):
                record.start(sums.tokens)
                targets = moe.read(ids)[:, 1:]
                with torch.enable_grad():
                    logits = moe.logits(ids)
                    loss = functional.cross_entropy(
                        logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
                    )
                    torch.autograd.backward(loss)
                if not torch.isfinite(loss):
                    raise InputError(
                        f"{moe.name} gives a loss that is not finite on this text; use other "
                        "text, or get the checkpoint again."
                    )
                sums.tokens += ids.numel()
                sums.nll += float(loss.detach())
                sums.predicted += targets.numel()
                progress("forward and backward", number, len(lots))
    finally:
        record.close()


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
