"""Options of agents as text: what is read, what is refused, and how agents are told apart."""

import json
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Literal

import pytest

from dmpq import agents
from dmpq.agents.__main__ import main
from dmpq.agents.options import options_of, read_options, shown, split
from dmpq.errors import InputError
from dmpq.guard import label_of, make_agent
from dmpq.referee.referee import entrants

if TYPE_CHECKING:
    from dmpq.profile import Profile


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A base.

    Attributes:
        depth: How deep,
            over two lines; see :func:`dmpq.search.main`.
    """

    name: ClassVar[str] = "parent"
    depth: int = 3


@dataclass(frozen=True, kw_only=True)
class Everything(Parent):
    """Every type that text can give.

    Attributes:
        rate: How ``fast``.

    Raises:
        ValueError: Never.
    """

    needed: float
    rate: float = 0.5
    deep: bool = False
    word: str = "x"
    few: int | None = None
    scope: Literal["layer", "model"] = "layer"
    colour: Colour = Colour.RED
    widths: tuple[int, ...] = (3, 2)
    profile: "Profile | None" = None
    inner: Parent | None = None


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("depth", "-4", -4),
        ("rate", "1e-3", 1e-3),
        ("rate", "2", 2.0),
        ("deep", "True", True),
        ("deep", "false", False),
        ("word", "a=b c", "a=b c"),
        ("few", "none", None),
        ("few", "7", 7),
        ("scope", "model", "model"),
        ("colour", "blue", Colour.BLUE),
        ("widths", "4+3+2", (4, 3, 2)),
        ("widths", "", ()),
    ],
)
def test_text_becomes_what_the_field_is(option, text, value):
    found = read_options(Everything, "mine", {option: text})
    assert found == {option: value}
    assert type(found[option]) is type(value)
    assert read_options(Everything, "mine", {option: shown(value)}) == found


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("depth", "1.5", "'1.5'; give a whole number"),
        ("depth", "1_0", "give a whole number"),
        ("depth", "", "give a whole number"),
        ("rate", "fast", "give a number"),
        ("rate", "nan", "give a number"),
        ("deep", "1", "give true or false"),
        ("few", "many", "a whole number, or none"),
        ("scope", "modle", "give layer or model"),
        ("colour", "RED", "give red or blue"),
        ("widths", "3+x", "several as in 3"),
        ("dept", "1", "did you mean 'depth'"),
        ("name", "x", "has no option 'name'"),
        ("profile", "none", "has no option 'profile'"),
        ("inner", "none", "has no option 'inner'"),
        ("rescore", "1", "cannot be re-scored"),
    ],
)
def test_what_is_no_value_or_no_option_is_refused(option, text, message):
    with pytest.raises(InputError, match=message):
        read_options(Everything, "mine", {option: text})


def test_options_know_their_defaults_and_what_docstrings_say():
    found = options_of(Everything)
    assert [*found] == [
        "depth",
        "needed",
        "rate",
        *["deep", "word", "few", "scope", "colour", "widths"],
    ]
    assert found["depth"].text == "How deep, over two lines; see dmpq.search.main."
    assert found["rate"].text == "How fast."
    assert found["word"].text == ""
    defaults = {name: one.default for name, one in found.items()}
    assert defaults["needed"] is None
    assert (defaults["deep"], defaults["few"], defaults["widths"]) == ("false", "none", "3+2")


@pytest.mark.parametrize("name", agents.names())
def test_every_default_can_be_written(name):
    for option in options_of(agents.find(name)).values():
        assert option.default is not None
        assert option.text, f"{option.name} of {name} is not described"
        assert shown(option.read(option.default)) == option.default


@pytest.mark.parametrize("text", ["ppo,samples", "ppo,", "ppo,=3", "ppo,samples=8,"])
def test_a_part_that_is_no_option_is_refused(text):
    with pytest.raises(InputError, match="is no option of 'ppo'"):
        split(text)


def test_an_option_given_twice_is_refused():
    with pytest.raises(InputError, match="given twice"):
        split("ppo,samples=8,samples=9")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("ppo", "ppo"),
        ("ppo,samples=8", "ppo,samples=8"),
        ("ppo, samples=08 ,learning_rate=0.0", "ppo,learning_rate=0,samples=8"),
        ("gemq,at_least=", "gemq,at_least="),
        ("mckp,rescore=2", "mckp,rescore=2"),
    ],
)
def test_a_label_is_the_name_with_its_options_in_one_spelling(text, label):
    agent = make_agent(text)
    assert label_of(agent, text) == label
    assert make_agent(label) == agent


def test_options_reach_the_agent_and_its_own_refusal_passes_through():
    assert make_agent("ppo,samples=4,learning_rate=0").samples == 4
    with pytest.raises(InputError, match="samples is 7; choose an even number: pairs"):
        make_agent("ppo,samples=7")


def test_an_agent_of_the_user_s_own_has_options(tmp_path, monkeypatch):
    (tmp_path / "optional.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine:\n"
        "    name: ClassVar[str] = 'mine'\n"
        "    depth: int = 1\n"
        "    other: Unknown | None = None\n"
        "    def search(self, problem, *, evaluations, seed, on_candidate=None): ...\n"
        "class Plain:\n"
        "    name = 'plain'\n"
        "    def search(self, problem, *, evaluations, seed, on_candidate=None): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    agent = make_agent("optional:Mine,depth=3")
    assert agent.depth == 3
    assert label_of(agent, "optional:Mine,depth=3") == "mine,depth=3"
    with pytest.raises(InputError, match="nor any other"):
        make_agent("optional:Plain,depth=3")


def test_a_comparison_tells_agents_with_options_apart():
    found = entrants(("ppo", "ppo,samples=4", "mckp,rescore=1", "gemq", "gemq,rescore=2"))
    by_label = {one.label: one for one in found}
    assert [*by_label] == [
        *("mckp", "mckp, small", "ppo", "ppo, rate 0", "ppo,samples=4", "ppo,samples=4, rate 0"),
        *("mckp,rescore=1", "gemq", "gemq,rescore=2"),
    ]
    assert by_label["ppo,samples=4, rate 0"].agent.samples == 4
    # What searches has a search's evaluations, not the larger profile of a single map.
    larger = {label for label, one in by_label.items() if one.larger}
    assert larger == {"mckp", "gemq"}
    with pytest.raises(InputError, match="one name"):
        entrants(("ppo,samples=4", "ppo,samples=04"))


def test_show_lists_options_with_types_defaults_and_texts(capsys):
    assert main(["show", "ppo"]) == 0
    out = capsys.readouterr().out
    assert "samples  (a whole number; default: 8)" in out
    assert "Samples per update; even." in out
    assert "start" not in out.split()
    assert main(["show", "mckp"]) == 0
    assert "rescore  (a whole number; default: 0)" in capsys.readouterr().out
    assert main(["show", "uniform"]) == 0
    assert "It has no options." in capsys.readouterr().out


def test_show_refuses_an_agent_that_there_is_not(capsys):
    assert main(["show", "pppo"]) == 2
    assert "did you mean 'ppo'" in capsys.readouterr().err


def test_showing_a_rule_imports_no_torch():
    code = (
        "import sys; from dmpq.agents.__main__ import main; main(['show', 'gemq']);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_list_is_for_programs_too(capsys):
    assert main(["list", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == agents.names()


def test_a_bad_option_ends_a_search_with_one_line(capsys):
    from dmpq.search import main as search

    assert search(["--agent", "ppo,sampels=8"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'samples'" in error
    assert error.count("\n") == 1
