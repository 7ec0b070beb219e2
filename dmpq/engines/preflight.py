"""Would an engine load a bit map, which rule does it break, and what is the nearest that it loads.

The nearest map is the best within the engine's rules that takes no more bits than the map itself:
an exact knapsack over what shares a format there. Damage is the profile's sensitivities where one
is at hand. Without, it is what the map implies: where loss falls by 4 per bit (the
high-resolution law) and a map is optimal, an expert of b bits is 4**b times as sensitive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.bitmap import BitMap, assignment_from
from dmpq.engines.rules import UPCYCLED, Engine, Rule
from dmpq.errors import InputError
from dmpq.exporters.plan import pairs_of
from dmpq.formats import DEFAULT_GROUP_SIZE, QUANTIZED_WIDTHS, Format, Menu
from dmpq.profile import Profile
from dmpq.solvers.knapsack import Mckp
from dmpq.spec import ModelSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_DAMAGE_PER_BIT: Final = 4.0
_FEW: Final = 3
"""Examples that a sentence names."""


class NothingLoadable(InputError):  # noqa: N818  # an answer, where a question was asked
    """No map within the rules and the budget."""


OWN: Final = "dmpq"
"""The engine that loads every map."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A map as rules see it.

    Attributes:
        spec: The model.
        menu: The map's formats.
        pairs: (N, 2), menu indices of each expert's gate+up and down.
    """

    spec: ModelSpec
    menu: Menu
    pairs: Ints

    @classmethod
    def of(cls, bitmap: BitMap) -> Layout:
        """Return the layout of a bit map."""
        return cls(bitmap.geometry, bitmap.menu, pairs_of(bitmap))

    def used(self) -> list[tuple[Format, tuple[int, ...]]]:
        """Return the formats in use, each with the input widths that it is used on."""
        widths = _in_features(self.spec)
        return [
            (fmt, tuple(sorted(set(widths[self.pairs == index].tolist()))))
            for index, fmt in enumerate(self.menu.formats)
            if (self.pairs == index).any()
        ]

    def bits(self, stored: Mapping[int, float] | None = None) -> float:
        """Return effective bits per expert weight, in dmpq's formats or in an engine's own."""
        sizes = _sizes(self.spec, self.menu, stored or {})
        chosen = np.take_along_axis(sizes, self.pairs[:, :, None], axis=2)
        return float(chosen.sum()) / self.spec.expert_parameters


@dataclass(frozen=True)
class Broken:
    """A rule that a map breaks.

    Attributes:
        rule: The rule.
        found: What the map has instead, as a clause.
    """

    rule: Rule
    found: str

    def __str__(self) -> str:
        return f"{self.found}: {self.rule.because} ({self.rule.source})"


def refuse_compensators(menu: Menu, reader: str) -> None:
    """Refuse a quantizer whose low-rank compensators a reader has no place for.

    Raises:
        InputError: If it has some, and the reader is not dmpq itself.
    """
    if menu.method.rank and reader != OWN:
        raise InputError(
            f"The quantizer is {menu.quantizer!r}, and {reader} has no place for compensators; "
            "write the checkpoint with python -m dmpq.apply, or with python -m dmpq.export --to "
            "dequantized."
        )


def broken_rules(engine: Engine, bitmap: BitMap) -> list[Broken]:
    """Return the rules that a map breaks, in the engine's order; none where it would load."""
    layout = Layout.of(bitmap)
    found = ((rule, _CHECKS[rule.kind](layout, rule.allowed)) for rule in engine.rules)
    return [Broken(rule, said) for rule, said in found if said is not None]


def zero_points_of(menu: Menu) -> str:
    """Return the kind of zero-points that a menu stores: none, integer or float."""
    if menu.symmetric:
        return "none"
    return "integer" if menu.method.integer_zero else "float"


def _unknown(layout: Layout, _: str) -> str | None:
    return f"the model is a {UPCYCLED}" if layout.spec.model_type == UPCYCLED else None


