"""The command: training under a map, resumed to the bit, and what it refuses."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from trainings import (
    MENU,
    bitmap_for,
    interrupted_after,
    loaded,
    parameters,
    text_file,
    tiny_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import dmpq.hf  # noqa: F401, registers the format
from dmpq.bitmap import BitMap
from dmpq.train import main
from dmpq.training import trainer as trainers
from dmpq.training.config import QatConfig
from dmpq.training.fake_quant import FakeQuantizedModel, TrainedExperts
from dmpq.training.objective import LossTerms
from dmpq.training.qat import choose_at_random
from dmpq.training.workbench import workbench
from dmpq.validate import main as validate

SMALL = ["--steps", "12", "--batch-size", "4", "--save-every", "4", "--heldout-tokens", "512"]
SMALL += ["--labels", "1", "--distillation", "0"]  # a random model has nothing to teach


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a text and a map of both."""
    folder = tmp_path_factory.mktemp("place")
    model, text = tiny_model(folder / "model"), text_file(folder)
    bitmap = bitmap_for(model, text)
    bitmap.write(folder / "bitmap.json")
    return folder


def qat(place, out, *more, bitmap="bitmap.json"):
    return main(["qat", str(place / bitmap), *SMALL, "--out", str(out), *more])


def rows(out):
    return json.loads((out / "summary.json").read_text())["rows"]


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """The result of an uninterrupted training."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert qat(place, out) == 0
    return out


def test_training_lowers_what_the_map_loses(trained, capsys):
    found = rows(trained)
    assert list(found) == [
        "full precision",
        "the map, before",
        "the map, after",
        "full precision, after",
    ]
    assert found["the map, after"]["nll"] < found["the map, before"]["nll"] - 0.05
    assert found["full precision"]["kl"] == pytest.approx(0, abs=1e-6)
    for row in found.values():
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    lines = (trained / "training/log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 13))


def test_the_new_map_holds_for_the_trained_model(trained):
    assert validate([str(trained / "bitmap.json"), "--threads", "1"]) == 0
    bitmap = BitMap.read(trained / "bitmap.json")
    measured = bitmap.metrics["measured"]["heldout_kl"]["value"]
    assert measured > 0
    assert bitmap.model["id"] == str(trained / "model")


def test_the_packed_checkpoint_is_what_was_judged(trained, tmp_path):
    """`dmpq.apply` quantizes the saved weights anew, and gets what the last row says."""
    from transformers import AutoModelForCausalLM

    from dmpq.apply import main as apply

    packed = tmp_path / "packed"
    assert apply([str(trained / "bitmap.json"), "--out", str(packed), "--threads", "1"]) == 0
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    config = json.loads((trained / "summary.json").read_text())["config"]
    bench = workbench(QatConfig(**config | {"model": str(trained / "model")}))
    loss, count = 0.0, 0
    for batch in bench.heldout:
        with torch.no_grad():
            logits = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1).float()
        loss += float(batch.loss(logits, reduction="sum"))
        count += batch.predicted
    assert loss / count == pytest.approx(rows(trained)["the map, after"]["nll"], rel=1e-6)


@pytest.mark.parametrize("more", [[], ["--precision", "fp16"], ["--maps", "random"]])
def test_an_interrupted_training_ends_at_the_same_bits(more, place, tmp_path):
    random = "--maps" in more
    first = ["qat"] if random else ["qat", str(place / "bitmap.json")]
    own = ["--model", str(place / "model"), "--dataset", str(place / "text.txt")]
    own += ["--bits", "2,4", *more] if random else more
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*first, *SMALL, *own, "--out", str(whole)]) == 0

    with interrupted_after(6):
        assert main([*first, *SMALL, *own, "--out", str(cut)]) == 130
    assert [one.name for one in trainers.checkpoints(cut / "training")] == ["checkpoint-4"]
    assert not (cut / "model").exists()
    assert main([*first, *SMALL, *own, "--out", str(cut)]) == 0
    for name, value in parameters(whole / "model").items():
        assert torch.equal(value, parameters(cut / "model")[name]), name
    assert rows(whole) == rows(cut)


def test_learned_ranges_are_stored(place, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    assert qat(place, out, "--ranges", "learned") == 0
    assert not (out / "bitmap.json").exists()
    model = AutoModelForCausalLM.from_pretrained(out / "quantized", dtype=torch.float32)
    config = json.loads((out / "summary.json").read_text())["config"]
    bench = workbench(QatConfig(**config))
    loss = 0.0
    for batch in bench.heldout:
        with torch.no_grad():
            logits = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1).float()
        loss += float(batch.loss(logits, reduction="sum"))
    found = loss / sum(batch.predicted for batch in bench.heldout)
    after = rows(out)["the map, after"]["nll"]
    assert found == pytest.approx(after, rel=1e-5)
    assert after < rows(out)["the map, before"]["nll"] - 0.05


def test_only_what_is_asked_for_is_trained(place, tmp_path):
    before = parameters(place / "model")
    for which in ("experts", "routers"):
        out = tmp_path / which
        assert qat(place, out, "--train", which, "--distillation", "1", "--routers", "1") == 0
        moved = {
            name
            for name, value in parameters(out / "model").items()
            if not torch.equal(value, before[name])
        }
        sign = ".experts." if which == "experts" else ".gate."
        assert moved == {name for name in before if sign in name}


def test_a_checkpoint_keeps_its_type(place, tmp_path):
    """Weights are trained in FP32, and judged as they are saved: rounded to BF16."""
    from safetensors.torch import load_file

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path / "model")
    bitmap_for(tmp_path / "model", place / "text.txt").write(tmp_path / "bitmap.json")
    out = tmp_path / "out"
    assert qat(tmp_path, out) == 0
    saved = load_file(out / "model" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert validate([str(out / "bitmap.json"), "--threads", "1"]) == 0


def test_random_maps_make_weights_that_tolerate_every_map(place, tmp_path):
    out = tmp_path / "out"
    options = ["--model", str(place / "model"), "--dataset", str(place / "text.txt")]
    options += ["--maps", "random", "--bits", "2,4"]
    assert main(["qat", *SMALL, *options, "--out", str(out)]) == 0
    found = rows(out)
    for width in ("2", "4"):
        before, after = (found[f"uniform {width}, {when}"]["nll"] for when in ("before", "after"))
        assert after < before - 0.05
    assert not (out / "bitmap.json").exists()


def test_a_random_map_depends_on_seed_and_step_alone(place):
    moe = loaded(place / "model")
    learner = FakeQuantizedModel(moe, MENU)

    def drawn(step, seed=0):
        choose_at_random(learner, step, seed=seed)
        return np.concatenate([layer.choice for layer in learner.layers])

    first = drawn(3)
    assert not np.array_equal(drawn(4), first)
    assert not np.array_equal(drawn(3, seed=1), first)
    assert np.array_equal(drawn(3), first)
    assert set(np.unique([drawn(step) for step in range(20)])) == set(range(len(MENU)))


def test_the_control_begins_with_the_same_weights(place, tmp_path):
    plain, with_control = tmp_path / "plain", tmp_path / "control"
    assert qat(place, plain) == 0
    assert qat(place, with_control, "--control") == 0
    found = rows(with_control)
    assert found["full precision, control"]["nll"] < found["full precision"]["nll"]
    assert found["the map, after"] == rows(plain)["the map, after"]


def test_batches_add_up_to_a_step(place, tmp_path):
    """Two batches of two windows have the mean gradient of one of four."""
    bench = workbench(QatConfig(**bare(place), batch_size=4))
    windows = len(bench.steps.tokens) // 32 - 1
    bench.steps.tokens.resize(32 * (windows - windows % 4 + 1), refcheck=False)
    found = []
    for size, accumulate in ((4, 1), (2, 2)):
        own = workbench(QatConfig(**bare(place), batch_size=size, accumulate=accumulate, steps=3))
        object.__setattr__(own.steps, "tokens", bench.steps.tokens)
        forwards = [TrainedExperts(experts) for experts in own.moe.containers]
        own.train(
            LossTerms(),
            tmp_path / str(size),
            forwards=forwards,
            progress=lambda *_: None,
            stage="x",
        )
        found.append(torch.cat([one.flatten() for one in own.model.model.parameters()]))
    start = torch.cat([one.flatten() for one in bench.model.model.parameters()])
    assert (found[0] - found[1]).norm() < 1e-3 * (found[0] - start).norm()


def bare(place):
    """Options of a training on the tiny model's text."""
    return {
        "model": str(place / "model"),
        "dataset": str(place / "text.txt"),
        "heldout_tokens": 64,
        "save_every": 0,
    }


