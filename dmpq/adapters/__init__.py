"""Families outside transformers' experts interface: one file each, and what finds their experts.

An adapter shows a family's experts in the interface's form (:class:`dmpq.adapters.stacked
.StackedExperts`), and gives each of the model's own experts modules a forward of its own, on the
instance, that runs them by the function attached to it. No class is changed. It also says which
rows of the model's own parameters are an expert's, so that checkpoints are read, packed and
written expert by expert as those of other families are.
"""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from dmpq.adapters import dbrx, llama4, nllb_moe, switch_transformers
from dmpq.adapters.stacked import StackedExperts
from dmpq.experts import Experts, router_of

_ADAPTERS: Final[dict[str, Any]] = {
    "DbrxExperts": dbrx.adapt,
    "Llama4TextExperts": llama4.adapt,
    "NllbMoeExperts": nllb_moe.adapt,
    "SwitchTransformersExperts": switch_transformers.adapt,
}
"""By the class that holds a family's experts, what makes :class:`StackedExperts` of one."""


def adaptable(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the experts modules of families outside the interface, by path, as they are."""
    return [item for item in model.named_modules() if type(item[1]).__name__ in _ADAPTERS]


def adapted_containers(model: nn.Module) -> list[Experts]:
    """Return the containers of families outside the interface, in the order of modules.

    A model may be adapted once more: its experts are then those of the first time.
    """
    found = []
    for path, module in adaptable(model):
        attached = getattr(vars(module).get("forward"), "__self__", None)
        if not isinstance(attached, StackedExperts):
            attached = _ADAPTERS[type(module).__name__](model, path)
            vars(module)["forward"] = attached.family_forward
        router = router_of(model, path, attached.num_experts)
        found.append(Experts(path, attached, router, attached.sources))
    return found
