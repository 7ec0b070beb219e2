"""0 bits: a pruned expert against plain torch, its price, and who may be pruned."""

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import FAMILIES
from factories import make_problem, make_profile, make_spec, write_bitmap
from hypothesis import given
from hypothesis import strategies as st
from test_hardware_loop import tiny_maps
from test_registry import RULES, whole_problem
from test_search import QUICK
from transformers.integrations.moe import grouped_mm_experts_forward

from dmpq import agents
from dmpq.bank import Bank
from dmpq.bitmap import BitMap, assignment_from
from dmpq.errors import InputError
from dmpq.formats import Format, Menu
from dmpq.front import budgets
from dmpq.hw_models import Workload, load_hardware
from dmpq.hw_models.corrected import CorrectedModel
from dmpq.hw_models.explanation import Part, explainable
from dmpq.model_evaluator import ModelEvaluator
from dmpq.profile import Profile
from dmpq.profiling import measure_profile
from dmpq.pruning import renormalised
from dmpq.search import main
from dmpq.validate import main as validate

MENU = Menu.parse("0,2g16,4g16,16")
STORED = Menu.parse("2g16,4g16,16")
FULL = len(MENU) - 1


def shared_out(index, weights, pruned):
    """Move the weights of pruned experts to the others, token by token."""
    moved = weights.clone()
    for token in range(len(index)):
        kept = torch.tensor([int(e) not in pruned for e in index[token]])
        if kept.all():
            continue
        left = torch.where(kept, weights[token], torch.zeros(()))
        moved[token] = left / left.sum() * weights[token].sum() if kept.any() else 0.0
    return moved


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bank_memory", [0, 1e9])
def test_pruning_equals_zeroing_and_rescaling_routing_weights(
    tiny, token_ids, family, bank_memory
):
    """To the bit: the oracle runs every expert and moves the weights token by token.

    First among experts at 16 bits, where it is the model's own forward, then among others.
    """
    moe = tiny(family)
    bank = Bank(moe, MENU, memory_bytes=bank_memory)
    assert bank.dense == (bank_memory > 0)
    experts = moe.spec.num_experts
    pruned = np.random.default_rng(0).random(experts) < 0.4
    gone = [
        set(np.flatnonzero(pruned[moe.spec.layer_of_expert == layer]).tolist())
        for layer in range(len(bank.layers))
    ]

    def oracle(run, pruned):
        def forward(module, hidden, index, weights):
            return run(module, hidden, index, shared_out(index, weights, pruned))

        return forward

    stored = Bank(moe, STORED, memory_bytes=bank_memory)
    mixed = np.random.default_rng(1).integers(0, len(STORED), experts)
    stored.choose(mixed[None, :, None].repeat(2, 2))
    plain = [grouped_mm_experts_forward] * len(bank.layers)
    for choice, runs in ((np.full(experts, FULL), plain), (mixed + 1, stored.layers)):
        with torch.inference_mode():
            with moe.experts_forward(runs):
                own = moe.logits(token_ids)
            with moe.experts_forward([oracle(*pair) for pair in zip(runs, gone, strict=True)]):
                expected = moe.logits(token_ids)
            bank.choose(np.where(pruned, 0, choice)[None, :, None].repeat(2, 2))
            with bank.attached():
                found = moe.logits(token_ids)
        assert torch.equal(found, expected)
        assert not torch.equal(found, own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bank_memory", [0, 1e9])
def test_maps_without_pruned_experts_are_unchanged_to_the_bit(
    tiny, token_ids, family, bank_memory
):
    moe, ids = tiny(family), token_ids.numpy()
    with_0, without = (
        ModelEvaluator(Bank(moe, menu, memory_bytes=bank_memory), ids, label="t")
        for menu in (MENU, STORED)
    )
    maps = np.random.default_rng(1).integers(0, 3, (3, moe.spec.num_experts))
    maps[0] = 2
    one, other = with_0.evaluate(maps + 1), without.evaluate(maps)
    assert one.kl.tolist() == other.kl.tolist()
    assert one.kl[0] == 0
    assert one.router_shift.tolist() == other.router_shift.tolist()
    split = maps.repeat(2, axis=1)
    split[:, ::2] = 2 - split[:, ::2]
    assert with_0.evaluate(split + 1).kl.tolist() == without.evaluate(split).kl.tolist()
    together = without.screen(maps).kl
    pruned = np.vstack([maps + 1, np.zeros_like(maps[:1])])
    assert with_0.screen(maps + 1).kl.tolist() == together.tolist()
    assert with_0.screen(pruned).kl[:3] == pytest.approx(together, abs=1e-6)


@pytest.mark.parametrize("bank_memory", [0, 1e9])
def test_pruned_maps_in_one_forward_keep_to_their_own_rows(tiny, token_ids, bank_memory):
    moe = tiny()
    evaluator = ModelEvaluator(
        Bank(moe, MENU, memory_bytes=bank_memory), token_ids.numpy(), label="t"
    )
    maps = np.random.default_rng(2).integers(0, len(MENU), (4, moe.spec.num_experts))
    maps[0] = FULL
    alone = evaluator.evaluate(maps)
    together = evaluator.screen(maps)
    assert together.kl == pytest.approx(alone.kl, abs=1e-6)
    assert together.router_shift == pytest.approx(alone.router_shift, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_without_experts_adds_nothing(tiny, family):
    layer = Bank(tiny(family), MENU).layers[0]
    experts, hidden = layer.experts.num_experts, layer.experts.down.shape[1]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(9, hidden, generator=generator)
    index = torch.randint(0, experts, (9, 2), generator=generator)
    layer.choose(np.zeros((1, experts, 2), np.int64))
    assert (layer(layer.experts.module, inputs, index, torch.ones(9, 2)) == 0).all()


def test_half_an_expert_cannot_be_pruned(tiny, token_ids):
    evaluator = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="t")
    halves = np.full((1, 32), FULL)
    halves[0, 4] = 0
    with pytest.raises(InputError, match="one projection of an expert"):
        evaluator.evaluate(halves)
    problem = make_problem(bits="0,2,16")
    with pytest.raises(InputError, match="one projection of an expert"):
        problem.hardware.cost(
            problem.cost_spec, problem.menu, np.minimum(halves, 2), problem.workload
        )
    with pytest.raises(InputError, match="pruned whole"):
        measure_profile(evaluator, text="random", projections=True)
    with pytest.raises(InputError, match=r"leave 0 out of --bits"):
        make_problem(bits="0,2,16", serve="projection")


shares = st.floats(0, 1, width=32)


@given(st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=8))
def test_the_sum_of_routing_weights_stays(row):
    weights = torch.tensor([[weight for weight, _ in row]])
    kept = torch.tensor([[keep for _, keep in row]])
    moved = renormalised(weights, kept)
    assert moved.isfinite().all()
    assert (moved[~kept] == 0).all()
    left = float(weights[kept].sum())
    whole = float(weights.sum())
    assert float(moved.sum()) == pytest.approx(whole if left > 0 else 0.0, rel=1e-5)
    if kept.all():
        assert torch.equal(moved, weights)


