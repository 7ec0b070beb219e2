"""EBSS: the score against a slow twin, balance on the bundled model, and that texts come again."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from families import build_tiny

from dmpq.calibration import Calibration
from dmpq.config import SearchConfig
from dmpq.data import CalibrationText, Draw
from dmpq.ebss import Prefixes, beam_search, imbalance, rewritten, start_tokens, written
from dmpq.errors import InputError
from dmpq.moe import MoEModel
from dmpq.quantizer import Quantizer
from dmpq.search import main as search
from dmpq.session import Session
from dmpq.validate import main as validate

WRITES = Quantizer.parse("gptq,ebss")


def shares(moe, windows):
    """Return, per layer, how often each window's tokens select each expert, (windows, E)."""
    layers = Calibration(moe, windows, Quantizer("gptq")).layers
    return tuple(
        torch.stack(
            [
                torch.bincount(row.flatten(), minlength=layer.experts.num_experts)
                for row in layer.index.unflatten(0, (len(windows), -1))
            ]
        )
        for layer in layers
    )


def test_imbalance_is_the_spread_of_shares_averaged_over_layers():
    even, one = torch.tensor([3, 3, 3, 3]), torch.tensor([5, 0, 0, 0])
    assert imbalance((even,)) == 0
    assert imbalance((one,)) == pytest.approx(math.sqrt(3) / 4)  # shares 1, 0, 0, 0
    assert imbalance((even, one)) == pytest.approx(math.sqrt(3) / 8)


