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
from dmpq.data import Windows
from dmpq.errors import InputError
from dmpq.evaluation import Assignments, Evaluations
from dmpq.files import JsonLines
from dmpq.replay import Recording, Replayer
from dmpq.spec import ModelSpec

BATCH_TOKENS: Final = 4096
PREFIX_MEMORY: Final = 4 * 2**30
FAILURE_NATS: Final = 100.0
"""KL and NLL of a map whose logits are not finite: finite, and worse than any working map."""

_LAYER_NUMBER: Final = re.compile(r"\.(\d+)\.")
_PROBE_LENGTH: Final = 8


@dataclass(frozen=True, eq=False)
class _Batch:
    """Token ids of one forward and what the full-precision model says of them."""

    ids: torch.Tensor
    log_probabilities: torch.Tensor
    selected: tuple[torch.Tensor, ...]
    recording: Recording | None


class ModelEvaluator:
    """Measures bit maps on a text, one forward each.

    A map's value is that of the map evaluated alone, in batches of fixed shape; resuming from
    the full-precision prefix keeps it to the bit. Answers are cached, and kept in a journal where
    one is given. An answer counts as spent the first time it is asked for, computed or not, so
    that a resumed search counts like an uninterrupted one.

    Args:
        bank: The model's variants.
        windows: int64 (windows, length), the text.
        label: Names the text in the journal.
        journal: Where answers are kept and looked up.
        batch_tokens: Tokens per forward.
        prefix_memory: Bytes that recorded prefixes may take; beyond, every forward is whole.
    """

    name = "model"

    def __init__(
        self,
        bank: Bank,
        windows: Windows,
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
        self._rows = max(1, batch_tokens // windows.shape[1])
        device = bank.moe.model.device
        self.id_batches = torch.from_numpy(windows).to(device).split(self._rows)
        self._prefix_memory = prefix_memory
        self._journal = journal
        self._text = _text_key(bank, windows, label)
        self._known = _read_journal(journal, self._text)
        self._asked: dict[str, tuple[float, float, float]] = {}
        self._spent = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return sum(ids.numel() for ids in self.id_batches)

    @property
    def tokens_spent(self) -> float:
        """What all answers so far have cost, in FLOP-equivalents of a forwarded token."""
        return self._spent

    @cached_property
    def _replayer(self) -> Replayer:
        moe = self.bank.moe
        probe_ids = self.id_batches[0][:1, :_PROBE_LENGTH]
        points = [experts.path for experts in moe.containers]
        with torch.inference_mode():
            return Replayer(moe.model, points, lambda: moe.logits(probe_ids))

    @cached_property
    def _batches(self) -> list[_Batch]:
        """Run the full-precision model once over the text and keep what maps are compared with."""
        self._spent += self.tokens
        batches = []
        replayer = self._replayer
        with torch.inference_mode(), self._own_forward() as selected:
            for ids in self.id_batches:
                selected.clear()
                with replayer.record() as recording:
                    logits = self.bank.moe.logits(ids)
                kept = recording if self._keeps(recording) else None
                batches.append(
                    _Batch(ids, functional.log_softmax(logits, -1), tuple(selected), kept)
                )
        return batches

    def _keeps(self, recording: Recording) -> bool:
        """Return whether recordings of all batches are exact and fit."""
        fits = recording.memory_bytes * len(self.id_batches) <= self._prefix_memory
        return self._replayer.exact and fits

    @contextmanager
    def _own_forward(self) -> Iterator[list[torch.Tensor]]:
        """Run the model's own experts, noting which experts each layer selects."""
        from transformers.integrations.moe import grouped_mm_experts_forward

        selected: list[torch.Tensor] = []

        def forward(module: Any, hidden: Any, index: torch.Tensor, weights: Any) -> torch.Tensor:
            selected.append(index)
            return grouped_mm_experts_forward(module, hidden, index, weights)

        with self.bank.moe.experts_forward([forward] * len(self.bank.layers)):
            yield selected

    def full_nll(self) -> float:
        """Return the full-precision model's negative log-likelihood, nats per token."""
        losses = [_nll_sum(b.log_probabilities, b.ids) for b in self._batches]
        return sum(losses) / sum(_predicted(b.ids) for b in self._batches)

    def evaluate(self, assignments: Assignments, *, fidelity: float = 1.0) -> Evaluations:
        """Measure K maps, each alone; see :meth:`dmpq.evaluation.Evaluator.evaluate`.

        Raises:
            InputError: If ``fidelity`` is outside (0, 1].
        """
        if not 0.0 < fidelity <= 1.0:
            raise InputError(f"Fidelity {fidelity} is outside (0, 1]; 1 measures on all the text.")
        batches = math.ceil(fidelity * len(self.id_batches))
        before = self._spent
        formats = self._formats(assignments)
        answers = np.array([self._answer(one, batches) for one in formats]).reshape(-1, 3)
        kl, nll, shift = answers.T
        return Evaluations(kl, nll, shift, self._spent - before)

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
                logits = self.bank.moe.logits(batch.ids.repeat(len(formats), 1))
                chosen = [_taken(layer.selected).chunk(len(formats)) for layer in self.bank.layers]
                for k, part in enumerate(logits.chunk(len(formats))):
                    totals[k] += _compare(part, [c[k] for c in chosen], batch)
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
        first = self._first_changed(formats)
        if key in self._known:
            answer = self._known[key]
        else:
            answer = self._measure(formats, batches, first)
            if self._journal is not None:
                self._journal.append({"text": self._text, "map": key, "values": answer})
        # The share first: asking for it may run, and count, the full-precision model.
        cost = self._resume_share(first) * sum(ids.numel() for ids in self.id_batches[:batches])
        self._spent += cost
        self._asked[key] = answer
        return answer

    def _key(self, formats: NDArray[np.int64], batches: int) -> str:
        digest = hashlib.sha256(formats.astype(np.uint8).tobytes())
        digest.update(str(batches).encode())
        return digest.hexdigest()[:32]

    def _measure(
        self, formats: NDArray[np.int64], batches: int, first: int
    ) -> tuple[float, float, float]:
        used = self._batches[:batches]
        if first == len(self.bank.layers):
            totals = [(0.0, _nll_sum(b.log_probabilities, b.ids), 0.0) for b in used]
        else:
            self.bank.choose(formats[None])
            with torch.inference_mode(), self.bank.attached():
                totals = [self._measure_batch(batch, first) for batch in used]
        kl, nll, shift = _per_token(np.sum(totals, axis=0)[None], used)[0]
        if not (math.isfinite(kl) and math.isfinite(nll)):
            return FAILURE_NATS, FAILURE_NATS, float(shift)
        return float(kl), float(nll), float(shift)

    def _measure_batch(self, batch: _Batch, first: int) -> tuple[float, float, float]:
        if batch.recording is not None:
            with self._replayer.resume(batch.recording, first):
                logits = self.bank.moe.logits(batch.ids)
            changed = self.bank.layers[first:]
            selected = [*batch.selected[:first], *(_taken(layer.selected) for layer in changed)]
        else:
            logits = self.bank.moe.logits(batch.ids)
            selected = [_taken(layer.selected) for layer in self.bank.layers]
        return _compare(logits, selected, batch)

    def _first_changed(self, formats: NDArray[np.int64]) -> int:
        """Return the ordinal of the first MoE layer with an expert below full precision."""
        full = np.array([f.is_full for f in self.bank.menu.formats])
        start = 0
        for ordinal, layer in enumerate(self.bank.layers):
            stop = start + layer.experts.num_experts
            if not full[formats[start:stop]].all():
                return ordinal
            start = stop
        return len(self.bank.layers)

    def _resume_share(self, first: int) -> float:
        shares = _resume_shares(self.bank.moe.spec)
        return shares[first] if self._batches[0].recording is not None else 1.0


def _taken(selected: torch.Tensor | None) -> torch.Tensor:
    assert selected is not None
    return selected


def _text_key(bank: Bank, windows: Windows, label: str) -> str:
    """Name a text in the journal, by all that its answers depend on."""
    digest = hashlib.sha256(bank.moe.fingerprint.encode())
    digest.update(f"{bank.menu}{windows.shape}{torch.get_num_threads()}".encode())
    digest.update(np.ascontiguousarray(windows).tobytes())
    return f"{label}:{digest.hexdigest()[:16]}"


def _read_journal(journal: JsonLines | None, text: str) -> dict[str, tuple[float, float, float]]:
    if journal is None:
        return {}
    answers: dict[str, tuple[float, float, float]] = {}
    for record in journal:
        match record:
            case {"text": str(of), "map": str(key), "values": [kl, nll, shift]} if of == text:
                answers[key] = (float(kl), float(nll), float(shift))
    return answers


def _forward_costs(spec: ModelSpec) -> tuple[list[int], list[int], int]:
    """Return the weights that one token multiplies: per layer, in each MoE's experts, in all."""
    active = [
        layer.top_k * layer.expert_parameters // layer.num_experts for layer in spec.moe_layers
    ]
    dense = 3 * spec.hidden_size * spec.dense_intermediate_size
    layers = [spec.attention_parameters_per_layer + dense] * spec.num_layers
    for i, (layer, experts) in enumerate(zip(spec.moe_layers, active, strict=True)):
        number = _layer_number(layer.path, i)
        layers[number] = spec.attention_parameters_per_layer + layer.resident_parameters + experts
    return layers, active, sum(layers) + spec.vocab_size * spec.hidden_size


def expert_share(spec: ModelSpec) -> float:
    """Return the share of a forward's weight FLOPs that the routed experts take."""
    _, active, total = _forward_costs(spec)
    return sum(active) / total


def _resume_shares(spec: ModelSpec) -> list[float]:
    """Return the share of a forward's weight FLOPs that resuming at each MoE layer runs.

    One more entry, 0, for a map that changes nothing.
    """
    layers, active, total = _forward_costs(spec)
    numbers = [_layer_number(layer.path, i) for i, layer in enumerate(spec.moe_layers)]
    skipped = [
        sum(layers[: number + 1]) - experts
        for number, experts in zip(numbers, active, strict=True)
    ]
    return [1 - before / total for before in skipped] + [0.0]


def _layer_number(path: str, ordinal: int) -> int:
    match = _LAYER_NUMBER.search(path)
    return int(match[1]) if match else ordinal


def _predicted(ids: torch.Tensor) -> int:
    return ids.shape[0] * (ids.shape[1] - 1)


def _nll_sum(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    taken = log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])
    return -float(taken.double().sum())


def _compare(
    logits: torch.Tensor, selected: list[torch.Tensor], batch: _Batch
) -> tuple[float, float, float]:
    """Return summed KL, summed NLL, and the number of selections not in the full model's."""
    log_q = functional.log_softmax(logits, -1)
    log_p = batch.log_probabilities
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).sum()
    moved = sum(
        int((~(new[:, :, None] == old[:, None, :]).any(-1)).sum())
        for new, old in zip(selected, batch.selected, strict=True)
    )
    return float(kl), _nll_sum(log_q, batch.ids), float(moved)


def _per_token(totals: NDArray[np.float64], batches: list[_Batch]) -> NDArray[np.float64]:
    tokens = sum(b.ids.numel() for b in batches)
    predicted = sum(_predicted(b.ids) for b in batches)
    selections = sum(s.numel() for b in batches for s in b.selected)
    means: NDArray[np.float64] = totals / np.array([tokens, predicted, selections])
    return means
