"""Several limits at once: never exceeded, refused with the change that is needed, the device's."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from factories import make_problem, make_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmpq.envs import ExpertBitsEnv
from dmpq.errors import InputError
from dmpq.hw_models import Workload
from dmpq.objective import Constraints, shown
from dmpq.solvers.limits import most_within
from dmpq.spec import load_geometry

NAMES = ("avg_bits", "memory_bytes", "latency_s", "energy_j")
FLAGS = {shown(name, 1.0)[0]: name for name in NAMES}
OLMOE = load_geometry("olmoe-1b-7b")
ROUNDING = 1e-12
"""Share by which a cost may exceed its limit, for the rounding of sums (dmpq.solvers.limits)."""


DECODE = Workload()


def small(seed=0, hw="h100", workload=DECODE, bits="2,3,4,8", weights="acc=1"):
    """A problem of two layers with three experts, without limits, and all its maps."""
    problem = make_problem(
        layers=2,
        experts=3,
        seed=seed,
        bits=bits,
        avg_bits=None,
        weights=weights,
        hw=hw,
        workload=workload,
        cost_spec=make_spec(layers=2, experts=3).with_widths_of(OLMOE),
    )
    maps = np.array(list(itertools.product(range(len(problem.menu)), repeat=6)))
    return problem, maps, vars(problem.costs(maps)) | {"avg_bits": problem.effective_bits(maps)}


def totals(problem, maps):
    return problem.linear_values()[np.arange(problem.num_decisions), maps].sum(1)


def named(message):
    """Return the limits that a refusal says would be enough, in their own units."""
    found = re.findall(
        r"(--[a-z-]+) would have to be raised to (?:at most )?([0-9.e+-]*[0-9])", message
    )
    scale = {name: float(shown(name, 1.0)[1]) for name in NAMES}
    return {FLAGS[flag]: float(value) / scale[FLAGS[flag]] for flag, value in found}


DEVICES = ["a100", "a100/sglang", "h100", "cpu"]
STEPS = [Workload(), Workload(batch=32, context=512), Workload("prefill", 1, 256)]


@settings(max_examples=40, deadline=None)
@example(0, "a100", Workload(), {"memory_bytes": 0.9999999999999999})  # less than the rounding
@given(
    st.integers(0, 99),
    st.sampled_from(DEVICES),
    st.sampled_from(STEPS),
    st.dictionaries(st.sampled_from(NAMES), st.floats(0.0, 1.0), min_size=1),
)
def test_limits_are_never_exceeded_and_refusals_name_what_is_enough(seed, hw, workload, quantiles):
    plain, maps, taken = small(seed, hw, workload)
    limits = {name: float(np.quantile(taken[name], q)) for name, q in quantiles.items()}
    allowed = {name: limit * (1 + ROUNDING) for name, limit in limits.items()}
    inside = np.logical_and.reduce([taken[name] <= allowed[name] for name in limits])
    additive = limits.keys() <= {"avg_bits", "memory_bytes"}
    try:
        problem = replace(plain, constraints=Constraints(**limits))
    except InputError as error:
        assert not (additive and inside.any())
        for name, value in named(str(error)).items():
            raised = limits | {name: value}
            replace(plain, constraints=Constraints(**raised))
        return
    found = problem.mckp()
    assert problem.feasible(found[None])[0]
    if additive:
        best = totals(plain, maps[inside]).min()
        assert totals(plain, found[None])[0] == pytest.approx(best, rel=1e-9)


def test_the_best_map_within_limits_that_do_not_add_up_is_found_nearly_always():
    """Not always: what does not add up is searched, not solved."""
    rng, best, tried = np.random.default_rng(0), 0, 0
    for seed in range(12):
        plain, maps, taken = small(seed, DEVICES[seed % 4], STEPS[seed % 3])
        for kind in (("latency_s", "energy_j"), ("avg_bits", "latency_s"), NAMES):
            limits = {n: float(np.quantile(taken[n], rng.uniform(0.05, 0.6))) for n in kind}
            inside = np.logical_and.reduce([taken[n] <= limits[n] for n in kind])
            if not inside.any():
                continue
            problem = replace(plain, constraints=Constraints(**limits))
            least = totals(plain, maps[inside]).min()
            tried += 1
            best += totals(plain, problem.mckp()[None])[0] <= least + 1e-12
    assert tried > 30
    assert best >= 0.95 * tried


def test_a_large_model_saves_launches_by_whole_layers():
    """A limit that uniform 4 bits meet by 1% leaves room for widths that differ by layer."""
    spec = make_spec(layers=8, experts=16).with_widths_of(OLMOE)
    plain = make_problem(layers=8, experts=16, avg_bits=None, weights="acc=1", cost_spec=spec)
    limit = plain.costs(plain.uniform("4")[None]).latency_s[0] * 1.01
    problem = replace(plain, constraints=Constraints(avg_bits=3.5, latency_s=float(limit)))
    found = problem.mckp().reshape(8, 16)
    assert totals(plain, found.reshape(1, -1))[0] < totals(plain, plain.uniform("3")[None])[0]
    assert len(np.unique(found)) > 1


def test_each_limit_has_a_multiplier_of_its_own():
    plain, _, taken = small(hw="h100", workload=Workload(batch=32, context=512))
    tight = float(np.quantile(taken["latency_s"], 0.2))
    loose = float(taken["energy_j"].max())
    both = replace(plain, constraints=Constraints(latency_s=tight, energy_j=loose))
    alone = replace(plain, constraints=Constraints(latency_s=tight))
    assert totals(plain, both.mckp()[None]) == totals(plain, alone.mckp()[None])


def test_projections_are_deterministic():
    plain, _, taken = small()
    limits = {n: float(np.quantile(taken[n], 0.3)) for n in NAMES}
    first, again = (replace(plain, constraints=Constraints(**limits)).mckp() for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_limits_that_add_up_are_refused_with_the_least_that_is_enough():
    """Groups of 128 in an input of 64 are groups of 64: memory and bits rank formats apart."""
    spec = make_spec(layers=1, experts=5, hidden=64)
    plain = make_problem(layers=1, experts=5, bits="2g32,3", avg_bits=None, cost_spec=spec)
    maps = np.array(list(itertools.product(range(2), repeat=5)))
    memory, bits = plain.costs(maps).memory_bytes, plain.effective_bits(maps)
    least_memory, least_bits = memory.min(), bits[memory == memory.min()].min()
    limits = Constraints(avg_bits=float(bits.min()), memory_bytes=float(memory.min()))
    if (bits[memory == least_memory] <= bits.min()).any():
        replace(plain, constraints=limits)  # the same map is least in both
        return
    with pytest.raises(InputError, match=r"^No map meets --avg-bits .* together") as caught:
        replace(plain, constraints=limits)
    found = named(str(caught.value))
    assert found["avg_bits"] == pytest.approx(least_bits, rel=1e-5)
    assert "at most" not in str(caught.value)


def test_a_combination_that_is_impossible_names_the_change_of_each_limit():
    plain, _, taken = small(hw="a100", workload=Workload("prefill", 1, 2048), bits="2,4,16")
    # With many tokens the widest format is the fastest on this stack, so that bits cost time.
    fastest = float(taken["latency_s"].min())
    limits = {"avg_bits": 4.25, "latency_s": fastest}
    with pytest.raises(InputError) as caught:
        replace(plain, constraints=Constraints(**limits))
    message = str(caught.value)
    assert message.startswith("No map meets --avg-bits 4.25 and --latency-ms ")
    found = named(message)
    assert set(found) == {"avg_bits", "latency_s"}
    narrow = taken["avg_bits"] <= 4.25
    quick = taken["latency_s"] <= fastest * (1 + 1e-12)
    assert found["latency_s"] == pytest.approx(taken["latency_s"][narrow].min(), rel=1e-5)
    assert found["avg_bits"] == pytest.approx(taken["avg_bits"][quick].min(), rel=1e-5)
    for name, value in found.items():
        replace(plain, constraints=Constraints(**(limits | {name: value})))


def test_where_no_single_change_is_enough_each_limit_s_own_least_is_named():
    plain, _, _ = small()
    limits = Constraints(avg_bits=1.0, latency_s=1e-9)
    with pytest.raises(InputError, match="no change of one of them is enough") as caught:
        replace(plain, constraints=limits)
    cheapest = plain.costs(np.zeros((1, 6), int)).latency_s[0] * 1e3
    assert f"--avg-bits 2.25, --latency-ms {cheapest:.6g}" in str(caught.value)


def mixtral(**options):
    spec = make_spec(layers=32, experts=8).with_widths_of(load_geometry("mixtral-8x7b"))
    return make_problem(layers=32, experts=8, **{"cost_spec": spec, "hw": "rtx4090", **options})


def test_the_device_s_memory_limits_maps_where_it_binds():
    problem = mixtral(avg_bits=None)
    assert problem.constraints.memory_bytes is None
    assert problem.limits.memory_bytes == pytest.approx(0.9 * 24e9)
    assert problem.notes == (
        "memory is limited to 21.6 GB: rtx4090 has 24 GB, of which 90% may be used",
    )
    rng = np.random.default_rng(0)
    maps = [problem.propose(rng.normal(size=problem.num_decisions)) for _ in range(3)]
    assert (problem.costs(np.array(maps)).memory_bytes <= 0.9 * 24e9).all()
    assert not problem.feasible(problem.uniform("8")[None])[0]
    env = ExpertBitsEnv(problem=problem)
    env.reset()
    done = False
    while not done:
        _, _, done, _, info = env.step(int(np.flatnonzero(env.action_masks())[-1]))
    assert info["memory_bytes"] <= 0.9 * 24e9
    assert info["moved"] == 0


@pytest.mark.parametrize(("hw", "avg_bits"), [("a100", None), ("rtx4090", 3.0), ("a100", 3.0)])
def test_where_it_does_not_bind_nothing_changes(hw, avg_bits):
    problem = mixtral(hw=hw, avg_bits=avg_bits, weights="acc=1")
    if hw == "a100" and avg_bits is None:  # 93 GB at 16 bits
        assert problem.limits.memory_bytes == pytest.approx(72e9)
        return
    assert problem.limits is problem.constraints
    assert problem.notes == ()
    np.testing.assert_array_equal(
        problem.mckp(), mixtral(hw="h200", avg_bits=3.0, weights="acc=1").mckp()
    )


def test_a_limit_above_the_device_s_memory_is_reduced_and_said_so():
    problem = mixtral(avg_bits=None, memory_bytes=80e9)
    assert problem.limits.memory_bytes == pytest.approx(21.6e9)
    (note,) = problem.notes
    assert note.startswith("--memory-gb 80 is reduced to 21.6: rtx4090 has 24 GB")
    below = mixtral(avg_bits=None, memory_bytes=20e9)
    assert below.limits is below.constraints


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(InputError) as caught:
        mixtral(workload=Workload(batch=64))
    message = str(caught.value)
    assert message.startswith("The smallest map takes 32.57")
    assert "rtx4090 has 24 GB, of which 90% may be used; use a device with at least" in message
    assert "\n" not in message


def test_a_model_that_does_not_fit_beside_other_limits_says_which_device_would_do():
    fastest = mixtral(hw="h200", avg_bits=None, workload=Workload("prefill", 1, 2048))
    limit = float(fastest.costs(fastest.uniform("16")[None]).latency_s[0])
    with pytest.raises(InputError, match=r"the memory of rtx4090 .* together") as caught:
        mixtral(avg_bits=None, latency_s=limit, workload=Workload("prefill", 1, 2048))
    assert re.search("--latency-ms would have to be raised to [0-9]", str(caught.value))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.0))
def test_what_maps_may_take_at_most_is_a_bound_and_close(seed, share):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 50, (5, 3))
    taken = sizes * 3 + rng.integers(0, 2, sizes.shape)
    limit = float(sizes.min(1).sum() + share * (sizes.max(1) - sizes.min(1)).sum())
    maps = np.array(list(itertools.product(range(3), repeat=5)))
    fits = sizes[np.arange(5), maps].sum(1) <= limit
    most = taken[np.arange(5), maps].sum(1)[fits].max()
    bound = most_within(taken, sizes, limit)
    assert most <= bound * (1 + 1e-9)
    assert bound <= most + taken.max()


KINDS = [
    ("latency_s",),
    ("energy_j",),
    ("avg_bits", "latency_s"),
    ("latency_s", "energy_j"),
    NAMES,
]


@pytest.mark.parametrize("kind", KINDS, ids=",".join)
@pytest.mark.parametrize("hw", DEVICES)
@pytest.mark.parametrize("workload", STEPS, ids=str)
def test_what_is_proven_is_below_every_map_and_close_to_the_best(kind, hw, workload):
    """h100 has a fitted power, so that its energy is no multiple of its time."""
    rng = np.random.default_rng(0)
    plain, maps, taken = small(hw=hw, workload=workload, bits="2,4,16")
    limits = {n: float(np.quantile(taken[n], rng.uniform(0.3, 0.9))) for n in kind}
    relaxation = replace(plain, constraints=Constraints(**limits)).projection.relaxation
    scale = {"avg_bits": plain.num_weights, "memory_bytes": 8.0}
    for name in kind:
        others = [taken[n] <= limits[n] for n in kind if n != name]
        inside = np.logical_and.reduce([np.ones(len(maps), bool), *others])
        least = taken[name][inside].min()
        proven = relaxation.least(name) / scale.get(name, 1.0)
        if name == "memory_bytes":
            proven += plain._fixed_bytes
        assert proven <= least * (1 + 1e-12)
        # Bits that a few experts save come in lumps where they cost a launch of a whole layer.
        assert proven >= (0.9 if name in {"latency_s", "energy_j"} else 0.45) * least


@pytest.mark.parametrize("serve", ["projection", "layer"])
def test_bounds_hold_for_what_else_shares_a_format(serve):
    plain = make_problem(layers=2, experts=2, bits="2,4,16", avg_bits=None, serve=serve)
    maps = np.array(list(itertools.product(range(3), repeat=plain.num_decisions)))
    latency = plain.costs(maps).latency_s
    limit = float(np.median(latency))
    relaxation = replace(plain, constraints=Constraints(latency_s=limit)).projection.relaxation
    assert 0.9 * latency.min() <= relaxation.least("latency_s") <= latency.min() * (1 + 1e-12)


def test_widths_that_are_stored_alike_share_launches_in_a_bound():
    plain = make_problem(layers=2, experts=3, hw="edge-tpu", avg_bits=None)
    maps = np.array(list(itertools.product(range(5), repeat=6)))
    latency = plain.costs(maps).latency_s
    limits = Constraints(latency_s=float(latency.max()))
    relaxation = replace(plain, constraints=limits).projection.relaxation
    least = relaxation.least("latency_s")
    assert 0.99 * latency.min() <= least <= latency.min() * (1 + 1e-12)


def test_long_menus_have_a_weaker_bound_that_still_holds():
    plain = make_problem(layers=1, experts=4, bits="2,2g32,2g64,3,4,4g32,8,16", avg_bits=None)
    maps = np.array(list(itertools.product(range(8), repeat=4)))
    latency = plain.costs(maps).latency_s
    limits = Constraints(latency_s=float(latency.max()))
    relaxation = replace(plain, constraints=limits).projection.relaxation
    assert 0.5 * latency.min() <= relaxation.least("latency_s") <= latency.min() * (1 + 1e-12)


@pytest.mark.parametrize("hw", ["a100", "h100"])
def test_the_least_time_is_named_as_such_where_it_is_proven(hw):
    plain, _, taken = small(hw=hw)
    least = float(taken["latency_s"].min())
    with pytest.raises(InputError, match="the least time in ms on") as caught:
        replace(plain, constraints=Constraints(latency_s=least * (1 - 1e-5)))
    assert "found" not in str(caught.value)
    replace(plain, constraints=Constraints(latency_s=least))


def test_between_what_is_proven_and_what_is_found_both_are_named(monkeypatch):
    plain, _, taken = small()
    least = float(taken["latency_s"].min())
    monkeypatch.setattr("dmpq.solvers.relaxation.Relaxation.least", lambda self, name: 0.9 * least)
    with pytest.raises(InputError) as caught:
        replace(plain, constraints=Constraints(latency_s=0.95 * least))
    assert "the least time in ms that was found on" in str(caught.value)
    assert re.search(r"\(none takes less than [0-9.]+\)", str(caught.value))
    limits = Constraints(latency_s=0.95 * least, avg_bits=2.5)
    with pytest.raises(InputError, match="No map was found that meets") as caught:
        replace(plain, constraints=limits)
    assert re.search(r"at most [0-9.e-]+ \(and at least [0-9.e-]+\)", str(caught.value))


def test_limits_that_one_map_alone_meets_are_met():
    """The costs of a map that no other beats, as limits: nothing else is within them."""
    rng, refused = np.random.default_rng(0), 0
    for seed in range(12):
        plain, _, taken = small(seed, DEVICES[seed % 4], STEPS[seed % 3])
        for kind in KINDS:
            spread = {n: np.ptp(taken[n]) or 1.0 for n in kind}
            weighed = sum(rng.uniform(0.1, 1) * taken[n] / spread[n] for n in kind)
            best = int(np.argmin(weighed))
            limits = {n: float(taken[n][best]) for n in kind}
            try:
                replace(plain, constraints=Constraints(**limits))
            except InputError:
                refused += 1
    assert refused == 0


def test_what_is_disproved_is_not_searched_for(monkeypatch):
    """A search for what cannot be takes minutes on a large model."""
    plain, _, taken = small()
    limit = float(taken["latency_s"].min())
    met = replace(plain, constraints=Constraints(latency_s=limit)).projection
    relaxation = replace(met.relaxation, priced={"latency_s": 0.9 * limit}, _known={})
    unmet = replace(met, usage=lambda maps: met.usage(maps) / 0.9, relaxation=relaxation)
    monkeypatch.setattr("dmpq.solvers.projection.descended", lambda *_: pytest.fail("searched"))
    assert met.possible
    assert relaxation.impossible
    assert not met.relaxation.impossible
    assert not unmet.possible
