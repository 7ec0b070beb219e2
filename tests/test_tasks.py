"""Tasks: padded examples against their unpadded twins, metrics against hand-made cases."""

import gzip
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import MixtralConfig, PreTrainedTokenizerFast

from dmpq.bank import Bank
from dmpq.data import TokenRequest
from dmpq.errors import InputError
from dmpq.families import auto_class
from dmpq.files import JsonLines
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import HEADS, LANGUAGE_MODELLING, MoEModel, load_model
from dmpq.profiling import measure_profile
from dmpq.tasks.choices import LETTERS
from dmpq.tasks.evaluator import MetricEvaluator, TaskEvaluator
from dmpq.tasks.examples import Encoder, Example, Examples, TaskBatch
from dmpq.tasks.questions import normalised, word_f1
from dmpq.tasks.splits import TASKS, encoder_of, load_task_splits
from dmpq.tasks.tables import read_tables

MENU = Menu.parse("2g16,4g16,16")
WORDS = list("abcdefghijklmnopqrstuvwxyz")
LABELS = {
    "classification": ["bad", "good"],
    "token-classification": ["O", "B-PER", "I-PER", "B-LOC"],
    "question-answering": ["none", "one"],
    "translation": ["none", "one"],
    "multiple-choice": ["none", "one"],
}


def words(rng, longest=12):
    return [WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(2, longest))]


def rows_of(task, count=24):
    rng = np.random.default_rng(1)
    rows = []
    for i in range(count):
        one = words(rng)
        if task == "classification":
            rows.append({"sentence": " ".join(one), "label": LABELS[task][i % 2]})
        elif task == "token-classification":
            tags = [LABELS[task][j] for j in rng.integers(0, 4, len(one))]
            rows.append({"tokens": one, "ner_tags": tags})
        elif task == "question-answering":
            text = " ".join(one)
            answers = {"text": [one[-1]], "answer_start": [len(text) - len(one[-1])]}
            rows.append({"question": "a b", "context": text, "answers": answers})
        elif task == "multiple-choice":
            choices = [" ".join(words(rng, 5)) for _ in range(2 + i % 3)]
            rows.append({"question": " ".join(one), "choices": choices, "answer": i % 2})
        else:
            rows.append({"source": " ".join(one), "target": " ".join(words(rng))})
    return rows


