"""Sparse upcycling: a dense model becomes one of experts, and stays what it was at step 0."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import transformers
from families import build_tiny
from test_apply import bitmap_of, evaluated
from test_tasks import LABELS, rows_of, tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
)

import dmpq.hf
from dmpq.bank import Bank
from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.packed import PackedExperts
from dmpq.checkpoints.quantized import QuantizedCheckpoint
from dmpq.dense_families import FAMILIES
from dmpq.errors import InputError
from dmpq.experts import interface_containers
from dmpq.families import auto_class, find_containers
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.models import main as models_command
from dmpq.moe import HEADS as HEADS_OF_TASKS
from dmpq.moe import MoEModel, load_model, reference_path
from dmpq.tasks.evaluator import TaskEvaluator
from dmpq.tasks.examples import Examples, TaskBatch
from dmpq.tasks.splits import TASKS, encoder_of
from dmpq.training.routing import Routers
from dmpq.training.upcycle import upcycle
from dmpq.upcycled import MODEL_TYPE, UpcycledConfig, within_capacity

assert dmpq.hf.METHOD
MENU = Menu.parse("2g8,3g8,8g8,16")
IDS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
LAYERS = 3
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
OTHER_NAMES = {
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": LAYERS,
    "n_heads": 2,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 64,
    "rotary_dim": 8,
    "num_layers": LAYERS,
    "num_heads": 2,
    "attention_types": [[["global"], LAYERS]],
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "ffn_hidden_size": 48,
    "embedding_size": 32,
    "cls_token_id": 2,
    "sep_token_id": 1,
    "global_attn_every_n_layers": 2,
}
"""The same and more under the names of single families."""
ENCODERS = {"distilbert", "modernbert"} | {
    family for family, where in FAMILIES.items() if where.up == "intermediate.dense"
}
ROUNDING = {"rtol": 0, "atol": 1e-5}
"""Routing weights sum to 1 up to float32's rounding, and a sum of k parts rounds k times more; on
logits of size 1 to 10 that is some 1e-6."""


def dense(family, auto=None, **options):
    """Return a tiny random dense model, biases drawn too, so that losing one would show."""
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[family]
    names = {field.name for field in dataclasses.fields(kind)}
    values = {k: v for k, v in (TINY | OTHER_NAMES).items() if k in names}
    config = kind(**values | options)
    default = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    model = (auto or default).from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def run(model, ids=IDS):
    """Return all that a model answers, one tensor after the other."""
    with torch.no_grad():
        output = model(input_ids=ids)
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


def assert_same(one, other, **tolerance):
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, **(tolerance or ROUNDING))


def put_apart(model):
    """Draw routers and experts that differ, as training would; returns the model."""
    generator = torch.Generator().manual_seed(1)
    routed = [f"{one.path.rpartition('.')[0]}." for one in interface_containers(model)]
    for name, parameter in model.named_parameters():
        if any(name.startswith(path) for path in routed):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_at_step_0_the_model_computes_what_the_dense_one_does(family):
    model = dense(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = upcycle(model, experts=4, top_k=2)
    assert len(find_containers(sparse)) == LAYERS
    assert_same(run(sparse), run(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the dense model is left as it is
    with torch.no_grad():
        for container in interface_containers(sparse):
            container.parameters[1].zero_()
    assert not torch.allclose(run(sparse)[0], run(model)[0])  # the experts are what runs


@pytest.mark.parametrize("top_k", [1, 3])
def test_any_number_of_choices_sums_to_the_dense_block(top_k):
    model = dense("bert")
    assert_same(run(upcycle(model, experts=3, top_k=top_k)), run(model))


@pytest.mark.parametrize(
    ("family", "layers", "options", "kind"),
    [
        ("llama", None, {}, "MixtralForCausalLM"),
        ("mistral", None, {"sliding_window": 4}, "MixtralForCausalLM"),
        ("llama", None, {"attention_bias": True}, "UpcycledForCausalLM"),
        ("llama", None, {"mlp_bias": True}, "UpcycledForCausalLM"),
        ("llama", [1], {}, "UpcycledForCausalLM"),
        ("mistral", [0, 2], {"sliding_window": 4}, "UpcycledForCausalLM"),
        ("qwen3", None, {}, "Qwen3MoeForCausalLM"),
        ("qwen3", [0, 2], {"attention_bias": True}, "Qwen3MoeForCausalLM"),
        (
            "qwen3",
            [1],
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "UpcycledForCausalLM",
        ),
        ("gemma2", [1], {"sliding_window": 4}, "UpcycledForCausalLM"),
    ],
)
def test_an_existing_architecture_is_taken_where_it_fits(family, layers, options, kind):
    model = dense(family, **options)
    sparse = upcycle(model, experts=4, top_k=2, layers=layers)
    assert type(sparse).__name__ == kind
    assert len(find_containers(sparse)) == (LAYERS if layers is None else len(layers))
    assert_same(run(sparse), run(model))


HEADS = [
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
]


@pytest.mark.parametrize(
    ("family", "auto"),
    [("bert", auto) for auto in HEADS]
    + [
        (family, auto)
        for family in ("llama", "qwen3", "gpt2")
        for auto in HEADS
        if auto is not AutoModelForMaskedLM
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_head_carries_over_and_loads_again(family, auto, tmp_path):
    labels = {} if auto in HEADS[:3] or auto is HEADS[5] else {"num_labels": 5}
    model = dense(family, auto, **labels)
    sparse = upcycle(model, experts=4, top_k=2, noise=0.1)
    sparse.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(sparse)
    assert_same(run(upcycle(model, experts=4, top_k=2)), run(model))
    assert_same(run(loaded), run(sparse))
    if labels:
        assert loaded.config.num_labels == 5


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_bit_for_bit(family, dtype, tmp_path):
    model = dense(family).to(dtype)
    sparse = put_apart(upcycle(model, experts=4, top_k=2, layers=[0, 2])).to(dtype)
    sparse.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    loaded, report = auto.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.to_diff_dict() == sparse.config.to_diff_dict()
    mine, theirs = sparse.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


def test_a_base_model_s_weights_load_under_a_new_head(tmp_path):
    sparse = upcycle(dense("bert", AutoModel), experts=4, top_k=2, noise=0.1)
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7).eval()
    assert loaded.classifier.out_features == 7
    assert_same(run(loaded.bert), run(sparse))


def test_only_the_chosen_layers_are_converted():
    model = dense("roberta")
    sparse = upcycle(model, experts=4, top_k=2, layers=[2, 0])
    assert sparse.config.moe_layers == [0, 2]
    paths = [one.path for one in find_containers(sparse)]
    assert paths == [f"roberta.encoder.layer.{i}.output.dense.experts" for i in (0, 2)]
    own, given = sparse.state_dict(), model.state_dict()
    kept = "roberta.encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(own[kept], given[kept])
    assert kept.replace(".1.", ".0.") not in own


def test_noise_tells_the_copies_apart_and_is_seeded():
    model = dense("gpt2")

    def experts(**options):
        sparse = upcycle(model, experts=4, top_k=2, **options)
        return [one.down for one in interface_containers(sparse)], sparse.state_dict()

    for layer in experts()[0]:
        assert torch.equal(layer, layer[:1].expand_as(layer))
    downs, weights = experts(noise=0.2, seed=3)
    for index, layer in enumerate(downs):
        own = model.transformer.h[index].mlp.c_proj.weight.detach().T
        relative = (layer - own).std(dim=(1, 2)) / own.std()
        # 1536 draws tell a standard deviation to 2%
        torch.testing.assert_close(relative, torch.full_like(relative, 0.2), rtol=0.1, atol=0)
        assert len({one.sum().item() for one in layer}) == len(layer)
    again = experts(noise=0.2, seed=3)[1]
    assert all(torch.equal(weights[name], value) for name, value in again.items())
    other = experts(noise=0.2, seed=4)[1]
    assert not torch.equal(
        weights["transformer.h.0.mlp.c_proj.gate.weight"],
        other["transformer.h.0.mlp.c_proj.gate.weight"],
    )


def test_router_std_is_that_of_the_routers():
    sparse = upcycle(dense("bert"), experts=32, top_k=2, router_std=0.5)
    weight = sparse.bert.encoder.layer[0].output.dense.gate.weight
    assert math.isclose(weight.std().item(), 0.5, rel_tol=0.1)


def test_the_capacity_goes_to_first_choices_and_tokens_in_order():
    index = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    taken = within_capacity(index, 3, 2)
    # expert 0: first choices of tokens 0 and 1; expert 1: of token 3, then second of token 0
    assert taken.tolist() == [[True, True], [True, False], [False, True], [True, False]]
    assert within_capacity(index, 3, 4).all()


def test_a_capacity_factor_drops_in_training_and_only_over_the_capacity():
    model = dense("opt", dropout=0.0)
    ample = upcycle(model, experts=4, top_k=2, capacity_factor=2.0)  # E / k: room for all
    scarce = upcycle(model, experts=4, top_k=2, capacity_factor=0.25)
    assert_same(run(ample.train()), run(model))
    assert_same(run(scarce.eval()), run(model))
    assert not torch.allclose(run(scarce.train())[0], run(model)[0], atol=1e-3)

    block = scarce.model.decoder.layers[0].fc2.train()
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = block(hidden)
        _, _, index = block.gate(hidden)
    capacity = math.ceil(0.25 * 64 * 2 / 4)
    kept = within_capacity(index, 4, capacity)
    assert torch.bincount(index[kept], minlength=4).max() <= capacity
    nobody = ~kept.any(1)
    assert nobody.any()
    assert torch.equal(out[nobody], torch.zeros_like(out[nobody]))  # the residual passes it on
    assert (out[~nobody].abs().sum(1) > 0).all()


def test_a_capacity_factor_survives_saving(tmp_path):
    sparse = upcycle(dense("llama"), experts=4, top_k=2, capacity_factor=1.25)
    assert sparse.config.model_type == MODEL_TYPE
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].mlp.capacity_factor == 1.25


def test_every_weight_trains_and_the_loss_falls():
    sparse = upcycle(dense("bert"), experts=4, top_k=2).train()
    labels = IDS.clone()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = sparse(input_ids=IDS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            missing = [n for n, p in sparse.named_parameters() if p.grad is None]
        optimizer.step()
        losses.append(loss.item())
    assert missing == []
    assert losses[-1] < 0.5 * losses[0]
    down = interface_containers(sparse)[0].down
    assert not torch.equal(down[0], down[1])


def test_the_registered_router_is_in_float32_under_autocast():
    sparse = upcycle(dense("bert"), experts=4, top_k=2)
    said = []
    gate = sparse.bert.encoder.layer[0].output.dense.gate
    hook = gate.register_forward_hook(lambda module, inputs, output: said.append(output))
    routers = Routers(sparse)
    with torch.autocast("cpu", dtype=torch.bfloat16), routers.recording() as logits:
        run(sparse)
    hook.remove()
    assert said[0][0].dtype == said[0][1].dtype == torch.float32
    assert torch.equal(said[0][0], logits[0])


@pytest.mark.parametrize("family", ["bert", "gpt2", "distilbert", "modernbert", "gemma"])
def test_packed_checkpoints_give_the_evaluator_s_logits(family, tmp_path):
    model = put_apart(upcycle(dense(family), experts=4, top_k=2, layers=[0, 2]))
    own = run(model)[0]
    model.save_pretrained(tmp_path / "model")
    moe = MoEModel(model, name=str(tmp_path / "model"))
    assert moe.spec.moe_layers[0].gated == FAMILIES[family].gated
    full = np.full(moe.spec.num_experts, len(MENU) - 1)
    assert torch.equal(evaluated(moe, MENU, full, IDS), own)

    evaluator = ModelEvaluator(Bank(moe, MENU), IDS.numpy(), label="random")
    narrow = np.zeros_like(full)
    answers = evaluator.evaluate(np.stack([full, narrow]))
    assert answers.kl[0] == 0.0
    assert answers.kl[1] > 0.0

    drawn = np.random.default_rng(0).integers(len(MENU), size=moe.spec.num_experts)
    source = Checkpoint(str(tmp_path / "model"))
    made = QuantizedCheckpoint(bitmap_of(moe, MENU, drawn, tmp_path), source)
    made.write(tmp_path / "out", card="")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == made.num_bytes
    loaded = auto_class(model.config).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is type(model)
    assert sum(isinstance(one, PackedExperts) for one in loaded.modules()) == 2
    assert torch.equal(run(loaded)[0], evaluated(moe, MENU, drawn, IDS))


@pytest.mark.parametrize("task", ["classification", "token-classification", "question-answering"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2"])
def test_tasks_are_measured_on_it(family, task):
    """The evaluator's batches, padded, against the slow twin: one example a forward."""
    named = dict(enumerate(LABELS[task])) or {0: "start", 1: "end"}
    labels = {"id2label": named, "label2id": {name: i for i, name in named.items()}}
    model = dense(family, HEADS_OF_TASKS[TASKS[task].head], **labels)
    model = put_apart(upcycle(model, experts=4, top_k=2))
    moe = MoEModel(model, name="tiny")
    kind = TASKS[task](encoder_of(moe, tokenizer(), longest=None))
    rows = rows_of(task, 8)
    columns = kind.columns(list(rows[0]), text=None, label=None, where="x")
    encoded = [kind.encode({k: row[v] for k, v in columns.items()}) for row in rows]
    bank = Bank(moe, MENU)
    evaluator = TaskEvaluator(bank, Examples(kind, tuple(encoded), 0), label="t")
    narrow = np.zeros(moe.spec.num_experts, int)
    full = np.full_like(narrow, len(MENU) - 1)
    found = evaluator.evaluate(np.stack([full, narrow]))
    assert found.kl[0] == 0.0
    kl = []
    for example in encoded:
        batch = TaskBatch.of(kind, [example], pad=0, device=torch.device("cpu"))
        with torch.inference_mode():
            p = batch.logits(moe).log_softmax(-1)
            bank.choose(np.zeros((1, len(narrow), 2), int))
            with bank.attached():
                q = batch.logits(moe).log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
    # fp32 sums in another order, and other numbers of rows in each product
    assert found.kl[1] == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.kl[1] > 0


