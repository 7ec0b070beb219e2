"""The hardware in the loop: whole maps are measured while a search runs, and correct its costs.

Before the search one uniform map per kernel is measured, so that limits on latency hold for
corrected costs from the start; then every K-th new map that the agent reports. What was measured
is kept in the run's journal under its map, so that an interrupted run goes on to the same result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.hw_models.corrected import Correction, live_base
from dmpq.hw_models.whole import WholeMaps, WholeTiming

if TYPE_CHECKING:
    from rich.console import Console

    from dmpq.agents import Candidate
    from dmpq.files import JsonLines
    from dmpq.hw_models.corrected import CorrectedModel
    from dmpq.problem import Problem
    from dmpq.profile import Profile
    from dmpq.session import Session

Progress = Callable[[str, int, int], None]

_PRICED: Final = ("baselines", "linear_latency", "linear_energy", "linear_ratios", "projection")
"""What a problem computes from latency, once, and must compute again when costs change. What a
policy sees of the problem is left as it was when the search began."""


@dataclass(frozen=True)
class LoopReport:
    """What measuring whole maps has found.

    Attributes:
        every: One of how many new maps was measured.
        layers: MoE layers that were timed.
        all_layers: MoE layers that there are; the time of the others is taken in proportion.
        correction: The factors.
        predicted_s: Latency of the chosen map by the uncorrected table.
        corrected_s: By the corrected one.
        measured_s: With the measured time of the routed experts in place of the predicted one.
        timing: The measured time of the timed layers' routed experts.
        used: Whether this very map is among those that the correction was fitted to.
    """

    every: int
    layers: tuple[int, ...]
    all_layers: int
    correction: Correction
    predicted_s: float
    corrected_s: float
    measured_s: float
    timing: WholeTiming
    used: bool

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values, units in the names."""
        return asdict(self)

    def show(self, name: str, console: Console) -> None:
        """Print it.

        Args:
            name: Of the allocation that was chosen.
            console: Where.
        """
        found, timing = self.correction, self.timing
        console.print(
            f"  latency of {name}: predicted {self.predicted_s * 1e6:,.1f} µs, corrected "
            f"{self.corrected_s * 1e6:,.1f} µs, measured {self.measured_s * 1e6:,.1f} µs"
            f"{' (one of the maps that correct)' if self.used else ''}"
        )
        console.print(
            f"  measured: routed experts of {len(self.layers)} of {self.all_layers} layers, "
            f"{timing.seconds * 1e6:,.1f} µs, IQR {timing.iqr_s * 1e6:,.1f} µs, {timing.n} "
            f"repetitions, {timing.preempted} interrupted"
        )
        console.print(
            f"  {found.measured} measured maps correct the table: its error on them is "
            f"{found.error_before:.1%}, corrected {found.error_after:.1%}; times are multiplied by"
        )
        for kernel, factor in found.factors.items():
            console.print(f"    {factor.value:.3f} ± {factor.deviation:.3f}  {kernel}")


