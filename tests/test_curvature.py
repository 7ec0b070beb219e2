"""Curvature against derivatives computed the slow way."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch
from torch.nn import functional

from dmpq import agents
from dmpq.bank import Bank
from dmpq.curvature import empirical_fisher, hessian_trace, squared_perturbation
from dmpq.files import JsonLines
from dmpq.formats import Menu
from dmpq.hw_models import load_hardware
from dmpq.model_evaluator import ModelEvaluator
from dmpq.objective import Constraints, Weights
from dmpq.problem import Problem
from dmpq.profiling import measure_profile

MENU = Menu.parse("2g16,4g16,16")


@pytest.fixture(params=["olmoe", "gpt_oss"])
def evaluator(request, tiny, token_ids):
    bank = Bank(tiny(request.param), MENU)
    return ModelEvaluator(bank, token_ids[:4].numpy(), label="curvature", batch_tokens=32)


def nll(moe, ids):
    logits = moe.logits(ids)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradient(moe, ids):
    """Return the gradient of the mean loss with respect to each container's down weights."""
    weights = [c.module.down_proj for c in moe.containers]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            return torch.autograd.grad(nll(moe, ids), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def test_perturbation_is_what_quantizing_changes(evaluator):
    found = squared_perturbation(evaluator.bank)
    layer = evaluator.bank.layers[1]
    pairs = zip(layer.variant(3, 0), layer.variant(3, None), strict=True)
    expected = sum(float((a - b).square().sum()) for a, b in pairs)
    assert found[8 + 3, 0] == pytest.approx(expected, rel=1e-5)
    assert (found[:, 0] > found[:, 1]).all()
    assert (found[:, 2] == 0).all()


def test_fisher_is_the_mean_squared_gradient_of_windows_times_squared_change(evaluator):
    before = evaluator.tokens_spent
    rows = empirical_fisher(evaluator)
    assert evaluator.tokens_spent - before == 3 * evaluator.tokens
    moe = evaluator.bank.moe
    ids = torch.cat(list(evaluator.id_batches))
    squares = [
        torch.stack([g[layer] for g in [gradient(moe, w) for w in ids.split(1)]]).square().mean(0)
        for layer in range(2)
    ]
    down_only = np.zeros(16)
    for n in range(16):
        layer, expert = divmod(n, 8)
        bank = evaluator.bank.layers[layer]
        change = bank.variant(expert, 0)[1] - bank.variant(expert, None)[1]
        square = bank.experts.oriented(squares[layer])[expert]
        down_only[n] = float((change.square() * square).sum())
    hit = down_only > 0
    assert hit.any()
    assert (rows[hit, 0] > down_only[hit]).all()  # gate and up come on top
    for container in moe.containers:
        for parameter in container.parameters:
            assert not parameter.requires_grad
    # Without a change of gate and up, what is left is down's.
    for layer in evaluator.bank.layers:
        exact, own = layer.variant, layer.variant
        layer.variant = lambda e, f, own=own, exact=exact: (exact(e, None)[0], own(e, f)[1])
    assert empirical_fisher(evaluator)[:, 0] == pytest.approx(down_only, rel=1e-4, abs=1e-12)


def test_the_trace_of_all_experts_is_that_of_finite_differences(evaluator):
    """One probe's sum over experts is v^T H v, which the gradients along v show as well."""
    before = evaluator.tokens_spent
    found = hessian_trace(evaluator, probes=1, seed=3)
    assert evaluator.tokens_spent - before == 9 * evaluator.tokens
    moe, step = evaluator.bank.moe, 1e-4
    generator = torch.Generator().manual_seed(3)
    parameters = [p for c in moe.containers for p in c.parameters]
    signs = [
        torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p.dtype) * 2 - 1
        for p in parameters
    ]
    ids = torch.cat(list(evaluator.id_batches))
    exact = [p.data.clone() for p in parameters]
    slopes = []
    for side in (1, -1):
        for parameter, value, sign in zip(parameters, exact, signs, strict=True):
            parameter.data.copy_(value + side * step * sign)
            parameter.requires_grad_(True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(nll(moe, ids), parameters)
        slopes.append(sum(float((g * v).sum()) for g, v in zip(gradients, signs, strict=True)))
    for parameter, value in zip(parameters, exact, strict=True):
        parameter.data.copy_(value)
        parameter.requires_grad_(False)
    expected = (slopes[0] - slopes[1]) / (2 * step)
    assert found.sum() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "measure", [empirical_fisher, lambda evaluator: hessian_trace(evaluator, probes=2, seed=1)]
)
def test_a_journal_knows_what_was_measured(measure, tiny, token_ids, tmp_path, monkeypatch):
    bank, path = Bank(tiny("olmoe"), MENU), tmp_path / "journal.jsonl"

    def measured(rows):
        """Return what is measured on so many windows, what it costs, and the text's name."""
        with closing(JsonLines(path)) as journal:
            windows = token_ids[:rows].numpy()
            evaluator = ModelEvaluator(bank, windows, label="text", journal=journal)
            return measure(evaluator), evaluator.tokens_spent, evaluator.text_key

    expected, spent, text = measured(4)
    line = json.loads(path.read_text())
    damaged = [line | {"values": ["x"]}, line | {"values": [1.0]}, {"text": text}]
    path.write_text("".join(json.dumps(one) + "\n" for one in (*damaged, line)))
    monkeypatch.setattr(torch.autograd, "grad", None)  # nothing can be differentiated again
    again, spent_again, _ = measured(4)
    np.testing.assert_array_equal(again, expected)
    assert spent_again == spent
    with pytest.raises(TypeError):
        measured(3)


@pytest.mark.parametrize("name", ["fisher", "hessian-layer", "hessian-model"])
def test_agents_read_the_model_and_count_it(name, tiny, token_ids):
    evaluator = ModelEvaluator(
        Bank(tiny(), MENU), token_ids[:4].numpy(), label="search", batch_tokens=64
    )
    problem = Problem(
        profile=measure_profile(evaluator, text="random"),
        hardware=load_hardware("a100"),
        cost_spec=evaluator.bank.moe.spec,
        weights=Weights.parse("acc=1"),
        constraints=Constraints(avg_bits=5.0),
        evaluator=evaluator,
    )
    result = agents.make(name).search(problem, evaluations=1, seed=0)
    again = agents.make(name).search(problem, evaluations=1, seed=1)
    assert result.assignment.tolist() == again.assignment.tolist()
    assert problem.effective_bits(result.assignment[None])[0] == pytest.approx(5.0)
    gradients = 3 if name == "fisher" else 3 + 6 * agents.make(name).probes
    assert result.tokens >= gradients * evaluator.tokens
    if name == "fisher":
        values, rows, best = empirical_fisher(evaluator), np.arange(16), problem.mckp()
        own, other = (values[rows, one].sum() for one in (result.assignment, best))
        assert own <= other
