import sys

import pytest

from dmpq.embedded import fingerprint, side_documents, side_of, texts_told_once

SIDES = ("train", "calibration", "heldout")


def test_sides_share_no_module():
    modules = [{d.module for d in side_documents(side)} for side in SIDES]
    assert sum(map(len, modules)) == len(set().union(*modules))


def test_a_module_keeps_its_side_whatever_else_is_installed():
    assert side_of("json") == "train"
    assert side_of("unittest") == "calibration"
    assert side_of("typing") == "heldout"


def test_there_is_code_and_prose_on_every_side():
    for side in SIDES:
        assert {d.kind for d in side_documents(side)} == {"code", "prose"}


def test_only_the_standard_library_is_read():
    documents = [d for side in SIDES for d in side_documents(side)]
    assert {d.module for d in documents} <= sys.stdlib_module_names
    assert not any("/test/" in d.path or "/tests/" in d.path for d in documents)


def test_fingerprint_names_every_module_of_a_side():
    assert set(fingerprint("heldout")) == {d.module for d in side_documents("heldout")}


@pytest.mark.parametrize("side", SIDES)
def test_told_once_gives_each_file_once(side):
    documents = side_documents(side)
    texts = texts_told_once(side)
    assert len(texts) == len({document.path for document in documents})
    told = {document.path for document in documents if document.text in texts}
    assert told == {document.path for document in documents}


def test_calibration_told_once_keeps_its_share_of_prose():
    documents = side_documents("calibration")
    prose = {document.text for document in documents if document.kind == "prose"}

    def share(texts):
        return sum(len(text) for text in texts if text in prose) / sum(map(len, texts))

    everything = share([document.text for document in documents])
    assert abs(share(texts_told_once("calibration")) - everything) < 0.08