def test_a_classifier_loads_as_one_in_every_command(tmp_path):
    model = upcycle(
        dense("bert", AutoModelForSequenceClassification), experts=4, top_k=2, noise=0.1
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reference_path()).save_pretrained(tmp_path)
    moe, _ = load_model(str(tmp_path), head="sequence classification")
    assert type(moe.model) is type(model)
    assert_same(run(moe.model), run(model))
    assert type(Checkpoint(str(tmp_path)).moe.model) is type(model)
    with pytest.raises(InputError, match="AutoModelForMaskedLM builds no model of the dense fam"):
        AutoModelForMaskedLM.from_config(upcycle(dense("opt"), experts=4, top_k=2).config)


def test_the_geometry_is_that_of_the_weights(tmp_path):
    model = upcycle(dense("opt"), experts=4, top_k=2, layers=[1])
    model.save_pretrained(tmp_path)
    spec = MoEModel(model, name="tiny").spec
    (layer,) = spec.moe_layers
    assert (layer.num_experts, layer.top_k, layer.gated) == (4, 2, False)
    assert (layer.hidden_size, layer.intermediate_size) == (32, 48)
    everything = sum(one.numel() for one in model.parameters())
    assert spec.expert_parameters + spec.other_parameters == everything
    config = json.loads((tmp_path / "config.json").read_text())
    told = type(spec).from_config(config, name="tiny")
    assert told.moe_layers[0].expert_parameters == layer.expert_parameters
    assert len(told.moe_layers) == 1


