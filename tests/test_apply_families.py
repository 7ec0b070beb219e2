"""Checkpoints of every family: read expert by expert, packed, loaded by transformers."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, build_tiny, tiny_config
from test_apply import bitmap_of, evaluated
from transformers import AutoTokenizer, Llama4ForConditionalGeneration

from dmpq.bank import Bank
from dmpq.calibration import Calibration
from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.memory_probe import resident_bytes
from dmpq.checkpoints.packed import PackedExperts
from dmpq.checkpoints.quantized import QuantizedCheckpoint
from dmpq.checkpoints.streamed_model import StreamedModel
from dmpq.data import CalibrationText, Draw
from dmpq.errors import InputError
from dmpq.exporters.dequantized import write_dequantized
from dmpq.families import auto_class
from dmpq.formats import Menu
from dmpq.moe import MoEModel, load_model, reference_path

MENU = Menu.parse("2g8,3g8,8g8,16")
TEXT = np.random.default_rng(1).integers(2, 60, (16, 32))
PICTURES = "llama4 with pictures"
ADAPTED = ["dbrx", "llama4", PICTURES, "llama4_text", "nllb-moe", "switch_transformers"]


def build(family):
    if family != PICTURES:
        return build_tiny(family)
    torch.manual_seed(0)
    model = Llama4ForConditionalGeneration(tiny_config("llama4")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a tiny model of a family, once; returns the model and its checkpoint."""
    made = {}

    def save(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("saved") / "model"
            model = build(family)
            model.save_pretrained(folder)
            made[family] = MoEModel(model, name=str(folder)), str(folder)
        return made[family]

    return save


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def drawn(moe, menu, matrices=1):
    return np.random.default_rng(0).integers(len(menu), size=matrices * moe.spec.num_experts)


def written(saved, family, menu, assignment, folder):
    """Write a packed checkpoint into a folder, and return what was written."""
    moe, source = saved(family)
    plain = replace(menu, quantizer="rtn")
    bitmap = bitmap_of(moe, plain, assignment, folder)
    factors = calibration = None
    if menu.method.calibrated:
        factors = Calibration(moe, TEXT, menu.method).factors
        calibration = CalibrationText("random", Draw("0" * 64, TEXT.shape[1], (0,))).to_json()
    bitmap = replace(bitmap, menu=menu, calibration=calibration)
    made = QuantizedCheckpoint(bitmap, Checkpoint(source), factors=factors)
    made.write(folder / "out", card="")
    return made


def load(saved, family, folder, dtype=torch.float32):
    """Load a folder by the class that the family's config names."""
    return auto_class(saved(family)[0].model.config).from_pretrained(folder, dtype=dtype)


@contextmanager
def choosing(bank, assignment):
    """Run a model's experts as a map says while the block lasts."""
    count = bank.moe.spec.num_experts
    with bank.attached():
        bank.choose(np.broadcast_to(assignment.reshape(count, -1), (count, 2))[None])
        yield


def logits_of(model, moe, ids):
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": ids[:, :6], "decoder_input_ids": moe.read(ids)}
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits.float()


@pytest.mark.parametrize("family", [*sorted(FAMILIES), PICTURES])
def test_a_packed_checkpoint_gives_the_evaluator_s_logits(family, tmp_path, ids):
    model = build(family)
    model.save_pretrained(tmp_path / "model")
    moe = MoEModel(model, name=str(tmp_path / "model"))
    assignment = drawn(moe, MENU)
    source = Checkpoint(str(tmp_path / "model"))
    made = QuantizedCheckpoint(bitmap_of(moe, MENU, assignment, tmp_path), source)
    made.write(tmp_path / "out", card="")
    loaded = auto_class(model.config).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded, moe, ids), evaluated(moe, MENU, assignment, ids))


@pytest.mark.parametrize("family", ADAPTED)
@pytest.mark.parametrize(
    ("quantizer", "bits", "matrices"),
    [
        ("hqq", "0,2g8,3g8,8g8,16", 1),
        ("hqq", "2g8,3g8,8g8,16", 2),
        ("rtn", "0,2g8,3g8,8g8", 1),
        ("hqq+lr4", "2g8,3g8,4g8,16", 1),
        ("gptq", "2g8,3g8,8g8", 1),
    ],
    ids=["pruned", "projections", "pruned-rtn", "milo", "gptq"],
)
def test_adapted_families_pack_whatever_the_others_do(
    family, quantizer, bits, matrices, saved, tmp_path, ids
):
    menu = Menu.parse(bits, quantizer=quantizer)
    moe, _ = saved(family)
    assignment = drawn(moe, menu, matrices)
    written(saved, family, menu, assignment, tmp_path)
    bank = Bank(moe, menu, calibration=TEXT if menu.method.calibrated else None)
    with torch.inference_mode(), choosing(bank, assignment):
        wanted = moe.logits(ids)
    assert torch.equal(logits_of(load(saved, family, tmp_path / "out"), moe, ids), wanted)


