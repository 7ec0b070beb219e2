"""The state of a training, written and read without a pickle."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmpq.errors import InputError
from dmpq.training.state_files import load_state, random_state, save_state, set_random_state

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers()
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@given(tree=TREES)
def test_plain_values_come_back(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "x.safetensors"
    save_state(path, {"tree": tree})
    assert load_state(path) == {"tree": tree}


def test_an_optimizer_s_state_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "x", optimizer.state_dict())
    found = load_state(tmp_path / "x")
    assert found["param_groups"] == optimizer.state_dict()["param_groups"]
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(found["state"][number][name], value)
            assert found["state"][number][name].dtype == value.dtype
    optimizer.load_state_dict(found)


def test_random_numbers_go_on(tmp_path):
    save_state(tmp_path / "x", random_state())

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    first = drawn()
    assert drawn() != first
    set_random_state(load_state(tmp_path / "x"))
    assert drawn() == first


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle", "no tree"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "training.safetensors"
    save_state(path, {"a": torch.ones(100)})
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "pickle":
        torch.save({"a": 1}, path)
    else:
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"cannot go on from .*remove that folder"):
        load_state(path)


def test_what_no_file_can_hold_is_a_bug(tmp_path):
    with pytest.raises(TypeError, match="holds a set"):
        save_state(tmp_path / "x", {"a": {1, 2}})
