"""Quantization-aware training of a model under a bit map, or under random ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dmpq.batches import Batch
from dmpq.bitmap import BitMap
from dmpq.config import SearchConfig
from dmpq.errors import InputError
from dmpq.files import remove, replace_atomically, replace_folder
from dmpq.formats import Menu
from dmpq.moe import MoEModel, TextModel
from dmpq.quantization import QuantizedTensor
from dmpq.session import Session
from dmpq.training.config import QatConfig
from dmpq.training.fake_quant import FakeQuantizedModel, TrainedExperts, check_trainable
from dmpq.training.judging import Judge, Judgement
from dmpq.training.objective import LossTerms, own_experts
from dmpq.training.workbench import Progress, Workbench, workbench

MODEL: Final = "model"
BITMAP: Final = "bitmap.json"
SUMMARY: Final = "summary.json"

Pair = tuple[QuantizedTensor | None, QuantizedTensor | None]


@dataclass(frozen=True, eq=False)
class Trained:
    """What a quantization-aware training has made.

    Attributes:
        bench: The model, as it was saved: its weights rounded to the checkpoint's type.
        rows: What was measured on held-out text, by name, in order.
        formats: The map, menu indices (N, 2); ``None`` after random maps.
        tensors: Gives an expert's quantized matrices, by the layer's ordinal and its index there,
            where they are not what the map's quantizer makes of the saved weights.
    """

    bench: Workbench
    rows: Mapping[str, Judgement]
    formats: NDArray[np.int64] | None
    tensors: Callable[[int, int], Pair] | None


def check_map(bitmap: BitMap, moe: MoEModel) -> NDArray[np.int64]:
    """Return a map's formats, menu indices (N, 2).

    Raises:
        InputError: If it was made for other weights, or for other experts.
    """
    if moe.fingerprint != bitmap.model["fingerprint"]:
        raise InputError(
            f"The bit map was made for weights {bitmap.model['fingerprint'][:12]}..., {moe.name} "
            f"has {moe.fingerprint[:12]}...; give the right --model."
        )
    chosen = bitmap.to_assignment(moe.spec)
    return np.broadcast_to(chosen.reshape(moe.spec.num_experts, -1), (moe.spec.num_experts, 2))


def qat(config: QatConfig, bitmap: BitMap | None, folder: Path, progress: Progress) -> Trained:
    """Train, and save the checkpoint; the rows say what it is worth.

    Args:
        config: How.
        bitmap: The map to train under; ``None`` for random maps.
        folder: Where to: checkpoints of the training, ``model`` and, of a map, ``bitmap.json``.
        progress: Called with a stage's name, steps done, and all steps.

    Raises:
        InputError: If the map belongs to another model, or the loss does not stay finite.
    """
    bench = workbench(config)
    moe = bench.moe
    check_trainable(moe)
    menu = _menu(config, bitmap)
    formats = None if bitmap is None else check_map(bitmap, moe)
    teacher = bench.frozen_copy()
    judge = bench.judge(teacher)
    learner = FakeQuantizedModel(moe, menu, ranges="recomputed", refresh=config.refresh)
    maps = {"the map": formats} if formats is not None else _uniform(menu, moe)
    rows: dict[str, Judgement] = {}
    with own_experts(moe):
        rows["full precision"] = judge(moe)
    rows |= _judged(learner, judge, maps, "before")
    if config.control:
        rows |= _control(bench, folder / "control", judge, learner, maps, progress)
        _restore(moe, teacher)
    if config.ranges == "learned":
        assert formats is not None
        learner = FakeQuantizedModel(moe, menu, ranges="learned")
        learner.choose(formats)
        for layer in learner.layers:
            layer.learn_ranges()
    train_under(bench, config, folder / "training", learner, formats, teacher, progress)
    dtype = moe.model.config.dtype or torch.float32
    round_weights(moe, dtype)
    rows |= _judged(learner, judge, maps, "after")
    with own_experts(moe):
        rows["full precision, after"] = judge(moe)
    tensors = _learned_tensors(learner) if config.ranges == "learned" else None
    for layer in learner.layers:
        layer.drop_ranges()
    moe.__dict__.pop("fingerprint", None)  # of the weights before, a cached property
    save(bench, folder / MODEL, dtype)
    return Trained(bench, rows, formats, tensors)


def _menu(config: QatConfig, bitmap: BitMap | None) -> Menu:
    if bitmap is not None:
        return bitmap.menu
    return Menu.parse(config.bits, quantizer=config.quantizer, symmetric=config.symmetric)


def _uniform(menu: Menu, moe: MoEModel) -> dict[str, NDArray[np.int64]]:
    """Return the uniform map of every format that stores something."""
    shape = (moe.spec.num_experts, 2)
    return {f"uniform {menu.keys[i]}": np.full(shape, i) for i in menu.stored}


def _judged(
    learner: FakeQuantizedModel,
    judge: Judge,
    maps: Mapping[str, NDArray[np.int64]],
    when: str,
) -> dict[str, Judgement]:
    """Return what each map is worth now."""
    found = {}
    with learner.moe.experts_forward(learner.forwards):
        for name, formats in maps.items():
            learner.choose(formats)
            found[f"{name}, {when}"] = judge(learner.moe)
    return found


def _control(
    bench: Workbench,
    folder: Path,
    judge: Judge,
    learner: FakeQuantizedModel,
    maps: Mapping[str, NDArray[np.int64]],
    progress: Progress,
) -> dict[str, Judgement]:
    """Train in full precision on the same data, and return what that gives."""
    moe = bench.moe
    bench.train(
        LossTerms(balance=bench.config.balance, z=bench.config.z),
        folder,
        forwards=[TrainedExperts(experts) for experts in moe.containers],
        progress=progress,
        stage="training, full precision",
    )
    with own_experts(moe):
        rows = {"full precision, control": judge(moe)}
    return rows | _judged(learner, judge, maps, "control")


def _restore(moe: MoEModel, teacher: MoEModel) -> None:
    with torch.no_grad():
        own = dict(moe.model.named_parameters())
        for name, parameter in teacher.model.named_parameters():
            own[name].copy_(parameter)


def train_under(
    bench: Workbench,
    config: QatConfig,
    folder: Path,
    learner: FakeQuantizedModel,
    formats: NDArray[np.int64] | None,
    teacher: MoEModel,
    progress: Progress,
) -> None:
    """Train a model as its experts are quantized.

    Args:
        bench: The model.
        config: How.
        folder: Of checkpoints and the log.
        learner: Of the same model.
        formats: The map, menu indices (N, 2); ``None`` for a random one at every batch.
        teacher: For terms of the loss that need one.
        progress: Called with a stage's name, steps done, and all steps.
    """
    terms = LossTerms(
        labels=config.labels,
        distillation=config.distillation,
        routers=config.routers,
        balance=config.balance,
        z=config.z,
    )
    if formats is not None:
        learner.choose(formats)

    def on_batch(step: int, _: Batch) -> None:
        learner.begin(step)
        if formats is None:
            choose_at_random(learner, step, seed=config.seed)

    bench.train(
        terms,
        folder,
        forwards=learner.forwards,
        teacher=teacher if terms.needs_teacher else None,
        on_batch=on_batch,
        trained=partial(_is_trained, config.train, _paths(bench.moe)),
        progress=progress,
        stage="training, quantized",
    )


def choose_at_random(learner: FakeQuantizedModel, step: int, *, seed: int) -> None:
    """Give every expert a format of its own: all maps are equally likely, by seed and step.

    Maps of all widths, and so of all sizes between: what one set of weights has to tolerate is
    every map, as in slimmable networks (Yu et al., arXiv 1812.08928).

    Args:
        learner: Whose map is set.
        step: Number of the batch.
        seed: Of the training.
    """
    layers = learner.layers
    stored = np.array(layers[0].menu.stored)
    experts = sum(layer.experts.num_experts for layer in layers)
    drawn = stored[np.random.default_rng([seed, 1, step]).integers(len(stored), size=experts)]
    learner.choose(np.repeat(drawn[:, None], 2, 1))


def _paths(moe: MoEModel) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the experts' parameters, and of the routers'."""
    experts = {
        f"{one.path}.{name}" for one in moe.containers for name, _ in one.module.named_parameters()
    }
    routers = {id(one.router) for one in moe.containers if one.router is not None}
    own = {name for name, parameter in moe.model.named_parameters() if id(parameter) in routers}
    return frozenset(experts), frozenset(own)


