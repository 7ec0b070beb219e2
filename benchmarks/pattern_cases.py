"""What is asked of the figures of each pattern: plain predicates, with their thresholds.

The figures are rows of numbers, made by ``pattern_measures.py``; nothing here measures. A
predicate is asked case by case: of a model, a budget, a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

Rows = list[dict[str, Any]]
Figures = dict[str, Rows]

LOSSLESS: Final = 0.001
"""Rise of perplexity that 8 bits stay below, as a share."""
NEAR: Final = 0.05
"""4 bits stay below it: Mixtral's +0.2 on 3.84."""
MODERATE: Final = 0.25
"""3 bits stay below it: between Mixtral's +0.3 on 3.84 and DeepSeek's 6.5 to 10.65."""
WORSE: Final = 2.0
"""2 bits rise by more than so many times what 3 bits do."""
HALVING: Final = (1.5, 2.5)
"""What a bit more may divide the output error by, to count as halving it."""
NEAR_RANKS: Final = 16 / 6
"""EAC-MoE: 95.9% of newly selected experts were in the top 16 of a top-6 router's 64."""
NEAR_SHARE: Final = 0.9
TIED: Final = 0.05
"""By how much less than the fair uniform map's a map's KL may be, to have won nothing."""

FAIR: Final = "uniform-fractional"
RANDOM: Final = "random"
SINGLE_SIGNALS: Final = (
    "frequency",
    "inverse-frequency",
    "routing-weight",
    "router-norm",
    "weight-norm",
    "outlier-ratio",
    "kurtosis",
    "mopeq-model",
    "hessian-layer",
)
PROGRAMS: Final = ("error-layer", "pmq-paper", "gemq", "mckp")
"""Rules that combine signals in a program; ``error-model`` is a control and FAIR no rule."""


@dataclass(frozen=True)
class Case:
    """One instance of a claim.

    Attributes:
        where: Which one, in a few words.
        holds: Whether the predicate is true.
        text: The numbers that decided.
        void: Whether both rules gave the same maps, so that nothing was compared.
        change: By what share the one that should be less differs from the other; ``None`` where
            other things are compared.
    """

    where: str
    holds: bool
    text: str
    void: bool = False
    change: float | None = None


def chosen(rows: Rows, **match: Any) -> Rows:
    """Return the rows with these values.

    Raises:
        LookupError: If there is none: a claim on no figures would hold of anything.
    """
    found = [row for row in rows if all(row[name] == value for name, value in match.items())]
    if not found:
        raise LookupError(f"There are no figures of {match}; measure them again.")
    return found


def mean(rows: Rows, field: str, **match: Any) -> float:
    """Return the mean of a field over the rows with these values: over draws."""
    return float(np.mean([row[field] for row in chosen(rows, **match)]))


def values(rows: Rows, field: str) -> list[Any]:
    """Return the distinct values of a field, in order of appearance."""
    return list(dict.fromkeys(row[field] for row in rows))


def places(rows: Rows, *fields: str) -> Iterator[dict[str, Any]]:
    """Return every combination of these fields that rows have, in order of appearance."""
    seen = dict.fromkeys(tuple(row[field] for field in fields) for row in rows)
    return (dict(zip(fields, found, strict=True)) for found in seen)


def at(place: dict[str, Any]) -> str:
    """Return a place in words."""
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in place.values())


def _less(rows: Rows, low: str, high: str, where: str, *, field: str = "kl", **place: Any) -> Case:
    """Return the case that one rule's mean is below another's; void where they never differ."""
    a, b = (mean(rows, field, rule=rule, **place) for rule in (low, high))
    each = [[row[field] for row in chosen(rows, rule=rule, **place)] for rule in (low, high)]
    text = f"{low} {a:.6g}, {high} {b:.6g} ({a / b - 1:+.2%})"
    return Case(where, a < b, text, void=each[0] == each[1], change=a / b - 1)


def uniform_losses(figures: Figures) -> Iterator[Case]:
    """1a: perplexity by width."""
    full = {row["model"]: row["perplexity"] for row in figures["full"]}
    for place in places(figures["uniform"], "model", "quantizer", "group"):
        rise = {
            bits: mean(figures["uniform"], "perplexity", bits=bits, **place) / full[place["model"]]
            - 1
            for bits in (2, 3, 4, 8)
        }
        holds = (
            abs(rise[8]) < LOSSLESS
            and rise[8] < rise[4] < NEAR
            and rise[4] < rise[3] < MODERATE
            and rise[2] > WORSE * rise[3]
        )
        text = ", ".join(f"{bits}: {rise[bits]:+.2%}" for bits in (8, 4, 3, 2))
        yield Case(at(place), holds, text)


def error_halves(figures: Figures) -> Iterator[Case]:
    """1b: the output error per bit."""
    for row in figures["error_ratio"]:
        place = {name: row[name] for name in ("model", "quantizer", "group", "step")}
        yield Case(at(place), HALVING[0] <= row["median"] <= HALVING[1], f"{row['median']:.2f}")


