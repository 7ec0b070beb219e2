"""The referee: every agent on the same problems, at the same number of forwarded tokens.

A *group* is one model with one calibration draw. It is profiled once, at a price that every agent
pays. What an agent may spend, ``T`` forwarded tokens, is the price of that profile, of so many
evaluations of whole forwards and of the final choice:

- An agent that searches has the profile and spends the rest on maps. One that reads no profile is
  not charged for it, and evaluates more.
- An agent that evaluates a single map has a larger profile, as large as ``T`` pays for. Where it
  reads no sensitivities, that profile comes from gradients, which are many times cheaper, on as
  much text as there is. Where it measures a signal of its own (Fisher, Hessian) and reads no
  profile, it is not charged for one, and measures on as much text as ``T`` pays for, up to
  131,072 tokens, whose full-precision predictions have to be kept in memory.
- Two controls always run: ``mckp``, the exact knapsack on the larger profile, and for each agent
  that has one its own control at learning rate 0. ``mckp, small`` is the knapsack on the profile
  that searches start from.

Held-out text serves no choice: it judges what each agent returns. Every row is kept when it is
there, and every measurement in the group's journal, so that the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.files import JsonLines
from dmpq.guard import label_of, make_agent, run_agent
from dmpq.referee.contest import Contest
from dmpq.threads import use_threads

if TYPE_CHECKING:
    from dmpq.agents import Agent, Candidate
    from dmpq.data import Windows
    from dmpq.model_evaluator import ModelEvaluator
    from dmpq.problem import Problem
    from dmpq.profile import Profile, Signal
    from dmpq.session import Session

ONE: Final = "1"
"""The cost that agents of a single evaluation say of themselves."""
REFERENCE: Final = "mckp"
"""What every agent is compared with."""
SMALL: Final = "mckp, small"
SENSITIVITIES: Final = "sensitivities"
GRADIENTS: Final = "gradients"
NOTHING: Final = "nothing"
"""What agents say that they need of a profile."""
KEPT: Final = "outcomes.jsonl"
"""File in a group's folder."""

