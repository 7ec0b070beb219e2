"""Measured points: what a device took for a layer or a step, read strictly from CSV files.

The package's own layout has one row per point and these columns:

===========  ==================================================================================
``kind``     ``moe_layer``: the routed experts of one layer, tokens shared out evenly among them;
             ``decode`` or ``prefill``: one step of a whole model; ``speedup``: one matrix
             product, as a ratio to the same stack's 16-bit product
``device``   a device, as ``a100``
``stack``    the kernels that ran, as ``vllm``
``model``    a geometry, as ``mixtral-8x7b``; of a speed-up the matrix, as ``4096x8192`` (out, in)
``precision``  a name of :data:`PRECISIONS`, as ``bf16``, or a menu key, as ``4g64``
``batch``    sequences of the step; tokens of a layer; rows of a matrix product
``context``  tokens per sequence: in the cache (decode), in the prompt (prefill); else empty
``value``    the measurement
``unit``     ``s``, ``ms``, ``us``; ``tokens/s`` (decode, prefill); ``x`` (speedup)
``power_w``  mean power of the device, optional (the column, too)
``source``   where the figure is from
===========  ==================================================================================

The two layouts in which figures were published with this project are read as well; see
:mod:`dmpq.hw_models.published`.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, get_args

from dmpq.errors import InputError, unknown
from dmpq.formats import FULL_WIDTH, Menu
from dmpq.hw_models.strict import refuse_bad_name, why_unreadable
from dmpq.spec import GEOMETRIES, ModelSpec, MoELayer, load_geometry

Kind = Literal["moe_layer", "decode", "prefill", "speedup"]

COLUMNS: Final = (
    "kind",
    "device",
    "stack",
    "model",
    "precision",
    "batch",
    "context",
    "value",
    "unit",
    "source",
)
SECONDS: Final = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
UNITS: Final[Mapping[Kind, tuple[str, ...]]] = {
    "moe_layer": tuple(SECONDS),
    "decode": (*SECONDS, "tokens/s"),
    "prefill": (*SECONDS, "tokens/s"),
    "speedup": ("x",),
}
_ROW_WISE: Final = "8g1048576"
_MOST: Final = 10**9
_EXTRA_GEOMETRIES: Final = ("gpt-oss-20b", "llama-3.1-8b", "qwen3-32b")


@dataclass(frozen=True)
class Precision:
    """How the weights of a point were stored.

    Attributes:
        key: Menu key of the format.
        quantizer: Whose zero-points are stored.
        symmetric: Whether none are.
        fp8: Whether products are computed in 8-bit floats as well.
        rest_bytes: Bytes of a weight outside the experts: of the checkpoint's 2, a file that is
            quantized throughout keeps about 1.
    """

    key: str
    quantizer: str = "hqq"
    symmetric: bool = False
    fp8: bool = False
    rest_bytes: int = 2

    @cached_property
    def menu(self) -> Menu:
        """The menu with this one format."""
        return Menu.parse([self.key], quantizer=self.quantizer, symmetric=self.symmetric)

    @property
    def bits(self) -> int:
        """Nominal width."""
        return int(self.menu.bits[0])


# llama.cpp's types by the menu's nearest format: Q4_0 and Q8_0 exactly (4.5 and 8.5 bits), Q4_K
# exactly (4.5), Q2_K 2.5625 as its blocks have, Q3_K 3.5 for 3.44.
PRECISIONS: Final[Mapping[str, Precision]] = {
    "bf16": Precision("16"),
    "fp16": Precision("16"),
    "fp8": Precision(_ROW_WISE, symmetric=True, fp8=True),
    "int8": Precision(_ROW_WISE, symmetric=True, rest_bytes=1),
    "int4": Precision("4", symmetric=True),
    "mxfp4": Precision("4g64", symmetric=True),
    "Q2_K": Precision("2g32", quantizer="rtn", rest_bytes=1),
    "Q3_K_M": Precision("3g64", rest_bytes=1),
    "Q4_K_M": Precision("4g32", symmetric=True, rest_bytes=1),
    "Q4_0": Precision("4g32", symmetric=True, rest_bytes=1),
    "Q8_0": Precision("8g32", symmetric=True, rest_bytes=1),
}


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        name: Which row it is.
        kind: What was measured.
        device: Device.
        stack: Kernels that ran.
        model: Geometry, or the matrix of a speed-up.
        precision: How the weights of the experts were stored.
        batch: Sequences of the step; tokens of a layer; rows of a matrix product.
        context: Tokens per sequence; 0 where there is none.
        value: Seconds; of a speed-up the ratio.
        power_w: Mean power of the device, watts; ``None`` where nobody measured it.
        source: Where it is from.
    """

    name: str
    kind: Kind
    device: str
    stack: str
    model: str
    precision: Precision
    batch: int
    context: int
    value: float
    power_w: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Outside:
    """A row that is no point of the scope, and why."""

    name: str
    what: str
    reason: str


