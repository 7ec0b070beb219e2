"""A model larger than memory: weights are on the CPU while a module runs, experts one by one.

The model stands on the meta device. Hooks put a decoder layer's weights in place before it runs
and take them away afterwards, and so they do for every module outside the layers; experts are read
inside their container's forward. Decoder layers are checkpointed, so that a backward pass runs
each of them again and reads its weights again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dmpq.adapters.stacked import StackedExperts
from dmpq.checkpoints.checkpoint import SIDES, Checkpoint
from dmpq.errors import InputError
from dmpq.experts import Experts, run_stacked
from dmpq.overrides import overridden


class Recorder(Protocol):
    """Keeps what containers, by number, read and gave, so that none is run again on the same.

    Tensors are hidden (T, H), index and weights (T, K), output (T, H), and gradients of them.
    """

    def output(
        self, number: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, /
    ) -> torch.Tensor | None:
        """Return what a container gave when it read this very input; ``None`` if never."""

    def gave(
        self,
        number: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        /,
    ) -> None:
        """Keep what a container read and gave."""

    def slopes(
        self,
        number: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        /,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return gradients of hidden and weights, where this input's output had this gradient."""

    def blamed(
        self,
        number: int,
        gradient: torch.Tensor,
        to_hidden: torch.Tensor,
        to_weights: torch.Tensor,
        /,
    ) -> None:
        """Keep the gradient of a container's output, and those of its hidden and weights."""


_META: Final = torch.device("meta")
_Own = tuple[nn.Module, str, nn.Parameter]
"""A module, and one of its parameters by name, as it stands on the meta device."""


