"""The figures that the patterns of the literature are judged by: rows of numbers, model by model.

Budgets are averages of nominal widths: the scales beside them take the same at 2, 3, 4 and 8 bits,
so that an average of 2.5 is the narrowest uniform map's stored bits and half a bit. All maps are
judged on held-out text that no profile has seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pattern_cases import FAIR, NEAR_RANKS, PROGRAMS, RANDOM, SINGLE_SIGNALS, Figures
from transformers.integrations.moe import grouped_mm_experts_forward

from dmpq import agents
from dmpq.agents.super_expert import super_experts
from dmpq.config import SearchConfig
from dmpq.decisions import Decisions
from dmpq.embedded import side_documents
from dmpq.evaluation import SurrogateEvaluator
from dmpq.guard import make_agent
from dmpq.hw_models import Workload, load_hardware
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import MoEModel
from dmpq.objective import Constraints
from dmpq.problem import Problem
from dmpq.profile import Profile
from dmpq.session import Session
from dmpq.spec import load_geometry

MODELS: Final = Path(__file__).parent / "models"
GROUPS: Final = (32, 64, 128)
HESSIAN: Final = "hessian-layer"
WEIGHT_STATISTICS: Final = ("weight_norm", "kurtosis", "outlier_ratio", "max_row_variance")
KINDS: Final = ("code", "prose")
ROUNDING: Final = 1e-3
"""Share of its radius by which a router's input must stay below it to be certified: fp32."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    Attributes:
        models: The reference model, or folders below ``benchmarks/models``.
        draws: Seeds of the calibration draws.
        budgets: Averages of nominal widths; at the edges only programs are compared.
        random_maps: Per draw and budget.
        profile_tokens: Of the reference model's profiles; others read half as many.
        heldout_tokens: Of the reference model; others are judged on half as many.
        hessian_tokens: Of the text that Hessian traces are estimated on.
        hessian_probes: Random vectors.
        devices: Whose analytical costs are computed.
        batches: Sequences per decode step.
        measured: Whether the knapsack's sensitivities are measured, not estimated by gradients.
    """

    models: tuple[str, ...] = ("reference", "mixtral", "deepseek_v2")
    draws: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[float, ...] = (2.25, 2.5, 3.0, 3.5)
    random_maps: int = 4
    profile_tokens: int = 4096
    heldout_tokens: int = 16384
    hessian_tokens: int = 1024
    hessian_probes: int = 8
    devices: tuple[str, ...] = ("h100/gemlite", "a100/gemlite", "rtx4090/gemlite", "a100/sglang")
    batches: tuple[int, ...] = (1, 16)
    measured: bool = True


ALL_RULES: Final = (2.5, 3.0)
"""Budgets at which every rule is compared."""


class Subject:
    """A model with its text.

    Args:
        name: The reference model, or a folder below ``benchmarks/models``.
        settings: How much is measured.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        share = 1 if name == "reference" else 2
        self.group = 64 if name == "mixtral" else 128  # its experts are 192 wide
        self.session = Session(
            SearchConfig(
                model=name if name == "reference" else str(MODELS / name),
                bits="2,3,4,8,16" if self.group == 128 else "2g64,3g64,4g64,8g64,16",
                signal="sensitivity" if settings.measured else "gradient",
                weights="acc=1",
                avg_bits=16.0,  # until a budget is set: narrow matrices have many scales
                cost_geometry="olmoe-1b-7b",
                profile_tokens=settings.profile_tokens // share,
                search_tokens=settings.hessian_tokens,
                selection_tokens=1,
                further_tokens=0,
                heldout_tokens=settings.heldout_tokens // share,
            )
        )

    @cached_property
    def heldout(self) -> ModelEvaluator:
        """The judge, the same for all draws."""
        return self.session.evaluator("heldout")

    def drawn(self, draw: int, **options: Any) -> Session:
        """Return the session of another calibration draw."""
        return self.session.with_text(seed=draw, **options)

    def problem(self, session: Session, profile: Profile, budget: float) -> Problem:
        """Return the problem of an average of nominal widths; its own evaluator is free."""
        problem = session.problem(profile, evaluator=SurrogateEvaluator(profile))
        return replace(problem, constraints=Constraints(avg_bits=budget + scale_bits(problem)))


def scale_bits(problem: Problem) -> float:
    """Return what scales and zero-points take per weight, the same for all widths but 16."""
    narrow = problem.effective_bits(problem.uniform(problem.menu.keys[0])[None])[0]
    return float(narrow) - float(problem.menu.bits[0])


