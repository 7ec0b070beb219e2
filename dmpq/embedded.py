"""The default text: the running interpreter's own standard library, split by module name.

Every Python installation carries 10 MB or more of real text, so a run needs no download. Code is
the source files; prose is their docstrings and the topics of ``pydoc``. A document's side
depends only on a hash of its top-level module's name: a module keeps its side when it becomes a
package, in every interpreter, and the reference checkpoint has seen the ``train`` side alone.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Final, Literal, get_args

Side = Literal["train", "calibration", "heldout"]
Kind = Literal["code", "prose"]

_TRAIN_SHARE: Final = 0.76
_CALIBRATION_SHARE: Final = 0.12
_CODE_SHARE: Final = 0.45
"""Share of files that give their code where each gives one of both: the prose is then about 15% of
the text, as among all documents of a side."""
_TABLES: Final = frozenset({"encodings", "pydoc_data", "this", "antigravity"})
"""Generated tables and jokes, whose bytes are no natural text (``pydoc_data`` enters as prose)."""
_TEST_FOLDERS: Final = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """One file of the standard library, or the prose taken from it.

    Attributes:
        module: Top-level module that the text belongs to; decides the side.
        path: POSIX path below the standard library's folder.
        kind: ``"code"`` or ``"prose"``.
        text: The text itself.
    """

    module: str
    path: str
    kind: Kind
    text: str


def side_of(module: str) -> Side:
    """Return the side of a top-level module, from the SHA-256 of its name alone."""
    position = _position(module)
    if position < _TRAIN_SHARE:
        return "train"
    return "calibration" if position < _TRAIN_SHARE + _CALIBRATION_SHARE else "heldout"


def _position(name: str) -> float:
    """Return a number in [0, 1) that depends on a name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _source_files(root: Path, module: str) -> list[Path]:
    single = root / f"{module}.py"
    if single.is_file():
        return [single]
    files = (root / module).rglob("*.py")
    return sorted(f for f in files if not _TEST_FOLDERS & set(f.relative_to(root).parts))


def _docstrings(source: str) -> str:
    """Return a module's docstrings, one paragraph each; empty where it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return "\n\n".join(text for text in found if text)


def _pydoc_topics() -> Iterator[Document]:
    if importlib.util.find_spec("pydoc_data") is None:
        return
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document("pydoc_data", f"pydoc_data/topics/{name}", "prose", str(topics[name]))


def _module_documents(root: Path, module: str) -> Iterator[Document]:
    for file in _source_files(root, module):
        text = file.read_text(encoding="utf-8", errors="replace")
        path = file.relative_to(root).as_posix()
        yield Document(module, path, "code", text)
        prose = _docstrings(text)
        if prose:
            yield Document(module, path, "prose", prose)


@lru_cache(maxsize=3)
def side_documents(side: Side) -> tuple[Document, ...]:
    """Return the documents of one side, in a fixed order.

    Only modules that the interpreter itself calls standard are read, so that what a distribution
    adds beside them does not enter.
    """
    root = Path(sysconfig.get_path("stdlib"))
    standard = sys.stdlib_module_names - _TABLES - _TEST_FOLDERS
    modules = [m for m in sorted(standard) if not m.startswith("_sysconfigdata")]
    found = [d for m in modules if side_of(m) == side for d in _module_documents(root, m)]
    if side_of("pydoc_data") == side:
        found.extend(_pydoc_topics())
    return tuple(found)


def texts_told_once(side: Side) -> list[str]:
    """Return one side's texts such that no passage stands in two of them.

    A docstring stands in its file's code, too: windows of both, in different roles, would share
    it. So a file gives either its code or its docstrings, by a hash of its path.
    """
    documents = side_documents(side)
    paths = {kind: {d.path for d in documents if d.kind == kind} for kind in get_args(Kind)}
    with_both = paths["code"] & paths["prose"]
    return [
        document.text
        for document in documents
        if document.path not in with_both
        or (document.kind == "code") == (_position(document.path) < _CODE_SHARE)
    ]


def differs_from_card() -> tuple[int, int]:
    """Return how many held-out modules differ from those of the reference model's card, of all.

    The card's figures belong to one interpreter; another one's library has other text.
    """
    file = resources.files("dmpq.reference") / "heldout_modules.json"
    card: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    here = fingerprint("heldout")
    names = card.keys() | here.keys()
    return sum(card.get(name) != here.get(name) for name in names), len(names)


def fingerprint(side: Side) -> dict[str, str]:
    """Return, for each module of ``side``, the SHA-256 of its text in this interpreter."""
    digests: dict[str, hashlib._Hash] = {}
    for document in side_documents(side):
        digest = digests.setdefault(document.module, hashlib.sha256())
        digest.update(document.text.encode("utf-8", errors="replace"))
    return {module: digest.hexdigest() for module, digest in digests.items()}