def _mixed(layout: Layout, allowed: str) -> str | None:
    labels = blocks(layout.spec, allowed)
    mixed = [label for label in np.unique(labels) if np.ptp(layout.pairs[labels == label])]
    if not mixed:
        return None
    what = {"layer": "layers", "tensor": "tensors of a layer's experts", "expert": "experts"}
    if allowed == "model":
        keys = [fmt.key for fmt, _ in layout.used()]
        return f"the experts have several formats ({', '.join(keys)})"
    of = len(np.unique(labels))
    return f"{len(mixed)} of {of} {what[allowed]} mix formats"


def _outside(layout: Layout, allowed: frozenset[int]) -> str | None:
    counts = {
        fmt.bits: int((layout.menu.bits[layout.pairs] == fmt.bits).any(1).sum())
        for fmt, _ in layout.used()
        if fmt.bits not in allowed
    }
    if not counts:
        return None
    listed = ", ".join(f"{count} at {bits} bits" for bits, count in counts.items())
    return f"experts have widths it lacks ({listed})"


def _groups(layout: Layout, allowed: frozenset[int]) -> str | None:
    used = {
        fmt.group_along(width)
        for fmt, widths in layout.used()
        if fmt.is_quantized
        for width in widths
    }
    wrong = sorted(used - allowed)
    return f"groups of {', '.join(map(str, wrong))} weights share a scale" if wrong else None


def _zeros(layout: Layout, allowed: frozenset[str]) -> str | None:
    kind = zero_points_of(layout.menu)
    quantized = any(fmt.is_quantized for fmt, _ in layout.used())
    if kind in allowed or not quantized:
        return None
    return f"zero-points are stored ({kind}s, of {layout.menu.quantizer})"


def _rows(layout: Layout, allowed: Mapping[int, int]) -> str | None:
    wrong = [
        f"{fmt.bits} bits on rows of {width}, not a multiple of {allowed[fmt.bits]}"
        for fmt, widths in layout.used()
        for width in widths
        if width % allowed.get(fmt.bits, 1)
    ]
    return f"rows do not fit its blocks ({'; '.join(wrong[:_FEW])})" if wrong else None


_CHECKS: Final[dict[str, Callable[[Layout, Any], str | None]]] = {
    "architecture": _unknown,
    "granularity": _mixed,
    "widths": _outside,
    "group_sizes": _groups,
    "zero_points": _zeros,
    "row_multiples": _rows,
}


def blocks(spec: ModelSpec, granularity: str) -> Ints:
    """Return which block of one format each expert's gate+up and down are in, (N, 2).

    Args:
        spec: The model.
        granularity: One of :data:`dmpq.engines.rules.GRANULARITIES`.
    """
    experts, layer = np.arange(spec.num_experts), spec.layer_of_expert
    sides = np.arange(2)
    made: dict[str, Callable[[], Ints]] = {
        "projection": lambda: experts[:, None] * 2 + sides,
        "expert": lambda: np.stack([experts, experts], 1),
        "tensor": lambda: layer[:, None] * 2 + sides,
        "layer": lambda: np.stack([layer, layer], 1),
        "model": lambda: np.zeros((spec.num_experts, 2), np.int64),
    }
    return made[granularity]()


def _in_features(spec: ModelSpec) -> Ints:
    """Return input widths, (N, 2)."""
    widths = [(m.gate_up_shape[1], m.down_shape[1]) for m in spec.moe_layers]
    in_features: Ints = np.array(widths, np.int64)[spec.layer_of_expert]
    return in_features


def _weights(spec: ModelSpec) -> Ints:
    """Return numbers of weights, (N, 2)."""
    counts = [(math.prod(m.gate_up_shape), math.prod(m.down_shape)) for m in spec.moe_layers]
    weights: Ints = np.array(counts, np.int64)[spec.layer_of_expert]
    return weights


def _sizes(spec: ModelSpec, menu: Menu, stored: Mapping[int, float]) -> Ints:
    """Return stored bits, (N, 2, B), in an engine's own formats where it has some."""
    if not stored:
        return spec.stored_bits(menu)
    per_weight = np.array([stored.get(fmt.bits, fmt.bits) for fmt in menu.formats])
    sizes: Ints = np.ceil(_weights(spec)[:, :, None] * per_weight).astype(np.int64)
    return sizes


