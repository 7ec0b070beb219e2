"""Recorded measurements: round trips to the byte, and files that are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpq.errors import InputError
from dmpq.formats import Format
from dmpq.hw_models import load_hardware
from dmpq.hw_models.measured import MeasuredModel
from dmpq.hw_models.measurements import (
    SCHEMA,
    CopyTiming,
    Energy,
    ExpertTiming,
    GatherTiming,
    KernelPower,
    MatrixTiming,
    Measurements,
    Point,
    holds_measurements,
    read_measurements,
)

SHAPE = (64, 32, True)
RECORDED = sorted((Path(__file__).parents[1] / "hw_models" / "recorded").glob("*.json"))


def points(*sizes, per_token=1e-5):
    return tuple(Point(size, 9, size * per_token, size * 1e-6, 0) for size in sizes)


def expert(bits, group=0, sizes=(1, 2, 4)):
    half = points(*sizes, per_token=bits * 5e-6)
    whole = points(*sizes, per_token=bits * 1e-5)
    return ExpertTiming(*SHAPE, bits, group, f"kernel {bits}", 100 * bits, whole, half, half)


def record(**more):
    facts = {
        "name": "host",
        "device": "a CPU",
        "stack": "torch 2",
        "versions": {"torch": "2", "gemlite": "1"},
        "threads": 2,
        "cuda_graphs": False,
        "cache_bytes": 1 << 25,
        "capacity_bytes": 16e9,
        "runtime_bytes": 0,
        "experts": (expert(4, 64), expert(16)),
        "matrices": (MatrixTiming(128, 64, "linear", points(1, 2, 4)),),
        "gathers": (GatherTiming(64, points(1, 2, 4)),),
        "copy": CopyTiming(1 << 23, 9, 1e-3, 1e-5, 0),
        "energy": Energy("analytical", "nothing measures it", assumed_w=100.0),
        "provenance": "a test",
    }
    return Measurements(**(facts | more))


MEASURED = Energy("rapl", "RAPL", (KernelPower(4, 64, 1, 20.0, 1.0, 5.0, 5, 5.0),))


@pytest.mark.parametrize("one", [record(), record(energy=MEASURED)], ids=["assumed", "measured"])
def test_what_is_written_is_read(tmp_path, one):
    path = tmp_path / "record.json"
    one.write(path)
    assert read_measurements(path) == one
    again = tmp_path / "again.json"
    read_measurements(path).write(again)
    assert path.read_bytes() == again.read_bytes()
    assert read_measurements(path).digest == one.digest


def test_versions_are_written_in_order():
    turned = record(versions={"gemlite": "1", "torch": "2"})
    assert turned.to_bytes() == record().to_bytes()


@given(st.floats(1e-9, 1e4), st.integers(1, 10**9))
def test_any_time_survives_to_five_digits(seconds, n):
    one = record(copy=CopyTiming(1 << 23, n, seconds, 0.0, 0))
    data = json.loads(one.to_bytes())
    assert data["copy"]["median_s"] == pytest.approx(seconds, rel=1e-4)
    assert data["copy"]["n"] == n


def changed(tmp_path, change):
    data = json.loads(record().to_bytes())
    change(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    return path


def set_at(*keys, value):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_at("schema", value="dmpq.measurements/2"), "schema"),
        (set_at("hostname", value="x"), "hostname"),
        (lambda d: d.pop("copy"), "no copy"),
        (set_at("name", value="hots"), "did you mean 'host'"),
        (set_at("threads", value=0), "threads"),
        (set_at("threads", value=2.0), "whole number"),
        (set_at("threads", value=True), "whole number"),
        (set_at("device", value=5), "must be text"),
        (set_at("capacity_bytes", value=16), "unit"),
        (set_at("copy", "median_s", value=39917.0), "unit"),
        (set_at("copy", "median_s", value=0), "unit"),
        (set_at("copy", "median_s", value="1"), "number"),
        (set_at("copy", "median_s", value=-1e-3), "unit"),
        (set_at("experts", value={}), "list"),
        (set_at("experts", value=[]), "no experts"),
        (set_at("matrices", value=[]), "no matrices"),
        (set_at("experts", 0, "bits", value=5), "5 bits"),
        (set_at("experts", 1, "bits", value=8), "16 bits"),
        (set_at("experts", 0, "whole", 0, "tokens", value=3), "rise in tokens"),
        (set_at("experts", 0, "whole", value=[]), "begin at 1"),
        (set_at("experts", 0, "down", value=[]), "same tokens"),
        (lambda d: d["experts"].append(d["experts"][0]), "twice"),
        (lambda d: d["matrices"].append(d["matrices"][0]), "twice"),
        (set_at("matrices", 0, "points", value=[]), "begin at 1"),
        (set_at("energy", "origin", value="guess"), "analytical"),
        (set_at("energy", "origin", value="nvml"), "origin"),
        (set_at("energy", "assumed_w", value=None), "origin"),
        (set_at("versions", "torch", value=2), "must be text"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, change, said):
    path = changed(tmp_path, change)
    with pytest.raises(InputError, match=said) as error:
        read_measurements(path)
    assert str(error.value).startswith(f"The measurements file {path} is refused: ")
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"null",
        b"[" * 100_000,
        b'{"schema": "dmpq.measurements/1", "schema": "dmpq.measurements/1"}',
        b'{"schema": "dmpq.measurements/1", "threads": NaN}',
    ],
)
def test_a_hostile_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_measurements(path)


def test_infinite_numbers_are_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(record().to_bytes().replace(b"16000000000.0", b"Infinity"))
    with pytest.raises(InputError, match="finite"):
        read_measurements(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_measurements(tmp_path / "none.json")


def test_what_was_measured_once_stays():
    old = record()
    slow = expert(4, 64, sizes=(1, 2, 4, 8))
    slow = replace(slow, whole=points(1, 2, 4, 8, per_token=9.0))
    got = old.with_more(
        experts=[slow, expert(8)],
        matrices=[MatrixTiming(1, 64, "linear", points(1))],
        gathers=[GatherTiming(64, points(1, 2, 4, 8))],
    )
    united = {(e.bits, e.group_size): e for e in got.experts}
    assert list(united) == [(4, 64), (8, 0), (16, 0)]
    assert united[4, 64].whole == (*old.experts[0].whole, Point(8, 9, 72.0, 8e-6, 0))
    assert [p.tokens for p in united[4, 64].down] == [1, 2, 4, 8]
    assert [m.shape for m in got.matrices] == [(1, 64), (128, 64)]
    assert got.gathers[0].points[-1].tokens == 8
    assert old.with_more() == old


@pytest.mark.parametrize(
    ("key", "bits"), [("2", 4), ("3g32", 4), ("4", 4), ("8", 16), ("8g32", 16), ("16", 16)]
)
def test_formats_take_their_own_kernel_or_the_next_wider(key, bits):
    assert record().expert(SHAPE, Format.parse(key)).bits == bits


def test_the_nearest_group_is_taken():
    many = record(experts=(expert(4, 32), expert(4, 128), expert(16)))
    assert many.expert(SHAPE, Format(4, 64)).group_size == 32
    assert many.expert(SHAPE, Format(2, 128)).group_size == 128


def test_experts_of_another_shape_are_refused():
    with pytest.raises(InputError, match="not"):
        record().expert((64, 33, True), Format(4))


def test_power_of_a_kernel_that_was_not_measured_is_refused():
    one = record(energy=MEASURED)
    assert one.power_w(4, 64) == 20
    with pytest.raises(InputError, match="16-bit"):
        one.power_w(16, 0)
    assert record().power_w(16, 0) == 100


def test_files_of_measurements_load_as_hardware(tmp_path):
    path = tmp_path / "record.json"
    record().write(path)
    assert holds_measurements(path)
    assert load_hardware(str(path)) == MeasuredModel(record())
    path.write_text(path.read_text().replace(SCHEMA, "dmpq.measurements/9"))
    assert holds_measurements(path)
    with pytest.raises(InputError, match="schema"):
        load_hardware(str(path))


@pytest.mark.parametrize(
    "content", [b"", b"[", b"[]", b'{"schema": "dmpq.device/1"}', b"[" * 9999]
)
def test_other_files_hold_no_measurements(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    assert not holds_measurements(path)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_shipped_records_are_in_canonical_form(path):
    one = read_measurements(path)
    assert one.to_bytes() == path.read_bytes()
    assert "torch" in one.versions
    assert one.provenance