@dataclass(frozen=True)
class Geometry:
    """The model of a point.

    Attributes:
        spec: Its geometry.
        dense: Whether it has no experts: its spec has one of no size, which costs leave out.
    """

    spec: ModelSpec
    dense: bool = False


def read_points(path: str | Path) -> tuple[list[Point], list[Outside]]:
    """Read a file of points, in the package's layout or one of the published ones.

    Returns:
        The points, and the rows of a published file that this package has no words for.

    Raises:
        InputError: If the file cannot be read, a column is missing, or a value is none.
    """
    from dmpq.hw_models import published

    header, rows = _read_csv(path)
    layouts = {COLUMNS: _own, **published.LAYOUTS}
    columns = max(layouts, key=lambda names: len(set(names) & set(header)) / len(names))
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(
            f"The points file {path} has no column {', '.join(missing)}; its first line must name "
            f"{', '.join(columns)}, with commas between them."
        )
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"The points file {path} has two columns {twice[:40]!r}; name each column once."
        )
    if not rows:
        raise InputError(f"The points file {path} has no row; give at least one point.")
    points: list[Point] = []
    outside: list[Outside] = []
    first: dict[Point, int] = {}
    for line, cells in rows.items():
        try:
            if len(cells) != len(header):
                raise InputError(
                    f"it has {len(cells)} values for {len(header)} columns; put quotes around "
                    "text that holds a comma"
                )
            got = layouts[columns](dict(zip(header, cells, strict=True)), f"line {line}")
            if isinstance(got, Outside):
                outside.append(got)
                continue
            earlier = first.setdefault(replace(got, name=""), line)
            if earlier != line and columns is COLUMNS:
                raise InputError(
                    f"it repeats line {earlier}; leave one of them out, or tell them apart by "
                    "their source"
                )
            points.append(got)
        except InputError as error:
            raise InputError(
                f"The points file {path}, line {line}: {str(error).rstrip('.')}."
            ) from error
    return points, outside


