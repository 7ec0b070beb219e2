"""A found map against static uniform widths and the published allocators, on the bundled model.

One profile, one bank (HQQ), one held-out text. Every allocator but PPO gives one map of what the
profile says; PPO searches. Uniform widths stand at their own sizes, which no budget chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from ablation_pages import FOLDER, Ablation, Table, Verdict, listed, percent, read_table

from dmpq.files import replace_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from dmpq.session import Session

NAME: Final = "static"
FILE: Final = f"{FOLDER}/static.csv"
MADE_BY: Final = "python benchmarks/ablations.py static --run"

BUDGETS: Final = (2.5, 2.75, 3.0, 3.5)
FOUND: Final = "ppo"
KNAPSACK: Final = "mckp"
PUBLISHED: Final = (
    "pmq-code",
    "pmq-paper",
    "gemq",
    "mxmoe",
    "mopeq-model",
    "hessian-model",
    "fisher",
    "moqa",
    "router-norm",
)
MIX: Final = "uniform-fractional"
HEURISTICS: Final = ("frequency", MIX)
EVALUATIONS: Final = 64
SEARCH_TOKENS: Final = 16384
HELDOUT_TOKENS: Final = 65536
LEVEL: Final = 0.01
"""Share of KL within which maps of one draw are called level, as in the ablation ``rl``."""


@dataclass(frozen=True)
class Row:
    """One map.

    Attributes:
        allocation: What made it; ``"uniform"`` and a width for a static one.
        budget: Limit on effective bits; 0 for uniform widths, which have none.
        bits: Effective bits per expert weight.
        kl: To full precision on held-out text, nats per token.
        perplexity: Per token.
        accuracy: Share of next bytes predicted.
        checkpoint_bytes: Of the checkpoint as ``dmpq.apply`` would store it.
        latency_s: Of a decoding step of batch 1 on an A100, analytical.
        tokens: What the allocator's own evaluations cost, beside the shared profile.
    """

    allocation: str
    budget: float
    bits: float
    kl: float
    perplexity: float
    accuracy: float
    checkpoint_bytes: int
    latency_s: float
    tokens: float


def measure(results: Path, *, threads: int, tell: Callable[[str], None]) -> None:
    """Search and measure every map, and keep the figures.

    Args:
        results: Folder of all results.
        threads: CPU threads.
        tell: Called with what was done.
    """
    import torch

    from dmpq.config import SearchConfig
    from dmpq.session import Session

    torch.set_num_threads(threads)
    config = SearchConfig(
        weights="acc=1",
        search_tokens=SEARCH_TOKENS,
        heldout_tokens=HELDOUT_TOKENS,
        threads=threads,
    )
    rows = _measured(Session(config), tell)
    path = results / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([asdict(row) for row in rows])
    replace_atomically(path, table.to_csv(index=False).encode())


def _measured(session: Session, tell: Callable[[str], None]) -> list[Row]:
    from memory_target import checkpoint_bytes, full, full_bytes

    from dmpq.checkpoints.checkpoint import Checkpoint
    from dmpq.guard import make_agent
    from dmpq.objective import Constraints
    from dmpq.provenance import bitmap_of

    profile = session.profile()
    tell(f"profiled, {profile.cost_tokens:,.0f} forwarded tokens")
    problem = session.problem(
        profile,
        evaluator=session.evaluator("search"),
        selector=session.evaluator("selection"),
        further=session.further(),
    )
    source, heldout = Checkpoint(session.config.model), session.evaluator("heldout")
    template = bitmap_of(session, problem, problem.mckp(), evaluations=0, tokens=0)

    def row(name: str, budget: float, chosen: NDArray[np.int64], tokens: float = 0.0) -> Row:
        found = problem.evaluate(chosen[None], heldout)
        if name == "uniform 16":  # as the checkpoint is: nothing is packed
            size = full_bytes(source)
            nll_accuracy = full(heldout, profile.spec.num_experts, problem.menu)
        else:
            size = checkpoint_bytes(template, source, problem.menu, chosen)
            nll_accuracy = (float(np.exp(found.nll[0])), float(heldout.accuracy(chosen[None])[0]))
        one = Row(
            allocation=name,
            budget=budget,
            bits=float(found.effective_bits[0]),
            kl=float(found.kl[0]),
            perplexity=nll_accuracy[0],
            accuracy=nll_accuracy[1],
            checkpoint_bytes=size,
            latency_s=float(found.cost.latency_s[0]),
            tokens=tokens,
        )
        tell(f"{budget or ''} {name}: {one.kl:.5f} at {one.bits:.3f} bits".strip())
        return one

    rows = [row(f"uniform {key}", 0.0, problem.uniform(key)) for key in problem.menu.keys]
    for budget in BUDGETS:
        own = replace(problem, constraints=Constraints(avg_bits=budget))
        for name in (FOUND, KNAPSACK, *PUBLISHED, *HEURISTICS):
            evaluations = EVALUATIONS if name == FOUND else 1
            result = make_agent(name).search(own, evaluations=evaluations, seed=0)
            rows.append(row(name, budget, result.assignment, result.tokens))
    return rows


def ablation(results: Path) -> Ablation:
    """Return the ablation, from what is kept.

    Args:
        results: Folder of all results.

    Raises:
        InputError: If figures are missing.
    """
    rows = read_table(results / FILE, made_by=MADE_BY)
    return Ablation(
        name=NAME,
        title="A found map against static widths and the published allocators",
        about="The bundled model, HQQ, one profile (8,192 tokens), one draw, held-out text of "
        f"{HELDOUT_TOKENS:,} tokens. `ppo` searches with {EVALUATIONS} evaluations of "
        f"{SEARCH_TOKENS:,} tokens and chooses on fresh text; the others give one map of the "
        "profile, so this is not at equal tokens (`rl` is). Uniform widths stand at their own "
        "sizes, which no budget chose. Stored: the checkpoint as `dmpq.apply` writes it, all "
        "weights and headers; latency: analytical, an A100 at OLMoE-1B-7B's widths, decode, "
        "batch 1, where each width in a layer is a launch.",
        tables=(_uniform_table(rows), *(_budget_table(rows, budget) for budget in BUDGETS)),
        verdicts=tuple(_verdicts(rows)),
        draw=lambda: _figure(rows),
    )


_HEAD: Final = ("", "bits", "KL", "ppl", "next byte, %", "stored, MB", "a100, µs")


def _cells(row: pd.Series) -> tuple[str, ...]:
    return (
        row.allocation,
        f"{row.bits:.3f}",
        f"{row.kl:.5f}",
        f"{row.perplexity:.4f}",
        f"{100 * row.accuracy:.2f}",
        f"{row.checkpoint_bytes / 1e6:.3f}",
        f"{1e6 * row.latency_s:.1f}",
    )


def _uniform_table(rows: pd.DataFrame) -> Table:
    own = rows[rows.budget == 0].sort_values("bits", ascending=False)
    cells = tuple(_cells(row) for _, row in own.iterrows())
    return Table("Static uniform widths, at their own sizes", _HEAD, cells)


def at(rows: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Return a budget's maps, the best first."""
    return rows[rows.budget == budget].sort_values("kl", kind="stable")


