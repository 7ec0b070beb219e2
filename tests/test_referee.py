"""The referee on the bundled model: equal tokens, controls, and going on where it was stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dmpq import agents
from dmpq.agents import Recorder
from dmpq.agents.base import FINALISTS
from dmpq.compare import main
from dmpq.config import SearchConfig
from dmpq.envs import make_problem
from dmpq.errors import InputError
from dmpq.evaluation import Evaluations, SurrogateEvaluator
from dmpq.referee.contest import Contest
from dmpq.referee.referee import Group, Plan, entrants

CONFIG = SearchConfig(
    profile_tokens=256,
    search_tokens=1024,
    selection_tokens=256,
    heldout_tokens=512,
    evaluations=6,
    weights="acc=1",
    threads=1,
    bits="2,4,16",
    quantizer="rtn",
)
PLAN = Plan(
    config=CONFIG,
    models=("reference",),
    seeds=(0,),
    contests=(Contest.parse("bits=3"), Contest.parse("rtx4090:bits=4+latency=105%")),
    agents=("ppo", "random", "fisher"),
)


class Metered(SurrogateEvaluator):
    """A surrogate whose answers cost a share of its text, as if they resumed."""

    tokens = 100
    share = 1.0

    def __init__(self, profile):
        super().__init__(profile)
        self.spent = 0.0

    @property
    def tokens_spent(self):
        return self.spent

    def evaluate(self, assignments, *, fidelity=1.0):
        found = super().evaluate(assignments)
        tokens = self.share * fidelity * self.tokens * len(assignments)
        self.spent += tokens
        return Evaluations(found.kl, found.nll, found.router_shift, tokens)


def metered_problem(max_tokens, *, share=1.0, selector=False):
    plain = make_problem()
    evaluator = Metered(plain.profile)
    evaluator.share = share
    chosen = Metered(plain.profile) if selector else None
    return replace(plain, evaluator=evaluator, selector=chosen, max_tokens=max_tokens)


def test_tokens_are_counted_instead_of_evaluations():
    # One forward is kept for the full-precision model until something has been spent.
    recorder = Recorder(metered_problem(550), evaluations=1)
    assert recorder.remaining == 4
    for forwards in range(2, 6):
        problem = metered_problem(100 * forwards)
        result = agents.make("random").search(problem, evaluations=1000, seed=0)
        assert result.evaluations == forwards  # this evaluator needs no full-precision forward
        assert result.tokens == problem.max_tokens


def test_cheaper_evaluations_are_more():
    full = agents.make("random").search(metered_problem(2000), evaluations=1, seed=0)
    half = agents.make("random").search(metered_problem(2000, share=0.5), evaluations=1, seed=0)
    assert full.evaluations < half.evaluations
    assert full.tokens <= 2000
    assert half.tokens <= 2000


def test_the_final_choice_is_kept_back():
    problem = metered_problem(100 * (FINALISTS + 12), selector=True)
    result = agents.make("random").search(problem, evaluations=1, seed=0)
    assert result.evaluations == 11
    assert result.tokens <= problem.max_tokens


def test_screening_takes_its_share_of_the_tokens():
    recorder = Recorder(metered_problem(300), evaluations=1)
    maps = np.random.default_rng(0).integers(0, 5, (9, 64))
    with pytest.raises(agents.OutOfEvaluations):
        recorder.screen(maps, fidelity=0.25)
    recorder.screen(maps[:8], fidelity=0.25)
    assert recorder.remaining == 1


def test_controls_always_run_and_one_map_agents_have_the_larger_profile():
    found = {one.label: one for one in entrants(("ppo", "random", "fisher", "mckp"))}
    assert list(found) == ["mckp", "mckp, small", "ppo", "ppo, rate 0", "random", "fisher"]
    assert [one.larger for one in found.values()] == [True, False, False, False, False, True]
    assert not found["random"].charged
    assert not found["fisher"].charged
    assert found["random"].signal == found["fisher"].signal == found["mckp"].signal
    control = found["ppo, rate 0"].agent
    assert (control.learning_rate, control.imitation, control.probe_share) == (0.0, 0, 0.0)


def test_what_needs_no_sensitivities_has_the_text_that_gradients_pay_for(tmp_path):
    own = replace(CONFIG, further_tokens=2048)
    plan = replace(PLAN, config=own, contests=PLAN.contests[:1], agents=("gemq", "mxmoe"))
    group = Group(plan, "reference", 0, tmp_path)
    found = {one.agent: one for one in group.run()}
    by_label = {one.label: one for one in entrants(plan.agents)}
    gemq, mxmoe = (group.larger_profile(by_label[name]) for name in ("gemq", "mxmoe"))
    assert (gemq.signal, mxmoe.signal) == ("gradient", "sensitivity")
    assert gemq.tokens == 256 + 2048, "all the text that there is"
    assert mxmoe.tokens < gemq.tokens
    assert group.larger_profile(by_label["mckp"]) is mxmoe
    assert gemq.cost_tokens < found["gemq"].tokens < found["gemq"].allowed
    assert len([*tmp_path.rglob("profile-gradient-2304.safetensors")]) == 1


def test_two_of_one_name_are_refused():
    with pytest.raises(InputError, match="name one twice"):
        replace(PLAN, agents=("ppo", "ppo"))
    with pytest.raises(InputError, match="one folder name"):
        replace(PLAN, models=("a/x", "b/x"))
    with pytest.raises(InputError, match="no contests"):
        replace(PLAN, contests=())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    found = list(Group(PLAN, "reference", 0, folder).run())
    return folder, found


def test_every_agent_meets_every_contest_within_what_is_allowed(compared):
    _, found = compared
    labels = [one.label for one in entrants(PLAN.agents)]
    assert [(o.contest, o.agent) for o in found] == [
        (contest.text, label) for contest in PLAN.contests for label in labels
    ]
    assert len({o.allowed for o in found}) == 1
    for one in found:
        assert one.tokens <= one.allowed
        assert one.effective_bits <= (3 if one.contest == "bits=3" else 4)
        assert 0 < one.accuracy < 1
        assert one.curve[-1][0] <= one.tokens
    # Whoever searches spends nearly all; a last evaluation may not fit.
    for one in found:
        if one.agent in {"ppo", "ppo, rate 0", "random"}:
            assert one.tokens > one.allowed - 2 * CONFIG.search_tokens - 9 * 256


def test_what_measures_a_signal_of_its_own_pays_for_no_profile(tmp_path):
    """A Hessian trace takes 99 forwards of its text, a Fisher information 3."""
    own = replace(CONFIG, search_tokens=128, evaluations=130, further_tokens=4096)
    plan = replace(
        PLAN, config=own, contests=PLAN.contests[:1], agents=("hessian-model", "fisher")
    )
    group = Group(plan, "reference", 0, tmp_path)
    found = {one.agent: one for one in group.run()}
    allowed = group.allowed
    assert all(one.tokens <= allowed for one in found.values())
    # 101 and 5 forwards of whole windows of 64 tokens, less what a map resumes; Fisher reads all
    # the text that there is.
    hessian, fisher = 101 * (int(allowed / 101) // 64 * 64), 5 * (128 + 4096)
    assert hessian * 0.99 < found["hessian-model"].tokens <= hessian
    assert fisher * 0.95 < found["fisher"].tokens <= fisher
    short = replace(own, profile_tokens=64, selection_tokens=64, search_tokens=256, evaluations=20)
    poor = replace(plan, config=short)
    with pytest.raises(InputError, match="takes 101 forwards of the search text"):
        list(Group(poor, "reference", 0, tmp_path / "poor").run())


def test_what_has_run_is_not_run_again(compared):
    folder, found = compared
    group = Group(PLAN, "reference", 0, folder)
    assert group.outcomes() == found
    assert list(group.run()) == []
    more = replace(PLAN, agents=(*PLAN.agents, "uniform-fractional"))
    assert [one.label for _, one in Group(more, "reference", 0, folder).missing()] == [
        "uniform-fractional"
    ] * 2


def test_an_interrupted_group_ends_like_an_uninterrupted_one(compared, tmp_path):
    _, found = compared
    plan = replace(PLAN, contests=PLAN.contests[:1], agents=("ppo",))
    running = Group(plan, "reference", 0, tmp_path).run()
    next(running), next(running), next(running)
    running.close()
    rest = list(Group(plan, "reference", 0, tmp_path).run())
    assert [one.agent for one in rest] == ["ppo, rate 0"]
    whole = {o.agent: o for o in found if o.contest == "bits=3"}
    for one in Group(plan, "reference", 0, tmp_path).outcomes():
        assert replace(one, seconds=0.0) == replace(whole[one.agent], seconds=0.0)


def test_accuracy_is_the_share_of_right_guesses(compared):
    folder, _ = compared
    group = Group(PLAN, "reference", 0, folder)
    heldout = group._heldout
    full = np.full((1, 64), 2)
    (found,) = heldout.accuracy(full)
    right = total = 0
    for ids in heldout.id_batches:
        guessed = group.session.moe.logits(ids).argmax(-1)[:, :-1]
        right += (guessed == ids[:, 1:]).sum().item()
        total += guessed.numel()
    assert found == right / total
    assert heldout.accuracy(np.zeros((1, 64), int))[0] < found


def test_a_contest_that_cannot_be_won_is_refused_before_any_is_held(tmp_path):
    contests = (*PLAN.contests, Contest.parse("latency=1%"))
    with pytest.raises(InputError, match="--latency-ms"):
        next(Group(replace(PLAN, contests=contests), "reference", 0, tmp_path).run())


def test_the_command_refuses_what_cannot_be(tmp_path, capsys):
    for options, message in (
        (["--contests", "bit=3"], "Unknown limit 'bit'"),
        (["--agents", "nobody"], "Unknown agent 'nobody'"),
        (["--seeds", "0"], "'0' is no whole number of 1 or more"),
        (["--read"], "holds no outcome yet"),
    ):
        try:
            code = main([*options, f"--out={tmp_path / 'new'}"])
        except SystemExit as stopped:
            code = stopped.code
        assert code == 2
        assert message in capsys.readouterr().err


def test_a_run_of_the_command(tmp_path, capsys):
    options = ["--agents", "frequency", "--contests", "bits=3", "--seeds=1", f"--out={tmp_path}"]
    options += ["--bits=2,4,16", "--quantizer=rtn", "--profile-tokens=256", "--evaluations=2"]
    options += ["--search-tokens=512", "--selection-tokens=256", "--heldout-tokens=512"]
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert "frequency" in shown
    assert max(map(len, shown.partition("wrote ")[0].splitlines())) <= 80
    for name in ("standings.md", "standings.csv", "outcomes.csv", "curves.png", "config.json"):
        assert (tmp_path / name).stat().st_size
    before = (tmp_path / "standings.csv").read_bytes()
    assert main([*options, "--read"]) == 0
    assert (tmp_path / "standings.csv").read_bytes() == before
    assert main([*options, "--evaluations=3"]) == 2
    assert "another configuration" in capsys.readouterr().err
    (line, *_) = (tmp_path / "reference-seed0" / "outcomes.jsonl").read_text().splitlines()
    assert json.loads(line)["agent"] == "mckp"