def nearest_loadable(
    engine: Engine,
    bitmap: BitMap,
    *,
    profile: Profile | None = None,
    avg_bits: float | None = None,
) -> BitMap:
    """Return the best map that an engine loads and that takes no more bits than this one.

    Args:
        engine: Whose rules hold.
        bitmap: The map; returned as it is where it breaks no rule.
        profile: Sensitivities of the same weights; its menu is searched. ``None`` for what the
            map implies.
        avg_bits: Limit on effective bits instead of the map's own.

    Returns:
        The map, without the measurements of the other.

    Raises:
        NothingLoadable: If nothing within the rules fits the budget.
        InputError: If the profile is of other weights, or lacks every format that the engine
            loads.
    """
    broken = broken_rules(engine, bitmap)
    if not broken:
        return bitmap
    if any(one.rule.kind == "architecture" for one in broken):
        raise NothingLoadable(f"{engine.name} loads no map of a {UPCYCLED}.")
    spec, layout = bitmap.geometry, Layout.of(bitmap)
    if profile is not None:
        _check_profile(profile, bitmap)
    offered = bitmap.menu if profile is None else profile.menu
    menu = _loadable_menu(engine, offered, extend=profile is None, name=engine.name)
    labels = blocks(spec, _granularity(engine, layout))
    sizes = _sizes(spec, menu, engine.stored)
    damage = _implied(layout, menu) if profile is None else _measured(profile, menu)
    allowed = _allowed(engine, spec, menu)
    budget = layout.bits() if avg_bits is None else avg_bits
    count = int(labels.max()) + 1
    barred = _summed(np.where(allowed, 0, 1), labels, count) > 0
    if barred.all(1).any():
        raise NothingLoadable(
            f"{engine.name} loads none of the formats {', '.join(menu.keys)} on the input widths "
            f"of {spec.name}; no map of these would load."
        )
    # A choice that is not allowed is larger than everything: the knapsack cannot take it.
    capacity = int(budget * spec.expert_parameters)
    block_sizes = _summed(sizes, labels, count).astype(np.int64)
    block_sizes[barred] = capacity + 1
    least = int(block_sizes.min(1).sum())
    if least > capacity:
        raise NothingLoadable(
            f"No map that {engine.name} loads has {budget:.2f} effective bits or fewer: the "
            f"narrowest has {least / spec.expert_parameters:.2f}; allow more with --avg-bits."
        )
    values = _summed(damage, labels, count)
    values[barred] = values.max() * 2 + 1
    chosen = Mckp(block_sizes, capacity).solve(values)[labels]
    return _as_map(bitmap, engine, menu, chosen)


def _granularity(engine: Engine, layout: Layout) -> str:
    rule = engine.rule("granularity")
    if rule is not None:
        return str(rule.allowed)
    return "projection" if np.ptp(layout.pairs, axis=1).any() else "expert"


def _loadable_menu(engine: Engine, offered: Menu, *, extend: bool, name: str) -> Menu:
    """Return the formats to choose among: those offered, and where allowed the engine's own."""
    widths, groups = engine.rule("widths"), engine.rule("group_sizes")
    zeros = engine.rule("zero_points")

    def fits(rule: Rule | None, value: int) -> bool:
        return rule is None or value in rule.allowed

    formats = set(offered.formats)
    if extend:
        sizes = {f.group_size for f in offered.formats if f.is_quantized} or {DEFAULT_GROUP_SIZE}
        if groups is not None and not any(fits(groups, size) for size in sizes):
            sizes = {size for size in groups.allowed if isinstance(size, int)}
        formats |= {Format(bits, size) for bits in QUANTIZED_WIDTHS for size in sizes}
    kept = [
        f
        for f in formats
        if fits(widths, f.bits) and (not f.is_quantized or fits(groups, f.group_size))
    ]
    if not [f for f in kept if not f.is_pruned]:
        raise InputError(
            f"None of the formats {', '.join(offered.keys)} of the profile is one that {name} "
            "loads; measure a profile on others (--bits, --group-sizes), or leave --profile out."
        )
    symmetric, quantizer = offered.symmetric, offered.quantizer
    if zeros is not None and zero_points_of(offered) not in zeros.allowed:
        integer = "integer" in zeros.allowed
        symmetric, quantizer = not integer, "rtn" if integer else quantizer
    return Menu(tuple(sorted(kept, key=lambda f: (f.bits, -f.group_size))), quantizer, symmetric)


