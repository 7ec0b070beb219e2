import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exports import bitmap_of
from factories import make_profile, make_spec, write_bitmap

from dmpq.bitmap import BitMap
from dmpq.engines.preflight import Layout, NothingLoadable, blocks, broken_rules, nearest_loadable
from dmpq.engines.rules import ENGINES, GRANULARITIES, UPCYCLED, engine_named, rules_page
from dmpq.errors import InputError
from dmpq.export import main
from dmpq.formats import Menu
from dmpq.profile import Profile

DOCS = Path(__file__).parent.parent / "docs"


def small(menu, *, layers=1, experts=2, pairs=None, hidden=256):
    spec = make_spec(layers=layers, experts=experts, hidden=hidden)
    return bitmap_of(spec, menu, architecture="OlmoeForCausalLM", pairs=pairs)


def kinds(name, bitmap):
    return [broken.rule.kind for broken in broken_rules(engine_named(name), bitmap)]


SYMMETRIC = Menu.parse("2,4,8,16", symmetric=True)


@pytest.mark.parametrize(
    ("name", "pairs", "expected"),
    [
        ("dmpq", [[0, 1], [2, 3], [0, 0], [1, 1]], []),
        ("gptqmodel", [[0, 1], [2, 3], [0, 0], [1, 1]], []),
        ("vllm", [[1, 1], [1, 1], [2, 2], [2, 2]], []),
        ("vllm", [[1, 1], [2, 2], [2, 2], [2, 2]], ["granularity"]),
        ("vllm", [[1, 2], [1, 2], [2, 2], [2, 2]], ["granularity"]),
        ("vllm", [[0, 0], [0, 0], [2, 2], [2, 2]], ["widths"]),
        ("vllm-gptq", [[1, 1], [1, 1], [3, 3], [3, 3]], []),
        ("llama.cpp", [[1, 2], [1, 2], [2, 0], [2, 0]], []),
        ("llama.cpp", [[1, 2], [1, 1], [2, 0], [2, 0]], ["granularity"]),
        ("mlx", [[0, 2], [0, 2], [2, 3], [2, 3]], []),
        ("transformers", [[0, 0]] * 4, []),
        ("transformers", [[0, 0], [0, 0], [1, 1], [1, 1]], ["granularity"]),
    ],
)
def test_rules_of_what_shares_a_format(name, pairs, expected):
    assert kinds(name, small(SYMMETRIC, layers=2, pairs=pairs)) == expected


@pytest.mark.parametrize(
    ("name", "menu", "hidden", "expected"),
    [
        ("vllm", Menu.parse("4"), 256, ["zero_points"]),
        ("transformers", Menu.parse("4", quantizer="rtn"), 256, ["zero_points"]),
        ("mlx", Menu.parse("4"), 256, []),
        ("mlx", Menu.parse("4g16"), 256, ["group_sizes"]),
        ("vllm", Menu.parse("4g256", symmetric=True), 256, ["group_sizes"]),
        ("vllm", Menu.parse("4g256", symmetric=True), 64, []),
        ("llama.cpp", Menu.parse("4"), 128, ["row_multiples"]),
        ("llama.cpp", Menu.parse("8"), 128, []),
        ("vllm", Menu.parse("16"), 256, []),
    ],
)
def test_rules_of_formats(name, menu, hidden, expected):
    pairs = np.zeros((2, 2), int)
    assert kinds(name, small(menu, hidden=hidden, pairs=pairs)) == expected


def test_every_engine_but_dmpq_refuses_pruned_experts():
    bitmap = small(Menu.parse("0,4", symmetric=True), pairs=[[0, 0], [0, 0]])
    assert [e.name for e in ENGINES if not kinds(e.name, bitmap)] == ["dmpq"]


def test_engines_with_code_of_their_own_load_no_architecture_of_ours():
    from dmpq.upcycled import MODEL_TYPE

    assert UPCYCLED == MODEL_TYPE
    bitmap = small(SYMMETRIC, pairs=[[1, 1], [1, 1]])
    ours = replace(bitmap, geometry=replace(bitmap.geometry, model_type=UPCYCLED))
    for engine in ENGINES:
        foreign = engine.name in {
            *("vllm", "vllm-gptq", "sglang", "tensorrt-llm", "llama.cpp", "mlx"),
        }
        assert (kinds(engine.name, ours)[:1] == ["architecture"]) == foreign
        if foreign:
            with pytest.raises(NothingLoadable, match=UPCYCLED):
                nearest_loadable(engine, ours)


def test_blocks_of_a_granularity_hold_those_of_every_finer_one():
    spec = make_spec(layers=3, experts=4)
    counts = [len(np.unique(blocks(spec, name))) for name in GRANULARITIES]
    assert counts == [24, 12, 6, 3, 1]


@pytest.mark.parametrize("engine", [e for e in ENGINES if e.rules], ids=lambda e: e.name)
@pytest.mark.parametrize("profiled", [False, True])
def test_the_nearest_map_loads_and_takes_no_more_bits(engine, profiled, tmp_path):
    path = write_bitmap(tmp_path)
    bitmap = BitMap.read(path)
    profile = Profile.load(tmp_path / "profile.safetensors") if profiled else None
    for avg_bits in (None, 4.3, 9.0):
        try:
            found = nearest_loadable(engine, bitmap, profile=profile, avg_bits=avg_bits)
        except NothingLoadable as error:
            assert avg_bits is None
            assert "with --avg-bits" in str(error)  # noqa: PT017
            continue
        assert broken_rules(engine, found) == []
        own = Layout.of(bitmap).bits() if avg_bits is None else avg_bits
        assert Layout.of(found).bits(engine.stored) <= own
        found.write(tmp_path / "found.json")
        assert BitMap.read(tmp_path / "found.json") == found


