"""The reward's formula, its weights and its limits."""

import numpy as np
import pytest

from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.hw_models import Cost
from dmpq.objective import (
    LIMIT_FLAGS,
    Baselines,
    Constraints,
    Weights,
    refuse_limit,
    reward_terms,
)
from dmpq.session import check_numbers


def test_the_formula():
    cost = Cost(np.array([2.0]), np.array([30.0]), np.array([5.0]))
    terms = reward_terms(
        Weights(acc=1.0, lat=0.1, mem=0.2, eng=0.3),
        Baselines(damage=0.5, latency_s=4.0, memory_bytes=60.0, energy_j=10.0),
        np.array([0.1]),
        cost,
    )
    assert {name: float(term[0]) for name, term in terms.items()} == pytest.approx(
        {"accuracy": -0.2, "latency": -0.05, "memory": -0.1, "energy": -0.15}
    )


def test_weights_that_are_not_named_are_zero():
    assert Weights.parse("acc=1, lat=0.25") == Weights(acc=1.0, lat=0.25, mem=0.0, eng=0.0)
    np.testing.assert_array_equal(Weights.parse("eng=2").as_array(), [0, 0, 0, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accc=1", "did you mean 'acc'"),
        ("acc", "is no weight"),
        ("acc=much", "is no weight"),
        ("acc=-1", "0 or more"),
        ("acc=nan", "0 or more"),
        ("acc=1,acc=2", "given twice"),
        (" , ", "empty"),
    ],
)
def test_bad_weights_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Weights.parse(text)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("avg_bits", "--avg-bits"),
        ("memory_bytes", "--memory-gb"),
        ("latency_s", "--latency-ms"),
        ("energy_j", "--energy-j"),
    ],
)
def test_bad_limits_are_refused_by_their_flag(name, flag, value):
    with pytest.raises(InputError, match=flag):
        Constraints(**{name: value})


@pytest.mark.parametrize("flag", LIMIT_FLAGS)
@pytest.mark.parametrize("value", ["1e300", "1e13", "inf", "nan", "0", "-1"])
def test_limits_beyond_any_device_are_refused_as_they_were_written(flag, value):
    config = SearchConfig(**{flag.removeprefix("--").replace("-", "_"): float(value)})
    with pytest.raises(InputError, match=r"makes no sense; give a number above 0, at most") as no:
        check_numbers(config)
    assert str(no.value).startswith(f"{flag} {float(value):.6g} ")


def test_limits_far_above_every_device_are_taken():
    for flag, value in zip(LIMIT_FLAGS, (64.0, 1e12, 1e12, 1e12), strict=True):
        refuse_limit(flag, value)
    assert Constraints(latency_s=1e12 * 1e-3, memory_bytes=1e12 * 1e9).given()


def test_given_limits():
    assert Constraints(avg_bits=3.0, energy_j=2.0).given() == {"avg_bits": 3.0, "energy_j": 2.0}
