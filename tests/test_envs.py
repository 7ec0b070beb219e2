"""The environments: their contracts, and what each promises beyond them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from factories import make_problem, make_profile
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import data_equivalence
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

import dmpq.envs
from dmpq.envs import (
    ExpertBitsAdjustEnv,
    ExpertBitsEnv,
    ExpertBitsImportanceEnv,
    ExpertBitsJointEnv,
)
from dmpq.errors import InputError
from dmpq.evaluation import Evaluations
from dmpq.testing.env import EnvContract, rollout


@pytest.fixture(scope="module")
def problem():
    return make_problem()


class _Contract(EnvContract):
    @pytest.fixture
    def env_kwargs(self, problem):
        return {"problem": problem}


class TestExpertBits(_Contract):
    @pytest.fixture
    def env_id(self):
        return "dmpq/ExpertBits-v0"


class TestExpertBitsTerminal(TestExpertBits):
    @pytest.fixture
    def env_kwargs(self, problem):
        return {"problem": problem, "reward": "terminal"}


class TestImportance(_Contract):
    @pytest.fixture
    def env_id(self):
        return "dmpq/ExpertBitsImportance-v0"


class TestAdjust(_Contract):
    @pytest.fixture
    def env_id(self):
        return "dmpq/ExpertBitsAdjust-v0"


class TestAdjustGroups(TestAdjust):
    @pytest.fixture
    def env_kwargs(self, problem):
        return {"problem": problem, "groups": 3}


class TestJoint(_Contract):
    @pytest.fixture
    def env_id(self):
        return "dmpq/ExpertBitsJoint-v0"


def play(env, actions):
    """Return the rewards and the last info."""
    env.reset(seed=0)
    rewards = []
    for action in actions:
        _, reward, done, _, info = env.step(action)
        rewards.append(reward)
        if done:
            break
    return rewards, info


def test_registering_again_changes_nothing():
    before = dict(gym.registry)
    dmpq.envs.register()
    assert gym.registry == before


def test_dense_and_terminal_give_the_same_return_and_it_is_the_evaluators(problem):
    rng = np.random.default_rng(0)
    for _ in range(5):
        actions = rng.integers(len(problem.menu), size=problem.num_decisions)
        dense, info = play(ExpertBitsEnv(problem=problem), actions)
        terminal, same = play(ExpertBitsEnv(problem=problem, reward="terminal"), actions)
        assert terminal[:-1] == [0.0] * (len(dense) - 1)
        assert all(reward < 0 for reward in dense[:-1])
        expected = problem.evaluate(info["assignment"][None]).reward[0]
        assert sum(dense) == pytest.approx(expected, abs=1e-12)
        assert sum(terminal) == pytest.approx(expected, abs=1e-12)
        assert (info["assignment"] == same["assignment"]).all()


def limit_between(name, share, **kwargs):
    """Return a limit between the costs of the narrowest and the widest map."""
    problem = make_problem(**kwargs)
    ends = problem.costs(np.array([[0], [-1]]) % len(problem.menu) + problem.uniform("2"))
    low, high = getattr(ends, name)
    return {name: float(low + share * (high - low))}


@pytest.mark.parametrize(
    "limits",
    [
        {"avg_bits": 3.0},
        {"avg_bits": None, "bits": "2,2g32,3,16"},
        {"avg_bits": 4.0, "bits": "2,2g16,3"},
        {"avg_bits": None, **limit_between("memory_bytes", 0.2, layers=1, experts=4)},
        {"avg_bits": 4.0, **limit_between("memory_bytes", 0.1, layers=1, experts=4)},
    ],
)
def test_mask_is_exact(limits):
    """A prefix is allowed exactly if some completion is within the budgets."""
    problem = make_problem(layers=1, experts=4, **limits)
    env = ExpertBitsEnv(problem=problem)
    formats = range(len(problem.menu))
    every = np.array(list(itertools.product(formats, repeat=problem.num_decisions)))
    feasible = every[problem.feasible(every)]
    env.reset()
    start = env.state()
    for prefix in itertools.chain.from_iterable(
        itertools.product(formats, repeat=n) for n in range(problem.num_decisions)
    ):
        reachable = feasible[(feasible[:, : len(prefix)] == prefix).all(1)]
        if not len(reachable):
            continue
        env.set_state(start)
        for action in prefix:
            env.step(action)
        allowed = set(np.flatnonzero(env.action_masks()))
        assert allowed == set(np.unique(reachable[:, len(prefix)]))


def test_a_masked_action_becomes_the_nearest_allowed_format_below(problem):
    env = ExpertBitsEnv(problem=problem)
    widest = len(problem.menu) - 1
    env.reset()
    done = False
    while not done:
        allowed = np.flatnonzero(env.action_masks())
        at = env.state().position
        _, _, done, _, info = env.step(widest)
        assert env.state().assignment[at] == allowed.max() or done
        assert info["invalid_action"] == (allowed.max() != widest)
    assert info["effective_bits"] <= problem.constraints.avg_bits


@pytest.mark.parametrize("name", dmpq.envs.ENVIRONMENTS)
@pytest.mark.parametrize(
    "options",
    [
        {"serve": "projection"},
        {"serve": "layer"},
        {"unhit": 5},
        {"avg_bits": None},
        {"avg_bits": None, **limit_between("latency_s", 0.3)},
        {"avg_bits": 3.5, **limit_between("energy_j", 0.3), **limit_between("memory_bytes", 0.3)},
    ],
)
def test_every_final_map_is_within_the_limits(name, options):
    problem = make_problem(**options)
    env = gym.make(name, problem=problem, observation="dict")
    for _, _, terminated, truncated, info in rollout(env, seed=1, steps=80):
        if terminated or truncated:
            assert info["feasible"]
            assert problem.feasible(info["assignment"][None]).all()


class Broken:
    """An evaluator whose answers are not numbers."""

    name = "broken"
    tokens_spent = 0.0

    def evaluate(self, assignments, *, fidelity=1.0):
        del fidelity
        nan = np.full(len(assignments), np.nan)
        return Evaluations(nan, nan, nan, 0.0)


@pytest.mark.parametrize("name", dmpq.envs.ENVIRONMENTS)
def test_a_loss_that_is_not_finite_has_a_finite_reward(name):
    env = gym.make(name, problem=make_problem(evaluator=Broken()), observation="dict")
    final = dmpq.envs.FAILURE_REWARD
    for observation, reward, terminated, _, info in rollout(env, seed=1, steps=40):
        assert env.observation_space.contains(observation)
        assert np.isfinite(reward)
        if terminated:
            assert info["objective"] == final
            assert not info["is_success"]


def test_flat_observation_does_not_grow_with_the_model():
    small, large = (make_problem(layers=n, experts=4) for n in (1, 5))
    shapes = {ExpertBitsEnv(problem=p).observation_space.shape for p in (small, large)}
    assert len(shapes) == 1


INDEX_ENVS = ["dmpq/ExpertBits-v0", "dmpq/ExpertBitsAdjust-v0"]


@pytest.mark.parametrize("name", INDEX_ENVS)
@pytest.mark.parametrize("action", [-1, 99, 10**6, 10**30, 2.7, 2.0, np.float32(1), "1", [0]])
def test_an_index_outside_the_space_is_refused(problem, name, action):
    env = gym.make(name, problem=problem).unwrapped
    env.reset()
    before = env.state()
    with pytest.raises(InputError, match=r"The action is .*; it must be an? .* from 0 to \d+"):
        env.step(action)
    assert env.state() == before


@pytest.mark.parametrize("make", [int, np.int64, np.uint8, np.array])
@pytest.mark.parametrize("name", INDEX_ENVS)
def test_any_kind_of_integer_is_an_index(problem, name, make):
    env = gym.make(name, problem=problem).unwrapped
    steps = []
    for action in (1, make(1)):
        env.reset()
        steps.append(env.step(action))
    assert data_equivalence(*steps, exact=True)


@pytest.mark.parametrize("entry", [-1, 99, 10**30, 2.7, "1", None])
def test_an_entry_outside_the_space_is_refused_by_name(problem, entry):
    env = ExpertBitsJointEnv(problem=problem)
    env.reset()
    whole = [0] * (problem.num_decisions - 1) + [entry]
    with pytest.raises(InputError, match=r"must be 16 menu indices, each from 0 to 4"):
        env.step(whole)
    if entry in (-1, 99):
        with pytest.raises(InputError, match=f"An entry of the action is {entry};"):
            env.step(np.array(whole))


@pytest.mark.parametrize("entry", [np.nan, np.inf, 1j, "1", None])
def test_an_importance_that_is_no_finite_number_is_refused(problem, entry):
    env = ExpertBitsImportanceEnv(problem=problem)
    env.reset()
    with pytest.raises(InputError, match="must be 16 finite numbers"):
        env.step([0.0] * (problem.num_decisions - 1) + [entry])


def test_importances_beyond_the_box_are_clipped(problem):
    env = ExpertBitsImportanceEnv(problem=problem)
    wild = np.random.default_rng(0).normal(0, 3, problem.num_decisions)
    assert np.abs(wild).max() > 1
    steps = []
    for action in (wild, np.clip(wild, -1, 1)):
        env.reset()
        steps.append(env.step(action))
    assert data_equivalence(*steps, exact=True)


@pytest.mark.parametrize("name", dmpq.envs.ENVIRONMENTS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": -1}, "position -1; .* positions from 0 to"),
        ({"position": 10**6}, "position 1000000; .* positions from 0 to"),
        ({"assignment": (-1, 0) * 8}, "has taken the first"),
    ],
)
def test_a_state_that_cannot_be_is_refused(problem, name, change, words):
    env = gym.make(name, problem=problem).unwrapped
    env.reset()
    before = env.state()
    with pytest.raises(InputError, match=words):
        env.set_state(replace(before, **change))
    assert env.state() == before


@pytest.mark.parametrize("name", dmpq.envs.ENVIRONMENTS)
def test_a_fresh_environment_goes_on_from_a_state(problem, name):
    first, second = (gym.make(name, problem=problem).unwrapped for _ in range(2))
    first.reset()
    second.set_state(first.state())
    action = first.action_space.sample()
    assert data_equivalence(second.step(action), first.step(action), exact=True)


def test_a_refused_start_leaves_no_episode(problem):
    env = ExpertBitsAdjustEnv(problem=problem)
    env.reset()
    with pytest.raises(InputError, match="indices"):
        env.reset(options={"assignment": [99]})
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)


def test_the_default_evaluator_follows_the_profile(saved_profile):
    """The problem that plain values make is copied with another profile like any other."""
    problem = dmpq.envs.make_problem(profile=saved_profile)
    other = replace(problem, profile=make_profile(seed=1))
    maps = other.mckp()[None]
    assert other.evaluate(maps).kl == other.surrogate(maps).kl


def test_zero_action_is_the_knapsack(problem):
    env = ExpertBitsImportanceEnv(problem=problem)
    env.reset()
    *_, info = env.step(np.zeros(problem.num_decisions, np.float32))
    assert (info["assignment"] == problem.mckp()).all()
    assert info["is_success"]


def test_joint_takes_what_fits_and_moves_the_rest_as_little_as_possible():
    problem = make_problem(layers=1, experts=4, avg_bits=3.0)
    env = ExpertBitsJointEnv(problem=problem)
    every = np.array(list(itertools.product(range(len(problem.menu)), repeat=4)))
    feasible = every[problem.feasible(every)]

    def moved(wanted, maps):
        at = np.arange(4)
        return np.abs(problem.sizes[at, maps] - problem.sizes[at, wanted]).sum(-1)

    for wanted in every[::7]:
        env.reset()
        *_, info = env.step(wanted)
        assert moved(wanted, info["assignment"]) == moved(wanted, feasible).min()
        assert info["moved"] == (info["assignment"] != wanted).sum()


def test_adjust_return_is_what_the_final_map_gains(problem):
    env = ExpertBitsAdjustEnv(problem=problem)
    start = np.zeros(problem.num_decisions, int)
    _, first = env.reset(seed=0, options={"assignment": start})
    rng = np.random.default_rng(0)
    total, over = 0.0, False
    while not over:
        choices = np.flatnonzero(env.action_masks())
        _, reward, _, over, info = env.step(rng.choice(choices))
        assert not info["invalid_action"]
        total += reward
    assert total == pytest.approx(info["objective"] - first["objective"], abs=1e-12)


def test_adjust_leaves_the_map_on_an_invalid_action(problem):
    env = ExpertBitsAdjustEnv(problem=problem)
    env.reset(options={"assignment": np.zeros(problem.num_decisions, int)})
    before = env.state().assignment
    _, reward, *_, info = env.step(0)
    assert info["invalid_action"]
    assert reward == 0
    assert env.state().assignment == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: ExpertBitsEnv(problem=p, reward="denze"), "did you mean 'dense'"),
        (lambda p: ExpertBitsEnv(problem=p, observation="flta"), "did you mean 'flat'"),
        (lambda p: ExpertBitsEnv(problem=p, render_mode="ansii"), "did you mean 'ansi'"),
        (lambda p: ExpertBitsEnv(problem=p, hw="a100"), "hw would be ignored"),
        (lambda p: ExpertBitsAdjustEnv(problem=p, groups=0), "groups is 0"),
        (lambda p: ExpertBitsImportanceEnv(problem=p, log_scale=0.0), "log_scale is 0"),
        (lambda p: ExpertBitsImportanceEnv(problem=p).step(np.full(3, np.nan)), "finite numbers"),
        (lambda p: ExpertBitsJointEnv(problem=p).step([99]), "menu indices"),
        (lambda p: ExpertBitsAdjustEnv(problem=p).reset(options={"assignment": [1]}), "indices"),
        (
            lambda p: ExpertBitsAdjustEnv(problem=p).reset(
                options={"assignment": [len(p.menu) - 1] * p.num_decisions}
            ),
            "exceeds a limit",
        ),
        (
            lambda p: ExpertBitsEnv(problem=p).set_state(dmpq.envs.EnvState(0, (0,))),
            "another environment",
        ),
    ],
)
def test_bad_input_is_one_sentence(problem, make, words):
    with pytest.raises(InputError, match=words):
        make(problem)


def test_pictures(problem):
    env = ExpertBitsEnv(problem=problem, render_mode="ansi")
    env.reset()
    env.step(0)
    lines = env.render().splitlines()
    assert lines[0].startswith("1 of")
    assert lines[1].split()[:4] == ["layer", "0", "|", problem.menu.keys[0]]
    assert set(lines[2].split()[3:]) == {"."}
    image = ExpertBitsEnv(problem=problem, render_mode="rgb_array").render()
    assert (image == 255).any()


def test_dict_observation_names_the_state(problem):
    env = ExpertBitsEnv(problem=problem, observation="dict")
    observation, _ = env.reset()
    assert (observation["bits"] == 0).all()
    assert observation["budget_left"] == 1
    after, *_ = env.step(0)
    assert after["bits"][0] == np.float32(problem.menu.bits[0] / 16)
    assert after["budget_left"] < 1
    assert after["loss"] > 0


@pytest.fixture(scope="module")
def saved_profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    make_profile().save(path)
    return str(path)


@pytest.mark.parametrize("name", dmpq.envs.ENVIRONMENTS)
def test_plain_values_make_an_environment_that_its_spec_rebuilds(name, saved_profile):
    env = gym.make(name, profile=saved_profile, avg_bits=3.5, weights="acc=1", hw="h100", batch=8)
    problem = env.unwrapped.problem
    assert problem.constraints.avg_bits == 3.5
    assert problem.workload.batch == 8
    assert problem.hardware.name == "h100"
    assert problem.cost_spec.hidden_size == 2048
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert data_equivalence(rollout(again, seed=1), rollout(env, seed=1), exact=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": "2,4"}, "measured for the formats 2,3,4,8,16"),
        ({"serve": "experts"}, "did you mean 'expert'"),
        ({"evaluator": "modle"}, "did you mean 'model'"),
        ({"evaluator": "model"}, "takes no other profile"),
        ({"avg_bits": 1.0}, "--avg-bits 1 is below"),
        ({"weights": "accuracy=1"}, "Unknown weight"),
        ({"hw": "a1000"}, "Unknown hardware"),
    ],
)
def test_bad_settings_are_one_sentence(saved_profile, settings, words):
    with pytest.raises(InputError, match=words):
        dmpq.envs.make_problem(profile=saved_profile, **settings)


def test_unknown_setting_is_a_type_error(saved_profile):
    with pytest.raises(TypeError, match="avg_bit"):
        gym.make("dmpq/ExpertBits-v0", profile=saved_profile, avg_bit=3.0)


def test_stock_learners_run(problem):
    """MlpPolicy works as it is, and the mask is found through the wrappers of gym.make."""
    PPO(
        "MlpPolicy",
        gym.make("dmpq/ExpertBitsImportance-v0", problem=problem),
        n_steps=16,
        batch_size=16,
        device="cpu",
    ).learn(16)
    for name in ("dmpq/ExpertBits-v0", "dmpq/ExpertBitsAdjust-v0"):
        env = gym.make(name, problem=problem)
        MaskablePPO("MlpPolicy", env, n_steps=32, batch_size=32, device="cpu").learn(32)
    env = gym.make("dmpq/ExpertBits-v0", problem=problem, observation="dict")
    MaskablePPO("MultiInputPolicy", env, n_steps=32, batch_size=32, device="cpu").learn(32)


def test_rows_gives_the_view_per_decision(problem):
    observation, _ = ExpertBitsImportanceEnv(problem=problem).reset()
    features, rest = dmpq.envs.rows(observation, problem)
    assert (features == problem.features).all()
    assert (rest == problem.context).all()