def test_the_nearest_map_is_the_best_of_all_by_the_profile():
    profile = make_profile(layers=2, experts=3)
    pairs = [[0, 0], [2, 2], [1, 1], [3, 3], [0, 0], [2, 2]]
    bitmap = bitmap_of(profile.spec, profile.menu, architecture="OlmoeForCausalLM", pairs=pairs)
    found = Layout.of(nearest_loadable(engine_named("mlx"), bitmap, profile=profile))
    sizes = profile.spec.stored_bits(profile.menu)
    rows, sides = np.arange(6)[:, None], np.arange(2)

    def worth(choice):
        chosen = np.repeat(np.array(choice).reshape(2, 2), 3, axis=0)
        bits = sizes[rows, sides, chosen].sum() / profile.spec.expert_parameters
        return profile.projection_sensitivity[rows, sides, chosen].sum(), bits

    own = Layout.of(bitmap).bits()
    options = itertools.product(range(len(profile.menu)), repeat=4)
    best = min(worth(choice)[0] for choice in options if worth(choice)[1] <= own)
    got = profile.projection_sensitivity[rows, sides, found.pairs].sum()
    assert got == pytest.approx(best)


def test_without_a_profile_layers_that_the_map_widens_stay_wider():
    menu = Menu.parse("2,3,4,8", symmetric=True)
    pairs = [[0, 0], [0, 0], [0, 0], [1, 1], [3, 3], [3, 3], [3, 3], [3, 3]]
    bitmap = small(menu, layers=2, experts=4, pairs=pairs)
    found = Layout.of(nearest_loadable(engine_named("modelopt"), bitmap)).pairs
    assert found[4, 0] > found[0, 0]


def test_a_map_that_loads_is_its_own_nearest():
    bitmap = small(SYMMETRIC, pairs=[[1, 1], [1, 1]])
    assert nearest_loadable(engine_named("vllm"), bitmap) is bitmap


def test_zero_points_are_left_out_where_the_engine_has_none():
    bitmap = small(Menu.parse("4,8"), pairs=[[0, 0], [1, 1]])
    found = nearest_loadable(engine_named("vllm"), bitmap)
    assert found.menu.symmetric
    assert found.menu.quantizer == "hqq"


def test_a_profile_of_other_weights_is_refused():
    bitmap = bitmap_of(
        make_spec(), Menu.parse("2,3,4,8,16"), architecture="X", fingerprint="1" * 64
    )
    with pytest.raises(InputError, match="The profile is of weights"):
        nearest_loadable(engine_named("mlx"), bitmap, profile=make_profile())


def test_a_profile_without_a_loadable_format_is_refused():
    profile = make_profile(bits="2,3")
    bitmap = bitmap_of(profile.spec, profile.menu, architecture="X")
    with pytest.raises(InputError, match="None of the formats 2, 3 of the profile"):
        nearest_loadable(engine_named("vllm-gptq"), bitmap, profile=profile, avg_bits=9)


def test_the_check_says_what_is_broken_and_writes_the_nearest(tmp_path, capsys):
    path, out = write_bitmap(tmp_path), tmp_path / "nearest.json"
    profile = f"--profile={tmp_path / 'profile.safetensors'}"
    assert main([str(path), "--check", "mlx", profile, f"--out={out}"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "would not load this map" in shown
    assert "4 of 4 tensors of a layer's experts mix formats" in shown
    assert "by the profile's sensitivities" in shown
    assert main([str(out), "--check", "mlx"]) == 0
    assert "would load this map" in capsys.readouterr().out


def test_the_check_says_so_where_nothing_fits(tmp_path, capsys):
    path = write_bitmap(tmp_path)
    assert main([str(path), "--check", "vllm"]) == 1
    assert "No map that vllm loads has 3.00 effective bits or fewer" in capsys.readouterr().out
    assert main([str(path), "--check", "vllm", f"--out={tmp_path / 'x'}"]) == 2
    assert not (tmp_path / "x").exists()


def test_the_check_points_to_the_container(tmp_path, capsys):
    menu = Menu.parse("2,3", symmetric=True)
    path = tmp_path / "bitmap.json"
    small(menu, pairs=[[0, 0], [1, 1]]).write(path)
    assert main([str(path), "--check", "vllm"]) == 1
    assert "--container 4" in capsys.readouterr().out


def test_the_page_of_rules_is_that_of_the_data(capsys):
    assert (DOCS / "engines.md").read_text() == rules_page()
    assert main(["--rules"]) == 0
    assert capsys.readouterr().out == rules_page()


def test_every_rule_has_a_reason_and_a_source():
    for engine in ENGINES:
        assert len({rule.kind for rule in engine.rules}) == len(engine.rules)
        for rule in engine.rules:
            assert rule.source
            assert not rule.because.endswith(".")
