"""The sweep over the reward's weights: what it asks for, its front, and the command."""

import shutil

import numpy as np
import pandas as pd
import pytest
from factories import make_problem

from dmpq.agents.policy import Policy
from dmpq.bitmap import BitMap
from dmpq.errors import InputError
from dmpq.objective import Weights
from dmpq.report import Row
from dmpq.sweep import Answer, Sweep, hypervolumes, main, trace
from dmpq.sweep_report import Point, hypervolume, label_of, marked, optimal, table

PURE = Weights(acc=1, lat=0, mem=0, eng=0)
HEAVIER = np.geomspace(1e-3, 1e3, 40).tolist()
QUICK = [
    *("--profile-tokens=256", "--search-tokens=512", "--selection-tokens=128"),
    *("--heldout-tokens=256", "--further-tokens=8192", "--bits=2,4,16", "--threads=1"),
    *("--evaluations=5", "--sweep", "lat=0.1,1"),
]


def test_one_term_varies_and_the_rest_are_as_given():
    swept = Sweep.parse(["lat=0,0.5"], base=Weights(acc=2, lat=9, mem=0.1, eng=0))
    assert swept.weightings == (
        Weights(acc=2, lat=0, mem=0.1, eng=0),
        Weights(acc=2, lat=0.5, mem=0.1, eng=0),
    )
    assert (swept.terms, swept.costs) == (("lat",), ("lat",))


def test_several_are_combined_and_joined_terms_share():
    swept = Sweep.parse(["mem=0,1", "lat+eng=0.1,0.2"], base=PURE)
    assert [(w.mem, w.lat, w.eng) for w in swept.weightings] == [
        (0, 0.1, 0.1),
        (0, 0.2, 0.2),
        (1, 0.1, 0.1),
        (1, 0.2, 0.2),
    ]
    assert swept.costs == ("lat", "mem", "eng")
    assert label_of(swept.weightings[0], swept.terms) == "mem=0\nlat=0.1\neng=0.1"


def test_accuracy_may_vary_where_a_cost_is_weighed():
    swept = Sweep.parse(["acc=0.1,1"], base=Weights(acc=1, lat=0, mem=0.5, eng=0))
    assert swept.costs == ("mem",)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["lat=0.1", "lat=0.2"], "varies lat twice"),
        (["lat+lat=0.1"], "given twice"),
        (["late=0.1"], "did you mean 'lat'"),
        (["lat"], "is no weight"),
        (["lat=0.1,"], "is no weight"),
        (["lat=0.1,0.10"], "one weight twice"),
        (["lat=-1"], "0 or more"),
        (["lat=nan"], "0 or more"),
        (["acc=0.1,1"], "varies no weight but accuracy's"),
        (["lat=" + ",".join(map(str, range(101)))], "101 weightings; give at most 100"),
    ],
)
def test_what_cannot_be_swept_is_refused(parts, words):
    with pytest.raises(InputError, match=words):
        Sweep.parse(parts, base=PURE)


@pytest.mark.parametrize("text", ["acc=1,lat=0.1,mem=0.1,eng=0.1", "acc=1,eng=1e-07", "lat=0.3"])
def test_spelled_weights_are_read_as_they_were(text):
    weights = Weights.parse(text)
    assert Weights.parse(weights.spelled()) == weights
    assert weights.spelled() == text