@pytest.fixture(scope="module")
def measured(tiny, token_ids):
    evaluator = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="t", batch_tokens=64)
    return evaluator, measure_profile(evaluator, text="random")


def test_a_profile_measures_what_pruning_one_expert_loses(measured):
    evaluator, profile = measured
    changed = np.full((1, 16), FULL)
    changed[0, 5] = 0
    assert evaluator.evaluate(changed).kl[0] == profile.sensitivity[5, 0]
    assert (profile.sensitivity[profile.hits > 0, 0] > 0).all()
    ids = torch.cat(list(evaluator.id_batches)).numpy()
    stored = Bank(evaluator.bank.moe, STORED)
    without = measure_profile(
        ModelEvaluator(stored, ids, label="t", batch_tokens=64), text="random"
    )
    for name in ("sensitivity", "output_error", "proxy"):
        assert getattr(profile, name)[:, 1:].tolist() == getattr(without, name).tolist()
    assert profile.head_room() == without.head_room()


def test_the_output_error_is_that_of_the_layer(measured, token_ids):
    """Computed the slow way: the layer's output with the expert and without, for every token."""
    evaluator, profile = measured
    bank, seen = evaluator.bank, {}

    def noted(_module, args):
        seen["args"] = args

    layer = bank.layers[0]
    handle = layer.experts.module.register_forward_pre_hook(noted)
    with torch.inference_mode():
        bank.moe.logits(token_ids)
        handle.remove()
        errors = []
        for expert in range(8):
            outputs = []
            for fmt in (FULL, 0):
                choice = np.full((1, 8, 2), FULL)
                choice[0, expert] = fmt
                layer.choose(choice)
                outputs.append(layer(layer.experts.module, *seen["args"]))
            difference = (outputs[1] - outputs[0]).double().square().sum()
            errors.append(float(difference) / token_ids.numel())
    assert profile.output_error[:8, 0] == pytest.approx(errors, rel=1e-3)


