"""Safetensors files by offset: the library reads what is written, and the other way round."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from dmpq.checkpoints.tensor_files import (
    DTYPES,
    TensorFile,
    TensorFileWriter,
    TensorInfo,
    file_bytes,
)
from dmpq.errors import InputError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text("abcdefghij.0123", min_size=1, max_size=12),
    st.tuples(SHAPES, st.sampled_from(list(DTYPES.values()))),
    min_size=1,
    max_size=6,
)


def filled(shape, dtype):
    raw = torch.randint(0, 2, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@given(TENSORS)
@settings(max_examples=40, deadline=None)
def test_the_library_reads_what_is_written_row_by_row(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    values = {name: filled(*kind) for name, kind in tensors.items()}
    infos = {name: TensorInfo(v.dtype, tuple(v.shape)) for name, v in values.items()}
    with TensorFileWriter(path, infos, {"format": "pt"}) as writer:
        for name, tensor in values.items():
            if tensor.ndim and len(tensor):
                for row in reversed(range(len(tensor))):
                    writer.write(name, tensor[row : row + 1], row=row)
            else:
                writer.write(name, tensor)
    assert path.stat().st_size == file_bytes(infos, {"format": "pt"})
    found = load_file(path)
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@given(TENSORS)
@settings(max_examples=40, deadline=None)
def test_the_file_is_the_library_s_to_the_byte_where_asked(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("bytes")
    values = {name: filled(*kind) for name, kind in tensors.items()}
    infos = {name: TensorInfo(v.dtype, tuple(v.shape)) for name, v in values.items()}
    with TensorFileWriter(folder / "own", infos, {"format": "pt"}, as_library=True) as writer:
        for name, tensor in values.items():
            writer.write(name, tensor)
    save_file(values, folder / "library", metadata={"format": "pt"})
    assert (folder / "own").read_bytes() == (folder / "library").read_bytes()


@given(TENSORS)
@settings(max_examples=40, deadline=None)
def test_what_the_library_writes_is_read_whole_in_rows_and_in_pieces(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("read") / "model.safetensors"
    values = {name: filled(*kind) for name, kind in tensors.items()}
    save_file(values, path)
    file = TensorFile(path)
    assert file.tensors.keys() == values.keys()
    for name, tensor in values.items():
        assert torch.equal(file.read(name), tensor)
        if tensor.ndim and len(tensor) > 1:
            assert torch.equal(file.read(name, 1, len(tensor)), tensor[1:])
        pieces = list(file.chunks(name))
        own = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
        assert torch.equal(own, tensor.reshape(-1).view(torch.uint8))


def test_an_interrupted_file_is_gone_on_with(tmp_path):
    path = tmp_path / "model.safetensors"
    infos = {"a": TensorInfo(torch.float32, (2, 3)), "b": TensorInfo(torch.uint8, (5,))}
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(5, dtype=torch.uint8)
    with TensorFileWriter(path, infos, {}) as writer:
        writer.write("a", a)
    with TensorFileWriter(path, infos, {}) as writer:
        writer.write("b", b)
    found = load_file(path)
    assert torch.equal(found["a"], a)
    assert torch.equal(found["b"], b)


def test_another_type_than_announced_is_refused(tmp_path):
    infos = {"a": TensorInfo(torch.float32, (2,))}
    with (
        TensorFileWriter(tmp_path / "x.safetensors", infos, {}) as writer,
        pytest.raises(ValueError, match=r"a is torch.float32, not torch.float16"),
    ):
        writer.write("a", torch.zeros(2, dtype=torch.float16))


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_cut_file_is_refused(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="no whole safetensors file"):
        TensorFile(path)


def test_8_bit_floats_are_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(InputError, match="holds a as F8_E4M3"):
        TensorFile(path)
