"""The contract of an environment, as a test class to inherit."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from gymnasium.utils.env_checker import data_equivalence
from stable_baselines3.common.env_checker import check_env as check_sb3

from dmpq.errors import InputError

Rollout = list[tuple[Any, float, bool, bool, dict[str, Any]]]


def rollout(env: gym.Env[Any, Any], *, seed: int, steps: int = 50) -> Rollout:
    """Return seeded random steps, with resets where episodes end."""
    env.action_space.seed(seed)
    env.reset(seed=seed)
    found: Rollout = []
    for _ in range(steps):
        step = env.step(env.action_space.sample())
        found.append((step[0], float(step[1]), *step[2:]))
        if step[2] or step[3]:
            env.reset()
    return found


class EnvContract:
    """Inherit, override the fixtures, and every test below runs on your environment.

    Example:
        >>> class TestMine(EnvContract):
        ...     @pytest.fixture
        ...     def env_id(self) -> str:
        ...         return "mine/Bits-v0"
    """

    @pytest.fixture
    def env_id(self) -> str:
        """The registered id; override."""
        raise NotImplementedError("Override the env_id fixture with a registered id.")

    @pytest.fixture
    def env_kwargs(self) -> dict[str, Any]:
        """Arguments for ``gym.make``; override where some are needed."""
        return {}

    def make(self, env_id: str, env_kwargs: dict[str, Any], **more: Any) -> Any:
        """Return the environment under test; untyped, for ``state`` is no part of Gymnasium."""
        return gym.make(env_id, **env_kwargs, **more)

    @pytest.mark.parametrize("observation", ["flat", "dict"])
    def test_passes_both_checkers_without_a_warning(
        self, env_id: str, env_kwargs: dict[str, Any], observation: str
    ) -> None:
        """Gymnasium's checker and stable-baselines3's find nothing to say."""
        env = self.make(
            env_id, env_kwargs, observation=observation, render_mode="rgb_array"
        ).unwrapped
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_gymnasium(env)
            check_sb3(env, skip_render_check=False)

    def test_same_seed_same_rollout(self, env_id: str, env_kwargs: dict[str, Any]) -> None:
        """Two environments agree exactly, in everything they return."""
        first, second = (rollout(self.make(env_id, env_kwargs), seed=7) for _ in range(2))
        assert data_equivalence(first, second, exact=True)

    def test_returns_python_scalars_and_finite_observations(
        self, env_id: str, env_kwargs: dict[str, Any]
    ) -> None:
        """Rewards are floats, flags are bools, observations lie in their space."""
        env = self.make(env_id, env_kwargs)
        for observation, reward, terminated, truncated, _ in rollout(env.unwrapped, seed=3):
            assert env.observation_space.contains(observation)
            assert np.isfinite(observation).all()
            assert type(reward) is float
            assert type(terminated) is bool
            assert type(truncated) is bool

    def test_reward_terms_add_up(self, env_id: str, env_kwargs: dict[str, Any]) -> None:
        """``info["reward_terms"]`` sums to the reward in every step."""
        for _, reward, _, _, info in rollout(self.make(env_id, env_kwargs), seed=5):
            assert sum(info["reward_terms"].values()) == pytest.approx(reward, abs=1e-12)

    def test_last_step_reports_the_map(self, env_id: str, env_kwargs: dict[str, Any]) -> None:
        """An episode ends with the map, its bits and its costs, within every limit."""
        env = self.make(env_id, env_kwargs)
        steps = rollout(env, seed=5, steps=env.unwrapped.horizon)
        _, _, terminated, truncated, info = steps[-1]
        assert terminated or truncated
        assert info["feasible"]
        assert type(info["is_success"]) is bool
        assert info["assignment"].min() >= 0
        assert {"effective_bits", "kl", "latency_s", "memory_bytes", "energy_j"} <= set(info)

    def test_copies_and_pickles(self, env_id: str, env_kwargs: dict[str, Any]) -> None:
        """A copy and a pickled twin go on as the original does."""
        env = self.make(env_id, env_kwargs)
        twins = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
        expected = rollout(env, seed=11, steps=10)
        for twin in twins:
            assert data_equivalence(rollout(twin, seed=11, steps=10), expected, exact=True)

    @pytest.mark.parametrize("observation", ["flat", "dict"])
    def test_state_goes_back(
        self, env_id: str, env_kwargs: dict[str, Any], observation: str
    ) -> None:
        """Going back to a state and acting again gives the same steps, bit for bit."""
        env = self.make(env_id, env_kwargs, observation=observation).unwrapped
        env.action_space.seed(2)
        env.reset(seed=2)
        half = (env.horizon - 1) // 2
        for _ in range(half):
            env.step(env.action_space.sample())
        state = env.state()
        actions = [env.action_space.sample() for _ in range(env.horizon - half)]
        first = [env.step(action) for action in actions]
        env.set_state(state)
        assert env.state() == state
        assert data_equivalence([env.step(action) for action in actions], first, exact=True)

    @pytest.mark.parametrize("observation", ["flat", "dict"])
    def test_ends_once(self, env_id: str, env_kwargs: dict[str, Any], observation: str) -> None:
        """Steps before a reset and past the end are refused, also after going back to an end."""
        env = self.make(env_id, env_kwargs, observation=observation).unwrapped
        action = env.action_space.sample()
        with pytest.raises(gym.error.ResetNeeded):
            env.step(action)
        env.reset(seed=0)
        for _ in range(env.horizon):
            last = env.step(env.action_space.sample())[0]
        state = env.state()
        with pytest.raises(gym.error.ResetNeeded):
            env.step(action)
        assert env.state() == state
        env.reset(seed=0)
        assert data_equivalence(env.set_state(state), last, exact=True)
        with pytest.raises(gym.error.ResetNeeded):
            env.step(action)

    @pytest.mark.parametrize("action", [None, "wide", float("nan"), [[0], [0, 1]], {}])
    def test_refuses_what_is_no_action(
        self, env_id: str, env_kwargs: dict[str, Any], action: Any
    ) -> None:
        """An action outside the space is bad input, and leaves the episode as it is."""
        env = self.make(env_id, env_kwargs).unwrapped
        env.reset(seed=0)
        state = env.state()
        with pytest.raises(InputError, match="action"):
            env.step(action)
        assert env.state() == state

    def test_vectorised(self, env_id: str, env_kwargs: dict[str, Any]) -> None:
        """``gym.make_vec`` steps several at once, past the end of their episodes."""
        envs = gym.make_vec(env_id, num_envs=3, vectorization_mode="sync", **env_kwargs)
        envs.action_space.seed(0)
        envs.reset(seed=0)
        ends, horizon = 0, self.make(env_id, env_kwargs).unwrapped.horizon
        for _ in range(horizon + 2):
            observation, reward, terminated, truncated, _ = envs.step(envs.action_space.sample())
            assert observation.shape[0] == reward.shape[0] == 3
            ends += int((terminated | truncated).sum())
        assert ends >= 3
        envs.close()

    def test_renders(self, env_id: str, env_kwargs: dict[str, Any]) -> None:
        """Both render modes give what Gymnasium expects."""
        drawn: dict[str, Any] = {}
        for mode in ("ansi", "rgb_array"):
            env = self.make(env_id, env_kwargs, render_mode=mode)
            rollout(env, seed=0, steps=1)
            drawn[mode] = env.render()
        assert isinstance(drawn["ansi"], str)
        assert drawn["rgb_array"].dtype == np.uint8
        assert drawn["rgb_array"].shape[2] == 3

    def test_spec_round_trip(self, env_id: str) -> None:
        """The spec of an environment made of plain values survives JSON."""
        spec = gym.spec(env_id)
        assert json.loads(spec.to_json())["id"] == env_id
        assert gym.envs.registration.EnvSpec.from_json(spec.to_json()) == spec
