"""The final table: it fits a terminal, whatever the costs are."""

import io

import pytest
from factories import make_problem
from rich.console import Console

from dmpq.agents.base import Candidate
from dmpq.report import Row, TaskRow, plane, table


def row(name, scale):
    return Row(
        name=name,
        effective_bits=16.0,
        heldout_kl=12.34567,
        heldout_ppl=123.4567,
        memory_bytes=1e9 * scale,
        latency_s=5e-4 * scale,
        tokens_per_s=2000 / scale,
        energy_j=0.17 * scale,
        evaluations=1,
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 31.0, 1e3, 1e6])
def test_every_number_fits_80_columns_with_its_unit(scale):
    out = io.StringIO()
    rows = [row("frequency", scale), row("uniform8", scale / 3)]
    shown = table(rows, caption="", best="uniform8", marked=["uniform8"])
    Console(file=out, width=80).print(shown)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if "frequency" in line]
    assert len(line.split()) == 8
    assert any("uniform8 *" in line for line in lines)
    assert "…" not in out.getvalue()


def test_units_follow_the_largest_cost():
    out = io.StringIO()
    Console(file=out, width=80).print(table([row("bf16", 1e3)], caption="", best=""))
    units, numbers = out.getvalue().splitlines()[2], out.getvalue().splitlines()[4].split()
    assert units.split() == ["allocation", "bits", "KL", "ppl", "GB", "ms", "/s", "J"]
    assert numbers[-4:] == ["1,000.0", "500.0", "2.00", "170.00"]


@pytest.mark.parametrize("names", [["accuracy", "f1"], ["f1", "precision", "recall"], ["bleu"]])
def test_metrics_of_tasks_fit_80_columns_without_folding_a_name(names):
    out = io.StringIO()
    metrics = dict.fromkeys(names, 100.0)
    rows = [TaskRow.judged(row(name, 1.0), metrics) for name in ("frequency", "uniform8")]
    shown = table(rows, caption="", best="uniform8", marked=["uniform8"])
    Console(file=out, width=80).print(shown)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if "frequency" in line]
    assert line.split().count("100.0" if len(names) == 3 else "100.00") == len(names)
    assert any("uniform8 *" in line for line in lines)
    assert "…" not in out.getvalue()


def test_names_of_one_place_are_written_once_beside_each_other():
    problem = make_problem()
    maps = {"mckp": problem.mckp(), "ppo": problem.mckp(), "narrow": problem.uniform("2")}
    assert (maps["mckp"] != maps["narrow"]).any()
    history = [
        Candidate(
            assignment=one,
            reward=0.0,
            kl=0.1 * i,
            nll=1.0,
            router_shift=0.0,
            effective_bits=3.0,
            feasible=True,
            evaluation=i,
        )
        for i, one in enumerate((maps["mckp"], maps["narrow"]), 1)
    ]
    for axes in plane(problem, history, maps).axes:
        assert sorted(text.get_text() for text in axes.texts) == ["mckp, ppo", "narrow"]
