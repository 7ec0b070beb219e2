import dataclasses
import json

import numpy as np
import pytest
from factories import make_profile
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dmpq.data import CalibrationText, Draw
from dmpq.errors import InputError
from dmpq.profile import Profile, reference_profile


def assert_equal(one: Profile, other: Profile) -> None:
    for field in dataclasses.fields(Profile):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("projections", [False, True])
def test_a_profile_survives_its_file(tmp_path, projections):
    profile = make_profile(projections=projections)
    profile.save(tmp_path / "p.safetensors")
    assert_equal(Profile.load(tmp_path / "p.safetensors"), profile)


def test_the_same_profile_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_profile().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unhit_experts_are_listed():
    assert make_profile(unhit=2).unhit.tolist() == [14, 15]


def test_head_room_is_one_where_all_experts_are_alike():
    profile = make_profile()
    same = dataclasses.replace(
        profile,
        hits=np.ones_like(profile.hits),
        output_error=np.ones_like(profile.output_error),
        sensitivity=np.ones_like(profile.sensitivity),
    )
    assert same.head_room() == {"within_layers": 1.0, "whole_model": 1.0}


def test_head_room_is_the_ratio_of_means():
    profile = make_profile()
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=profile.sensitivity.shape)
    changed = dataclasses.replace(profile, hits=np.ones_like(profile.hits), sensitivity=values)
    first = values[:, 0]
    expected = first.mean() / np.exp(np.log(first).mean())
    assert changed.head_room()["whole_model"] == pytest.approx(expected)


def test_wrong_shapes_are_refused():
    profile = make_profile()
    with pytest.raises(InputError, match="profile's frequency has shape"):
        dataclasses.replace(profile, frequency=profile.frequency[:-1])


def test_values_that_are_not_finite_are_refused():
    profile = make_profile()
    broken = profile.sensitivity.copy()
    broken[0, 0] = np.nan
    with pytest.raises(InputError, match="sensitivity holds values that are not finite"):
        dataclasses.replace(profile, sensitivity=broken)


@pytest.mark.parametrize("content", [b"", b"not a profile", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a dmpq profile"):
        Profile.load(path)


DRAWN = Draw("a" * 64, 128, (3, 5))


def test_what_text_it_has_seen_survives_the_file(tmp_path):
    told = CalibrationText("wiki", DRAWN)
    for calibration in (None, told):
        profile = dataclasses.replace(make_profile(), drawn=DRAWN, calibration=calibration)
        profile.save(tmp_path / "p.safetensors")
        again = Profile.load(tmp_path / "p.safetensors")
        assert (again.drawn, again.calibration) == (DRAWN, calibration)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", None),
        ("menu", "2;4"),
        ("menu", 3),
        ("spec", []),
        ("quantizer", "hqqq"),
        ("text", 3),
        ("fingerprint", None),
        ("tokens", "x"),
        ("tokens", -1),
        ("full_nll", float("nan")),
        ("cost_tokens", []),
        ("drawn", "x"),
        ("drawn", {"stream": "a", "length": 0, "windows": []}),
        ("drawn", {"stream": "a", "length": 8, "windows": [-1]}),
        ("drawn", {"stream": "a", "length": 8, "windows": [1e400]}),
        ("calibration", []),
        ("calibration", {"dataset": "a"}),
        ("calibration", {"dataset": 3, "stream": "a", "length": 8, "windows": [1]}),
    ],
)
def test_a_hand_edited_header_is_refused(tmp_path, name, value):
    path = tmp_path / "p.safetensors"
    make_profile().save(path)
    with safe_open(path, framework="numpy") as handle:
        header = json.loads(handle.metadata()["dmpq"]) | {name: value}
    save_file(load_file(path), path, metadata={"dmpq": json.dumps(header)})
    with pytest.raises(InputError):
        Profile.load(path)


@pytest.mark.parametrize("name", ["hits", "frequency"])
def test_shares_below_zero_are_refused(name):
    profile = make_profile()
    with pytest.raises(InputError, match=f"profile's {name} holds other values"):
        dataclasses.replace(profile, **{name: -1 - getattr(profile, name)})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="There is no profile at"):
        Profile.load(tmp_path / "none")


def test_the_shipped_profile_is_of_the_shipped_model():
    from dmpq.moe import load_model

    profile = reference_profile()
    moe, _ = load_model()
    assert profile.fingerprint == moe.fingerprint
    assert profile.spec == moe.spec
    assert np.isfinite(profile.router_norm_change).all()


def test_the_shipped_profile_s_uniform_maps_are_worse_the_narrower_they_are():
    profile = reference_profile()
    assert profile.menu.keys == ("2", "3", "4", "8", "16")
    assert profile.uniform_kl[-1] == 0.0
    assert (np.diff(profile.uniform_kl) < 0).all()
