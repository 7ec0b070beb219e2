"""A bit map becomes a checkpoint, and transformers loads what the evaluator measured."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build
from factories import write_bitmap
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dmpq.hf  # noqa: F401, registers the format
from dmpq.apply import main
from dmpq.bank import Bank
from dmpq.bitmap import BitMap, assignment_from
from dmpq.checkpoints.checkpoint import INDEX, Checkpoint
from dmpq.checkpoints.packed import PackedExperts, PackedLayer
from dmpq.checkpoints.quantized import QuantizedCheckpoint
from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.moe import MoEModel, load_model, reference_path
from dmpq.session import Session
from dmpq.spec import MoELayer

MENU = Menu.parse("0,2,3g16,4,8,16")
FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


def bitmap_of(moe, menu, assignment, folder):
    """Return the bit map of a model for an assignment."""
    template = BitMap.read(write_bitmap(folder))
    spec = moe.spec
    model = {
        "id": moe.name,
        "revision": None,
        "architecture": type(moe.model).__name__,
        "fingerprint": moe.fingerprint,
    }
    serve = "projection" if len(assignment) == 2 * spec.num_experts else "expert"
    return replace(
        template,
        model=model,
        geometry=spec,
        menu=menu,
        assignment=assignment_from(spec, menu, assignment),
        serve=serve,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a tiny model of a family, once; returns its folder and the model."""
    made = {}

    def save(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / family
            model = build(family)
            model.save_pretrained(folder)
            made[family] = folder, MoEModel(model, name=str(folder))
        return made[family]

    return save


def evaluated(moe, menu, assignment, ids):
    """Return the logits that the evaluator's bank gives a map."""
    bank = Bank(moe, menu)
    formats = np.asarray(assignment).reshape(moe.spec.num_experts, -1)
    with torch.no_grad(), bank.attached():
        bank.choose(np.broadcast_to(formats, (moe.spec.num_experts, 2))[None])
        return moe.logits(ids)


def loaded(folder, ids, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model, model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "menu",
    [
        MENU,
        Menu.parse("2,3,4,8", quantizer="rtn", symmetric=True),
        Menu.parse("2,3g8,4,8", quantizer="rtn"),
        Menu.parse("2,3,4g8,16", quantizer="hqq+lr4"),
    ],
    ids=["hqq", "rtn-symmetric", "rtn", "hqq+lr4"],
)
def test_loaded_logits_are_the_evaluator_s_to_the_bit(family, menu, saved, tmp_path, token_ids):
    _, moe = saved(family)
    rng = np.random.default_rng(0)
    assignment = rng.integers(len(menu), size=moe.spec.num_experts)
    bitmap = bitmap_of(moe, menu, assignment, tmp_path)
    bitmap.write(tmp_path / "bitmap.json")
    assert main([str(tmp_path / "bitmap.json"), "--out", str(tmp_path / "out")]) == 0
    model, logits = loaded(tmp_path / "out", token_ids)
    assert torch.equal(logits, evaluated(moe, menu, assignment, token_ids))
    packed = [one for one in model.modules() if isinstance(one, PackedExperts)]
    assert len(packed) == len(moe.containers)


def test_projections_may_differ(saved, tmp_path, token_ids):
    folder, moe = saved("olmoe")
    menu = Menu.parse("2,3,4,8,16")
    assignment = np.random.default_rng(1).integers(len(menu), size=2 * moe.spec.num_experts)
    made = QuantizedCheckpoint(bitmap_of(moe, menu, assignment, tmp_path), Checkpoint(str(folder)))
    made.write(tmp_path / "out", card="")
    _, logits = loaded(tmp_path / "out", token_ids)
    assert torch.equal(logits, evaluated(moe, menu, assignment, token_ids))


def test_dequantized_weights_are_the_bank_s_to_the_bit(saved, tmp_path):
    folder, moe = saved("gpt_oss")
    menu = Menu.parse("2,3,4,8,16")
    assignment = np.arange(moe.spec.num_experts) % len(menu)
    made = QuantizedCheckpoint(bitmap_of(moe, menu, assignment, tmp_path), Checkpoint(str(folder)))
    made.write(tmp_path / "out", card="")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    bank = Bank(moe, menu)
    start = 0
    packed = [one for one in model.modules() if isinstance(one, PackedExperts)]
    for own, layer in zip(packed, bank.layers, strict=True):
        for expert in range(layer.experts.num_experts):
            wanted = layer.variant(expert, int(assignment[start + expert]))
            for side in (0, 1):
                assert torch.equal(own.weights(expert, side, torch.float32), wanted[side])
        start += layer.experts.num_experts


@pytest.mark.parametrize("quantizer", ["hqq", "rtn", "rtn+lr2", "hqq+lr8"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_stored_parts_take_the_bits_that_the_menu_counts(quantizer, symmetric):
    menu = Menu.parse("2,3,4g32,8,16", quantizer=quantizer, symmetric=symmetric)
    layer = MoELayer("experts", 5, 2, 256, 128)
    counted = [menu.stored_bits(shape) for shape in (layer.gate_up_shape, layer.down_shape)]
    for place, key in enumerate(menu.keys):
        packed = PackedLayer(layer, menu, ((key,) * 5, (key,) * 5), torch.bfloat16)
        for side in (0, 1):
            parts = packed.parts(side, key, 5)
            stored = sum(info.num_bytes for info in parts.values())
            # zero-points that are codes fill whole runs of eight, in up to three streams
            assert 0 <= stored - 5 * counted[side][place] / 8 < 5 * 3 * 8


def test_a_map_of_gptq_is_calibrated_again(tmp_path):
    config = SearchConfig(
        quantizer="gptq,affinity",
        bits="2,3,4",
        profile_tokens=1024,
        search_tokens=128,
        selection_tokens=0,
        further_tokens=0,
        heldout_tokens=128,
    )
    session = Session(config)
    moe, menu = session.moe, session.menu
    assignment = np.random.default_rng(0).integers(len(menu), size=moe.spec.num_experts)
    bitmap = replace(
        bitmap_of(moe, Menu.parse("2,3,4"), assignment, tmp_path),
        menu=menu,
        calibration=session.calibrated_by.to_json(),
    )
    bitmap.write(tmp_path / "bitmap.json")
    with pytest.raises(InputError, match="nothing calibrates it here"):
        QuantizedCheckpoint(bitmap, Checkpoint("reference"))
    assert main([str(tmp_path / "bitmap.json"), "--out", str(tmp_path / "out")]) == 0
    ids = torch.from_numpy(session.splits.heldout)
    formats = np.repeat(assignment[:, None], 2, 1)
    with torch.no_grad(), session.bank.attached():
        session.bank.choose(formats[None])
        wanted = moe.logits(ids)
    assert torch.equal(loaded(tmp_path / "out", ids)[1], wanted)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The bundled model under a mixed map, written once."""
    folder = tmp_path_factory.mktemp("reference")
    moe, _ = load_model("reference")
    menu = Menu.parse("2,3,4,8,16")
    assignment = np.random.default_rng(0).integers(3, size=moe.spec.num_experts)
    bitmap = bitmap_of(moe, menu, assignment, folder)
    bitmap.write(folder / "bitmap.json")
    made = QuantizedCheckpoint(bitmap, Checkpoint("reference"))
    made.write(folder / "out", card="")
    return folder, made


def test_the_file_takes_the_bytes_that_the_map_predicts(reference):
    folder, made = reference
    size = (folder / "out" / "model.safetensors").stat().st_size
    assert size == made.num_bytes
    spec, menu = made.source.moe.spec, made.bitmap.menu
    chosen = made.bitmap.to_assignment(spec)
    stored = spec.stored_bits(menu).sum(1)
    experts = stored[np.arange(len(chosen)), chosen].sum() // 8
    whole = experts + sum(info.num_bytes for info in made.source.other_tensors.values())
    header = size - whole
    assert 0 < header < 150 * len(made.tensors)  # names and shapes
    assert abs(size - whole) / 3.35e6 < 0.01  # of the full-precision file


def test_it_generates_as_the_dequantized_model_does(reference, token_ids):
    folder, made = reference
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    plain, _ = load_model("reference")
    menu = made.bitmap.menu
    bank = Bank(plain, menu)
    formats = np.repeat(made.bitmap.to_assignment(plain.spec)[:, None], 2, 1)
    start = 0
    for layer in bank.layers:
        stop = start + layer.experts.num_experts
        weights = layer.select(formats[start:stop])
        for parameter, values in zip(layer.experts.parameters, weights, strict=True):
            parameter.data.copy_(values)
        start = stop
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 256}
    prompt = token_ids[:2]
    assert torch.equal(model.generate(prompt, **options), plain.model.generate(prompt, **options))


def test_saving_again_keeps_everything(reference, tmp_path, token_ids):
    folder, _ = reference
    model, logits = loaded(folder / "out", token_ids)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(loaded(tmp_path / "again", token_ids)[1], logits)


def test_another_float_type_leaves_the_scales_alone(reference, token_ids):
    folder, _ = reference
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    packed = next(one for one in model.modules() if isinstance(one, PackedExperts))
    before = packed.weights(0, 0, torch.float32)
    model.to(torch.bfloat16)
    assert torch.equal(packed.weights(0, 0, torch.float32), before)
    with torch.no_grad():
        assert model(input_ids=token_ids).logits.isfinite().all()


def test_experts_stay_packed_in_memory(reference):
    folder, _ = reference
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(reference_path(), dtype=torch.bfloat16)
    assert model.get_memory_footprint() < 0.3 * plain.get_memory_footprint()


def test_shards_and_resume_give_the_same_tensors(reference, tmp_path, monkeypatch):
    folder, made = reference
    small = QuantizedCheckpoint(made.bitmap, made.source, largest_shard=200_000)
    calls = []
    packed = QuantizedCheckpoint._packed

    def interrupted(self, experts, layer):
        calls.append(experts.path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return packed(self, experts, layer)

    monkeypatch.setattr(QuantizedCheckpoint, "_packed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.write(tmp_path / "out", card="")
    assert not (tmp_path / "out").exists()
    small.write(tmp_path / "out", card="")
    paths = [one.path for one in made.source.moe.containers]
    assert calls == [*paths[:3], *paths[2:]]
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    whole = load_file(folder / "out" / "model.safetensors")
    split = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert split.keys() == whole.keys()
    assert all(torch.equal(split[name], whole[name]) for name in whole)
    assert not list(tmp_path.glob(".out*"))
    assert not list((tmp_path / "out").glob("apply*"))


def full_disk(*_):
    raise OSError("the disk is full")


def test_a_run_of_another_map_starts_afresh(reference, tmp_path, monkeypatch):
    _, made = reference
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedCheckpoint, "_packed", full_disk)
        with pytest.raises(OSError, match="the disk is full"):
            made.write(tmp_path / "out", card="")
    other = QuantizedCheckpoint(replace(made.bitmap, versions={"dmpq": "9"}), made.source)
    other.write(tmp_path / "out", card="")
    assert json.loads((tmp_path / "out" / "bitmap.json").read_text())["versions"] == {"dmpq": "9"}


def test_a_second_run_into_the_same_folder_is_refused(reference, tmp_path, monkeypatch):
    _, made = reference
    other = QuantizedCheckpoint(replace(made.bitmap, versions={"dmpq": "9"}), made.source)
    packed = QuantizedCheckpoint._packed

    def meanwhile(self, experts, layer):
        with pytest.raises(InputError, match=r"Another run is at work in .*out; wait"):
            other.write(tmp_path / "out", card="", check=False)
        return packed(self, experts, layer)

    monkeypatch.setattr(QuantizedCheckpoint, "_packed", meanwhile)
    made.write(tmp_path / "out", card="", check=False)
    written = BitMap.read(tmp_path / "out" / "bitmap.json")
    assert written.versions == made.bitmap.versions
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_plain_load_without_the_import_fails_instead_of_guessing(reference):
    folder, _ = reference
    code = (
        "from transformers import AutoModelForCausalLM as A;"
        f"A.from_pretrained({str(folder / 'out')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "gate_up_proj" in done.stdout + done.stderr


def edited(folder, tmp_path):
    copy = tmp_path / "edited"
    shutil.copytree(folder / "out", copy)
    return copy, json.loads((copy / "config.json").read_text())


def prune_half_of_an_expert(config):
    written = config["quantization_config"]
    written["choices"] = {"0": {"bits": 0, "group_size": 128}, **written["choices"]}
    keys = first_layer(config)
    path = next(iter(written["assignment"]))
    written["assignment"][path] = {"gate_up": ["0", *keys[1:]], "down": keys}


def first_layer(config):
    return next(iter(config["quantization_config"]["assignment"].values()))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: first_layer(c).__setitem__(0, "8"), "other formats than its weights"),
        (lambda c: first_layer(c).__setitem__(0, "5"), "Unknown format"),
        (lambda c: first_layer(c).reverse(), "other formats than its weights were written with"),
        (lambda c: first_layer(c).pop(), "no list of 16 formats"),
        (
            lambda c: c["quantization_config"]["assignment"].pop("model.layers.1.mlp.experts"),
            "other formats than its weights were written with",
        ),
        (lambda c: c["quantization_config"].update(version=2), "by version 2"),
        (lambda c: c["quantization_config"].update(choices={}), "empty"),
        (
            lambda c: c["quantization_config"]["assignment"].update(x=["2"]),
            "names x, which the model does not have",
        ),
        (lambda c: first_layer(c).__setitem__(0, ["8"]), "Unknown format"),
        (lambda c: c["quantization_config"].update(assignment=None), "no mapping"),
        (lambda c: c["quantization_config"].pop("assignment"), "missing or unknown keys"),
        (lambda c: c["quantization_config"].update(extra=1), "missing or unknown keys"),
        (
            lambda c: c["quantization_config"]["assignment"].update(
                {"model.layers.1.mlp.experts": {"gate_up": []}}
            ),
            "no list of 16 formats",
        ),
        (prune_half_of_an_expert, "prunes .* one of the projections"),
        (lambda c: c["quantization_config"]["quantizer"].update(name=5), "names no quantizer"),
        (
            lambda c: c["quantization_config"]["quantizer"].update(symmetric="no"),
            "names no quantizer",
        ),
        (
            lambda c: c["quantization_config"]["choices"]["8"].update(bits=2),
            "other bits and group sizes",
        ),
    ],
)
def test_an_edited_configuration_is_refused(reference, tmp_path, edit, message):
    copy, config = edited(reference[0], tmp_path)
    edit(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_missing_tensor_is_refused_not_drawn_at_random(reference, tmp_path):
    copy, _ = edited(reference[0], tmp_path)
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("codes"))
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{re.escape(name)} is missing"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_missing_weights_beside_the_experts_are_refused(name, reference, tmp_path):
    copy, _ = edited(reference[0], tmp_path)
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"lacks 1 of its weights, among them {name}, and"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_missing_correction_bias_is_refused_not_zeros(saved, tmp_path):
    folder, moe = saved("deepseek_v3")
    menu = Menu.parse("2,4")
    bitmap = bitmap_of(moe, menu, np.zeros(moe.spec.num_experts, np.int64), tmp_path)
    QuantizedCheckpoint(bitmap, Checkpoint(str(folder))).write(tmp_path / "out", card="")
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    for copy, load in (
        (plain, lambda: Checkpoint(str(plain))),
        (tmp_path / "out", lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
    ):
        load()
        tensors = load_file(copy / "model.safetensors")
        name = next(name for name in tensors if name.endswith("e_score_correction_bias"))
        del tensors[name]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"lacks 1 of its weights, among them {name}"):
            load()


def test_a_shard_that_nothing_names_any_more_is_missed(reference, tmp_path):
    _, made = reference
    QuantizedCheckpoint(made.bitmap, made.source, largest_shard=200_000).write(
        tmp_path / "out", card="", check=False
    )
    path = tmp_path / "out" / INDEX
    index = json.loads(path.read_text())
    gone = index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    (tmp_path / "out" / gone).unlink()
    with pytest.raises(OSError, match=gone):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != gone}
    path.write_text(json.dumps({**index, "weight_map": kept}))
    with pytest.raises(InputError, match=r"is missing|lacks \d+ of its weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("cut", [5, 1000, -9])
@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_a_cut_file_is_refused_by_name(cut, dtype, reference, tmp_path):
    copy, _ = edited(reference[0], tmp_path)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match=rf"{file.name} is no whole safetensors file"):
        AutoModelForCausalLM.from_pretrained(copy, dtype=dtype)


def test_tied_weights_are_not_missed(tmp_path, token_ids):
    model = build("olmoe")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "model")
    moe = MoEModel(model, name=str(tmp_path / "model"))
    bitmap = bitmap_of(moe, MENU, np.full(moe.spec.num_experts, 3), tmp_path)
    made = QuantizedCheckpoint(bitmap, Checkpoint(str(tmp_path / "model")))
    made.write(tmp_path / "out", card="")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    whole, logits = loaded(tmp_path / "out", token_ids)
    assert torch.equal(whole.lm_head.weight, whole.model.embed_tokens.weight)
    assert torch.equal(logits, evaluated(moe, MENU, np.full(moe.spec.num_experts, 3), token_ids))


def test_a_classifier_s_head_may_be_new_but_nothing_below_it(saved, tmp_path):
    folder, moe = saved("mixtral")
    bitmap = bitmap_of(moe, MENU, np.full(moe.spec.num_experts, 3), tmp_path)
    QuantizedCheckpoint(bitmap, Checkpoint(str(folder))).write(tmp_path / "out", card="")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 of its weights"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scale", lambda t: t.fill_(float("nan")), "values in .*scale that are not finite"),
        ("zero", lambda t: t.fill_(float("inf")), "values in .*zero that are not finite"),
        ("codes", lambda t: t.float(), r"codes is of torch\.float32, not torch\.uint8"),
        ("scale", lambda t: t.to(torch.int64), r"scale is of torch\.int64, not torch\.float16"),
    ],
)
def test_an_edited_tensor_is_refused(reference, tmp_path, part, change, message):
    copy, _ = edited(reference[0], tmp_path)
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f".{part}"))
    tensors[name] = change(tensors[name])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def refused(capsys, *arguments):
    capsys.readouterr()  # transformers' bars of what came before
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_a_map_of_other_weights_is_refused(reference, tmp_path, capsys):
    _, made = reference
    model = {**made.bitmap.model, "fingerprint": "0" * 64}
    replace(made.bitmap, model=model).write(tmp_path / "bitmap.json")
    out = tmp_path / "out"
    said = refused(capsys, tmp_path / "bitmap.json", "--out", out, "--model", reference_path())
    assert "made for weights 000000000000" in said
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_map_of_another_geometry_is_refused(reference, saved, tmp_path, capsys):
    folder, _ = reference
    other, _ = saved("mixtral")
    said = refused(capsys, folder / "bitmap.json", "--out", tmp_path / "out", "--model", other)
    assert "has no experts at model.layers.2.mlp.experts" in said


def test_what_is_there_is_not_overwritten(reference, tmp_path, capsys):
    folder, _ = reference
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (folder / "out", tmp_path / "link"):
        said = refused(capsys, folder / "bitmap.json", "--out", out)
        assert "exists already" in said
    assert [one.name for one in tmp_path.iterdir()] == ["link"]


def test_too_little_memory_or_disk_is_refused_before_anything(
    reference, tmp_path, capsys, monkeypatch
):
    folder, _ = reference
    source = ("--model", reference_path())
    bitmap, out = folder / "bitmap.json", tmp_path / "out"
    said = refused(capsys, bitmap, "--out", out, *source, "--max-memory", "0.001")
    assert "--max-memory allows 0.00" in said
    said = refused(capsys, bitmap, "--out", out, *source, "--max-memory", "-1")
    assert "give a positive number" in said
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    said = refused(capsys, bitmap, "--out", out, *source)
    assert "make room" in said
    assert not list(tmp_path.iterdir())


def test_a_quantized_source_is_refused(reference, tmp_path, capsys):
    folder, _ = reference
    said = refused(
        capsys,
        folder / "bitmap.json",
        *("--out", tmp_path / "out", "--model", folder / "out"),
    )
    assert "is quantized already" in said


def test_damaged_sources_are_refused(saved, tmp_path, capsys):
    folder, moe = saved("olmoe")
    assignment = np.zeros(moe.spec.num_experts, int)
    bitmap_of(moe, MENU, assignment + 1, tmp_path).write(tmp_path / "bitmap.json")

    def outcome(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        out = tmp_path / "out"
        said = refused(capsys, tmp_path / "bitmap.json", "--out", out, "--model", copy)
        assert not out.exists()
        return said

    def without(pattern):
        def change(copy):
            tensors = load_file(copy / "model.safetensors")
            kept = {k: v for k, v in tensors.items() if not re.search(pattern, k)}
            save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})

        return change

    def cut(copy):
        data = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data[:-7])

    def not_finite(copy):
        tensors = load_file(copy / "model.safetensors")
        name = next(name for name in tensors if "experts.3.down_proj" in name)
        tensors[name][0, 0] = float("nan")
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})

    assert "lacks 1 of its weights" in outcome(without(r"^model\.norm\.weight$"))
    assert "holds 7 experts" in outcome(without(r"layers\.0.*experts\.3\."))
    assert "no whole safetensors file" in outcome(cut)
    assert "made for weights" in outcome(not_finite)
    damaged = Checkpoint(str(tmp_path / "copy"))
    with pytest.raises(InputError, match=r"expert 3 of \S+ that are not finite"):
        damaged.expert(damaged.moe.containers[0], "down", 3)
    assert "lacks model.safetensors" in outcome(lambda copy: (copy / "model.safetensors").unlink())
    index = "model.safetensors.index.json"
    assert "names no shards" in outcome(lambda copy: (copy / index).write_text("[" * 100_000))


def test_weights_that_overflow_their_scales_are_refused(tmp_path, capsys):
    model = build("olmoe")
    model.model.layers[1].mlp.experts.down_proj.data[3] *= 1e8
    model.save_pretrained(tmp_path / "model")
    moe = MoEModel(model, name=str(tmp_path / "model"))
    bitmap = bitmap_of(moe, MENU, np.full(moe.spec.num_experts, 3), tmp_path)
    bitmap.write(tmp_path / "bitmap.json")
    said = refused(capsys, tmp_path / "bitmap.json", "--out", tmp_path / "out")
    assert "Weights of expert 3 of model.layers.1.mlp.experts, up to" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [0, 3, 9])
def test_experts_stored_together_must_be_as_many_as_the_configuration_says(count, saved, tmp_path):
    folder, _ = saved("gpt_oss")
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = torch.cat([tensors[name]] * 2)[:count]
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"other shapes .*{name}: \({count}, 16, 32\), not \(8"):
        Checkpoint(str(tmp_path / "copy"))


def test_an_expert_of_another_shape_is_refused_where_it_is_read(saved, tmp_path):
    folder, _ = saved("olmoe")
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    for name in [one for one in tensors if "down_proj" in one]:
        tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(str(tmp_path / "copy"))
    experts = source.moe.containers[0]
    with pytest.raises(InputError, match=r"other shapes .*: \(16, 32\), not \(32, 16\)"):
        source.expert(experts, "down", 0)
    with pytest.raises(InputError, match="other shapes"):
        source.parameter(f"{experts.path}.down_proj")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--threads", "100000", "--threads 100000 makes no sense; give 1 to 1,024"),
        ("--threads", str(2**40), "makes no sense; give 1 to 1,024"),
        ("--max-shard-size", "1e300", "--max-shard-size is 1e+300; give a positive number of GB"),
        ("--max-memory", "nan", "--max-memory is nan; give a positive number of GB"),
    ],
)
def test_numbers_of_no_sense_are_refused(option, value, message, reference, tmp_path, capsys):
    folder, _ = reference
    said = refused(capsys, folder / "bitmap.json", "--out", tmp_path / "out", f"{option}={value}")
    assert message in said
