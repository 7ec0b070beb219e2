"""The proposal's three targets against uniform 8 bits: memory, latency, and loss of accuracy.

Memory and accuracy are those of ``benchmarks/memory_target.py``. The latency of its map, and of
the uniform widths, is priced here on every kernel stack that is shipped and on the recorded
measurements; whatever map one takes, a step is no faster than the proven bound beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from ablation_pages import FOLDER, Ablation, Table, Verdict, listed, percent, read_json, read_table

from dmpq.errors import InputError
from dmpq.files import replace_atomically
from dmpq.formats import Menu
from dmpq.hw_models import Workload, list_hardware, load_hardware
from dmpq.hw_models.bounds import Bounded
from dmpq.hw_models.catalogue import shipped
from dmpq.solvers.relaxation import Relaxation

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from dmpq.hw_models import HardwareModel
    from dmpq.spec import ModelSpec

NAME: Final = "targets"
FILE: Final = f"{FOLDER}/targets.csv"
MADE_BY: Final = "python benchmarks/ablations.py targets --run"
MEMORY_BY: Final = "python benchmarks/memory_target.py"

MEMORY: Final = 0.6
SPEED_UP: Final = (2.0, 3.0)
LOSS: Final = 0.01
MAP: Final = "found map"
BOUND: Final = "bound"
OWN: Final = "bundled"
"""The bundled model's layers and experts at OLMoE-1B-7B's widths, routed as profiled."""
MODELS: Final = (OWN, "olmoe-1b-7b", "mixtral-8x7b")
BATCHES: Final = (1, 16, 64)
RECORDED: Final = {"recorded H200": "cuda-nvidia-h200.json", "recorded EPYC": "host-amd-epyc.json"}


@dataclass(frozen=True)
class Row:
    """One map's time of a decoding step.

    Attributes:
        hw: Device and kernel stack, or a recorded measurement.
        calibrated: Whether its figures were fitted or measured on that device.
        own_eight: Whether 8 bits have a kernel of their own there; else they are priced as 16.
        model: Geometry, of :data:`MODELS`.
        batch: Sequences per step.
        allocation: A uniform width, the found map, or the bound: what no map falls below.
        latency_s: Seconds a step.
    """

    hw: str
    calibrated: bool
    own_eight: bool
    model: str
    batch: int
    allocation: str
    latency_s: float


def measure(results: Path, *, threads: int, tell: Callable[[str], None]) -> None:
    """Find the map of the memory target again, price it everywhere, and keep the figures.

    Args:
        results: Folder of all results.
        threads: CPU threads.
        tell: Called with what was done.

    Raises:
        InputError: If the map has other bits than ``benchmarks/memory_target.py`` kept.
    """
    import torch

    from dmpq.config import SearchConfig
    from dmpq.session import Session
    from dmpq.spec import load_geometry

    torch.set_num_threads(threads)
    kept = read_json(results / "memory_target.json", made_by=MEMORY_BY)
    bits = kept["rows"][-1]["bits"]
    session = Session(
        SearchConfig(
            group_sizes=kept["arguments"]["group_sizes"],
            quantizer=kept["arguments"]["quantizer"],
            weights="acc=1",
            avg_bits=bits * (1 + 1e-12),  # for the rounding of the mean that was kept
            threads=threads,
        )
    )
    profile = session.profile()
    problem = session.problem(profile)
    found = problem.mckp()
    own = float(problem.effective_bits(found[None])[0])
    tell(f"found the map of {own:.4f} bits")
    if abs(own - bits) > 1e-6:
        raise InputError(
            f"The map has {own:.6f} bits here, and {bits:.6f} in memory_target.json: another "
            f"text or version; run {MEMORY_BY} first."
        )
    rows: list[Row] = []
    for model in MODELS:
        widths = load_geometry("olmoe-1b-7b" if model == OWN else model)
        spec = profile.spec.with_widths_of(widths) if model == OWN else widths
        inclusion = profile.frequency if model == OWN else None
        for name, hardware, own_eight in machines():
            for batch in BATCHES:
                times = _times(
                    hardware,
                    spec,
                    session.menu,
                    Workload(batch=batch),
                    inclusion,
                    found if model == OWN else None,
                )
                about = (name, hardware.calibrated, own_eight, model, batch)
                rows += [Row(*about, allocation, seconds) for allocation, seconds in times.items()]
        tell(f"priced {model}")
    path = results / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([asdict(row) for row in rows])
    replace_atomically(path, table.to_csv(index=False).encode())


def machines() -> Iterator[tuple[str, HardwareModel, bool]]:
    """Yield what maps are priced on: name, costs, and whether 8 bits have their own kernel."""
    for device in list_hardware():
        for stack in shipped(device).stacks:
            yield (
                f"{device}/{stack.name}",
                load_hardware(f"{device}/{stack.name}"),
                (stack.kernel(8).bits == 8),
            )
    folder = Path(__file__).parents[1] / "hw_models" / "recorded"
    for name, file in RECORDED.items():
        yield name, load_hardware(str(folder / file)), True


def _times(
    hardware: HardwareModel,
    spec: ModelSpec,
    menu: Menu,
    workload: Workload,
    inclusion: NDArray[np.float64] | None,
    found: NDArray[np.int64] | None,
) -> dict[str, float]:
    """Return each map's seconds; nothing where a record has no times of such experts.

    The bound is over maps of the default menu, groups of 128.
    """
    plain = Menu.parse("2,3,4,8,16")
    maps = np.arange(len(plain))[:, None].repeat(spec.num_experts, 1)
    try:
        times = hardware.cost(spec, plain, maps, workload, inclusion=inclusion).latency_s
        shown = dict(zip(plain.keys, times.tolist(), strict=True))
        if found is not None:
            own = hardware.cost(spec, menu, found[None], workload, inclusion=inclusion)
            shown[MAP] = float(own.latency_s[0])
        shown[BOUND] = least(hardware, spec, plain, workload, inclusion)
    except InputError:
        return {}
    return shown


def least(
    hardware: HardwareModel,
    spec: ModelSpec,
    menu: Menu,
    workload: Workload,
    inclusion: NDArray[np.float64] | None,
) -> float:
    """Return seconds that no map's step falls below, proven by relaxing the choice of widths.

    Args:
        hardware: Prices maps.
        spec: Geometry.
        menu: Formats on offer.
        workload: What a step is.
        inclusion: (N,), probability that a token selects each expert; ``None`` for uniform.
    """
    from dmpq.decisions import Decisions

    assert isinstance(hardware, Bounded)
    bound = hardware.step_bound(spec, menu, workload, inclusion=inclusion)
    relaxed = Relaxation(
        bound=bound, decisions=Decisions(spec, "expert"), exact={}, priced={"latency_s": np.inf}
    )
    return relaxed.least("latency_s")


def ablation(results: Path) -> Ablation:
    """Return the ablation, from what is kept.

    Args:
        results: Folder of all results.

    Raises:
        InputError: If figures are missing.
    """
    memory = read_json(results / "memory_target.json", made_by=MEMORY_BY)["rows"]
    rows = speed_ups(read_table(results / FILE, made_by=MADE_BY))
    return Ablation(
        name=NAME,
        title="The proposal's three targets",
        about="40% less memory, 2 to 3 times the speed, and less than 1% of accuracy lost, each "
        "against uniform 8 bits. Memory (whole checkpoints as stored) and accuracy (held-out "
        "text; loss against full precision) are those of `benchmarks/memory_target.py`: HQQ, the "
        "knapsack's map. The speed is that of a decoding step at a context of 2,048, priced by "
        "the analytical model or from recorded kernels: of that map on the bundled model at "
        "OLMoE-1B-7B's widths, and of uniform 4 and 2 bits there, on OLMoE-1B-7B and on "
        "Mixtral-8x7B. The bound is proven: no map of 2 to 16 bits in groups of 128 is faster in "
        "that model of costs. Where a stack has no kernel for 8 bits (†), uniform 8 is priced "
        "as 16 bits, so that what is won there is won over 16 bits.",
        tables=(_memory_table(memory), *_speed_tables(rows)),
        verdicts=tuple(_verdicts(memory, rows)),
        draw=lambda: _figure(memory, rows),
    )


def speed_ups(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with two more columns, of each map and of the case that it is part of.

    ``speed_up`` is over uniform 8 bits there; ``sound`` says whether uniform 8 is faster than 16
    there, so that beating it means more than beating a kernel that nobody would choose.

    Args:
        rows: As :class:`Row` says.
    """
    where = ["hw", "model", "batch"]
    joined = rows
    for key in ("8", "16"):
        one = rows[rows.allocation == key].set_index(where).latency_s.rename(f"s_{key}")
        joined = joined.join(one, on=where)
    return joined.assign(
        speed_up=joined.s_8 / joined.latency_s, sound=joined.own_eight & (joined.s_8 < joined.s_16)
    )