def test_gradients_tell_of_pruning_too(tiny, token_ids):
    evaluator = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="t", batch_tokens=64)
    profile = measure_profile(evaluator, text="random", signal="gradient")
    hit = profile.hits > 0
    assert (profile.sensitivity[hit, 0] > profile.sensitivity[hit, 1]).all()


def test_a_profile_with_pruned_experts_is_read_as_it_was_written(tiny, token_ids, tmp_path):
    evaluator = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="t")
    profile = measure_profile(evaluator, text="random", signal="gradient")
    profile.save(tmp_path / "profile.safetensors")
    assert Profile.load(tmp_path / "profile.safetensors").menu == MENU


def test_what_is_pruned_is_stored_nowhere():
    menu = Menu.parse("0,2,16")
    assert menu.stored_bits((7, 128)).tolist()[0] == 0
    assert menu.effective_bits(128).tolist() == [0, 2.25, 16]
    assert Format.parse("0").key == "0"
    assert menu.stored == (1, 2)
    assert menu.narrowest == 1
    assert Menu().pruning is None
    assert menu.pruning == (0, 1)


def test_group_sizes_leave_pruned_experts_alone():
    assert Menu.parse("0,2,16", group_sizes="32,64").keys == ("0", "2g64", "2g32", "16")


@pytest.mark.parametrize(
    ("keys", "words"), [("0", "pruned experts \\(0\\) alone"), ("0g32,4", "write '0'")]
)
def test_menus_that_cannot_be(keys, words):
    with pytest.raises(InputError, match=words):
        Menu.parse(keys)


@given(st.floats(0.0, 2.2), st.integers(0, 5))
def test_budgets_below_the_narrowest_width_can_be_met(bits, seed):
    problem = make_problem(bits="0,2,3,4,8,16", avg_bits=max(bits, 1e-3), seed=seed)
    chosen = problem.mckp()
    assert problem.effective_bits(chosen[None])[0] <= max(bits, 1e-3)
    assert problem.feasible(chosen[None]).all()
    assert (problem.menu.pruned[chosen]).any()


def test_rewards_stay_comparable():
    """What is not pruned is worth the same whether or not it could have been."""
    profile = make_profile(bits="0,2,3,4,8,16")
    less = dataclasses.replace(
        profile,
        menu=Menu(),
        projection_sensitivity=None,
        uniform_kl=profile.uniform_kl[1:],
        **{
            name: getattr(profile, name)[:, 1:]
            for name in ("sensitivity", "output_error", "proxy")
        },
    )
    problem = make_problem(avg_bits=None)
    more = dataclasses.replace(
        problem, profile=dataclasses.replace(profile, projection_sensitivity=None)
    )
    fewer = dataclasses.replace(problem, profile=less)
    assert more.baselines == fewer.baselines
    maps = np.random.default_rng(0).integers(0, 5, (6, 16))
    one, other = more.evaluate(maps + 1), fewer.evaluate(maps)
    assert one.reward.tolist() == other.reward.tolist()
    assert one.effective_bits.tolist() == other.effective_bits.tolist()


