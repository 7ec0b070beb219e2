"""From a configuration to a problem: load the model, cut the text, fill the bank, profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from dmpq.checks import check_numbers
from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.evaluation import Evaluator, LossUnit
from dmpq.files import JsonLines
from dmpq.formats import Menu
from dmpq.hw_models import HardwareModel, Workload, load_hardware
from dmpq.hw_models.corrected import CorrectedModel, live_base
from dmpq.objective import Constraints, Weights
from dmpq.problem import Problem
from dmpq.profile import Profile, empty_profile
from dmpq.spec import ModelSpec, load_geometry

if TYPE_CHECKING:
    from dmpq.bank import Bank
    from dmpq.data import CalibrationText, Splits, Windows
    from dmpq.model_evaluator import ModelEvaluator
    from dmpq.moe import MoEModel
    from dmpq.tasks.splits import TaskSplits

GIGABYTE: Final = 1e9
_LARGEST_WEIGHT: Final = 1e6
_LONGEST_WINDOW: Final = 2048

Progress = Callable[[str, int, int], None]


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Show nothing."""


@dataclass(eq=False)
class Session:
    """A loaded model with its text and its variants, ready to be profiled and searched.

    Everything is made when it is first asked for, and kept.

    Attributes:
        config: What to do.
        journal: Where evaluations are kept; ``None`` for memory only. May be set later.
        progress: Called with a stage's name, steps done, and all steps.
        calibration: Text that GPTQ is calibrated by, as an earlier map or session tells it;
            ``None`` for text of this session's own.
    """

    config: SearchConfig
    journal: JsonLines | None = None
    progress: Progress = _silent
    calibration: CalibrationText | None = None

    @cached_property
    def menu(self) -> Menu:
        """The formats on offer."""
        c = self.config
        return Menu.parse(
            c.bits, quantizer=c.quantizer, symmetric=c.symmetric, group_sizes=c.group_sizes
        )

    @cached_property
    def hardware(self) -> HardwareModel:
        """The device that costs are computed for."""
        hardware = load_hardware(self.config.hw, tdp_w=self.config.tdp_w, progress=self.progress)
        if self.config.measure_every is None:
            return hardware
        corrected = CorrectedModel(hardware)
        live_base(corrected)
        return corrected

    @property
    def corrected(self) -> CorrectedModel:
        """The device, where ``measure_every`` lets measured maps correct its costs."""
        hardware = self.hardware
        if not isinstance(hardware, CorrectedModel):
            raise InputError("Costs are corrected by measured maps only with --measure-every.")
        return hardware

    @cached_property
    def workload(self) -> Workload:
        """The step that costs are computed for."""
        c = self.config
        return Workload(phase=c.phase, batch=c.batch, context=c.context)  # type: ignore[arg-type]

    @cached_property
    def constraints(self) -> Constraints:
        """The upper limits of the search."""
        c = self.config
        return Constraints(
            avg_bits=c.effective_avg_bits,
            memory_bytes=None if c.memory_gb is None else c.memory_gb * GIGABYTE,
            latency_s=None if c.latency_ms is None else c.latency_ms * 1e-3,
            energy_j=c.energy_j,
        )

    @cached_property
    def weights(self) -> Weights:
        """The weights of the reward's terms."""
        weights = Weights.parse(self.config.weights)
        if not 0 < weights.as_array().max() <= _LARGEST_WEIGHT:
            raise InputError(
                f"--weights {self.config.weights} cannot tell maps apart; give at least one "
                f"weight above 0, and none above {_LARGEST_WEIGHT:g}."
            )
        return weights

    @cached_property
    def _loaded(self) -> tuple[MoEModel, Any]:
        from dmpq.moe import load_model

        c = self.config
        head: dict[str, str] = {}
        if c.task is not None:
            from dmpq.tasks.splits import TASKS

            head["head"] = TASKS[c.task].head
        return load_model(
            c.model,
            revision=c.revision,
            device=c.device,
            trust_remote_code=c.trust_remote_code,
            **head,
        )

    def take(self, moe: MoEModel, tokenizer: Any) -> None:
        """Work on a model that is there already, or stands on the meta device."""
        self.__dict__["_loaded"] = moe, tokenizer  # a cached property

    @property
    def moe(self) -> MoEModel:
        """The model."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded[1]

    @property
    def lost(self) -> LossUnit:
        """What the search makes small, in words."""
        if self.config.task is None:
            return LossUnit()
        from dmpq.tasks.splits import TASKS

        metric: str = TASKS[self.config.task].metric
        return LossUnit.of_task(metric if self.config.signal == "task" else None)

    @cached_property
    def splits(self) -> Splits | TaskSplits:
        """The text, or the task's examples, in disjoint roles."""
        return self._text_splits() if self.config.task is None else self._task_splits()

    @property
    def text(self) -> Splits:
        """The splits of a text, where no task is asked for."""
        from dmpq.data import Splits

        assert isinstance(self.splits, Splits)
        return self.splits

    def _task_splits(self) -> TaskSplits:
        from dmpq.data import TokenRequest
        from dmpq.tasks.splits import load_task_splits

        c, (moe, tokenizer) = self.config, self._loaded
        assert c.task is not None
        saved = None if c.profile is None else self._saved_profile
        return load_task_splits(
            c.task,
            c.dataset,
            moe,
            tokenizer,
            tokens=TokenRequest(
                c.profile_tokens if saved is None else 0,
                c.search_tokens,
                c.selection_tokens,
                c.heldout_tokens,
            ),
            seed=c.seed,
            length=c.sequence_length,
            text_column=c.text_column,
            label_column=c.label_column,
            taken=None if saved is None else saved.drawn,
        )

    def _text_splits(self) -> Splits:
        from dmpq.data import TokenRequest, load_splits

        c, (moe, tokenizer) = self.config, self._loaded
        limit = getattr(moe.model.config.get_text_config(), "max_position_embeddings", None)
        length = c.sequence_length
        if length is None:
            length = min(limit or _LONGEST_WINDOW, _LONGEST_WINDOW)
        if not 2 <= length <= (limit or length):
            raise InputError(
                f"--sequence-length {length} does not suit {c.model}; give 2 to {limit}."
            )
        saved = None if c.profile is None else self._saved_profile
        draws = self._calibrates_itself and not self.menu.method.ebss
        tokens = TokenRequest(
            c.profile_tokens if saved is None else 0,
            c.search_tokens,
            c.selection_tokens,
            c.heldout_tokens,
            c.further_tokens,
            c.profile_tokens if draws else 0,
        )
        drawn = None if saved is None else saved.drawn
        told = self.calibration if saved is None else saved.calibration
        taken = (drawn, None if told is None else told.draw)
        splits = load_splits(
            c.dataset,
            tokenizer,
            length=length,
            tokens=tokens,
            seed=c.seed,
            taken=[draw for draw in taken if draw is not None],
        )
        roles = (
            splits.profile,
            splits.search,
            splits.selection,
            splits.further,
            splits.heldout,
        )
        largest = max(int(role.max()) for role in roles if role.size)
        known = moe.model.get_input_embeddings().weight.shape[0]
        if largest >= known:
            raise InputError(
                f"The tokenizer of {c.model} gives token {largest}, and the model knows {known} "
                "tokens; put the tokenizer that belongs to the model into its folder."
            )
        return splits

    def with_text(self, **options: Any) -> Session:
        """Return a session on the same model and variants with other text, or another signal.

        Args:
            options: Fields of the configuration, as ``profile_tokens``.
        """
        config = replace(self.config, **options)
        other = Session(config, self.journal, self.progress, self.calibrated_by)
        other.__dict__.update(_loaded=self._loaded, bank=self.bank)  # cached properties
        return other

    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of the profile and its text, one sentence each."""
        estimated = "sensitivities are estimated from gradients, not measured"
        pruned = (
            "gradients understate what pruning (0 bits) loses, by half on the reference model; "
            "measure it (--signal sensitivity), or leave 0 out of --bits"
        )
        calibrated = (
            "sensitivities are measured on the text that calibrates, where a width loses less "
            "than on other text"
        )
        own: tuple[str, ...] = (estimated,) if self.config.signal == "gradient" else ()
        if own and self.menu.pruned.any():
            own = (estimated, pruned)
        if self.bank.calibration is not None:
            own = (*own, *self.bank.calibration.notes())
            if self.calibrated_by == self._profiled_text:
                own = (*own, calibrated)
        if self.config.profile is None:
            return own
        drawn = self._saved_profile.drawn
        if drawn is None:
            text = "the profile does not say what text it has seen; the search may use it again"
            return *own, text
        if drawn.stream != self.splits.drawn.stream:
            return *own, f"the profile was measured on another text ({self._saved_profile.text})"
        return own

    @cached_property
    def bank(self) -> Bank:
        """Every expert in every format."""
        from dmpq.bank import Bank

        moe = self.moe
        return Bank(
            moe,
            self.menu,
            calibration=self._calibration_windows(),
            memory_bytes=self.config.bank_memory_gb * GIGABYTE,
            progress=lambda done, total: self.progress("quantizing", done, total),
        )

    @cached_property
    def calibrated_by(self) -> CalibrationText | None:
        """What GPTQ is calibrated by, text that no other role has; ``None`` without GPTQ."""
        if not self.menu.method.calibrated or self.calibration is not None:
            return self.calibration
        if self.config.profile is None:
            return self._own_calibration[1]
        found = self._saved_profile.calibration or self._profiled_text
        if found is None:
            raise InputError(
                f"The profile {self.config.profile} does not say what text it was measured on, "
                "and gptq is calibrated by that; measure it again by leaving --profile out."
            )
        return found

    @property
    def _profiled_text(self) -> CalibrationText | None:
        """What a saved profile was measured on, which calibrated GPTQ too in earlier versions."""
        from dmpq.data import CalibrationText

        drawn = None if self.config.profile is None else self._saved_profile.drawn
        return None if drawn is None else CalibrationText(self.config.dataset, drawn)

    @property
    def _calibrates_itself(self) -> bool:
        told = self.calibration is not None or self.config.profile is not None
        return self.menu.method.calibrated and not told

    @cached_property
    def _own_calibration(self) -> tuple[Windows, CalibrationText]:
        """Text that is drawn or written here, and what is told of it."""
        from dmpq.data import CalibrationText
        from dmpq.ebss import written

        splits, method = self.text, self.menu.method
        if method.ebss:
            return written(
                self.moe,
                self._start_tokens,
                method,
                length=splits.heldout.shape[1],
                progress=lambda done, total: self.progress("writing text", done, total),
            )
        assert splits.calibration is not None
        assert splits.calibrating is not None
        return splits.calibration, CalibrationText(self.config.dataset, splits.calibrating)

    @property
    def _start_tokens(self) -> tuple[int, ...]:
        """What the windows start with that the model writes, as many as the profile has."""
        from dmpq.ebss import start_tokens

        return start_tokens(
            *self._loaded,
            tokens=self.menu.method.tokens or self.config.profile_tokens,
            length=self.text.heldout.shape[1],
            seed=self.config.seed,
        )

    def _calibration_windows(self) -> Windows | None:
        """Return the windows of :attr:`calibrated_by`."""
        from dmpq.calibration import calibrating_windows

        if self._calibrates_itself:
            return self._own_calibration[0]
        if self.calibrated_by is None:
            return None
        return calibrating_windows(
            self.calibrated_by,
            *self._loaded,
            self.menu.method,
            progress=lambda done, total: self.progress("writing text", done, total),
        )

    def evaluator(self, split: str) -> ModelEvaluator:
        """Return the evaluator on one role's text: profile, search, selection or heldout."""
        from dmpq.model_evaluator import ModelEvaluator

        windows = getattr(self.splits, split)
        if self.config.task is None:
            return ModelEvaluator(self.bank, windows, label=split, journal=self.journal)
        from dmpq.tasks.evaluator import MetricEvaluator, TaskEvaluator

        by_metric = self.config.signal == "task" and split in ("search", "selection")
        kind = MetricEvaluator if by_metric else TaskEvaluator
        return kind(self.bank, windows, label=split, journal=self.journal)

    def further(self, tokens: int | None = None) -> Sequence[Evaluator]:
        """Return evaluators on pieces of the further text; none where there is no whole piece.

        Of a task's examples there are none: data sets of tasks are small.

        Args:
            tokens: Of a piece; ``None`` for the default.
        """
        from dmpq.further_text import PIECE_TOKENS, FurtherText

        if self.config.task is not None:
            return ()
        return FurtherText(
            self.bank,
            self.text.further,
            tokens=PIECE_TOKENS if tokens is None else tokens,
            journal=self.journal,
        )

    def cost_spec(self, spec: ModelSpec) -> ModelSpec:
        """Return the geometry that costs are computed with."""
        geometry = self.config.geometry
        return spec if geometry == "own" else spec.with_widths_of(load_geometry(geometry))

    def profile(self) -> Profile:
        """Return the saved profile that the configuration names, or measure one."""
        if self.config.profile is not None:
            return self._saved_profile
        from dmpq.profiling import measure_profile

        return measure_profile(
            self.evaluator("profile"),
            text=self.splits.source,
            drawn=self.splits.drawn,
            calibrated_by=self.calibrated_by,
            projections=self.config.serve == "projection",
            signal=self.config.profile_signal,  # type: ignore[arg-type]
            progress=lambda done, total: self.progress("profiling", done, total),
        )

    @cached_property
    def _saved_profile(self) -> Profile:
        path = self.config.profile
        assert path is not None
        profile = Profile.load(path)
        if profile.menu != self.menu:
            raise InputError(
                f"The profile {path} was measured on formats {','.join(profile.menu.keys)} "
                f"({profile.menu.quantizer}), the search asks for {','.join(self.menu.keys)} "
                f"({self.menu.quantizer}); give the same --bits and --quantizer."
            )
        asked = self.config.profile_signal
        if profile.signal != asked:
            raise InputError(
                f"The profile {path} has its sensitivities from {_SIGNALS[profile.signal]}, the "
                f"search asks for {_SIGNALS[asked]}; give --signal {profile.signal}, "
                "or leave --profile out."
            )
        if profile.fingerprint != self.moe.fingerprint:
            raise InputError(
                f"The profile {path} belongs to other weights than {self.config.model}'s; "
                "measure it again by leaving --profile out."
            )
        if replace(profile.spec, name=self.moe.spec.name) != self.moe.spec:
            raise InputError(
                f"The profile {path} describes other layers or experts than {self.config.model} "
                "has; measure it again by leaving --profile out."
            )
        return profile

    def problem(
        self,
        profile: Profile,
        *,
        evaluator: Evaluator | None = None,
        selector: Evaluator | None = None,
        further: Sequence[Evaluator] = (),
    ) -> Problem:
        """Return the problem of this configuration on a profile.

        Args:
            profile: The experts' statistics.
            evaluator: Measures bit maps; ``None`` for the profile's additive surrogate.
            selector: Measures the finalists on fresh text.
            further: Measure bit maps on further text.

        Raises:
            InputError: If a limit is infeasible.
        """
        c = self.config
        measured: dict[str, Any] = {} if evaluator is None else {"evaluator": evaluator}
        if c.signal == "task" and evaluator is not None:
            from dmpq.tasks.evaluator import MetricEvaluator

            assert isinstance(evaluator, MetricEvaluator)
            profile = evaluator.in_its_unit(profile)
        return Problem(
            profile=profile,
            hardware=self.hardware,
            cost_spec=self.cost_spec(profile.spec),
            workload=self.workload,
            weights=self.weights,
            constraints=self.constraints,
            serve=c.serve,  # type: ignore[arg-type]
            selector=selector,
            further=further,
            **measured,
        )

    def check(self) -> None:
        """Refuse what can be refused before any forward: names first, then limits.

        Raises:
            InputError: If a name is unknown, a number makes no sense, or a limit cannot be met.
        """
        c = self.config
        check_numbers(c)
        if self.menu.method.calibrated and c.task is not None:
            raise InputError(
                f"The quantizer {self.menu.quantizer!r} is calibrated by text, and --task "
                f"{c.task} gives examples; quantize by rtn or hqq."
            )
        _ = self.weights, self.hardware, self.menu, self.workload, self.constraints
        if c.geometry != "own":
            load_geometry(c.geometry)
        if c.profile is None:
            self.problem(empty_profile(self.moe.spec, self.menu, tokens=self.workload.tokens))
        else:
            self.problem(self._saved_profile)
        _ = self.splits
        if self._calibrates_itself and self.menu.method.ebss:
            _ = self._start_tokens  # the text itself is written when the bank is filled
        else:
            _ = self.calibrated_by


_SIGNALS: Final = {"sensitivity": "evaluations", "gradient": "gradients"}


def reference_evaluator(split: str = "search") -> ModelEvaluator:
    """Return an evaluator of the bundled model on the embedded text.

    Args:
        split: Role of the text: ``"profile"``, ``"search"``, ``"selection"`` or ``"heldout"``.
    """
    return Session(SearchConfig()).evaluator(split)
