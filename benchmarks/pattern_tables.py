"""The page on the literature's patterns: the verdicts, the numbers behind them, what failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from pattern_cases import (
    FAIR,
    PROGRAMS,
    RANDOM,
    SINGLE_SIGNALS,
    Case,
    Figures,
    Rows,
    at,
    chosen,
    mean,
    places,
    values,
)
from pattern_claims import CLAIMS, Claim

_LISTED: Final = 16
"""Failed cases of a claim that are listed one by one."""

_HEAD: Final = """\
# The patterns of the literature, checked

Made by `python benchmarks/patterns.py`; do not edit. The claims are those of section 6 of the
project's notes on MoE quantization. Each has a predicate, and is *reproduced* where that holds in
every case, on small trained models of this repository:

{models}

The predicates and their thresholds (`benchmarks/pattern_cases.py`) were committed before the
figures were made. Perplexities of HQQ's uniform maps in the default groups had been seen before,
in the reference model's card and in a timing run. One thing was changed afterwards: where both
rules of a case gave the same maps on every draw, it is *void* and not counted, instead of false.

Everything is judged on the same held-out text on all draws. Profiles are measured on {draws}
calibration draws, of {profile} tokens for the reference model and half as many for others;
spreads are standard deviations over draws (over maps and draws for random maps). Budgets are
averages of nominal widths; every width but 16 takes the same scales on top. A case holds by the
sign of the mean's difference, however small: where differences are within the spread, a claim that
fails in few cases is undecided rather than refuted. Latencies are analytical, at the widths of
OLMoE-1B-7B. These are models of 0.8 to 2 million parameters on the text of one language's
library; what fails here may hold of larger ones, and the reverse.
"""


def page(settings: dict[str, Any], figures: Figures) -> str:
    """Return the page, Markdown."""
    models = "\n".join(
        f"- `{r['model']}`: {r['layers']} MoE layers of {r['experts_per_layer']} experts, "
        f"{r['top_k']} per token; judged on {r['heldout_tokens']:,} tokens (bytes)"
        for r in figures["full"]
    )
    head = _HEAD.format(
        models=models,
        draws=len(settings["draws"]),
        profile=f"{settings['profile_tokens']:,}",
    )
    lines = [head, "## Verdicts", "", *_verdicts(figures), ""]
    lines += ["## The numbers", "", *_numbers(figures)]
    lines += ["## Cases that fail", "", *_failed(figures)]
    return "\n".join(lines).rstrip() + "\n"


def _verdicts(figures: Figures) -> Iterator[str]:
    yield from _header(("", "claim", "source", "asked of each case", "measured", "verdict"))
    for claim in CLAIMS:
        verdict, right, cases = claim.verdict(figures)
        measured = ""
        tested = claim.all_cases(figures)
        if tested:
            case, void = _example(tested), len(tested) - cases
            same = f" ({void} more void)" if void else ""
            measured = (
                f"{right} of {cases} cases{same}{_changes(tested)}; {case.where}: {case.text}"
            )
        words = (claim.key, claim.text, claim.source, claim.predicate, measured, f"**{verdict}**")
        yield _row(words)


def _changes(cases: list[Case]) -> str:
    """Return the range of the relative differences: a sign alone may say too much."""
    found = [case.change for case in cases if case.change is not None and not case.void]
    return f", by {min(found):+.2%} to {max(found):+.2%}" if found else ""


def _example(cases: list[Case]) -> Case:
    """Return the case that stands for others in the table: at 2.5 bits, where there is one."""
    return next((case for case in cases if "reference 2.5" in case.where), cases[0])


def _numbers(figures: Figures) -> Iterator[str]:
    parts = {
        "Uniform maps: perplexity (KL, nats per token)": _uniform,
        "Times by which the output error falls per bit: median expert (10th to 90th percentile)": (
            _ratios
        ),
        "Every rule: held-out KL": _rules,
        "Programs and budgets: held-out KL (perplexity)": _programs,
        "What shares one format: held-out KL": _granularity,
        "One kind of matrix quantized: held-out KL per million weights": _sides,
        "Mean bits by layer in the knapsack's map": _layers,
        "Frequency maps by text: held-out KL at 2.5 bits": _domains,
        "Wide hot and wide cold experts: bits read per weight, and held-out KL": _traffic,
        "Their decode latency, milliseconds": _latency,
        "Identical experts: held-out KL at 2.5 bits": _upcycled,
        "Changed selections": _routing,
    }
    for title, part in parts.items():
        yield from (f"### {title}", "", *part(figures), "")


def _failed(figures: Figures) -> Iterator[str]:
    for claim in CLAIMS:
        wrong = _wrong(claim, figures)
        if not wrong:
            continue
        yield from (f"**{claim.key}** {claim.text}: {len(wrong)}", "")
        yield from (f"- {case.where}: {case.text}" for case in wrong[:_LISTED])
        if len(wrong) > _LISTED:
            yield f"- and {len(wrong) - _LISTED} more"
        yield ""


def _wrong(claim: Claim, figures: Figures) -> list[Case]:
    return [case for case in claim.all_cases(figures) if not (case.holds or case.void)]


def _header(names: Sequence[str], words: int = 6) -> Iterator[str]:
    """Return a table's head: so many columns of words, the others of numbers."""
    yield _row(names)
    yield _row(["---" if i < words else "---:" for i in range(len(names))])


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _spread(rows: Rows, field: str = "kl", **place: Any) -> str:
    """Return mean and standard deviation over draws; the mean alone where they are all alike."""
    found = np.array([row[field] for row in chosen(rows, **place)])
    shown = f"{found.mean():.4f}"
    return shown if np.ptp(found) == 0 else f"{shown} ± {found.std(ddof=1):.4f}"