def tokenizer():
    names = ["<pad>", "<end>", "<sep>", "\n", *WORDS, *LETTERS]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A <end>",
        pair="$A <sep> $B <end>",
        special_tokens=[("<end>", 1), ("<sep>", 2)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def model_of(task):
    torch.manual_seed(0)
    labels = LABELS[task]
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    head = TASKS[task].head
    kind = auto_class(config) if head == LANGUAGE_MODELLING else HEADS[head]
    model = kind.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module", params=sorted(TASKS))
def case(request):
    task = request.param
    moe = MoEModel(model_of(task), name="tiny")
    kind = TASKS[task](encoder_of(moe, tokenizer(), longest=None))
    rows = rows_of(task)
    columns = kind.columns(list(rows[0]), text=None, label=None, where="x")
    encoded = [kind.encode({k: row[v] for k, v in columns.items()}) for row in rows]
    return Bank(moe, MENU), Examples(kind, tuple(encoded), 0)


def some_maps(bank, count=4):
    shape = (count, bank.moe.spec.num_experts)
    return np.random.default_rng(0).integers(0, len(MENU) - 1, shape)


def test_equals_every_example_alone_without_padding(case):
    """The slow twin: one example a forward, its logits compared by their definition."""
    bank, examples = case
    evaluator = TaskEvaluator(bank, examples, label="t")
    one = some_maps(bank)[0]
    kl, nll = [], []
    for example in examples.examples:
        batch = TaskBatch.of(examples.task, [example], pad=0, device=torch.device("cpu"))
        with torch.inference_mode():
            p = batch.logits(bank.moe).log_softmax(-1)
            bank.choose(np.repeat(one[None, :, None], 2, axis=2))
            with bank.attached():
                q = batch.logits(bank.moe).log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        nll += functional.nll_loss(q, batch.targets[:, 0], reduction="none").tolist()
    found = evaluator.evaluate(one[None])
    assert found.kl[0] > 0
    # fp32 sums in another order, and other numbers of rows in each product
    assert found.kl[0] == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.nll[0] == pytest.approx(np.mean(nll), rel=1e-4)


def test_several_batches_say_what_one_says(case):
    bank, examples = case
    one = some_maps(bank)[:1]
    whole = TaskEvaluator(bank, examples, label="t").evaluate(one)
    split = ModelEvaluator(bank, examples, label="t", batch_tokens=24)
    assert len(split.batches) > 3
    assert split.evaluate(one).kl[0] == pytest.approx(whole.kl[0], rel=1e-3)
    assert split.tokens == sum(len(one.ids) for one in examples.examples)


def test_resuming_and_company_change_nothing(case):
    bank, examples = case
    maps = some_maps(bank, 6)
    maps[:, : bank.layers[0].experts.num_experts] = len(MENU) - 1
    resumed = TaskEvaluator(bank, examples, label="t")
    whole = ModelEvaluator(bank, examples, label="t", prefix_memory=0)
    together = resumed.evaluate(maps).kl
    assert resumed.tokens_spent < whole.tokens * 7
    assert together.tolist() == [float(whole.evaluate(one[None]).kl[0]) for one in maps]
    held = TaskEvaluator(bank, examples, label="t")
    held.hold(maps[0])
    assert held.evaluate(maps).kl.tolist() == together.tolist()


def test_full_precision_is_exactly_no_loss(case):
    bank, examples = case
    full = np.full((1, bank.moe.spec.num_experts), len(MENU) - 1)
    evaluator = TaskEvaluator(bank, examples, label="t")
    assert evaluator.evaluate(full).kl[0] == 0
    assert evaluator.metrics(full)[0] == evaluator.full_metrics()
    assert MetricEvaluator(bank, examples, label="t").evaluate(full).kl[0] == 0


def test_padding_counts_for_nothing_in_a_profile(case):
    bank, examples = case
    few = Examples(examples.task, examples.examples[:6], 0)
    profile = measure_profile(TaskEvaluator(bank, few, label="t"), text="x")
    tokens = sum(len(one.ids) for one in few.examples)
    selected = sum(layer.num_experts for layer in bank.moe.spec.moe_layers) // 4 * 2 * tokens
    assert profile.tokens == tokens
    assert profile.hits.sum() == selected
    alone = [Examples(few.task, (one,), 0) for one in few.examples]
    hits = [measure_profile(TaskEvaluator(bank, one, label="t"), text="x").hits for one in alone]
    assert np.sum(hits, axis=0).tolist() == profile.hits.tolist()
    assert (profile.uniform_kl[:-1] > 0).all()


def test_the_drop_of_the_metric_is_the_difference_of_the_metrics(case, tmp_path):
    bank, examples = case
    maps, plain = some_maps(bank), TaskEvaluator(bank, examples, label="t")
    journal = JsonLines(tmp_path / "journal.jsonl")
    dropped = MetricEvaluator(bank, examples, label="t", journal=journal)
    name = examples.task.metric
    full, own = plain.full_metrics()[name], [m[name] for m in plain.metrics(maps)]
    drops = dropped.evaluate(maps)
    assert drops.kl.tolist() == pytest.approx([(full - one) / 100 for one in own], abs=1e-12)
    assert drops.nll.tolist() == plain.evaluate(maps).nll.tolist()
    again = MetricEvaluator(bank, examples, label="t", journal=journal)
    again._measure = None  # all answers are in the journal
    assert again.evaluate(maps).kl.tolist() == drops.kl.tolist()
    journal.close()


def test_a_profile_in_the_metric_s_unit_keeps_its_order(case):
    bank, examples = case
    profile = measure_profile(TaskEvaluator(bank, examples, label="t"), text="x")
    evaluator = MetricEvaluator(bank, examples, label="t")
    uniform = np.zeros((1, bank.moe.spec.num_experts), int)
    drop = evaluator.evaluate(uniform).kl[0]
    if drop <= 0:
        with pytest.raises(InputError, match="does not fall on the search's examples"):
            evaluator.in_its_unit(profile)
        return
    scaled = evaluator.in_its_unit(profile)
    assert scaled.uniform_kl[0] == drop
    ratio = drop / profile.uniform_kl[0]
    assert scaled.sensitivity == pytest.approx(profile.sensitivity * ratio)


def judge(task, answers, targets, reference=None):
    kind = TASKS[task](Encoder(None, {}, 2, 9))
    made = [
        Example((0,), (0,), target if isinstance(target, tuple) else (target,), reference)
        for target in targets
    ]
    return kind.judge(answers, made)


def test_accuracy_and_f1_of_two_classes_and_of_more():
    two = judge("classification", [1, 1, 0, 0], [1, 0, 1, 0], reference=2)
    assert two == {"accuracy": 50.0, "f1": 50.0}
    assert judge("classification", [0, 0], [0, 0], reference=2) == {"accuracy": 100.0, "f1": 0.0}
    three = judge("classification", [0, 1, 1, 2], [0, 1, 2, 2], reference=3)
    # F1 of the classes: 1, 2/3, 2/3
    assert three["f1"] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)


