"""Translation by encoder-decoders: what each side reads, and the evaluator against slow twins."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import tiny_config
from test_tasks import rows_of, tokenizer
from test_tasks_search import command
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, NllbTokenizer

from dmpq.bank import Bank
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import MoEModel, load_model
from dmpq.profiling import measure_profile
from dmpq.search import main as search
from dmpq.tasks.evaluator import MetricEvaluator, TaskEvaluator
from dmpq.tasks.examples import Encoder, Examples, TaskBatch
from dmpq.tasks.splits import TASKS, encoder_of
from dmpq.validate import main as validate

MENU = Menu.parse("2g16,4g16,16")
FULL = len(MENU) - 1
START = {"switch_transformers": 0, "nllb-moe": 1}
"""Tokens by which decoders start: padding's, and end-of-text's."""


def raw_model(family):
    torch.manual_seed(0)
    config = tiny_config(family)
    config.pad_token_id, config.eos_token_id, config.vocab_size = 0, 1, len(tokenizer())
    config.decoder_start_token_id = START[family]
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def examples_of(moe, count=24, **options):
    kind = TASKS["translation"](replace(encoder_of(moe, tokenizer(), longest=None), **options))
    return Examples(kind, tuple(kind.encode(row) for row in rows_of("translation", count)), 0)


@pytest.fixture(scope="module", params=sorted(START))
def case(request):
    moe = MoEModel(raw_model(request.param), name="tiny")
    return request.param, Bank(moe, MENU), examples_of(moe)


def some_maps(bank, count=4):
    shape = (count, bank.moe.spec.num_experts)
    return np.random.default_rng(0).integers(0, FULL, shape)


def replaced(bank, one):
    """Return a copy of the model with a map's weights in place of its own."""
    copied = MoEModel(copy.deepcopy(bank.moe.model), name="copy")
    chosen = iter(one.tolist())
    with torch.no_grad():
        for experts, layer in zip(copied.containers, bank.layers, strict=True):
            for expert in range(experts.num_experts):
                up, down = layer.variant(expert, next(chosen))
                experts.gate_up[expert].copy_(up)
                experts.down[expert].copy_(down)
    return copied


def teacher_forced(model, example, start):
    """Return the logits of one example, unpadded, by the model's own shift of its labels."""
    labels = torch.tensor([example.targets])
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([example.ids]), labels=labels, use_cache=False)
    assert example.decoder[0] == start
    return output


def test_the_decoder_reads_what_the_model_s_own_shift_gives(case):
    family, bank, examples = case
    for example in examples.examples[:6]:
        output = teacher_forced(bank.moe.model, example, START[family])
        batch = TaskBatch.of(examples.task, [example], pad=0, device=torch.device("cpu"))
        with torch.inference_mode():
            logits = batch.logits(bank.moe)
        assert torch.equal(logits, output.logits[0])
        # its loss is the mean over the labels; fused and plain sums differ in the last digit
        loss = batch.loss(logits, reduction="mean")
        assert float(loss) == pytest.approx(float(output.loss), rel=1e-6)


def test_equals_a_copy_with_the_weights_replaced(case):
    _, bank, examples = case
    evaluator, one = TaskEvaluator(bank, examples, label="t"), some_maps(bank)[0]
    copied, kl, nll, rows = replaced(bank, one), 0.0, 0.0, 0
    bank.choose(np.repeat(one[None, :, None], 2, axis=2))
    for batch in evaluator.task_batches:
        with torch.inference_mode():
            with bank.attached():
                logits = batch.logits(bank.moe)
            own = batch.logits(copied)
            p = batch.logits(bank.moe).log_softmax(-1)
        assert torch.equal(logits, own)
        q = own.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum())
        nll += float(functional.nll_loss(q, batch.targets[:, 0], reduction="sum"))
        rows += batch.rows
    found = evaluator.evaluate(one[None])
    assert rows == sum(len(example.targets) for example in examples.examples)
    assert found.kl[0] > 0
    assert found.kl[0] == pytest.approx(kl / rows, rel=1e-5)  # sums of fp32 in another order
    assert found.nll[0] == pytest.approx(nll / rows, rel=1e-5)


def test_equals_every_example_alone_without_padding(case):
    family, bank, examples = case
    one = some_maps(bank)[0]
    copied, kl = replaced(bank, one), []
    for example in examples.examples:
        p, q = (
            teacher_forced(model, example, START[family]).logits[0].log_softmax(-1)
            for model in (bank.moe.model, copied.model)
        )
        kl += (p.exp() * (p - q)).sum(-1).tolist()
    found = TaskEvaluator(bank, examples, label="t").evaluate(one[None])
    # fp32 sums in another order, and other numbers of rows in each product
    assert found.kl[0] == pytest.approx(np.mean(kl), rel=1e-3)


