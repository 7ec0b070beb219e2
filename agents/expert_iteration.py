"""What happens between PPO's updates: the policy imitates what the evaluations say."""

from __future__ import annotations

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from dmpq.agents.base import Recorder
from dmpq.agents.importance_regression import posterior_importance
from dmpq.agents.neighbours import neighbours
from dmpq.agents.networks import ImportancePolicy
from dmpq.problem import Problem


class ExpertIteration(BaseCallback):
    """Moves the policy's mean to the regression's belief, tries it, and narrows the samples.

    Expert iteration (Anthony et al., arXiv 1705.08439): the planner is the exact knapsack on the
    importances that all evaluations so far speak for, the apprentice is the policy, and its
    samples are the evaluations from which the planner learns. PPO's own gradient, of a few
    samples, is mostly noise near the knapsack's optimum; the regression reads all of them. It
    begins with probes, single steps from the knapsack's map: they tell what each decision in doubt
    is worth with all others as they are, and resume from that map's forward.

    Args:
        problem: What is searched.
        recorder: Evaluates maps and stops the search.
        observation: The environment's one observation, (size,).
        log_scale: Log-importance of an action of 1.
        samples: Samples per update.
        std: Standard deviation of the first samples, in log-importance.
        std_decay: Factor on ``std`` after every update.
        imitation: Optimizer steps of imitation per update; 0 leaves the policy to PPO.
        probes: Neighbours of the knapsack's map that are measured before the first sample.
    """

    def __init__(
        self,
        problem: Problem,
        recorder: Recorder,
        observation: NDArray[np.float32],
        *,
        log_scale: float,
        samples: int,
        std: float,
        std_decay: float,
        imitation: int,
        probes: int,
    ) -> None:
        super().__init__()
        self._problem = problem
        self._recorder = recorder
        self._observation = observation
        self._log_scale = log_scale
        self._samples = samples
        self._std = std
        self._std_decay = std_decay
        self._imitation = imitation
        self._probes = probes

    def _on_rollout_start(self) -> None:
        policy = self.model.policy
        assert isinstance(policy, ImportancePolicy)
        update = self.num_timesteps // self._samples
        if not update:
            self._probe()
        if len(self._recorder.history) > 1 and self._imitation:
            batch = th.as_tensor(self._observation)[None]
            policy.imitate(batch, th.as_tensor(self._target_action())[None], steps=self._imitation)
        policy.set_std(self._std * self._std_decay**update)
        # One evaluation stays for the sample that follows.
        if self._recorder.remaining > 1:
            action, _ = policy.predict(self._observation, deterministic=True)
            mean = self._problem.propose(self._log_scale * action.astype(np.float64))
            self._recorder.evaluate(mean[None])
            self._recorder.nominate(mean)

    def _on_step(self) -> bool:
        return self._recorder.remaining > 0

    def _probe(self) -> None:
        """Measure the knapsack's neighbours, those in doubt first."""
        centre = self._problem.mckp()
        maps = neighbours(self._problem, centre, count=self._probes)
        if len(maps):
            self._recorder.hold(centre)
            self._recorder.evaluate(maps)

    def _target_action(self) -> NDArray[np.float32]:
        """Return the action that the evaluations speak for, (D,)."""
        history = self._recorder.history
        importance = posterior_importance(
            self._problem,
            np.array([candidate.assignment for candidate in history]),
            np.array([candidate.kl for candidate in history]),
        )
        log_importance = np.log(np.maximum(importance, np.exp(-self._log_scale)))
        action: NDArray[np.float32] = np.clip(log_importance / self._log_scale, -1, 1)
        return action.astype(np.float32)
