import sys

from dmpq.embedded import documents, fingerprint, side_documents, side_of


def test_sides_are_disjoint_and_together_everything():
    sides = {side: side_documents(side) for side in ("train", "calibration", "heldout")}
    modules = [{d.module for d in docs} for docs in sides.values()]
    assert not modules[0] & modules[1]
    assert not modules[0] & modules[2]
    assert not modules[1] & modules[2]
    assert sum(map(len, sides.values())) == len(documents())


def test_a_module_keeps_its_side_whatever_else_is_installed():
    assert side_of("json") == "train"
    assert side_of("unittest") == "calibration"
    assert side_of("typing") == "heldout"


def test_there_is_code_and_prose_on_every_side():
    for side in ("train", "calibration", "heldout"):
        assert {d.kind for d in side_documents(side)} == {"code", "prose"}


def test_only_the_standard_library_is_read():
    assert {d.module for d in documents()} <= sys.stdlib_module_names
    assert not any("/test/" in d.path or "/tests/" in d.path for d in documents())


def test_fingerprint_names_every_module_of_a_side():
    assert set(fingerprint("heldout")) == {d.module for d in side_documents("heldout")}
