"""The product: which format every expert gets, what that was made for, and what it measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError, unknown
from dmpq.files import replace_atomically
from dmpq.formats import PRUNED_WIDTH, Format, Menu
from dmpq.json_checks import (
    Check,
    bad,
    boolean,
    limit,
    list_of,
    matches,
    members,
    not_negative,
    number,
    one_of,
    optional_text,
    plain,
    record,
    refuse_constant,
    table,
    text_value,
    unique,
    whole,
)
from dmpq.spec import ModelSpec

SCHEMA: Final = "dmpq.bitmap/1"
MAX_FILE_BYTES: Final = 64 << 20
PROJECTIONS: Final = ("gate_up", "down")
_PRUNED: Final = Format(PRUNED_WIDTH).key

Keys = Sequence[str]
LayerAssignment = Keys | Mapping[str, Keys]

_NAME, _VERSION = SCHEMA.split("/")
_MODULE_PATH: Final = re.compile(r"\w+(\.\w+)*", re.ASCII)
_PACKAGE: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BitMap:
    """A bit map, valid by construction; plain JSON values throughout, numpy's are converted.

    Attributes:
        model: ``id``, ``revision`` (or ``None``), ``architecture`` and ``fingerprint``, the
            SHA-256 of the weights.
        geometry: Shapes of the model; names the experts containers.
        menu: Formats that the assignment draws on, with their quantizer.
        assignment: Module path of each experts container → one menu key per expert, or
            ``{"gate_up": keys, "down": keys}`` where projections differ.
        objective: ``weights`` of the reward's terms, and ``signal``, what damage is.
        constraints: Limit → value, or ``None`` for no limit.
        hardware: ``name``, ``stack``, ``calibrated``, ``source`` and ``cost_geometry``.
        workload: ``phase``, ``batch`` and ``context``.
        text: What it was measured on: ``dataset``, ``sequence_length`` and ``heldout_tokens``; of
            a task's examples also ``task``, ``text_column`` and ``label_column``.
        serve: What shares one format: ``"expert"``, ``"projection"`` or ``"layer"``.
        metrics: ``"predicted"`` and ``"measured"``: name → ``{"value": number, "unit": text}``.
        search: ``agent``, ``seed``, ``evaluations`` and ``tokens``.
        versions: Package → version.
        git_revision: Commit of this project's sources; ``None`` where unknown.
        calibration: What GPTQ was calibrated by, and no other quantizer is: ``dataset``, and
            the draw from it: ``stream``, ``length`` and ``windows``, as in
            :class:`dmpq.data.Draw`; of a text that the model wrote ``"ebss"``, and the tokens that
            its windows start with. It stands in the file's ``quantizer``.

    Raises:
        InputError: If any part is malformed, or the parts do not fit each other.
    """

    model: Mapping[str, Any]
    geometry: ModelSpec
    menu: Menu
    assignment: Mapping[str, LayerAssignment]
    objective: Mapping[str, Any]
    constraints: Mapping[str, float | None]
    hardware: Mapping[str, Any]
    workload: Mapping[str, Any]
    text: Mapping[str, Any]
    serve: str
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]
    search: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for member in fields(self):
            if member.name not in ("geometry", "menu"):
                value = plain(getattr(self, member.name), member.name)
                object.__setattr__(self, member.name, value)
        for name, check in _SECTIONS.items():
            check(name, getattr(self, name))
        _check_calibration(self)
        for path in _paths(self.geometry):
            if not _MODULE_PATH.fullmatch(path):
                raise bad("geometry", path, "module paths of names and numbers joined by dots")
        _check_assignment(self)

    def to_assignment(self, spec: ModelSpec) -> NDArray[np.int64]:
        """Return menu indices for a model.

        Args:
            spec: The model; its experts containers must be those of this map.

        Returns:
            int64 (N,), or (2N,) with each expert's gate+up before its down where projections
            differ.

        Raises:
            InputError: If the map was made for other experts.
        """
        own = [(layer.path, layer.num_experts) for layer in self.geometry.moe_layers]
        if own != [(layer.path, layer.num_experts) for layer in spec.moe_layers]:
            raise InputError(
                f"This bit map was made for the experts of {self.model['id']} "
                f"({self.geometry.num_experts} in {len(own)} layers), {spec.name} has others "
                f"({spec.num_experts} in {len(spec.moe_layers)} layers); search a map for it."
            )
        position = {key: i for i, key in enumerate(self.menu.keys)}
        columns = [
            [position[key] for path in _paths(spec) for key in self._keys(path, projection)]
            for projection in PROJECTIONS
        ]
        pairs = np.array(columns, dtype=np.int64).T
        split = any(isinstance(keys, Mapping) for keys in self.assignment.values())
        return pairs.ravel() if split else pairs[:, 0].copy()

    def _keys(self, path: str, projection: str) -> Keys:
        keys = self.assignment[path]
        return keys[projection] if isinstance(keys, Mapping) else keys

    def to_json(self) -> dict[str, Any]:
        """Return the map as plain JSON values, in the order in which they are written."""
        choices = {f.key: {"bits": f.bits, "group_size": f.group_size} for f in self.menu.formats}
        quantizer = {"name": self.menu.quantizer, "symmetric": self.menu.symmetric}
        if self.calibration is not None:
            quantizer["calibration"] = self.calibration
        return {
            "schema": SCHEMA,
            "model": {**self.model, "geometry": self.geometry.to_json()},
            "quantizer": quantizer,
            "choices": choices,
            "assignment": {path: self.assignment[path] for path in _paths(self.geometry)},
            **{name: getattr(self, name) for name in _TAIL},
        }

    @classmethod
    def from_json(cls, data: Any) -> BitMap:
        """Return the map that :meth:`to_json` described.

        Raises:
            InputError: If anything is missing, unknown, malformed or contradictory.
        """
        _check_schema(data)
        members(
            "bit map",
            data,
            ("schema", "model", "quantizer", "choices", "assignment", *_TAIL),
        )
        model = dict(members("model", data["model"], (*_MODEL, "geometry")))
        geometry = ModelSpec.from_json(model.pop("geometry"))
        quantizer = data["quantizer"]
        calibration = None
        if isinstance(quantizer, Mapping) and "calibration" in quantizer:
            quantizer = dict(quantizer)
            calibration = quantizer.pop("calibration")
            _CALIBRATION("quantizer.calibration", calibration)
        return cls(
            model=model,
            geometry=geometry,
            menu=_read_menu(data["choices"], quantizer),
            assignment=data["assignment"],
            calibration=calibration,
            **{name: data[name] for name in _TAIL},
        )

    def write(self, path: str | Path) -> None:
        """Write the map atomically; the same map gives the same bytes."""
        replace_atomically(path, (_text(self.to_json()) + "\n").encode())

    @classmethod
    def read(cls, path: str | Path) -> BitMap:
        """Read a map and validate all of it.

        Raises:
            InputError: If the file cannot be read, or is no valid bit map, with the reason.
        """
        try:
            size = Path(path).stat().st_size
            if size > MAX_FILE_BYTES:
                raise InputError(
                    f"it has {size} bytes, more than the {MAX_FILE_BYTES} that are read; "
                    "give a bit map"
                )
            data = json.loads(
                Path(path).read_text("utf-8"),
                object_pairs_hook=unique,
                parse_constant=refuse_constant,
            )
            return cls.from_json(data)
        except InputError as error:
            raise InputError(f"The bit map {path} is refused: {error}") from error
        except OSError as error:
            raise InputError(f"The bit map {path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"The bit map {path} is not JSON: {error}.") from error


def assignment_from(
    spec: ModelSpec, menu: Menu, assignment: NDArray[np.integer]
) -> dict[str, LayerAssignment]:
    """Return a bit map's ``assignment`` from menu indices.

    Args:
        spec: The model.
        menu: What the indices point into.
        assignment: (N,), or (2N,) with each expert's gate+up before its down.

    Raises:
        InputError: If the length or an index does not fit.
    """
    indices = np.asarray(assignment)
    experts = spec.num_experts
    if indices.shape not in ((experts,), (2 * experts,)):
        raise InputError(
            f"The assignment has shape {indices.shape}, but {spec.name} has {experts} experts; "
            f"give {experts} indices, or {2 * experts} for projections."
        )
    if not np.issubdtype(indices.dtype, np.integer) or not (
        0 <= indices.min() <= indices.max() < len(menu)
    ):
        raise InputError(
            f"The assignment holds other values than menu indices; give 0 to {len(menu) - 1}."
        )
    pairs = indices.reshape(experts, -1)
    ends = np.cumsum([layer.num_experts for layer in spec.moe_layers])[:-1]
    result: dict[str, LayerAssignment] = {}
    for path, rows in zip(_paths(spec), np.split(pairs, ends), strict=True):
        columns = [[menu.keys[i] for i in column] for column in rows.T]
        whole = len(columns) == 1
        result[path] = columns[0] if whole else dict(zip(PROJECTIONS, columns, strict=True))
    return result


def _paths(spec: ModelSpec) -> list[str]:
    return [layer.path for layer in spec.moe_layers]


_TEXT: Final = {
    "dataset": text_value,
    "sequence_length": whole(2),
    "heldout_tokens": whole(1),
}
_TASK: Final = {
    "task": text_value,
    "text_column": optional_text,
    "label_column": optional_text,
}


def _measured_on(where: str, value: Any) -> None:
    """Check what a map was measured on: a text, or a task's examples."""
    members = _TEXT | _TASK if isinstance(value, Mapping) and "task" in value else _TEXT
    record(**members)(where, value)