def _at(figures: Figures, budgets: tuple[float, ...] = (2.5, 3.0)) -> Iterator[dict[str, Any]]:
    return (p for p in places(figures["maps"], "model", "budget") if p["budget"] in budgets)


def usage_order(figures: Figures) -> Iterator[Case]:
    """3a: random, routing weight, frequency."""
    for place in _at(figures):
        for low, high in (("routing-weight", RANDOM), ("frequency", "routing-weight")):
            yield _less(figures["maps"], low, high, f"{at(place)}, {low} below {high}", **place)


def error_beats_signals(figures: Figures) -> Iterator[Case]:
    """3b: output error against single signals."""
    for place in _at(figures):
        for rule in SINGLE_SIGNALS:
            where = f"{at(place)}, {rule}"
            yield _less(figures["maps"], "error-layer", rule, where, **place)


def rules_beat_random(figures: Figures) -> Iterator[Case]:
    """3c: every rule against random maps."""
    for place in _at(figures):
        for rule in (*SINGLE_SIGNALS, *PROGRAMS):
            yield _less(figures["maps"], rule, RANDOM, f"{at(place)}, {rule}", **place)


def mixed_beats_fair(figures: Figures) -> Iterator[Case]:
    """4a: mixed against the evenly spaced mix."""
    for place in places(figures["maps"], "model", "budget"):
        yield _less(figures["maps"], "mckp", FAIR, at(place), **place)


def pmq_may_lose(figures: Figures) -> Iterator[Case]:
    """4b: whether PMQ loses anywhere."""
    lost = [
        at(place)
        for place in places(figures["maps"], "model", "budget")
        if _less(figures["maps"], FAIR, "pmq-paper", "", **place).holds
    ]
    yield Case("anywhere", bool(lost), f"it loses at {', '.join(lost) or 'none'}")


def _gain(figures: Figures, **place: Any) -> float:
    mixed, fair = (mean(figures["maps"], "kl", rule=rule, **place) for rule in ("mckp", FAIR))
    return 1 - mixed / fair


def many_experts_gain_more(figures: Figures) -> Iterator[Case]:
    """4c: the gain by number of experts."""
    counts = {row["model"]: row["experts_per_layer"] for row in figures["full"]}
    many, few = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    for budget in (2.25, 2.5):
        a, b = (_gain(figures, model=model, budget=budget) for model in (many, few))
        text = f"{many} ({counts[many]} a layer) {a:+.1%}, {few} ({counts[few]}) {b:+.1%}"
        yield Case(f"{budget:g}", a > b, text)


def finer_is_better(figures: Figures) -> Iterator[Case]:
    """5a: projections, experts, layers."""
    rows = figures["granularity"]
    for place in places(rows, "model", "budget"):
        for low, high in (("projection", "expert"), ("expert", "layer")):
            yield _less(rows, low, high, f"{at(place)}, {low} below {high}", **place)


def down_is_sensitive(figures: Figures) -> Iterator[Case]:
    """5b: down against gate and up."""
    for place in places(figures["sides"], "model", "bits"):
        down, up = (
            mean(figures["sides"], "kl_per_million", side=side, **place)
            for side in ("down", "gate_up")
        )
        yield Case(at(place), down > up, f"down {down:.3g}, gate+up {up:.3g}")


def global_beats_local(figures: Figures) -> Iterator[Case]:
    """6a: one budget against one per layer."""
    for place in places(figures["maps"], "model", "budget"):
        for local in ("pmq-paper", "error-layer"):
            yield _less(figures["maps"], "gemq", local, f"{at(place)}, {local}", **place)


def gap_grows(figures: Figures) -> Iterator[Case]:
    """6b: that gap at the least budget and the largest."""
    budgets = sorted(values(figures["maps"], "budget"))
    for model in values(figures["maps"], "model"):
        gaps = [
            mean(figures["maps"], "perplexity", rule="pmq-paper", model=model, budget=budget)
            / mean(figures["maps"], "perplexity", rule="gemq", model=model, budget=budget)
            - 1
            for budget in budgets
        ]
        text = ", ".join(f"{b:g}: {gap:+.2%}" for b, gap in zip(budgets, gaps, strict=True))
        yield Case(model, gaps[0] > gaps[-1], text)


def unscaled_global_is_bad(figures: Figures) -> Iterator[Case]:
    """6c: the un-scaled global budget."""
    for place in places(figures["maps"], "model", "budget"):
        yield _less(figures["maps"], "error-layer", "error-model", at(place), **place)


def _layer_means(figures: Figures) -> Iterator[tuple[str, list[float]]]:
    for place in places(figures["layers"], "model", "budget"):
        found = [row["bits"] for row in chosen(figures["layers"], **place)]
        yield at(place), np.mean(found, axis=0).tolist()


def first_layer(figures: Figures) -> Iterator[Case]:
    """7a: bits of the first layer."""
    for where, bits in _layer_means(figures):
        yield Case(where, bits[0] > np.mean(bits[1:-1]), _shown(bits))


