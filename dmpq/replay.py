"""Resuming a forward pass in the middle, in any model: recorded modules answer for the prefix.

To resume at a module, every module that had finished before it began, and whose parent was still
running, returns what it returned when it was recorded; all others run. What runs is computed by
the same operations on the same values, so a resumed forward equals a whole one to the bit. This
needs no knowledge of a family's layers, caches or masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from dmpq.overrides import overridden


@dataclass(frozen=True)
class Recording:
    """The outputs of one forward pass, by module path."""

    outputs: dict[str, Any]

    @property
    def memory_bytes(self) -> int:
        """What the recorded tensors take."""
        leaves, _ = tree_flatten(list(self.outputs.values()))
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


class Replayer:
    """Knows, for each resume point of a model, which modules a recording answers for.

    Args:
        model: The model.
        points: Paths of the modules where a forward may resume, each run once per forward.
        probe: Runs one forward of the model, on a small input, and returns its logits.
    """

    def __init__(
        self, model: nn.Module, points: Sequence[str], probe: Callable[[], torch.Tensor]
    ) -> None:
        self._modules = dict(model.named_modules())
        order, calls = self._trace(probe)
        self._answered = [self._finished_before(point, order, calls) for point in points]
        self._recorded = sorted(set().union(*self._answered))
        self.exact = self._probe_is_exact(probe)

    def _trace(self, probe: Callable[[], Any]) -> tuple[list[tuple[str, str]], dict[str, int]]:
        order: list[tuple[str, str]] = []
        calls: dict[str, int] = {}

        def began(path: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                order.append(("began", path))
                calls[path] = calls.get(path, 0) + 1

            return hook

        def ended(path: str) -> Callable[..., None]:
            return lambda *_: order.append(("ended", path))

        handles = []
        for path, module in self._modules.items():
            handles.append(module.register_forward_pre_hook(began(path)))
            handles.append(module.register_forward_hook(ended(path)))
        try:
            probe()
        finally:
            for handle in handles:
                handle.remove()
        return order, calls

    @staticmethod
    def _finished_before(
        point: str, order: list[tuple[str, str]], calls: dict[str, int]
    ) -> frozenset[str]:
        ancestors = {point[:i] for i, c in enumerate(point) if c == "."} | {""}
        finished = set()
        for event, path in order:
            if (event, path) == ("began", point):
                break
            parent = path.rpartition(".")[0]
            if event == "ended" and path and parent in ancestors and calls[path] == 1:
                finished.add(path)
        return frozenset(finished)

    def _probe_is_exact(self, probe: Callable[[], torch.Tensor]) -> bool:
        """Compare a resumed forward with a whole one, bit by bit, at every point."""
        with self.record() as recording:
            whole = probe()
        for point in range(len(self._answered)):
            with self.resume(recording, point):
                if not torch.equal(whole, probe()):
                    return False
        return True

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Keep what the modules return in the one forward run inside the block."""
        recording = Recording({})

        def keep(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                recording.outputs[path] = output

            return hook

        handles = [
            self._modules[path].register_forward_hook(keep(path)) for path in self._recorded
        ]
        try:
            yield recording
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def resume(self, recording: Recording, point: int) -> Iterator[None]:
        """Let the recording answer for all that comes before a point, while the block lasts.

        Args:
            recording: Outputs of a forward on the same input.
            point: Index of the resume point.
        """
        paths = self._answered[point]
        modules = [self._modules[path] for path in paths]
        answers = [_constant(recording.outputs[path]) for path in paths]
        with overridden(modules, "forward", answers):
            yield


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value