class StreamedModel:
    """The model of a checkpoint, run without being loaded.

    Args:
        source: The checkpoint.
        dtype: What is computed in.

    Raises:
        InputError: If the model keeps tensors that no checkpoint holds and no rule makes, or its
            experts stand outside transformers' experts interface.
    """

    def __init__(self, source: Checkpoint, *, dtype: torch.dtype = torch.float32) -> None:
        if any(isinstance(one.module, StackedExperts) for one in source.moe.containers):
            raise InputError(
                f"{source.name} is of family {source.moe.spec.model_type!r}, whose experts stand "
                "outside transformers' experts interface; such a model cannot be streamed: load "
                "it whole (python -m dmpq.search)."
            )
        self.source = source
        self.dtype = dtype
        self.model = source.moe.model
        self._names = _canonical_names(self.model)
        self._resident: set[int] = set()
        self._keep_small_tensors()
        self._make_buffers()

    def _keep_small_tensors(self) -> None:
        """Load what experts keep beside their matrices, and the buffers that checkpoints hold."""
        for experts in self.source.moe.containers:
            module = experts.module
            weights = experts.parameters
            for name, parameter in module.named_parameters(recurse=False):
                if not any(parameter is one for one in weights):
                    self._put(module, name, parameter)
            self._resident.add(id(module))
        persistent = self.model.state_dict().keys()
        for path, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                full = f"{path}.{name}".removeprefix(".")
                if full in persistent:
                    module._buffers[name] = self.source.parameter(full).to(buffer.dtype)

    def _make_buffers(self) -> None:
        """Compute what no checkpoint holds, such as rotary frequencies."""
        for path, module in self.model.named_modules():
            made = [name for name, b in module.named_buffers(recurse=False) if b.device == _META]
            for name in made:
                buffer = module._buffers[name]
                assert buffer is not None
                module._buffers[name] = torch.full_like(buffer, -1, device="cpu")
            if not made:
                continue
            self.model._init_weights(module)
            for name in made:
                values = module._buffers[name]
                assert values is not None
                if values.numel() and bool((values == -1).all()):
                    raise InputError(
                        f"{self.source.name} keeps {path}.{name}, which no checkpoint holds and "
                        "no rule makes; such a model cannot be streamed: load it whole."
                    )

    def _put(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Give a module one of its own parameters."""
        stored = self.source.parameter(self._names[id(parameter)])
        # Rows of an embedding are cast when they are looked up: the table is the largest tensor.
        kept = isinstance(module, nn.Embedding) or not stored.is_floating_point()
        values = stored if kept else stored.to(self.dtype)
        module._parameters[name] = nn.Parameter(values, requires_grad=False)

    @contextmanager
    def streaming(self, record: Recorder | None = None) -> Iterator[None]:
        """Run the model from its checkpoint while the block lasts.

        An embedding inside a decoder layer gives its own type; one outside gives the computing
        type.

        Args:
            record: Keeps what each container saw, and is asked before one is run.
        """
        containers = self.source.moe.containers
        forwards = [_StreamedExperts(self, i, c, record) for i, c in enumerate(containers)]
        layers = _decoder_layers(self.model, containers)
        inside = {id(module) for layer in layers for module in layer.modules()}
        with ExitStack() as stack:
            for module in self.model.modules():
                own = [] if id(module) in inside else self._parameters_of([module])
                if own:
                    stack.callback(module.register_forward_pre_hook(self._putting(own)).remove)
                    take = module.register_forward_hook(self._taking(own), always_call=True)
                    stack.callback(take.remove)
            stack.enter_context(self.source.moe.experts_forward(forwards))
            runs = [_checkpointed(self._with_weights(layer)) for layer in layers]
            stack.enter_context(overridden(layers, "forward", runs))
            stack.enter_context(set_checkpoint_early_stop(False))
            yield

    def _parameters_of(self, holders: Iterable[nn.Module]) -> list[_Own]:
        """Return what modules hold, but for the experts' containers."""
        return [
            (holder, name, parameter)
            for holder in holders
            if id(holder) not in self._resident
            for name, parameter in holder._parameters.items()
            if parameter is not None
        ]

    def _putting(self, own: Sequence[_Own]) -> Callable[..., None]:
        def put(*_: Any) -> None:
            for holder, name, parameter in own:
                self._put(holder, name, parameter)

        return put

    def _taking(self, own: Sequence[_Own]) -> Callable[..., Any]:
        def take(module: nn.Module, _inputs: Any, output: Any) -> Any:
            for holder, name, parameter in own:
                holder._parameters[name] = parameter
            return output.to(self.dtype) if isinstance(module, nn.Embedding) else output

        return take

    def _with_weights(self, layer: nn.Module) -> Callable[..., Any]:
        """Return a layer's forward that has its weights; hooks would not run in a second pass."""
        own = self._parameters_of(layer.modules())  # some are read by modules they are not of
        put, forward = self._putting(own), layer.forward

        def run(*inputs: Any, **options: Any) -> Any:
            put()
            try:
                return forward(*inputs, **options)
            finally:
                for holder, name, parameter in own:
                    holder._parameters[name] = parameter

        return run

    def expert(self, experts: Experts, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's gate+up and down weights, (out, in), in the computing type."""
        up, down = (self.source.expert(experts, side, index).to(self.dtype) for side in SIDES)
        return up, down


class _StreamedExperts:
    """A container's forward, and its backward, over experts that are read one by one."""

    def __init__(
        self, model: StreamedModel, number: int, experts: Experts, record: Recorder | None
    ) -> None:
        self._model, self.number, self._experts = model, number, experts
        self.record = record

    def __call__(
        self, _module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer; the signature of the experts interface."""
        run: Any = _Streamed.apply
        output: torch.Tensor = run(hidden, weights, index, self)
        return output

    def lots(self, index: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
        """Yield, for each expert that is selected: tokens, their slots, and the expert."""
        for expert in index.unique().tolist():
            tokens, slots = torch.where(index == expert)
            yield tokens, slots, self._run_of(expert)

    def _run_of(self, expert: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        up, down = self._model.expert(self._experts, expert)
        view = self._experts.stacked(
            self._experts.laid_out(up[None]), self._experts.laid_out(down[None]), only=expert
        )

        def run(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            index = torch.zeros(len(hidden), 1, dtype=torch.int64)
            return run_stacked(view, hidden, index, weight[:, None])

        return run


class _Streamed(torch.autograd.Function):
    """Routed experts whose weights no graph holds: the backward pass reads them again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        owner: _StreamedExperts,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weights, index)
        ctx.owner = owner
        record = owner.record
        kept = None if record is None else record.output(owner.number, hidden, index, weights)
        if kept is not None:
            return kept
        output = torch.zeros_like(hidden)
        for tokens, slots, run in owner.lots(index):
            output.index_add_(0, tokens, run(hidden[tokens], weights[tokens, slots]))
        if record is not None:
            record.gave(owner.number, hidden, index, weights, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        hidden, weights, index = ctx.saved_tensors
        (gradient,) = gradients
        number, record = ctx.owner.number, ctx.owner.record
        kept = None if record is None else record.slopes(number, hidden, index, weights, gradient)
        if kept is not None:
            return *kept, None, None
        to_hidden, to_weights = torch.zeros_like(hidden), torch.zeros_like(weights)
        for tokens, slots, run in ctx.owner.lots(index):
            own = hidden[tokens].detach().requires_grad_()
            weight = weights[tokens, slots].detach().requires_grad_()
            with torch.enable_grad():
                output = run(own, weight)
            found = torch.autograd.grad(output, (own, weight), gradient[tokens])
            to_hidden.index_add_(0, tokens, found[0])
            to_weights[tokens, slots] = found[1]
        if record is not None:
            record.blamed(number, gradient, to_hidden, to_weights)
        return to_hidden, to_weights, None, None


def _canonical_names(model: nn.Module) -> dict[int, str]:
    """Return each parameter's first name: tied ones have several."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _decoder_layers(model: nn.Module, containers: Sequence[Experts]) -> list[nn.Module]:
    """Return all layers of the stacks that hold experts."""
    stacks: dict[int, nn.ModuleList] = {}
    for experts in containers:
        parts = experts.path.split(".")
        for end in range(1, len(parts)):
            module = model.get_submodule(".".join(parts[:end]))
            if isinstance(module, nn.ModuleList):
                stacks[id(module)] = module
                break
    return [layer for stack in stacks.values() for layer in stack]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run
