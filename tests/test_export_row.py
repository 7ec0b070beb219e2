import json

import pytest

from dmpq.bitmap import BitMap
from dmpq.config import SearchConfig
from dmpq.engines.preflight import broken_rules
from dmpq.engines.rules import engine_named
from dmpq.search import main
from dmpq.validate import main as validate

QUICK = [
    "--agent=mckp",
    "--profile-tokens=256",
    "--search-tokens=256",
    "--selection-tokens=256",
    "--heldout-tokens=512",
    "--bits=2,4,16",
    "--avg-bits=3.5",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One search, asked for without an engine and then for two: the later ones resume it."""
    out = tmp_path_factory.mktemp("rows") / "run"
    summaries = {}
    for engine in (None, "mlx", "transformers"):
        option = [] if engine is None else [f"--engine={engine}"]
        assert main([*QUICK, f"--out={out}", *option]) == 0
        summaries[engine] = json.loads((out / "summary.json").read_text())
    return out, summaries


@pytest.mark.parametrize("name", ["mlx", "transformers"])
def test_the_table_has_a_row_of_the_nearest_map_before_the_agent_s(runs, name):
    out, summaries = runs
    plain, rows = summaries[None]["rows"], summaries[name]["rows"]
    assert [row["name"] for row in rows[-2:]] == [f"{name}: nearest", "mckp"]
    assert rows[:-2] + rows[-1:] == plain
    nearest = BitMap.read(out / f"bitmap.{name}.json")
    assert broken_rules(engine_named(name), nearest) == []
    assert rows[-2]["effective_bits"] <= rows[-1]["effective_bits"]
    assert rows[-2]["heldout_kl"] > 0


def test_the_row_is_what_validate_measures(runs, capsys):
    out, summaries = runs
    data = json.loads((out / "bitmap.transformers.json").read_text())
    assert data["quantizer"]["symmetric"]
    row = summaries["transformers"]["rows"][-2]
    data["metrics"]["measured"] = {
        "heldout_kl": {"value": row["heldout_kl"], "unit": "nats/token"},
        "memory": {"value": row["memory_bytes"], "unit": "bytes"},
    }
    path = out / "claimed.json"
    path.write_text(json.dumps(data))
    capsys.readouterr()
    assert validate([str(path)]) == 0
    assert capsys.readouterr().out.count("  ok  ") == 3


def test_an_engine_is_no_part_of_what_a_run_is():
    assert SearchConfig(engine="vllm").digest() == SearchConfig().digest() == "0c5ddf7895ca"


def test_an_unknown_engine_ends_with_two_and_one_line(capsys, tmp_path):
    assert main([*QUICK, "--engine=vlm", f"--out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'vllm'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
