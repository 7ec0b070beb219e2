r"""What uniform maps lose by quantizer: RTN, HQQ, GPTQ with MoEQuant's options, and compensators.

    python benchmarks/quantizers.py --threads 1
    python benchmarks/quantizers.py --threads 1 --text wikitext-2/valid.jsonl
    python benchmarks/quantizers.py --threads 1 --only ebss    # some of them again

Every row is the bundled model with all its experts in one width, on text that calibrated nothing:
the embedded text's held-out side, and the last fifth of each ``--text``. GPTQ is calibrated on the
embedded text's calibration side, once more on that of each ``--text``, and on text that the model
writes itself (EBSS). Effective bits count scales, zero-points and compensators. The rows are kept
as JSON, a line each (``--out``); ``--only`` measures some quantizers again and keeps all others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
import torch

from dmpq.bank import Bank
from dmpq.console import quiet_libraries
from dmpq.data import Splits, TokenRequest, Windows, load_splits
from dmpq.ebss import start_tokens, written
from dmpq.files import replace_atomically
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import MoEModel, load_model
from dmpq.quantizer import Quantizer

WIDTHS = (8, 4, 3, 2)
OUT = Path(__file__).parent / "results" / "quantizers.json"
FEW = 4
ITS_OWN = "its own"
"""What calibrates where the model writes the text."""


@dataclass(frozen=True)
class Row:
    """One uniform map on one text.

    Attributes:
        text: What it was measured on.
        quantizer: As ``--quantizer``.
        group: Weights per scale, at most the input's width.
        calibrated: The text that calibrated it, or ``"its own"``; empty for none.
        bits: Nominal width.
        effective_bits: Per expert weight, all that is stored included.
        kl: To full precision, nats per token.
        perplexity: Per token.
        accuracy: Share of next tokens predicted best.
    """

    text: str
    quantizer: str
    group: int
    calibrated: str
    bits: int
    effective_bits: float
    kl: float
    perplexity: float
    accuracy: float


def banks(texts: dict[str, Splits], tokens: int) -> Iterator[tuple[str, int, str]]:
    """Yield quantizer, group size and the name of the calibration text (or an empty one)."""
    own, *others = texts
    few = f",tokens={tokens // FEW}"
    yield from (("rtn", 128, ""), ("hqq", 128, ""))
    for options in ("", ",affinity", few, f"{few},balanced"):
        yield f"gptq{options}", 128, own
    for options in ("", ",tau=0.01"):
        yield f"gptq{few},ebss{options}", 128, ITS_OWN
    for other in others:
        yield "gptq,affinity", 128, other
    yield from (("hqq+lr4", 128, ""), ("hqq+lr8", 128, ""))
    yield from (("rtn", 32, ""), ("hqq", 32, ""), ("gptq,affinity", 32, own))


def calibrating(
    moe: MoEModel, tokenizer: Any, texts: dict[str, Splits], quantizer: Quantizer, name: str
) -> Windows | None:
    """Return the windows that calibrate, of a text or written by the model."""
    if name != ITS_OWN:
        return texts[name].profile if name else None
    length = moe.model.config.max_position_embeddings
    tokens = quantizer.tokens
    assert tokens is not None
    starts = start_tokens(moe, tokenizer, tokens=tokens, length=length, seed=0)
    return written(moe, starts, quantizer, length=length)[0]


def measure(
    moe: MoEModel,
    texts: dict[str, Splits],
    quantizer: str,
    group: int,
    calibrated: str,
    windows: Windows | None,
) -> list[Row]:
    """Return the rows of one bank on every text."""
    menu = Menu.parse([str(b) for b in WIDTHS], quantizer=quantizer, group_sizes=str(group))
    bank = Bank(moe, menu, calibration=windows)
    stored = moe.spec.stored_bits(menu).sum((0, 1)) / moe.spec.expert_parameters
    maps = np.arange(len(menu))[:, None].repeat(moe.spec.num_experts, 1)
    rows = []
    for text, splits in texts.items():
        evaluator = ModelEvaluator(bank, splits.heldout, label="heldout")
        found, right = evaluator.evaluate(maps), evaluator.accuracy(maps)
        for i, width in enumerate(menu.bits):
            facts = (stored[i], found.kl[i], found.perplexity[i], right[i])
            numbers = [float(value) for value in facts]
            rows.append(Row(text, menu.quantizer, group, calibrated, int(width), *numbers))
    return rows


def full_rows(moe: MoEModel, texts: dict[str, Splits]) -> list[Row]:
    """Return the rows of full precision."""
    bank, one = Bank(moe, Menu.parse("16")), np.zeros((1, moe.spec.num_experts), np.int64)
    rows = []
    for text, splits in texts.items():
        evaluator = ModelEvaluator(bank, splits.heldout, label="heldout")
        perplexity = float(np.exp(evaluator.full_nll()))
        accuracy = float(evaluator.accuracy(one)[0])
        rows.append(Row(text, "none", 128, "", 16, 16.0, 0.0, perplexity, accuracy))
    return rows


def table(rows: list[Row], text: str) -> list[str]:
    """Return one text's rows as Markdown, by width."""
    lines = [
        "| bits | quantizer | group | calibrated on | effective bits | KL, nats/byte | perplexity "
        "| next byte |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted((r for r in rows if r.text == text), key=lambda r: -r.bits):
        lines.append(
            f"| {row.bits} | {row.quantizer} | {row.group} | {row.calibrated or '-'} | "
            f"{row.effective_bits:.3f} | {row.kl:.4f} | {row.perplexity:.4f} | "
            f"{100 * row.accuracy:.2f}% |"
        )
    return lines


def keep(rows: list[Row], path: Path) -> None:
    """Write the rows so far."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    replace_atomically(path, f"[\n{lines}\n]\n".encode())


def others(path: Path, part: str, texts: set[str]) -> list[Row]:
    """Return the rows of a file but for those of some texts and of quantizers named so."""
    rows = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
    return [row for row in rows if part not in row.quantizer or row.text not in texts]


def main() -> int:
    """Measure, keep and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text", type=Path, action="append", default=[], help="a local text")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--heldout-tokens", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", metavar="PART", help="of a quantizer's name: measure these anew")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    moe, tokenizer = load_model()
    request = TokenRequest(arguments.calibration_tokens, 0, 0, arguments.heldout_tokens)
    length = moe.model.config.max_position_embeddings
    texts = {
        Path(name).name: load_splits(
            name, tokenizer, length=length, tokens=request, seed=arguments.seed
        )
        for name in ("embedded", *map(str, arguments.text))
    }
    part = arguments.only
    rows = full_rows(moe, texts) if part is None else others(arguments.out, part, set(texts))
    for quantizer, group, calibrated in banks(texts, arguments.calibration_tokens):
        if part is not None and part not in quantizer:
            continue
        method = Quantizer.parse(quantizer)
        windows = calibrating(moe, tokenizer, texts, method, calibrated)
        rows += measure(moe, texts, quantizer, group, calibrated, windows)
        keep(rows, arguments.out)
        print(f"{len(rows)} rows, the last of {quantizer}, group {group}", file=sys.stderr)
    for text in texts:
        print(f"\n{text}: held-out text, {arguments.heldout_tokens:,} bytes\n")
        print("\n".join(table(rows, text)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