def test_codesign_searches_what_it_trained(place, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--model", str(place / "model"), "--dataset", str(place / "text.txt")]
    options += ["--bits", "2g16,4g16", "--avg-bits", "4.5", "--profile-tokens", "256"]
    options += ["--search-tokens", "256", "--rounds", "2", "--stable", "0"]
    assert main(["codesign", *SMALL, *options, "--out", str(out)]) == 0
    facts = json.loads((out / "summary.json").read_text())
    made = facts["rounds"]
    assert facts["stable"] == (facts["changed"] == 0)
    assert [one["round"] for one in made] == list(range(1, len(made) + 1))
    assert made[0]["changed"] == 1.0
    first, second = (BitMap.read(out / f"round-{i}/searched.json") for i in (1, 2))
    assert first.model["id"] == str(place / "model")
    assert second.model["id"] == str(out / "round-1/model")
    assert made[0]["rows"]["after"]["nll"] < made[0]["rows"]["before"]["nll"]
    assert validate([str(out / facts["last"] / "bitmap.json"), "--threads", "1"]) == 0
    # Done rounds are not done again.
    stamp = (out / "round-1/model/model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["codesign", *SMALL, *options, "--out", str(out)]) == 0
    assert (out / "round-1/model/model.safetensors").stat().st_mtime_ns == stamp
    assert json.loads((out / "summary.json").read_text()) == facts


def test_a_loss_that_is_not_finite_stops_with_its_place(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert qat(place, out, "--learning-rate", "1000", "--warmup", "0", "--clip-norm", "1e9") == 2
    said = capsys.readouterr().err
    assert "is not finite at step" in said
    assert "first in model." in said
    assert "lower --learning-rate" in said
    assert said.count("\n") == 1
    assert not (out / "model").exists()


def test_the_last_good_checkpoint_stays(place, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    step = trainers.MoETrainer.training_step

    def poisoned(self, model, inputs, number=None):
        if self.state.global_step == 6:
            with torch.no_grad():
                model.get_parameter("model.layers.1.mlp.experts.down_proj").fill_(math.nan)
        return step(self, model, inputs, number)

    monkeypatch.setattr(trainers.MoETrainer, "training_step", poisoned)
    assert qat(place, out) == 2
    said = capsys.readouterr().err
    assert "not finite at step 7, first in model.layers.1.mlp" in said
    assert "the last good one is" in said
    assert [one.name for one in trainers.checkpoints(out / "training")] == ["checkpoint-4"]


def other_model(place):
    if not (place / "other").exists():
        tiny_model(place / "other", seed=1)
    return str(place / "other")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "OTHER"], "was made for weights"),
        (["--maps", "random"], "leave one out"),
        (["--learning-rate", "-1"], "--learning-rate -1.0 makes no sense"),
        (
            ["--steps", "10000000000"],
            "--steps 10000000000 makes no sense; give 1 to 1,000,000,000.",
        ),
        (["--labels", "0", "--distillation", "0"], "all 0"),
        (["--save-every", "3"], "no multiple of --refresh 4"),
        (["--precision", "fp8"], "Unknown --precision 'fp8'"),
        (["--task", "sentiment"], "Unknown --task 'sentiment'"),
        (["--text-column", "x"], "belong to a task"),
        (["--sequence-length", "64"], "give 2 to 32"),
        (["--batch-size", "100000"], "smaller --batch-size"),
        (["--dataset", "nowhere.txt"], "no file 'nowhere.txt'"),
        (["--device", "tpu"], "cannot be used"),
        (["--train", "routers", "--ranges", "learned"], "--ranges recomputed"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options, said, place, tmp_path, capsys):
    given = [other_model(place) if one == "OTHER" else one for one in options]
    out = tmp_path / "out"
    assert qat(place, out, *given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (out / "model").exists()


def test_another_run_s_folder_is_left_alone(place, trained, capsys):
    assert qat(place, trained, "--learning-rate", "2e-3") == 2
    assert "another configuration" in capsys.readouterr().err


def test_a_map_trained_projection_by_projection(place, tmp_path):
    model, text = place / "model", place / "text.txt"
    pairs = np.random.default_rng(0).integers(0, len(MENU), (16, 2))
    folder = tmp_path / "maps"
    folder.mkdir()
    bitmap_for(model, text, pairs=pairs).write(folder / "bitmap.json")
    assert qat(folder, tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert found["the map, after"]["nll"] < found["the map, before"]["nll"]
    shutil.rmtree(tmp_path / "out")