_MODEL: Final[dict[str, Check]] = {
    "id": text_value,
    "revision": optional_text,
    "architecture": text_value,
    "fingerprint": matches(_SHA256, "64 hexadecimal digits"),
}
_CALIBRATION: Final = record(
    dataset=text_value,
    stream=matches(_SHA256, "64 hexadecimal digits"),
    length=whole(2),
    windows=list_of(whole(0)),
)
_METRICS: Final = table(record(value=number, unit=text_value))
_TAIL_SECTIONS: Final[dict[str, Check]] = {
    "objective": record(weights=table(not_negative), signal=text_value),
    "constraints": table(limit),
    "hardware": record(
        name=text_value,
        stack=text_value,
        calibrated=boolean,
        source=text_value,
        cost_geometry=text_value,
    ),
    "workload": record(
        phase=one_of("decode", "prefill"),
        batch=whole(1),
        context=whole(1),
    ),
    "text": _measured_on,
    "serve": one_of("expert", "projection", "layer"),
    "metrics": record(predicted=_METRICS, measured=_METRICS),
    "search": record(
        agent=text_value,
        seed=whole(0),
        evaluations=whole(0),
        tokens=not_negative,
    ),
    "versions": table(text_value, matches(_PACKAGE, "a package's name")),
    "git_revision": optional_text,
}
_SECTIONS: Final = {"model": record(**_MODEL), **_TAIL_SECTIONS}
_TAIL: Final = tuple(_TAIL_SECTIONS)


