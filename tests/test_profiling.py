"""Measured profiles against definitions computed the slow way."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import build
from torch.nn import functional

from dmpq.bank import Bank
from dmpq.evaluation import SurrogateEvaluator
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator, expert_share
from dmpq.moe import MoEModel
from dmpq.profile import Profile
from dmpq.profiling import measure_profile

MENU = Menu.parse("2g16,4g16,16")


@pytest.fixture(scope="module")
def measured(tiny, token_ids):
    evaluator = ModelEvaluator(
        Bank(tiny(), MENU), token_ids.numpy(), label="profile", batch_tokens=64
    )
    return evaluator, measure_profile(evaluator, text="random", projections=True)


def test_frequencies_are_what_the_router_selects(measured, token_ids):
    evaluator, profile = measured
    moe = evaluator.bank.moe
    seen = []

    def hook(_module, args, _output):
        seen.append(args[1])

    handles = [c.module.register_forward_hook(hook) for c in moe.containers]
    with torch.inference_mode():
        moe.logits(token_ids)
    for handle in handles:
        handle.remove()
    counts = np.concatenate([np.bincount(i.flatten(), minlength=8) for i in seen])
    assert profile.hits.tolist() == counts.tolist()
    assert profile.frequency == pytest.approx(counts / token_ids.numel())
    per_layer = profile.frequency.reshape(2, 8).sum(1)
    assert per_layer == pytest.approx(np.full(2, moe.spec.moe_layers[0].top_k))


def test_sensitivity_is_the_kl_with_one_expert_changed(measured):
    evaluator, profile = measured
    changed = np.full((1, 16), 2)
    changed[0, 5] = 0
    assert evaluator.evaluate(changed).kl[0] == profile.sensitivity[5, 0]
    assert (profile.sensitivity[:, 2] == 0).all()
    assert (profile.sensitivity[:, 0] > profile.sensitivity[:, 1])[profile.hits > 0].all()


def test_without_full_precision_the_widest_map_is_the_floor(tiny, token_ids):
    evaluator = ModelEvaluator(
        Bank(tiny(), Menu.parse("2g16,4g16")), token_ids.numpy(), label="narrow"
    )
    profile = measure_profile(evaluator, text="random")
    assert profile.sensitivity[:, 1].tolist() == [0.0] * 16
    widest = np.full((1, 16), 1)
    assert SurrogateEvaluator(profile).evaluate(widest).kl[0] == evaluator.evaluate(widest).kl[0]


def test_projection_sensitivity_changes_one_projection(measured):
    evaluator, profile = measured
    changed = np.full((1, 32), 2)
    changed[0, 2 * 5 + 1] = 0
    assert evaluator.evaluate(changed).kl[0] == profile.projection_sensitivity[5, 1, 0]


def test_contribution_is_the_mean_absolute_gradient_at_an_experts_output(measured, token_ids):
    """Perturb one expert's output by hand: its last-layer bias would have this gradient."""
    evaluator, profile = measured
    moe = evaluator.bank.moe
    last = moe.containers[-1]
    kept = {}

    def forward(module, hidden, index, weights):
        one_hot = functional.one_hot(index, 8).float()
        outputs = torch.stack(
            [
                functional.linear(
                    module._apply_gate(functional.linear(hidden, last.gate_up[e])), last.down[e]
                )
                for e in range(8)
            ],
            dim=1,
        ).requires_grad_()
        outputs.retain_grad()
        kept.update(outputs=outputs, index=index)
        mixed = (one_hot * weights[..., None]).sum(1)
        return (outputs * mixed[..., None]).sum(1)

    from transformers.integrations.moe import grouped_mm_experts_forward

    forwards = [grouped_mm_experts_forward] * (len(moe.containers) - 1) + [forward]
    with torch.enable_grad(), moe.experts_forward(forwards):
        logits = moe.logits(token_ids)
        functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum"
        ).backward()
    gradient = kept["outputs"].grad.abs().mean(-1)
    for expert in range(8):
        used = (kept["index"] == expert).any(-1)
        if used.any():
            expected = float(gradient[used, expert].mean())
            assert profile.contribution[8 + expert] == pytest.approx(expected, rel=1e-3)


def test_output_errors_fall_with_bits_and_vanish_at_full_precision(measured):
    _, profile = measured
    hit = profile.hits > 0
    assert (profile.output_error[hit, 0] > profile.output_error[hit, 1]).all()
    assert (profile.output_error[:, 2] == 0).all()
    assert (profile.proxy[hit, 0] > 0).all()


def test_weight_statistics_are_those_of_the_weights(measured):
    evaluator, profile = measured
    first = evaluator.bank.moe.containers[0]
    up, down = first.gate_up[3], first.down[3]
    flat = torch.cat([up.flatten(), down.flatten()]).double()
    assert profile.weight_norm[3] == pytest.approx(float(flat.norm()))
    assert profile.max_row_variance[3] == pytest.approx(
        float(up.double().var(dim=1, unbiased=False).max())
    )
    assert profile.router_norm[3] == pytest.approx(float(first.router[3].double().norm()))
    assert np.isnan(profile.router_norm_change).all()