_NOT_SHARED: Final = frozenset(
    {"model", "seed", "out", "threads", "bank_memory_gb", "agent", "policy", "explain", "engine"}
)
"""Options that rows of one folder may differ in, or that no row depends on."""
_KEPT_FORWARDS: Final = 12
"""Of the search text, that the larger profile leaves at least, so that most agents share one."""
_BATCHES: Final = 16
"""Into which the search text is cut, so that an evaluation can be had in sixteenths."""
_LARGEST_BATCH: Final = 4096
_MOST_OWN_TEXT: Final = 131_072
"""Tokens on which an agent's own signal is measured at most."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid of contests.

    Attributes:
        config: What all of them share; its model, seed and limits are not read.
        models: Checkpoints.
        seeds: Each draws its calibration text, and is its agents' seed.
        contests: Devices and limits.
        agents: Agents by name, or ``module:Class``, with options or without.
        factor: How many times the evaluations each agent has.
    """

    config: SearchConfig
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    contests: tuple[Contest, ...]
    agents: tuple[str, ...]
    factor: int = 1

    def __post_init__(self) -> None:
        for what in ("models", "seeds", "contests", "agents"):
            values = getattr(self, what)
            if not values:
                raise InputError(f"There are no {what} to compare; give at least one.")
            if len(set(values)) != len(values):
                raise InputError(f"The {what} name one twice; name each once.")
        names = [Path(model).name for model in self.models]
        if len(set(names)) != len(names):
            raise InputError("Two models have one folder name, so that no table can tell them.")

    def digest(self) -> str:
        """Return a hash of what the rows of one folder share: all but the grid's lists."""
        shared = {k: v for k, v in asdict(self.config).items() if k not in _NOT_SHARED}
        text = json.dumps(shared, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Entrant:
    """An agent as the referee runs it.

    Attributes:
        label: What tables call it.
        agent: The agent.
        larger: Whether it has a larger profile and a single evaluation.
        reads: What it needs of a profile: sensitivities, gradients, or nothing.
        forwards: Of the search text, that its own signal takes.
    """

    label: str
    agent: Agent
    larger: bool
    reads: str = SENSITIVITIES
    forwards: float = 0.0

    @property
    def charged(self) -> bool:
        """Whether it pays for its profile."""
        return self.reads != NOTHING

    @property
    def signal(self) -> Signal:
        """What its profile is measured by."""
        return "gradient" if self.larger and self.reads == GRADIENTS else "sensitivity"


@dataclass(frozen=True)
class Outcome:
    """What one agent made of one contest.

    Attributes:
        model: Folder name of the checkpoint.
        contest: As it was written.
        seed: Of the calibration draw and of the agent.
        agent: The entrant.
        factor: How many times the evaluations it had.
        kl: KL to the full-precision logits on held-out text, nats per token.
        perplexity: Per token, there.
        accuracy: Share of held-out tokens of which the likeliest prediction is right.
        search_kl: KL of the same map on the text that the search measured.
        effective_bits: Stored bits per expert weight.
        memory_bytes: At the cost geometry.
        latency_s: Likewise.
        energy_j: Likewise.
        evaluations: Distinct maps evaluated.
        tokens: Forwarded tokens spent, profile included.
        allowed: Forwarded tokens that every agent might spend.
        seconds: Wall time of the search, profile left out.
        curve: (tokens spent, KL on the search text) whenever the best map changed.
    """

    model: str
    contest: str
    seed: int
    agent: str
    factor: int
    kl: float
    perplexity: float
    accuracy: float
    search_kl: float
    effective_bits: float
    memory_bytes: float
    latency_s: float
    energy_j: float
    evaluations: int
    tokens: float
    allowed: float
    seconds: float
    curve: tuple[tuple[float, float], ...]

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What tells it from the others."""
        return self.model, self.contest, self.seed, self.agent, self.factor

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """Return the outcome that a line of ``outcomes.jsonl`` holds.

        Raises:
            InputError: If it holds none.
        """
        try:
            curve = tuple((float(x), float(y)) for x, y in data["curve"])
            return cls(**{**data, "curve": curve})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"A line of outcomes is none ({error}); remove it, and the same command goes on."
            ) from error


def read_outcomes(path: Path) -> list[Outcome]:
    """Return the outcomes that a group keeps in a file; none where there is no file.

    Raises:
        InputError: If a line holds none.
    """
    if not path.exists():
        return []
    lines = JsonLines(path)
    lines.close()
    return [Outcome.from_json(line) for line in lines]


def entrants(names: tuple[str, ...]) -> list[Entrant]:
    """Return the agents with the controls that always run, each once.

    Raises:
        InputError: If there is no such agent.
    """
    made = [Entrant(REFERENCE, make_agent("mckp"), larger=True)]
    made.append(Entrant(SMALL, make_agent("mckp"), larger=False))
    for name in names:
        agent = make_agent(name)
        label = label_of(agent, name)
        if label == REFERENCE:
            continue
        larger = getattr(agent, "cost", "") == ONE
        reads = getattr(agent, "reads", SENSITIVITIES)
        forwards = getattr(agent, "forwards", 0.0)
        made.append(Entrant(label, agent, larger, reads, forwards))
        control = getattr(agent, "control", None)
        if callable(control):
            made.append(Entrant(f"{label}, rate 0", control(), larger, reads))
    labels = [one.label for one in made]
    if len(set(labels)) != len(labels):
        raise InputError("Two agents have one name, so that no table can tell them apart.")
    return made


class Group:
    """One model with one calibration draw, and every contest held on it.

    Args:
        plan: The grid.
        model: The checkpoint.
        seed: Of the draw.
        folder: Of the whole comparison.
    """

    def __init__(self, plan: Plan, model: str, seed: int, folder: Path) -> None:
        self.plan = plan
        self.model = Path(model).name
        self.seed = seed
        self.folder = folder / f"{self.model}-seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._config = replace(plan.config, model=model, seed=seed)
        self._larger: dict[tuple[int, Signal], Profile] = {}

    def missing(self) -> list[tuple[Contest, Entrant]]:
        """Return what is still to be run, in order."""
        done = {outcome.key for outcome in self.outcomes()}
        factor = self.plan.factor
        return [
            (contest, entrant)
            for contest in self.plan.contests
            for entrant in entrants(self.plan.agents)
            if (self.model, contest.text, self.seed, entrant.label, factor) not in done
        ]

    def outcomes(self) -> list[Outcome]:
        """Return what has been run, by any plan of this folder."""
        return read_outcomes(self.folder / KEPT)

    def run(self) -> Iterator[Outcome]:
        """Run what is missing, and yield each outcome once it is kept.

        Raises:
            InputError: If no map is within a contest's limits, before any is held; or an agent
                fails.
        """
        todo = self.missing()
        if not todo:
            return
        for contest in self.plan.contests:
            self._within(contest, self.session.problem(self.profile))
        kept = JsonLines(self.folder / KEPT)
        self.session.journal = JsonLines(self.folder / "journal.jsonl")
        try:
            for contest, entrant in todo:
                outcome = self._outcome(contest, entrant)
                kept.append(asdict(outcome))
                yield outcome
        finally:
            kept.close()
            self.session.journal.close()

    @cached_property
    def session(self) -> Session:
        """The model with its text."""
        from dmpq.session import Session

        return Session(self._config)

    @property
    def allowed(self) -> float:
        """T: forwarded tokens that every agent may spend."""
        from dmpq.agents.base import FINALISTS

        config, spent = self._config, self.profile.cost_tokens
        whole = (self.plan.factor * config.evaluations + 1) * config.search_tokens
        return spent + whole + (FINALISTS + 1) * config.selection_tokens

    @cached_property
    def profile(self) -> Profile:
        """The profile that searches start from."""
        return self._profile(self.session, self._config.profile_tokens)

    def larger_profile(self, entrant: Entrant) -> Profile:
        """Return the profile that takes all that is allowed but an entrant's own forwards.

        Whoever reads none has the one that searches start from, which prices need too.

        Raises:
            InputError: If these alone are more than is allowed.
        """
        from dmpq.profiling import gradient_cost

        small, config = self.profile, self._config
        needed = math.ceil(entrant.forwards) + 2  # full precision, and its map
        spare = self.allowed - (small.cost_tokens if entrant.charged else 0.0)
        if spare < needed * config.search_tokens:
            raise InputError(
                f"{entrant.label} takes {needed} forwards of the search text, and the "
                f"{spare:,.0f} tokens left for them are not enough; raise --evaluations."
            )
        if not entrant.charged:
            return small
        left = self.allowed - max(_KEPT_FORWARDS, needed) * config.search_tokens
        splits, signal = self.session.text, entrant.signal
        per_token, most = small.cost_tokens / small.tokens, math.inf
        if signal == "gradient":
            per_token = gradient_cost(small.spec, len(small.menu))
            most = splits.profile.size + splits.further.size
        length = splits.profile.shape[1]
        whole = max(small.tokens, int(min(left / per_token, most)) // length * length)
        if (whole, signal) not in self._larger:
            session = self.session.with_text(profile_tokens=whole, signal=signal)
            self._larger[whole, signal] = self._profile(session, whole)
        return self._larger[whole, signal]

    def _profile(self, session: Session, tokens: int) -> Profile:
        from dmpq.profile import Profile

        gradient = "gradient-" if session.config.signal == "gradient" else ""
        path = self.folder / f"profile-{gradient}{tokens}.safetensors"
        if not path.exists():
            session.profile().save(path)
        return Profile.load(path)

    def _searched(self, entrant: Entrant) -> ModelEvaluator:
        """Return an entrant's evaluator: on the search's text, and on more for its own signal."""
        if not entrant.larger or entrant.charged or not entrant.forwards:
            return self._evaluator("search", batches=_BATCHES)
        splits = self.session.text
        tokens = min(self.allowed / (entrant.forwards + 2), _MOST_OWN_TEXT)
        count = max(int(tokens) // splits.search.shape[1], len(splits.search))
        return self._evaluator("search", np.concatenate([splits.search, splits.further])[:count])

    def _evaluator(
        self, role: str, windows: Windows | None = None, *, batches: int = 1
    ) -> ModelEvaluator:
        """Return an evaluator that has been asked nothing yet.

        Args:
            role: Of the text.
            windows: The text; ``None`` for the role's own.
            batches: Into which it is cut at least.
        """
        from dmpq.model_evaluator import ModelEvaluator

        windows = getattr(self.session.splits, role) if windows is None else windows
        return ModelEvaluator(
            self.session.bank,
            windows,
            label=role,
            journal=self.session.journal,
            batch_tokens=min(_LARGEST_BATCH, -(-windows.size // batches)),
        )

    @cached_property
    def _heldout(self) -> ModelEvaluator:
        return self._evaluator("heldout")

    def _problem(self, contest: Contest, entrant: Entrant) -> Problem:
        profile = self.larger_profile(entrant) if entrant.larger else self.profile
        problem = self.session.problem(
            profile,
            evaluator=self._searched(entrant),
            selector=None if entrant.larger else self._evaluator("selection"),
            further=() if entrant.larger else self.session.further(),
        )
        charged = profile.cost_tokens if entrant.charged else 0.0
        return replace(self._within(contest, problem), max_tokens=self.allowed - charged)

    def _within(self, contest: Contest, problem: Problem) -> Problem:
        """Return a problem on the contest's device, within its limits."""
        from dmpq.hw_models import load_hardware
        from dmpq.objective import Constraints

        free = replace(problem, constraints=Constraints())
        if contest.hw is not None:
            free = replace(free, hardware=load_hardware(contest.hw))
        return replace(free, constraints=contest.constraints(free.baselines))

    def _outcome(self, contest: Contest, entrant: Entrant) -> Outcome:
        problem = self._problem(contest, entrant)
        charged = problem.profile.cost_tokens if entrant.charged else 0.0
        curve: list[tuple[float, float]] = []
        best = -math.inf

        def on_candidate(candidate: Candidate) -> None:
            nonlocal best
            if candidate.text is None and candidate.feasible and candidate.reward > best:
                best = candidate.reward
                curve.append((charged + candidate.tokens, candidate.kl))

        started = time.monotonic()
        evaluations = 1 if entrant.larger else self.plan.factor * self._config.evaluations
        result = run_agent(
            entrant.agent,
            entrant.label,
            problem,
            evaluations=evaluations,
            seed=self.seed,
            on_candidate=on_candidate,
            trace=self.folder / "agent_error.txt",
        )
        seconds = time.monotonic() - started
        chosen = result.assignment[None]
        judged = self._heldout.evaluate(problem.expand(chosen))
        cost = problem.costs(chosen)
        return Outcome(
            model=self.model,
            contest=contest.text,
            seed=self.seed,
            agent=entrant.label,
            factor=self.plan.factor,
            kl=float(judged.kl[0]),
            perplexity=float(judged.perplexity[0]),
            accuracy=float(self._heldout.accuracy(problem.expand(chosen))[0]),
            search_kl=float(result.scores.kl[0]),
            effective_bits=float(problem.effective_bits(chosen)[0]),
            memory_bytes=float(cost.memory_bytes[0]),
            latency_s=float(cost.latency_s[0]),
            energy_j=float(cost.energy_j[0]),
            evaluations=result.evaluations,
            tokens=charged + result.tokens,
            allowed=self.allowed,
            seconds=seconds,
            curve=tuple(curve),
        )


def run_group(
    plan: Plan, model: str, seed: int, folder: Path, report: Callable[[Outcome], None]
) -> None:
    """Run one group, and report each outcome; what a process of its own does."""
    use_threads(plan.config.threads)
    for outcome in Group(plan, model, seed, folder).run():
        report(outcome)
