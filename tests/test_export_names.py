import pytest
from exports import spec_of
from safetensors import safe_open

from dmpq.exporters.names import layer_names

PROJ = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
MLP, SPARSE = "model.layers.{}.mlp.experts", "model.layers.{}.block_sparse_moe.experts"
FORWARD, MIXER = "model.layers.{}.feed_forward.experts", "model.layers.{}.mixer.experts"
# The table of transformers_moe.md, section 1.4: family, modules, names on disk.
PER_EXPERT = [
    *(
        (family, MLP, MLP, PROJ)
        for family in (
            "olmoe",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "deepseek_v2",
            "deepseek_v3",
            "glm4_moe",
            "ernie4_5_moe",
            "hunyuan_v1_moe",
            "flex_olmo",
            "exaone_moe",
            "afmoe",
            "dots1",
            "solar_open",
            "mellum",
        )
    ),
    *((family, MLP, SPARSE, MIXTRAL) for family in ("mixtral", "phimoe", "minimax", "minimax_m2")),
    ("jamba", FORWARD, FORWARD, PROJ),
    ("lfm2_moe", FORWARD, FORWARD, MIXTRAL),
]


@pytest.mark.parametrize(("family", "modules", "disk", "leaves"), PER_EXPERT)
def test_experts_have_the_names_of_the_table(family, modules, disk, leaves):
    spec = spec_of(family, modules)
    for number, layer in enumerate(layer_names(spec, architecture="Unknown")):
        assert not layer.fused
        assert layer.disk_parent == disk.format(number)
        for expert in range(12):
            own = dict(zip(("gate", "up", "down"), leaves, strict=True))
            want = {part: f"{disk.format(number)}.{expert}.{leaf}" for part, leaf in own.items()}
            assert layer.disk[expert] == want
            plain = zip(("gate", "up", "down"), PROJ, strict=True)
            assert layer.modules[expert] == {
                part: f"{modules.format(number)}.{expert}.{leaf}" for part, leaf in plain
            }


def test_a_family_without_gates_has_two_matrices_and_its_own_prefix():
    layers = layer_names(spec_of("nemotron_h", MIXER, gated=False), architecture="NemotronH")
    assert layers[1].disk[11] == {
        "up": "backbone.layers.1.mixer.experts.11.up_proj",
        "down": "backbone.layers.1.mixer.experts.11.down_proj",
    }


@pytest.mark.parametrize(
    ("family", "modules", "up", "down"),
    [
        ("gpt_oss", MLP, f"{MLP}.gate_up_proj", f"{MLP}.down_proj"),
        (
            "gemma4_text",
            "model.layers.{}.experts",
            *(f"model.layers.{{}}.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")),
        ),
        (
            "granitemoe",
            SPARSE,
            *(
                f"model.layers.{{}}.block_sparse_moe.{leaf}"
                for leaf in ("input_linear", "output_linear")
            ),
        ),
        ("aria_text", MLP, f"{MLP}.fc1", f"{MLP}.fc2"),
    ],
)
def test_fused_families_share_a_tensor(family, modules, up, down):
    for number, layer in enumerate(layer_names(spec_of(family, modules), architecture="Unknown")):
        assert layer.fused
        own = {"gate": up.format(number), "up": up.format(number), "down": down.format(number)}
        assert all(names == own for names in layer.disk)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_names_are_those_that_transformers_saves(family, tiny, tmp_path):
    moe = tiny(family)
    moe.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name for name in file.keys() if ".experts." in name}  # noqa: SIM118
    saved = {name.removesuffix(".weight") for name in saved if "bias" not in name}
    layers = layer_names(moe.spec, architecture=type(moe.model).__name__)
    assert {name for layer in layers for own in layer.disk for name in own.values()} == saved