def measure(settings: Settings, say: Callable[[str], None]) -> Iterator[Figures]:
    """Give all figures of the models so far, after each model.

    Args:
        settings: How much is measured.
        say: Called with what has been done.
    """
    figures: Figures = {}
    for name in settings.models:
        subject = Subject(name, settings)
        for part in (full, uniform, drawn_maps, granularity, sides, domains, routing, upcycled):
            for table, row in part(subject):
                figures.setdefault(table, []).append({"model": name, **row})
            say(f"{name}: {part.__name__}")
        yield figures


Found = Iterator[tuple[str, dict[str, Any]]]


def full(subject: Subject) -> Found:
    """The model as it is."""
    spec = subject.session.moe.spec
    layer = spec.moe_layers[0]
    yield (
        "full",
        {
            "perplexity": float(np.exp(subject.heldout.full_nll())),
            "layers": len(spec.moe_layers),
            "experts_per_layer": layer.num_experts,
            "top_k": layer.top_k,
            "heldout_tokens": subject.heldout.tokens,
        },
    )


def uniform(subject: Subject) -> Found:
    """Uniform maps of both quantizers in groups of every size, and how errors fall by bits."""
    groups = [group for group in GROUPS if subject.group == 128 or group < 128]
    for quantizer in ("hqq", "rtn"):
        config = replace(
            subject.session.config,
            bits="2,3,4,8",
            group_sizes=",".join(map(str, groups)),
            quantizer=quantizer,
            signal="gradient",
        )
        session = Session(config)
        menu, count = session.menu, session.moe.spec.num_experts
        found = session.evaluator("heldout").evaluate(
            np.arange(len(menu))[:, None].repeat(count, axis=1)
        )
        profile = session.profile()
        for i, fmt in enumerate(menu.formats):
            yield (
                "uniform",
                {
                    "quantizer": quantizer,
                    "group": fmt.group_size,
                    "bits": fmt.bits,
                    "kl": float(found.kl[i]),
                    "perplexity": float(found.perplexity[i]),
                    "router_shift": float(found.router_shift[i]),
                },
            )
        for group in groups:
            yield from _error_ratios(profile, quantizer, group)


def _error_ratios(profile: Profile, quantizer: str, group: int) -> Found:
    place = {f.bits: i for i, f in enumerate(profile.menu.formats) if f.group_size == group}
    for low, high in ((2, 3), (3, 4), (4, 8)):
        used = profile.hits > 0
        squared = profile.output_error[used, place[low]] / profile.output_error[used, place[high]]
        ratio = squared ** (0.5 / (high - low))
        least, middle, most = np.percentile(ratio, (10, 50, 90)).tolist()
        yield (
            "error_ratio",
            {
                "quantizer": quantizer,
                "group": group,
                "step": f"{low}-{high}",
                "median": middle,
                "least": least,
                "most": most,
            },
        )


def drawn_maps(subject: Subject) -> Found:
    """Every rule's map on every calibration draw, with its loss, its traffic and its latency."""
    settings = subject.settings
    for draw in settings.draws:
        session = subject.drawn(draw)
        profile = session.profile()
        for budget in settings.budgets:
            problem = subject.problem(session, profile, budget)
            for rule, assignment in _proposals(subject, session, problem, draw, budget):
                place = {"draw": draw, "budget": budget, "rule": rule}
                yield "maps", place | _judged(subject, problem, assignment)
                if rule in ("frequency", "inverse-frequency", FAIR) and budget in ALL_RULES:
                    for row in _latencies(subject, problem, assignment):
                        yield "latency", place | row
                if rule == "mckp" and budget in ALL_RULES:
                    yield "layers", place | _layers(problem, assignment)


def _proposals(
    subject: Subject, session: Session, problem: Problem, draw: int, budget: float
) -> Iterator[tuple[str, np.ndarray]]:
    rules = [FAIR, "error-model", *PROGRAMS]
    if budget in ALL_RULES:
        rules += [rule for rule in SINGLE_SIGNALS if rule != HESSIAN]
        for number in range(subject.settings.random_maps):
            seed = 1000 * draw + number
            yield RANDOM, _map_of(make_agent(RANDOM), problem, seed)
        on_model = replace(problem, evaluator=session.evaluator("search"))
        agent = agents.make(HESSIAN, probes=subject.settings.hessian_probes)
        yield HESSIAN, _map_of(agent, on_model, draw)
    for rule in rules:
        yield rule, _map_of(make_agent(rule), problem, draw)


def _map_of(agent: agents.Agent, problem: Problem, seed: int) -> np.ndarray:
    return agent.search(problem, evaluations=1, seed=seed).assignment