def test_a_model_of_experts_can_start_from_scratch():
    values = TINY | {"model_type": "bert", "hidden_act": "relu"}
    names = {field.name for field in dataclasses.fields(BertConfig)} | {"model_type"}
    values = {key: value for key, value in values.items() if key in names}
    config = UpcycledConfig(dense=values, num_experts=4, num_experts_per_tok=1, num_labels=5)
    assert (config.experts_gated, config.intermediate_size, config.hidden_act) == (
        False,
        48,
        "relu",
    )
    model = AutoModelForTokenClassification.from_config(config)
    assert len(find_containers(model)) == LAYERS
    assert run(model)[0].shape == (*IDS.shape, 5)
    spec = type(MoEModel(model, name="x").spec).from_config(config.to_dict(), name="tiny")
    assert [layer.intermediate_size for layer in spec.moe_layers] == [48] * LAYERS


def test_a_decoder_generates_what_the_dense_one_does():
    model = dense("qwen2")
    sparse = upcycle(model, experts=4, top_k=2)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(sparse.generate(IDS, **options), model.generate(IDS, **options))


def test_the_trainer_sees_the_dense_family_s_arguments():
    import inspect

    model = dense("bert", AutoModelForSequenceClassification)
    sparse = upcycle(model, experts=4, top_k=2)
    assert inspect.signature(sparse.forward) == inspect.signature(model.forward)


