"""The page of the docs on the digits report, made from its figures alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from digits_models import EXPERTS, TOP_K
from digits_page import (
    PUBLISHED,
    Figures,
    balances,
    published,
    ratios,
    read_ratio,
    rows_of,
    shares_of,
    slower,
    work_ratio,
)
from digits_training import evenness

_TEXT = """\
# The digits report

Made by `python benchmarks/digits.py --data ../shared/data/mnist`; do not edit. All figures, with
spreads, losses and quartiles, are in [digits.md](../benchmarks/results/digits.md).

A student report, from which this project grew, trained a feed-forward network (FFN) and a sparse
Mixture of Experts on handwritten digits and quantized both to 8 bits. Here both are trained again
({seeds} seeds, at most {epochs} epochs, the best by a tenth of the training images that was held
out) and quantized with what torch {torch} and torchao {torchao} have.

Data: {source}.
Without the four idx files of MNIST in `--data` the command takes scikit-learn's digits, says so,
and writes `digits_scikit_learn.*` instead.

## Models

- FFN: 784-256-128-10 with ReLU, {ffn_parameters:,} parameters.
- MoE: 784-256, then the top {top_k} of {experts} experts 256-128-128 with a ReLU between, then
  128-10: {moe_parameters:,} parameters, chosen so that the fp32 file is the report's size. The
  report's own layout is not known. The router is a softmax over learned logits; the selected
  weights are divided by their sum.

## Beside the report

{published}

8 bits change the FFN's accuracy by {ffn_change:+.2f} points (the report: {ffn_said:+.2f}) and the
MoE's by {moe_change:+.2f} ({moe_said:+.2f}), in files {ffn_smaller:.2f} and {moe_smaller:.2f}
times smaller. *MoE (report)* is trained with the report's balance, *MoE (Switch)* with the
Switch loss.
*ms (64)*: latency of a batch of 64.

- FFN, static: int8 weights per row and activations in fixed ranges, observed on
  {calibration:,} training images; torchao's PT2E with `X86InductorQuantizer`, lowered to oneDNN's
  int8 products. Activations have 7 bits, since 8-bit products overflow on CPUs without VNNI.
- MoE, dynamic: `Int8DynamicActivationInt8WeightConfig` on the linear layers and, through
  `FqnToConfig`, on the experts' 3-D parameters; the router stays in fp32. torchao's int8 tensors
  have no grouped product, so quantized experts run one after the other.
- Files are safetensors; the tests compute from the static one in integers, and load the dynamic
  one again.

**Smaller is not faster here.** At batch 64 the static FFN takes {ffn_static:.2f} times as long as
in fp32, and torchao's dynamic MoE {moe_dynamic:.1f} times as long as the vectorised fp32 one:
`torch._int_mm`, which torchao calls, has no fast kernel on this CPU ({cpu}).
By the older `torch.ao.quantization`, which torch deprecates and whose FBGEMM products serve this
CPU, the same 8 bits take {ffn_fbgemm:.2f} and {moe_fbgemm:.2f} times as long as fp32.

## Vectorised experts

The report found its MoE slower than its FFN, with a Python loop over tokens. Vectorised, tokens
are sorted by expert and each matrix of all experts is one `grouped_mm`. In FFN forwards of the
same batch, by the thread's own time, to which other processes do not add, and (by the wall
clock):

{ratios}

At batch 1,024 the loop over tokens takes {loop_large:.0f} times as long as the FFN, and the
vectorised forward {fast_large:.2f} times, for {work:.2f} times the multiplications. At batch 64 it
is {loop_middle:.1f} against {fast_middle:.2f}, where so few tokens share an expert that
{read_middle:.2f} times the FFN's weights are read. At batch 1 the loop has {top_k} turns and
vectorising gains nothing ({loop_small:.2f} against {fast_small:.2f}): a forward there is a number
of small calls, and sorting adds some. So vectorising removes most of what the loop costs wherever
there is a batch, not all of it; at no batch is this MoE as fast as its dense baseline, whose
multiplications it exceeds.

## Balancing experts

![Expert utilisation](../benchmarks/results/digits.png)

{balances}

