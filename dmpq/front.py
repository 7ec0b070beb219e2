"""``python -m dmpq.search --policy DIR --front``: a policy's maps for many budgets."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from dmpq.config import SearchConfig
from dmpq.console import progress_bars
from dmpq.errors import InputError
from dmpq.evaluation import LossUnit
from dmpq.files import JsonLines, replace_atomically
from dmpq.provenance import bitmap_of
from dmpq.report import Row, front_figure, save_figure, table
from dmpq.run_folder import only_run_in, run_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

    from dmpq.agents.policy import Policy
    from dmpq.problem import Problem
    from dmpq.session import Session

_BUDGETS: Final = 10
_WIDEST: Final = 8
"""Width of the uniform map at which the budgets end: above it next to nothing is lost."""

_KNAPSACK: Final = "mckp"
_POLICY: Final = "policy"


def front(config: SearchConfig, console: Console) -> None:
    """Write the maps that a policy proposes for ten budgets, and show them beside the knapsack's.

    Nothing is searched: what it takes is the profile. All maps are judged on held-out text.

    Args:
        config: Names the policy; a limit on bits that it sets is not read.
        console: Where progress and the table are shown.

    Raises:
        InputError: If there is no such policy, or it does not fit the model.
    """
    from dmpq.agents.policy import Policy
    from dmpq.checks import prepare
    from dmpq.session import Session

    if config.policy is None:
        raise InputError("--front asks one policy for many budgets; name it by --policy.")
    prepare(config)
    policy = Policy.load(config.policy)
    with progress_bars(console) as show:
        session = Session(config, progress=show)
        session.check()
        folder = run_folder(config)
        with only_run_in(folder):
            session.journal = JsonLines(folder / "journal.jsonl")
            try:
                rows = _proposed(session, policy, folder)
            finally:
                session.journal.close()
            flat = pd.DataFrame([asdict(row) for row in rows])
            replace_atomically(folder / "front.csv", flat.to_csv(index=False).encode())
            lost = LossUnit() if config.task is None else LossUnit.of_task()
            save_figure(front_figure(rows, lost=lost), folder / "front.png")
    judged = (
        f"{config.heldout_tokens:,} held-out tokens"
        if config.task is None
        else f"{len(session.splits.heldout):,} held-out examples"
    )
    caption = f"KL (nats/{lost.per}) and perplexity (per {lost.per}) on {judged}"
    console.print(table(rows, caption=caption, best=_POLICY))
    console.print(f"  wrote {folder}/ front.csv front.png maps/", soft_wrap=True)


def budgets(problem: Problem) -> NDArray[np.float64]:
    """Return limits on effective bits, evenly spaced on a log scale.

    From 2% above the smallest uniform map, or half of it where experts can be pruned, to the
    uniform map of 8 bits, or of the widest format below.
    """
    every = np.arange(len(problem.menu))[:, None].repeat(problem.num_decisions, 1)
    stored = problem.effective_bits(every)
    narrow = stored[problem.menu.bits <= _WIDEST]
    least = stored[~problem.menu.pruned].min() * (1.02 if problem.menu.pruning is None else 0.5)
    return np.geomspace(least, max(narrow, default=stored.max()), _BUDGETS)


def _proposed(session: Session, policy: Policy, folder: Path) -> list[Row]:
    """Write a policy's map for every budget; return its row and the knapsack's of each."""
    profile = session.profile()
    profile.save(folder / "profile.safetensors")
    free = session.problem(profile)
    judge, rows = session.evaluator("heldout"), list[Row]()
    limits = budgets(free)
    (folder / "maps").mkdir(exist_ok=True)
    for done, bits in enumerate(limits.tolist(), start=1):
        problem = replace(free, constraints=replace(free.constraints, avg_bits=bits))
        maps = {_KNAPSACK: problem.mckp(), _POLICY: policy.propose(problem)}
        for name, one in maps.items():
            chosen = one[None]
            measured = judge.evaluate(problem.expand(chosen))
            rows.append(
                Row.of(
                    name,
                    bits=problem.effective_bits(chosen)[0],
                    kl=measured.kl[0],
                    nll=measured.nll[0],
                    cost=problem.costs(chosen),
                    workload=problem.workload,
                    evaluations=0,
                )
            )
        bitmap = bitmap_of(
            session,
            problem,
            maps[_POLICY],
            evaluations=0,
            tokens=profile.cost_tokens,
            heldout=rows[-1],
        )
        bitmap.write(folder / "maps" / f"bits-{bits:.2f}.json")
        session.progress("held-out text", done, len(limits))
    return rows