def _check_assignment(bitmap: BitMap) -> None:
    assignment, keys = bitmap.assignment, frozenset(bitmap.menu.keys)
    paths = _paths(bitmap.geometry)
    members("assignment", assignment, paths)
    for layer in bitmap.geometry.moe_layers:
        where, given = f"assignment of {layer.path}", assignment[layer.path]
        split = isinstance(given, Mapping)
        if split and bitmap.serve != "projection":
            raise InputError(
                f"The {where} sets projections apart, but serve is {bitmap.serve!r}; "
                "give one list, or serve 'projection'."
            )
        parts = [*members(where, given, PROJECTIONS).values()] if split else [given]
        for part in parts:
            if not isinstance(part, list) or len(part) != layer.num_experts:
                got = f"{len(part)} entries" if isinstance(part, list) else f"{str(part)[:40]!r}"
                raise InputError(
                    f"The {where} is {got}; give a list of {layer.num_experts} keys, one an "
                    "expert."
                )
            for key in part:
                if not isinstance(key, str) or key not in keys:
                    raise unknown(f"format in the {where}", str(key), keys)
            if bitmap.serve == "layer" and len(set(part)) > 1:
                raise InputError(
                    f"The {where} mixes formats, but serve is 'layer'; give all its experts one "
                    "format, or serve 'expert'."
                )
        if split and any(
            (up == _PRUNED) != (down == _PRUNED) for up, down in zip(*parts, strict=True)
        ):
            raise InputError(
                f"The {where} prunes one projection of an expert and keeps the other; an expert "
                f"is pruned whole: give both {_PRUNED!r}, or neither."
            )


def _check_calibration(bitmap: BitMap) -> None:
    name, calibrated = bitmap.menu.quantizer, bitmap.menu.method.calibrated
    if calibrated != (bitmap.calibration is not None):
        raise InputError(
            f"The quantizer {name!r} is calibrated, and its calibration is missing; add it."
            if calibrated
            else f"The quantizer {name!r} is not calibrated, but a calibration is given; remove "
            "it."
        )
    if calibrated:
        _CALIBRATION("quantizer.calibration", bitmap.calibration)


def _check_schema(data: Any) -> None:
    if not isinstance(data, Mapping) or not isinstance(data.get("schema"), str):
        raise InputError(f'It names no schema; a bit map says "schema": "{SCHEMA}".')
    name, _, version = data["schema"].partition("/")
    if name != _NAME:
        raise InputError(
            f"It follows schema {data['schema'][:60]!r}, not {SCHEMA!r}; give a bit map."
        )
    if version != _VERSION:
        raise InputError(
            f"It follows schema {data['schema'][:60]!r}, this version of dmpq reads {SCHEMA!r}; "
            "read it with the version of dmpq that wrote it."
        )


def _read_menu(choices: Any, quantizer: Any) -> Menu:
    record(name=text_value, symmetric=boolean)("quantizer", quantizer)
    table(record(bits=number, group_size=number))("choices", choices)
    menu = Menu.parse(choices, quantizer=quantizer["name"], symmetric=quantizer["symmetric"])
    if menu.quantizer != quantizer["name"]:
        raise InputError(
            f"The quantizer {quantizer['name'][:60]!r} must be written {menu.quantizer!r}."
        )
    for key, stated in choices.items():
        meant = Format.parse(key)
        if (meant.bits, meant.group_size) != (stated["bits"], stated["group_size"]):
            raise InputError(
                f"The choice {key!r} states {stated['bits']} bits in groups of "
                f"{stated['group_size']}, but its key means {meant.bits} bits in groups of "
                f"{meant.group_size}; make them agree."
            )
        if key != meant.key:
            raise InputError(f"The choice {key!r} must be written {meant.key!r}.")
    return menu


def _text(value: Any, indent: str = "") -> str:
    """Return JSON with one line per member and per object in a list, plain lists on one line."""
    deeper = indent + "  "
    if isinstance(value, Mapping) and value:
        lines = [f"{deeper}{json.dumps(k)}: {_text(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        rows = [deeper + json.dumps(row, allow_nan=False) for row in value]
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