def _is_trained(which: str, paths: tuple[frozenset[str], frozenset[str]], name: str) -> bool:
    return which == "all" or name in paths[which == "routers"]


def round_weights(model: TextModel, dtype: torch.dtype) -> None:
    """Round all weights to what a checkpoint's type can hold, and keep them in FP32."""
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def _learned_tensors(learner: FakeQuantizedModel) -> Callable[[int, int], Pair]:
    """Return what gives each expert's matrices with their learned ranges, as they are now."""
    found = [
        [layer.quantized(expert) for expert in range(layer.experts.num_experts)]
        for layer in learner.layers
    ]
    return lambda layer, expert: found[layer][expert]


def save(bench: Workbench, folder: Path, dtype: torch.dtype) -> None:
    """Write a model and its tokenizer as transformers loads them, whole or not at all.

    Args:
        bench: Of the model, whose weights stay as they are.
        folder: Where to; what is there is replaced.
        dtype: Of the weights on disk.
    """
    import copy

    partial_folder = folder.parent / f".{folder.name}.partial"
    remove(partial_folder)
    model = copy.deepcopy(bench.model.model).to(dtype)
    model.save_pretrained(partial_folder)
    bench.tokenizer.save_pretrained(partial_folder)
    replace_folder(partial_folder, folder)