def _memory_table(memory: list[dict[str, float]]) -> Table:
    base, eight = memory[0], memory[1]
    return Table(
        "Memory and accuracy of the bundled model",
        ("", "bits", "stored, MB", "of uniform 8", "ppl", "ppl, %", "next byte, %"),
        tuple(
            (
                str(row["name"]),
                f"{row['bits']:.2f}",
                f"{row['checkpoint_bytes'] / 1e6:.3f}",
                f"{row['checkpoint_bytes'] / eight['checkpoint_bytes']:.1%}",
                f"{row['perplexity']:.4f}",
                percent(row["perplexity"] / base["perplexity"] - 1, 2),
                percent(row["accuracy"] / base["accuracy"] - 1, 2),
            )
            for row in memory
        ),
    )


def shown_machines(rows: pd.DataFrame) -> list[str]:
    """Return the calibrated stacks and the recorded measurements."""
    return list(dict.fromkeys(rows[rows.calibrated].hw))


def _speed_tables(rows: pd.DataFrame) -> Iterator[Table]:
    names = {
        OWN: "The bundled model at OLMoE-1B-7B's widths",
        "olmoe-1b-7b": "OLMoE-1B-7B",
        "mixtral-8x7b": "Mixtral-8x7B",
    }
    for model in MODELS:
        shown = ((MAP, "map"),) if model == OWN else ()
        shown = (*shown, ("4", "4 bits"), ("2", "2 bits"), (BOUND, "bound"))
        lines = []
        for hw in shown_machines(rows):
            part = rows[(rows.hw == hw) & (rows.model == model)]
            if part.empty:
                continue
            mark = "" if bool(part.own_eight.iloc[0]) else " †"
            for batch in BATCHES:
                own = part[part.batch == batch].set_index("allocation").speed_up
                lines.append((hw + mark, str(batch), *(f"{own[key]:.2f}" for key, _ in shown)))
        yield Table(
            f"{names[model]}: speed over uniform 8 bits, on stacks calibrated or measured",
            ("", "batch", *(word for _, word in shown)),
            tuple(lines),
        )
    yield Table(
        "Where uniform 8 bits are faster than 16: the ten cases of the largest bound, of all "
        "shipped stacks; speed over uniform 8 bits (fitted: calibrated or measured)",
        ("", "fitted", "model", "batch", "4 bits", "2 bits", "bound"),
        tuple(
            (
                row.hw,
                "yes" if row.calibrated else "no",
                row.model,
                str(row.batch),
                *(f"{_speed(rows, row, key):.2f}" for key in ("4", "2", BOUND)),
            )
            for row in most(rows, sound=True).head(10).itertuples()
        ),
    )


