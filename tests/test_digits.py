"""The digits report's models, quantizers, balances and pages, on scikit-learn's digits."""

import copy
import gzip
import json
import math
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dmpq.errors import InputError

ROOT = Path(__file__).parents[1]
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture(scope="module", autouse=True)
def script():
    """The benchmark's modules, which import each other as neighbours of a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import digits
        import digits_data
        import digits_models
        import digits_page
        import digits_quantize
        import digits_training

        yield SimpleNamespace(
            command=digits,
            data=digits_data,
            models=digits_models,
            page=digits_page,
            quantize=digits_quantize,
            training=digits_training,
        )
        for name in [name for name in sys.modules if name.startswith("digits")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def digits(script, tmp_path_factory):
    return script.data.load_digits(tmp_path_factory.mktemp("nothing"))


@pytest.fixture(scope="module")
def baseline(script, digits):
    return script.training.train_feed_forward(digits, seed=0, epochs=15).model


@pytest.fixture(scope="module")
def moe(script, digits):
    balance = script.training.BALANCES["Switch"]
    return script.training.train_moe(digits, balance, seed=0, epochs=15).model


def idx(array):
    """Return an array of bytes as an idx file."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def write_digits(folder, *, images=20, labels=20, size=5, label=9, test_size=5):
    """Write the four files, half of them gzipped."""
    rng = np.random.default_rng(0)
    arrays = {
        IMAGES: rng.integers(0, 256, (images, size, size)),
        LABELS: np.arange(labels) % (label + 1),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (7, test_size, test_size)),
        "t10k-labels-idx1-ubyte": np.arange(7),
    }
    for name, array in arrays.items():
        if "labels" in name:
            (folder / name).write_bytes(idx(array))
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return arrays


def test_idx_files_are_read_gzipped_or_not(script, tmp_path):
    arrays = write_digits(tmp_path)
    found = script.data.load_digits(tmp_path)
    assert (found.name, len(found.train), len(found.heldout)) == ("idx", 18, 2)
    np.testing.assert_array_equal(found.test.labels, np.arange(7))
    inked = arrays["t10k-images-idx3-ubyte"].reshape(7, 25) / 255
    np.testing.assert_allclose(found.test.images, inked, rtol=1e-6)
    whole = torch.cat([found.train.images, found.heldout.images]) * 255
    rows = {tuple(row) for row in whole.round().int().tolist()}
    assert rows == {tuple(row) for row in arrays[IMAGES].reshape(20, 25).tolist()}


