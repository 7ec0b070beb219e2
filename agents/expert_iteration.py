"""What happens between PPO's updates: the policy imitates what the evaluations say."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from dmpq.agents.base import Recorder
from dmpq.agents.importance_regression import ImportanceRegression
from dmpq.agents.neighbours import neighbours
from dmpq.agents.networks import ImportancePolicy
from dmpq.problem import Problem, Scores

UPDATES_PER_TEXT: Final = 2
"""Updates that read one piece of further text, whose full-precision forward they share."""

_PROBES_PER_TEXT: Final = 24
_TEXTS_PER_PROBE: Final = 3
"""Texts that each single step is read on: so many fewer steps are probed."""

_LAST_STD: Final = 0.15
"""Standard deviation of the last samples, in log-importance: half of the first ones'."""

_LEAST_TEXTS: Final = 3
"""Pieces of further text below which the search's own is read instead."""


class ExpertIteration(BaseCallback):
    """Moves the policy's mean to the regression's belief, tries it, and narrows the samples.

    Expert iteration (Anthony et al., arXiv 1705.08439): the planner is the exact knapsack on the
    importances that all evaluations so far speak for, the apprentice is the policy, and its
    samples are the evaluations from which the planner learns. PPO's own gradient, of a few
    samples, is mostly noise near the knapsack's optimum; the regression reads all of them.

    Where the search's own text is small and the problem has further text, maps are read on one
    piece after another: a map's loss on one text is mostly that text's, and what many texts say of
    a decision is what holds on the next. It begins with probes, single steps from the knapsack's
    map, each on several texts: they tell what a decision in doubt is worth with all others as they
    are, with little noise, and resume from that map's forward. At the end the policy's mean and
    samples near it are evaluated on the search's own text, and compete with the knapsack's map for
    the selection: what the evaluations leave open, fresh text decides.

    Where the search's text is larger than a piece, or there are evaluations for few pieces only,
    all maps are evaluated on the search's text, the probes too; and where latency or energy is
    limited: maps within such limits are far apart, and the best one met is worth more than what
    importances say.

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
        further: Whether further text is read.
        last_samples: Maps near the policy's last mean that compete with it, where it is.
        believed: (D,), log-importances believed in before any evaluation; ``None`` for zeros.
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
        further: bool,
        last_samples: int,
        believed: NDArray[np.float64] | None = None,
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
        self._last_samples = last_samples
        self._regression = ImportanceRegression(
            problem, believed=None if believed is None else np.exp(believed)
        )
        self._text: int | None = None
        self._probed = 0
        self._share = recorder.further_share
        texts = recorder.left / (self._per_text * self._share)
        small = bool(problem.further) and self._share >= 1  # the search's text is a piece or less
        exact = not problem.projection.priced  # only bits and memory are limited
        self._reading = further and small and exact and texts >= _LEAST_TEXTS
        if self._reading:
            recorder.finalists = 2 + last_samples  # with the knapsack's map and the last mean

    @property
    def maps(self) -> int:
        """Maps that the search's budget pays for, on whatever text they are read."""
        return int(self._recorder.left / (self._share if self._reading else 1.0))

    def score(self, assignments: NDArray[np.integer]) -> Scores:
        """Return the scores of maps, (K, D), on the text of this update."""
        if self._text is None:
            return self._recorder.evaluate(assignments)
        return self._recorder.read(assignments, text=self._text)

    @property
    def _per_text(self) -> int:
        """Maps read on a piece of text: full precision, and each update's mean and samples."""
        return 1 + UPDATES_PER_TEXT * (self._samples + 1)

    def _on_rollout_start(self) -> None:
        policy = self.model.policy
        assert isinstance(policy, ImportancePolicy)
        update = self.num_timesteps // self._samples
        if not update:
            self._probe()
        if self._reading:
            texts = self._probed + update // UPDATES_PER_TEXT
            self._text = texts % len(self._problem.further)
        self._imitate(policy)
        # What a wide sample says of importances is read as well as what a narrow one does.
        policy.set_std(self._std * (1.0 if self._reading else self._std_decay**update))
        mean = self._mean(policy)
        if self._reading:
            self.score(mean[None])
        elif self._recorder.remaining > 1:  # one evaluation stays for the sample that follows
            self._recorder.evaluate(mean[None])
            self._recorder.nominate(mean)

    def _on_step(self) -> bool:
        if not self._reading:
            return self._recorder.remaining > 0
        update = self._samples + 2  # full precision, where it begins a text, and the mean
        done = self.num_timesteps % self._samples == 0
        last = 1 + self._last_samples
        return not done or self._recorder.left >= last + update * self._share

    def _on_training_end(self) -> None:
        """Evaluate the last mean and samples near it on the search's own text."""
        if not self._reading:
            return
        policy = self.model.policy
        assert isinstance(policy, ImportancePolicy)
        self._imitate(policy)
        policy.set_std(_LAST_STD)
        last = [self._mean(policy)]
        for _ in range(self._last_samples):
            action, _ = policy.predict(self._observation, deterministic=False)
            last.append(self._problem.propose(self._log_scale * action.astype(np.float64)))
        for one in last[: self._recorder.remaining]:
            self._recorder.evaluate(one[None])
            self._recorder.nominate(one)

    def _imitate(self, policy: ImportancePolicy) -> None:
        """Move the policy's mean to the importances that all evaluations speak for."""
        if len(self._recorder.history) > 1 and self._imitation:
            batch = th.as_tensor(self._observation)[None]
            policy.imitate(batch, th.as_tensor(self._target_action())[None], steps=self._imitation)

    def _mean(self, policy: ImportancePolicy) -> NDArray[np.int64]:
        """Return the map that the policy's mean stands for, (D,)."""
        action, _ = policy.predict(self._observation, deterministic=True)
        return self._problem.propose(self._log_scale * action.astype(np.float64))

    def _probe(self) -> None:
        """Measure the knapsack's neighbours, those in doubt first."""
        centre = self._problem.mckp()
        if not self._reading:
            maps = neighbours(self._problem, centre, count=self._probes)
            if len(maps):
                self._recorder.hold(centre)
                self._recorder.evaluate(maps)
            return
        total = int(self._probes / self._share)
        maps = neighbours(self._problem, centre, count=max(total // _TEXTS_PER_PROBE, 1))
        if not len(maps):
            return
        asked, per_text = 0, min(len(maps), _PROBES_PER_TEXT)
        while (
            asked + per_text <= total and self._recorder.left >= 1 + (2 + per_text) * self._share
        ):
            text = self._probed % len(self._problem.further)
            chosen = np.arange(asked, asked + per_text) % len(maps)
            self._recorder.read(centre[None], text=text)
            self._recorder.hold(centre, text=text)
            self._recorder.read(maps[chosen], text=text)
            self._probed, asked = self._probed + 1, asked + per_text

    def _target_action(self) -> NDArray[np.float32]:
        """Return the action that the evaluations speak for, (D,)."""
        importance = self._regression.believed_after(self._recorder.history)
        log_importance = np.log(np.maximum(importance, np.exp(-self._log_scale)))
        action: NDArray[np.float32] = np.clip(log_importance / self._log_scale, -1, 1)
        return action.astype(np.float32)