def most(rows: pd.DataFrame, *, sound: bool) -> pd.DataFrame:
    """Return the bound of every stack, model and batch, the fastest first.

    Args:
        rows: With speeds.
        sound: Whether of the cases in which 8 bits are faster than 16, or of the others.
    """
    own = rows[(rows.allocation == BOUND) & (rows.sound == sound)]
    return own.sort_values("speed_up", ascending=False, kind="stable")


def _speed(rows: pd.DataFrame, row: object, allocation: str) -> float:
    same = (rows.hw == row.hw) & (rows.model == row.model) & (rows.batch == row.batch)
    return float(rows[same & (rows.allocation == allocation)].speed_up.iloc[0])


def reached(rows: pd.DataFrame, *, sound: bool) -> tuple[list[str], int]:
    """Return the stacks whose bound is 2 or more in some case, and how many there are.

    Args:
        rows: With speeds.
        sound: Of which cases; see :func:`most`.
    """
    part = most(rows, sound=sound)
    return list(dict.fromkeys(part[part.speed_up >= SPEED_UP[0]].hw)), part.hw.nunique()


def read_less() -> float:
    """Return how many times fewer bytes experts of 4 bits are than those of 8, scales included."""
    from dmpq.spec import load_geometry

    four, eight = load_geometry("mixtral-8x7b").stored_bits(Menu.parse("4,8")).sum((0, 1))
    return float(eight / four)