@pytest.mark.parametrize("hw", ["a100", "generic-128x128"])
def test_experts_that_were_never_hit_are_not_pruned_first(hw):
    if hw != "a100":
        pytest.importorskip("scalesim")
    problem = make_problem(bits="0,2,3,4,8,16", avg_bits=2.0, unhit=4, hw=hw)
    chosen = problem.mckp()
    assert problem.menu.pruned[chosen].any()
    assert not problem.menu.pruned[chosen[problem.unhit]].any()
    forced = dataclasses.replace(
        problem, constraints=dataclasses.replace(problem.constraints, avg_bits=0.1)
    )
    assert problem.menu.pruned[forced.mckp()[problem.unhit]].all()


def test_a_policy_s_budgets_begin_below_the_narrowest_width():
    limits = budgets(make_problem(bits="0,2,8,16", avg_bits=None))
    assert limits[0] == pytest.approx(2.25 / 2)
    assert limits[-1] == pytest.approx(8.25)
    assert budgets(make_problem(avg_bits=None))[0] == pytest.approx(1.02 * 2.25)


def test_a_whole_layer_can_be_pruned():
    problem = make_problem(bits="0,2,16", avg_bits=1.2, serve="layer", layers=4)
    chosen = problem.mckp()
    assert sorted(chosen.tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["a100", "t4", "cpu", "m2-max"])
def test_parts_of_an_explanation_leave_pruned_experts_out(name):
    spec, menu = make_spec(), Menu.parse("0,2,4")
    choice = np.arange(16) % 3
    model = explainable(load_hardware(name))
    found = model.explain(spec, menu, choice, Workload(batch=4))
    cost = load_hardware(name).cost(spec, menu, choice[None], Workload(batch=4))
    total = Part.total(found.parts)
    assert total.latency_s == pytest.approx(cost.latency_s[0])
    assert total.stored_bytes == pytest.approx(cost.memory_bytes[0])
    pruned = found.formats[0]
    assert (pruned.key, pruned.experts, pruned.active, pruned.launches) == ("0", 6, 0, 0)
    assert (pruned.kernel_bits, pruned.kernel) == (0, "nothing runs")
    spent = [part for part in found.parts if part.key == "0"]
    assert sum(part.latency_s + part.stored_bytes + part.flops for part in spent) == 0


def test_a_bound_on_latency_holds_with_pruned_experts():
    """The least time is that of no expert at all, and just below it nothing is possible."""
    free = make_problem(bits="0,2,4", avg_bits=None)
    least = float(free.costs(free.uniform("0")[None]).latency_s[0])
    assert make_problem(bits="0,2,4", avg_bits=None, latency_s=least).mckp().tolist() == [0] * 16
    with pytest.raises(InputError, match="below"):
        make_problem(bits="0,2,4", avg_bits=None, latency_s=least * 0.999)
    some = make_problem(bits="0,2,4", avg_bits=None, latency_s=least * 1.2)
    assert some.feasible(some.mckp()[None]).all()


