"""The routed experts of one MoE layer, whatever the family, and how to run them on other weights.

The decorator of transformers' experts interface leaves flags on each experts module
(``is_transposed``, ``has_gate``, ``has_bias``...). They are all that is read here, so that no
family of the interface needs code of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from dmpq.spec import MoELayer

IMPLEMENTATION: Final = "dmpq"
FORWARD: Final = "_dmpq_forward"
"""Name of the instance attribute that holds the function an experts module runs by."""
_FLAGS: Final = frozenset({"is_transposed", "has_gate", "has_bias", "num_experts"})


@dataclass(frozen=True)
class Source:
    """Where a model keeps one matrix of one expert: rows of its own parameters, on end.

    Attributes:
        rows: A parameter's name inside the container, the first row of its first dimension, and
            the row after the last.
        transposed: Whether these rows make (in, out).
    """

    rows: tuple[tuple[str, int, int], ...]
    transposed: bool

    def assembled(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the matrix (out, in) that these rows make, each given with its dimensions."""
        matrix = torch.cat([part.flatten(0, -2) for part in parts])
        return matrix.mT if self.transposed else matrix


Sources = tuple[tuple[Source, Source], ...]
"""By expert: where its gate+up stands, and where its down."""


@dataclass(frozen=True, eq=False)
class Experts:
    """All routed experts of one MoE layer.

    Attributes:
        path: Module path of the container.
        module: The container, holding the experts' weights as 3-D parameters.
        router: The router's weight (E, hidden), where the family keeps one in the usual place.
        sources: Where the model's own parameters hold each expert; empty where nobody asks.
    """

    path: str
    module: nn.Module
    router: torch.Tensor | None
    sources: Sources = ()

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.down.shape[0]

    @property
    def decodes(self) -> bool:
        """Whether it stands in a decoder, by its path, which tells only of encoder-decoders."""
        return "decoder" in self.path.split(".")

    @property
    def _up_name(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def gate_up(self) -> torch.Tensor:
        """Gate and up weights, or up alone, (E, out, in)."""
        return self.oriented(getattr(self.module, self._up_name))

    @property
    def down(self) -> torch.Tensor:
        """Down weights, (E, out, in)."""
        return self.oriented(self.module.down_proj)

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Gate and up weights, or up alone, and down weights, as the module holds them."""
        return getattr(self.module, self._up_name), self.module.down_proj  # type: ignore[return-value]

    def own_parameters(self, *sides: int) -> list[str]:
        """Return the paths of the model's parameters that hold the experts.

        Args:
            sides: 0 for those that hold gate+up, 1 for those that hold down; both by default.
        """
        return [
            f"{self.path}.{name}"
            for side in sides or (0, 1)
            for name in dict.fromkeys(
                name for pair in self.sources for name, _, _ in pair[side].rows
            )
        ]

    def put(self, model: nn.Module, expert: int, side: int, matrix: torch.Tensor) -> None:
        """Write one expert's matrix into the model's own parameters.

        An adapter may keep its experts as a copy, which is left as it is.

        Args:
            model: The model of the container.
            expert: Index of the expert.
            side: 0 for gate+up, 1 for down.
            matrix: (out, in).
        """
        source = self.sources[expert][side]
        own = [
            model.get_parameter(f"{self.path}.{name}").data[start:stop].flatten(0, -2)
            for name, start, stop in source.rows
        ]
        rows = matrix.mT if source.transposed else matrix
        for part, values in zip(own, rows.split([len(part) for part in own]), strict=True):
            part.copy_(values)

    def geometry(self, layer: MoELayer | None = None) -> MoELayer:
        """Return the layer's geometry, its shapes read off the weights.

        Args:
            layer: What the configuration says of it; ``None`` to leave the router's choices at 1.
        """
        hidden, intermediate = self.down.shape[1:]
        known = layer or MoELayer(self.path, self.num_experts, 1, hidden, intermediate)
        return replace(
            known,
            num_experts=self.num_experts,
            hidden_size=hidden,
            intermediate_size=intermediate,
            gated=bool(self.module.has_gate),
        )

    def oriented(self, weight: Any) -> torch.Tensor:
        """Swap the last two dimensions where the family stores (in, out)."""
        oriented: torch.Tensor = weight.data.mT if self.module.is_transposed else weight.data
        return oriented

    def laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        """Return weights (..., out, in) in the family's own memory order.

        Matrix products round differently on the other order, and full precision must stay the
        model's own to the bit.
        """
        return weight.mT.contiguous().mT if self.module.is_transposed else weight.contiguous()

    def stacked(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        copies: int = 1,
        only: int | Sequence[int] | None = None,
        gaps: bool = False,
    ) -> SimpleNamespace:
        """Return what the interface's forward reads, over other weights.

        Args:
            gate_up: (E * copies, out, in); the copies of an expert stand together.
            down: (E * copies, out, in).
            copies: Virtual experts per expert.
            only: Index of the one expert that the weights belong to (E = 1), or of several;
                ``None`` for all.
            gaps: Whether the index ``E * copies`` stands for no expert: nothing is computed for
                it, and it adds zeros. The interface means an expert on another device by it.
        """
        module = self.module
        view = {
            "num_experts": len(down),
            self._up_name: gate_up.mT if module.is_transposed else gate_up,
            "down_proj": down.mT if module.is_transposed else down,
            "_apply_gate": module._apply_gate,
            "_is_expert_parallel": gaps,
            **{flag: getattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed")},
            "scales_input": vars(module).get("scales_input", False),
            "has_post_expert_norm": getattr(module, "has_post_expert_norm", False),
        }
        if not module.has_gate:
            view["act_fn"] = module.act_fn
        if module.has_bias:
            for name in (f"{self._up_name}_bias", "down_proj_bias"):
                bias = getattr(module, name)
                if only is not None:
                    bias = bias[[only] if isinstance(only, int) else list(only)]
                view[name] = bias.repeat_interleave(copies, 0)
        if view["has_post_expert_norm"]:
            view["post_expert_norm"] = module.post_expert_norm
        return SimpleNamespace(**view)


def run_stacked(
    view: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run transformers' ``grouped_mm`` experts, as the model itself does by default.

    Where a family scales an expert's input, the weights scale the input in place of the output.

    Args:
        view: What the forward reads: an experts module, or what stands in its place.
        hidden: (T, H).
        index: int64 (T, K), virtual experts.
        weights: (T, K), routing weights.

    Returns:
        (T, H).
    """
    if not vars(view).get("scales_input"):
        return grouped_mm_experts_forward(view, hidden, index, weights)
    scaled = (hidden[:, None] * weights[..., None]).flatten(0, 1)
    ones = torch.ones_like(weights).view(-1, 1)
    apart = grouped_mm_experts_forward(view, scaled, index.reshape(-1, 1), ones)
    return apart.view(*index.shape, -1).sum(1)


def dispatch(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run an experts module by the function attached to it, else as the model would."""
    forward = vars(module).get(FORWARD, run_stacked)
    result: torch.Tensor = forward(module, hidden, index, weights)
    return result


ExpertsInterface.register(IMPLEMENTATION, dispatch)


def interface_containers(model: nn.Module) -> list[Experts]:
    """Return the containers of a model that use the experts interface, in the order of modules."""
    return [
        Experts(path, module, router_of(model, path, module.num_experts), stacked_sources(module))
        for path, module in model.named_modules()
        if vars(module).keys() >= _FLAGS
    ]


def stacked_sources(module: Any) -> Sources:
    """Return the sources of experts that stand one upon the other in two 3-D parameters."""
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    up, down = (
        [Source(((name, e, e + 1),), module.is_transposed) for e in range(module.num_experts)]
        for name in names
    )
    return tuple(zip(up, down, strict=True))


def router_of(model: nn.Module, path: str, num_experts: Any) -> torch.Tensor | None:
    """Return the router's weight (E, hidden) of the container at a path, where it can be told."""
    parent = dict(model.get_submodule(path.rpartition(".")[0]).named_children())
    for router in (parent[name] for name in ("gate", "router") if name in parent):
        for _, weight in router.named_parameters():
            if weight.ndim == 2 and len(weight) == num_experts:
                return weight
    return None
