"""How fast the exact knapsack is at the size of the largest models, and how far from its bound.

    python benchmarks/knapsack.py [--experts 15000] [--mip-experts 1000] [--seeds 3]

Instances of five widths. Damage falls by about 4 per bit; experts differ by a log-normal factor.
"Unequal" experts have the widths of several models. "Correlated" damage is nearly proportional to
an expert's number of weights, so that all experts pay alike: the hard case of knapsacks. "Twins"
are experts that are all the same, as after sparse upcycling. The gap to the bound is the value
minus the Lagrangian bound, over the value; the proven gap is what is left of it once the core has
been solved to optimality. HiGHS, the branch and bound in scipy, solves smaller ones whole, with
its gap at 1e-9. Seconds are those of the processor, so that a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from dmpq.formats import Menu
from dmpq.solvers.knapsack import Mckp, solve_mckp, solve_mip

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")

MENU: Final = Menu.parse("2,3,4,8,16")
BUDGET: Final = 3.0
"""Effective bits per weight."""

HIDDEN, INTERMEDIATE = (1024, 2048, 2816), (768, 1024, 1408, 1536)
KINDS: Final = ("equal", "unequal", "correlated, equal", "correlated, unequal", "twins")


def instance(kind: str, experts: int, seed: int) -> tuple[Floats, Ints, int]:
    """Return values (D, B), sizes (D, B) in bits, and the capacity."""
    rng = np.random.default_rng(seed)
    unequal = kind.endswith("unequal")
    hidden = rng.choice(HIDDEN, experts) if unequal else np.full(experts, HIDDEN[1])
    inner = rng.choice(INTERMEDIATE, experts) if unequal else np.full(experts, INTERMEDIATE[1])
    sizes = np.array(
        [
            MENU.stored_bits((2 * i, h)) + MENU.stored_bits((h, i))
            for h, i in zip(hidden.tolist(), inner.tolist(), strict=True)
        ]
    )
    weights = 3 * hidden * inner
    curve = np.where(MENU.bits == 16, 0.0, 4.0 ** (2.0 - MENU.bits))
    if kind == "twins":
        values = np.tile(curve, (experts, 1))
    elif kind.startswith("correlated"):
        jitter = 1 + 0.001 * rng.standard_normal((experts, len(MENU)))
        values = weights[:, None] / weights.mean() * curve * jitter
    else:
        jitter = np.exp(rng.normal(0, 0.2, (experts, len(MENU))))
        values = np.exp(rng.normal(-6, 1.5, (experts, 1))) * curve * jitter
    return values, sizes, int(BUDGET * weights.sum())


def timed(solve: Callable[[], T]) -> tuple[T, float]:
    """Return what a solver found, and the processor's seconds."""
    start = time.process_time()
    choice = solve()
    return choice, time.process_time() - start


def main() -> None:
    """Solve and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=15_000)
    parser.add_argument("--mip-experts", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.experts} experts x {len(MENU)} widths, {BUDGET} effective bits")
    for kind in KINDS:
        for seed in range(options.seeds):
            values, sizes, capacity = instance(kind, options.experts, seed)
            (choice, proven), seconds = timed(
                lambda v=values, s=sizes, c=capacity: Mckp(s, c).solve_proven(v)
            )
            rows = np.arange(len(values))
            assert sizes[rows, choice].sum() <= capacity
            value = float(values[rows, choice].sum())
            gap = (value - Mckp(sizes, capacity).bound(values)) / value
            print(
                f"{kind:>20}, seed {seed}: {seconds:5.2f} s, proven gap {proven:.1e}, "
                f"to the bound {gap:.1e}",
                flush=True,
            )
    print(f"{options.mip_experts} experts, against HiGHS alone")
    for kind in KINDS:
        values, sizes, capacity = instance(kind, options.mip_experts, 0)
        choice, own = timed(lambda v=values, s=sizes, c=capacity: solve_mckp(v, s, c))
        other, mip = timed(lambda v=values, s=sizes, c=capacity: solve_mip(v, s[None], [c]))
        rows = np.arange(len(values))
        found = [float(values[rows, one].sum()) for one in (choice, other)]
        print(
            f"{kind:>20}: {own:.3f} s, HiGHS {mip:.2f} s ({mip / own:.0f}x), "
            f"its value {found[1] / found[0] - 1:+.1e} of ours",
            flush=True,
        )


if __name__ == "__main__":
    main()
