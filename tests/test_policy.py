"""Saved policies: what they propose, and what a damaged one is met with."""

from __future__ import annotations

import dataclasses
import json
import stat

import numpy as np
import pytest
from factories import make_problem

from dmpq.agents.policy import CONFIG_FILE, Policy
from dmpq.agents.ppo import PPOAgent
from dmpq.errors import InputError


@pytest.fixture(scope="module")
def problem():
    return make_problem()


@pytest.fixture(scope="module")
def policy(problem):
    result = PPOAgent(learning_rate=0.05).search(problem, evaluations=40, seed=0)
    return result.policy


def test_untrained_policy_proposes_the_knapsacks_map(problem):
    result = PPOAgent().search(problem, evaluations=1, seed=0)
    assert (result.policy.propose(problem) == problem.mckp()).all()


def test_round_trip(problem, policy, tmp_path):
    policy.save(tmp_path / "policy")
    again = Policy.load(tmp_path / "policy")
    assert again.config == policy.config
    assert again.training == policy.training
    assert np.any(policy.log_importance(problem) != 0)
    assert (again.log_importance(problem) == policy.log_importance(problem)).all()


def test_saving_again_leaves_one_pair_of_files_that_anyone_may_read(policy, tmp_path):
    other = Policy(policy.config, {k: v + 1 for k, v in policy.weights.items()}, {})
    other.save(tmp_path)
    policy.save(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".json", ".safetensors"]
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 for file in files)
    first = [file.read_bytes() for file in files]
    policy.save(tmp_path)
    assert [file.read_bytes() for file in files] == first


def test_proposes_for_other_budgets_and_models(policy):
    for other in (make_problem(avg_bits=4.0), make_problem(layers=3, experts=5)):
        proposal = policy.propose(other)
        assert proposal.shape == (other.num_decisions,)
        assert other.feasible(proposal[None]).all()


def test_another_model_of_the_same_size_does_not_get_the_embedding(problem, policy):
    other = dataclasses.replace(
        problem, profile=dataclasses.replace(problem.profile, fingerprint="another")
    )
    weights = dict(policy.weights) | {"embedding": np.zeros_like(policy.weights["embedding"])}
    without = dataclasses.replace(policy, weights=weights)
    assert (policy.log_importance(other) == without.log_importance(problem)).all()
    assert (policy.log_importance(other) != policy.log_importance(problem)).any()


def test_other_menu_is_refused(policy):
    with pytest.raises(InputError, match="trained to choose among"):
        policy.propose(make_problem(bits="2,4,16"))


def _edit(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _config(folder, **changes):
    config = json.loads((folder / CONFIG_FILE).read_text())["config"]
    _edit(folder, config=config | changes)


def _weights(folder):
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), "no policy at"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "not JSON"),
        (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), "not JSON"),
        (lambda f: (f / CONFIG_FILE).write_text(" " * (2 << 20)), "larger than"),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), "schema None"),
        (lambda f: _edit(f, schema="dmpq.policy/9"), "dmpq.policy/9"),
        (lambda f: _edit(f, sha256="../../etc/passwd"), "no SHA-256"),
        (lambda f: _edit(f, sha256="0" * 64), "not there"),
        (lambda f: _edit(f, config=3), "no policy description"),
        (lambda f: _config(f, hidden=-1), "hidden is -1"),
        (lambda f: _config(f, hidden=10**9), "hidden is"),
        (lambda f: _config(f, hidden=7), "do not fit"),
        (lambda f: _config(f, more=1), "wrong fields: more"),
        (lambda f: _config(f, log_scale="x"), "no policy description"),
        (lambda f: _weights(f).unlink(), "not there"),
        (lambda f: _weights(f).write_bytes(b"\0" * 100), "SHA-256"),
    ],
)
def test_damaged_policies_are_refused_in_one_sentence(policy, tmp_path, damage, words):
    policy.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=words):
        Policy.load(tmp_path)


def test_weights_that_are_not_finite_are_refused(policy, tmp_path):
    Policy(policy.config, {k: v * np.nan for k, v in policy.weights.items()}, {}).save(tmp_path)
    with pytest.raises(InputError, match="not finite"):
        Policy.load(tmp_path)
