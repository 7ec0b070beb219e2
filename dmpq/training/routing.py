"""The routers of a model in training: float32 logits, and the losses that balance them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from dmpq.errors import InputError
from dmpq.families import routers_of
from dmpq.overrides import overridden

Mask = torch.Tensor | Sequence[torch.Tensor] | None
"""Which tokens count: one mask for all layers, or one per layer; ``None`` for all tokens.

A mask holds as many values as a layer has tokens, in any shape, such as an attention mask's
(sequences, length); tokens at 0 or ``False`` are padding.
"""


@dataclass(frozen=True, eq=False)
class _Router:
    """One layer's router.

    Attributes:
        whole: The module beside the experts that makes logits into a selection.
        owner: That module, or the part of it that holds the weight: what reads the tokens.
        weight: (E, hidden).
    """

    whole: nn.Module
    owner: nn.Module
    weight: torch.Tensor

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (tokens, E) of what the router reads, whatever autocast says."""
        bias = dict(self.owner.named_parameters(recurse=False)).get("bias")
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(
                hidden.reshape(-1, hidden.shape[-1]).float(),
                self.weight.float(),
                None if bias is None else bias.float(),
            )

    def in_float32(self) -> Callable[..., Any]:
        """Return the module's forward, outside autocast and on float32 inputs."""
        forward = self.whole.forward

        def outside_autocast(*inputs: Any, **named: Any) -> Any:
            given = [one for one in (*inputs, *named.values()) if _is_floating(one)]
            device = given[0].device.type if given else self.weight.device.type
            with torch.autocast(device, enabled=False):
                return forward(
                    *(one.float() if _is_floating(one) else one for one in inputs),
                    **{k: one.float() if _is_floating(one) else one for k, one in named.items()},
                )

        return outside_autocast


