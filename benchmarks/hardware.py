"""Count bit maps that the analytical model prices per second, together and one at a time.

    python benchmarks/hardware.py [--maps 10000]

A model of 1,024 experts in 16 layers (OLMoE-1B-7B), random maps, one core. Seconds are of the
processor, so that other programs on the machine do not count; the best of a few runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from dmpq.formats import Menu
from dmpq.hw_models import Workload, load_hardware
from dmpq.spec import load_geometry

AIM = 10_000
ALONE = 200
RUNS = 5
CASES = (
    ("a100", Workload(), 1),
    ("h100", Workload(batch=64), 1),
    ("cpu", Workload("prefill", batch=4), 1),
    ("a100", Workload(), 2),
)


def least_seconds(work: Callable[[], object]) -> float:
    """Return processor seconds, the least of some runs."""
    least = np.inf
    for _ in range(RUNS):
        mark = time.process_time()
        work()
        least = min(least, time.process_time() - mark)
    return float(least)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, default=10_000)
    count = parser.parse_args().maps
    spec, menu = load_geometry("olmoe-1b-7b"), Menu()
    rng = np.random.default_rng(0)
    inclusion = rng.dirichlet(np.ones(64), 16).ravel().clip(0, 0.125) * 8
    print("device  workload              decisions  maps/s together  maps/s alone  ratio")
    for name, workload, columns in CASES:
        model = load_hardware(name)
        maps = rng.integers(0, len(menu), (count, columns * spec.num_experts))

        def together(model=model, maps=maps, workload=workload) -> None:  # noqa: ANN001
            model.cost(spec, menu, maps, workload, inclusion=inclusion)

        def alone(model=model, maps=maps, workload=workload) -> None:  # noqa: ANN001
            for one in maps[:ALONE]:
                model.cost(spec, menu, one[None], workload, inclusion=inclusion)

        fast, slow = count / least_seconds(together), ALONE / least_seconds(alone)
        what = f"{workload.phase}, batch {workload.batch}"
        short = "" if fast >= AIM else f"  below the aim of {AIM:,}"
        print(
            f"{name:6}  {what:20}  {maps.shape[1]:9,}  {fast:15,.0f}  {slow:12,.0f}"
            f"  {fast / slow:5.1f}{short}"
        )


if __name__ == "__main__":
    main()
