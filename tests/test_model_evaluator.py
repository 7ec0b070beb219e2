"""The evaluator against its slow, obvious twin: weights replaced in a copy of the model."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from torch.nn import functional

from dmpq import model_evaluator
from dmpq.bank import Bank
from dmpq.errors import InputError
from dmpq.evaluation import FAILURE_NATS
from dmpq.files import JsonLines
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.profiling import measure_profile

MENU = Menu.parse("2g16,3g16,4g16,16")
FULL = len(MENU) - 1


@pytest.fixture
def evaluator(tiny, token_ids):
    return ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="test", batch_tokens=64)


def random_maps(evaluator, k, seed=0, projections=False):
    experts = evaluator.bank.moe.spec.num_experts * (2 if projections else 1)
    return np.random.default_rng(seed).integers(0, len(MENU), (k, experts))


def by_hand(moe, bank, both, ids):
    """Write the chosen weights into a copy of the model and compare logits, one batch at once."""
    model = copy.deepcopy(moe.model)
    model.set_experts_implementation("grouped_mm")
    start = 0
    for container, layer in zip(moe.containers, bank.layers, strict=True):
        target = model.get_submodule(container.path)
        up_name = "gate_up_proj" if container.module.has_gate else "up_proj"
        for expert in range(container.num_experts):
            for side, name in enumerate((up_name, "down_proj")):
                weight = layer.variant(expert, int(both[start + expert, side]))[side]
                data = getattr(target, name).data
                data[expert] = weight.mT if container.module.is_transposed else weight
        start += container.num_experts
    with torch.inference_mode():
        p = functional.log_softmax(moe.logits(ids), -1)
        q = functional.log_softmax(model(input_ids=ids, use_cache=False).logits, -1)
        nll = functional.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return float((p.exp() * (p - q)).sum(-1).mean()), float(nll)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("bank_memory", [0, 1e9])
def test_equals_replacing_the_weights_by_hand(tiny, token_ids, family, projections, bank_memory):
    moe = tiny(family)
    bank = Bank(moe, MENU, memory_bytes=bank_memory)
    assert bank.dense == (bank_memory > 0)
    evaluator = ModelEvaluator(bank, token_ids.numpy(), label="t", batch_tokens=10_000)
    both = random_maps(evaluator, 1, projections=projections)[0]
    got = evaluator.evaluate(both[None])
    pairs = both.reshape(-1, 2) if projections else both[:, None].repeat(2, 1)
    kl, nll = by_hand(moe, bank, pairs, token_ids)
    # fp32 sums in another order
    assert got.kl[0] == pytest.approx(kl, rel=1e-4)
    assert got.nll[0] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_precision_is_the_model_itself_to_the_bit(tiny, token_ids, family):
    moe = tiny(family)
    bank = Bank(moe, MENU)
    bank.choose(np.full((1, moe.spec.num_experts, 2), FULL))
    with torch.inference_mode():
        own = moe.logits(token_ids)
        with bank.attached():
            assert torch.equal(moe.logits(token_ids), own)


def test_experts_left_at_16_give_the_same_bits_in_a_mixed_map(tiny, token_ids):
    moe = tiny()
    layer = Bank(moe, MENU).layers[0]
    choice = np.full((1, 8, 2), FULL)
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    index = torch.randint(0, 8, (64, 1), generator=torch.Generator().manual_seed(1))
    weights = torch.ones(64, 1)
    layer.choose(choice)
    plain = layer(layer.experts.module, hidden, index, weights)
    choice[0, ::2] = 0
    layer.choose(choice)
    mixed = layer(layer.experts.module, hidden, index, weights)
    kept = (index % 2 == 1).flatten()
    assert torch.equal(plain[kept], mixed[kept])
    assert not torch.equal(plain[~kept], mixed[~kept])


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_equals_running_whole_to_the_bit(tiny, token_ids, family):
    bank = Bank(tiny(family), MENU)
    resumed = ModelEvaluator(bank, token_ids.numpy(), label="a", batch_tokens=64)
    assert resumed._replayer.exact
    whole = ModelEvaluator(bank, token_ids.numpy(), label="b", batch_tokens=64, prefix_memory=0)
    maps = random_maps(resumed, 3)
    maps[0, : maps.shape[1] // 2] = FULL
    one, other = resumed.evaluate(maps), whole.evaluate(maps)
    assert one.kl.tolist() == other.kl.tolist()
    assert one.nll.tolist() == other.nll.tolist()
    assert one.router_shift.tolist() == other.router_shift.tolist()
    assert one.tokens < other.tokens


def neighbours(incumbent):
    """Return the incumbent itself, maps that leave it ever later, and one unlike it."""
    maps = [incumbent.copy() for _ in range(5)]
    for changed, start in zip(
        maps[1:], range(0, len(incumbent), len(incumbent) // 4), strict=True
    ):
        changed[start] = (changed[start] + 1) % len(MENU)
    return np.array([*maps, np.flip(incumbent)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projections", [False, True])
def test_resuming_from_a_held_map_equals_running_whole_to_the_bit(
    tiny, token_ids, family, projections
):
    bank = Bank(tiny(family), MENU)
    held = ModelEvaluator(bank, token_ids.numpy(), label="a", batch_tokens=64)
    whole = ModelEvaluator(bank, token_ids.numpy(), label="b", batch_tokens=64, prefix_memory=0)
    incumbent = random_maps(held, 1, projections=projections)[0]
    maps = neighbours(incumbent)
    for seed in range(2):
        held.hold(incumbent)
        one, other = held.evaluate(maps), whole.evaluate(maps)
        assert one.kl.tolist() == other.kl.tolist()
        assert one.nll.tolist() == other.nll.tolist()
        assert one.router_shift.tolist() == other.router_shift.tolist()
        incumbent = random_maps(held, 1, seed + 1, projections=projections)[0]
        maps = neighbours(incumbent)


def test_holding_a_map_makes_its_neighbours_cheaper(evaluator, tiny, token_ids):
    plain = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="x", batch_tokens=64)
    incumbent = random_maps(evaluator, 1)[0]
    incumbent[0] = 0
    last = np.array([incumbent] * 20)
    last[:, -2:] = np.random.default_rng(1).integers(0, len(MENU), (20, 2))
    for one in (evaluator, plain):
        one.full_nll()
    evaluator.hold(incumbent)
    assert evaluator.tokens_spent > plain.tokens_spent
    assert (
        evaluator.evaluate(last, fidelity=0.5).tokens < plain.evaluate(last, fidelity=0.5).tokens
    )
    evaluator.evaluate(last)
    plain.evaluate(last)
    assert evaluator.tokens_spent < plain.tokens_spent


def test_holding_runs_nothing_until_it_is_needed_and_costs_nothing_twice(evaluator, monkeypatch):
    evaluator.full_nll()
    incumbent = random_maps(evaluator, 1)[0]
    monkeypatch.setattr(evaluator.bank.moe, "logits", None)
    evaluator.hold(incumbent)
    spent = evaluator.tokens_spent
    evaluator.hold(incumbent)
    assert evaluator.tokens_spent == spent
    evaluator.hold(np.full(len(incumbent), FULL))
    assert evaluator.tokens_spent == spent


def test_a_held_map_is_not_changed_from_outside(evaluator, tiny, token_ids):
    plain = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="x", batch_tokens=64)
    incumbent = random_maps(evaluator, 1, projections=True)[0]
    other = (incumbent + 1) % len(MENU)
    evaluator.hold(incumbent)
    incumbent[:] = other
    assert evaluator.evaluate(other[None]).kl[0] == plain.evaluate(other[None]).kl[0]


def test_nothing_is_held_beyond_the_memory_for_recordings(tiny, token_ids):
    bank = Bank(tiny(), MENU)
    free = ModelEvaluator(bank, token_ids.numpy(), label="t", batch_tokens=64)
    one = len(free._batches) * free._batches[0].prefix.recording.memory_bytes
    incumbent = random_maps(free, 1)[0]
    incumbent[0] = 0
    for memory, holds in ((2 * one, True), (2 * one - 1, False)):
        evaluator = ModelEvaluator(
            bank, token_ids.numpy(), label="t", batch_tokens=64, prefix_memory=memory
        )
        evaluator.full_nll()
        before = evaluator.tokens_spent
        evaluator.hold(incumbent)
        assert (evaluator.tokens_spent > before) == holds


def test_a_journal_does_not_change_what_is_counted(tiny, token_ids, tmp_path):
    spent = []
    for known in (0, 3, 100):  # nothing, a run cut off after three answers, a whole run
        path = tmp_path / f"{known}.jsonl"
        lines = (tmp_path / "0.jsonl").read_text().splitlines(keepends=True) if known else []
        path.write_text("".join(lines[:known]))
        journal = JsonLines(path)
        evaluator = ModelEvaluator(
            Bank(tiny(), MENU), token_ids.numpy(), label="t", journal=journal, batch_tokens=64
        )
        counted = []
        for seed in range(2):
            incumbent = random_maps(evaluator, 1, seed)[0]
            evaluator.hold(incumbent)
            for one in neighbours(incumbent):
                counted.append((evaluator.evaluate(one[None]).kl[0], evaluator.tokens_spent))
        journal.close()
        spent.append(counted)
    assert spent[0] == spent[1] == spent[2]


def test_values_do_not_depend_on_the_chunks_that_logits_are_compared_in(
    evaluator, tiny, token_ids, monkeypatch
):
    maps = random_maps(evaluator, 2)
    whole = evaluator.evaluate(maps)
    vocabulary = evaluator.bank.moe.spec.vocab_size
    monkeypatch.setitem(model_evaluator._CHUNK_ELEMENTS, "cpu", 7 * vocabulary)
    fresh = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="x", batch_tokens=64)
    chunked = fresh.evaluate(maps)
    assert chunked.kl == pytest.approx(whole.kl, rel=1e-12)  # fp64 sums of the same terms
    assert chunked.nll.tolist() == whole.nll.tolist()


def test_an_expert_that_no_token_selects_loses_exactly_nothing(tiny, token_ids):
    evaluator = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy()[:1, :2], label="short")
    hit = torch.cat([m.any(0) for b in evaluator._batches for m in b.members])
    changed = np.full((1, len(hit)), FULL)
    changed[0, np.flatnonzero(~hit.numpy())] = 0
    answer = evaluator.evaluate(changed)
    assert (answer.kl[0], answer.router_shift[0]) == (0.0, 0.0)
    assert answer.nll[0] == evaluator.full_nll()


def test_a_map_is_worth_the_same_alone_and_in_company(evaluator, tiny, token_ids):
    maps = random_maps(evaluator, 4)
    together = evaluator.evaluate(maps)
    fresh = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy(), label="x", batch_tokens=64)
    assert fresh.evaluate(maps[2:3]).kl[0] == together.kl[2]


def test_screening_agrees_with_exact_values_closely(evaluator):
    maps = random_maps(evaluator, 3)
    assert evaluator.screen(maps).kl == pytest.approx(evaluator.evaluate(maps).kl, rel=1e-3)


def test_full_precision_costs_nothing_and_loses_nothing(evaluator):
    full = np.full((1, evaluator.bank.moe.spec.num_experts), FULL)
    evaluator.full_nll()
    answer = evaluator.evaluate(full)
    assert (answer.kl[0], answer.router_shift[0], answer.tokens) == (0.0, 0.0, 0.0)
    assert answer.nll[0] == evaluator.full_nll()


def test_answers_are_metered_once(evaluator):
    maps = random_maps(evaluator, 2)
    first = evaluator.evaluate(maps)
    assert 0 < first.tokens <= 3 * evaluator.tokens
    assert evaluator.evaluate(maps).tokens == 0
    assert evaluator.tokens_spent == first.tokens


def test_lower_fidelity_reads_less_text(evaluator):
    evaluator.full_nll()
    maps = random_maps(evaluator, 1)
    maps[:, 0] = 0
    assert evaluator.evaluate(maps, fidelity=0.3).tokens < evaluator.evaluate(maps).tokens


def test_a_journal_answers_for_another_process(evaluator, tiny, token_ids, tmp_path):
    maps = random_maps(evaluator, 2)
    answers = []
    for _ in range(2):
        journal = JsonLines(tmp_path / "journal.jsonl")
        again = ModelEvaluator(
            Bank(tiny(), MENU), token_ids.numpy(), label="t", journal=journal, batch_tokens=64
        )
        answers.append(again.evaluate(maps))
        spent = again.tokens_spent
        journal.close()
    assert answers[0].kl.tolist() == answers[1].kl.tolist()
    assert spent == pytest.approx(answers[1].tokens)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("values", ["[1.0, 2.0]", '["x", 1, 2]', "[null, 1, 2]", "[1e400, 1, 2]"])
def test_damaged_answers_in_a_journal_are_measured_again(tiny, token_ids, tmp_path, values):
    def answer():
        journal = JsonLines(tmp_path / "journal.jsonl")
        found = ModelEvaluator(
            Bank(tiny(), MENU), token_ids.numpy(), label="t", journal=journal, batch_tokens=64
        ).evaluate(np.zeros((1, 16), int))
        journal.close()
        return found.kl[0]

    first = answer()
    line = json.loads((tmp_path / "journal.jsonl").read_text())
    text = json.dumps(line | {"values": None}).replace("null", values)
    (tmp_path / "journal.jsonl").write_text(text + "\n")
    assert answer() == first


def test_a_journal_of_other_text_is_not_believed(tiny, token_ids, tmp_path):
    journal = JsonLines(tmp_path / "journal.jsonl")
    bank = Bank(tiny(), MENU)
    values = []
    for ids in (token_ids.numpy(), token_ids.numpy()[::-1] % 7):
        evaluator = ModelEvaluator(bank, ids, label="t", journal=journal, batch_tokens=64)
        values.append(evaluator.evaluate(random_maps(evaluator, 1)).kl[0])
    journal.close()
    assert values[0] != values[1]


def test_logits_that_are_not_finite_get_the_failure_value(tiny, token_ids):
    bank = Bank(tiny(), MENU)
    up, _ = bank.layers[0]._dense
    up[0::4] = float("inf")  # every expert's 2-bit variant
    evaluator = ModelEvaluator(bank, token_ids.numpy(), label="t")
    answer = evaluator.evaluate(np.zeros((1, bank.moe.spec.num_experts), np.int64))
    assert (answer.kl[0], answer.nll[0]) == (FAILURE_NATS, FAILURE_NATS)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((1, 5), np.int64), "does not fit a model of 16 experts"),
        (np.full((1, 16), 9), "the menu has 4 formats"),
    ],
)
def test_maps_that_do_not_fit_are_refused(evaluator, maps, message):
    with pytest.raises(InputError, match=message):
        evaluator.evaluate(maps)


def test_a_profile_without_full_precision_resumes_from_its_widest_map(
    tiny, token_ids, monkeypatch
):
    bank = Bank(tiny(), Menu.parse("2g16,4g16"))
    profiles = []
    for _ in range(2):
        evaluator = ModelEvaluator(bank, token_ids.numpy(), label="t", batch_tokens=64)
        profiles.append(measure_profile(evaluator, text="random"))
        monkeypatch.setattr(ModelEvaluator, "hold", lambda *_: None)
    held, plain = profiles
    assert held.sensitivity.tolist() == plain.sensitivity.tolist()
    assert held.cost_tokens < plain.cost_tokens