def _judged(subject: Subject, problem: Problem, assignment: np.ndarray) -> dict[str, float]:
    found = subject.heldout.evaluate(problem.expand(assignment[None]))
    bits = problem.menu.bits[assignment]
    frequency = problem.profile.frequency
    return {
        "kl": float(found.kl[0]),
        "perplexity": float(found.perplexity[0]),
        "router_shift": float(found.router_shift[0]),
        "mean_bits": float(problem.effective_bits(assignment[None])[0]) - scale_bits(problem),
        "traffic_bits": float((frequency * bits).sum() / frequency.sum()),
    }


def _latencies(subject: Subject, problem: Problem, assignment: np.ndarray) -> Iterator[Any]:
    settings = subject.settings
    for device in settings.devices:
        for batch in settings.batches:
            cost = load_hardware(device).cost(
                problem.spec.with_widths_of(load_geometry("olmoe-1b-7b")),
                problem.menu,
                problem.expand(assignment[None]),
                Workload(phase="decode", batch=batch, context=2048),
                inclusion=problem.profile.frequency,
            )
            yield {"device": device, "batch": batch, "latency_s": float(cost.latency_s[0])}


def _layers(problem: Problem, assignment: np.ndarray) -> dict[str, Any]:
    bits, layers = problem.menu.bits[assignment], problem.spec.layer_of_expert
    return {
        "bits": [float(bits[layers == layer].mean()) for layer in np.unique(layers)],
        "super_bits": bits[super_experts(problem.profile)].tolist(),
        "widest": int(bits.max()),
    }


def granularity(subject: Subject) -> Found:
    """The knapsack's map where projections, experts or layers share a format."""
    for draw in subject.settings.draws:
        profile = subject.drawn(draw, signal="gradient", serve="projection").profile()
        for serve in ("projection", "expert", "layer"):
            session = subject.drawn(draw, serve=serve)
            for budget in ALL_RULES:
                problem = subject.problem(session, profile, budget)
                found = subject.heldout.evaluate(problem.expand(problem.mckp()[None]))
                yield (
                    "granularity",
                    {
                        "draw": draw,
                        "budget": budget,
                        "rule": serve,
                        "kl": float(found.kl[0]),
                        "perplexity": float(found.perplexity[0]),
                    },
                )


def sides(subject: Subject) -> Found:
    """All gate and up weights quantized and no down, and the reverse."""
    spec, menu = subject.session.moe.spec, subject.session.menu
    weights = Decisions(spec, "projection").weights.reshape(-1, 2).sum(0)
    for index in (0, 1):
        for side, name in enumerate(("gate_up", "down")):
            formats = np.full((spec.num_experts, 2), len(menu) - 1)
            formats[:, side] = index
            kl = float(subject.heldout.evaluate(formats.reshape(1, -1)).kl[0])
            yield (
                "sides",
                {
                    "side": name,
                    "bits": int(menu.bits[index]),
                    "kl": kl,
                    "kl_per_million": kl / weights[side] * 1e6,
                },
            )


def domains(subject: Subject) -> Found:
    """Maps calibrated on code and on prose, each judged on held-out code and prose."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judges = {
            kind: _domain_judge(subject, write_kind(folder / "heldout", "heldout", kind))
            for kind in KINDS
        }
        for kind in KINDS:
            text = write_kind(folder / "calibration", "calibration", kind)
            for draw in subject.settings.draws:
                session = subject.drawn(
                    draw, signal="gradient", dataset=str(text), heldout_tokens=1
                )
                problem = subject.problem(session, session.profile(), 2.5)
                for rule in ("frequency", "gemq", FAIR):
                    found = problem.expand(_map_of(make_agent(rule), problem, draw)[None])
                    for judged, judge in judges.items():
                        kl = float(judge.evaluate(found).kl[0])
                        place = {"draw": draw, "calibrated": kind, "judged": judged}
                        yield "domains", {**place, "rule": rule, "kl": kl}


def write_kind(folder: Path, side: Any, kind: str) -> Path:
    """Write one kind of one side's documents as text files; returns their folder."""
    out = folder / kind
    out.mkdir(parents=True)
    for i, document in enumerate(side_documents(side)):
        if document.kind == kind:
            (out / f"{i:03}.txt").write_text(document.text, encoding="utf-8")
    return out


def _domain_judge(subject: Subject, folder: Path) -> ModelEvaluator:
    tokens = subject.session.config.heldout_tokens // 2
    options = {"dataset": str(folder), "search_tokens": tokens, "heldout_tokens": 1}
    return subject.drawn(0, **options).evaluator("search")


