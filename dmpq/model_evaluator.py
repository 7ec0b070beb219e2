"""The loss of bit maps on the real model: exact, cached, metered, resuming where maps differ."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dmpq.bank import Bank
from dmpq.batches import Batch, Text, as_text
from dmpq.data import Windows
from dmpq.errors import InputError
from dmpq.evaluation import FAILURE_NATS, Assignments, Evaluations
from dmpq.experts import run_stacked
from dmpq.files import JsonLines
from dmpq.replay import Recording, Replayer
from dmpq.spec import ModelSpec

BATCH_TOKENS: Final = 4096
PREFIX_MEMORY: Final = 4 * 2**30

_LAYER_NUMBER: Final = re.compile(r"\.(\d+)\.")
_CHUNK_ELEMENTS: Final = {"cpu": 2**18}
_CHUNK_ELEMENTS_ELSEWHERE: Final = 2**25
"""Logits compared at a time: few enough to stay in a core's cache, or to fit beside a model."""


@dataclass(frozen=True, eq=False)
class _Prefix:
    """One forward of some map, for others to resume.

    Attributes:
        recording: What its modules returned.
        moved: Selections of each MoE layer that are not the full-precision model's.
    """

    recording: Recording
    moved: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Batch:
    """The inputs of one forward and what the full-precision model says of them.

    Attributes:
        inputs: What is run.
        log_probabilities: fp32 (rows, classes); of a text (tokens, vocabulary).
        nll: Summed over the rows with a right answer, nats.
        members: Per MoE layer bool (tokens, experts), whether the token selects the expert.
        selections: Token-expert selections of all layers.
        prefix: The full-precision forward, where it is kept.
    """

    inputs: Batch
    log_probabilities: torch.Tensor
    nll: float
    members: tuple[torch.Tensor, ...]
    selections: int
    prefix: _Prefix | None


@dataclass(eq=False)
class _Incumbent:
    """A map that later ones are expected to be near: its formats (N, 2) and, once used, runs."""

    formats: NDArray[np.int64]
    prefixes: list[_Prefix]