def _broken(name):
    good = idx(np.arange(24).reshape(2, 3, 4))
    return {
        "truncated": good[:-1],
        "no header": good[:9],
        "empty": b"",
        "longer": good + b"x",
        "labels": idx(np.arange(3)),
        "floats": bytes((0, 0, 13, 3)) + good[4:],
        "text": b"<!DOCTYPE html>",
        "none": idx(np.zeros((0, 3, 4))),
        "huge": good[:4] + struct.pack(">3I", 2**31, 2**31, 2**31),
        "truncated gzip": gzip.compress(good)[:-12],
        "damaged gzip": gzip.compress(good)[:10] + b"\xff" * 20,
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("truncated", r"24 bytes of data and has only 23"),
        ("no header", r"says that it has 2 values"),
        ("empty", r"begins with the bytes \(none\)"),
        ("longer", r"24 bytes of data and has more"),
        ("labels", r"begins with the bytes 00 00 08 01.*00 00 08 03"),
        ("floats", r"begins with the bytes 00 00 0d 03"),
        ("text", r"begins with the bytes 3c 21 44 4f"),
        ("none", r"0 x 3 x 4 values"),
        ("huge", r"2147483648 x 2147483648 x 2147483648 values"),
        ("truncated gzip", r"is a damaged gzip file"),
        ("damaged gzip", r"is a damaged gzip file"),
    ],
)
def test_a_file_that_is_no_whole_idx_file_is_refused_in_a_sentence(script, tmp_path, name, said):
    path = tmp_path / "images"
    path.write_bytes(_broken(name))
    with pytest.raises(InputError, match=said) as caught:
        script.data.read_idx(path, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": 19}, "19 train images and 20 labels"),
        ({"label": 10}, "has the label 10; digits are 0 to 9"),
        ({"test_size": 4}, "training images of 5x5 and test images of 4x4"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(script, tmp_path, changes, said):
    write_digits(tmp_path, **changes)
    with pytest.raises(InputError, match=said):
        script.data.load_digits(tmp_path)


def test_a_missing_file_ends_the_command_with_one_sentence(script, tmp_path, monkeypatch, capsys):
    write_digits(tmp_path)
    (tmp_path / LABELS).unlink()
    monkeypatch.setattr(sys, "argv", ["digits.py", "--data", str(tmp_path), "--out", "unused"])
    assert script.command.main() == 2
    said = capsys.readouterr().err
    assert "has no file of the train labels" in said
    assert said.count("\n") == 1


def test_without_files_it_takes_scikit_learns_digits_and_says_so(digits):
    assert digits.name == "scikit-learn"
    assert "NOT MNIST" in digits.source
    assert (len(digits.train) + len(digits.heldout), len(digits.test)) == (1498, 299)
    assert float(digits.train.images.max()) == 1.0


def test_without_files_and_scikit_learn_it_says_what_to_do(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        script.data.load_digits(tmp_path)


def test_sizes_are_the_reports(script):
    baseline, moe = script.models.feed_forward(784), script.models.SparseMoE(784)
    assert sum(one.numel() for one in baseline.parameters()) == 235_146
    assert 4 * sum(one.numel() for one in moe.parameters()) == pytest.approx(2.788e6, rel=0.01)
    assert script.models.multiplications(baseline) == 784 * 256 + 256 * 128 + 128 * 10
    routed = 256 * 10 + 2 * (256 * 128 + 128 * 128)
    assert script.models.multiplications(moe) == 784 * 256 + routed + 128 * 10


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_vectorised_experts_are_the_loops(script, tokens):
    torch.manual_seed(tokens)
    models, inputs = script.models, torch.rand(tokens, 64)
    moe = models.SparseMoE(64)
    with torch.no_grad():
        moe.router.bias[3] = -100.0  # an expert that nobody selects
        moe.router.bias[7] = 100.0  # and one that everybody does
    found = {}
    for dispatch in (models.grouped, models.by_expert, models.by_token):
        one = copy.deepcopy(moe)
        one.dispatch = dispatch
        answers = one(inputs)
        answers.square().sum().backward()
        found[dispatch.__name__] = (answers, *(p.grad for p in one.parameters()))
    assert found["by_token"][0].std() > 0.01
    grads = dict(zip(dict(moe.named_parameters()), found["by_token"][1:], strict=True))
    assert not grads["experts.up"][3].any()
    assert grads["experts.up"][7].any()
    for name in ("grouped", "by_expert"):
        for ours, theirs in zip(found[name], found["by_token"], strict=True):
            # Sums of at most 256 products in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_selected_weights_are_the_softmax_divided_by_their_sum(script):
    moe, inputs, seen = script.models.SparseMoE(64), torch.rand(9, 64), []

    def watching(experts, hidden, chosen, weights):
        seen.append((chosen, weights))
        return script.models.grouped(experts, hidden, chosen, weights)

    moe.dispatch = watching
    _, logits = moe.routed(inputs)
    weights, chosen = logits.softmax(-1).topk(2)
    assert torch.equal(seen[0][0], chosen)
    torch.testing.assert_close(seen[0][1], weights / weights.sum(-1, keepdim=True))


def test_the_entropy_of_counts_is_right_and_has_no_gradient(script):
    logits = torch.tensor([[3.0, 2.0, 0.0, 0.0], [0.0, 3.0, 2.0, 0.0]], requires_grad=True)
    added = script.training.count_entropy(logits)
    shares = (1 / 4, 2 / 4, 1 / 4)
    assert float(added) == pytest.approx(-sum(s * math.log(s) for s in shares))
    assert not added.requires_grad
    loss = logits.square().sum()
    (alone,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (both,) = torch.autograd.grad(loss + added, logits)
    assert torch.equal(alone, both)


def test_only_the_entropy_of_counts_has_no_gradient_at_a_real_router(script, digits, moe):
    found = script.training.router_gradients(moe, digits.train.images[:128])
    assert found.pop("report") is None
    assert set(found) == {"report's sign", "entropy rewarded", "Switch"}
    assert min(found.values()) > 1e-6
    assert found["report's sign"] == pytest.approx(found["entropy rewarded"])


def test_training_with_the_entropy_of_counts_is_training_without(script, digits):
    training = script.training
    one, other, switch = (
        training.train_moe(digits, training.BALANCES[name], seed=3, epochs=2).model
        for name in ("none", "report", "Switch")
    )
    assert training.largest_difference(one, other) == 0
    assert training.largest_difference(one, switch) > 1e-3


def test_the_reports_sign_lowers_entropy_and_the_reward_raises_it(script, digits):
    training, images = script.training, digits.train.images[:256]
    torch.manual_seed(0)
    begun = script.models.SparseMoE(64)
    after = {}
    for name in ("report's sign", "entropy rewarded", "Switch"):
        moe = copy.deepcopy(begun)
        optimizer = torch.optim.SGD(moe.router.parameters(), lr=1.0)
        for _ in range(20):
            optimizer.zero_grad()
            training.BALANCES[name](moe.routed(images)[1]).backward()
            optimizer.step()
        after[name] = float(training.probability_entropy(moe.routed(images)[1]).detach())
    before = float(training.probability_entropy(begun.routed(images)[1]).detach())
    assert after["report's sign"] < before < after["entropy rewarded"] <= math.log(10)
    assert after["Switch"] > before


def test_evenness_is_one_for_even_shares_and_none_for_one_expert(script):
    assert script.training.evenness([0.1] * 10) == pytest.approx(1)
    assert script.training.evenness([1.0] + [0.0] * 9) == 0
    assert script.training.evenness([0.5] * 2 + [0.0] * 8) == pytest.approx(math.log10(2))


def run_static_file(path, images):
    """Return a statically quantized file's answers, in integers: the oracle of its kernels."""
    file = {name: one.numpy() for name, one in load_file(path).items()}
    rows = images.numpy()
    for layer in range(3):
        of = {key.split(".")[1]: value for key, value in file.items() if key[0] == str(layer)}
        assert of["weight"].dtype == np.int8
        zero = int(of["input_zero_point"])
        packed = np.clip(np.rint(rows / of["input_scale"]) + zero, 0, 127).astype(np.int64)
        sums = (packed - zero) @ of["weight"].astype(np.int64).T
        rows = sums * (of["input_scale"] * of["weight_scale"]) + of["bias"]
        rows = np.maximum(rows, 0) if layer < 2 else rows
    return torch.from_numpy(rows)


@torch.no_grad()
def agreement(one, other):
    """Return the share of images that two sets of answers class alike."""
    return float((one.argmax(-1) == other.argmax(-1)).double().mean())


@torch.no_grad()
def test_static_int8_runs_on_integers_and_answers_nearly_as_fp32(
    script, digits, baseline, tmp_path
):
    quantize, images = script.quantize, digits.test.images
    static = quantize.static_int8(baseline, digits.train.images[:256])
    size = quantize.save_static(static, tmp_path / "static")
    assert size < 0.3 * quantize.save_float(baseline, tmp_path / "float")
    ready = quantize.lowered(static, *images.shape)
    assert "onednn.qlinear" in ready.code
    answers, exact = ready(images), run_static_file(tmp_path / "static", images)
    # A product that is rounded the other way moves an activation by one step.
    torch.testing.assert_close(answers.double(), exact.double(), rtol=0.05, atol=0.1)
    assert agreement(answers, exact) > 0.99
    right = baseline(images)
    assert agreement(answers, right) > 0.97
    assert not torch.equal(answers, right)
    eager = quantize.static_int8_eager(baseline, digits.train.images[:256])
    assert eager.module[0].weight().int_repr().dtype == torch.int8
    assert agreement(eager(images), right) > 0.97


@torch.no_grad()
def test_static_ranges_come_from_the_calibration_images(script, digits, baseline, tmp_path):
    scales = []
    for dark in (1.0, 0.5):
        static = script.quantize.static_int8(baseline, digits.train.images[:256] * dark)
        script.quantize.save_static(static, tmp_path / "static")
        scales.append(float(load_file(tmp_path / "static")["0.input_scale"]))
    assert scales == pytest.approx([1 / 127, 0.5 / 127], rel=0.02)


@torch.no_grad()
def test_dynamic_int8_has_int8_experts_and_loads_again(script, digits, moe, tmp_path):
    quantize, images = script.quantize, digits.test.images
    dynamic = quantize.dynamic_int8(moe)
    size = quantize.save_dynamic(dynamic, tmp_path / "dynamic")
    assert size < 0.3 * quantize.save_float(moe, tmp_path / "float")
    tensors = load_file(tmp_path / "dynamic")
    shapes = {name: one.shape for name, one in tensors.items() if one.dtype == torch.int8}
    for name, shape in {
        "experts._up_qdata": (10, 128, 256),
        "experts._down_qdata": (10, 128, 128),
        "input._weight_qdata": (256, 64),
        "head._weight_qdata": (10, 128),
    }.items():
        assert shapes[name] == shape
    assert tensors["router.weight"].dtype == torch.float32
    assert torch.equal(tensors["router.weight"], moe.router.weight)
    answers, right = dynamic(images), moe(images)
    assert agreement(answers, right) > 0.97
    assert not torch.equal(answers, right)
    assert torch.equal(quantize.load_dynamic(tmp_path / "dynamic", 64)(images), answers)
    assert torch.equal(moe.experts.up, load_file(tmp_path / "float")["experts.up"])


@torch.no_grad()
def test_torchs_own_dynamic_int8_quantizes_every_expert(script, digits, moe):
    eager = script.quantize.dynamic_int8_eager(moe)
    layers = [eager.input, eager.head, *eager.experts.up, *eager.experts.down]
    assert len(layers) == 22
    assert {layer.weight().int_repr().dtype for layer in layers} == {torch.int8}
    assert eager.router.weight.dtype == torch.float32
    assert agreement(eager(digits.test.images), moe(digits.test.images)) > 0.97


@pytest.fixture(scope="module")
def figures(script, digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.command, "ROUNDS", {1: 10, 64: 10})
        return script.command.measure(digits, seeds=2, epochs=1, say=lambda text: None)


def test_the_figures_make_a_page_of_eighty_columns_and_a_picture(script, figures, tmp_path):
    page = script.page.tables(json.loads(json.dumps(figures)))
    assert max(map(len, page.splitlines())) <= 80
    assert "NOT MNIST" in page
    for name in ("FFN int8 static", "MoE (report) int8 dynamic", "MoE (Switch) fp32"):
        (row,) = (row for row in figures["rows"] if row["model"] == name and row["seed"] == 1)
        assert 0 <= row["changed"] < 60
        assert row["bytes"] > 10_000
        assert page.count(f"| {name} ") >= 3
    script.page.picture(figures, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    for row in figures["latency"]:
        assert 0 < row["lower_s"] <= row["median_s"] <= row["upper_s"]
        assert row["cpu_s"] > 0
    shares = [sum(row["shares"]) for row in figures["balances"]]
    assert len(shares) == 10
    assert shares == pytest.approx([1] * 10)
    assert {row["difference_from_none"] for row in figures["balances"][:2]} == {0}


def test_weights_read_are_those_of_the_experts_that_a_batch_selects(script, figures):
    sizes = figures["sizes"]
    idle = 8 * sizes["expert"]["parameters"]
    expected = (sizes["MoE"]["parameters"] - idle) / sizes["FFN"]["parameters"]
    assert figures["experts_read"][0] == {"batch": 1, "read": 2}
    assert script.page.read_ratio(figures, 1) == pytest.approx(expected)


def test_the_committed_pages_are_what_the_committed_figures_make(script, tmp_path, capsys):
    command = script.command
    assert command.check(command.RESULTS) == 0
    for name in ("digits.json", "digits.md"):
        (tmp_path / name).write_bytes((command.RESULTS / name).read_bytes())
    assert command.check(tmp_path) == 0
    figures = json.loads((tmp_path / "digits.json").read_text())
    figures["rows"][0]["test"]["accuracy"] -= 0.01
    (tmp_path / "digits.json").write_text(json.dumps(figures))
    capsys.readouterr()
    assert command.check(tmp_path) == 1
    assert "digits.md does not say what" in capsys.readouterr().out