def _verdicts(memory: list[dict[str, float]], rows: pd.DataFrame) -> list[Verdict]:
    base, eight, own = memory[0], memory[1], memory[-1]
    size = own["checkpoint_bytes"] / eight["checkpoint_bytes"]
    perplexity = own["perplexity"] / base["perplexity"] - 1
    accuracy = own["accuracy"] / base["accuracy"] - 1
    uniform = next(row for row in memory if row["name"] == "uniform 4")
    other = uniform["perplexity"] / base["perplexity"] - 1
    maps = rows[rows.allocation == MAP]
    quick = maps[maps.calibrated].speed_up
    fast, stacks = reached(rows, sound=True)
    others, _ = reached(rows, sound=False)
    part = rows[rows.sound & rows.hw.isin(fast)]
    fours = rows[rows.sound & (rows.allocation == "4")].speed_up.max()
    where = most(rows, sound=True)
    where = where[where.speed_up >= SPEED_UP[0]]
    bundled = rows[(rows.model == OWN) & (rows.allocation == BOUND)]
    return [
        Verdict(
            "40% less memory than uniform 8 bits?",
            "yes" if size <= MEMORY else "no",
            f"the map of {own['bits']:.2f} bits takes {size:.1%} of uniform 8's checkpoint.",
        ),
        Verdict(
            "Less than 1% of accuracy lost, by that map?",
            "yes, narrowly" if -accuracy < LOSS and perplexity < LOSS else "no",
            f"next-byte accuracy changes by {percent(accuracy, 2)}%, perplexity by "
            f"{percent(perplexity, 2)}%; uniform 4 bits, smaller still, change perplexity by "
            f"{percent(other, 2)}%. One model, one draw, one text.",
        ),
        Verdict(
            "2 to 3 times the speed of uniform 8 bits, by that map?",
            "yes"
            if (maps.speed_up >= SPEED_UP[0]).all()
            else ("no" if (maps.speed_up < SPEED_UP[0]).all() else "on some stacks"),
            f"on stacks calibrated or measured it is {quick.min():.2f} to {quick.max():.2f} times "
            f"as fast, on all {maps.hw.nunique()} at most {maps.speed_up.max():.2f}; no map of "
            f"this model is more than {bundled.speed_up.max():.2f} times as fast.",
        ),
        Verdict(
            "Is it in reach of any map that quantizes the experts' weights alone?",
            f"on {len(fast)} of {stacks} stacks where 8 bits are faster than 16",
            (
                f"there the bound is {where.speed_up.min():.2f} to {where.speed_up.max():.2f} "
                f"({listed(fast)}; on {listed(list(dict.fromkeys(where.model)))}; "
                f"{_calibrated(part)} of them calibrated or measured)"
                + (", and it takes fewer than 4 bits" if fours < SPEED_UP[0] else "")
                + f": uniform 4 bits are at most {fours:.2f} times as fast as 8 in any such case, "
                f"and read {read_less():.2f} times less, attention and overheads aside. "
                if fast
                else ""
            )
            + f"It is also 2 or more where 8 bits have no kernel, or are slower than 16 "
            f"({listed(others)}): what is won there is won over 16 bits, or over a "
            "kernel that nobody would choose.",
        ),
    ]


def _calibrated(part: pd.DataFrame) -> str:
    """Return in words how many stacks are calibrated or measured."""
    return str(part[part.calibrated].hw.nunique() or "none")


def _figure(memory: list[dict[str, float]], rows: pd.DataFrame) -> Figure:
    """Draw memory against lost perplexity, and the bound on speed of every stack."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    base, eight = memory[0], memory[1]
    for row in memory[1:]:
        place = (
            100 * row["checkpoint_bytes"] / eight["checkpoint_bytes"],
            100 * (row["perplexity"] / base["perplexity"] - 1),
        )
        found = row is memory[-1]
        left.plot(*place, "o" if found else "s", color="#1a73e8" if found else "#5f6368", ms=7)
        left.annotate(str(row["name"]), place, xytext=(7, 5), textcoords="offset points")
    left.axvspan(left.get_xlim()[0], 100 * MEMORY, color="#1e8e3e", alpha=0.08)
    left.axvline(100 * MEMORY, color="#1e8e3e", lw=1)
    left.axhline(100 * LOSS, color="#1e8e3e", lw=1)
    left.set_xlabel("checkpoint, % of uniform 8 bits (target: left of the line)")
    left.set_ylabel("perplexity above full precision, % (target: below the line)")
    left.margins(x=0.2)
    bound = rows[rows.allocation == BOUND]
    order = bound.groupby("hw").speed_up.max().sort_values().index.tolist()
    for i, model in enumerate(MODELS):
        spans = bound[bound.model == model].groupby(["hw", "sound"]).speed_up.agg(["min", "max"])
        for (hw, sound), span in spans.iterrows():
            height = order.index(hw) + 0.22 * (1 - i)
            style = {"color": f"C{i}", "lw": 2.5, "ms": 6, "alpha": 1.0 if sound else 0.3}
            right.plot(span.to_list(), [height, height], "|-", **style)
        right.plot(
            [],
            [],
            color=f"C{i}",
            lw=2.5,
            label=f"{model}, batches {min(BATCHES)} to {max(BATCHES)}",
        )
    found = rows[(rows.allocation == MAP) & (rows.batch == 1)]
    heights = [order.index(hw) + 0.22 for hw in found.hw]
    right.plot(found.speed_up, heights, "o", color="black", ms=4, label="the found map, batch 1")
    eights = dict(zip(rows.hw, rows.own_eight, strict=True))
    right.set_yticks(
        range(len(order)), [hw + ("" if eights[hw] else " †") for hw in order], fontsize=8
    )
    right.axvspan(*SPEED_UP, color="#1e8e3e", alpha=0.12, label="the target")
    right.axvline(1, color="#9aa0a6", lw=1)
    right.set_xlabel(
        "bound on the speed of any map over uniform 8 bits\n"
        "(pale: 8 bits are no faster than 16 there, or have no kernel, †)"
    )
    right.grid(alpha=0.2)
    right.legend(fontsize=8, loc="lower right")
    return figure
