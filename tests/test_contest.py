"""Contests: what a word means, and what is no contest."""

import pytest

from dmpq.errors import InputError
from dmpq.objective import Baselines, Constraints
from dmpq.referee.contest import Contest

BASE = Baselines(damage=1.0, latency_s=2e-3, memory_bytes=4e9, energy_j=0.5)


@pytest.mark.parametrize(
    ("text", "hw", "limits"),
    [
        ("bits=3", None, {"avg_bits": 3.0}),
        ("rtx4090:latency=60%", "rtx4090", {"latency_s": 1.2e-3}),
        ("h100/vllm:bits=2.5+energy=50%", "h100/vllm", {"avg_bits": 2.5, "energy_j": 0.25}),
        ("a:b.json:memory=25%", "a:b.json", {"memory_bytes": 1e9}),
    ],
)
def test_a_word_names_a_device_and_limits(text, hw, limits):
    contest = Contest.parse(text)
    assert (contest.text, contest.hw) == (text, hw)
    assert contest.constraints(BASE) == Constraints(**limits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "limit"),
        ("bit=3", "did you mean 'bits'"),
        ("bits=3+bits=2", "twice"),
        ("bits=3%", "write 3"),
        ("latency=0.6", "write 60%"),
        ("latency=fast%", "write 60%"),
        ("latency=-1%", "write 60%"),
        ("energy=nan%", "write 60%"),
        ("bits", "write 3"),
    ],
)
def test_what_is_no_contest_is_refused_with_an_example(text, message):
    with pytest.raises(InputError, match=message):
        Contest.parse(text)
