"""The package as installed: layout, imports, files, README and notebook."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dmpq", "envs", "agents", "hw_models")


def python_files():
    return [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(part.is_symlink() for part in path.parents)
    ]


def test_the_owner_s_folders_are_real_and_linked_into_the_package():
    for name in ("envs", "agents", "hw_models"):
        assert not (ROOT / name).is_symlink()
        link = ROOT / "dmpq" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_every_package_folder_is_listed_for_the_wheel():
    import tomllib

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for path in python_files():
        if path.name == "__init__.py":
            parts = path.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "dmpq" else ("dmpq", *parts)))
    assert set(config["packages"]) == found


@pytest.mark.parametrize("module", ["dmpq", "dmpq.envs", "dmpq.envs.joint"])
def test_importing_registers_environments_and_loads_no_torch(module):
    code = (
        f"import {module}, sys, gymnasium as gym;"
        "assert 'dmpq/ExpertBits-v0' in gym.registry;"
        "heavy = {'torch', 'transformers', 'stable_baselines3', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FLOORS = [
    {
        "errors",
        "quantizer",
        "formats",
        "json_checks",
        "files",
        "checkpoints.heap",
        "overrides",
        "revision",
        "checkpoints.tensor_files",
        "engines.rules",
        "installed",
        "threads",
        "dense_families",
        "upcycled",
    },
    {"hf_config"},
    {"spec"},
    {"bitmap", "embedded"},
    {"hw_models"},
    {"experts"},
    {"adapters"},
    {"families"},
    {"quantization", "moe", "data", "replay", "pruning"},
    {"ebss"},
    {"batches", "calibration"},
    {"bank", "checkpoints.checkpoint", "checkpoints.packed", "exporters"},
    {"hf"},
    {"checkpoints.quantized", "checkpoints.model_card", "checkpoints.memory_probe"},
    {
        "checkpoints.expert_sums",
        "profile",
        "evaluation",
        "model_evaluator",
        "further_text",
        "profiling",
        "curvature",
    },
    {"tasks", "harness"},
    {"checkpoints.streamed_model", "checkpoints.streamed_record"},
    {"checkpoints.streamed_profile"},
    {"solvers.knapsack", "solvers.launches", "solvers.local_search", "objective"},
    {"decisions", "features", "referee.contest", "engines.preflight"},
    {"solvers.relaxation"},
    {"solvers.projection"},
    {"solvers.limits"},
    {"problem", "shadow_prices"},
    {"envs", "session", "config", "checks"},
    {"agents"},
    {"testing", "report", "console", "guard", "run_folder", "hardware.loop", "provenance"},
    {"engines.row"},
    {"training"},
    {"hardware.files", "hardware.tables", "referee.referee"},
    {"referee.standings"},
    {
        "hardware.explain",
        "hardware.fit",
        "hardware.measure",
        "referee.report",
        "front",
        "sweep_report",
        "additivity",
    },
    {
        "search",
        "validate",
        "apply",
        "stream",
        "hardware.__main__",
        "compare",
        "pretrain",
        "sweep",
        "export",
        "train",
    },
    {"models"},
]


def floor_of(module):
    """Return the floor of a module, which is its room's where the whole room stands on one."""
    own = module.removeprefix("dmpq.")
    found = [i for i, names in enumerate(FLOORS) if {own, own.split(".")[0]} & names]
    assert len(found) == 1, f"{module} stands on no floor, or on two: mend FLOORS"
    return found[0]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "dmpq" else ("dmpq", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(tree):
    """Return the modules of ours that a module needs to be read: all but those of functions.

    What is imported under TYPE_CHECKING counts: two files that need each other's types are one.
    """
    ours = {module_name(path) for path in python_files()}
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dmpq":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in ours else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("dmpq."))


def import_graph():
    graph = {
        module_name(path): set(imported_by(ast.parse(path.read_text()))) for path in python_files()
    }
    # The package's own front door imports its rooms, never the other way round.
    return {name: needs - {"dmpq"} for name, needs in graph.items()}


def test_imports_only_go_down():
    for module, needs in import_graph().items():
        if module in {"dmpq", "dmpq.reference"}:
            continue
        for other in needs:
            assert floor_of(other) <= floor_of(module), f"{module} imports {other}"


def test_no_two_files_need_each_other():
    graphlib.TopologicalSorter(import_graph()).prepare()


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("from dmpq import features\nfrom dmpq.problem import Problem", ["features", "problem"]),
        ("if TYPE_CHECKING:\n    from dmpq.problem import Problem", ["problem"]),
        ("import dmpq.spec", ["spec"]),
        ("def late():\n    from dmpq.session import Session", []),
        ("import numpy\nfrom torch import nn", []),
    ],
)
def test_the_import_test_reads_every_import(source, modules):
    assert list(imported_by(ast.parse(source))) == [f"dmpq.{module}" for module in modules]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("index", range(2))
def test_the_readme_s_examples_run(index, tmp_path):
    code = blocks((ROOT / "README.md").read_text(), "python")[index]
    assert len(code.strip().splitlines()) <= 20
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()


def test_nothing_opens_a_pickle():
    own = (path for path in python_files() if "testing" not in path.parts)
    for path in own:
        text = path.read_text()
        for pattern in (r"\bpickle\.load", r"weights_only=False", r"trust_remote_code=True"):
            assert not re.search(pattern, text), f"{path}: {pattern}"