class Routers:
    """The routers of all MoE layers of a model, of any supported family.

    Attributes:
        paths: Paths of the containers of experts whose routers are watched, in the model's order.
        unwatched: Paths of those whose router is no single matrix in the usual place.

    Args:
        model: The model; it is left as it is outside the blocks below.

    Raises:
        InputError: If no router is found at all.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found = {path: _router(model, path, one) for path, one in routers_of(model).items()}
        watched = {path: router for path, router in found.items() if router is not None}
        self.paths = tuple(watched)
        self.unwatched = tuple(path for path in found if path not in watched)
        self._routers = tuple(watched.values())
        if not watched:
            raise InputError(
                f"The model of family {model.config.model_type!r} has no router that can be "
                f"watched ({len(found)} containers of experts); use a Mixture-of-Experts model "
                "whose router is one matrix beside its experts."
            )

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """Yield a list that each router's logits are added to as it runs.

        One forward adds one tensor per layer, fp32 (tokens, E), in the order in which layers run;
        each is computed anew from what the router reads, so that it is in float32 under autocast
        too, and has a gradient wherever one is being recorded. Scores that a family adds for the
        selection alone (DeepSeek-V3's correction) are not in it.

        Where a backward recomputes a forward (gradient checkpointing), it adds its logits once
        more: compute losses before it, and open another block for the next step.
        """
        logits: list[torch.Tensor] = []

        def recording(router: _Router) -> Callable[..., None]:
            def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                read = next(one for one in (*inputs, *named.values()) if _is_floating(one))
                logits.append(router.logits(read))

            return note

        with ExitStack() as hooks:
            for router in self._routers:
                hook = router.owner.register_forward_pre_hook(recording(router), with_kwargs=True)
                hooks.callback(hook.remove)
            yield logits

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Run the routers outside autocast, on inputs cast to float32, while the block lasts.

        A selection by rounded logits is another selection: routers stay in float32 (Switch
        Transformers, arXiv 2101.03961, section 2.4).

        Raises:
            InputError: If a router's own weights are not float32.
        """
        for path, router in zip(self.paths, self._routers, strict=True):
            for name, parameter in router.whole.named_parameters():
                if parameter.dtype != torch.float32:
                    raise InputError(
                        f"The router's {name} beside {path} is {parameter.dtype}, and routers in "
                        "float32 need master weights in torch.float32; load the model with "
                        "dtype=torch.float32."
                    )
        forwards = [router.in_float32() for router in self._routers]
        with overridden([router.whole for router in self._routers], "forward", forwards):
            yield


def _router(model: nn.Module, path: str, weight: torch.Tensor | None) -> _Router | None:
    """Return the router beside the container at a path, ``None`` where it is no single matrix."""
    if weight is None:
        return None
    return next(
        _Router(whole, owner, weight)
        for whole in model.get_submodule(path.rpartition(".")[0]).children()
        for owner in whole.modules()
        if any(one is weight for one in owner.parameters(recurse=False))
    )


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def balance_loss(logits: Sequence[torch.Tensor], top_k: int, *, mask: Mask = None) -> torch.Tensor:
    """Return the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6).

    Per layer ``E * sum_e f_e * P_e``, and the mean over layers: ``f_e`` is expert e's share of the
    top-k selections, so that these sum to 1 for every k (transformers' own sums to k), and ``P_e``
    its mean probability. It is 1 where either is uniform, E where one expert takes all that it
    can at k = 1, and its gradient pushes probability away from experts that are chosen often.
    Layers are not pooled before the product: one's favourites would hide another's.

    Args:
        logits: Of each layer, (tokens, E), as :meth:`Routers.recording` fills in.
        top_k: Experts that each token selects.
        mask: Which tokens count.

    Returns:
        fp32 scalar; 0 where no token counts.

    Raises:
        InputError: If there are no logits, fewer experts than choices, or a mask of other tokens.
    """
    losses = []
    for layer, counted in _layers(logits, mask):
        counts = _counts(layer, top_k, counted).float()
        share = counts / counts.sum().clamp_min(1)
        probability = layer.float().softmax(-1)
        mean = (probability * counted[:, None]).sum(0) / counted.sum().clamp_min(1)
        losses.append(layer.shape[-1] * (share * mean).sum())
    return torch.stack(losses).mean()


def z_loss(logits: Sequence[torch.Tensor], *, mask: Mask = None) -> torch.Tensor:
    """Return the router z-loss of ST-MoE (arXiv 2202.08906, eq. 5).

    Per layer the mean over tokens of ``logsumexp(logits) ** 2``, and the mean over layers: it
    keeps logits small, where rounding them matters least.

    Args:
        logits: Of each layer, (tokens, E).
        mask: Which tokens count.

    Returns:
        fp32 scalar; 0 where no token counts.

    Raises:
        InputError: If there are no logits, or a mask is of other tokens.
    """
    losses = [
        (layer.float().logsumexp(-1).square() * counted).sum() / counted.sum().clamp_min(1)
        for layer, counted in _layers(logits, mask)
    ]
    return torch.stack(losses).mean()


def utilisation(logits: Sequence[torch.Tensor], top_k: int, mask: Mask = None) -> torch.Tensor:
    """Return how often each expert is among the k of highest logits.

    Args:
        logits: Of each layer, (tokens, E).
        top_k: Experts that each token selects.
        mask: Which tokens count.

    Returns:
        int64 (layers, E).

    Raises:
        InputError: If there are no logits, fewer experts than choices, a mask is of other tokens,
            or layers differ in their number of experts.
    """
    if len({layer.shape[-1] for layer in logits}) > 1:
        raise InputError(
            f"Layers have {', '.join(str(layer.shape[-1]) for layer in logits)} experts, which "
            "make no table; ask for the utilisation of layers of one size at a time."
        )
    rows = [_counts(layer, top_k, counted) for layer, counted in _layers(logits, mask)]
    return torch.stack(rows)


def _layers(
    logits: Sequence[torch.Tensor], mask: Mask
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each layer's logits (T, E), and 1.0 or 0.0 for each token that counts or not, (T,)."""
    if not logits:
        raise InputError(
            "There are no router logits; run the model's forward inside Routers.recording first."
        )
    masks = [mask] * len(logits) if mask is None or isinstance(mask, torch.Tensor) else list(mask)
    if len(masks) != len(logits):
        raise InputError(
            f"There are {len(masks)} masks for {len(logits)} layers; give one per layer, or one "
            "tensor for all."
        )
    for layer, one in zip(logits, masks, strict=True):
        if one is None:
            yield layer, layer.new_ones(len(layer), dtype=torch.float32)
        elif one.numel() != len(layer):
            raise InputError(
                f"The mask is of {one.numel()} tokens, and the router read {len(layer)}; give one "
                "value per token, as in the attention mask of the same batch."
            )
        else:
            yield layer, one.reshape(-1).ne(0).to(layer.device, torch.float32)


def _counts(layer: torch.Tensor, top_k: int, counted: torch.Tensor) -> torch.Tensor:
    """Return how many counted tokens select each expert, int64 (E,)."""
    experts = layer.shape[-1]
    if not 1 <= top_k <= experts:
        raise InputError(
            f"top_k is {top_k} of {experts} experts; give a number from 1 to {experts}."
        )
    chosen = layer.detach().topk(top_k, dim=-1).indices[counted.bool()]
    return torch.bincount(chosen.flatten(), minlength=experts)