def test_switch_s_own_experts_say_the_same():
    """Without any adapter: transformers' module of experts, whose weights are replaced."""
    bank = Bank(MoEModel(raw_model("switch_transformers"), name="tiny"), MENU)
    examples, one = examples_of(bank.moe), some_maps(bank)[0]
    plain = raw_model("switch_transformers")
    chosen = iter(one.tolist())
    for layer in bank.layers:
        for expert in range(layer.experts.num_experts):
            own = plain.get_submodule(f"{layer.experts.path}.expert_{expert}")
            up, down = layer.variant(expert, next(chosen))
            own.wi.weight.data, own.wo.weight.data = up.clone(), down.clone()
    kl = []
    for example in examples.examples:
        p, q = (
            teacher_forced(model, example, 0).logits[0].log_softmax(-1)
            for model in (raw_model("switch_transformers"), plain)
        )
        kl += (p.exp() * (p - q)).sum(-1).tolist()
    found = TaskEvaluator(bank, examples, label="t").evaluate(one[None])
    assert found.kl[0] == pytest.approx(np.mean(kl), rel=1e-3)


def test_resuming_screening_and_other_batches_change_nothing(case):
    _, bank, examples = case
    maps = some_maps(bank, 6)
    maps[:, : bank.layers[0].experts.num_experts] = FULL
    resumed = TaskEvaluator(bank, examples, label="t")
    whole = ModelEvaluator(bank, examples, label="t", prefix_memory=0)
    together = resumed.evaluate(maps)
    assert resumed.tokens == sum(len(e.ids) + len(e.decoder) for e in examples.examples)
    assert resumed.tokens_spent < whole.tokens * 7
    alone = [whole.evaluate(one[None]) for one in maps]
    assert together.kl.tolist() == [float(one.kl[0]) for one in alone]
    assert together.router_shift.tolist() == [float(one.router_shift[0]) for one in alone]
    split = ModelEvaluator(bank, examples, label="t", batch_tokens=48).evaluate(maps)
    assert split.kl == pytest.approx(together.kl, rel=1e-3)
    assert split.router_shift == pytest.approx(together.router_shift, abs=1e-3)
    screened = resumed.screen(maps[:2])
    assert screened.kl == pytest.approx(together.kl[:2], rel=1e-3)


def test_full_precision_is_exactly_no_loss(case):
    _, bank, examples = case
    full = np.full((1, bank.moe.spec.num_experts), FULL)
    evaluator = TaskEvaluator(bank, examples, label="t")
    assert evaluator.evaluate(full).kl[0] == 0
    assert evaluator.metrics(full)[0] == evaluator.full_metrics()
    assert MetricEvaluator(bank, examples, label="t").evaluate(full).kl[0] == 0


def test_each_side_s_experts_are_profiled_on_that_side_s_tokens(case):
    family, bank, examples = case
    few = Examples(examples.task, examples.examples[:6], 0)
    found = {}
    for signal in ("sensitivity", "gradient"):
        evaluator = TaskEvaluator(bank, few, label="t")
        profile = found[signal] = measure_profile(evaluator, text="x", signal=signal)
        assert profile.tokens == few.tokens
        assert (profile.uniform_kl[:-1] > 0).all()
    hits, start = found["sensitivity"].hits, 0
    for layer in bank.layers:
        side = [e.decoder if "decoder" in layer.experts.path else e.ids for e in few.examples]
        seen = sum(hits[start : start + layer.experts.num_experts])
        start += layer.experts.num_experts
        if family == "nllb-moe":
            assert seen == 2 * sum(map(len, side))
        else:  # an expert has room for three tokens of a sequence; what is beyond runs nowhere
            assert sum(min(3, len(one)) for one in side) <= seen <= sum(map(len, side))
    # the gradient's estimate is of the same order of magnitude
    measured, estimated = (found[s].uniform_kl[0] for s in ("sensitivity", "gradient"))
    assert 0.02 < estimated / measured < 50


