"""The names of quantizers: what is read, how it is written, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.quantizer import Quantizer

CALIBRATED = st.builds(
    Quantizer,
    name=st.just("gptq"),
    tokens=st.integers(1, 10**9),
    affinity=st.booleans(),
    balanced=st.booleans(),
    damping=st.floats(1e-6, 10),
)
WRITING = st.builds(
    Quantizer,
    name=st.just("gptq"),
    tokens=st.none() | st.integers(1, 10**9),
    affinity=st.booleans(),
    ebss=st.just(True),
    beams=st.integers(1, 64),
    tau=st.floats(1e-6, 1e6),
)
PLAIN = st.builds(Quantizer, name=st.sampled_from(["rtn", "hqq"]), rank=st.integers(0, 512))


@settings(deadline=None)
@given(CALIBRATED | WRITING | PLAIN)
def test_what_is_written_is_read(quantizer):
    assert Quantizer.parse(str(quantizer)) == quantizer


def test_one_quantizer_has_one_spelling():
    menu = Menu.parse("4", quantizer=" gptq, balanced ,damping=0.01,tokens=64,affinity")
    assert menu.quantizer == "gptq,tokens=64,affinity,balanced"
    assert menu == Menu.parse("4", quantizer=menu.quantizer)


def test_names_of_before_are_written_as_before():
    assert [str(Quantizer.parse(name)) for name in ("rtn", "hqq")] == ["rtn", "hqq"]
    assert repr(Menu.parse("2")).endswith("quantizer='hqq', symmetric=False)")
    assert str(Quantizer.parse("gptq,ebss,beams=4,tau=1.2")) == "gptq,ebss"
    assert SearchConfig().digest() == "0c5ddf7895ca"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gptqq", "did you mean 'gptq'"),
        ("", "Unknown quantizer ''"),
        ("hqq+8", "'8' is no compensator"),
        ("hqq+lr0", "'lr0' is no compensator"),
        ("hqq+", "'' is no compensator"),
        ("gptq+lr8", "takes no compensator"),
        ("hqq,affinity", "'hqq' is not calibrated and takes no options"),
        ("rtn+lr8,tokens=4", "takes no options"),
        ("gptq,afinity", "did you mean 'affinity'"),
        ("gptq,affinity=1", "takes no value"),
        ("gptq,tokens", "'tokens' is None; give a number"),
        ("gptq,tokens=0", "'tokens' is '0'"),
        ("gptq,tokens=-4", "'tokens' is '-4'"),
        ("gptq,tokens=4,tokens=5", "given twice"),
        ("gptq,balanced", "as in gptq,tokens=4096,balanced"),
        ("gptq,tokens=64,balanced,ebss", "give one of the two"),
        ("gptq,tau=0.1", "give ebss too, as in gptq,ebss,tau=0.1"),
        ("gptq,beams=2", "give ebss too, as in gptq,ebss,beams=2"),
        ("hqq,ebss", "'hqq' is not calibrated"),
        ("gptq,ebss=4", "takes no value"),
        ("gptq,ebss,beams=0", "'beams' is '0'; give a number from 1 to 64"),
        ("gptq,ebss,beams=65", "'beams' is '65'"),
        ("gptq,ebss,tau=0", "'tau' is '0'"),
        ("gptq,ebss,tau=inf", "'tau' is 'inf'"),
        ("gptq,damping=0", "'damping' is '0'"),
        ("gptq,damping=nan", "'damping' is 'nan'"),
        ("gptq,damping", "'damping' is None"),
    ],
)
def test_what_is_no_quantizer_is_refused(text, message):
    for take in (Quantizer.parse, lambda name: SearchConfig(quantizer=name)):
        with pytest.raises(InputError, match=message):
            take(text)