def _budget_table(rows: pd.DataFrame, budget: float) -> Table:
    cells = tuple(_cells(row) for _, row in at(rows, budget).iterrows())
    return Table(f"At most {budget:g} effective bits, the best first", _HEAD, cells)


def between_uniform(rows: pd.DataFrame, bits: float) -> float:
    """Return the KL of uniform widths at a size, on the straight line of its logarithm.

    Args:
        rows: All maps.
        bits: Effective bits, between two uniform widths.
    """
    own = rows[(rows.budget == 0) & (rows.kl > 0)].sort_values("bits")
    return float(np.exp(np.interp(bits, own.bits, np.log(own.kl))))


def _verdicts(rows: pd.DataFrame) -> list[Verdict]:
    found = {budget: at(rows, budget).set_index("allocation") for budget in BUDGETS}
    line = [
        f"{percent(own.kl[FOUND] / between_uniform(rows, own.bits[FOUND]) - 1)}% at {budget:g}"
        for budget, own in found.items()
    ]
    mixed = [
        f"{percent(own.kl[FOUND] / own.kl[MIX] - 1)}% at {budget:g}"
        for budget, own in found.items()
    ]
    below = all(own.kl[FOUND] < own.kl[MIX] for own in found.values())
    best = {budget: own.kl[[*PUBLISHED]].idxmin() for budget, own in found.items()}
    published = [
        f"{percent(own.kl[FOUND] / own.kl[best[budget]] - 1)}% against {best[budget]} at "
        f"{budget:g}"
        for budget, own in found.items()
    ]
    against = [own.kl[FOUND] / own.kl[best[budget]] - 1 for budget, own in found.items()]
    knapsack = [
        f"{percent(own.kl[FOUND] / own.kl[KNAPSACK] - 1)}% at {budget:g}"
        for budget, own in found.items()
    ]
    above = [own.kl[FOUND] / own.kl[KNAPSACK] - 1 for own in found.values()]
    uniform = rows[rows.budget == 0].set_index("allocation")
    slowest = uniform.latency_s.loc[["uniform 2", "uniform 3", "uniform 4", "uniform 8"]].max()
    slower = [
        f"{percent(own.latency_s[FOUND] / slowest - 1)}% at {budget:g}"
        for budget, own in found.items()
    ]
    narrow = rows[(rows.allocation == FOUND) & (rows.budget == BUDGETS[-1])].iloc[0]
    three = uniform.loc["uniform 3"]
    return [
        Verdict(
            "Is a found map better than static widths at its size?",
            "yes" if below else "not everywhere",
            f"its KL is {listed(mixed)} bits over that of `{MIX}`, the neighbouring widths mixed "
            f"evenly without looking at the experts; and {listed(line)} over the straight line "
            "(of the logarithm) between the uniform widths, which no uniform map offers. The "
            f"nearest, uniform 3 at {three.bits:.2f} bits, loses {three.kl:.4f} where "
            f"{narrow.bits:.2f} bits lose {narrow.kl:.4f}.",
        ),
        Verdict(
            "Is it better than the published allocators?",
            _how(against),
            f"its KL is {listed(published)} bits, the best of {len(PUBLISHED)} of them each time "
            "(chosen on this very text, in their favour).",
        ),
        Verdict(
            "Is it better than the exact knapsack on the same profile?",
            _how(above),
            f"its KL is {listed(knapsack)} bits over that of `{KNAPSACK}`, one draw.",
        ),
        Verdict(
            "Is it faster?",
            "no" if all(own.latency_s[FOUND] > slowest for own in found.values()) else "partly",
            f"its step is {listed(slower)} bits over that of the slowest uniform width of 8 bits "
            "or fewer: at batch 1 mixing costs launches on this stack, and buys memory alone.",
        ),
    ]