def _read_csv(path: str | Path) -> tuple[list[str], dict[int, list[str]]]:
    """Return a CSV file's first line, and its other rows by the line that they begin on.

    Read by Python's own reader: pandas renames a column that is named twice, takes the first one
    for an index where rows are longer than the header, and does not know on which line a row is.

    Raises:
        InputError: If it cannot be read.
    """
    rows: dict[int, list[str]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            line = 1
            for cells in reader:
                if any(map(str.strip, cells)):
                    rows[line] = cells
                line = reader.line_num + 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = why_unreadable(error) if not isinstance(error, csv.Error) else error
        raise InputError(
            f"The points file {path} cannot be read ({reason}); give a CSV file."
        ) from error
    if not rows:
        raise InputError(f"The points file {path} cannot be read (it is empty); give a CSV file.")
    header = rows.pop(min(rows))
    return [name.strip() for name in header], rows


def number(row: Mapping[str, Any], column: str, *, whole: bool = False) -> float:
    """Return a positive number of a row.

    Raises:
        InputError: If it is empty, no number, not positive, or not whole where it must be.
    """
    text = str(row[column]).strip()
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST or (whole and value != round(value)):
        what = "a positive whole number" if whole else "a positive number"
        raise InputError(f"{column} is {text[:40]!r}; give {what}, at most {_MOST:,}")
    return value


@cache
def geometry(model: str) -> Geometry:
    """Return the geometry of a point's model.

    Args:
        model: A shipped geometry, the path of a ``config.json``, or one of the models that points
            were published of.

    Raises:
        InputError: If there is no such geometry.
    """
    if model not in _EXTRA_GEOMETRIES:
        if model not in GEOMETRIES and not Path(model).exists():
            raise unknown(
                "model", model, (*GEOMETRIES, *_EXTRA_GEOMETRIES), "Or the path of a config.json."
            )
        return Geometry(load_geometry(model))
    file = resources.files("dmpq") / "geometries" / f"{model}.json"
    config = json.loads(file.read_text("utf-8"))
    if "num_local_experts" in config:
        return Geometry(ModelSpec.from_config(config, name=model))
    return Geometry(_dense(config, model), dense=True)


def layer_alone(layer: MoELayer) -> ModelSpec:
    """Return a model of one layer and next to nothing around its routed experts."""
    return ModelSpec(
        name=layer.path,
        model_type="",
        hidden_size=layer.hidden_size,
        num_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        vocab_size=1,
        tie_word_embeddings=True,
        dense_intermediate_size=0,
        moe_layers=(layer,),
    )


def matrix_shape(model: str) -> tuple[int, int]:
    """Return (out, in) of a speed-up's matrix.

    Raises:
        InputError: If the text is no shape.
    """
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", model)
    if match is None:
        raise InputError(f"model is {model[:40]!r}; of a speed-up give a shape such as 4096x8192")
    return int(match[1]), int(match[2])


def precision(name: str) -> Precision:
    """Return the precision of a name or menu key.

    Raises:
        InputError: If it is neither.
    """
    if name in PRECISIONS:
        return PRECISIONS[name]
    if not re.fullmatch(r"\d+(g\d+)?", name):
        raise unknown("precision", name, PRECISIONS, "Or a menu key such as 4g64.")
    found = Precision(name)
    _ = found.bits
    return found


def _own(row: Mapping[str, Any], name: str) -> Point:
    """Return the point of a row of the package's own layout."""
    text = {column: str(row[column]).strip() for column in COLUMNS}
    empty = next((c for c in COLUMNS if not text[c] and c not in ("context", "source")), None)
    if empty is not None:
        raise InputError(f"{empty} is empty; give a value")
    kind, unit = text["kind"], text["unit"]
    if kind not in get_args(Kind):
        raise unknown("kind", kind, get_args(Kind))
    if unit not in UNITS[kind]:  # type: ignore[index]
        raise unknown(f"unit of a {kind}", unit, UNITS[kind])  # type: ignore[index]
    whole_model = kind in ("decode", "prefill")
    batch = int(number(row, "batch", whole=True))
    context = int(number(row, "context", whole=True)) if whole_model else 0
    value = number(row, "value")
    tokens = batch * context if kind == "prefill" else batch
    stored = precision(text["precision"])
    if kind == "speedup":
        if stored.bits == FULL_WIDTH:
            raise InputError("precision is 16 bits, to which speed-ups are relative; give another")
        shapes = [matrix_shape(text["model"])]
    else:
        found = geometry(text["model"])
        layers = () if found.dense else found.spec.moe_layers
        shapes = [s for layer in layers for s in (layer.gate_up_shape, layer.down_shape)]
    for shape in shapes:  # whether groups divide it
        _ = stored.menu.stored_bits(shape)
    refuse_bad_name(text["stack"])
    return Point(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        device=text["device"],
        stack=text["stack"],
        model=text["model"],
        precision=stored,
        batch=batch,
        context=context,
        value=tokens / value if unit == "tokens/s" else value * SECONDS.get(unit, 1.0),
        power_w=number(row, "power_w") if str(row.get("power_w", "")).strip() else None,
        source=text["source"],
    )


def _dense(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Return a model without experts: its blocks as shared width, and one expert of no size."""
    width, hidden = config["intermediate_size"], config["hidden_size"]
    expert = MoELayer("none", 1, 1, hidden, 1, shared_intermediate_size=width)
    return ModelSpec(
        name=name,
        model_type=config["model_type"],
        hidden_size=hidden,
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab_size=config["vocab_size"],
        tie_word_embeddings=config["tie_word_embeddings"],
        dense_intermediate_size=width,
        moe_layers=(expert,),
    )
