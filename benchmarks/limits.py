"""How often a projection finds the best map within several limits, against every map there is.

    python benchmarks/limits.py [--problems 40]

Small problems cut out of the reference profile, random devices, workloads, importances and limits;
every map is priced, so that the best one within the limits is known. A gap is a share of the range
of all maps' values. Half of the limits are tight: exactly what a map costs that no other beats, so
that few maps or only that one are within them. Impossible limits are drawn as well: each a little
below what the map takes that needs least of one limit and meets the others.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import fields, replace

import numpy as np

from dmpq.errors import InputError
from dmpq.hw_models import Workload, load_hardware
from dmpq.objective import Constraints, Weights
from dmpq.problem import Problem
from dmpq.profile import Profile, reference_profile
from dmpq.spec import load_geometry

SHAPES = ((1, 6), (2, 3), (3, 2))
DEVICES = ("a100", "a100/sglang", "h100", "rtx4090", "cpu")
WORKLOADS = (Workload(), Workload(batch=32, context=512), Workload("prefill", 1, 256))
WEIGHTS = ("acc=1", "acc=1,lat=0.1,mem=0.1,eng=0.1")
KINDS = (
    ("avg_bits", "memory_bytes"),
    ("latency_s",),
    ("energy_j",),
    ("latency_s", "energy_j"),
    ("avg_bits", "latency_s"),
    ("avg_bits", "memory_bytes", "latency_s", "energy_j"),
)


def cut(profile: Profile, layers: int, experts: int, rng: np.random.Generator) -> Profile:
    """Return a profile of random experts of another."""
    spec = profile.spec
    kept = rng.choice(spec.num_experts, layers * experts, replace=False)
    own = tuple(
        replace(layer, num_experts=experts, top_k=min(2, experts))
        for layer in spec.moe_layers[:layers]
    )
    smaller = replace(spec, num_layers=layers, moe_layers=own)
    taken = {
        field.name: value[kept]
        for field in fields(Profile)
        if isinstance(value := getattr(profile, field.name), np.ndarray)
        and len(value) == spec.num_experts
    }
    return replace(profile, spec=smaller, **taken)


def random_problem(seed: int) -> tuple[Problem, np.random.Generator]:
    """Return a problem without limits that bind, and what draws the limits."""
    rng = np.random.default_rng(seed)
    profile = cut(reference_profile(), *SHAPES[seed % len(SHAPES)], rng)
    return Problem(
        profile=profile,
        hardware=load_hardware(str(rng.choice(DEVICES))),
        cost_spec=profile.spec.with_widths_of(load_geometry("olmoe-1b-7b")),
        workload=WORKLOADS[rng.integers(len(WORKLOADS))],
        weights=Weights.parse(str(rng.choice(WEIGHTS))),
        constraints=Constraints(),
    ), rng


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=40)
    count = parser.parse_args().problems
    gaps: dict[tuple[str, ...], list[float]] = {kind: [] for kind in KINDS}
    refused, below, proven, shortfalls = 0, 0, 0, []
    for seed in range(count):
        plain, rng = random_problem(seed)
        formats = range(len(plain.menu))
        maps = np.array(list(itertools.product(formats, repeat=plain.num_decisions)))
        cost, rows = plain.costs(maps), np.arange(plain.num_decisions)
        taken = vars(cost) | {"avg_bits": plain.effective_bits(maps)}
        for kind in KINDS:
            for limits in (loose(taken, kind, rng), tight(taken, kind, rng)):
                within = np.logical_and.reduce([taken[name] <= limits[name] for name in kind])
                try:
                    problem = replace(plain, constraints=Constraints(**limits))
                except InputError:
                    refused += bool(within.any())
                    continue
                values = problem.linear_values(rng.normal(0, 0.5, len(rows)))
                totals = values[rows, maps].sum(1)
                found = problem.project(values)
                if not problem.feasible(found[None])[0]:
                    raise AssertionError("a projection exceeds a limit")
                gap = values[rows, found].sum() - totals[within].min()
                gaps[kind].append(gap / np.ptp(totals))
            if set(kind) <= {"avg_bits", "memory_bytes"}:
                continue
            limits, name, least = impossible(taken, kind, rng)
            below += 1
            try:
                replace(plain, constraints=Constraints(**limits))
            except InputError as error:
                proven += "found" not in str(error)
            relaxation = replace(plain, constraints=Constraints(**limits | {name: least * 2}))
            bound = relaxation.projection.relaxation
            if bound is not None and name in ("latency_s", "energy_j"):
                shortfalls.append(1 - bound.least(name) / least)
    print("limits                                    problems  best found  mean gap  worst gap")
    for kind, found in gaps.items():
        best = np.mean(np.array(found) < 1e-12)
        print(
            f"{', '.join(kind):41} {len(found):8} {best:11.1%} {np.mean(found):9.5f}"
            f" {np.max(found):10.5f}"
        )
    print(f"{refused} of {2 * count * len(KINDS)} refused although a map exists")
    print(
        f"{below} impossible by 0.1%, {proven} of them proven to be; least time or energy within "
        f"the other limits: {np.mean(shortfalls):.2%} above its bound on average, "
        f"{np.max(shortfalls):.2%} at worst"
    )


Limits = dict[str, float]
Taken = dict[str, np.ndarray]


def loose(taken: Taken, kind: tuple[str, ...], rng: np.random.Generator) -> Limits:
    """Return limits at random quantiles of all maps' costs."""
    shares = rng.uniform(0.03, 0.6, len(kind))
    return {n: float(np.quantile(taken[n], q)) for n, q in zip(kind, shares, strict=True)}


def tight(taken: Taken, kind: tuple[str, ...], rng: np.random.Generator) -> Limits:
    """Return the costs of a map that no other beats."""
    prices = rng.uniform(0.1, 1, len(kind))
    spread = [np.ptp(taken[name]) or 1.0 for name in kind]
    priced = sum(p * taken[n] / s for n, p, s in zip(kind, prices, spread, strict=True))
    return {name: float(taken[name][np.argmin(priced)]) for name in kind}


def impossible(
    taken: Taken, kind: tuple[str, ...], rng: np.random.Generator
) -> tuple[Limits, str, float]:
    """Return limits that no map meets by 0.1% of one, that one, and what it would have to be."""
    limits = loose(taken, kind, rng)
    name = str(rng.choice([n for n in kind if n in ("latency_s", "energy_j")]))
    others = [taken[n] <= limits[n] for n in kind if n != name]
    inside = np.logical_and.reduce([np.ones(len(taken[name]), bool), *others])
    if not inside.any():
        return impossible(taken, (name,), rng)
    least = float(taken[name][inside].min())
    return limits | {name: least * 0.999}, name, least


if __name__ == "__main__":
    main()