def radius(hidden: torch.Tensor, router: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return how far each token's router input may move before its selection can change, (T,).

    The exact l2 radius of a linear router without bias: the least, over selected i and others j,
    of ``(z_i - z_j) / ||w_i - w_j||`` (R2 of the notes).

    Args:
        hidden: (T, H), inputs of the router.
        router: (E, H), its rows w.
        top_k: Experts that a token selects, fewer than E.
    """
    logits = hidden @ router.mT
    order = logits.argsort(-1, descending=True)
    inside, outside = order[:, :top_k], order[:, top_k:]
    apart = (router[:, None] - router[None]).norm(dim=-1)
    margin = logits.gather(1, inside)[:, :, None] - logits.gather(1, outside)[:, None]
    return (margin / apart[inside[:, :, None], outside[:, None]]).flatten(1).amin(1)


@dataclass(frozen=True, eq=False)
class Routed:
    """What one MoE layer read and selected: (T, H) hidden states and (T, k) experts."""

    hidden: torch.Tensor
    index: torch.Tensor


def routed(subject: Subject, bits: int | None, ids: torch.Tensor) -> list[Routed]:
    """Run a uniform map, or the model as it is (``None``); returns one entry per MoE layer."""
    bank, found = subject.session.bank, []

    def noting(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(module: Any, hidden: Any, index: Any, weights: Any) -> torch.Tensor:
            found.append(Routed(hidden, index))
            return run(module, hidden, index, weights)

        return forward

    if bits is None:
        runs: list[Any] = [grouped_mm_experts_forward] * len(bank.layers)
    else:
        place = int(np.flatnonzero(bank.menu.bits == bits)[0])
        bank.choose(np.full((1, bank.moe.spec.num_experts, 2), place))
        runs = list(bank.layers)
    with torch.inference_mode(), bank.moe.experts_forward([noting(run) for run in runs]):
        bank.moe.logits(ids)
    return found


def routing(subject: Subject) -> Found:
    """Where newly selected experts ranked at full precision, and which tokens were certified."""
    spec, moe = subject.session.moe.spec, subject.session.moe
    top_k, experts = spec.moe_layers[0].top_k, spec.moe_layers[0].num_experts
    ranks = int(NEAR_RANKS * top_k)
    for bits in (2, 3, 4):
        new = near = certified = flips = tokens = 0
        for ids in subject.heldout.id_batches[:2]:
            pairs = zip(
                routed(subject, None, ids), routed(subject, bits, ids), moe.containers, strict=True
            )
            for exact, moved, container in pairs:
                if container.router is None or torch.equal(exact.hidden, moved.hidden):
                    continue  # nothing is quantized before the first MoE layer
                router = container.router.float()
                order = (exact.hidden @ router.mT).argsort(-1, descending=True)
                place = order.argsort(-1).gather(1, moved.index)  # ranks at full precision
                new += int((place >= top_k).sum())
                near += int(((place >= top_k) & (place < ranks)).sum())
                reach = (1 - ROUNDING) * radius(exact.hidden, router, top_k)
                safe = (moved.hidden - exact.hidden).norm(dim=1) < reach
                certified += int(safe.sum())
                flips += int((safe & (place >= top_k).any(1)).sum())
                tokens += len(safe)
        yield (
            "routing",
            {
                "bits": bits,
                "group": subject.group,
                "ranks": ranks,
                "new": new,
                "near": near / max(new, 1),
                "chance": (ranks - top_k) / (experts - top_k),
                "certified": certified / max(tokens, 1),
                "flips": flips,
            },
        )


def upcycled(subject: Subject) -> Found:
    """One expert copied over its layer, the routers as trained: who can still tell them apart."""
    tied = Subject(subject.name, subject.settings)
    tie_experts(tied.session.moe)
    for draw in subject.settings.draws:
        session = tied.drawn(draw, signal="gradient")
        profile = session.profile()
        layers = profile.spec.layer_of_expert
        if draw == subject.settings.draws[0]:
            for signal in WEIGHT_STATISTICS:
                values = getattr(profile, signal)
                spread = max(float(np.ptp(values[layers == n])) for n in np.unique(layers))
                yield "upcycled_signals", {"signal": signal, "spread": spread}
        problem = tied.problem(session, profile, 2.5)
        for rule in (FAIR, "mopeq-layer", "frequency-layer"):
            found = problem.expand(_map_of(make_agent(rule), problem, draw)[None])
            kl = float(tied.heldout.evaluate(found).kl[0])
            yield "upcycled", {"draw": draw, "rule": rule, "kl": kl}


def tie_experts(moe: MoEModel) -> None:
    """Copy each layer's first expert over all others of it: what upcycling starts from."""
    for container in moe.containers:
        for parameter in container.parameters:
            parameter.data.copy_(parameter.data[:1].expand_as(parameter.data).clone())


def described(settings: Settings) -> dict[str, Any]:
    """Return the settings as they stand in a file."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