def test_models_show_tells_of_a_folder(tmp_path, capsys):
    upcycle(dense("bert"), experts=4, top_k=2).save_pretrained(tmp_path)
    assert models_command(["show", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "dmpq_upcycled (UpcycledForMaskedLM)" in said
    assert "3 x bert.encoder.layer.N.output.dense.experts" in said
    assert "4 x 48 x 32 (experts, out, in)" in said


def test_missing_experts_are_drawn_not_left_as_memory_was(tmp_path):
    from safetensors.torch import load_file, save_file

    sparse = upcycle(dense("bert"), experts=4, top_k=2)
    sparse.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    left = {n: v for n, v in load_file(file).items() if "layer.0.output.dense" not in n}
    save_file(left, file, metadata={"format": "pt"})
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    block = loaded.bert.encoder.layer[0].output.dense
    for weight in (block.gate.weight, block.experts.up_proj, block.experts.down_proj):
        assert math.isclose(weight.std().item(), 0.02, rel_tol=0.3)
    assert block.experts.up_proj_bias.abs().max() == 0.0
    AutoTokenizer.from_pretrained(reference_path()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks \d of its weights"):
        load_model(str(tmp_path))


def test_what_is_drawn_is_drawn_once():
    sparse = upcycle(dense("bert"), experts=4, top_k=2, noise=0.1)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    sparse.initialize_weights()
    assert all(torch.equal(before[name], value) for name, value in sparse.state_dict().items())


def options(**changed):
    return {"experts": 4, "top_k": 2} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 5}, "top_k is 5, of 4 experts; give a number from 1 to 4"),
        ({"top_k": 0}, "top_k is 0"),
        ({"experts": 1, "top_k": 1}, "experts is 1; give 2 or more"),
        ({"layers": [0, 3]}, "layers names layer 3, and the model has 3 layers; give some of 0"),
        ({"layers": [-1]}, "layers names layer -1"),
        ({"layers": []}, "layers names no layer"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"router_std": float("inf")}, "router_std is inf"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0; give a positive number"),
    ],
)
def test_options_out_of_range_are_refused_in_one_sentence(changed, message):
    with pytest.raises(InputError, match=message):
        upcycle(dense("bert"), **options(**changed))


