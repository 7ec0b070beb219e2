"""The tables, pictures and pages of `benchmarks/thesis.py`, from the figures that it keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from thesis_data import CLASSIFICATION

from dmpq.files import replace_atomically

Kept = dict[str, Any]
METRICS = ("accuracy", "precision", "recall", "f1")
_NOTE = {
    CLASSIFICATION: "precision, recall and F1 are means over the classes, but in the first table "
    "F1 is the second class's, as in GLUE",
    "token-classification": "precision, recall and F1 are of whole entities (seqeval), accuracy "
    "of single words",
}


def write_pages(kept: Sequence[Kept], results: Path, page: Path) -> Iterator[str]:
    """Write pictures, the page of predictions and the page that shows all; yield the tables.

    Args:
        kept: Of each data set.
        results: Where pictures and predictions are written.
        page: The page that shows all.
    """
    parts = [
        "# Sentiment and named entities: mixed precision, experts, quantization\n\n"
        "Made by `python benchmarks/thesis.py`; do not edit. A BERT of two layers and 64 wide is "
        "trained from nothing (no pre-training: accuracies are those of small data), then goes on "
        "as it is or as an MoE of 4 experts a layer, two per token, by sparse upcycling; the same "
        "MoE is trained from nothing for as long as both halves. One seed unless said; held-out "
        "figures; sentences of more than 60 words are left out of entities. "
        "Peak memory is the process's, its libraries and judging included. This CPU has no units "
        "for BF16 and FP16, so that low precision is slower than FP32 here.\n"
    ]
    for one in kept:
        tables = [("Trained", models(one)), ("Quantized", widths(one))]
        parts.append(
            f"## {one['name']}: {one['task']}\n\n{one['source']}; {_NOTE[one['task']]}.\n"
        )
        for title, table in tables:
            parts.append(f"**{title}**\n\n{table}\n")
            yield f"\n{one['name']}: {title}\n\n{table}"
        parts.append(said(one))
        parts.append(confusion(one))
        if one["precision"]:
            table = precision(one)
            parts.append(f"**In FP32, BF16 and FP16**\n\n{table}\n\n{verdict(one)}\n")
            yield f"\n{one['name']}: precision\n\n{table}\n\n{verdict(one)}"
            draw_scales(one, results / f"{one['name']}-scales.png")
            parts.append(_picture(results, page, f"{one['name']}-scales.png", "Loss scale"))
        draw_widths(one, results / f"{one['name']}-bits.png")
        draw_confusion(one, results / f"{one['name']}-confusion.png")
        parts.append(_picture(results, page, f"{one['name']}-bits.png", "F1 by width"))
        parts.append(_picture(results, page, f"{one['name']}-confusion.png", "Confusion"))
    pages = "\n".join(predictions(one) for one in kept)
    replace_atomically(
        results / "predictions.md",
        (
            "# Predictions on held-out examples\n\nMade by `python benchmarks/thesis.py`; the "
            "first of those that full precision has right, and the first that it has wrong.\n\n"
            + pages
        ).encode(),
    )
    link = _relative(results / "predictions.md", page)
    parts.append(f"[Real predictions, right and wrong, at each width]({link}).\n")
    replace_atomically(page, "\n".join(parts).encode())


def models(one: Kept) -> str:
    """Return what each training gave, and what it took."""
    lines = [
        "| model | acc | F1 | parameters, active | samples/s | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, facts in one["trained"].items():
        row = facts["rows"]["after"]
        lines.append(
            f"| {name} | {100 * row['accuracy']:.1f} | {row['f1']:.1f} | {facts['parameters']:,}, "
            f"{facts['active_parameters']:,} | {facts['samples_per_second']:.0f} | "
            f"{facts['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def widths(one: Kept) -> str:
    """Return what each width, the found map and training are worth."""
    lines = [
        "| experts | eff. bits | acc | P | R | F1 | changed selections |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in one["bits"]["rows"].items():
        cells = " | ".join(f"{row[metric]:.1f}" for metric in METRICS)
        lines.append(f"| {name} | {row['effective_bits']:.2f} | {cells} | {row['changed']:.1%} |")
    return "\n".join(lines)


def said(one: Kept) -> str:
    """Return in words what the tables show."""
    rows, dense = one["bits"]["rows"], one["dense"]["f1"]
    full, narrow, trained = (rows[name]["f1"] for name in ("16 bits", "2 bits", "2 bits, trained"))
    anew, anew_narrow = (rows[f"from nothing, {name}"]["f1"] for name in ("16 bits", "2 bits"))
    return (
        f"The MoE's F1 is {full - dense:+.1f} points from the dense model's. From 16 to 2 bits it "
        f"changes by {narrow - full:+.1f} points; trained at 2 bits it is {trained - full:+.1f} "
        f"from 16 bits. The MoE from nothing is {anew - dense:+.1f} from the dense model, and "
        f"2 bits change it by {anew_narrow - anew:+.1f}. One seed: differences of a point or so "
        "are noise.\n"
    )


def precision(one: Kept) -> str:
    """Return what training in low precision gives, and what it does to gradients and routers."""
    lines = [
        "| model, batch | precision | acc | samples/s | peak MB | skipped | underflow, unscaled | "
        "router error | changed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (kind, batch, name), runs in grouped(one).items():
        found = [100 * run["rows"]["after"]["accuracy"] for run in runs]
        spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
        cells = [f"{np.mean(found):.1f}{spread}"]
        cells.append(f"{np.mean([run['samples_per_second'] for run in runs]):.0f}")
        cells.append(f"{np.mean([run['peak_bytes'] for run in runs]) / 1e6:.0f}")
        cells.append(f"{np.mean([run['skipped_steps'] for run in runs]):.1f}")
        probes = [probe for run in runs for probe in run["probes"]]
        if probes:
            scaled, bare = (
                np.mean([probe[key] for probe in probes])
                for key in ("underflow", "underflow_unscaled")
            )
            cells.append(f"{scaled:.2%}, {bare:.2%}")
            for key, form in (("router_error", ".4f"), ("changed_selections", ".2%")):
                values = [probe[key] for probe in probes if probe[key] is not None]
                cells.append(format(np.mean(values), form) if values else "")
        else:
            cells += ["", "", ""]
        lines.append(f"| {kind}, {batch} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grouped(one: Kept) -> dict[tuple[str, int, str], list[Kept]]:
    """Return runs by model, batch size and precision."""
    found: dict[tuple[str, int, str], list[Kept]] = {}
    for run in one["precision"]:
        found.setdefault((run["kind"], run["batch"], run["precision"]), []).append(run)
    return found


def verdict(one: Kept) -> str:
    """Return whether low precision ends where FP32 does, within the spread over seeds."""
    lines = []
    for (kind, batch, name), runs in grouped(one).items():
        base = grouped(one)[kind, batch, "fp32"]
        if name == "fp32" or len(runs) < 2:
            continue
        mine, theirs = (
            [100 * run["rows"]["after"]["accuracy"] for run in some] for some in (runs, base)
        )
        apart, spread = np.mean(mine) - np.mean(theirs), np.std(theirs, ddof=1)
        holds = "within" if abs(apart) <= spread else "beyond"
        lines.append(
            f"- {kind}, {name}: {apart:+.2f} points of accuracy from FP32, {holds} its standard "
            f"deviation over {len(base)} seeds ({spread:.2f})."
        )
    return "\n".join(lines)


def confusion(one: Kept) -> str:
    """Return the confusion matrices at full precision and at the narrowest width, as tables."""
    parts = []
    for name in ("16 bits", "2 bits"):
        row = one["bits"]["rows"][name]
        head = " | ".join(str(label) for label in row["labels"])
        lines = [f"| right, {name} | {head} |", "| --- |" + " ---: |" * len(row["labels"])]
        for label, counts in zip(row["labels"], row["confusion"], strict=True):
            lines.append(f"| {label} | " + " | ".join(map(str, counts)) + " |")
        parts.append("\n".join(lines))
    return "**Right labels, and given ones**\n\n" + "\n\n".join(parts) + "\n"


def predictions(one: Kept) -> str:
    """Return held-out examples with what each width says of them."""
    pages = one["predictions"]
    lines = [f"## {one['name']}\n"]
    for number, (text, right, _) in enumerate(pages["16 bits"]):
        lines.append(f"**{text}**\n\n- right: {right}")
        said: dict[str, list[str]] = {}
        for name, rows in pages.items():
            said.setdefault(rows[number][2], []).append(name)
        for answer, names in said.items():
            mark = "right" if answer == right else "wrong"
            lines.append(f"- {'; '.join(names)}: {answer} ({mark})")
        lines.append("")
    return "\n".join(lines)


def draw_widths(one: Kept, file: Path) -> None:
    """Draw F1 against effective bits, quantized and trained."""
    rows = one["bits"]["rows"]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    uniform = [rows[f"{key} bits"] for key in (16, 8, 4, 3, 2)]
    axes.plot(
        [r["effective_bits"] for r in uniform], [r["f1"] for r in uniform], "o-", label="uniform"
    )
    for name, mark in (("found map", "D"), ("2 bits, trained", "^"), ("found map, trained", "s")):
        axes.plot(rows[name]["effective_bits"], rows[name]["f1"], mark, ls="", label=name)
    axes.axhline(one["dense"]["f1"], color="k", lw=0.8, ls=":", label="dense model")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 3, 4, 8, 16], ["2", "3", "4", "8", "16"])
    axes.set_xlabel("effective bits per expert weight")
    axes.set_ylabel("F1, %")
    axes.set_title(one["name"])
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_confusion(one: Kept, file: Path) -> None:
    """Draw confusion matrices, each row as shares of its right label."""
    names = ("16 bits", "3 bits", "2 bits", "2 bits, trained")
    figure, panels = plt.subplots(1, len(names), figsize=(11, 3.2), layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        row = one["bits"]["rows"][name]
        counts = np.array(row["confusion"], float)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        ticks = range(len(row["labels"]))
        axes.set_xticks(ticks, row["labels"], rotation=90, fontsize=7)
        axes.set_yticks(ticks, row["labels"] if axes is panels[0] else [], fontsize=7)
        axes.set_title(name, fontsize="small")
        axes.set_xlabel("given")
        if len(row["labels"]) <= 5:
            for i, j in np.ndindex(shares.shape):
                color = "w" if shares[i, j] > 0.5 else "k"
                text = f"{shares[i, j]:.0%}"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
    panels[0].set_ylabel("right")
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_scales(one: Kept, file: Path) -> None:
    """Draw the course of FP16's loss scale."""
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for run in one["precision"]:
        if run["precision"] != "fp16" or run["seed"]:
            continue
        steps, scales = zip(
            *[*run["loss_scales"], (run["steps"], run["loss_scales"][-1][1])], strict=True
        )
        axes.step(steps, scales, where="post", label=f"{run['kind']}, batch {run['batch']}")
    axes.set_yscale("log", base=2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss scale")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _picture(results: Path, page: Path, name: str, what: str) -> str:
    return f"![{what}]({_relative(results / name, page)})\n"


def _relative(file: Path, page: Path) -> str:
    return Path(os.path.relpath(file.absolute(), page.absolute().parent)).as_posix()