def test_experts_that_are_never_hit_are_listed_and_cost_nothing(tiny, token_ids):
    """Two tokens select at most four of a layer's eight experts."""
    evaluator = ModelEvaluator(Bank(tiny(), MENU), token_ids.numpy()[:1, :2], label="short")
    profile = measure_profile(evaluator, text="two tokens")
    assert profile.unhit.size >= 8
    assert (profile.sensitivity[profile.unhit] == 0).all()
    assert (profile.output_error[profile.unhit] == 0).all()
    assert np.isfinite(profile.contribution).all()


def test_a_measured_profile_survives_its_file(tmp_path, measured):
    """What measuring returns may be strided views, which safetensors would write wrongly."""
    _, profile = measured
    path = tmp_path / "profile.safetensors"
    profile.save(path)
    again = Profile.load(path)
    for field in dataclasses.fields(Profile):
        value = getattr(profile, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, field.name), value, err_msg=field.name)


def test_an_expert_of_zeros_is_profiled_like_any_other(token_ids):
    moe = MoEModel(build("olmoe"), name="pruned")
    moe.containers[0].gate_up[0].zero_()
    moe.containers[0].down[0].zero_()
    evaluator = ModelEvaluator(Bank(moe, MENU), token_ids.numpy(), label="p", batch_tokens=64)
    profile = measure_profile(evaluator, text="random")
    assert (profile.sensitivity[0] == 0).all()
    assert (profile.kurtosis[0], profile.outlier_ratio[0]) == (0.0, 1.0)


@pytest.fixture(scope="module")
def estimated(tiny, token_ids):
    evaluator = ModelEvaluator(
        Bank(tiny(), MENU), token_ids.numpy(), label="profile", batch_tokens=64
    )
    profile = measure_profile(evaluator, text="random", projections=True, signal="gradient")
    return evaluator, profile


def test_gradients_estimate_sensitivities_in_one_pass(measured, estimated, token_ids):
    _, exact = measured
    evaluator, profile = estimated
    assert profile.signal == "gradient"
    assert exact.signal == "sensitivity"
    assert evaluator.tokens_spent == 0, "no map is evaluated"
    assert (profile.sensitivity == profile.proxy / 2).all()
    assert profile.uniform_kl == pytest.approx(profile.sensitivity.sum(0))
    assert profile.full_nll == pytest.approx(exact.full_nll, rel=1e-5)
    share = expert_share(profile.spec)
    assert profile.cost_tokens == token_ids.numel() * (3 + 9 * share)
    for name in ("hits", "frequency", "routing_weight", "output_error", "proxy"):
        assert getattr(profile, name) == pytest.approx(getattr(exact, name)), name


def test_gradients_tell_projections_apart(estimated):
    evaluator, profile = estimated
    bank, expert = evaluator.bank, 3
    layer, total = bank.layers[0], 0.0
    moe = bank.moe
    kept = []

    def forward(module, hidden, index, weights):
        up, down = layer.variant(expert, 0)[0], layer.variant(expert, None)[1]
        error = []
        for weight in (up, layer.variant(expert, None)[0]):
            inner = module._apply_gate(functional.linear(hidden, weight))
            error.append(functional.linear(inner, down))
        share = torch.where(index == expert, weights, 0).sum(-1, keepdim=True)
        output = grouped_mm_experts_forward(module, hidden, index, weights).requires_grad_()
        kept.append((output, (error[0] - error[1]) * share))
        return output

    from transformers.integrations.moe import grouped_mm_experts_forward

    for ids in evaluator.id_batches:
        forwards = [forward] + [grouped_mm_experts_forward] * (len(moe.containers) - 1)
        with torch.enable_grad(), moe.experts_forward(forwards):
            logits = moe.logits(ids)
            functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).backward()
        output, error = kept.pop()
        total += float((output.grad * error.detach()).square().sum())
    found = profile.projection_sensitivity[expert, 0, 0]
    assert found > 0
    assert found == pytest.approx(total / evaluator.tokens / 2, rel=1e-3)


def test_estimates_without_full_precision_are_above_the_widest(tiny, token_ids):
    evaluator = ModelEvaluator(
        Bank(tiny(), Menu.parse("2g16,4g16")), token_ids.numpy(), label="narrow"
    )
    profile = measure_profile(evaluator, text="random", signal="gradient")
    assert profile.sensitivity[:, 1].tolist() == [0.0] * 16
    assert profile.sensitivity[:, 0] == pytest.approx(np.diff(profile.proxy[:, ::-1])[:, 0] / 2)
    widest = np.full((1, 16), 1)
    assert SurrogateEvaluator(profile).evaluate(widest).kl[0] == pytest.approx(
        profile.proxy[:, 1].sum() / 2
    )


def test_progress_of_gradients_is_told_in_batches(tiny, token_ids):
    evaluator = ModelEvaluator(
        Bank(tiny(), MENU), token_ids.numpy(), label="profile", batch_tokens=64
    )
    seen = []
    measure_profile(
        evaluator, text="random", signal="gradient", progress=lambda *done: seen.append(done)
    )
    count = len(evaluator.id_batches)
    assert seen == [(i + 1, count) for i in range(count)]
