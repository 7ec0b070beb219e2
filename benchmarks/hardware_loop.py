"""How well costs predict whole maps on this CPU: analytical, of isolated kernels, and corrected.

    python benchmarks/hardware_loop.py [--batch 1] [--maps 16] [--threads 1]

The routed experts of the reference model at OLMoE-1B-7B's widths, routed as profiled. Maps are
random mixes of formats and knapsack maps of several budgets. Some correct the costs, as a search
with ``--measure-every`` does; the others, never used for that, judge. All are measured in random
order, so that a machine that gets busier or idler does so for all, and those that judge once more
after that: the second time shows how well anything could predict the first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from dmpq.hw_models import HardwareModel, Workload, load_hardware
from dmpq.hw_models.bench import host_bench
from dmpq.hw_models.corrected import CorrectedModel
from dmpq.hw_models.live import LiveModel
from dmpq.hw_models.whole import WholeMaps
from dmpq.objective import Constraints, Weights
from dmpq.problem import Problem
from dmpq.profile import Profile, reference_profile
from dmpq.spec import load_geometry

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEAST_BITS, MOST_BITS = 2.5, 14.0
"""Budgets of the knapsack maps, effective bits."""


def random_maps(profile: Profile, count: int, rng: np.random.Generator) -> list[Ints]:
    """Return maps of random mixes: how much of each format is random as well, (N,) each."""
    formats, experts = len(profile.menu), profile.spec.num_experts
    return [rng.choice(formats, experts, p=rng.dirichlet(np.ones(formats))) for _ in range(count)]


def knapsack_maps(profile: Profile, count: int) -> list[Ints]:
    """Return the best maps for evenly spaced budgets by the profile's surrogate, (N,) each."""
    return [
        Problem(
            profile=profile,
            hardware=load_hardware("a100"),
            cost_spec=profile.spec,
            weights=Weights.parse("acc=1"),
            constraints=Constraints(avg_bits=float(bits)),
        ).mckp()
        for bits in np.linspace(LEAST_BITS, MOST_BITS, count)
    ]


class Ablation:
    """One workload's maps, measured once each, and what cost models make of them."""

    def __init__(self, whole: WholeMaps) -> None:
        self.whole = whole

    def seconds(self, maps: list[Ints]) -> Floats:
        """Return the measured times of maps, (K,)."""
        return np.array([self.whole.measure(one).seconds for one in maps])

    def predicted(self, model: CorrectedModel, maps: list[Ints]) -> Floats:
        """Return a model's times of the maps' routed experts, (K,)."""
        whole = self.whole
        return np.array(
            [
                sum(
                    model.correction.of(kernel) * seconds
                    for kernel, seconds in model.parts(
                        whole.spec,
                        whole.menu,
                        one,
                        whole.workload,
                        inclusion=whole.inclusion,
                        layers=whole.layers,
                    ).items()
                )
                for one in maps
            ]
        )

    def corrected(self, base: HardwareModel, maps: list[Ints], seconds: Floats) -> CorrectedModel:
        """Return a model corrected by measured maps; formats that the base prices alike share."""
        shared = isinstance(base, LiveModel)
        model = CorrectedModel(base, self.whole.kernel_of) if shared else CorrectedModel(base)
        whole = self.whole
        for one, time in zip(maps, seconds, strict=True):
            model.observe(
                whole.spec,
                whole.menu,
                one,
                whole.workload,
                float(time),
                inclusion=whole.inclusion,
                layers=whole.layers,
            )
        return model


def line(name: str, measured: Floats, predicted: Floats) -> str:
    """Return a row of the table."""
    error = predicted / measured - 1
    tau = kendalltau(measured, predicted).statistic
    return (
        f"{name:44} {np.abs(error).mean():7.1%} {np.abs(error).max():8.1%} {error.mean():+8.1%} "
        f"{tau:6.2f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--maps", type=int, default=16, help="maps that judge")
    parser.add_argument("--corrections", type=int, default=12, help="mixed maps that correct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    profile = reference_profile()
    spec = profile.spec.with_widths_of(load_geometry("olmoe-1b-7b"))
    workload, bench = Workload(batch=asked.batch), host_bench(threads=asked.threads)
    whole = WholeMaps(bench, spec, profile.menu, workload, profile.frequency, asked.seed)
    ablation = Ablation(whole)

    judged, correcting = asked.maps, asked.corrections
    half = judged // 2
    tests = [*random_maps(profile, judged - half, rng), *knapsack_maps(profile, half)]
    firsts = {whole.kernel_of(fmt): i for i, fmt in enumerate(profile.menu.formats)}
    uniform = [np.full(spec.num_experts, i) for i in firsts.values()]
    mixed = random_maps(profile, correcting, rng)
    if {one.tobytes() for one in tests} & {one.tobytes() for one in (*uniform, *mixed)}:
        raise AssertionError("a map that judges corrects as well")
    print(f"{bench.device}, {bench.stack}; decode, batch {asked.batch}")
    print(
        f"{len(whole.layers)} of {len(spec.moe_layers)} layers, {whole.steps} drawn steps; "
        f"{judged} maps judge, {len(uniform)} uniform and {correcting} mixed maps correct"
    )
    with tempfile.TemporaryDirectory() as folder:
        isolated = LiveModel(bench, folder=Path(folder))
        isolated.expert_latency(spec, profile.menu, workload, inclusion=profile.frequency)
        maps = [*uniform, *mixed, *tests]
        order = rng.permutation(len(maps))
        seconds = np.zeros(len(maps))
        seconds[order] = ablation.seconds([maps[i] for i in order])
        anchors, more, first = np.split(seconds, [len(uniform), len(uniform) + len(mixed)])
        second = ablation.seconds(tests)
        print(
            f"a step's routed experts take {first.min() * 1e3:.2f} to {first.max() * 1e3:.2f} ms"
        )
        print(f"\n{'costs':44} {'MAPE':>7} {'worst':>8} {'bias':>8} {'tau':>6}")
        models = {"analytical (cpu.json)": load_hardware("cpu"), "isolated kernels": isolated}
        for name, base in models.items():
            both = [*uniform, *mixed], np.concatenate([anchors, more])
            for said, seen, times in (
                ("", [], anchors[:0]),
                (f", corrected by {len(uniform)} maps", uniform, anchors),
                (f", corrected by {len(both[0])} maps", *both),
            ):
                model = ablation.corrected(base, seen, times)
                print(line(name + said, first, ablation.predicted(model, tests)))
        print(line("measured again", first, second))
        print("\nfactors of the isolated kernels' times")
        for kernel, factor in model.correction.factors.items():
            print(f"  {factor.value:.3f} ± {factor.deviation:.3f}  {kernel}")


if __name__ == "__main__":
    main()