*H*: entropy, weighted by {entropy_weight:g}; Switch loss by {switch_weight:g}. *evenness*: entropy
of the counts on test images over ln {experts}.

- **(b) is the report's**: the entropy of hard counts, added to the loss. Counts have no gradient:
  torch gives it none, and over all seeds the largest difference of trained weights from (a)'s is
  {difference:g}.
- **Its sign is wrong, too**: (b') adds the entropy of the router's mean probabilities in its
  place, which has a gradient, and evenness goes from {even_none:.2f} to {even_sign:.2f}. A loss is
  made small, and a small entropy means few experts.
- **(c) rewards that entropy** and reaches {even_reward:.2f}; **(d)**, the loss of Switch
  Transformers, {even_switch:.2f}.

Without balance {used_none:.1f} of {experts} experts are used. Accuracy does not show it: digits
are easy for these models, and the five differ by about the spread over seeds.

## Limits

Latencies are of one thread of a shared machine, after warm-up, models in turns; ratios in the
text are of the thread's own time. The published figures are single runs on another machine, with
a recipe that is not known; the learning rate here was chosen by the held-out images. {seeds} seeds
show the size of the spread and no more.
"""


def document(figures: Figures) -> str:
    """Return the page."""
    recipe, sizes = figures["recipe"], figures["sizes"]

    def accuracy(model: str) -> float:
        rows = rows_of(figures["rows"], model=model)
        return float(np.mean([row["test"]["accuracy"] for row in rows]))

    def size(model: str) -> float:
        return float(np.mean([row["bytes"] for row in rows_of(figures["rows"], model=model)]))

    def even(balance: str) -> float:
        rows = shares_of(figures, balance)
        return float(np.mean([evenness(row.tolist()) for row in rows]))

    ffn, ffn_int8, moe, moe_int8 = PUBLISHED
    fast, loop = "MoE fp32, vectorised", "MoE fp32, loop over tokens"
    report = rows_of(figures["balances"], balance="report")
    words: dict[str, Any] = {
        "seeds": recipe["seeds"],
        "epochs": recipe["epochs"],
        "calibration": recipe["calibration"],
        "entropy_weight": recipe["entropy_weight"],
        "switch_weight": recipe["switch_weight"],
        "source": figures["data"]["source"],
        **{name: figures["machine"][name] for name in ("torch", "torchao", "cpu")},
        "ffn_parameters": sizes["FFN"]["parameters"],
        "moe_parameters": sizes["MoE"]["parameters"],
        "top_k": TOP_K,
        "experts": EXPERTS,
        "published": "\n".join(published(figures)),
        "ratios": "\n".join(ratios(figures)),
        "balances": "\n".join(balances(figures)),
        "ffn_change": 100 * (accuracy(ffn_int8) - accuracy(ffn)),
        "moe_change": 100 * (accuracy(moe_int8) - accuracy(moe)),
        "ffn_said": 100 * (PUBLISHED[ffn_int8][0] - PUBLISHED[ffn][0]),
        "moe_said": 100 * (PUBLISHED[moe_int8][0] - PUBLISHED[moe][0]),
        "ffn_smaller": size(ffn) / size(ffn_int8),
        "moe_smaller": size(moe) / size(moe_int8),
        "ffn_static": slower(figures, "FFN int8 static", ffn, 64),
        "ffn_fbgemm": slower(figures, "FFN int8 static, FBGEMM", ffn, 64),
        "moe_dynamic": slower(figures, "MoE int8 dynamic", fast, 64),
        "moe_fbgemm": slower(figures, "MoE int8 dynamic, FBGEMM", fast, 64),
        "work": work_ratio(figures),
        "read_middle": read_ratio(figures, 64),
        "difference": max(row["difference_from_none"] for row in report),
        "used_none": float((shares_of(figures, "none") >= 0.01).sum(1).mean()),
        "even_none": even("none"),
        "even_sign": even("report's sign"),
        "even_reward": even("entropy rewarded"),
        "even_switch": even("Switch"),
    }
    for name, batch in (("small", 1), ("middle", 64), ("large", 1024)):
        words[f"loop_{name}"] = slower(figures, loop, ffn, batch)
        words[f"fast_{name}"] = slower(figures, fast, ffn, batch)
    return _TEXT.format(**words)