@pytest.mark.parametrize(("tau", "wanted"), [(math.inf, [1, 0]), (0.1, [3, 2])])
def test_the_score_is_the_paper_s_on_a_toy(tau, wanted):
    prefixes = Prefixes(
        torch.tensor([[[9, 1], [9, 2]]]),
        torch.tensor([[-1.0, -2.0]], dtype=torch.float64),
        (torch.tensor([[[4.0, 0.0], [2.0, 2.0]]], dtype=torch.float64),),
    )
    log_p = torch.tensor([[[0.4, 0.6], [0.25, 0.75]]]).log()
    best, beam = prefixes.extended(log_p, tau=tau)
    # (log-probability of beam's prefix, its sigma): shares 1, 0 spread by 0.5; 0.5, 0.5 by 0.
    by_hand = {
        2 * b + v: 0.5 * (b == 0) / tau - (-1 - b + float(log_p[0, b, v])) / 2
        for b, v in itertools.product(range(2), repeat=2)
    }
    order = sorted(by_hand, key=by_hand.get)
    assert order[:2] == wanted
    assert beam.tolist() == [[place // 2 for place in wanted]]
    assert best.tokens[0, :, -1].tolist() == [place % 2 for place in wanted]
    assert best.tokens[0, :, :2].tolist() == [prefixes.tokens[0, p // 2].tolist() for p in wanted]
    for place, found in zip(wanted, best.log_p[0], strict=True):
        assert found == pytest.approx(-1 - place // 2 + float(log_p[0, place // 2, place % 2]))


def by_reading_again(moe, start, length, beams, tau):
    """Search without a cache, a beam and a prefix at a time."""
    kept = [([start], 0.0)]
    for _ in range(length - 1):
        scored = []
        for tokens, total in kept:
            window = torch.tensor([tokens])
            with torch.inference_mode():
                log_p = moe.logits(window)[0, -1].log_softmax(-1).double()
            sigma = float(imbalance(shares(moe, window.numpy())))
            for token, value in enumerate(log_p.tolist()):
                score = -(total + value) / len(tokens) + sigma / tau
                scored.append((score, [*tokens, token], total + value))
        kept = [(tokens, total) for _, tokens, total in sorted(scored)[:beams]]
    return kept[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_a_search_without_cache_does(family, tiny):
    moe = tiny(family)
    found = beam_search(moe, (3, 40), length=7, beams=3, tau=0.05)
    for row, start in zip(found, (3, 40), strict=True):
        assert row.tolist() == by_reading_again(moe, start, 7, 3, 0.05)


@pytest.fixture(scope="module")
def reference():
    return Session(SearchConfig())


def sampled(moe, starts, length):
    """Return text sampled from the model itself, token by token."""
    generator, windows = torch.Generator().manual_seed(0), torch.tensor(starts)[:, None]
    with torch.inference_mode():
        for _ in range(length - 1):
            odds = moe.logits(windows)[:, -1].softmax(-1)
            windows = torch.cat([windows, torch.multinomial(odds, 1, generator=generator)], 1)
    return windows.numpy()


def test_it_uses_experts_more_evenly_than_sampling_and_than_likelihood_alone(reference):
    moe = reference.moe
    starts = start_tokens(*reference._loaded, tokens=8 * 48, length=48, seed=0)

    def spread(windows):
        return float(imbalance(shares(moe, windows)).mean())

    balanced, published, likely = (
        spread(beam_search(moe, starts, length=48, tau=tau)) for tau in (0.01, 1.2, math.inf)
    )
    assert balanced < 0.7 * spread(sampled(moe, starts, 48))
    assert balanced < published <= likely


def test_starts_differ_are_seeded_and_end_with_the_vocabulary(reference):
    options = {"tokens": 1000, "length": 64}
    first = start_tokens(*reference._loaded, **options, seed=0)
    assert len(set(first)) == 16
    assert list(first) == sorted(first)
    assert first == start_tokens(*reference._loaded, **options, seed=0)
    assert first != start_tokens(*reference._loaded, **options, seed=1)
    with pytest.raises(InputError, match="each of 257 windows by a token of its own"):
        start_tokens(*reference._loaded, tokens=257 * 64, length=64, seed=0)


def test_a_text_is_written_again_and_another_is_told(tiny):
    windows, text = written(tiny(), (1, 5, 9), WRITES, length=6)
    assert text == CalibrationText("ebss", Draw(text.draw.stream, 6, (1, 5, 9)))
    assert (windows[:, 0] == [1, 5, 9]).all()
    assert (rewritten(tiny(), text, WRITES) == windows).all()
    forged = replace(text, draw=replace(text.draw, stream="0" * 64))
    with pytest.raises(InputError, match="writes another calibration text here"):
        rewritten(tiny(), forged, WRITES)
    for draw in (replace(text.draw, windows=(64,)), replace(text.draw, windows=())):
        with pytest.raises(InputError, match="is none that"):
            rewritten(tiny(), replace(text, draw=draw), WRITES)
    with pytest.raises(InputError, match="is none that"):
        rewritten(tiny(), replace(text, dataset="embedded"), WRITES)


def test_what_writing_reads_is_counted_and_said(tiny):
    windows, _ = written(tiny(), (1, 5, 9), WRITES, length=6)
    calibration = Calibration(tiny(), windows, WRITES)
    assert calibration.forwarded == 18 + 4 * 3 * 5
    assert calibration.notes()[0] == "gptq,ebss is calibrated on 18 tokens that the model wrote"


def test_progress_ends_at_all_steps(tiny):
    seen = []
    beam_search(tiny(), (1, 2, 3), length=5, beams=64, progress=lambda *done: seen.append(done))
    assert seen[-1] == (4, 4)
    assert len(seen) == 4


OPTIONS = [
    "--quantizer=gptq,tokens=256,ebss,tau=0.1",
    "--bits=2,16",
    "--agent=mckp",
    "--signal=gradient",
    "--profile-tokens=256",
    "--search-tokens=256",
    "--selection-tokens=256",
    "--further-tokens=0",
    "--heldout-tokens=512",
    "--evaluations=1",
    "--threads=1",
]


def test_a_map_tells_its_start_tokens_and_is_calibrated_again(tmp_path, capsys):
    out = tmp_path / "run"
    assert search([*OPTIONS, f"--out={out}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is calibrated on 256 tokens that the model wrote" in said
    data = json.loads((out / "bitmap.json").read_text())
    told = data["quantizer"]["calibration"]
    assert (told["dataset"], told["length"], len(told["windows"])) == ("ebss", 128, 2)
    assert validate([str(out / "bitmap.json"), "--threads=1"]) == 0
    assert capsys.readouterr().out.count("  ok  ") == 4
    saved = replace(
        SearchConfig(quantizer="gptq,tokens=256,ebss,tau=0.1", bits="2,16", signal="gradient"),
        profile=str(out / "profile.safetensors"),
    )
    again = Session(saved)
    assert again.calibrated_by == CalibrationText.from_json(told)
    assert np.isin(told["windows"], again._calibration_windows()[:, 0]).all()


def test_a_model_that_cannot_read_on_from_its_cache_is_refused_by_name():
    moe = MoEModel(build_tiny("qwen3_next"), name="tiny")
    with pytest.raises(InputError, match=r"tiny cannot read on from its cache \(.*; calibrate by"):
        beam_search(moe, (3, 5), length=4, beams=2)
