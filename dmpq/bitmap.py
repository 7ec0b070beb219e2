"""The product: which format every expert gets, what that was made for, and what it measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError, unknown
from dmpq.files import replace_atomically
from dmpq.formats import PRUNED_WIDTH, Format, Menu
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
_MAX_INTEGER: Final = 1 << 63


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
                plain = _plain(getattr(self, member.name), member.name)
                object.__setattr__(self, member.name, plain)
        for name, check in _SECTIONS.items():
            check(name, getattr(self, name))
        _check_calibration(self)
        for path in _paths(self.geometry):
            if not _MODULE_PATH.fullmatch(path):
                raise _bad("geometry", path, "module paths of names and numbers joined by dots")
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
        _members(
            "bit map",
            data,
            ("schema", "model", "quantizer", "choices", "assignment", *_TAIL),
        )
        model = dict(_members("model", data["model"], (*_MODEL, "geometry")))
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
                object_pairs_hook=_unique,
                parse_constant=_refuse_constant,
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


def _bad(where: str, value: Any, allowed: str) -> InputError:
    return InputError(f"{where} is {str(value)[:60]!r}; it must be {allowed}.")


def _plain(value: Any, where: str) -> Any:
    """Return ``value`` in plain JSON types, refusing what JSON or a reader cannot hold."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        strange = next((key for key in value if not isinstance(key, str)), None)
        if strange is not None:
            raise _bad(f"a name in {where}", strange, "text")
        return {key: _plain(member, f"{where}.{key}") for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member, where) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise _bad(where, value, "a finite number")
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        raise InputError(f"{where} is an integer of more than 63 bits; give a smaller one.")
    if value is not None and not isinstance(value, str | int | float):
        raise _bad(where, type(value).__name__, "text, a number, true, false or null")
    return value


def _members(where: str, value: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """Return a JSON object after checking that it has these names and no others."""
    if not isinstance(value, Mapping):
        raise _bad(where, value, "a JSON object")
    for name in value:
        if name not in names:
            raise unknown(f"name in {where}", str(name), names)
    for name in names:
        if name not in value:
            raise InputError(f"The {where} has no {name!r}; add it.")
    return value


def _text_value(where: str, value: Any) -> None:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _bad(where, value, "printable text")


def _optional_text(where: str, value: Any) -> None:
    if value is not None:
        _text_value(where, value)


def _boolean(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _bad(where, value, "true or false")


def _number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(where, value, "a number")


def _limit(where: str, value: Any) -> None:
    if value is not None:
        _number(where, value)
        if value <= 0:
            raise _bad(where, value, "a positive number, or null for no limit")


def _not_negative(where: str, value: Any) -> None:
    _number(where, value)
    if value < 0:
        raise _bad(where, value, "0 or more")


def _whole(least: int) -> Callable[[str, Any], None]:
    def check(where: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _bad(where, value, f"a whole number, {least} or more")

    return check


def _one_of(*allowed: str) -> Callable[[str, Any], None]:
    def check(where: str, value: Any) -> None:
        if value not in allowed:
            raise unknown(where, str(value), allowed)

    return check


def _matches(pattern: re.Pattern[str], allowed: str) -> Callable[[str, Any], None]:
    def check(where: str, value: Any) -> None:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise _bad(where, value, allowed)

    return check


def _record(**members: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """Return a check for an object with exactly these members."""

    def check(where: str, value: Any) -> None:
        for name, member in _members(where, value, tuple(members)).items():
            members[name](f"{where}.{name}", member)

    return check


def _table(
    member: Callable[[str, Any], None], name: Callable[[str, Any], None] = _text_value
) -> Callable[[str, Any], None]:
    """Return a check for an object of any names, all of whose members are alike."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise _bad(where, value, "a JSON object")
        for key, item in value.items():
            name(f"a name in {where}", key)
            member(f"{where}.{key}", item)

    return check


def _list(member: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """Return a check for a list, not empty, all of whose members are alike."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, list) or not value:
            raise _bad(where, value, "a list that is not empty")
        for item in value:
            member(f"a member of {where}", item)

    return check


_TEXT: Final = {"dataset": _text_value, "sequence_length": _whole(2), "heldout_tokens": _whole(1)}
_TASK: Final = {"task": _text_value, "text_column": _optional_text, "label_column": _optional_text}


def _measured_on(where: str, value: Any) -> None:
    """Check what a map was measured on: a text, or a task's examples."""
    members = _TEXT | _TASK if isinstance(value, Mapping) and "task" in value else _TEXT
    _record(**members)(where, value)


_MODEL: Final[dict[str, Callable[[str, Any], None]]] = {
    "id": _text_value,
    "revision": _optional_text,
    "architecture": _text_value,
    "fingerprint": _matches(_SHA256, "64 hexadecimal digits"),
}
_CALIBRATION: Final = _record(
    dataset=_text_value,
    stream=_matches(_SHA256, "64 hexadecimal digits"),
    length=_whole(2),
    windows=_list(_whole(0)),
)
_METRICS: Final = _table(_record(value=_number, unit=_text_value))
_TAIL_SECTIONS: Final[dict[str, Callable[[str, Any], None]]] = {
    "objective": _record(weights=_table(_not_negative), signal=_text_value),
    "constraints": _table(_limit),
    "hardware": _record(
        name=_text_value,
        stack=_text_value,
        calibrated=_boolean,
        source=_text_value,
        cost_geometry=_text_value,
    ),
    "workload": _record(phase=_one_of("decode", "prefill"), batch=_whole(1), context=_whole(1)),
    "text": _measured_on,
    "serve": _one_of("expert", "projection", "layer"),
    "metrics": _record(predicted=_METRICS, measured=_METRICS),
    "search": _record(
        agent=_text_value, seed=_whole(0), evaluations=_whole(0), tokens=_not_negative
    ),
    "versions": _table(_text_value, _matches(_PACKAGE, "a package's name")),
    "git_revision": _optional_text,
}
_SECTIONS: Final = {"model": _record(**_MODEL), **_TAIL_SECTIONS}
_TAIL: Final = tuple(_TAIL_SECTIONS)


def _check_assignment(bitmap: BitMap) -> None:
    assignment, keys = bitmap.assignment, frozenset(bitmap.menu.keys)
    paths = _paths(bitmap.geometry)
    _members("assignment", assignment, paths)
    for layer in bitmap.geometry.moe_layers:
        where, given = f"assignment of {layer.path}", assignment[layer.path]
        split = isinstance(given, Mapping)
        if split and bitmap.serve != "projection":
            raise InputError(
                f"The {where} sets projections apart, but serve is {bitmap.serve!r}; "
                "give one list, or serve 'projection'."
            )
        parts = [*_members(where, given, PROJECTIONS).values()] if split else [given]
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
    _record(name=_text_value, symmetric=_boolean)("quantizer", quantizer)
    _table(_record(bits=_number, group_size=_number))("choices", choices)
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise InputError(f"{name[:60]!r} is written twice in one object; write it once.")
        members[name] = value
    return members


def _refuse_constant(name: str) -> None:
    raise InputError(f"It holds {name}, which is no JSON number; write a finite number.")


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
