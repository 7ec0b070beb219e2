"""Everything a search needs in one object: choices, evidence, evaluator, costs, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmpq import features
from dmpq.decisions import Assignments, Decisions, Floats, Ints, Serve, check_whole
from dmpq.errors import InputError
from dmpq.evaluation import Evaluator, EvaluatorField, SurrogateEvaluator
from dmpq.formats import Menu
from dmpq.hw_models import Cost, HardwareModel, Workload
from dmpq.hw_models.bounds import Bounded
from dmpq.objective import Baselines, Constraints, Weights, reward_terms
from dmpq.profile import Profile
from dmpq.solvers.launches import launches_of
from dmpq.solvers.limits import (
    BITS_PER_BYTE,
    NOT_ADDITIVE,
    Words,
    exact_limits,
    memory_notes,
    refuse_impossible,
    shares_taken,
    with_device_memory,
    within,
)
from dmpq.solvers.projection import Projection
from dmpq.solvers.relaxation import Relaxation
from dmpq.spec import ModelSpec

_BASELINE_WIDTH: Final = 8


@dataclass(frozen=True, eq=False)
class Scores:
    """What K maps are worth.

    Attributes:
        reward: (K,), sum of the terms; ``-inf`` where the loss is not finite.
        terms: Name → (K,), as :func:`dmpq.objective.reward_terms` returns them.
        kl: (K,), nats per token.
        nll: (K,), nats per token.
        router_shift: (K,), share of token-expert selections changed; NaN where no model ran.
        effective_bits: (K,), stored bits per expert weight.
        cost: Latency, memory and energy.
        feasible: (K,), whether every limit is met.
        tokens: What the answer cost, in forwarded tokens; 0 where all was known.
    """

    reward: Floats
    terms: dict[str, Floats]
    kl: Floats
    nll: Floats
    router_shift: Floats
    effective_bits: Floats
    cost: Cost
    feasible: NDArray[np.bool_]
    tokens: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A search problem: N experts, D decisions, B formats.

    A decision is what shares one format (:class:`dmpq.decisions.Decisions`). Bits are counted on
    the model itself, costs at ``cost_spec``.

    Experts that calibration never hit have sensitivities of exactly 0. They get the narrowest
    format that is stored, unless budget is left that nothing else can use and the reward does not
    fall: then they are widened in turn. On being pruned see :mod:`dmpq.solvers.projection`.

    Attributes:
        profile: The experts' statistics; its menu is the problem's.
        hardware: Prices maps.
        cost_spec: Geometry at which costs are computed; same layers and experts as the model.
        workload: What a step is.
        weights: Of the reward's terms.
        constraints: Upper limits that no proposal exceeds; see also :attr:`limits`.
        serve: What shares one format.
        evaluator: Measures maps; ``None``, the default, for the profile's additive surrogate.
        selector: Measures finalists on fresh text, for the final choice.
        further: Evaluators on further calibration text, for searches that would rather see new
            text than the same again. Each may be read for as long as no other is.
        max_tokens: What evaluations and final choice may cost, in forwarded tokens; ``None`` to
            count evaluations instead.

    Raises:
        InputError: If no map meets the limits, or the geometries do not match.
    """

    profile: Profile
    hardware: HardwareModel
    cost_spec: ModelSpec
    workload: Workload = field(default_factory=Workload)
    weights: Weights = field(default_factory=Weights)
    constraints: Constraints = field(default_factory=lambda: Constraints(avg_bits=3.0))
    serve: Serve = "expert"
    evaluator: EvaluatorField = EvaluatorField()  # noqa: RUF009  # a descriptor
    selector: Evaluator | None = None
    further: Sequence[Evaluator] = ()
    max_tokens: float | None = None

    def __post_init__(self) -> None:
        if not np.array_equal(self.cost_spec.layer_of_expert, self.spec.layer_of_expert):
            raise InputError(
                f"Costs are to be computed for {self.cost_spec.name}, which has other layers or "
                f"experts than {self.spec.name}; use its widths only (with_widths_of)."
            )
        check_whole(self.serve, self.menu)
        refuse_impossible(
            self.limits,
            self.projection,
            costs=self.costs,
            num_weights=self.num_weights,
            fixed_bytes=self._fixed_bytes,
            words=Words(
                narrowest=self.menu.keys[0],
                geometry=self.cost_spec.name,
                device=self.hardware.name,
                capacity_bytes=(
                    None
                    if self.limits.memory_bytes == self.constraints.memory_bytes
                    else self.hardware.capacity_bytes
                ),
                routed=self.profile.tokens > 0,
            ),
        )

    @cached_property
    def limits(self) -> Constraints:
        """The constraints, with the device's own memory as one of them where it binds.

        It binds where maps that meet the other limits that add up would not fit, or where the
        limit on memory that was set is above it.
        """
        return with_device_memory(
            self.constraints,
            capacity_bytes=self.hardware.capacity_bytes,
            sizes=self.sizes,
            num_weights=self.num_weights,
            cost_sizes=self._cost_sizes,
            fixed_bytes=self._fixed_bytes,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the limits, one clause each."""
        return memory_notes(self.constraints, self.limits, self.hardware)

    @property
    def spec(self) -> ModelSpec:
        """Geometry of the model."""
        return self.profile.spec

    @property
    def menu(self) -> Menu:
        """Formats on offer."""
        return self.profile.menu

    @property
    def num_decisions(self) -> int:
        """D."""
        return len(self.sizes)

    @property
    def num_weights(self) -> int:
        """Weights of all routed experts."""
        return self.spec.expert_parameters

    @cached_property
    def _decisions(self) -> Decisions:
        return Decisions(self.spec, self.serve)

    def per_decision(self, values: Floats) -> Floats:
        """Return the mean of experts' values, (N, ...), over each decision, (D, ...)."""
        return self._decisions.mean(values)

    @cached_property
    def sizes(self) -> Ints:
        """Stored bits of each decision in each format, on the model itself, (D, B)."""
        return self._decisions.summed(self.spec.stored_bits(self.menu)).astype(np.int64)

    @property
    def decision_weights(self) -> Ints:
        """Number of weights that each decision covers, (D,)."""
        return self._decisions.weights

    @cached_property
    def sensitivity(self) -> Floats:
        """KL when only this decision is in a format, nats per token, (D, B).

        Summed over a layer's experts. Where the profile has none per projection, an expert's is
        shared equally between its two, as the additive surrogate does.
        """
        own = self.profile.projection_sensitivity
        if self.serve != "projection" or own is None:
            half = self.profile.sensitivity / 2
            own = np.stack([half, half], axis=1)
        return self._decisions.summed(own)

    @cached_property
    def unhit(self) -> Ints:
        """Decisions of which calibration hit no expert."""
        return np.flatnonzero(self.per_decision(self.profile.hits.astype(np.float64)) == 0)

    def expand(self, assignments: Assignments) -> Assignments:
        """Return maps of decisions, (K, D), as maps of experts (K, N) or projections (K, 2N)."""
        return self._decisions.expand(assignments)

    def uniform(self, key: str) -> Ints:
        """Return the map with one format everywhere, (D,)."""
        return np.full(self.num_decisions, self.menu.index(key))

    def effective_bits(self, assignments: Assignments) -> Floats:
        """Return stored bits per expert weight of maps (K, D), scales included, (K,)."""
        return self._stored(assignments) / self.num_weights

    def _stored(self, assignments: Assignments) -> Ints:
        """Return stored bits of maps (K, D), (K,)."""
        bits: Ints = self.sizes[np.arange(self.num_decisions), assignments].sum(1)
        return bits

    def costs(self, assignments: Assignments) -> Cost:
        """Return the costs of maps (K, D), by the full cost model."""
        return self.hardware.cost(
            self.cost_spec,
            self.menu,
            self.expand(assignments),
            self.workload,
            inclusion=self.profile.frequency,
        )

    @cached_property
    def baselines(self) -> Baselines:
        """What the reward's terms are relative to.

        Damage is that of the narrowest format that is stored, pruned experts or not on the menu,
        so that rewards stay comparable. One that is not positive (a menu of full precision alone)
        counts as 1 nat per token.
        """
        widths, narrowest = self.menu.bits, self.menu.narrowest
        quantized = np.flatnonzero(~self.menu.pruned & (widths <= _BASELINE_WIDTH))
        index = int(quantized[-1]) if quantized.size else narrowest
        index = int(np.flatnonzero(widths == widths[index])[0])
        cost = self.costs(np.full((1, self.num_decisions), index))
        damage = float(self.profile.uniform_kl[narrowest])
        return Baselines(
            damage=damage if damage > 0 else 1.0,
            latency_s=float(cost.latency_s[0]),
            memory_bytes=float(cost.memory_bytes[0]),
            energy_j=float(cost.energy_j[0]),
        )

    @cached_property
    def _uniform_costs(self) -> Cost:
        """Costs of the uniform maps, each (B,)."""
        formats = np.arange(len(self.menu))
        return self.costs(np.repeat(formats[:, None], self.num_decisions, axis=1))

    @cached_property
    def linear_latency(self) -> Floats:
        """Time of each decision in each format, seconds, (D, B)."""
        return self._decisions.summed(
            self.hardware.expert_latency(
                self.cost_spec, self.menu, self.workload, inclusion=self.profile.frequency
            )
        )

    @cached_property
    def linear_energy(self) -> Floats:
        """Energy of each decision in each format, joules, (D, B).

        Its time at the mean power of the uniform map in that format.
        """
        uniform = self._uniform_costs
        return self.linear_latency * (uniform.energy_j / uniform.latency_s)

    @cached_property
    def _cost_sizes(self) -> Ints:
        """Bits on the device of each decision in each format, at the cost geometry, (D, B)."""
        stored = self.hardware.stored_bits(self.cost_spec, self.menu)
        return self._decisions.summed(stored).astype(np.int64)

    @cached_property
    def linear_ratios(self) -> Floats:
        """Each decision's share of damage, latency, memory and energy, (D, B, 4).

        Relative to the baselines, in the order of the reward's terms; the parts that no decision
        changes are left out.
        """
        base = self.baselines
        return np.stack(
            [
                self.sensitivity / base.damage,
                self.linear_latency / base.latency_s,
                self._cost_sizes / BITS_PER_BYTE / base.memory_bytes,
                self.linear_energy / base.energy_j,
            ],
            axis=2,
        )

    @cached_property
    def linear_limits(self) -> tuple[Ints, Ints]:
        """The exact budgets: what each format takes, (C, D, B), and the limits, (C,), in bits.

        Effective bits on the model itself, then memory at the cost geometry; each where set.
        """
        return exact_limits(
            self.limits,
            sizes=self.sizes,
            num_weights=self.num_weights,
            cost_sizes=self._cost_sizes,
            fixed_bytes=self._fixed_bytes,
        )

    @cached_property
    def _fixed_bytes(self) -> float:
        """Memory that no decision changes."""
        first = float(self._uniform_costs.memory_bytes[0])
        return first - float(self._cost_sizes[:, 0].sum()) / BITS_PER_BYTE

    def feasible(self, assignments: Assignments) -> NDArray[np.bool_]:
        """Return whether maps (K, D) meet every limit, (K,)."""
        return self._within(assignments, self.costs(assignments))

    def _within(self, assignments: Assignments, cost: Cost) -> NDArray[np.bool_]:
        bits = self._stored(assignments)
        return within(self.limits, bits, cost, num_weights=self.num_weights)

    def linear_values(self, log_importance: Floats | None = None) -> Floats:
        """Return the linearised negative reward of each decision and format, (D, B).

        Args:
            log_importance: (D,), by whose exponential each decision's damage counts; ``None``
                for zeros.

        Raises:
            InputError: If it has another shape or is not finite.
        """
        parts = self.linear_ratios * self.weights.as_array()
        if log_importance is None:
            summed: Floats = parts.sum(2)
            return summed
        if np.shape(log_importance) != (self.num_decisions,):
            raise InputError(
                f"A log-importance of shape {np.shape(log_importance)} does not match "
                f"{self.num_decisions} decisions."
            )
        if not np.isfinite(log_importance).all():
            raise InputError("Log-importances must be finite numbers; some are not.")
        values: Floats = parts[:, :, 0] * np.exp(log_importance)[:, None] + parts[:, :, 1:].sum(2)
        return values

    def propose(self, log_importance: Floats) -> Ints:
        """Return the map that log-importances (D,) stand for, within every limit, (D,)."""
        return self.project_rewards(self.linear_values(log_importance))

    def mckp(self) -> Ints:
        """Return the best map of the linearised objective, (D,): that of zero log-importances.

        Exact for limits on bits and memory, but where latency or energy is weighed and a map of
        fewer launches is better (:mod:`dmpq.solvers.launches`): then that.
        """
        return self.propose(np.zeros(self.num_decisions))

    def project(self, values: Floats) -> Ints:
        """Return the map of least value within every limit, (D,).

        Exact for limits on bits and memory; for others see :mod:`dmpq.solvers.projection`.

        Args:
            values: (D, B), what each format costs, in any unit; smaller is better.
        """
        return self.projection.project(values)

    def project_rewards(self, values: Floats) -> Ints:
        """Return the map of least value, (D,), of values that are negative rewards.

        What launches cost in the reward counts beside them.

        Args:
            values: (D, B), as :meth:`linear_values` gives them.
        """
        return self.projection.project(values, formats=self._worth_launching)

    @cached_property
    def _worth_launching(self) -> NDArray[np.bool_] | None:
        """Formats whose launches pay, (D, B); ``None`` where launches are not weighed."""
        if self._launch_values is None:
            return None
        return self.projection.worth_launching(self.linear_values())

    @cached_property
    def projection(self) -> Projection:
        """The limits, as something to project onto."""
        exact, bits = self.linear_limits
        given = self.limits.given()
        shares = {"latency_s": self.linear_latency, "energy_j": self.linear_energy}
        return Projection(
            sizes=self.sizes,
            names=tuple(name for name in given if name not in NOT_ADDITIVE),
            exact=exact,
            limits=bits,
            priced={name: shares[name] / given[name] for name in NOT_ADDITIVE if name in given},
            unhit=self.unhit,
            pruning=self.menu.pruning,
            usage=self._usage,
            groups=self._decisions.layers,  # a layer's experts share launches
            launch_values=self._launch_values,
            relaxation=self._relaxation(exact, bits),
        )

    @cached_property
    def _launch_values(self) -> Floats | None:
        """What each format costs in the objective by being present in a layer, (G, B)."""
        weights, base = self.weights, self.baselines
        if not weights.lat and not weights.eng:
            return None

        def weighed(latency_s: Floats, energy_j: Floats) -> Floats:
            total: Floats = weights.lat * latency_s / base.latency_s
            return total + weights.eng * energy_j / base.energy_j

        def usage(maps: Ints) -> Floats:
            cost = self.costs(maps)
            return weighed(cost.latency_s, cost.energy_j)[:, None]

        own = weighed(self.linear_latency, self.linear_energy)[None]
        launches: Floats = launches_of(usage, own, self._decisions.layers)[0]
        return launches

    def _relaxation(self, exact: Ints, bits: Ints) -> Relaxation | None:
        """Return the limits relaxed, where some do not add up and the costs can be bounded.

        Args:
            exact: What each format takes of each limit that adds up, (C, D, B).
            bits: Those limits, (C,).
        """
        given = self.limits.given()
        priced = {str(name): given[name] for name in NOT_ADDITIVE if name in given}
        if not priced or not isinstance(self.hardware, Bounded) or not self.profile.tokens:
            return None  # before the routing is known, nothing is proven
        names = [name for name in given if name not in NOT_ADDITIVE]
        return Relaxation(
            bound=self.hardware.step_bound(
                self.cost_spec, self.menu, self.workload, inclusion=self.profile.frequency
            ),
            decisions=self._decisions,
            exact={
                name: (sizes, int(limit))
                for name, sizes, limit in zip(names, exact, bits, strict=True)
            },
            priced=priced,
        )

    def _usage(self, assignments: Assignments) -> Floats:
        """Return what maps (K, D) take of the limits on latency and energy, as shares, (K, P)."""
        return shares_taken(self.limits, self.costs(assignments))

    def evaluate(self, assignments: Assignments, evaluator: Evaluator | None = None) -> Scores:
        """Return the true scores of maps (K, D).

        Args:
            assignments: (K, D).
            evaluator: Whose text to measure on; ``None`` for the problem's own.
        """
        return self._scores(self.evaluator if evaluator is None else evaluator, assignments)

    def surrogate(self, assignments: Assignments) -> Scores:
        """Return the scores of maps (K, D) by the profile's additive surrogate; free."""
        return self._scores(SurrogateEvaluator(self.profile), assignments)

    def _scores(self, evaluator: Evaluator, assignments: Assignments) -> Scores:
        found = evaluator.evaluate(self.expand(assignments))
        cost = self.costs(assignments)
        terms = reward_terms(self.weights, self.baselines, found.kl, cost)
        finite = np.isfinite(found.kl)
        return Scores(
            reward=np.where(finite, sum(terms.values()), -np.inf),
            terms=terms,
            kl=found.kl,
            nll=found.nll,
            router_shift=found.router_shift,
            effective_bits=self.effective_bits(assignments),
            cost=cost,
            feasible=self._within(assignments, cost),
            tokens=found.tokens,
        )

    @cached_property
    def _named_features(self) -> dict[str, Floats]:
        return features.rows(
            self.profile,
            sensitivity=self.sensitivity,
            weights=self.decision_weights,
            mean=self.per_decision,
            projections=self.serve == "projection",
        )

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Columns of :attr:`features`."""
        return tuple(self._named_features)

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """What a policy sees of each decision, float32 (D, F) in [-1, 1]."""
        return np.stack(list(self._named_features.values()), axis=1).astype(np.float32)

    @cached_property
    def context(self) -> NDArray[np.float32]:
        """What a policy sees of the problem as a whole, float32 (C,) in [-1, 1]."""
        return features.context(
            self.profile,
            sizes=self.sizes,
            ratios=self.linear_ratios,
            baselines=self.baselines,
            constraints=self.limits,
            weights=self.weights,
            workload=self.workload,
        )