def _allowed(engine: Engine, spec: ModelSpec, menu: Menu) -> NDArray[np.bool_]:
    """Return which formats fit each projection's rows, (N, 2, B)."""
    rows, groups = engine.rule("row_multiples"), engine.rule("group_sizes")
    widths = _in_features(spec)[:, :, None]
    multiples = rows.allowed if rows is not None and isinstance(rows.allowed, Mapping) else {}
    each = np.array([multiples.get(fmt.bits, 1) for fmt in menu.formats])
    result: NDArray[np.bool_] = widths % each == 0
    for index, fmt in enumerate(menu.formats):
        if fmt.is_quantized and groups is not None:
            real = np.minimum(widths[:, :, 0], fmt.group_size)
            result[:, :, index] &= np.isin(real, [int(size) for size in groups.allowed])
    return result


def _measured(profile: Profile, menu: Menu) -> Floats:
    """Return a profile's sensitivities by projection, (N, 2, B) for the formats of a menu."""
    chosen = [profile.menu.keys.index(key) for key in menu.keys]
    if profile.projection_sensitivity is not None:
        return profile.projection_sensitivity[:, :, chosen]
    half = profile.sensitivity[:, None, chosen] / 2
    return np.repeat(half, 2, axis=1)


def _implied(layout: Layout, menu: Menu) -> Floats:
    """Return the damage that a map implies by its widths, (N, 2, B), up to a factor."""
    own = layout.menu.bits[layout.pairs].astype(np.float64)
    fall = own[:, :, None] - np.array([fmt.bits for fmt in menu.formats], np.float64)
    weights = _weights(layout.spec)
    # Larger groups are a little worse at the same width; an eighth of a bit is enough to order
    # them.
    groups = np.array([f.group_size if f.is_quantized else 1 for f in menu.formats])
    worse = 1 + np.log2(np.maximum(groups, 1)) / 64
    damage: Floats = (weights / weights.mean())[:, :, None] * _DAMAGE_PER_BIT**fall * worse
    return damage


def _summed(values: NDArray[Any], labels: Ints, count: int) -> NDArray[Any]:
    sums = np.zeros((count, values.shape[2]), np.result_type(values, np.int64))
    np.add.at(sums, labels, values)
    return sums


def _check_profile(profile: Profile, bitmap: BitMap) -> None:
    if profile.fingerprint != bitmap.model["fingerprint"]:
        raise InputError(
            f"The profile is of weights {profile.fingerprint[:12]}..., the bit map of "
            f"{bitmap.model['fingerprint'][:12]}...; give the profile of the map's own run."
        )
    if profile.spec.moe_layers != bitmap.geometry.moe_layers:
        raise InputError(
            "The profile describes other layers or experts than the bit map; give the profile of "
            "the map's own run."
        )


def _as_map(bitmap: BitMap, engine: Engine, menu: Menu, chosen: Ints) -> BitMap:
    """Return a bit map of other formats, made for the same model and purpose."""
    spec = bitmap.geometry
    split = bool((chosen[:, 0] != chosen[:, 1]).any())
    flat = chosen.ravel() if split else chosen[:, 0]
    layout = Layout(spec, menu, chosen)
    by_layer = _granularity(engine, layout) in ("layer", "model")
    serve = "projection" if split else "layer" if by_layer else "expert"
    search = {**bitmap.search, "agent": f"{bitmap.search['agent']}, nearest for {engine.name}"}
    return replace(
        bitmap,
        menu=menu,
        assignment=assignment_from(spec, menu, flat),
        serve=serve,
        metrics={
            "predicted": {"effective_bits": {"value": layout.bits(), "unit": "bits"}},
            "measured": {},
        },
        search=search,
    )