def test_an_entity_is_right_only_whole():
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    right = [(1, 2, 0, 3)]  # a person of two words, then a place
    found = judge("token-classification", [[1, 0, 0, 3]], right, reference=names)
    assert found == {"precision": 50.0, "recall": 50.0, "f1": 50.0}
    none = judge("token-classification", [[0, 0, 0, 0]], right, reference=names)
    assert none == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_squad_s_normalisation_and_f1():
    assert normalised("The  Eiffel-Tower, in a PARIS.") == "eiffeltower in paris"
    assert word_f1("the cat sat", "a cat stood") == pytest.approx(2 * 1 / 4)
    assert word_f1("dog", "cat") == 0
    reference = {"context": "", "spans": [], "answers": ["Denver Broncos", "The Broncos"]}
    found = judge("question-answering", ["broncos"], [(0, 0)], reference=reference)
    assert found == {"exact_match": 100.0, "f1": 100.0}
    part = judge("question-answering", ["Denver team"], [(0, 0)], reference=reference)
    assert part == {"exact_match": 0.0, "f1": 50.0}


def test_a_span_lies_in_the_context_and_ends_after_it_begins():
    row = {"question": "a b", "context": "c d e f", "answers": {"text": ["e"]}}
    row["answers"]["answer_start"] = [4]
    kind = TASKS["question-answering"](Encoder(tokenizer(), {}, 2, 64))
    example = kind.encode(row)
    assert example.at == (3, 4, 5, 6)
    assert example.targets == (5, 5)
    batch = TaskBatch.of(kind, [example], pad=0, device=torch.device("cpu"))
    start, end = torch.zeros(2, 8)
    start[[5, 1]], end[[4, 6, 0]] = torch.tensor([9.0, 99]), torch.tensor([8.0, 7, 99])
    output = type("Output", (), {"start_logits": start[None], "end_logits": end[None]})()
    assert kind.answers(None, batch, kind.rows(output, batch)) == ["e f"]


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["x y", "z"], 1),
        (["x y", "z"], "B"),
        (["x y", "z"], "z"),
        ({"text": ["x y", "z"], "label": ["1", "2"]}, "2"),
    ],
)
def test_a_choice_is_told_by_number_letter_text_or_the_data_s_own_name(choices, answer):
    moe = MoEModel(model_of("multiple-choice"), name="tiny")
    kind = TASKS["multiple-choice"](encoder_of(moe, tokenizer(), longest=None))
    found = kind.encode({"question": "a b", "choices": choices, "answer": answer})
    prompt = "a b\nA. x y\nB. z\nAnswer:"
    assert list(found.ids) == tokenizer()(prompt, add_special_tokens=False).input_ids
    assert (found.at, found.targets) == ((len(found.ids) - 1,), (1,))


def test_the_letters_answer_and_no_other_token_nor_letter_without_a_choice():
    moe = MoEModel(model_of("multiple-choice"), name="tiny")
    kind = TASKS["multiple-choice"](encoder_of(moe, tokenizer(), longest=None))
    rows = [
        {"question": "a b", "choices": list("xyz"), "answer": 0},
        {"question": "c", "choices": list("yz"), "answer": 1},
    ]
    batch = TaskBatch.of(kind, [kind.encode(row) for row in rows], pad=0, device="cpu")
    with torch.no_grad():
        found = batch.logits(moe)
        for one, row, count in zip(batch.examples, found, (3, 2), strict=True):
            whole = moe.model(input_ids=torch.tensor([one.ids])).logits[0, -1]
            letters = tokenizer().convert_tokens_to_ids(list(LETTERS[:count]))
            assert torch.allclose(row[:count], whole[letters], atol=1e-5)
            assert (row[count:] < -1e8).all()
    answers = kind.answers(moe, batch, found)
    assert answers == [int(row.argmax()) for row in found]
    assert kind.judge([0, 0], batch.examples) == {"accuracy": 50.0}


def test_a_tokenizer_without_letters_is_refused_by_name():
    moe = MoEModel(model_of("multiple-choice"), name="tiny")
    core = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    poor = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    kind = TASKS["multiple-choice"](encoder_of(moe, poor, longest=None))
    with pytest.raises(InputError, match="no token of its own for each of the letters A to J"):
        kind.encode({"question": "a", "choices": ["a", "b"], "answer": 0})