def _how(over: list[float]) -> str:
    """Return at how many budgets a KL is ahead of another, and level, from shares over it."""
    ahead, behind = (sum(sign * one > LEVEL for one in over) for sign in (-1, 1))
    if ahead == len(over):
        return "yes"
    return f"ahead at {ahead} of {len(over)} budgets, level at {len(over) - ahead - behind}"


def _figure(rows: pd.DataFrame) -> Figure:
    """Draw KL against effective bits, on a logarithmic scale; and KL over the knapsack's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    uniform = rows[(rows.budget == 0) & (rows.kl > 0)].sort_values("bits")
    left.plot(uniform.bits, uniform.kl, "s--", color="#5f6368", lw=1, ms=6, label="uniform widths")
    names = [FOUND, KNAPSACK, *PUBLISHED, *HEURISTICS]
    marks = "o*^v<>Dphdx+1"
    for i, name in enumerate(names):
        own = rows[(rows.allocation == name)].sort_values("bits")
        strong = name in {FOUND, KNAPSACK}
        style = {"color": f"C{i % 10}", "marker": marks[i], "ms": 8 if strong else 5}
        left.plot(own.bits, own.kl, lw=1.5 if strong else 0, label=name, **style)
        base = [at(rows, b).set_index("allocation").kl[KNAPSACK] for b in BUDGETS]
        over = 100 * (own.set_index("budget").kl.loc[[*BUDGETS]].to_numpy() / base - 1)
        right.plot(BUDGETS, over, lw=1.5 if strong else 0.6, label=name, **style)
    left.set_yscale("log")
    left.set_xlim(2.3, 4.6)
    left.set_ylim(0.01, 0.7)
    left.set_xlabel("effective bits (uniform 8: see the table)")
    left.set_ylabel("held-out KL, nats/token")
    right.set_yscale("symlog", linthresh=5)
    right.set_yticks(
        [-2, 0, 2, 5, 10, 20, 50, 100], ["-2", "0", "2", "5", "10", "20", "50", "100"]
    )
    right.minorticks_off()
    right.set_xticks(BUDGETS)
    right.set_xlabel("limit on effective bits")
    right.set_ylabel("KL over the exact knapsack's, %")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.grid(alpha=0.2)
    return figure
