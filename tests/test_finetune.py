"""Training in mixed precision: dense models and upcycled ones, text and tasks."""

import json
from itertools import pairwise

import pytest
import torch
from trainings import dense_model, examples, interrupted_after, parameters, text_file, tiny_model
from transformers import AutoModelForCausalLM as AutoLM
from transformers import AutoModelForSequenceClassification

from dmpq.moe import MoEModel
from dmpq.train import main
from dmpq.training.amp_probe import AmpProbe, _underflow
from dmpq.training.config import FinetuneConfig
from dmpq.training.fake_quant import TrainedExperts
from dmpq.training.routing import Routers
from dmpq.training.workbench import workbench

SMALL = ["--steps", "8", "--batch-size", "4", "--save-every", "4", "--heldout-tokens", "512"]
WORDS = {"good": "positive", "fine": "positive", "bad": "negative", "poor": "negative"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model that reads bytes, and a text beside it."""
    folder = tmp_path_factory.mktemp("dense")
    dense_model(folder / "model")
    text_file(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(dense):
    """The dense model with experts, by the command."""
    out = dense / "moe"
    command = ["upcycle", "--model", str(dense / "model"), "--experts", "4", "--top-k", "2"]
    assert main([*command, "--noise", "0.1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    rows = [
        {"sentence": f"{word} {i}", "label": label}
        for i in range(20)
        for word, label in WORDS.items()
    ]
    return examples(folder, rows)


def facts(out):
    return json.loads((out / "summary.json").read_text())


def finetune(model, dataset, out, *more):
    options = ["--model", str(model), "--dataset", str(dataset), "--out", str(out)]
    return main(["finetune", *SMALL, *options, *more])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_text_is_learned_at_every_precision(kind, precision, dense, sparse, tmp_path):
    model = dense / "model" if kind == "dense" else sparse
    out = tmp_path / "out"
    assert finetune(model, dense / "text.txt", out, "--precision", precision) == 0
    found = facts(out)
    assert found["rows"]["after"]["nll"] < found["rows"]["before"]["nll"] - 0.1
    assert all(value.dtype == torch.float32 for value in parameters_of(out / "model"))
    share = found["active_parameters"] / found["parameters"]
    assert share == 1 if kind == "dense" else 0.3 < share < 0.9
    assert bool(found["loss_scales"]) == (precision == "fp16")


def parameters_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()


def test_low_precision_is_really_used(sparse, dense, tmp_path):
    """Weights after BF16 and FP16 are near those after FP32, and not the same."""
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        out = tmp_path / precision
        assert finetune(sparse, dense / "text.txt", out, "--precision", precision) == 0
        found[precision] = torch.cat([one.flatten() for one in parameters_of(out / "model")])
    start = torch.cat([one.flatten() for one in parameters_of(sparse)])
    moved = (found["fp32"] - start).norm()
    for precision in ("bf16", "fp16"):
        apart = (found[precision] - found["fp32"]).norm()
        assert 0 < apart < 0.5 * moved


def test_the_routers_stay_in_fp32(sparse, dense, tmp_path):
    bench = workbench(
        FinetuneConfig(
            model=str(sparse), dataset=str(dense / "text.txt"), batch_size=4, heldout_tokens=64
        )
    )
    seen = []
    gate = bench.moe.model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16), Routers(bench.moe.model).in_float32():
        bench.steps.batch(0).logits(bench.model)
    handle.remove()
    tensors = [one for output in seen for one in output if one.is_floating_point()]
    assert tensors
    assert all(one.dtype == torch.float32 for one in tensors)


def test_a_gradient_that_overflows_is_skipped_and_the_scale_falls(sparse, dense, tmp_path):
    """FP16 begins at a scale of 65536; a loss of that size overflows until it is halved enough."""
    out = tmp_path / "out"
    assert (
        finetune(sparse, dense / "text.txt", out, "--precision", "fp16", "--balance", "1000") == 0
    )
    found = facts(out)
    scales = [scale for _, scale in found["loss_scales"]]
    assert scales[0] == 65536
    assert found["skipped_steps"] == sum(b < a for a, b in pairwise(scales))
    assert found["skipped_steps"] > 0


def test_a_probe_compares_with_fp32(sparse, dense, tmp_path):
    out, plain = tmp_path / "out", tmp_path / "plain"
    options = ("--precision", "bf16")
    assert finetune(sparse, dense / "text.txt", out, *options, "--probe-every", "4") == 0
    assert finetune(sparse, dense / "text.txt", plain, *options) == 0
    probes = facts(out)["probes"]
    assert [one["step"] for one in probes] == [0, 4]
    for one in probes:
        assert 0 < one["router_error"] < 0.1
        assert 0 <= one["changed_selections"] < 0.2
        assert one["loss_scale"] == 1
    # Looking changes nothing.
    pairs = zip(parameters_of(out / "model"), parameters_of(plain / "model"), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_underflow_counts_what_low_precision_lost():
    exact = [torch.tensor([1.0, 2.0, 0.0, 4.0])]
    assert _underflow([torch.tensor([1.0, 0.0, 0.0, 4.0])], exact) == pytest.approx(1 / 3)
    assert _underflow(exact, exact) == 0


def test_loss_scaling_saves_gradients_from_underflow(sparse, dense):
    bench = workbench(
        FinetuneConfig(
            model=str(sparse),
            dataset=str(dense / "text.txt"),
            batch_size=4,
            heldout_tokens=64,
            precision="fp16",
        )
    )
    bench.model.model.requires_grad_(True)
    forwards = [TrainedExperts(one) for one in bench.moe.containers]
    with bench.moe.experts_forward(forwards):
        found = AmpProbe(bench, every=1)._compared(0, 65536.0, torch.float16)
    assert found.underflow < found.underflow_unscaled


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_head_for_the_data_s_labels(kind, dense, sparse, reviews, tmp_path):
    model = dense / "model" if kind == "dense" else sparse
    out = tmp_path / "out"
    options = ("--task", "classification", "--new-head", "--steps", "40", "--batch-size", "16")
    assert finetune(model, reviews, out, *options) == 0
    found = facts(out)["rows"]
    assert found["after"]["accuracy"] > 0.9
    assert found["after"]["f1"] > 90
    saved = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert saved.config.id2label == {0: "negative", 1: "positive"}


def test_from_scratch_needs_no_weights(dense, reviews, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in (dense / "model").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "out"
    options = ("--task", "classification", "--from-scratch", "--steps", "60", "--batch-size", "16")
    assert finetune(folder, reviews, out, *options) == 0
    found = facts(out)["rows"]
    assert "before" not in found
    assert found["after"]["accuracy"] > 0.9


def test_entities_in_another_script(dense, tmp_path):
    names, places = ["Άννα", "Νίκος", "Ελένη"], ["Αθήνα", "Πάτρα"]
    rows = [
        {"tokens": [name, "μένει", place], "ner_tags": ["B-PER", "O", "B-LOC"]}
        for name in names
        for place in places
    ] * 4
    folder = tiny_long(dense, tmp_path)
    data = examples(tmp_path, rows)
    out = tmp_path / "out"
    options = ("--task", "token-classification", "--new-head", "--steps", "40")
    assert finetune(folder, data, out, *options) == 0
    found = facts(out)["rows"]["after"]
    assert found["f1"] > 90
    config = json.loads((out / "model" / "config.json").read_text())
    assert set(config["label2id"]) == {"B-LOC", "B-PER", "O"}


def tiny_long(dense, tmp_path):
    """The dense model with room for longer texts."""
    folder = tmp_path / "long"
    folder.mkdir()
    for file in (dense / "model").iterdir():
        data = file.read_bytes()
        if file.name == "config.json":
            data = data.replace(b'"max_position_embeddings": 32', b'"max_position_embeddings": 64')
        (folder / file.name).write_bytes(data)
    return folder


TWO = [{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}]
LONG = [{"sentence": "a" * 99, "label": "x"}, *TWO]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (TWO * 9, [], "give --new-head"),
        (TWO[:1] * 9, ["--new-head"], "one class alone"),
        (LONG * 9, ["--new-head"], "has 99 tokens"),
        (TWO * 9, ["--new-head", "--label-column", "labl"], "labl"),
        (TWO * 9, ["--new-head", "--task", "token-classification"], "words"),
        (TWO, ["--new-head"], "give more, or a smaller --batch-size"),
    ],
)
def test_data_that_does_not_suit_is_refused(rows, options, said, dense, tmp_path, capsys):
    data, out = examples(tmp_path, rows), tmp_path / "out"
    more = ["--task", "classification", *options]
    assert finetune(dense / "model", data, out, *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (out / "model").exists()


def test_labels_that_the_head_does_not_know_are_refused(dense, reviews, tmp_path, capsys):
    out = tmp_path / "out"
    task = ("--task", "classification")
    assert finetune(dense / "model", reviews, out, *task, "--new-head") == 0
    other = examples(tmp_path, [{"sentence": "a", "label": "joy"}, *TWO] * 9)
    assert finetune(out / "model", other, tmp_path / "next", *task) == 2
    assert "the label 'joy'" in capsys.readouterr().err


def test_a_dense_model_cannot_be_quantized_but_told_how(dense, tmp_path, capsys):
    options = ["--model", str(dense / "model"), "--dataset", str(dense / "text.txt")]
    command = ["qat", *SMALL, *options, "--maps", "random", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "python -m dmpq.train upcycle" in capsys.readouterr().err


def test_an_upcycled_checkpoint_is_quantized_like_any_other(sparse, dense, tmp_path):
    moe = MoEModel(AutoLM.from_pretrained(sparse), name="x")
    assert moe.spec.num_experts == 8
    options = ["--model", str(sparse), "--dataset", str(dense / "text.txt")]
    command = ["qat", *SMALL, *options, "--maps", "random", "--bits", "2,8"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert parameters(tmp_path / "out" / "model")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--experts", "1"], "give 2 or more"),
        (["--top-k", "9"], "top_k is 9"),
        (["--layers", "7"], "layers names layer 7"),
        (["--layers", "a,b"], "no list of numbers"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "MOE"], "already"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(options, said, dense, tmp_path, capsys):
    if options[-1] == "MOE":
        options = ["--model", str(tiny_model(tmp_path / "moe"))]
    out = tmp_path / "out"
    assert main(["upcycle", "--model", str(dense / "model"), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_what_was_noted_before_an_interruption_is_kept(sparse, dense, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--precision", "fp16", "--balance", "1000", "--probe-every", "2")
    assert finetune(sparse, dense / "text.txt", whole, *options) == 0
    with interrupted_after(6):
        assert finetune(sparse, dense / "text.txt", cut, *options) == 130
    assert finetune(sparse, dense / "text.txt", cut, *options) == 0
    for name in ("probes", "loss_scales", "skipped_steps", "rows"):
        assert facts(cut)[name] == facts(whole)[name]
    assert [one["step"] for one in facts(cut)["probes"]] == [0, 2, 4, 6]
