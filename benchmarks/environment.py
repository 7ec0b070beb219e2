"""Count steps per second of the sequential environment, for growing numbers of experts.

    python benchmarks/environment.py

With the surrogate reward, on one core. Two figures per size: whole episodes, with resets and the
final evaluation; and steps within an episode, whose cost must not grow with the experts. The
profiles are the shipped one with its experts repeated.
"""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np

from dmpq.envs import ExpertBitsEnv
from dmpq.hw_models import load_hardware
from dmpq.problem import Problem
from dmpq.profile import Profile, reference_profile
from dmpq.spec import load_geometry

REPEATS = (1, 4, 16)
EPISODE_STEPS = 6144
RUNS = 3


def repeated(profile: Profile, times: int) -> Profile:
    """Return a profile of ``times`` as many layers, each a copy of one of the profile's."""
    spec = profile.spec
    layers = tuple(
        replace(layer, path=f"model.layers.{i}.mlp.experts")
        for i, layer in enumerate(spec.moe_layers * times)
    )
    taller = replace(spec, num_layers=len(layers), moe_layers=layers)
    grown = {}
    for field in fields(Profile):
        value = getattr(profile, field.name)
        if isinstance(value, np.ndarray) and len(value) == spec.num_experts:
            grown[field.name] = np.concatenate([value] * times)
    return replace(profile, spec=taller, **grown)


def steps_per_second(env: ExpertBitsEnv, actions: list[int]) -> tuple[float, float]:
    """Return steps per second over whole episodes, and within one; the best of the runs."""
    whole = within = 0.0
    decisions = env.problem.num_decisions
    for _ in range(RUNS):
        taken, mark = 0, time.perf_counter()
        while taken < EPISODE_STEPS:
            env.reset()
            done = False
            while not done:
                _, _, done, _, _ = env.step(actions[taken % len(actions)])
                taken += 1
        whole = max(whole, taken / (time.perf_counter() - mark))
        env.reset()
        mark = time.perf_counter()
        for i in range(decisions - 1):
            env.step(actions[i % len(actions)])
        within = max(within, (decisions - 1) / (time.perf_counter() - mark))
    return whole, within


def main() -> None:
    """Measure and print."""
    actions = np.random.default_rng(0).integers(0, 3, 4096).tolist()
    print("experts  steps/s, whole episodes  steps/s, within an episode")
    for times in REPEATS:
        profile = repeated(reference_profile(), times)
        geometry = profile.spec.with_widths_of(load_geometry("olmoe-1b-7b"))
        problem = Problem(profile=profile, hardware=load_hardware("a100"), cost_spec=geometry)
        env = ExpertBitsEnv(problem=problem)
        env.reset()
        whole, within = steps_per_second(env, actions)
        print(f"{profile.spec.num_experts:7,}  {whole:23,.0f}  {within:26,.0f}")


if __name__ == "__main__":
    main()