class ModelEvaluator:
    """Measures bit maps on a text, one forward each.

    A map's value is that of the map evaluated alone, in batches of fixed shape; resuming from
    the full-precision forward, or from that of a held map, keeps it to the bit. Answers are
    cached, and kept in a journal where one is given. An answer counts as spent the first time it
    is asked for, computed or not, so that a resumed search counts like an uninterrupted one.

    Args:
        bank: The model's variants.
        windows: int64 (windows, length), the text; or a task's examples.
        label: Names the text in the journal.
        journal: Where answers are kept and looked up.
        batch_tokens: Tokens per forward.
        prefix_memory: Bytes that all recorded forwards together may take; maps are held only
            where a second recording fits, and without room for one every forward is whole.
    """

    name = "model"

    def __init__(
        self,
        bank: Bank,
        windows: Windows | Text,
        *,
        label: str,
        journal: JsonLines | None = None,
        batch_tokens: int = BATCH_TOKENS,
        prefix_memory: float = PREFIX_MEMORY,
    ) -> None:
        if not len(windows):
            raise InputError(f"The {label} text is empty; give it at least one window of tokens.")
        self.bank = bank
        self.label = label
        text = as_text(windows)
        self.batches = text.batches(bank.moe, tokens=batch_tokens)
        self._prefix_memory = prefix_memory
        self.journal = journal
        self.text_key = _text_key(bank, text, label)
        self._known = _read_journal(journal, self.text_key)
        self._asked: dict[str, tuple[float, float, float]] = {}
        self._spent = 0.0
        self._held: _Incumbent | None = None

    @property
    def id_batches(self) -> list[torch.Tensor]:
        """Token ids of each forward, int64 (sequences, length)."""
        return [batch.ids for batch in self.batches]

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def tokens_spent(self) -> float:
        """What all answers so far have cost, in FLOP-equivalents of a forwarded token."""
        return self._spent

    def charge(self, tokens: float) -> None:
        """Count work done on the model elsewhere, in FLOP-equivalents of a forwarded token."""
        self._spent += tokens

    @cached_property
    def _replayer(self) -> Replayer:
        moe = self.bank.moe
        probe = self.batches[0].probe()
        points = [experts.path for experts in moe.containers]
        with torch.inference_mode():
            return Replayer(moe.model, points, lambda: probe.logits(moe))

    @cached_property
    def _batches(self) -> list[_Batch]:
        """Run the full-precision model once over the text and keep what maps are compared with."""
        self._spent += self.tokens
        batches = []
        replayer = self._replayer
        with torch.inference_mode(), self._own_forward() as selected:
            for inputs in self.batches:
                selected.clear()
                with replayer.record() as recording:
                    logits = inputs.logits(self.bank.moe)
                kept = _Prefix(recording, (0,) * len(selected)) if self._keeps(recording) else None
                batches.append(self._batch(inputs, logits, selected, kept))
        return batches

    def _batch(
        self,
        inputs: Batch,
        logits: torch.Tensor,
        selected: list[torch.Tensor],
        prefix: _Prefix | None,
    ) -> _Batch:
        log_p = functional.log_softmax(logits, -1)
        taken = log_p.gather(-1, inputs.targets)
        counted = [
            inputs.real(index, layer.experts)
            for index, layer in zip(selected, self.bank.layers, strict=True)
        ]
        members = tuple(
            torch.zeros(
                len(index), layer.experts.num_experts, dtype=torch.bool, device=index.device
            ).scatter_(1, index, value=True)
            for index, layer in zip(counted, self.bank.layers, strict=True)
        )
        selections = sum(index.numel() for index in counted)
        return _Batch(inputs, log_p, _nll_sum(taken, inputs), members, selections, prefix)

    def _keeps(self, recording: Recording, *, copies: int = 1) -> bool:
        """Return whether recordings of all batches, of so many maps, are exact and fit."""
        needed = copies * recording.memory_bytes * len(self.batches)
        return self._replayer.exact and needed <= self._prefix_memory

    @contextmanager
    def _own_forward(self) -> Iterator[list[torch.Tensor]]:
        """Run the model's own experts, noting which experts each layer selects."""
        selected: list[torch.Tensor] = []

        def forward(module: Any, hidden: Any, index: torch.Tensor, weights: Any) -> torch.Tensor:
            selected.append(index)
            return run_stacked(module, hidden, index, weights)

        with self.bank.moe.experts_forward([forward] * len(self.bank.layers)):
            yield selected

    def full_nll(self) -> float:
        """Return the full-precision model's negative log-likelihood, nats per token."""
        return sum(b.nll for b in self._batches) / sum(b.predicted for b in self.batches)

    def hold(self, assignment: Assignments) -> None:
        """Let later maps resume from this one; see :meth:`dmpq.evaluation.Evaluator.hold`.

        It counts as one forward, resumed from the full-precision one, whether or not a later
        answer needs it; it runs only once one does. The full-precision map is always held, and
        where two recordings do not fit into memory nothing else is: both cost nothing.
        """
        formats = self._formats(assignment)[0]
        if self._held is not None and np.array_equal(self._held.formats, formats):
            return
        self._held = None
        first = self._first_below_full(formats)
        prefix = self._batches[0].prefix
        if prefix is None or first == len(self.bank.layers):
            return
        if self._keeps(prefix.recording, copies=2):
            self._held = _Incumbent(formats.copy(), [])
            self._spent += self._resume_share(first) * self.tokens

    def evaluate(self, assignments: Assignments, *, fidelity: float = 1.0) -> Evaluations:
        """Measure K maps, each alone; see :meth:`dmpq.evaluation.Evaluator.evaluate`.

        Raises:
            InputError: If ``fidelity`` is outside (0, 1].
        """
        if not 0.0 < fidelity <= 1.0:
            raise InputError(f"Fidelity {fidelity} is outside (0, 1]; 1 measures on all the text.")
        batches = math.ceil(fidelity * len(self.batches))
        before = self._spent
        formats = self._formats(assignments)
        answers = np.array([self._answer(one, batches) for one in formats]).reshape(-1, 3)
        kl, nll, shift = answers.T
        return Evaluations(kl, nll, shift, self._spent - before)

    def accuracy(self, assignments: Assignments) -> NDArray[np.float64]:
        """Return the share of next tokens, or of a task's answers, that each map has right, (K,).

        A judgement, not a signal of any search: neither kept nor counted.
        """
        found = []
        with torch.inference_mode(), self.bank.attached():
            for formats in self._formats(assignments):
                self.bank.choose(formats[None])
                right = 0
                for inputs in self.batches:
                    guessed = inputs.logits(self.bank.moe).argmax(-1, keepdim=True)
                    right += int(inputs.answered(guessed == inputs.targets).sum())
                found.append(right / sum(inputs.predicted for inputs in self.batches))
        return np.array(found)

    def screen(self, assignments: Assignments) -> Evaluations:
        """Measure K maps in one forward per batch, each map on its own copy of the rows.

        A screening fidelity: matrix products change in the last digits with the number of rows,
        so these values are neither cached nor mixed with exact ones.
        """
        formats = self._formats(assignments)
        before = self._spent
        totals = np.zeros((len(formats), 3))
        batches = self._batches
        self.bank.choose(formats)
        with torch.inference_mode(), self.bank.attached():
            for batch in batches:
                logits = batch.inputs.repeat(len(formats)).logits(self.bank.moe)
                chosen = [_taken(layer.selected).chunk(len(formats)) for layer in self.bank.layers]
                for k, part in enumerate(logits.chunk(len(formats))):
                    moved = sum(
                        _moved(batch.inputs.real(c[k], layer.experts), m)
                        for c, m, layer in zip(
                            chosen, batch.members, self.bank.layers, strict=True
                        )
                    )
                    totals[k] += (*_compare(part, batch), moved)
        self._spent += len(formats) * self.tokens
        kl, nll, shift = _per_token(totals, batches).T
        return Evaluations(kl, nll, shift, self._spent - before)

    def _formats(self, assignments: Assignments) -> NDArray[np.int64]:
        """Return menu indices of both projections, (K, N, 2)."""
        maps = np.atleast_2d(assignments)
        experts = self.bank.moe.spec.num_experts
        if maps.shape[1] not in (experts, 2 * experts):
            raise InputError(
                f"A map of {maps.shape[1]} decisions does not fit a model of {experts} experts; "
                f"give {experts} decisions, or {2 * experts} for gate+up and down apart."
            )
        if maps.min() < 0 or maps.max() >= len(self.bank.menu):
            raise InputError(
                f"A map holds menu indices from {maps.min()} to {maps.max()}; "
                f"the menu has {len(self.bank.menu)} formats, counted from 0."
            )
        both = maps if maps.shape[1] == 2 * experts else np.repeat(maps, 2, axis=1)
        return np.ascontiguousarray(both, dtype=np.int64).reshape(len(maps), experts, 2)

    def _answer(self, formats: NDArray[np.int64], batches: int) -> tuple[float, float, float]:
        key = self._key(formats, batches)
        if key in self._asked:
            return self._asked[key]
        incumbent, first = self._nearest(formats)
        if key in self._known:
            answer = self._known[key]
        else:
            answer = self._measure(formats, batches, incumbent, first)
            if self.journal is not None:
                self.journal.append({"text": self.text_key, "map": key, "values": answer})
        # The share first: asking for it may run, and count, the full-precision model.
        cost = self._resume_share(first) * sum(inputs.tokens for inputs in self.batches[:batches])
        self._spent += cost
        self._asked[key] = answer
        return answer

    def _key(self, formats: NDArray[np.int64], batches: int) -> str:
        digest = hashlib.sha256(formats.astype(np.uint8).tobytes())
        digest.update(str(batches).encode())
        return digest.hexdigest()[:32]

    def _measure(
        self, formats: NDArray[np.int64], batches: int, incumbent: _Incumbent | None, first: int
    ) -> tuple[float, float, float]:
        used = self._batches[:batches]
        if first == len(self.bank.layers):
            totals = [(0.0, b.nll, 0.0) for b in used]
        else:
            prefixes = [b.prefix for b in used] if incumbent is None else self._runs(incumbent)
            self.bank.choose(formats[None])
            with torch.inference_mode(), self.bank.attached():
                totals = []
                for batch, prefix in zip(used, prefixes, strict=False):
                    logits, moved = self._run(batch, prefix, first)
                    totals.append((*self._compared(logits, batch), float(sum(moved))))
        kl, nll, shift = _per_token(np.sum(totals, axis=0)[None], used)[0]
        if not (math.isfinite(kl) and math.isfinite(nll)):
            return FAILURE_NATS, FAILURE_NATS, float(shift)
        return float(kl), float(nll), float(shift)

    def _compared(self, logits: torch.Tensor, batch: _Batch) -> tuple[float, float]:
        """Return KL and NLL of a map's rows, summed."""
        return _compare(logits, batch)

    def _run(
        self, batch: _Batch, prefix: _Prefix | None, first: int
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Run the chosen formats, and return logits and moved selections per layer.

        Args:
            batch: What to run on.
            prefix: What answers for all that comes before the experts of layer ``first``, their
                router included; ``None`` to run all.
            first: Ordinal of the MoE layer to resume at.
        """
        if prefix is None:
            logits = batch.inputs.logits(self.bank.moe)
            known: tuple[int, ...] = ()
        else:
            with self._replayer.resume(prefix.recording, first):
                logits = batch.inputs.logits(self.bank.moe)
            known = prefix.moved[: first + 1]
        fresh = zip(self.bank.layers[len(known) :], batch.members[len(known) :], strict=True)
        real = batch.inputs.real
        moved = (_moved(real(_taken(layer.selected), layer.experts), m) for layer, m in fresh)
        return logits, (*known, *moved)

    def _runs(self, incumbent: _Incumbent) -> list[_Prefix]:
        """Return the incumbent's forwards on all batches, run the first time they are needed."""
        if not incumbent.prefixes:
            first = self._first_below_full(incumbent.formats)
            self.bank.choose(incumbent.formats[None])
            with torch.inference_mode(), self.bank.attached():
                for batch in self._batches:
                    with self._replayer.record() as recording:
                        _, moved = self._run(batch, batch.prefix, first)
                    incumbent.prefixes.append(_Prefix(recording, moved))
        return incumbent.prefixes

    def _nearest(self, formats: NDArray[np.int64]) -> tuple[_Incumbent | None, int]:
        """Return what to resume from (``None``: full precision), and at which MoE layer."""
        first = self._first_below_full(formats)
        if self._held is None:
            return None, first
        shared = self._first_layer(formats != self._held.formats)
        shared = min(shared, len(self.bank.layers) - 1)
        return (self._held, shared) if shared > first else (None, first)

    def _first_below_full(self, formats: NDArray[np.int64]) -> int:
        full = np.array([f.is_full for f in self.bank.menu.formats])
        return self._first_layer(~full[formats])

    def _first_layer(self, marked: NDArray[np.bool_]) -> int:
        """Return the first MoE layer with a mark, (N, 2), or the number of layers for none."""
        experts = [layer.experts.num_experts for layer in self.bank.layers]
        layer_of = np.repeat(np.arange(len(experts)), experts)
        rows, _ = np.nonzero(marked)
        return int(layer_of[rows[0]]) if len(rows) else len(experts)

    def _resume_share(self, first: int) -> float:
        shares = _resume_shares(self.bank.moe.spec)
        return shares[first] if self._batches[0].prefix is not None else 1.0


def _taken(selected: torch.Tensor | None) -> torch.Tensor:
    assert selected is not None
    return selected


def _text_key(bank: Bank, text: Text, label: str) -> str:
    """Name a text in the journal, by all that its answers depend on."""
    shape, content = text.identity()
    digest = hashlib.sha256(bank.moe.fingerprint.encode())
    digest.update(f"{bank.menu}{shape}{torch.get_num_threads()}".encode())
    digest.update(content)
    if bank.calibration is not None:
        digest.update(bank.calibration.digest.encode())
    return f"{label}:{digest.hexdigest()[:16]}"


def _read_journal(journal: JsonLines | None, text: str) -> dict[str, tuple[float, float, float]]:
    if journal is None:
        return {}
    answers: dict[str, tuple[float, float, float]] = {}
    for record in journal:
        match record:
            case {"text": str(of), "map": str(key), "values": [_, _, _] as values} if (
                of == text and all(_is_finite_number(value) for value in values)
            ):
                answers[key] = (float(values[0]), float(values[1]), float(values[2]))
    return answers


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _forward_costs(spec: ModelSpec) -> tuple[list[int], list[int], int]:
    """Return the weights that one token multiplies: per layer, in each MoE's experts, in all."""
    active = [
        layer.top_k * layer.expert_parameters // layer.num_experts for layer in spec.moe_layers
    ]
    dense = spec.attention_parameters_per_layer + spec.dense_block_parameters
    layers = [dense] * spec.num_layers
    numbers = _layer_numbers(spec)
    for number, layer, experts in zip(numbers, spec.moe_layers, active, strict=True):
        layers[number] = spec.attention_parameters_per_layer + layer.resident_parameters + experts
    return layers, active, sum(layers) + spec.embedding_parameters


def expert_share(spec: ModelSpec) -> float:
    """Return the share of a forward's weight FLOPs that the routed experts take."""
    _, active, total = _forward_costs(spec)
    return sum(active) / total


def _resume_shares(spec: ModelSpec) -> list[float]:
    """Return the share of a forward's weight FLOPs that resuming at each MoE layer runs.

    One more entry, 0, for a map that changes nothing.
    """
    layers, active, total = _forward_costs(spec)
    numbers = _layer_numbers(spec)
    skipped = [
        sum(layers[: number + 1]) - experts
        for number, experts in zip(numbers, active, strict=True)
    ]
    return [1 - before / total for before in skipped] + [0.0]


def _layer_numbers(spec: ModelSpec) -> list[int]:
    """Return the number of each MoE layer among all; a decoder's count from its encoder's last."""
    numbers: list[int] = []
    start = 0
    for ordinal, layer in enumerate(spec.moe_layers):
        match = _LAYER_NUMBER.search(layer.path)
        number = start + int(match[1]) if match else ordinal
        if numbers and number <= numbers[-1]:
            start = numbers[-1] + 1 - number + start
            number = numbers[-1] + 1
        numbers.append(number)
    return numbers


def _nll_sum(taken: torch.Tensor, inputs: Batch) -> float:
    """Sum over the rows with a right answer, given the log-probabilities of all targets."""
    return -float(inputs.answered(taken).double().sum())


def _moved(index: torch.Tensor, members: torch.Tensor) -> int:
    """Return how many selections (tokens, top_k) are not the full-precision model's."""
    return index.numel() - int(members.gather(1, index).sum())


def _compare(logits: torch.Tensor, batch: _Batch) -> tuple[float, float]:
    """Return KL and NLL, summed; the KL of identical logits is exactly 0.

    Chunk by chunk, because whole passes over (tokens, vocabulary) cost memory traffic, and on a
    CPU fresh pages each time.
    """
    rows = max(
        1, _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // logits.shape[1]
    )
    chunks = (x.split(rows) for x in (logits, batch.log_probabilities, batch.inputs.targets))
    kl, taken = [], []
    for chunk, log_p, targets in zip(*chunks, strict=True):
        log_q = functional.log_softmax(chunk, -1)
        taken.append(log_q.gather(-1, targets))
        difference = torch.sub(log_p, log_q, out=log_q)
        kl.append(difference.mul_(log_p.exp()).sum(-1, dtype=torch.float64))
    return float(torch.cat(kl).sum()), _nll_sum(torch.cat(taken), batch.inputs)


def _per_token(totals: NDArray[np.float64], batches: list[_Batch]) -> NDArray[np.float64]:
    rows = sum(b.inputs.rows for b in batches)
    predicted = sum(b.inputs.predicted for b in batches)
    selections = sum(b.selections for b in batches)
    means: NDArray[np.float64] = totals / np.array([rows, predicted, selections])
    return means
