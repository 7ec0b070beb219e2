"""Routers in training: logits in float32 from every family, and the losses that balance them."""

import math

import pytest
import torch
from families import build_tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dmpq.errors import InputError
from dmpq.training.routing import Routers, balance_loss, utilisation, z_loss

FAMILIES = ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "switch_transformers"]
EXPERTS = 4
IDS = torch.randint(2, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def build(family):
    return build_tiny(family).requires_grad_(True)


def run(model, ids=IDS):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, use_cache=False, **extra).logits


def own_logits(model, routers):
    """Run the model; return what each router module itself says, by the family's own code."""
    said = []

    def note(module, inputs, output):
        parts = output if isinstance(output, tuple) else (output,)
        said.append(next(p for p in parts if p.is_floating_point() and p.shape[-1] == EXPERTS))

    blocks = [model.get_submodule(path.rpartition(".")[0]) for path in routers.paths]
    children = [dict(block.named_children()) for block in blocks]
    gates = [one.get("gate", one.get("router")) for one in children]
    gates = [dict(gate.named_children()).get("classifier", gate) for gate in gates]
    hooks = [gate.register_forward_hook(note) for gate in gates]
    run(model)
    for hook in hooks:
        hook.remove()
    return [one.reshape(-1, EXPERTS) for one in said]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_logits_are_the_router_s_own(family):
    model = build(family)
    routers = Routers(model)
    assert routers.unwatched == ()
    own = own_logits(model, routers)
    for block in (torch.no_grad(), torch.enable_grad()):
        with block, routers.recording() as logits:
            run(model)
            assert len(logits) == len(routers.paths)
            for layer in logits:
                assert layer.dtype == torch.float32
                assert layer.shape == (IDS.numel(), EXPERTS)
            for layer, said in zip(logits, own, strict=True):
                torch.testing.assert_close(layer, said, rtol=0, atol=0)
    run(model)
    assert len(logits) == len(routers.paths)  # nothing is recorded after the block


@pytest.mark.parametrize("family", FAMILIES)
def test_every_loss_reaches_every_router_and_the_experts_keep_their_gradient(family):
    model = build(family)
    routers = Routers(model)
    with routers.recording() as logits:
        loss = run(model).square().mean()
    (loss + balance_loss(logits, 2) + z_loss(logits)).backward()
    weights = [p for n, p in model.named_parameters() if ".experts." in n and p.ndim > 1]
    assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in weights)
    for path in routers.paths:
        block = model.get_submodule(path.rpartition(".")[0])
        routed = [p for n, p in block.named_parameters() if n.startswith(("gate.", "router."))]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routed)


def own_outputs(model, routers, autocast):
    """Return the dtype of what the routers' own forwards return, with and without their block."""
    kinds = set()

    def note(module, inputs, output):
        parts = output if isinstance(output, tuple) else (output,)
        kinds.update(p.dtype for p in parts if p.is_floating_point())

    hooks = [router.whole.register_forward_hook(note) for router in routers._routers]
    with autocast:
        run(model)
    for hook in hooks:
        hook.remove()
    return kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_stay_in_float32_under_autocast(family):
    model = build(family).requires_grad_(False)
    routers = Routers(model)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast, routers.recording() as logits:
        run(model)
    assert {layer.dtype for layer in logits} == {torch.float32}
    with routers.in_float32():
        assert own_outputs(model, routers, autocast) == {torch.float32}
        with autocast, routers.recording() as inside:
            run(model)
    assert {layer.dtype for layer in inside} == {torch.float32}
    assert all("forward" not in vars(router.whole) for router in routers._routers)
    if family == "mixtral":  # the control: without the block, autocast reaches its logits
        assert torch.bfloat16 in own_outputs(model, routers, autocast)


def test_selections_in_float32_are_those_of_recorded_logits_under_autocast():
    model = build("mixtral").requires_grad_(False)
    routers = Routers(model)
    chosen = []
    hooks = [
        router.whole.register_forward_hook(lambda m, i, output: chosen.append(output[2]))
        for router in routers._routers
    ]
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        routers.in_float32(),
        routers.recording() as logits,
    ):
        run(model)
    for hook in hooks:
        hook.remove()
    for layer, index in zip(logits, chosen, strict=True):
        assert torch.equal(layer.topk(2).indices, index)


