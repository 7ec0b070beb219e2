"""The patterns of the literature, one claim each: who says it, and what is asked of the figures.

They are those of section 6 of the project's notes on MoE quantization. A claim is reproduced where
its predicate (``pattern_cases.py``) holds in every case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import pattern_cases as cases


@dataclass(frozen=True)
class Claim:
    """A pattern, or a part of one.

    Attributes:
        key: Number of the pattern in the notes, and a letter for the part.
        text: The claim, one line.
        source: Who reports it.
        predicate: What is asked of each case, in words; or why nothing can be asked.
        tested: Returns the cases; ``None`` where it cannot be tested here.
    """

    key: str
    text: str
    source: str
    predicate: str
    tested: Callable[[cases.Figures], Iterator[cases.Case]] | None = None

    def verdict(self, figures: cases.Figures) -> tuple[str, int, int]:
        """Return the verdict, the number of cases that hold, and of all that are not void."""
        found = [case for case in self.all_cases(figures) if not case.void]
        if not found:
            return "not testable here", 0, 0
        right = sum(case.holds for case in found)
        return ("reproduced" if right == len(found) else "not reproduced", right, len(found))

    def all_cases(self, figures: cases.Figures) -> list[cases.Case]:
        """Return every case, void ones included; none where it cannot be tested here."""
        return [] if self.tested is None else list(self.tested(figures))


_NOT_OFFERED: Final = "bits are given to routed experts only: "

CLAIMS: Final = (
    Claim(
        "1a",
        "Uniform widths: 8 bits lossless, 4 near-lossless, 3 moderate, 2 worse",
        "GPTQ and RTN rows of MC-MoE, GEMQ, QuantMoE-Bench",
        f"perplexity rises by less than {cases.LOSSLESS:.1%} at 8 bits, {cases.NEAR:.0%} at 4, "
        f"{cases.MODERATE:.0%} at 3, each more than at the width above, and at 2 by more than "
        f"{cases.WORSE:g} times as much as at 3",
        cases.uniform_losses,
    ),
    Claim(
        "1b",
        "An expert's relative output error halves per extra bit",
        "high-resolution law; bound B6 of the notes",
        f"the median expert's error falls {cases.HALVING[0]:g} to {cases.HALVING[1]:g} times per "
        "bit",
        cases.error_halves,
    ),
    Claim(
        "1c",
        "2 bits collapse with one scale per channel",
        "EAC-MoE, RTN rows",
        "rows here are 32 to 192 weights wide, no wider than groups are: every scale is of few "
        "weights",
    ),
    Claim(
        "2",
        "Attention and shared experts at 4 or 2 bits matter more per bit than any expert map",
        "QuantMoE-Bench",
        _NOT_OFFERED + "attention, shared experts and the router keep their precision",
    ),
    Claim(
        "3a",
        "Random < routing weight < frequency, in quality",
        "MC-MoE, metric ablation",
        "held-out KL of routing weight below the mean of random maps, and of frequency below "
        "that of routing weight",
        cases.usage_order,
    ),
    Claim(
        "3b",
        "Output error is at least as good as every single-signal rule",
        "MC-MoE; the notes' safer test",
        "held-out KL of error-layer below that of each such rule",
        cases.error_beats_signals,
    ),
    Claim(
        "3c",
        "Every rule is at least as good as random on average",
        "the notes' safer test",
        "held-out KL below the mean of random maps",
        cases.rules_beat_random,
    ),
    Claim(
        "4a",
        "The best mixed map beats the fair uniform one at equal bits",
        "MC-MoE, MxMoE",
        "held-out KL of the knapsack on measured sensitivities below that of the evenly spaced "
        "mix",
        cases.mixed_beats_fair,
    ),
    Claim(
        "4b",
        "PMQ may lose to fair uniform on some models",
        "EAC-MoE, GEMQ's reviews",
        "it does at least once",
        cases.pmq_may_lose,
    ),
    Claim(
        "4c",
        "Models of many experts gain more from mixed maps",
        "MxMoE: DeepSeek-V2-Lite and Qwen1.5 against Mixtral",
        "the KL saved by the knapsack is a larger share on the model of most experts per layer "
        "than on that of fewest, at 2.25 and 2.5 bits",
        cases.many_experts_gain_more,
    ),
    Claim(
        "5a",
        "Projections > experts > layers as what shares one format",
        "MxMoE",
        "held-out KL of the finer below that of the coarser, each by the knapsack on gradients' "
        "estimates",
        cases.finer_is_better,
    ),
    Claim(
        "5b",
        "down_proj is the most sensitive",
        "unconfirmed in the notes",
        "with all of one kind quantized, held-out KL per weight of down above that of gate and up",
        cases.down_is_sensitive,
    ),
    Claim(
        "6a",
        "One gradient-scaled global budget is at least as good as a budget per layer",
        "GEMQ",
        "held-out KL of gemq below that of pmq-paper, and of error-layer",
        cases.global_beats_local,
    ),
    Claim(
        "6b",
        "The gap grows as bits fall",
        "GEMQ",
        "pmq-paper's perplexity over gemq's is larger at the least budget than at the largest",
        cases.gap_grows,
    ),
    Claim(
        "6c",
        "An un-scaled global budget is bad",
        "GEMQ, ablation",
        "held-out KL of error-model above that of error-layer",
        cases.unscaled_global_is_bad,
    ),
    Claim(
        "7a",
        "The first layer gets more bits",
        "MC-MoE, GEMQ",
        "in the knapsack's map, more than the mean of the middle layers",
        cases.first_layer,
    ),
    Claim("7b", "The last layer gets more bits", "GEMQ", "likewise", cases.last_layer),
    Claim(
        "7c",
        "Super experts always get top bits",
        "Super Experts; the notes",
        "in the knapsack's map each has the widest width that any expert has; the output "
        "error tells who is one (`dmpq/agents/super_expert.py`), and names one in any model",
        cases.super_experts,
    ),
    Claim(
        "7d",
        "Maps are bimodal where 1 bit is MSE-optimal and 2 bits are min-max",
        "PMQ's factor files",
        "no 1-bit format is on offer",
    ),
    Claim(
        "8",
        "Router fine-tuning helps more than re-allocation at 2 bits",
        "GEMQ, EAC-MoE",
        _NOT_OFFERED + "no router is trained or calibrated",
    ),
    Claim(
        "9a",
        "Frequency maps are best on the text they were calibrated on",
        "QuantMoE-Bench; MoQa; EAC-MoE",
        "held-out KL, on code and on prose, of the map calibrated on that below the other's",
        cases.own_domain,
    ),
    Claim(
        "9b", "They help in-domain", "the same", "KL below fair uniform's", cases.in_domain_helps
    ),
    Claim(
        "9c",
        "They hurt out-of-domain",
        "the same",
        "KL above fair uniform's",
        cases.out_of_domain_hurts,
    ),
    Claim(
        "10a",
        "High bits to cold experts lower decode latency at equal average bits",
        "the notes, from MoQa and Chowdhury et al.",
        "analytical seconds of inverse-frequency below those of frequency",
        cases.cold_is_fast,
    ),
    Claim(
        "10b",
        "They lower the bits that are read",
        "the same",
        "sum of frequency times bits, relative to the experts a token selects, likewise",
        cases.cold_reads_less,
    ),
    Claim(
        "10c",
        "High bits to hot experts lower the error",
        "the same",
        "held-out KL of frequency below that of inverse-frequency",
        cases.hot_errs_less,
    ),
    Claim(
        "11a",
        "Freshly upcycled experts: all data-free signals tie",
        "sparse upcycling; exact",
        "with one expert copied over its layer, each weight statistic spreads by exactly 0 in it",
        cases.signals_tie,
    ),
    Claim(
        "11b",
        "There no data-free rule beats uniform",
        "the same",
        f"held-out KL of mopeq-layer at least {1 - cases.TIED:.0%} of fair uniform's",
        cases.data_free_wins_nothing,
    ),
    Claim(
        "11c",
        "Usage does",
        "the same",
        "held-out KL of frequency-layer below fair uniform's",
        cases.usage_wins,
    ),
    Claim(
        "12a",
        "The share of changed expert selections rises as bits fall",
        "EAC-MoE",
        "it rises strictly over 8, 4, 3, 2 bits",
        cases.shift_rises,
    ),
    Claim(
        "12b",
        "Newly selected experts were near the boundary",
        "EAC-MoE: 95.9% in the top 16, 64 experts, top 6",
        f"at 2 bits at least {cases.NEAR_SHARE:.0%} were in the first 16/6 k of full precision",
        cases.shift_is_near,
    ),
    Claim(
        "12c",
        "A router's input that moves less than its radius changes no selection",
        "bound R2 of the notes; exact",
        "of the tokens whose input moved by less, none changed",
        cases.certified_never_flip,
    ),
    Claim(
        "12d",
        "Over 40% of tokens shift at 1.5 bits",
        "EAC-MoE",
        "no 1-bit format is on offer",
    ),
)
