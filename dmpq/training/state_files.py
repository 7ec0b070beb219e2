"""The state of a training on disk, in safetensors and JSON: no pickle is written, and none read.

transformers' ``Trainer`` keeps optimizer, scheduler, random numbers and loss scale by
``torch.save``; these functions keep the same states so that opening a checkpoint runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dmpq.errors import InputError, first_line

_TREE: Final = "tree"
_TENSOR: Final = "tensor"
_DIGEST: Final = "sha256"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers and texts as one safetensors file.

    Args:
        path: The file; it is replaced.
        state: Keys are texts or whole numbers, as in an optimizer's ``state_dict``.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _plain(state, tensors)
    held, text = tensors or {_TENSOR: torch.zeros(0)}, json.dumps(tree)
    save_file(held, path, metadata={_TREE: text, _DIGEST: _digest(held, text)})


def load_state(path: Path) -> Any:
    """Return what :func:`save_state` wrote.

    Raises:
        InputError: If the file is missing, damaged, or has been changed since.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told.get(_DIGEST) != _digest(tensors, told.get(_TREE, "")):
            raise ValueError("its bytes are not those that were written")
        return _whole(json.loads(told[_TREE]), tensors)
    except (OSError, SafetensorError, ValueError) as error:
        raise unusable(path.parent, f"{path.name}: {first_line(error)}") from error


def unusable(checkpoint: Path, reason: str) -> InputError:
    """Return the error for a checkpoint that a training cannot go on from."""
    return InputError(
        f"The training cannot go on from {checkpoint} ({reason}); remove that folder, and the "
        "same command begins from the start, or from the checkpoint before where one is left."
    )


def _digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """Return the SHA-256 of a state: safetensors' own checks end at the header."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON holds it, its tensors put aside under numbers."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(k, tensors), _plain(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(one, tensors) for one in value]}
    if isinstance(value, list):
        return [_plain(one, tensors) for one in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a training's state holds a {type(value).__name__}, which no file can hold")


def _whole(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Undo :func:`_plain`."""
    if isinstance(tree, list):
        return [_whole(one, tensors) for one in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == "tuple":
        return tuple(_whole(one, tensors) for one in content)
    return {_whole(key, tensors): _whole(value, tensors) for key, value in content}


def random_state() -> dict[str, Any]:
    """Return the state of the random numbers of Python, numpy, torch and its GPUs."""
    kind, words, *rest = np.random.get_state()  # noqa: NPY002  (what libraries draw from)
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.array(words, np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on with random numbers from where :func:`random_state` found them.

    Args:
        state: As saved; a GPU's is left out where there is none.
    """
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
