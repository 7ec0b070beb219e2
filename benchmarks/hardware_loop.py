"""How well costs predict whole maps, and what a search makes of them, on this CPU or GPU.

    python benchmarks/hardware_loop.py [--hw host] [--batch 1] [--maps 16] [--threads 1]

Three kinds of costs: analytical, of isolated kernels, and either corrected by measured maps.

The routed experts of the reference model at a real model's widths, routed as profiled. Maps are
random mixes of formats and knapsack maps of several budgets. Some correct the costs, as a search
with ``--measure-every`` does; the others, never used for that, judge. All are measured in random
order, so that a machine that gets busier or idler does so for all, and those that judge once more
after that: the second time shows how well anything could predict the first. At last each kind
chooses maps by the exact knapsack within limits on the time of the routed experts, and these are
measured: costs that are too low break the limit, costs that are too high leave accuracy unused.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from dmpq.errors import InputError
from dmpq.hw_models import HardwareModel, Workload, load_hardware
from dmpq.hw_models.bench import PowerSource, cuda_bench, host_bench
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
NO_ENERGY = PowerSource("analytical", "no part of this benchmark", assumed_w=1.0)
LIMITS = (0.25, 0.5, 0.75)
"""Limits of the searches: shares of the way from the fastest measured map to the slowest."""


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

    def searched(
        self, model: CorrectedModel, profile: Profile, limit_s: float
    ) -> tuple[float, float] | None:
        """Return what the knapsack finds within a limit on the routed experts: seconds, and KL.

        The time is measured, the KL the profile's sum; ``None`` where no map seems to suffice.
        """
        whole, base = self.whole, model.base
        about = whole.spec, whole.menu
        some = np.zeros(whole.spec.num_experts, np.int64)
        total = base.cost(*about, some[None], whole.workload, inclusion=whole.inclusion)
        routed, timed = (
            sum(
                model.parts(
                    *about, some, whole.workload, inclusion=whole.inclusion, layers=layers
                ).values()
            )
            for layers in (None, whole.layers)
        )
        others = float(total.latency_s[0]) - routed
        try:
            problem = Problem(
                profile=profile,
                hardware=model,
                cost_spec=whole.spec,
                workload=whole.workload,
                weights=Weights.parse("acc=1"),
                constraints=Constraints(latency_s=others + limit_s * routed / timed),
            )
            found = problem.mckp()
        except InputError:  # no map seems fast enough
            return None
        kl = float(problem.surrogate(found[None]).kl[0])
        return self.whole.measure(problem.expand(found[None])[0]).seconds, kl


def errors(measured: Floats, predicted: Floats) -> dict[str, float]:
    """Return how predictions differ from measurements."""
    error = predicted / measured - 1
    return {
        "mape": float(np.abs(error).mean()),
        "worst": float(np.abs(error).max()),
        "bias": float(error.mean()),
        "tau": float(kendalltau(measured, predicted).statistic),
    }


def line(name: str, row: dict[str, float]) -> str:
    """Return a row of the table."""
    return (
        f"{name:44} {row['mape']:7.1%} {row['worst']:8.1%} {row['bias']:+8.1%} {row['tau']:6.2f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hw", choices=("host", "cuda"), default="host")
    parser.add_argument("--analytical", help="device file to compare (default: cpu, or h100)")
    parser.add_argument("--geometry", default="olmoe-1b-7b", help="whose widths")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--maps", type=int, default=16, help="maps that judge")
    parser.add_argument("--corrections", type=int, default=12, help="mixed maps that correct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every figure as JSON")
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    profile = reference_profile()
    spec = profile.spec.with_widths_of(load_geometry(asked.geometry))
    workload = Workload(batch=asked.batch)
    bench = cuda_bench() if asked.hw == "cuda" else host_bench(threads=asked.threads)
    bench = replace(bench, power=NO_ENERGY)
    analytical = asked.analytical or ("h100" if asked.hw == "cuda" else "cpu")
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
    print(f"{bench.device}, {bench.stack}")
    print(f"at the widths of {asked.geometry}; decode, batch {asked.batch}")
    print(
        f"{len(whole.layers)} of {len(spec.moe_layers)} layers, {whole.steps} drawn steps; "
        f"{judged} maps judge, {len(uniform)} uniform and {correcting} mixed maps correct"
    )
    rows: dict[str, Any] = {"device": bench.device, "stack": bench.stack}
    rows |= {"geometry": asked.geometry, "batch": asked.batch}
    with tempfile.TemporaryDirectory() as folder:
        isolated = LiveModel(bench, folder=Path(folder))
        isolated.expert_latency(spec, profile.menu, workload, inclusion=profile.frequency)
        maps = [*uniform, *mixed, *tests]
        order = rng.permutation(len(maps))
        seconds = np.zeros(len(maps))
        seconds[order] = ablation.seconds([maps[i] for i in order])
        anchors, more, first = np.split(seconds, [len(uniform), len(uniform) + len(mixed)])
        second = ablation.seconds(tests)
        rows["uniform_s"] = dict(zip(firsts, anchors.tolist(), strict=True))
        for kernel, took in rows["uniform_s"].items():
            print(f"  all experts by {kernel}: {took * 1e6:,.1f} µs a step")
        print(f"  maps that judge: {first.min() * 1e6:,.1f} to {first.max() * 1e6:,.1f} µs a step")
        print(f"\n{'costs':44} {'MAPE':>7} {'worst':>8} {'bias':>8} {'tau':>6}")
        bases = {
            f"analytical ({analytical})": load_hardware(analytical),
            "isolated kernels": isolated,
        }
        both = [*uniform, *mixed], np.concatenate([anchors, more])
        models: dict[str, CorrectedModel] = {}
        rows["predictions"] = {}
        for name, base in bases.items():
            for said, seen, times in (
                ("", [], anchors[:0]),
                (f", corrected by {len(uniform)} maps", uniform, anchors),
                (f", corrected by {len(both[0])} maps", *both),
            ):
                model = ablation.corrected(base, seen, times)
                found = errors(first, ablation.predicted(model, tests))
                rows["predictions"][name + said] = found
                print(line(name + said, found))
                models[name + said] = model
        rows["predictions"]["measured again"] = errors(first, second)
        print(line("measured again", rows["predictions"]["measured again"]))
        print("\nfactors of the isolated kernels' times")
        for kernel, factor in model.correction.factors.items():
            print(f"  {factor.value:.3f} ± {factor.deviation:.3f}  {kernel}")

        fastest, slowest = float(seconds.min()), float(seconds.max())
        print("\nmaps chosen within a limit: measured time over the limit (the profile's KL)")
        limits = [fastest + share * (slowest - fastest) for share in LIMITS]
        print(f"{'costs':44} " + " ".join(f"{limit * 1e6:13,.1f} µs" for limit in limits))
        rows["limits_s"], rows["searches"] = limits, {}
        for name, model in models.items():
            got = [ablation.searched(model, profile, limit) for limit in limits]
            rows["searches"][name] = got
            said = [
                "no map".rjust(16)
                if one is None
                else f"{one[0] / limit - 1:+7.1%} ({one[1]:.3f})".rjust(16)
                for one, limit in zip(got, limits, strict=True)
            ]
            print(f"{name:44} " + " ".join(said))
    if asked.out is not None:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