def _uniform(figures: Figures) -> Iterator[str]:
    rows, widths = figures["uniform"], (8, 4, 3, 2)
    full = {row["model"]: row["perplexity"] for row in figures["full"]}
    yield from _header(
        ("model", "quantizer", "group", "16 bits", *(f"{b} bits" for b in widths)), 2
    )
    for place in places(rows, "model", "quantizer", "group"):
        cells = [
            f"{mean(rows, 'perplexity', bits=b, **place):.3f} "
            f"({mean(rows, 'kl', bits=b, **place):.4f})"
            for b in widths
        ]
        yield _row((*place.values(), f"{full[place['model']]:.3f}", *cells))


def _ratios(figures: Figures) -> Iterator[str]:
    rows = figures["error_ratio"]
    steps = values(rows, "step")
    yield from _header(("model", "quantizer", "group", *(f"{s} bits" for s in steps)), 2)
    for place in places(rows, "model", "quantizer", "group"):
        found = [chosen(rows, step=step, **place)[0] for step in steps]
        cells = [f"{r['median']:.2f} ({r['least']:.2f} to {r['most']:.2f})" for r in found]
        yield _row((*place.values(), *cells))


def _rules(figures: Figures) -> Iterator[str]:
    rows = figures["maps"]
    shared = [p for p in places(rows, "model", "budget") if p["budget"] in (2.5, 3.0)]
    yield from _header(("rule", *map(at, shared)), 1)
    for rule in (RANDOM, FAIR, *SINGLE_SIGNALS, "error-model", *PROGRAMS):
        yield _row((rule, *(_spread(rows, rule=rule, **place) for place in shared)))


def _programs(figures: Figures) -> Iterator[str]:
    rows, rules = figures["maps"], (FAIR, "error-model", *PROGRAMS)
    yield from _header(("model", "budget", *rules, "mckp below fair"), 1)
    for place in places(rows, "model", "budget"):
        cells = [
            f"{_spread(rows, rule=rule, **place)} "
            f"({mean(rows, 'perplexity', rule=rule, **place):.3f})"
            for rule in rules
        ]
        saved = 1 - mean(rows, "kl", rule="mckp", **place) / mean(rows, "kl", rule=FAIR, **place)
        yield _row((*place.values(), *cells, f"{saved:+.1%}"))


def _granularity(figures: Figures) -> Iterator[str]:
    yield from _by_rule(figures["granularity"], ("model", "budget"))


def _by_rule(rows: Rows, fields: Sequence[str]) -> Iterator[str]:
    rules = values(rows, "rule")
    yield from _header((*fields, *rules), len(fields))
    for place in places(rows, *fields):
        yield _row((*place.values(), *(_spread(rows, rule=rule, **place) for rule in rules)))


def _sides(figures: Figures) -> Iterator[str]:
    rows = figures["sides"]
    yield from _header(("model", "bits", "gate and up", "down"), 1)
    for place in places(rows, "model", "bits"):
        found = (mean(rows, "kl_per_million", side=s, **place) for s in ("gate_up", "down"))
        yield _row((*place.values(), *(f"{kl:.4f}" for kl in found)))


def _layers(figures: Figures) -> Iterator[str]:
    rows = figures["layers"]
    yield from _header(("model", "budget", "layers in order", "super experts, by draw"), 4)
    for place in places(rows, "model", "budget"):
        found = chosen(rows, **place)
        bits = " ".join(f"{b:.2f}" for b in np.mean([r["bits"] for r in found], axis=0))
        stars = "; ".join(f"{r['super_bits']} of at most {r['widest']}" for r in found)
        yield _row((*place.values(), bits, stars))


def _domains(figures: Figures) -> Iterator[str]:
    rows = figures["domains"]
    yield from _header(("model", "judged on", "rule", "calibrated on code", "on prose"), 3)
    for place in places(rows, "model", "judged", "rule"):
        found = (_spread(rows, calibrated=kind, **place) for kind in ("code", "prose"))
        yield _row((*place.values(), *found))


def _traffic(figures: Figures) -> Iterator[str]:
    rows = figures["maps"]
    rules = ("frequency", FAIR, "inverse-frequency")
    yield from _header(("model", "budget", *(f"{r}: bits read; KL" for r in rules)), 1)
    for place in places(figures["latency"], "model", "budget"):
        cells = (
            f"{mean(rows, 'traffic_bits', rule=r, **place):.3f}; {_spread(rows, rule=r, **place)}"
            for r in rules
        )
        yield _row((*place.values(), *cells))


def _latency(figures: Figures) -> Iterator[str]:
    rows = [row | {"ms": 1e3 * row["latency_s"]} for row in figures["latency"]]
    rules = ("frequency", FAIR, "inverse-frequency")
    yield from _header(("model", "budget", "device", "batch", *rules), 3)
    for place in places(rows, "model", "budget", "device", "batch"):
        yield _row((*place.values(), *(_spread(rows, "ms", rule=r, **place) for r in rules)))


def _upcycled(figures: Figures) -> Iterator[str]:
    yield from _by_rule(figures["upcycled"], ("model",))


def _routing(figures: Figures) -> Iterator[str]:
    rows = figures["routing"]
    names = ("newly selected", "of them in the first 16/6 k", "by chance", "certified", "flips")
    yield from _header(("model", "bits", "selections changed", *names), 1)
    for row in rows:
        place = {name: row[name] for name in ("model", "bits", "group")}
        shift = mean(figures["uniform"], "router_shift", quantizer="hqq", **place)
        shares = [f"{row[name]:.1%}" for name in ("near", "chance", "certified")]
        cells = (f"{shift:.2%}", f"{row['new']:,}", *shares, row["flips"])
        yield _row((row["model"], row["bits"], *cells))