def test_a_bit_map_with_pruned_experts_is_read_as_it_was_written(tmp_path):
    source = BitMap.read(write_bitmap(tmp_path))
    menu = Menu.parse("0,2,16")
    choice = np.random.default_rng(0).integers(0, 3, 16)
    written = dataclasses.replace(
        source, menu=menu, assignment=assignment_from(source.geometry, menu, choice)
    )
    path = tmp_path / "pruned.json"
    written.write(path)
    assert '"0": {"bits": 0' in path.read_text() or '"bits": 0' in path.read_text()
    again = BitMap.read(path)
    assert again.to_assignment(source.geometry).tolist() == choice.tolist()
    assert again.to_json() == written.to_json()
    pairs = np.repeat(choice, 2)
    both = assignment_from(source.geometry, menu, pairs)
    split = dataclasses.replace(written, serve="projection", assignment=both)
    assert split.to_assignment(source.geometry).tolist() == pairs.tolist()
    pairs[np.flatnonzero(pairs == 0)[0]] = 2
    half = assignment_from(source.geometry, menu, pairs)
    with pytest.raises(InputError, match="prunes one projection"):
        dataclasses.replace(split, assignment=half)


@pytest.mark.parametrize("name", [*RULES, "evopress", "greedy-true", "bandit", "ppo"])
def test_every_rule_takes_a_menu_with_pruned_experts(name):
    problem = whole_problem(bits="0,2,3,4,8,16", avg_bits=2.1, unhit=2)
    result = agents.make(name).search(problem, evaluations=12, seed=0)
    assert problem.feasible(result.assignment[None]).all()
    assert np.isfinite(result.scores.reward).all()


@pytest.mark.parametrize("kind", ["ExpertBits", "ExpertBitsAdjust", "ExpertBitsJoint"])
def test_environments_take_a_menu_with_pruned_experts(kind):
    env = gym.make(f"dmpq/{kind}-v0", problem=make_problem(bits="0,2,3,16", avg_bits=1.5))
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    done = False
    while not done:
        assert env.observation_space.contains(observation)
        observation, reward, ended, cut, info = env.step(env.action_space.sample())
        assert np.isfinite(reward)
        done = ended or cut
    assert info["effective_bits"] <= 1.5


def test_pruned_experts_are_not_run_where_whole_maps_are_measured(monkeypatch):
    ran = []

    def forward(kernel, x, expert, gated):
        ran.append(expert[0][0].bits)
        return x

    monkeypatch.setattr("dmpq.hw_models.whole.expert_forward", forward)
    whole = dataclasses.replace(tiny_maps(), menu=Menu.parse("0,4g32,16"))
    assert whole.measure(np.array([0, 1, 2, 2, 0, 0, 2, 2])).seconds > 0
    assert set(ran) == {4, 16}
    ran.clear()
    whole.measure(np.zeros(8, int))
    assert not ran
    assert whole.kernel_of(Format(0)) == "nothing runs"


def test_a_correction_leaves_pruned_experts_free():
    model, menu = CorrectedModel(load_hardware("a100")), Menu.parse("0,2,4")
    about, map_ = (make_spec(), menu), np.arange(16) % 3
    parts = model.parts(*about, map_, Workload())
    assert set(parts) == {"2", "4"}
    model.observe(*about, map_, Workload(), 2 * sum(parts.values()))
    assert not model.expert_latency(*about, Workload())[:, :, 0].any()
    base = model.base.cost(*about, map_[None], Workload()).latency_s
    assert model.cost(*about, map_[None], Workload()).latency_s > base


def test_a_search_below_two_bits_and_its_replay(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [flag for flag in QUICK if not flag.startswith("--bits")]
    less = ["--bits=0,2,16", "--avg-bits=2", "--agent=mckp", "--signal=gradient"]
    assert main([*flags, *less, f"--out={out}"]) == 0
    bitmap = BitMap.read(out / "bitmap.json")
    keys = [key for layer in bitmap.assignment.values() for key in layer]
    assert "0" in keys
    summary = json.loads((out / "summary.json").read_text())
    assert summary["hardware"]["kernels"]["0"] == "nothing runs"
    assert summary["rows"][-1]["effective_bits"] <= 2
    assert validate([str(out / "bitmap.json")]) == 0
    assert "gradients understate" in " ".join(capsys.readouterr().out.split())
    assert main([*flags, *less, "--serve=projection", f"--out={tmp_path / 'other'}"]) == 2
    assert "pruned (0 bits) whole" in capsys.readouterr().err