def test_translations_are_what_a_loop_without_a_cache_says(case):
    family, bank, examples = case
    evaluator = TaskEvaluator(bank, examples, label="t")
    for batch in evaluator.task_batches:
        with torch.inference_mode():
            answers = examples.task.answers(bank.moe, batch, batch.logits(bank.moe))
        longest = round(1.5 * max(len(example.targets) for example in batch.examples))
        for example, answer in zip(batch.examples, answers, strict=True):
            said = [START[family]]
            while len(said) <= longest and (said[-1] != 1 or len(said) == 1):
                read = {"input_ids": [example.ids], "decoder_input_ids": [said]}
                inputs = {name: torch.tensor(ids) for name, ids in read.items()}
                with torch.inference_mode():
                    logits = bank.moe.model(**inputs, use_cache=False).logits[0, -1]
                said.append(int(logits.argmax()))
            expected = said[1:-1] if said[-1] == 1 else said[1:]
            # A Switch decoder that reads one token at a time never runs out of an expert's room.
            same = 3 if family == "switch_transformers" else None
            assert answer[:same] == expected[:same]


def test_a_forced_token_begins_the_text_and_is_not_compared(case):
    family, bank, _ = case
    examples = examples_of(bank.moe, 6, forced=(7,))
    for example in examples.examples:
        assert example.decoder[:2] == (START[family], 7)
        assert example.decoder[2:] == example.targets[:-1]
        assert example.at == tuple(range(1, len(example.decoder)))
    evaluator = TaskEvaluator(bank, examples, label="t")
    (batch,) = evaluator.task_batches
    with torch.inference_mode():
        answers = examples.task.answers(bank.moe, batch, batch.logits(bank.moe))
    example, answer = batch.examples[0], answers[0]
    read = {"input_ids": [example.ids], "decoder_input_ids": [[START[family], 7, *answer]]}
    with torch.inference_mode():
        said = bank.moe.model(**{n: torch.tensor(ids) for n, ids in read.items()}).logits[0]
    assert said[1:3].argmax(-1).tolist() == answer[:2]


def nllb_tokenizer(**options):
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁b"]
    return NllbTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], **options)


def test_nllb_s_tokenizer_tells_the_language():
    moe = MoEModel(raw_model("nllb-moe"), name="tiny")
    spoken = nllb_tokenizer(src_lang="deu_Latn", tgt_lang="eng_Latn")
    encoder = encoder_of(moe, spoken, longest=None)
    assert encoder.forced == (spoken.convert_tokens_to_ids("eng_Latn"),)
    example = TASKS["translation"](encoder).encode({"source": "a b", "target": "b"})
    german = spoken.convert_tokens_to_ids("deu_Latn")
    assert german in example.ids
    assert spoken.eos_token_id == example.ids[-1]
    assert example.decoder[:2] == (1, *encoder.forced)
    assert example.targets[-1] == spoken.eos_token_id
    assert german not in example.decoder
    with pytest.raises(InputError, match=r"does not say which.*set src_lang and tgt_lang"):
        encoder_of(moe, nllb_tokenizer(), longest=None)
    moe.model.generation_config.forced_bos_token_id = 5
    assert encoder_of(moe, nllb_tokenizer(), longest=None).forced == (5,)


def test_a_text_that_is_too_long_for_either_side_is_refused():
    kind = TASKS["translation"](Encoder(tokenizer(), {}, 2, 4, start=0))
    assert len(kind.encode({"source": "a b c", "target": "d e f"}).decoder) == 4
    for row in ({"source": "a b c d", "target": "e"}, {"source": "a", "target": "b c d e"}):
        with pytest.raises(InputError, match=r"has 5 tokens, and the model reads 4"):
            kind.encode(row)


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """Return a checkpoint, and data whose targets are its own words, so that other maps lose."""
    family, _, _ = case
    out = tmp_path_factory.mktemp(family)
    model = raw_model(family)
    model.save_pretrained(out / "model")
    tokenizer().save_pretrained(out / "model")
    moe, spoken = load_model(str(out / "model"))
    kind = TASKS["translation"](encoder_of(moe, spoken, longest=None))
    rows = rows_of("translation", 60)
    for row in rows:
        batch = TaskBatch.of(kind, [kind.encode(row)], pad=0, device=torch.device("cpu"))
        with torch.inference_mode():
            (said,) = kind.answers(moe, batch, torch.zeros(0))
        row["target"] = spoken.decode(said, skip_special_tokens=True) or "a"
    (out / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.mark.parametrize("signal", ["gradient", "task"])
def test_a_search_and_its_validation(folder, signal, capsys):
    assert search(command("translation", folder, signal, f"--signal={signal}")) == 0
    shown = capsys.readouterr().out
    assert "BLEU" in shown
    facts = json.loads((folder / signal / "summary.json").read_text())
    assert facts["rows"][0]["heldout_kl"] == 0
    assert facts["rows"][0]["metrics"]["bleu"] > 20  # texts begin as the targets, its own words
    assert validate([str(folder / signal / "bitmap.json")]) == 0
    capsys.readouterr()
