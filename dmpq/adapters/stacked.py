"""The experts of a family outside the interface, in the form of those inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dmpq.experts import dispatch


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
        biases: (E, out) of up and of down, where the family has them.
        scales_input: Whether the routing weight multiplies the input, not the output.
    """

    def __init__(
        self,
        up: torch.Tensor,
        down: torch.Tensor,
        *,
        act_fn: Any,
        gated: bool,
        transposed: bool = False,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        scales_input: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = len(down)
        self.act_fn = act_fn
        self.has_gate = gated
        self.has_bias = biases is not None
        self.is_transposed = transposed
        self.scales_input = scales_input
        self._is_expert_parallel = False
        self.has_post_expert_norm = False
        name = "gate_up_proj" if gated else "up_proj"
        tensors = {name: up, "down_proj": down}
        if biases is not None:
            tensors |= {f"{name}_bias": biases[0], "down_proj_bias": biases[1]}
        for key, tensor in tensors.items():
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: torch.Tensor = self.act_fn(gate) * up
        return activated

    def family_forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run by the arguments that the model's own experts module is called with.

        Here those of the interface: hidden (T, H), experts (T, K) and weights (T, K). A family
        whose module takes others says so in a class of its own.
        """
        return dispatch(self, *inputs)


def stack(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return parameters of one shape stacked, and let each of them be a part of the result."""
    stacked = torch.stack([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, stacked, strict=True):
        parameter.data = part
    return stacked