def test_models_that_cannot_be_upcycled_are_refused_in_one_sentence():
    with pytest.raises(InputError, match="'mixtral' is a Mixture-of-Experts model already"):
        upcycle(build_tiny("mixtral"), **options())
    sparse = upcycle(dense("bert"), **options())
    with pytest.raises(InputError, match="'dmpq_upcycled' is a Mixture-of-Experts model already"):
        upcycle(sparse, **options())
    albert = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=2,
    )
    with pytest.raises(InputError, match=r"Unknown dense family 'albert'.*choose one of: bert, "):
        upcycle(AutoModel.from_config(albert), **options())
    with pytest.raises(InputError, match="BertForPreTraining has a head that does not carry over"):
        upcycle(
            BertForPreTraining(
                BertConfig(**{k: TINY[k] for k in list(TINY)[:3]}, num_attention_heads=2)
            ),
            **options(),
        )


def test_a_configuration_that_no_model_can_be_built_by_is_refused():
    with pytest.raises(InputError, match="Unknown dense family 'albert'"):
        UpcycledConfig(dense={"model_type": "albert"}, moe_layers=[0])
    known = {"dense": dense("bert").config}
    with pytest.raises(InputError, match="selects 3 of 2 experts per token"):
        AutoModel.from_config(UpcycledConfig(**known, num_experts=2, num_experts_per_tok=3))
    with pytest.raises(InputError, match="puts experts into layer 3 of 3"):
        AutoModel.from_config(UpcycledConfig(**known, moe_layers=[3]))
    config = AutoConfig.for_model(MODEL_TYPE)
    with pytest.raises(InputError, match="names no dense model"):
        AutoModelForCausalLM.from_config(config)
