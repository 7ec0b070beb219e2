"""The few experts that everything hinges on get more bits, and all others the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.agents.additive import AdditiveAgent
from dmpq.agents.allocation import with_more_bits
from dmpq.problem import Problem
from dmpq.profile import Profile

_PERCENTILE: Final = 99.5
_SHARE_OF_LARGEST: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class SuperExpertAgent(AdditiveAgent):
    """Protects super experts and is uniform elsewhere: one evaluation.

    "Super Experts" (arXiv 2507.23279, ICLR 2026) are those whose largest absolute output of
    ``down_proj``, a, is above the 99.5th percentile of all experts' and above a tenth of the
    model's largest: 1 of Mixtral's 256, 3 of Qwen3-30B-A3B's 6144. The paper prunes them to show
    what they carry; protecting them is the obvious rule.

    A profile holds no peaks. The root mean square error of the expert's routed output at the
    narrowest width, over the tokens that select it, stands in for a, under the same two
    thresholds: an error grows with the output it is an error of, and Mixtral's super expert (layer
    1, expert 3) has 122 times its layer's median. It differs in that a mean over tokens sees an
    activation less sharply than a peak does, that it is weighted by the router, and that an
    expert which quantizes badly for another reason counts, too. By the percentile, at least one
    expert is protected in any model whose experts differ.

    Attributes:
        extra_bits: How much wider super experts are, as near as menu and budget allow.
    """

    name: ClassVar[str] = "super-expert"
    signal: ClassVar[str] = "outstanding output error"
    cost: ClassVar[str] = "1"
    source: ClassVar[str] = "arXiv 2507.23279"
    reads: ClassVar[str] = "gradients"

    extra_bits: float = 4.0

    def values(self, problem: Problem) -> NDArray[np.float64]:
        """Return damages that protect super experts, (D, B).

        Raises:
            InputError: If ``extra_bits`` is no width.
        """
        chosen = super_experts(problem.profile)
        return with_more_bits(problem, np.ones(len(chosen)), chosen, self.extra_bits)


def super_experts(profile: Profile) -> NDArray[np.bool_]:
    """Return which experts stand out by the paper's thresholds, (N,)."""
    used = profile.frequency > 0
    error = profile.output_error[:, profile.menu.narrowest].clip(0)
    size = np.sqrt(np.divide(error, profile.frequency, out=np.zeros_like(error), where=used))
    chosen: NDArray[np.bool_] = (size > np.percentile(size, _PERCENTILE)) & (
        size > _SHARE_OF_LARGEST * size.max()
    )
    return chosen