@pytest.fixture(scope="module")
def mixed(saved, tmp_path_factory):
    """Pack a tiny model of a family under a mixed map, once; returns what was made, and where."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("mixed")
            assignment = drawn(saved(family)[0], MENU)
            done = written(saved, family, MENU, assignment, folder)
            made[family] = done, folder / "out", assignment
        return made[family]

    return make


@pytest.mark.parametrize("family", ADAPTED)
def test_experts_of_adapted_families_stay_packed_in_memory(family, saved, mixed):
    made, folder, _ = mixed(family)
    moe, _ = saved(family)
    loaded = load(saved, family, folder)
    packed = [one for one in loaded.modules() if isinstance(one, PackedExperts)]
    assert len(packed) == len(moe.containers)
    left = sum(p.numel() for p in loaded.parameters())
    everything = sum(p.numel() for p in moe.model.parameters())
    assert everything - left == moe.spec.expert_parameters
    assert all(p.device.type == "cpu" for p in [*loaded.parameters(), *loaded.buffers()])
    stored = sum(one.numel() * one.element_size() for pack in packed for one in pack.buffers())
    chosen = made.bitmap.to_assignment(moe.spec)
    bits = moe.spec.stored_bits(MENU).sum(1)[np.arange(len(chosen)), chosen]
    full = chosen == len(MENU) - 1
    assert stored * 8 == bits[~full].sum() + 2 * bits[full].sum()  # full is float32 here


@pytest.mark.parametrize("family", ADAPTED)
def test_files_of_adapted_families_take_what_is_predicted(family, mixed):
    made, folder, _ = mixed(family)
    assert (folder / "model.safetensors").stat().st_size == made.num_bytes


@pytest.mark.parametrize("family", ADAPTED)
def test_adapted_families_generate_as_the_evaluator_does(family, saved, mixed, ids):
    _, folder, assignment = mixed(family)
    moe, _ = saved(family)
    options = {"max_new_tokens": 12, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    if moe.model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 1
    loaded = load(saved, family, folder)
    torch.manual_seed(0)
    got = loaded.generate(ids, **options)
    assert got[:, -12:].unique().numel() > 12
    torch.manual_seed(0)
    with torch.inference_mode(), choosing(Bank(moe, MENU), assignment):
        assert torch.equal(got, moe.model.generate(ids, **options))


@pytest.mark.parametrize("family", ADAPTED)
def test_a_loaded_adapted_model_is_saved_and_copied(family, saved, mixed, tmp_path, ids):
    _, folder, _ = mixed(family)
    moe, _ = saved(family)
    loaded = load(saved, family, folder)
    wanted = logits_of(loaded, moe, ids)
    copied = copy.deepcopy(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(saved, family, tmp_path / "again"), moe, ids), wanted)
    for buffer in loaded.buffers():
        buffer.zero_()
    assert not torch.equal(logits_of(loaded, moe, ids), wanted)
    assert torch.equal(logits_of(copied, moe, ids), wanted)


@pytest.mark.parametrize("family", ADAPTED)
def test_a_loaded_adapted_model_computes_in_another_float_type(family, saved, mixed, ids):
    _, folder, _ = mixed(family)
    moe, _ = saved(family)
    narrow = load(saved, family, folder, torch.bfloat16)
    scales = [b for name, b in narrow.named_buffers() if name.endswith("scale")]
    assert {one.dtype for one in scales} == {torch.float16}
    logits, wanted = (logits_of(m, moe, ids) for m in (narrow, load(saved, family, folder)))
    assert torch.nn.functional.cosine_similarity(logits, wanted, dim=-1).min() > 0.98


@pytest.mark.parametrize("family", ADAPTED)
def test_adapted_checkpoints_have_the_fingerprint_of_the_model(family, saved):
    moe, folder = saved(family)
    source = Checkpoint(folder)
    assert source.fingerprint() == moe.fingerprint
    source.keep([layer.path for layer in moe.spec.moe_layers])
    for experts, own in zip(moe.containers, source.moe.containers, strict=True):
        for e in range(experts.num_experts):
            assert torch.equal(source.expert(own, "gate_up", e), experts.gate_up[e])
            assert torch.equal(source.expert(own, "down", e), experts.down[e])


@pytest.mark.parametrize("family", [*ADAPTED, "gpt_oss", "olmoe"])
def test_a_dequantized_checkpoint_holds_every_expert(family, saved, tmp_path):
    moe = MoEModel(copy.deepcopy(saved(family)[0].model), name=saved(family)[1])
    assignment = drawn(moe, MENU)
    layers, first, wanted = Bank(moe, MENU).layers, 0, []
    for layer in layers:
        own = assignment[first : first + layer.experts.num_experts]
        wanted.append([layer.variant(e, int(fmt)) for e, fmt in enumerate(own)])
        first += len(own)
    bitmap = bitmap_of(moe, MENU, assignment, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(reference_path())
    write_dequantized(bitmap, moe, tokenizer, tmp_path / "out")
    loaded, _ = load_model(str(tmp_path / "out"))
    for experts, matrices in zip(loaded.containers, wanted, strict=True):
        for e, (up, down) in enumerate(matrices):
            assert torch.equal(experts.gate_up[e], up.bfloat16().float())
            assert torch.equal(experts.down[e], down.bfloat16().float())


@pytest.mark.parametrize("family", ["switch_transformers", "llama4 with pictures"])
def test_a_packed_model_s_memory_is_measured(family, mixed):
    assert resident_bytes(mixed(family)[1]) > 0


@pytest.mark.parametrize("family", ADAPTED)
def test_adapted_families_are_not_streamed(family, saved):
    with pytest.raises(InputError, match="cannot be streamed: load it whole"):
        StreamedModel(Checkpoint(saved(family)[1]))
