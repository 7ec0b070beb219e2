"""PPO over log-importances: a learned proposal on top of the exact knapsack.

The search starts at the knapsack's own solution (a zero log-importance) and looks for what
additive sensitivities miss. stable-baselines3's PPO samples and learns; between its updates the
policy imitates a regression on all evaluations (:mod:`dmpq.agents.expert_iteration`). Every map
is scored through the recorder, which counts the evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, cast

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.base import OnCandidate, Recorder, SearchResult
from dmpq.agents.policy import Policy, PolicyConfig
from dmpq.agents.seeding import generators_left_alone
from dmpq.envs.importance import ExpertBitsImportanceEnv
from dmpq.errors import InputError
from dmpq.problem import Problem, Scores

if TYPE_CHECKING:
    from dmpq.agents.networks import ImportancePolicy

_SAMPLES_PER_EVALUATION: Final = 4
"""Maps met before are free, so a search may take more samples than evaluations: up to this."""

_WHOLE: Final = {
    "samples": 2,
    "epochs": 0,
    "hidden": 1,
    "embedding": 0,
    "imitation": 0,
    "last_samples": 0,
}
"""Options that are whole numbers, and the least that each may be."""


@dataclass(frozen=True, kw_only=True)
class PPOAgent:
    """Searches with stable-baselines3's PPO on ``dmpq/ExpertBitsImportance-v0``.

    One network, shared by all decisions, maps feature rows to mean log-importances; its output
    starts at zero. Samples come in mirrored pairs around the mean. The first evaluation is the
    knapsack's own map, which is a finalist too: the result is never worse than that on the text
    that decides, the selector's where there is one.

    Attributes:
        learning_rate: Adam's step in PPO's updates. With 0 here, no ``imitation`` and no
            ``probe_share``, the search is the best of random perturbations of the knapsack.
        std: Standard deviation of the samples at the start, in log-importance.
        std_decay: Factor on ``std`` after every update, where no further text is read.
        samples: Samples per update; even.
        epochs: Passes over the samples per update; 0 leaves the policy to the imitation.
        clip_range: How far PPO lets the likelihood ratio of a sample move in one update.
        target_kl: Divergence from the policy that sampled at which an update ends early.
        hidden: Width of the two hidden layers.
        embedding: Size of the embedding that each decision learns; 0 leaves features alone, which
            is what a policy for other models should be trained with.
        log_scale: Largest absolute log-importance.
        imitation: Optimizer steps per update that move the mean to the importances which all
            evaluations so far speak for (:mod:`dmpq.agents.expert_iteration`); 0 for none.
        imitation_rate: Learning rate of the imitation.
        probe_share: Share of the evaluations that are single steps from the knapsack's map.
        further: Whether maps are read on the problem's further text, where it has some, the
            search's own is no larger than a piece of it, and only bits and memory are limited.
        last_samples: Maps sampled around the policy's last mean where further text is read: they
            are finalists, as are the mean's and the knapsack's.
        start: A policy to go on from, whose map is evaluated after the knapsack's; with a single
            evaluation it is the result. It also says ``hidden``, ``embedding`` and ``log_scale``.
    """

    name: ClassVar[str] = "ppo"
    signal: ClassVar[str] = "learned importances"
    cost: ClassVar[str] = "all"
    source: ClassVar[str] = "arXiv 1707.06347"

    learning_rate: float = 3e-4
    std: float = 0.3
    std_decay: float = 0.985
    samples: int = 8
    epochs: int = 10
    clip_range: float = 0.2
    target_kl: float = 0.02
    hidden: int = 64
    embedding: int = 8
    log_scale: float = 3.0
    imitation: int = 100
    imitation_rate: float = 3e-3
    probe_share: float = 0.6
    further: bool = True
    last_samples: int = 6
    start: Policy | None = None

    def __post_init__(self) -> None:
        if self.start is not None:
            for name in ("hidden", "embedding", "log_scale"):
                object.__setattr__(self, name, getattr(self.start.config, name))
        for name, least in _WHOLE.items():
            value: object = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} is {value}; it must be a whole number, {least} or more.")
        if self.samples % 2:
            raise InputError(f"samples is {self.samples}; choose an even number: pairs.")
        for name in ("std", "std_decay", "log_scale", "clip_range", "target_kl"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive.")
        if self.std_decay > 1:
            raise InputError(f"std_decay is {self.std_decay}; samples may only narrow: 1 or less.")
        if not 0 <= self.probe_share < 1:
            raise InputError(
                f"probe_share is {self.probe_share}; some evaluations must be left for samples: "
                "0 or more and below 1."
            )
        for name in ("learning_rate", "imitation_rate"):
            if not 0 <= getattr(self, name) < np.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more.")

    def control(self) -> PPOAgent:
        """Return the same agent at learning rate 0, which no evaluation teaches anything.

        It takes the best of as many random perturbations of the knapsack's map, all on one text so
        that they compare: what is left of a result after subtracting it has been learned.
        """
        return replace(self, learning_rate=0.0, imitation=0, probe_share=0.0, further=False)

    def search(
        self,
        problem: Problem,
        *,
        evaluations: int,
        seed: int,
        on_candidate: OnCandidate | None = None,
    ) -> SearchResult:
        """Return the best map among ``evaluations`` distinct ones, and the policy learned.

        With a selector, the best on its text among the finalists.

        Args:
            problem: What to search.
            evaluations: Number of distinct maps that may be evaluated.
            seed: Seed of the network and the samples; the same seed gives the same result.
            on_candidate: Called with every map evaluated.
        """
        recorder = Recorder(problem, evaluations=evaluations, on_candidate=on_candidate)
        if self.start is None or evaluations > 1:
            recorder.evaluate(problem.mckp()[None])
        if self.start is not None and recorder.remaining:
            proposed = self.start.propose(problem)
            recorder.evaluate(proposed[None])
            recorder.nominate(proposed)
        learned = self._learn(problem, recorder, seed=seed)
        return recorder.result(policy=self._policy(problem, learned, seed=seed))

    def _learn(self, problem: Problem, recorder: Recorder, *, seed: int) -> ImportancePolicy:
        from stable_baselines3 import PPO

        from dmpq.agents.expert_iteration import ExpertIteration
        from dmpq.agents.networks import ImportancePolicy, NetworkShape

        decisions, features = problem.features.shape

        class Recorded(ExpertBitsImportanceEnv):
            """Scores maps through the recorder, which counts them."""

            def score(self, assignments: NDArray[np.integer]) -> Scores:
                return between.score(assignments)

        env = Recorded(problem=problem, log_scale=self.log_scale)
        observation, _ = env.reset()
        assert isinstance(observation, np.ndarray)

        class Imitator(PPO):
            """Samples like PPO, and learns nothing from its own gradient."""

            def train(self) -> None:
                pass

        between = ExpertIteration(
            problem,
            recorder,
            observation,
            log_scale=self.log_scale,
            samples=self.samples,
            std=self.std,
            std_decay=self.std_decay,
            imitation=self.imitation,
            probes=int(self.probe_share * recorder.remaining),
            further=self.further,
            last_samples=self.last_samples,
            believed=None if self.start is None else self.start.log_importance(problem),
        )
        with generators_left_alone():
            model = (PPO if self.epochs else Imitator)(
                ImportancePolicy,
                env,
                learning_rate=self.learning_rate,
                n_steps=self.samples,
                batch_size=self.samples,
                n_epochs=max(self.epochs, 1),
                clip_range=self.clip_range,
                target_kl=self.target_kl,
                gamma=0.0,
                seed=seed,
                device="cpu",
                policy_kwargs={
                    "shape": NetworkShape(
                        features=features,
                        context=len(problem.context),
                        decisions=decisions,
                        hidden=self.hidden,
                        embedding=self.embedding,
                    ),
                    "log_scale": self.log_scale,
                    "std": self.std,
                    "imitation_rate": self.imitation_rate,
                },
            )
            policy = cast(ImportancePolicy, model.policy)
            if self.start is not None:
                self.start.load_into(policy.network, problem)
            if recorder.remaining:
                model.learn(_SAMPLES_PER_EVALUATION * between.maps, callback=between)
        return policy

    def _policy(self, problem: Problem, learned: ImportancePolicy, *, seed: int) -> Policy:
        weights = learned.network.state_dict()
        return Policy(
            config=PolicyConfig(
                menu=problem.menu.keys,
                feature_names=tuple(problem.feature_names),
                context_size=len(problem.context),
                fingerprint=problem.profile.fingerprint,
                decisions=problem.num_decisions,
                hidden=self.hidden,
                embedding=self.embedding,
                log_scale=self.log_scale,
            ),
            weights={name: value.numpy().copy() for name, value in weights.items()},
            training={
                "agent": self.name,
                "seed": str(seed),
                "model": problem.spec.name,
                "hardware": problem.hardware.name,
                "serve": problem.serve,
            },
        )