@pytest.mark.parametrize("term", ["lat", "mem", "eng"])
@pytest.mark.parametrize("avg_bits", [None, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_heavier_weight_never_gives_the_knapsack_a_dearer_map(term, avg_bits, seed):
    """Of two maps, each no worse at its own weight, the heavier's costs no more.

    By the full cost model, launches included: that each is best at its own weight is shown too.
    """
    problem = make_problem(seed=seed, avg_bits=avg_bits, hw="rtx4090")
    swept = Sweep.parse([f"{term}=" + ",".join(map(str, HEAVIER))], base=PURE)
    asked, maps = [], []

    def knapsack(own):
        asked.append(own)
        maps.append(own.mckp())
        return Answer(maps[-1])

    trace(problem, swept, knapsack, name="mckp")
    assert len(maps) == len(HEAVIER)
    every = np.stack(maps)
    for i, own in enumerate(asked):
        rewards = own.evaluate(every).reward
        assert rewards[i] >= rewards.max() - 1e-12
    cost = problem.costs(every)
    column = {"lat": cost.latency_s, "mem": cost.memory_bytes, "eng": cost.energy_j}[term]
    assert (np.diff(column) <= 1e-9 * column[0]).all()
    assert column[-1] < column[0]
    assert (np.diff(problem.surrogate(every).kl) >= -1e-12).all()


def test_an_agent_stands_beside_the_knapsack_and_uniform_maps_come_last():
    problem = make_problem(avg_bits=None, bits="2,4,16")
    swept = Sweep.parse(["mem=0.01,0.03,0.1,0.3,1"], base=PURE)
    points = trace(problem, swept, lambda own: Answer(own.uniform("4"), 7, 3.0), name="fours")
    names = [one.row.name for one in points]
    assert names == ["mckp", "fours"] * 5 + ["uniform 2", "uniform 4", "uniform 16"]
    weights = [one.weights for one in points]
    assert weights[:4:2] == weights[1:4:2] == list(swept.weightings[:2])
    assert weights[10:] == [None] * 3
    fours = points[1]
    assert fours.row.evaluations == 7
    own = Weights(acc=1, lat=0, mem=0.01, eng=0)
    damage = fours.row.heldout_kl / problem.baselines.damage
    memory = fours.row.memory_bytes / problem.baselines.memory_bytes
    assert fours.reward == pytest.approx(-damage - own.mem * memory)
    volumes = hypervolumes(points, swept.costs)
    assert list(volumes) == ["mckp", "fours", "uniform"]
    assert volumes["mckp"] > volumes["uniform"] == volumes["fours"] > 0


def test_only_what_nothing_beats_is_optimal():
    values = np.array([[1.0, 4.0], [2.0, 2.0], [2.0, 3.0], [4.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    assert optimal(values).tolist() == [True, True, False, True, True, False]


def test_the_hypervolume_is_the_area_of_steps():
    uniform = np.array([[10.0, 100.0], [0.0, 200.0]])
    front = np.array([[5.0, 120.0], [2.0, 150.0], [7.0, 160.0]])
    assert hypervolume(front, uniform) == pytest.approx(0.5 * 0.8 + 0.3 * 0.5)
    assert hypervolume(np.array([[11.0, 100.0]]), uniform) == 0
    assert hypervolume(np.array([[5.0, 0.0]]), np.array([[10.0, 0.0], [0.0, 0.0]])) == 0.5


def test_the_table_fits_80_columns_and_marks_the_front():
    from rich.console import Console

    weights = Weights(acc=1, lat=0.03, mem=123.456, eng=0)
    rows = [
        Row("importance", 16.0, 2.34567, 12345.6, 9.99e11, 9.99e-3, 1e5, 9999.0, 64),
        Row("mckp", 16.0, 2.5, 12345.6, 9.99e11, 9.99e-3, 1e5, 9999.0, 64),
    ]
    points = marked([Point(row, weights, -1234.56) for row in rows], ("lat",))
    console = Console(width=80, record=True)
    console.print(table(points, terms=("lat", "mem"), best="importance", caption=""))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    shown = next(line for line in lines if "importance" in line)
    assert "importance *" in shown
    for number in ("16.00", "2.34567", "12345.6", "999.0", "9,990.0", "9,999.0", "-1234.6"):
        assert number in shown.split()
    assert not any("mckp *" in line for line in lines)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("swept") / "run"
    assert main([*QUICK, f"--out={out}"]) == 0
    return out


def test_the_command_writes_the_front(swept):
    flat = pd.read_csv(swept / "sweep.csv")
    assert flat["name"].tolist() == [
        *["mckp", "ppo"] * 2,
        *["uniform 2", "uniform 4", "uniform 16"],
    ]
    assert flat["lat"].dropna().tolist() == [0.1, 0.1, 1, 1]
    assert flat["acc"].dropna().eq(1).all()
    assert flat["reward"].isna().sum() == 3
    assert flat["effective_bits"].iloc[0] > 3.0  # without a limit, the default's neither
    values = flat[["heldout_kl", "latency_s"]].to_numpy()
    assert flat["pareto_optimal"].tolist() == optimal(values).tolist()
    assert (swept / "sweep.png").stat().st_size > 10_000
    maps = {path.name: BitMap.read(path) for path in (swept / "maps").iterdir()}
    assert set(maps) == {"lat-0.1.json", "lat-1.json"}
    heavy = maps["lat-1.json"]
    assert heavy.objective["weights"] == {"acc": 1.0, "lat": 1.0, "mem": 0.0, "eng": 0.0}
    assert heavy.constraints["avg_bits"] is None
    measured = heavy.metrics["measured"]["heldout_kl"]["value"]
    assert measured == flat["heldout_kl"].iloc[3]


def test_the_same_command_goes_on_to_the_same_front(swept, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(swept, again)
    (again / "sweep.csv").unlink()
    shutil.rmtree(again / "maps")
    journal = again / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    assert main([*QUICK, f"--out={again}"]) == 0
    for name in ("sweep.csv", "maps/lat-0.1.json", "maps/lat-1.json"):
        assert (again / name).read_bytes() == (swept / name).read_bytes()
    assert sorted(journal.read_text().splitlines(keepends=True)) == sorted(lines)


def test_another_sweep_is_refused_there(swept, capsys):
    kept = (swept / "sweep.csv").read_bytes()
    assert main([*QUICK[:-1], "lat=0.1,2", f"--out={swept}"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert (swept / "sweep.csv").read_bytes() == kept


def test_one_policy_is_asked_at_every_weighting(swept, tmp_path, capsys):
    from dmpq.search import main as search

    flags = [*QUICK[:-2], f"--profile={swept / 'profile.safetensors'}"]
    assert search([*flags, "--avg-bits=4", f"--out={tmp_path / 'taught'}"]) == 0
    policy = tmp_path / "taught" / "policy"
    assert Policy.load(policy).config.embedding == 8
    capsys.readouterr()
    out = tmp_path / "run"
    asked = [*flags, f"--policy={policy}", "--sweep", "mem=0.1,10", "lat=0,0.1", f"--out={out}"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "mckp 0." in told
    assert "policy 0." in told
    flat = pd.read_csv(out / "sweep.csv")
    policies = flat[flat["name"] == "policy"]
    assert policies["evaluations"].eq(0).all()
    assert policies["memory_bytes"].iloc[2] < policies["memory_bytes"].iloc[0]
    assert len(list((out / "maps").iterdir())) == 4


def test_a_limit_that_is_set_is_kept(swept, tmp_path):
    flags = [*QUICK, "--agent=mckp", f"--profile={swept / 'profile.safetensors'}"]
    assert main([*flags, "--avg-bits=3", f"--out={tmp_path / 'run'}"]) == 0
    flat = pd.read_csv(tmp_path / "run" / "sweep.csv")
    assert flat["name"].tolist()[:2] == ["mckp", "mckp"]
    assert (flat["effective_bits"].iloc[:2] <= 3).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sweep", "late=1"], "did you mean 'lat'"),
        (["--weights=acc=0", "--sweep", "lat=0,1"], "cannot tell maps apart"),
        (["--weights=acc=1,acc=2"], "given twice"),
        (["--agent=nobody"], "Unknown agent"),
        (["--agent=mckp", "--policy=somewhere"], "takes none"),
        (["--policy=nowhere"], "There is no policy at nowhere"),
        (["--avg-bits=1"], "--avg-bits"),
        (["--sweep"], "--sweep"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(flags, words, tmp_path, capsys):
    try:
        code = main([*QUICK, *flags, f"--out={tmp_path / 'run'}"])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()
