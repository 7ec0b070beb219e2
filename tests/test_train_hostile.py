"""Training met with damage, bad luck and nonsense: one sentence, and nothing wrong in silence."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import (
    bitmap_for,
    dense_model,
    examples,
    interrupted_after,
    parameters,
    text_file,
    tiny_model,
)
from transformers import AutoModelForCausalLM

from dmpq.files import remove
from dmpq.formats import Menu
from dmpq.pruning import renormalised
from dmpq.train import main
from dmpq.training import trainer as trainers

FEW = ["--steps", "6", "--batch-size", "2", "--save-every", "4", "--heldout-tokens", "64"]
ONE = ["--steps", "1", "--batch-size", "2", "--save-every", "0", "--heldout-tokens", "64"]
WILD = ["--learning-rate", "1000", "--warmup", "0", "--clip-norm", "1e9"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with experts, a dense one, and a text."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model(folder / "model")
    text_file(folder)
    dense_model(folder / "dense")
    return folder


def finetune(place, out, *more, steps=ONE, model="model"):
    given = ["--model", str(place / model), "--dataset", str(place / "text.txt")]
    return main(["finetune", *given, *steps, "--out", str(out), *more])


def refused(capsys, code):
    """Return the one sentence that a refusal has written."""
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def cut_short(place, out):
    """Train until after the first checkpoint."""
    with interrupted_after(5):
        assert finetune(place, out, steps=FEW) == 130
    return out / "training" / "checkpoint-4"


def flipped(file):
    """Change one byte of a file's last tensor."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def told(file, **values):
    """Change what a JSON file says."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE = {
    "a bit": lambda c: flipped(c / "training.safetensors"),
    "foreign": lambda c: save_file({"a": torch.ones(1)}, c / "training.safetensors"),
    "cut": lambda c: (c / "trainer_state.json").write_text('{"global_step": 4'),
    "step": lambda c: told(c / "trainer_state.json", global_step=2),
    "past the end": lambda c: told(c / "trainer_state.json", global_step=99),
    "no state": lambda c: (c / "trainer_state.json").unlink(),
    "empty": lambda c: (c.parent / "checkpoint-5").mkdir(),
}


def test_a_damaged_checkpoint_is_refused_and_its_remedy_works(place, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert finetune(place, whole, steps=FEW) == 0
    cut_short(place, cut)
    capsys.readouterr()
    for name, damage in DAMAGE.items():
        hurt = tmp_path / "hurt"
        shutil.copytree(cut, hurt)
        damage(hurt / "training" / "checkpoint-4")
        said = refused(capsys, finetune(place, hurt, steps=FEW))
        assert "cannot go on from" in said, name
        assert not (hurt / "model").exists()
        if name != "empty":  # where the one before is left
            remove(hurt)
    remove(trainers.last_checkpoint(hurt / "training"))
    assert finetune(place, hurt, steps=FEW) == 0
    for name, value in parameters(whole / "model").items():
        assert torch.equal(value, parameters(hurt / "model")[name]), name


@pytest.mark.parametrize("what", ["model", "text"])
def test_a_model_or_text_that_has_changed_is_not_gone_on_with(what, place, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(place, mine)
    out = tmp_path / "out"
    cut_short(mine, out)
    capsys.readouterr()
    if what == "model":
        shutil.rmtree(mine / "model")
        tiny_model(mine / "model", seed=1)
    else:
        text_file(mine, sentences=500)
    assert "has changed" in refused(capsys, finetune(mine, out, steps=FEW))


def test_what_stands_in_the_way_of_a_result_is_replaced_by_it(place, tmp_path):
    out = tmp_path / "out"
    assert finetune(place, out) == 0
    first = parameters(out / "model")
    shutil.rmtree(out / "model")
    (out / "model").write_text("no model")
    (out / ".model.partial").write_text("no folder")
    assert finetune(place, out) == 0
    assert all(torch.equal(one, first[name]) for name, one in parameters(out / "model").items())


def test_a_map_that_prunes_all_experts_of_a_token_is_trained_under(place, tmp_path):
    pairs = np.zeros((16, 2), int)
    pairs[3] = pairs[12] = 2
    menu = Menu.parse("0,2,4")
    bitmap_for(place / "model", place / "text.txt", menu=menu, pairs=pairs).write(tmp_path / "b")
    assert main(["qat", str(tmp_path / "b"), *FEW, "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    assert rows["the map, after"]["nll"] < rows["the map, before"]["nll"]


def test_pruned_weights_have_a_gradient():
    weights = torch.tensor([[0.5, 0.25], [0.5, 0.25]], requires_grad=True)
    kept = torch.tensor([[True, False], [False, False]])
    found = renormalised(weights, kept)
    assert found.tolist() == [[0.75, 0], [0, 0]]
    found[:, 0].sum().backward()
    assert torch.isfinite(weights.grad).all()
    assert weights.grad[1].tolist() == [0, 0]


def test_fp16_that_overflows_for_ever_stops(place, tmp_path, capsys):
    more = ["--precision", "fp16", "--steps", "60", *WILD]
    said = refused(capsys, finetune(place, tmp_path / "out", *more))
    assert "is not finite at step" in said
    lines = (tmp_path / "out/training/log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["labels"] is None
    assert not (tmp_path / "out/model").exists()


def test_weights_that_a_last_step_makes_infinite_are_not_written(
    place, tmp_path, monkeypatch, capsys
):
    run = trainers.MoETrainer.after_step

    def poisoned(self):
        run(self)
        with torch.no_grad():
            self.text_model.model.lm_head.weight[0, 0] = float("inf")

    monkeypatch.setattr(trainers.MoETrainer, "after_step", poisoned)
    said = refused(capsys, finetune(place, tmp_path / "out"))
    assert "weight is not finite at step 1, first in lm_head.weight" in said
    said = refused(capsys, finetune(place, tmp_path / "saved", "--save-every", "1"))
    assert "there is no checkpoint yet" in said
    assert not trainers.checkpoints(tmp_path / "saved" / "training")


def test_a_model_that_one_step_ruined_is_told_as_it_is(place, tmp_path):
    """A loss above 709 nats has no perplexity that a float holds."""
    assert finetune(place, tmp_path / "out", *WILD) == 0
    after = json.loads((tmp_path / "out/summary.json").read_text())["rows"]["after"]
    assert after["nll"] > 709
    assert after["perplexity"] is None


def test_a_map_s_formats_that_overflow_leave_no_result(place, tmp_path, capsys):
    options = ["--maps", "random", "--bits", "2,4", "--weight-decay", "1000", *WILD]
    given = ["--model", str(place / "model"), "--dataset", str(place / "text.txt")]
    code = main(["qat", *given, *ONE, *options, "--out", str(tmp_path / "out")])
    assert "held-out loss is not finite" in refused(capsys, code)
    assert not (tmp_path / "out/model").exists()


def edited(place, folder, **values):
    """Return a copy of the model whose config.json says something else."""
    shutil.copytree(place / "model", folder / "edited")
    told(folder / "edited/config.json", **values)
    return folder / "edited"


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        ({"num_experts_per_tok": 99}, [], "selects 99 of 8|cannot run"),
        ({"num_attention_heads": 7}, ["--from-scratch"], "cannot run"),
        ({"hidden_size": -3}, ["--from-scratch"], "that can be built"),
        ({"hidden_size": "x"}, ["--from-scratch"], "mend its config.json"),
        ({"model_type": "nope"}, ["--from-scratch"], "that can be built"),
        ({"vocab_size": 5}, ["--from-scratch"], "that can be built"),
        ({}, ["--new-head"], "--new-head is for the labels of a task"),
    ],
)
def test_a_config_of_no_sense_is_refused(values, options, said, place, tmp_path, capsys):
    model = edited(place, tmp_path, **values)
    error = refused(capsys, finetune(place, tmp_path / "out", *options, "--model", str(model)))
    assert any(one in error for one in said.split("|"))


def test_a_body_of_other_shapes_is_not_made_anew_with_the_head(place, tmp_path, capsys):
    shutil.copytree(place / "dense", tmp_path / "dense")
    told(tmp_path / "dense/config.json", intermediate_size=64)
    data = examples(tmp_path, [{"sentence": "a", "label": i % 2} for i in range(20)])
    options = ["--task", "classification", "--new-head", "--dataset", str(data)]
    code = finetune(tmp_path, tmp_path / "out", *options, model="dense")
    assert "other shapes than its config.json says" in refused(capsys, code)


def test_a_new_head_depends_on_the_seed_alone(place, tmp_path):
    data = examples(tmp_path, [{"sentence": f"a{i}", "label": i % 2} for i in range(20)])
    options = ["--task", "classification", "--new-head", "--dataset", str(data)]
    heads = []
    for number, seed in enumerate((0, 0, 1)):
        torch.rand(number + 1)  # whatever ran before in this process
        out = tmp_path / str(number)
        assert finetune(place, out, *options, "--seed", str(seed), model="dense") == 0
        heads.append(load_file(out / "model/model.safetensors")["score.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("label", [None, float("nan")])
def test_a_missing_label_is_no_class(label, place, tmp_path, capsys):
    rows = [{"sentence": "a", "label": label}, {"sentence": "b", "label": "x"}] * 9
    options = ["--task", "classification", "--new-head"]
    options += ["--dataset", str(examples(tmp_path, rows))]
    code = finetune(place, tmp_path / "out", *options, model="dense")
    assert "lacks a label in some rows" in refused(capsys, code)


def test_a_quantized_checkpoint_is_not_trained(place, tmp_path, capsys):
    from dmpq.apply import main as apply

    bitmap_for(place / "model", place / "text.txt").write(tmp_path / "b.json")
    assert apply([str(tmp_path / "b.json"), "--out", str(tmp_path / "q"), "--threads", "1"]) == 0
    capsys.readouterr()
    code = finetune(place, tmp_path / "out", "--model", str(tmp_path / "q"))
    assert "is quantized already" in refused(capsys, code)


def test_random_maps_do_not_prune_in_silence(place, tmp_path, capsys):
    code = main(["qat", *ONE, "--maps", "random", "--bits", "0,2", "--out", str(tmp_path / "out")])
    assert "leave the 0 out" in refused(capsys, code)


def codesign(place, out, *more):
    options = ["--bits", "2g16,4g16", "--avg-bits", "4.5", "--profile-tokens", "256"]
    options += ["--model", str(place / "model"), "--dataset", str(place / "text.txt")]
    options += ["--search-tokens", "256", "--rounds", "1", *ONE, "--out", str(out)]
    return main(["codesign", *options, *more])


def test_codesign_of_one_round_is_told_whatever_counts_as_stable(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert codesign(place, out, "--stable", "1") == 0
    assert len(json.loads((out / "summary.json").read_text())["rounds"]) == 1
    (out / "round-1/round.json").write_text('{"after": 3}')
    capsys.readouterr()
    assert "is damaged" in refused(capsys, codesign(place, out, "--stable", "1"))
    (out / "round-1/round.json").unlink()
    assert codesign(place, out, "--stable", "1") == 0


def test_a_folder_with_somebody_s_rounds_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "out/round-1").mkdir(parents=True)
    assert "may be somebody else's" in refused(capsys, codesign(place, tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--noise", "1e300"], "noise is 1e+300"),
        (["--capacity-factor", "inf"], "capacity_factor is inf"),
        (["--seed", str(10**23)], "seed is"),
        (["--experts", str(10**9)], "fewer --experts"),
    ],
)
def test_upcycling_by_numbers_of_no_sense_is_refused(options, said, place, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["upcycle", "--model", str(place / "dense"), *options, "--out", str(out)])
    assert said in refused(capsys, code)
    assert not out.exists()


def test_upcycling_writes_past_what_an_earlier_run_has_left(place, tmp_path):
    (tmp_path / ".out.partial").write_text("no folder")
    out = tmp_path / "out"
    assert main(["upcycle", "--model", str(place / "dense"), "--out", str(out)]) == 0
    assert AutoModelForCausalLM.from_pretrained(out)