def test_a_router_s_half_precision_weights_are_refused():
    routers = Routers(build("mixtral").bfloat16())
    with pytest.raises(InputError, match=r"router's weight beside .* is torch.bfloat16"):
        routers.in_float32().__enter__()


def test_a_dense_model_has_no_routers():
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
    )
    with pytest.raises(InputError, match="'llama' has no router"):
        Routers(AutoModelForCausalLM.from_config(config))


def test_a_container_without_a_single_matrix_is_named():
    model = build("mixtral")
    first = model.model.layers[0].mlp
    first.gate = nn.Sequential(nn.Linear(2, 2))
    assert Routers(model).unwatched == ("model.layers.0.mlp.experts",)
    assert Routers(model).paths == ("model.layers.1.mlp.experts",)


LOGITS = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [math.log(3.0), 0.0]])
"""Three tokens of probabilities (1/4, 3/4), (1/4, 3/4), (3/4, 1/4)."""


def test_balance_loss_by_hand():
    # f = (1/3, 2/3), P = (5/12, 7/12): 2 * (5/36 + 14/36)
    torch.testing.assert_close(balance_loss([LOGITS], 1), torch.tensor(38 / 36))
    # with both chosen f is uniform, and the loss is 1 whatever P
    torch.testing.assert_close(balance_loss([LOGITS], 2), torch.tensor(1.0))
    # the last token out: f = (0, 1), P = (1/4, 3/4)
    mask = torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(balance_loss([LOGITS], 1, mask=mask), torch.tensor(1.5))
    # the mean over layers, not the loss of the pooled: two that collapse in turn are not balanced
    left, right = torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]])
    torch.testing.assert_close(
        balance_loss([left, right], 1), torch.tensor(2.0), rtol=1e-6, atol=0
    )


def test_z_loss_by_hand():
    one = math.log(4.0) ** 2
    torch.testing.assert_close(z_loss([LOGITS]), torch.tensor(one))
    two = math.log(2.0) ** 2
    both = [LOGITS, torch.zeros(3, 2)]
    torch.testing.assert_close(z_loss(both), torch.tensor((one + two) / 2))
    masks = [torch.tensor([True, False, False]), torch.tensor([False, False, False])]
    torch.testing.assert_close(z_loss(both, mask=masks), torch.tensor(one / 2))


def test_utilisation_by_hand():
    assert utilisation([LOGITS, LOGITS], 1).tolist() == [[1, 2], [1, 2]]
    assert utilisation([LOGITS], 2).tolist() == [[3, 3]]
    assert utilisation([LOGITS], 1, torch.tensor([0, 1, 1])).tolist() == [[1, 1]]


def test_balance_loss_takes_probability_from_the_favourite():
    logits = LOGITS.clone().requires_grad_(True)
    balance_loss([logits], 1).backward()
    assert (logits.grad[:, 1] > 0).all()
    assert (logits.grad[:, 0] < 0).all()


def test_no_token_that_counts_makes_a_loss_of_zero_with_a_gradient():
    logits = LOGITS.clone().requires_grad_(True)
    nobody = torch.zeros(3)
    loss = balance_loss([logits], 1, mask=nobody) + z_loss([logits], mask=nobody)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance_loss([], 1), "no router logits"),
        (lambda: z_loss([]), "no router logits"),
        (lambda: balance_loss([LOGITS], 3), "top_k is 3 of 2 experts"),
        (lambda: balance_loss([LOGITS], 0), "top_k is 0 of 2 experts"),
        (
            lambda: z_loss([LOGITS], mask=torch.ones(4)),
            "mask is of 4 tokens, and the router read 3",
        ),
        (lambda: z_loss([LOGITS], mask=[torch.ones(3)] * 2), "2 masks for 1 layers"),
        (lambda: utilisation([LOGITS, torch.zeros(3, 4)], 1), "2, 4 experts"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call()
