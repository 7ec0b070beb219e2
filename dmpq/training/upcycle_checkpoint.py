"""A dense checkpoint on disk becomes one with experts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoConfig

from dmpq.errors import InputError, first_line
from dmpq.files import remove
from dmpq.moe import TextModel, check_weights, checkpoint_source, load_tokenizer
from dmpq.training.upcycle import upcycle

_AUTO_CLASSES: Final = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModel",
)
"""What a dense checkpoint may have been written by."""


def upcycle_checkpoint(
    name: str,
    folder: Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> None:
    """Write a dense checkpoint as one with experts, with its tokenizer.

    Args:
        name: A local folder, or a hub id.
        folder: Where to; it must not exist.
        revision: Of a hub model.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        say: Told what was made.
        options: Of :func:`dmpq.training.upcycle.upcycle`.

    Raises:
        InputError: If there is no such model, or it cannot be upcycled as asked.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; remove it, or give another --out.")
    dense, tokenizer = _dense(name, revision, trust_remote_code)
    sparse = upcycle(dense, **options)
    partial = folder.parent / f".{folder.name}.partial"
    remove(partial)
    sparse.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)
    before, after = (sum(one.numel() for one in model.parameters()) for model in (dense, sparse))
    say(
        f"  {type(dense).__name__} of {before:,} parameters -> {type(sparse).__name__} of "
        f"{after:,}\n  wrote {folder}"
    )


def _dense(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return a checkpoint by the class that it was written by, in its own type."""
    source, local = checkpoint_source(name, revision)
    options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": local,
        "trust_remote_code": trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.is_encoder_decoder:
            raise InputError(
                f"{name} is an encoder-decoder (family {config.model_type!r}); upcycle an encoder "
                "or a decoder."
            )
        kinds = [getattr(transformers, one) for one in _AUTO_CLASSES]
        able = [kind for kind in kinds if type(config) in kind._model_mapping]
        named = [
            kind
            for kind in able
            if kind._model_mapping[type(config)].__name__ in (config.architectures or ())
        ]
        loaded: Any = (named or able or kinds)[0].from_pretrained(
            source, dtype="auto", use_safetensors=True, output_loading_info=True, **options
        )
    except InputError:
        raise
    except Exception as error:  # a damaged checkpoint raises whatever its reader raises
        raise InputError(
            f"The checkpoint {name} cannot be read ({first_line(error)}); give a local folder "
            "written by save_pretrained, or a hub id with a network at hand."
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"The checkpoint {name} lacks {len(missing)} of its weights, among them {missing[0]}; "
            "complete it, or they would be random."
        )
    with torch.no_grad():
        check_weights(TextModel(model, name=name))
    return model, load_tokenizer(name, source, options)
