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
    """Return the rows with each map's speed over uniform 8 bits there, a column ``speed_up``.

    Args:
        rows: As :class:`Row` says.
    """
    where = ["hw", "model", "batch"]
    eight = rows[rows.allocation == "8"].set_index(where).latency_s.rename("eight_s")
    joined = rows.join(eight, on=where)
    return joined.assign(speed_up=joined.eight_s / joined.latency_s)


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
            cells = []
            for batch in (1, 16):
                own = part[part.batch == batch].set_index("allocation").speed_up
                cells += [f"{own[key]:.2f}" for key, _ in shown]
            lines.append((hw + mark, *cells))
        heads = [f"{word}, {batch}" for batch in (1, 16) for _, word in shown]
        yield Table(
            f"{names[model]}: speed over uniform 8 bits at batch 1 and 16, on stacks calibrated "
            "or measured",
            ("", *heads),
            tuple(lines),
        )
    best = most(rows)
    yield Table(
        "All shipped stacks with a kernel for 8 bits, the fastest ten by the bound on any map: "
        "speed over uniform 8 bits",
        ("", "model", "batch", "4 bits", "2 bits", "bound"),
        tuple(
            (
                row.hw + ("" if row.calibrated else " (not calibrated)"),
                row.model,
                str(row.batch),
                *(f"{_speed(rows, row, key):.2f}" for key in ("4", "2", BOUND)),
            )
            for row in best.head(10).itertuples()
        ),
    )


def most(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the bound of every stack with a kernel for 8 bits, model and batch, fastest first."""
    own = rows[(rows.allocation == BOUND) & rows.own_eight]
    return own.sort_values("speed_up", ascending=False, kind="stable")


def _speed(rows: pd.DataFrame, row: object, allocation: str) -> float:
    same = (rows.hw == row.hw) & (rows.model == row.model) & (rows.batch == row.batch)
    return float(rows[same & (rows.allocation == allocation)].speed_up.iloc[0])


def reached(rows: pd.DataFrame, *, own_eight: bool) -> tuple[list[str], int]:
    """Return the stacks whose bound is 2 or more at some model and batch, and how many there are.

    Args:
        rows: With speeds.
        own_eight: Whether of those that have a kernel for 8 bits, or of the others.
    """
    part = rows[(rows.allocation == BOUND) & (rows.own_eight == own_eight)]
    fast = part[part.speed_up >= SPEED_UP[0]]
    return list(dict.fromkeys(fast.hw)), part.hw.nunique()


def _verdicts(memory: list[dict[str, float]], rows: pd.DataFrame) -> list[Verdict]:
    base, eight, own = memory[0], memory[1], memory[-1]
    size = own["checkpoint_bytes"] / eight["checkpoint_bytes"]
    perplexity = own["perplexity"] / base["perplexity"] - 1
    accuracy = own["accuracy"] / base["accuracy"] - 1
    uniform = next(row for row in memory if row["name"] == "uniform 4")
    other = uniform["perplexity"] / base["perplexity"] - 1
    maps = rows[rows.allocation == MAP]
    quick = maps[maps.calibrated].speed_up
    with_eight, all_with = reached(rows, own_eight=True)
    without, all_without = reached(rows, own_eight=False)
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
            "Is it in reach of any map that quantizes experts' weights alone?",
            f"on {len(with_eight)} of {all_with} stacks that have a kernel for 8 bits",
            (
                f"the bound is 2 or more, at some model and batch, on {listed(with_eight)}"
                if with_eight
                else "the bound is below 2 on every one"
            )
            + f"; and on {len(without)} of {all_without} that price 8 bits as 16 "
            f"({listed(without)}). Attention, caches, launches and overheads stay as they are; "
            "what 4 bits read less than 8 is at most half of the experts' bytes.",
        ),
    ]


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
        part = bound[bound.model == model].groupby("hw").speed_up.agg(["min", "max"])
        for hw, span in part.iterrows():
            height = order.index(hw) + 0.22 * (1 - i)
            right.plot(span.to_list(), [height, height], "|-", color=f"C{i}", lw=2.5, ms=6)
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
    right.set_xlabel("most speed over uniform 8 bits of any map († no kernel for 8 bits: over 16)")
    right.grid(alpha=0.2)
    right.legend(fontsize=8, loc="lower right")
    return figure