def test_bleu_of_the_reference_is_100_and_of_other_words_near_none():
    kind = TASKS["translation"](Encoder(tokenizer(), {}, 2, 64))
    row = {"source": "a b c", "target": "d e f g h"}
    example = kind.encode(row)
    assert example.targets[-1] == 1
    assert [example.ids[at + 1] for at in example.at] == list(example.targets)
    said = list(example.targets[:-1])
    assert kind.judge([said], [example])["bleu"] == pytest.approx(100)
    assert kind.judge([[5, 5]], [example])["bleu"] < 5


@pytest.mark.parametrize("suffix", ["jsonl", "json", "tsv", "csv", "parquet", "tsv.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    import pandas as pd

    rows = [{"sentence": f"it's no. {i}", "label": str(i % 2)} for i in range(10)]
    file = tmp_path / f"data.{suffix}"
    table = pd.DataFrame(rows)
    if suffix == "jsonl":
        table.to_json(file, orient="records", lines=True)
    elif suffix == "json":
        table.to_json(file, orient="records")
    elif suffix == "parquet":
        table.to_parquet(file)
    elif suffix == "csv":
        table.to_csv(file, index=False)
    else:
        text = "sentence\tlabel\n" + "".join(f"{r['sentence']}\t{r['label']}\n" for r in rows)
        data = text.encode()
        file.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    tables = read_tables(str(file))
    assert [*tables.calibration, *tables.heldout] == rows
    assert len(tables.heldout) == 2


def test_a_folder_s_files_are_its_splits_and_unlabelled_tests_are_left_alone(tmp_path):
    (tmp_path / "train.tsv").write_text("good film\t1\nbad film\t0\n")
    (tmp_path / "dev.tsv").write_text('"fine\t1\nawful\t0\nso so\t1\n')
    tables = read_tables(str(tmp_path))
    assert tables.calibration[0] == {"sentence": "good film", "label": "1"}
    assert [row["sentence"] for row in tables.heldout] == ['"fine', "awful", "so so"]
    rows = [{"sentence": "x", "label": -1}] * 3
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_tables(str(tmp_path)).heldout) == 3
    assert "validation" in read_tables(str(tmp_path)).source


def test_conll_and_squad_files(tmp_path):
    conll = tmp_path / "a.conll"
    conll.write_text("-DOCSTART- O\n\nJo B-PER\nran\tO\n\nHi O\n")
    first, second = [*read_tables(str(conll)).calibration, *read_tables(str(conll)).heldout]
    assert first == {"tokens": ["Jo", "ran"], "ner_tags": ["B-PER", "O"]}
    assert second["tokens"] == ["Hi"]
    asked = {"question": "Who?", "answers": [{"text": "Jo", "answer_start": 0}], "id": "1"}
    squad = {"data": [{"paragraphs": [{"context": "Jo ran.", "qas": [asked] * 5}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(squad))
    tables = read_tables(str(tmp_path / "dev.json"))
    assert len(tables.calibration) == 4
    assert tables.columns == ["question", "context", "answers"]


def test_a_hub_s_classes_are_matched_by_name(monkeypatch):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    rows = {"sentence": ["a b", "c d", "e f"], "label": [0, 1, 0]}
    splits = DatasetDict(
        train=Dataset.from_dict(rows, features), validation=Dataset.from_dict(rows, features)
    )
    monkeypatch.setattr("datasets.load_dataset", lambda *_: splits)
    moe = MoEModel(model_of("classification"), name="tiny")
    found = load_task_splits(
        "classification", "glue:x", moe, tokenizer(), tokens=TokenRequest(3, 3, 3, 9), seed=0
    )
    assert [one.targets for one in found.heldout.examples] == [(1,), (0,), (1,)]
    assert "glue:x (validation held out)" in found.source


def written(folder, task):
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, 60)))
    return str(file)


def split_of(task, file, request=(60, 120, 60, 1000), **options):
    moe = MoEModel(model_of(task), name="tiny")
    tokens = TokenRequest(*request)
    return load_task_splits(task, file, moe, tokenizer(), tokens=tokens, seed=0, **options)


def test_roles_share_no_example_and_a_saved_draw_is_left_alone(tmp_path):
    file = written(tmp_path, "classification")
    found = split_of("classification", file)
    roles = (found.profile, found.search, found.selection, found.heldout)
    texts = [{one.ids for one in role.examples} for role in roles]
    assert sum(map(len, texts)) == len(set().union(*texts))
    assert found.profile.tokens >= 60
    assert len(found.heldout) == 12
    later = split_of("classification", file, request=(0, 120, 60, 1000), taken=found.drawn)
    seen = {one.ids for one in (*later.search.examples, *later.selection.examples)}
    assert not seen & texts[0]


def test_where_data_is_short_each_role_gets_its_share(tmp_path):
    found = split_of("classification", written(tmp_path, "classification"), (1e5, 2e5, 1e5, 9))
    counts = [len(role) for role in (found.profile, found.search, found.selection)]
    assert sum(counts) == 48
    assert counts[1] == pytest.approx(24, abs=4)


@pytest.mark.parametrize(
    ("task", "rows", "options", "said"),
    [
        (
            "classification",
            [{"sentence": "a", "label": "ugly"}] * 9,
            {},
            "The data has the label 'ugly', and the model's head has 2 classes: bad, good",
        ),
        (
            "classification",
            [{"sentence": "a", "label": 2}] * 9,
            {},
            "The data has the label '2'",
        ),
        ("classification", [{"line": "a", "label": 1}] * 9, {}, "has no column of text"),
        (
            "classification",
            [{"sentence": "a", "label": 1}] * 9,
            {"text_column": "sentense"},
            "has no column 'sentense' (did you mean 'sentence'?)",
        ),
        (
            "classification",
            [{"sentence": "a " * 80, "label": 1}] * 9,
            {},
            "has 81 tokens, and the model reads 64",
        ),
        (
            "classification",
            [{"sentence": "a b c d", "label": 1}] * 9,
            {"length": 3},
            "has 5 tokens, and the model reads 3",
        ),
        (
            "token-classification",
            [{"tokens": ["a"], "ner_tags": ["O", "O"]}] * 9,
            {},
            "are no lists of one length",
        ),
        (
            "question-answering",
            [{"question": "a", "context": "b", "answers": {"text": [], "answer_start": []}}] * 9,
            {},
            "has no answers with text and answer_start",
        ),
        (
            "question-answering",
            [{"question": "a", "context": "b", "answers": [{"text": "c", "answer_start": 0}]}] * 9,
            {},
            "does not stand at character 0",
        ),
        ("translation", [{"en": "a", "de": "b"}] * 9, {}, "has no column of source text"),
        (
            "translation",
            [{"source": "a", "target": ["b"]}] * 9,
            {},
            "holds \"['b']\" where a text should be",
        ),
        (
            "classification",
            [{"sentence": None, "label": 1}] * 9,
            {},
            "holds 'None' where a text should be",
        ),
        (
            "classification",
            [{"sentence": "a", "label": "9" * 5000}] * 9,
            {},
            "The data has the label '999",
        ),
        (
            "token-classification",
            [{"tokens": [""], "ner_tags": ["O"]}] * 9,
            {},
            "No word of the sentence '' has a token",
        ),
        (
            "multiple-choice",
            [{"question": "a", "choices": "b", "answer": 0}] * 9,
            {},
            "has the choices b; give a list of texts",
        ),
        (
            "multiple-choice",
            [{"question": "a", "choices": ["b"], "answer": 0}] * 9,
            {},
            "has 1 choices; give 2 to 10",
        ),
        (
            "multiple-choice",
            [{"question": "a", "choices": ["b", "c"], "answer": "C"}] * 9,
            {},
            "The answer 'C' to 'a' is none of its choices (A, B)",
        ),
        (
            "question-answering",
            [{"question": 5, "context": "b", "answers": [{"text": "b", "answer_start": 0}]}] * 9,
            {},
            "holds '5' where a text should be",
        ),
    ],
)
def test_bad_data_is_refused_in_one_sentence(tmp_path, task, rows, options, said):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as caught:
        split_of(task, str(file), **options)
    assert said in str(caught.value)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "sentence\tlabel\nx\n", "row 2 has 1 columns"),
        ("a.jsonl", "{\n", "cannot be read as .jsonl"),
        ("a.jsonl", "[1]\n", "it holds no list of objects"),
        ("a.conll", "word\n", "has a line without a tag"),
        ("a.tsv.gz", "no gzip", "cannot be read as .tsv"),
        ("a.parquet", "no parquet", "cannot be read as .parquet"),
        ("a.jsonl", "", "holds 0 examples"),
        ("a.jsonl", '{"sentence": "\\ud800", "label": 0}\n' * 9, "cannot be read as .jsonl"),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "cannot be read as .json"),
        ("a.json", '{"data": [{"paragraphs": 5}]}', "cannot be read as .json"),
        ("a.json", '{"data": [5]}', "cannot be read as .json"),
        ("a.bin", "x", "is no table that can be read"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        read_tables(str(tmp_path / name))


def test_a_family_without_the_head_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="of family 'olmoe', of which this version of tran"):
        load_model("reference", head="sequence classification")
    model_of("translation").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks 1 of its weights, among them score\.weight"):
        load_model(str(tmp_path), head="sequence classification")
