"""The command that lists families: the source it reads against the models that are tested."""

import json

import pytest
from families import FAMILIES, tiny_config
from transformers.models.auto.configuration_auto import model_type_to_module_name

from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.errors import InputError
from dmpq.installed import families
from dmpq.models import main
from dmpq.moe import load_model


@pytest.fixture(scope="module")
def found():
    return {family.name: family for family in families()}


def test_the_installed_transformers_has_sixty_families_and_more(found):
    assert sum(family.interface for family in found.values()) >= 54  # transformers 5.17
    assert len(found) >= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tested_family_is_listed_as_supported(found, family):
    listed = found[model_type_to_module_name(family)]
    assert listed.support in ("interface", "own adapter")


def test_no_supported_family_is_untested(found):
    tested = {model_type_to_module_name(family) for family in FAMILIES}
    assert {f.name for f in found.values() if not f.refused} <= tested


@pytest.mark.parametrize(
    ("family", "description"),
    [
        ("olmoe", "standard"),
        ("gpt_oss", "transposed, interleaved, biases"),
        ("nemotron_h", "ungated"),
        ("muse_spark", "post-norm, vision-language, audio"),
        ("hy_v4", "custom gate"),
        ("qwen3_vl_moe", "vision-language"),
    ],
)
def test_what_is_special_is_told(found, family, description):
    assert found[family].description == description


def test_a_family_that_appears_later_is_told_from_its_source(tmp_path):
    for name, decorator in (
        ("inside", "@use_experts_implementation(has_gate=False)\n"),
        ("out", ""),
    ):
        folder = tmp_path / name
        folder.mkdir()
        source = f"{decorator}class NewExperts(nn.Module):\n    pass\n"
        (folder / f"modeling_{name}.py").write_text(source)
    inside, out = families(tmp_path)
    assert (inside.support, inside.description) == ("interface", "ungated")
    assert out.support == "refused"
    assert "outside transformers' experts interface" in out.description


def test_list_fits_a_terminal_and_names_every_family(found, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines[1:-1] if line[1] != " "} == set(found)
    assert main(["list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == sorted(found)


def test_show_tells_shapes_router_and_names_on_disk(capsys):
    assert main(["show", "mixtral"]) == 0
    text = capsys.readouterr().out
    for part in (
        "32 x model.layers.N.mlp.experts",
        "0-31",
        "8 x 28,672 x 4,096",
        "8 x 4,096 x 14,336",
        ".experts.*.w2.weight for .experts.down_proj",
        ".block_sparse_moe. for .mlp.",
        "packed       by python -m dmpq.apply; AutoModelForCausalLM loads it",
    ):
        assert part in text


def test_show_tells_where_an_adapted_family_keeps_an_expert(capsys, tmp_path):
    tiny_config("dbrx").save_pretrained(tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    assert "gate+up in mlp.w1 + mlp.v1" in capsys.readouterr().out
    assert main(["show", "switch_transformers"]) == 0
    text = capsys.readouterr().out
    assert "down in expert_0.wo.weight" in text
    assert "AutoModelForSeq2SeqLM loads it after import dmpq.hf" in text


def test_show_reads_the_config_of_a_folder(capsys):
    from dmpq.moe import reference_path

    assert main(["show", str(reference_path())]) == 0
    assert "16 x 256 x 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtrall", "did you mean 'mixtral'"),
        ("longcat_flash", "family 'longcat_flash', which is not supported: its router"),
        ("step3p5", "family 'step3p7', which is not supported: its experts"),
    ],
)
def test_show_refuses_in_one_sentence(name, reason, capsys):
    assert main(["show", name]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_the_code_of_a_folder_does_not_run(tmp_path, capsys, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    told = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no config that can be read" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"code of its own, which has not run; .* by --trust-rem"):
        Checkpoint(str(tmp_path))
    with pytest.raises(InputError, match="code of its own, which has not run"):
        load_model(str(tmp_path))
    assert not ran.exists()