def last_layer(figures: Figures) -> Iterator[Case]:
    """7b: bits of the last layer."""
    for where, bits in _layer_means(figures):
        yield Case(where, bits[-1] > np.mean(bits[1:-1]), _shown(bits))


def _shown(bits: list[float]) -> str:
    return "layers " + " ".join(f"{b:.2f}" for b in bits)


def super_experts(figures: Figures) -> Iterator[Case]:
    """7c: bits of super experts."""
    for row in figures["layers"]:
        where = at({name: row[name] for name in ("model", "draw", "budget")})
        least = min(row["super_bits"])
        count = len(row["super_bits"])
        text = f"{count} of them, least {least} bits, the map's widest {row['widest']}"
        yield Case(where, least == row["widest"], text)


def own_domain(figures: Figures) -> Iterator[Case]:
    """9a: own text against the other."""
    rows = chosen(figures["domains"], rule="frequency")
    for place in places(rows, "model", "judged"):
        own = mean(rows, "kl", calibrated=place["judged"], **place)
        other = np.mean([r["kl"] for r in chosen(rows, **place) if r["calibrated"] != r["judged"]])
        yield Case(at(place), bool(own < other), f"own {own:.4g}, other {other:.4g}")


def _domain_against_fair(figures: Figures, *, own: bool) -> Iterator[Case]:
    rows = chosen(figures["domains"], rule="frequency")
    for place in places(rows, "model", "judged"):
        fair = mean(figures["domains"], "kl", rule=FAIR, **place)
        found = [r["kl"] for r in chosen(rows, **place) if (r["calibrated"] == r["judged"]) == own]
        kl = float(np.mean(found))
        text = f"frequency {kl:.4g}, fair uniform {fair:.4g}"
        yield Case(at(place), kl < fair if own else kl > fair, text)


def in_domain_helps(figures: Figures) -> Iterator[Case]:
    """9b: frequency against fair uniform on its own text."""
    return _domain_against_fair(figures, own=True)


def out_of_domain_hurts(figures: Figures) -> Iterator[Case]:
    """9c: likewise on the other text."""
    return _domain_against_fair(figures, own=False)


def cold_is_fast(figures: Figures) -> Iterator[Case]:
    """10a: latency of wide cold experts."""
    for place in places(figures["latency"], "model", "budget", "device", "batch"):
        yield _less(
            figures["latency"],
            "inverse-frequency",
            "frequency",
            at(place),
            field="latency_s",
            **place,
        )


def cold_reads_less(figures: Figures) -> Iterator[Case]:
    """10b: bits that they read."""
    for place in _at(figures):
        yield _less(
            figures["maps"],
            "inverse-frequency",
            "frequency",
            at(place),
            field="traffic_bits",
            **place,
        )


def hot_errs_less(figures: Figures) -> Iterator[Case]:
    """10c: error of wide hot experts."""
    for place in _at(figures):
        yield _less(figures["maps"], "frequency", "inverse-frequency", at(place), **place)


def signals_tie(figures: Figures) -> Iterator[Case]:
    """11a: weight statistics of identical experts."""
    for row in figures["upcycled_signals"]:
        where = f"{row['model']} {row['signal']}"
        yield Case(where, row["spread"] == 0.0, f"spread within layers {row['spread']:g}")


def data_free_wins_nothing(figures: Figures) -> Iterator[Case]:
    """11b: a data-free rule on identical experts."""
    rows = figures["upcycled"]
    for place in places(rows, "model"):
        fair, kl = (mean(rows, "kl", rule=rule, **place) for rule in (FAIR, "mopeq-layer"))
        text = f"mopeq-layer {kl:.4g}, fair uniform {fair:.4g}"
        yield Case(at(place), kl >= (1 - TIED) * fair, text)


def usage_wins(figures: Figures) -> Iterator[Case]:
    """11c: usage on identical experts."""
    for place in places(figures["upcycled"], "model"):
        yield _less(figures["upcycled"], "frequency-layer", FAIR, at(place), **place)


def shift_rises(figures: Figures) -> Iterator[Case]:
    """12a: changed selections by width."""
    for place in places(figures["uniform"], "model", "quantizer", "group"):
        shift = [
            mean(figures["uniform"], "router_shift", bits=bits, **place) for bits in (8, 4, 3, 2)
        ]
        yield Case(at(place), shift == sorted(set(shift)), " ".join(f"{s:.2%}" for s in shift))


def shift_is_near(figures: Figures) -> Iterator[Case]:
    """12b: where newly selected experts ranked."""
    for row in chosen(figures["routing"], bits=2):
        text = (
            f"{row['near']:.1%} of the newly selected in the first {row['ranks']} ranks "
            f"(by chance {row['chance']:.0%})"
        )
        yield Case(row["model"], row["near"] >= NEAR_SHARE, text)


def certified_never_flip(figures: Figures) -> Iterator[Case]:
    """12c: tokens within their radius."""
    for row in figures["routing"]:
        text = f"{row['certified']:.1%} of tokens certified, {row['flips']} of them flipped"
        yield Case(f"{row['model']} {row['bits']}", row["flips"] == 0, text)
