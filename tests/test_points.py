"""Points: what a row means, the published layouts, the scope, and files that are refused."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpq.errors import InputError
from dmpq.hw_models import load_hardware
from dmpq.hw_models.points import (
    COLUMNS,
    PRECISIONS,
    Precision,
    geometry,
    matrix_shape,
    precision,
    read_points,
)
from dmpq.hw_models.published import PROMPT_TOKENS
from dmpq.hw_models.scope import Scope, read_scope

POINTS = Path(__file__).parents[1] / "benchmarks" / "points"
HEAD = ",".join(COLUMNS)
ROW = "moe_layer,a100,mine,mixtral-8x7b,bf16,16,,2.5,ms,me"


def written(tmp_path, *rows, head=HEAD):
    file = tmp_path / "points.csv"
    file.write_text("\n".join((head, *rows)) + "\n")
    return file


def test_a_row_is_a_point(tmp_path):
    file = written(
        tmp_path,
        f"{ROW},",
        "decode,a100,mine,olmoe-1b-7b,4g64,8,512,100,tokens/s,me,300",
        "prefill,a100,mine,olmoe-1b-7b,int4,2,512,20,ms,me,",
        "speedup,a100,mine,4096x8192,4,16,,1.5,x,me,",
        head=f"{HEAD},power_w",
    )
    (layer, decode, prefill, ratio), outside = read_points(file)
    assert not outside
    assert (layer.value, layer.batch, layer.context, layer.power_w) == (2.5e-3, 16, 0, None)
    assert decode.value == pytest.approx(8 / 100)
    assert (decode.context, decode.power_w, decode.precision) == (512, 300, Precision("4g64"))
    assert (prefill.value, prefill.batch, prefill.precision.symmetric) == (0.02, 2, True)
    assert (ratio.value, matrix_shape(ratio.model)) == (1.5, (4096, 8192))


@given(st.floats(1e-9, 1e6), st.sampled_from(["s", "ms", "us"]))
def test_times_are_kept_to_rounding(tmp_path_factory, value, unit):
    row = f"moe_layer,a100,mine,mixtral-8x7b,bf16,16,,{value!r},{unit},me"
    (point,), _ = read_points(written(tmp_path_factory.mktemp("p"), row))
    assert point.value == pytest.approx(value * {"s": 1, "ms": 1e-3, "us": 1e-6}[unit])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW.replace("2.5", ""), "value is empty"),
        (ROW.replace("2.5", "fast"), "value is 'fast'; give a positive number"),
        (ROW.replace("2.5", "nan"), "value is 'nan'"),
        (ROW.replace("2.5", "inf"), "value is 'inf'"),
        (ROW.replace("2.5", "-1"), "value is '-1'"),
        (ROW.replace("2.5", "0"), "value is '0'"),
        (ROW.replace(",16,", ",1.5,"), "batch is '1.5'; give a positive whole number"),
        (ROW.replace(",ms,", ",MS,"), "unit of a moe_layer 'MS' .did you mean 'ms'"),
        (ROW.replace(",ms,", ",tokens/s,"), "choose one of: ms, s, us"),
        (ROW.replace("moe_layer", "layer"), "Unknown kind 'layer'"),
        (ROW.replace("mixtral-8x7b", "mixtral"), "did you mean 'mixtral-8x7b'"),
        (ROW.replace("bf16", "bf61"), "did you mean 'bf16'"),
        (ROW.replace("bf16", "5"), "Bit-width 5 is not on offer"),
        ("decode,a100,mine,olmoe-1b-7b,4,8,,1,s,me", "context is ''"),
        ("speedup,a100,mine,4096,4,16,,1.5,x,me", "give a shape such as 4096x8192"),
        ("speedup,a100,mine,64x64,16,16,,1.5,x,me", "to which speed-ups are relative"),
        ("speedup,a100,mine,64x64,4,16,,1.5,s,me", "choose one of: x"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path, row, message):
    with pytest.raises(InputError, match=message) as caught:
        read_points(written(tmp_path, ROW, row))
    assert "line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD.replace("value,", "").replace(",unit", "") + "\n" + ROW, "no column value, unit"),
        ("a,b\n1,2\n", "no column"),
        (HEAD + "\n", "has no row"),
        ("", "cannot be read"),
        (HEAD + "\n" + ROW + ",1,2,3\n" + ROW + '\n"', "cannot be read"),
        ("kernel,weight_bits,group,shape,gpu,M\n", "no column speedup_vs_fp16"),
        ("id,kind,model,hardware,precision,metric,value\n", "no column n_dev"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "points.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_points(file)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_points(tmp_path / "nowhere.csv")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"points\.csv|binary\.csv"):
        read_points(binary)


def test_every_published_row_is_a_point_or_listed():
    points, outside = read_points(POINTS / "moe_points.csv")
    assert len(points) + len(outside) == 113
    assert Counter(one.reason for one in outside) == {
        "a width that no menu has": 3,
        "no device file for this part": 2,
    }
    points, outside = read_points(POINTS / "kernel_speedups.csv")
    assert len(points) + len(outside) == 181
    assert {one.reason for one in outside} == {"a width that no menu has"}


def test_published_rows_are_read_as_they_say():
    points = {p.name: p for p in read_points(POINTS / "moe_points.csv")[0]}
    chat = points["row 1"]
    assert (chat.device, chat.stack, chat.model, chat.kind) == (
        "h100",
        "vllm",
        "qwen3-30b-a3b",
        "decode",
    )
    assert (chat.value, chat.batch, chat.context) == (12.85e-3, 8, PROMPT_TOKENS + 927 // 2)
    assert chat.power_w == 399
    layer = points["row 103"]
    assert (layer.stack, layer.precision.bits) == ("sglang", 4)
    assert layer.value == pytest.approx(0.1599e-3)
    apple = points["row 67"]
    assert (apple.value, apple.context, apple.precision) == (1 / 36.66, 64, PRECISIONS["Q4_0"])
    assert points["row 88"].power_w is None  # that of the whole system


def test_precisions_store_what_their_files_do():
    def bits(name):
        return float(precision(name).menu.effective_bits(4096)[0])

    assert bits("Q4_0") == 4.5
    assert bits("Q8_0") == 8.5
    assert bits("Q2_K") == 2.5625
    assert bits("mxfp4") == 4.25
    assert bits("int4") == 4.125
    assert bits("fp8") == pytest.approx(8, abs=0.01)


@pytest.mark.parametrize(
    ("model", "billions"), [("gpt-oss-20b", 20.9), ("llama-3.1-8b", 8.03), ("qwen3-32b", 32.8)]
)
def test_geometries_of_points_count_as_published(model, billions):
    found = geometry(model)
    parameters = found.spec.other_parameters
    if not found.dense:
        parameters += found.spec.expert_parameters
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert found.dense == (model != "gpt-oss-20b")


def test_scope_lists_what_is_outside_and_keeps_the_rest():
    device = load_hardware("a100").facts
    points = [p for p in read_points(POINTS / "moe_points.csv")[0] if p.device == "a100"]
    inside, outside = Scope().split(points, device)
    assert (inside, outside) == (points, [])
    inside, outside = Scope(layer_tokens=(1, 1024)).split(points, device)
    assert len(inside) + len(outside) == len(points)
    assert {one.reason for one in outside} == {"layer_tokens 8192 is outside 1 to 1024"}
    _, outside = Scope(devices=("h100",)).split(points, device)
    assert len(outside) == len(points)


def test_a_layer_faster_than_memory_measured_a_cache(tmp_path):
    device = load_hardware("a100").facts
    nominal = 2 * 3 * 4096 * 14336 * 2 / device.bandwidth_bytes_per_s
    rows = [
        f"moe_layer,a100,mine,mixtral-8x7b,bf16,1,,{nominal * factor!r},s,me"
        for factor in (0.99, 1.01)
    ]
    points, _ = read_points(written(tmp_path, *rows))
    inside, (cached,) = Scope().split(points, device)
    assert inside == points[1:]
    assert "cache" in cached.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "does not say"),
        ('{"schema": "dmpq.scope/1", "bach": [1, 2]}', "did you mean 'batch'"),
        ('{"schema": "dmpq.scope/1", "batch": [2, 1]}', "two whole numbers"),
        ('{"schema": "dmpq.scope/1", "batch": [1.5, 2]}', "two whole numbers"),
        ('{"schema": "dmpq.scope/1", "batch": 3}', "two whole numbers"),
        ('{"schema": "dmpq.scope/1", "devices": [1]}', "a list of names"),
    ],
)
def test_bad_scopes_are_refused(tmp_path, text, message):
    file = tmp_path / "scope.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_scope(file)


def test_the_committed_scope_says_its_bounds():
    scope = read_scope(POINTS / "scope.json")
    assert scope.words().startswith("batch 1 to 260")
    assert "h100" in scope.devices
