import os
import stat

import numpy as np
import pytest
from safetensors.numpy import load

from dmpq.errors import InputError
from dmpq.files import JsonLines, replace_atomically, safetensors_bytes


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    target = tmp_path / "map.json"
    replace_atomically(target, b"old")

    def broken(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        replace_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["map.json"]


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, where the user is root
    with pytest.raises(InputError, match="is no ordinary file"):
        replace_atomically(tmp_path / "pipe", b"{}")
    assert (tmp_path / "pipe").is_fifo()
    assert [f.name for f in tmp_path.iterdir()] == ["pipe"]


def test_files_are_readable_by_others_as_the_umask_says(tmp_path):
    target = tmp_path / "map.json"
    umask = os.umask(0o022)
    try:
        replace_atomically(target, b"{}")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_torn_last_line_is_cut_and_the_journal_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = JsonLines(path)
    journal.append({"a": 1})
    journal.close()
    with path.open("a") as file:
        file.write('{"a": 2')
    journal = JsonLines(path)
    journal.append({"a": 3})
    assert list(journal) == [{"a": 1}, {"a": 3}]
    journal.close()


def test_a_journal_refuses_what_json_cannot_hold(tmp_path):
    journal = JsonLines(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        journal.append({"a": float("nan")})
    journal.close()


def test_arrays_are_written_as_they_read_not_as_they_lie():
    table = np.arange(6.0).reshape(2, 3)
    again = load(safetensors_bytes({"column": table[:, 0], "transposed": table.T}))
    np.testing.assert_array_equal(again["column"], [0.0, 3.0])
    np.testing.assert_array_equal(again["transposed"], table.T)
