"""Checkpoints that are never loaded: forward, gradients and profile are those of the model."""

import numpy as np
import pytest
import torch
from families import build_tiny
from torch.nn import functional

from dmpq.bank import Bank
from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.streamed_model import StreamedModel
from dmpq.checkpoints.streamed_profile import BATCH_TOKENS, streamed_profile
from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import MoEModel
from dmpq.profiling import measure_profile
from dmpq.session import Session

FAMILIES = [
    "mixtral",
    "gpt_oss",
    "qwen2_moe",
    "deepseek_v3",
    "nemotron_h",
    "granitemoe",
    "glm4_moe",
    "gemma4_text",
]
ARRAYS = (
    "hits",
    "routing_weight",
    "contribution",
    "sensitivity",
    "output_error",
    "proxy",
    "uniform_kl",
    "weight_norm",
    "kurtosis",
    "outlier_ratio",
    "max_row_variance",
    "router_norm",
)


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """A tiny model, loaded and as a checkpoint."""
    model = build_tiny(request.param)
    model.save_pretrained(tmp_path / "model")
    return MoEModel(model, name="whole"), Checkpoint(str(tmp_path / "model"))


def token_ids(*shape):
    return torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(0))


def test_logits_are_the_model_s_and_nothing_stays(pair):
    moe, source = pair
    ids = token_ids(3, 12)
    streamed = StreamedModel(source)
    with torch.no_grad(), streamed.streaming():
        got = source.moe.logits(ids)
    with torch.no_grad():
        # an expert's outputs are added up one by one, not as a sum over slots
        assert torch.allclose(got, moe.logits(ids), atol=1e-5, rtol=1e-5)
    small = [p for c in source.moe.containers for p in c.module.parameters(recurse=False)]
    left = [p for p in streamed.model.parameters() if p.device.type != "meta"]
    assert all(any(p is one for one in small) for p in left)


def test_profiles_are_those_of_the_loaded_model(pair):
    moe, source = pair
    menu = Menu.parse("0,2g8,4g8,16")
    windows = token_ids(6, 16).numpy()
    whole = measure_profile(
        ModelEvaluator(Bank(moe, menu), windows, label="profile"), text="x", signal="gradient"
    )
    streamed = streamed_profile(source, menu, windows, text="x")
    assert streamed.fingerprint == whole.fingerprint
    assert streamed.signal == "gradient"
    assert streamed.cost_tokens == whole.cost_tokens
    assert streamed.full_nll == pytest.approx(whole.full_nll, rel=1e-6)
    for name in ARRAYS:
        own, wanted = getattr(streamed, name), getattr(whole, name)
        scale = np.abs(wanted).max() or 1.0
        assert np.allclose(own / scale, wanted / scale, atol=1e-4), name


def test_the_reference_model_s_profile_is_the_same_to_the_bit():
    session = Session(
        SearchConfig(
            signal="gradient",
            profile_tokens=512,
            search_tokens=128,
            selection_tokens=0,
            further_tokens=0,
            heldout_tokens=128,
        )
    )
    windows = session.splits.profile
    assert windows.size <= BATCH_TOKENS
    whole = session.profile()
    streamed = streamed_profile(
        Checkpoint("reference"), session.menu, windows, text=whole.text, drawn=whole.drawn
    )
    for name in ARRAYS:
        assert np.array_equal(getattr(streamed, name), getattr(whole, name)), name
    assert streamed.spec == whole.spec
    assert streamed.full_nll == whole.full_nll


def test_gradients_reach_the_routing_weights(pair):
    """The backward pass that reads experts again is the derivative of the forward pass."""
    moe, source = pair
    ids = token_ids(2, 10)

    def slopes(model, forwards):
        outputs = []

        def noting(record):
            def hook(_module, _inputs, output):
                output.retain_grad()
                record.append(output)

            return hook

        embed = model.get_input_embeddings()
        kept = [
            embed.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_()),
            embed.register_forward_hook(noting(outputs)),
        ]
        try:
            with forwards, torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits.float()
                loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
        finally:
            for handle in kept:
                handle.remove()
        return outputs[0].grad

    streamed = StreamedModel(source)
    got = slopes(source.moe.model, streamed.streaming())
    wanted = slopes(moe.model, torch.enable_grad())
    assert torch.allclose(got, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-3)


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    model = build_tiny("mixtral")
    model.get_output_embeddings().weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    with pytest.raises(InputError, match="a loss that is not finite"):
        streamed_profile(source, Menu.parse("4g8"), token_ids(2, 8).numpy(), text="x")
