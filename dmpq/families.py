"""Which families can be quantized: how their experts are found, how they load, who is refused."""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from dmpq.adapters import adaptable, adapted_containers
from dmpq.errors import InputError
from dmpq.experts import Experts, interface_containers, router_of
from dmpq.hf_config import EXPERT_COUNTS
from dmpq.installed import REFUSED
from dmpq.upcycled import MODEL_TYPE as UPCYCLED

AUTO_CLASSES: Final = (
    "AutoModelForCausalLM",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForTokenClassification",
)
"""What may load a checkpoint, the first that knows its family."""
_UPCYCLED_TOO: Final = (
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForQuestionAnswering",
)
"""What loads upcycled models beside them, where it wrote them."""


def find_containers(model: PreTrainedModel) -> tuple[Experts, ...]:
    """Return the containers of routed experts of a model, in the order of its modules."""
    return tuple(interface_containers(model) or adapted_containers(model))


def routers_of(model: PreTrainedModel) -> dict[str, torch.Tensor | None]:
    """Return the router's weight (E, hidden) beside each container, by the container's path.

    ``None`` where it is no single matrix in the usual place. No adapter is put into the model:
    experts that one runs have no gradient.
    """
    inside = {experts.path: experts.router for experts in interface_containers(model)}
    return inside or {
        path: router_of(model, path, module.num_experts) for path, module in adaptable(model)
    }


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads and builds models of a config.

    The one that a checkpoint was written by, where its config names it; else a family with a
    text-only form is taken in that form, and others with their vision or audio parts.
    """
    names = AUTO_CLASSES + (_UPCYCLED_TOO if config.model_type == UPCYCLED else ())
    kinds = [getattr(transformers, name) for name in names]
    able = [kind for kind in kinds if type(config) in kind._model_mapping]
    written_by = config.architectures or ()
    named = (kind for kind in able if kind._model_mapping[type(config)].__name__ in written_by)
    return next(named, able[0] if able else kinds[0])


def refusal(model_type: str, name: str) -> InputError | None:
    """Return why no model of a family is taken, or ``None`` where some may be."""
    family = model_type_to_module_name(model_type)
    if family not in REFUSED:
        return None
    return InputError(
        f"{name} is a Mixture-of-Experts model of family {family!r}, which is not supported: "
        f"{REFUSED[family]}; use another family (python -m dmpq.models list)."
    )


def no_experts(model: PreTrainedModel, name: str) -> InputError:
    """Return the error for a model in which no experts were found."""
    config = model.config.get_text_config().to_dict()
    family = model.config.model_type
    if any((config.get(key) or 0) > 1 for key in EXPERT_COUNTS):
        return InputError(
            f"{name} is a Mixture-of-Experts model of family {family!r}, which keeps its experts "
            "outside transformers' experts interface, so their widths cannot be set; use a family "
            "inside it, such as olmoe, mixtral, qwen3_moe or deepseek_v3."
        )
    return InputError(
        f"{name} is a dense model (family {family!r}): it has no experts to give bits to; "
        "use a Mixture-of-Experts model."
    )
