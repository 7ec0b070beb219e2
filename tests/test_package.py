"""The package as installed: layout, imports, files, README and notebook."""

import ast
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


def test_importing_registers_environments_and_loads_no_torch():
    code = (
        "import dmpq, sys, gymnasium as gym;"
        "assert 'dmpq/ExpertBits-v0' in gym.registry;"
        "heavy = {'torch', 'transformers', 'stable_baselines3', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FLOORS = [
    {"errors", "formats", "files"},
    {"spec"},
    {"bitmap", "embedded"},
    {"hw_models"},
    {"quantization", "moe", "data", "replay"},
    {"bank"},
    {"profile", "evaluation", "model_evaluator", "profiling"},
    {"knapsack", "objective", "features", "problem", "projection"},
    {"envs", "session", "config"},
    {"agents"},
    {"testing", "report", "console", "search", "validate"},
]


def floor_of(module):
    return next(i for i, names in enumerate(FLOORS) if module in names)


def test_imports_only_go_down():
    for path in python_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = parts[1] if parts[0] == "dmpq" else parts[0]
        if own in {"__init__", "reference"}:
            continue
        tree = ast.parse(path.read_text())
        lazy = {
            child
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.If)
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node in lazy:
                continue
            module = node.module or ""
            if module.startswith("dmpq."):
                other = module.split(".")[1]
                assert floor_of(other) <= floor_of(own), f"{path} imports {module}"


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