def mapped(bitmap: BitMap, folder: Path, progress: Progress) -> BitMap:
    """Return the map of the trained checkpoint: the same formats, measured on it anew.

    The KL that it states is to the trained checkpoint's own full precision, as of every map.

    Args:
        bitmap: The map that it was trained under.
        folder: Where the checkpoint is, as the map is to name it.
        progress: Called with a stage's name, steps done, and all steps.
    """
    text = bitmap.text
    config = SearchConfig(
        model=str(folder),
        hw=bitmap.hardware["name"],
        cost_geometry=bitmap.hardware["cost_geometry"],
        dataset=text["dataset"],
        heldout_tokens=text["heldout_tokens"],
        sequence_length=None if "task" in text else text["sequence_length"],
        task=text.get("task"),
        text_column=text.get("text_column"),
        label_column=text.get("label_column"),
        bits=",".join(bitmap.menu.keys),
        quantizer=bitmap.menu.quantizer,
        symmetric=bitmap.menu.symmetric,
        profile_tokens=0,
        search_tokens=0,
        selection_tokens=0,
        further_tokens=0,
    )
    session = Session(config, progress=progress)
    moe = session.moe
    evaluator = session.evaluator("heldout")
    chosen = bitmap.to_assignment(moe.spec)[None]
    found = evaluator.evaluate(chosen)
    measured = {"heldout_kl": float(found.kl[0]), "heldout_perplexity": float(found.perplexity[0])}
    if config.task is not None:
        from dmpq.tasks.evaluator import TaskEvaluator

        assert isinstance(evaluator, TaskEvaluator)
        del measured["heldout_perplexity"]
        (judged,) = evaluator.metrics(chosen)
        measured |= {f"heldout_{name}": value for name, value in judged.items()}
    units = bitmap.metrics["measured"]
    metrics = {
        **bitmap.metrics,
        "measured": {
            name: {"value": value, "unit": units[name]["unit"]}
            for name, value in measured.items()
            if name in units
        },
    }
    model = {
        **bitmap.model,
        "id": str(folder),
        "revision": None,
        "architecture": type(moe.model).__name__,
        "fingerprint": moe.fingerprint,
    }
    return replace(bitmap, model=model, geometry=moe.spec, metrics=metrics)


def write_summary(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what a training was and found."""
    replace_atomically(folder / SUMMARY, (json.dumps(facts, indent=2) + "\n").encode())
