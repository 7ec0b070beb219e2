"""What the outcomes of a comparison say: interquartile means, their intervals, regret.

Following Agarwal et al. (Deep RL at the Edge of the Statistical Precipice, arXiv 2108.13264): the
mean of the middle half of the runs, intervals from a stratified bootstrap, and the probability of
improvement. Models are resampled, and the calibration draws of each; agent and reference are
compared on the same draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.referee.referee import REFERENCE, Outcome

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

ALL: Final = "all"
"""What the rows over all contests together are called."""

_RESAMPLES: Final = 5000
_LEVELS: Final = (0.025, 0.975)
_TRIMMED: Final = 0.25


@dataclass(frozen=True)
class Standing:
    """How one agent does in one contest, or in all.

    Attributes:
        contest: As it was written, or :data:`ALL`.
        agent: The entrant.
        runs: Models times draws.
        kl: Interquartile mean of the KL on held-out text, nats per token; NaN over all contests,
            where it would be of different things.
        kl_low: Lower end of its 95% interval.
        kl_high: Upper end.
        over: Interquartile mean of KL over the reference's on the same draw, less 1.
        over_low: Lower end of its 95% interval.
        over_high: Upper end.
        better: Probability that a run is better than one of the reference's, on the same model.
        perplexity: Mean, per token.
        accuracy: Mean share of next tokens predicted.
        bits: Mean effective bits.
        tokens: Mean forwarded tokens, profile included.
        allowed: Mean of what might be spent.
        seconds: Mean wall time of the search.
        regret: Mean of KL over the best that any agent found with more evaluations, less 1; NaN
            where no agent was given more.
    """

    contest: str
    agent: str
    runs: int
    kl: float
    kl_low: float
    kl_high: float
    over: float
    over_low: float
    over_high: float
    better: float
    perplexity: float
    accuracy: float
    bits: float
    tokens: float
    allowed: float
    seconds: float
    regret: float


def standings(outcomes: Sequence[Outcome], *, reference: str = REFERENCE) -> list[Standing]:
    """Return every agent's standing in every contest and in all, the best first.

    Args:
        outcomes: Of any number of models, draws and contests.
        reference: The agent that others are compared with.
    """
    import pandas as pd

    table = pd.DataFrame([asdict(outcome) for outcome in outcomes]).drop(columns="curve")
    where = ["model", "contest", "seed"]
    best = table.groupby(where).kl.min().rename("best")
    pushed = table[table.factor > 1].set_index(where).index.unique()
    table = table.join(best.reindex(pushed) if len(pushed) else best.iloc[:0], on=where)
    table = table[table.factor == table.factor.min()]
    base = table[table.agent == reference].set_index(where).kl.rename("base")
    table = table.join(base, on=where)
    table["over"] = table.kl / table.base - 1
    table["regret"] = table.kl / table.best - 1
    found = []
    for contest in [*dict.fromkeys(table.contest), ALL]:
        part = table if contest == ALL else table[table.contest == contest]
        against = part[part.agent == reference]
        rows = [
            _standing(contest, str(agent), own, against) for agent, own in part.groupby("agent")
        ]
        found += sorted(rows, key=lambda row: row.over if row.over == row.over else row.kl)
    return found


def _standing(contest: str, agent: str, own: pd.DataFrame, against: pd.DataFrame) -> Standing:
    low, high = interval(own, "kl") if contest != ALL else (np.nan, np.nan)
    over_low, over_high = interval(own, "over")
    means = own[
        ["perplexity", "accuracy", "effective_bits", "tokens", "allowed", "seconds"]
    ].mean()
    return Standing(
        contest=contest,
        agent=agent,
        runs=len(own),
        kl=interquartile_mean(own.kl.to_numpy()) if contest != ALL else float("nan"),
        kl_low=low,
        kl_high=high,
        over=interquartile_mean(own.over.to_numpy()),
        over_low=over_low,
        over_high=over_high,
        better=probability_of_improvement(own, against),
        perplexity=float(means["perplexity"]),
        accuracy=float(means["accuracy"]),
        bits=float(means["effective_bits"]),
        tokens=float(means["tokens"]),
        allowed=float(means["allowed"]),
        seconds=float(means["seconds"]),
        regret=float(own.regret.mean()),
    )


def interquartile_mean(values: Floats) -> float:
    """Return the mean of the middle half of the values."""
    from scipy.stats import trim_mean

    return float(trim_mean(values, _TRIMMED)) if len(values) else float("nan")


def interval(table: pd.DataFrame, column: str, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of a column's interquartile mean, by a stratified bootstrap.

    Models are drawn with replacement, then draws of each; the contests of a draw stay together.

    Args:
        table: Outcomes of one agent, with columns model, seed and contest.
        column: The values.
        seed: Of the bootstrap.
    """
    from scipy.stats import trim_mean

    grid = table.pivot_table(index=["model", "seed"], columns="contest", values=column)
    cells = {model: part.to_numpy() for model, part in grid.dropna().groupby(level="model")}
    draws = min(map(len, cells.values()), default=0)
    if not draws:
        return float("nan"), float("nan")
    values = np.stack([part[:draws] for part in cells.values()])  # (models, draws, contests)
    rng, models = np.random.default_rng(seed), len(values)
    drawn = rng.integers(models, size=(_RESAMPLES, models))
    within = rng.integers(draws, size=(_RESAMPLES, models, draws))
    resampled = values[drawn[:, :, None], within].reshape(_RESAMPLES, -1)
    low, high = np.quantile(trim_mean(resampled, _TRIMMED, axis=1), _LEVELS)
    return float(low), float(high)


def probability_of_improvement(own: pd.DataFrame, against: pd.DataFrame) -> float:
    """Return how often a run is better than one of others, in the same contest and model.

    Over all pairs of draws, ties counting half: the Mann-Whitney statistic, averaged.
    """
    shares = []
    for key, part in own.groupby(["model", "contest"]):
        other = against[(against.model == key[0]) & (against.contest == key[1])]
        if len(other):
            difference = part.kl.to_numpy()[:, None] - other.kl.to_numpy()
            shares.append(float(np.mean((difference < 0) + 0.5 * (difference == 0))))
    return float(np.mean(shares)) if shares else float("nan")


def frame(rows: Sequence[Standing]) -> pd.DataFrame:
    """Return standings as a table, one row each."""
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows])
