"""The experts of a family outside the interface, in the form of those inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dmpq.experts import FORWARD, Source, Sources, dispatch, stacked_sources


class StackedExperts(nn.Module):
    """All experts of one container as 3-D parameters, with the interface's flags.

    It is no part of the model: the model's own modules keep the weights, and share their memory
    with these where their shapes allow it. Device and dtype are those of when it was made.

    Args:
        up: Gate and up weights (E, out, in), or up weights alone; (E, in, out) where transposed.
        down: Down weights, likewise.
        act_fn: The activation.
        gated: Whether ``up`` holds a gate before the up projection.
        transposed: Whether weights are (in, out).
        scales_input: Whether the routing weight multiplies the input, not the output.
        sources: Where the model's own parameters hold each expert; by default under the names
            of the interface.
    """

    has_bias = False

    def __init__(
        self,
        up: torch.Tensor,
        down: torch.Tensor,
        *,
        act_fn: Any,
        gated: bool,
        transposed: bool = False,
        scales_input: bool = False,
        sources: Sources | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = len(down)
        self.act_fn = act_fn
        self.has_gate = gated
        self.is_transposed = transposed
        self.scales_input = scales_input
        self._is_expert_parallel = False
        self.has_post_expert_norm = False
        self.sources = sources or stacked_sources(self)
        for key, tensor in (("gate_up_proj" if gated else "up_proj", up), ("down_proj", down)):
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: torch.Tensor = self.act_fn(gate) * up
        return activated

    def run_packed(self, child: str, packed: nn.Module, run: Callable[..., torch.Tensor]) -> None:
        """Give up the weights here, and run on packed ones from now on.

        Args:
            child: Name to keep them under.
            packed: What the model keeps in place of its own weights.
            run: Runs them; of the interface's signature.
        """
        for name in ("gate_up_proj" if self.has_gate else "up_proj", "down_proj"):
            delattr(self, name)
        self.add_module(child, packed)
        vars(self)[FORWARD] = run

    def family_forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run by the arguments that the model's own experts module is called with.

        Here those of the interface: hidden (T, H), experts (T, K) and weights (T, K). A family
        whose module takes others says so in a class of its own.
        """
        return dispatch(self, *inputs)


def sources_apart(experts: Mapping[str, nn.Module], up: str, down: str) -> Sources:
    """Return the sources of experts that are modules of their own, of two linear layers each.

    Args:
        experts: By name inside the container, in order.
        up: Name of the first layer.
        down: Of the second.
    """

    def source(name: str, layer: str) -> Source:
        rows = len(experts[name].get_parameter(f"{layer}.weight"))
        return Source(((f"{name}.{layer}.weight", 0, rows),), False)

    return tuple((source(name, up), source(name, down)) for name in experts)


def stack(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return parameters of one shape stacked, and let each of them be a part of the result."""
    stacked = torch.stack([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, stacked, strict=True):
        parameter.data = part
    return stacked
