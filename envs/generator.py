"""From plain values to a :class:`~dmpq.problem.Problem`: what ``gym.make`` passes on."""

from __future__ import annotations

from typing import Final, Literal, TypedDict, get_args

from dmpq.decisions import Serve
from dmpq.errors import InputError, unknown
from dmpq.evaluation import Evaluator
from dmpq.formats import Menu
from dmpq.hw_models import Workload, load_hardware
from dmpq.objective import Constraints, Weights
from dmpq.problem import Problem
from dmpq.profile import Profile, reference_profile
from dmpq.spec import load_geometry

EvaluatorName = Literal["surrogate", "model"]

_OWN_GEOMETRY: Final = "own"
_BYTES_PER_GB: Final = 1e9
_SECONDS_PER_MS: Final = 1e-3


class ProblemSettings(TypedDict, total=False):
    """Arguments of :func:`make_problem`, for the constructors that pass them on."""

    hw: str
    tdp_w: float | None
    bits: str
    serve: Serve
    avg_bits: float | None
    memory_gb: float | None
    latency_ms: float | None
    energy_j: float | None
    weights: str
    phase: Literal["decode", "prefill"]
    batch: int
    context: int
    cost_geometry: str
    profile: str | None
    evaluator: EvaluatorName


def make_problem(
    *,
    hw: str = "a100",
    tdp_w: float | None = None,
    bits: str = "2,3,4,8,16",
    serve: Serve = "expert",
    avg_bits: float | None = 3.0,
    memory_gb: float | None = None,
    latency_ms: float | None = None,
    energy_j: float | None = None,
    weights: str = "acc=1,lat=0.1,mem=0.1,eng=0.1",
    phase: Literal["decode", "prefill"] = "decode",
    batch: int = 1,
    context: int = 2048,
    cost_geometry: str = "olmoe-1b-7b",
    profile: str | None = None,
    evaluator: EvaluatorName = "surrogate",
) -> Problem:
    """Return the problem that plain JSON values describe; names as in ``python -m dmpq.search``.

    Args:
        hw: Device, DEVICE/STACK, or a device file.
        tdp_w: With ``"cuda"``: board power, watts, where the GPU's energy counter cannot be read.
        bits: Menu of formats; must be the one the profile was measured with.
        serve: What shares one format when served: ``"expert"``, ``"projection"`` or ``"layer"``.
        avg_bits: Limit on effective bits per expert weight.
        memory_gb: Limit on memory, GB of 1e9 bytes.
        latency_ms: Limit on the time of a step, milliseconds.
        energy_j: Limit on the energy of a step, joules.
        weights: Weights of the reward's terms.
        phase: Workload: ``"decode"`` or ``"prefill"``.
        batch: Workload: sequences per step.
        context: Workload: tokens of context per sequence.
        cost_geometry: Model at whose widths costs are computed, a name or a ``config.json``;
            ``"own"`` for the profiled model's own.
        profile: Saved profile; ``None`` for the one shipped with the reference checkpoint.
        evaluator: ``"surrogate"`` adds the profile's sensitivities up; ``"model"`` evaluates the
            reference model, which takes seconds to prepare.

    Raises:
        InputError: If a value is unknown, the menu is not the profile's, or no map meets the
            limits.
    """
    known = reference_profile() if profile is None else Profile.load(profile)
    asked = Menu.parse(bits, quantizer=known.menu.quantizer, symmetric=known.menu.symmetric)
    if asked != known.menu:
        raise InputError(
            f"The profile was measured for the formats {','.join(known.menu.keys)}, not "
            f"{','.join(asked.keys)}; pass bits={','.join(known.menu.keys)!r} or another profile."
        )
    if serve not in get_args(Serve):
        raise unknown("serving granularity", serve, get_args(Serve))
    own = cost_geometry == _OWN_GEOMETRY
    return Problem(
        profile=known,
        hardware=load_hardware(hw, tdp_w=tdp_w),
        cost_spec=known.spec if own else known.spec.with_widths_of(load_geometry(cost_geometry)),
        workload=Workload(phase=phase, batch=batch, context=context),
        weights=Weights.parse(weights),
        constraints=Constraints(
            avg_bits=avg_bits,
            memory_bytes=None if memory_gb is None else memory_gb * _BYTES_PER_GB,
            latency_s=None if latency_ms is None else latency_ms * _SECONDS_PER_MS,
            energy_j=energy_j,
        ),
        serve=serve,
        evaluator=_make_evaluator(evaluator, profile),
    )


def _make_evaluator(name: EvaluatorName, path: str | None) -> Evaluator | None:
    """Return an evaluator by name; ``None`` stands for the problem's own surrogate."""
    if name == "surrogate":
        return None
    if name != "model":
        raise unknown("evaluator", name, get_args(EvaluatorName))
    if path is not None:
        raise InputError(
            "evaluator='model' evaluates the reference model, so it takes no other profile; leave "
            "profile out, or build a Problem in Python and pass it as problem=."
        )
    from dmpq.session import reference_evaluator

    return reference_evaluator(split="search")