@dataclass(eq=False)
class HardwareLoop:
    """Measures whole maps and corrects a model by them.

    Attributes:
        model: What is corrected.
        whole: Measures.
        every: For how many evaluations one map is measured.
        journal: Where what was measured is kept and looked up.
        progress: Called with a stage's name, steps done, and all steps.
    """

    model: CorrectedModel
    whole: WholeMaps
    every: int
    journal: JsonLines | None = None
    progress: Progress | None = None
    _known: dict[str, WholeTiming] = field(default_factory=dict, repr=False)
    _used: set[str] = field(default_factory=set, repr=False)
    _measured: int = field(default=0, repr=False)

    @classmethod
    def of(cls, session: Session, profile: Profile) -> HardwareLoop | None:
        """Return a session's loop, ``None`` where its configuration asks for none.

        Args:
            session: With its journal.
            profile: Says how often tokens select each expert.

        Raises:
            InputError: If the hardware is not the machine at hand, or memory does not suffice.
        """
        every = session.config.measure_every
        if every is None:
            return None
        model = session.corrected
        whole = WholeMaps(
            bench=live_base(model).bench,
            spec=session.cost_spec(profile.spec),
            menu=profile.menu,
            workload=session.workload,
            inclusion=profile.frequency,
            seed=session.config.seed,
        )
        model.kernel_of = whole.kernel_of
        loop = cls(model, whole, every, session.journal, session.progress)
        loop._read_journal()
        return loop

    def start(self) -> None:
        """Measure one uniform map per kernel, and correct the costs by them.

        Where every expert is pruned there is nothing to measure.
        """
        menu = self.whole.menu
        first = {self.whole.kernel_of(menu.formats[i]): i for i in menu.stored}
        for done, index in enumerate(first.values(), start=1):
            self._observe(np.full(self.whole.spec.num_experts, index))
            if self.progress is not None:
                self.progress("measuring whole maps", done, len(first))

    def after(self, candidate: Candidate, problem: Problem) -> None:
        """Measure a map for every K evaluations, and correct the problem's costs by it.

        Raises:
            InputError: If the corrected costs leave no map within the limits.
        """
        due = int((candidate.spent or candidate.evaluation) // self.every)
        if due <= self._measured:
            return
        self._measured = due
        self._observe(problem.expand(candidate.assignment[None])[0])
        for name in _PRICED:
            vars(problem).pop(name, None)
        if not problem.projection.possible:
            raise InputError(
                "Measured maps are slower than predicted, and at the corrected costs no map is "
                "known that meets the limits; raise --latency-ms or --energy-j."
            )

    def report(self, problem: Problem, assignment: NDArray[np.integer]) -> LoopReport:
        """Measure the chosen map, (D,), unless it was, and return what is known of its latency.

        It is compared with the corrected costs, and does not correct them.
        """
        chosen = problem.expand(np.asarray(assignment)[None])
        timing, whole = self._timed(chosen[0]), self.whole
        about = (whole.spec, whole.menu)
        inclusion = whole.inclusion
        predicted = self.model.base.cost(*about, chosen, whole.workload, inclusion=inclusion)
        parts, timed = (
            sum(
                self.model.parts(
                    *about, chosen[0], whole.workload, inclusion=inclusion, layers=layers
                ).values()
            )
            for layers in (None, whole.layers)
        )
        predicted_s = float(predicted.latency_s[0])
        return LoopReport(
            every=self.every,
            layers=whole.layers,
            all_layers=len(whole.spec.moe_layers),
            correction=self.model.correction,
            predicted_s=predicted_s,
            corrected_s=float(problem.costs(np.asarray(assignment)[None]).latency_s[0]),
            measured_s=predicted_s - parts + timing.seconds * parts / timed,
            timing=timing,
            used=self._key(chosen[0]) in self._used,
        )

    def _observe(self, assignment: NDArray[np.integer]) -> None:
        timing, whole = self._timed(assignment), self.whole
        self._used.add(self._key(assignment))
        self.model.observe(
            whole.spec,
            whole.menu,
            assignment,
            whole.workload,
            timing.seconds,
            inclusion=whole.inclusion,
            layers=whole.layers,
        )

    def _timed(self, assignment: NDArray[np.integer]) -> WholeTiming:
        """Return the time of a map: the journal's, or a new one."""
        key = self._key(assignment)
        if key not in self._known:
            self._known[key] = timing = self.whole.measure(assignment)
            if self.journal is not None:
                record = {"whole": self.whole.digest, "map": key, **asdict(timing)}
                self.journal.append(record)
        return self._known[key]

    def _key(self, assignment: NDArray[np.integer]) -> str:
        experts = self.whole.spec.num_experts
        formats = np.broadcast_to(np.asarray(assignment).reshape(experts, -1), (experts, 2))
        return hashlib.sha256(formats.astype(np.uint8).tobytes()).hexdigest()[:32]

    def _read_journal(self) -> None:
        for record in () if self.journal is None else self.journal:
            match record:
                case {
                    "whole": str(digest),
                    "map": str(key),
                    "seconds": float(seconds),
                    "iqr_s": float(iqr),
                    "n": int(n),
                    "preempted": int(preempted),
                } if digest == self.whole.digest and 0 < seconds < math.inf:
                    self._known[key] = WholeTiming(seconds, iqr, n, preempted)
