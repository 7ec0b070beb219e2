"""Print and write the reference model's card: training, loss, damage by uniform bits, routing.

    python benchmarks/reference_card.py --write

``--write`` also measures the profile that is shipped beside the model, and lists the held-out
modules with their hashes, so that another interpreter can tell that its text differs. The numbers
come from the bundled checkpoint and the embedded text of this interpreter.
"""

from __future__ import annotations

import argparse
import json
import math
import os

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np
import torch

from dmpq.bank import Bank
from dmpq.config import SearchConfig
from dmpq.data import TokenRequest, load_splits
from dmpq.embedded import fingerprint
from dmpq.formats import Menu
from dmpq.model_evaluator import ModelEvaluator
from dmpq.moe import MoEModel, load_model, reference_path
from dmpq.profile import Profile, reference_profile
from dmpq.session import Session

HELDOUT_TOKENS = 131_072
WIDTHS = (8, 4, 3, 2)


def heldout_evaluator(moe: MoEModel, windows: np.ndarray, menu: Menu) -> ModelEvaluator:
    """Return an evaluator of the held-out text on one menu."""
    return ModelEvaluator(Bank(moe, menu), windows, label="heldout")


def damage_table(moe: MoEModel, windows: np.ndarray) -> tuple[float, list[str]]:
    """Return bits per byte at full precision, and the damage of uniform maps as table rows."""
    rows, full = [], 0.0
    for quantizer in ("rtn", "hqq"):
        for group in (32, 128):
            keys = [f"{b}" if group == 128 else f"{b}g{group}" for b in reversed(WIDTHS)]
            menu = Menu.parse(keys, quantizer=quantizer)
            evaluator = heldout_evaluator(moe, windows, menu)
            full = evaluator.full_nll()
            experts = moe.spec.num_experts
            uniform = np.arange(len(menu))[::-1, None].repeat(experts, 1)
            answers = evaluator.evaluate(uniform)
            losses = " | ".join(
                f"{nll - full:+.4f} ({kl:.4f})"
                for nll, kl in zip(answers.nll, answers.kl, strict=True)
            )
            rows.append(f"| {quantizer.upper()}, group {group} | {losses} |")
    return full / math.log(2), rows


def routing_table(profile: Profile) -> list[str]:
    """Return per MoE layer the share of tokens that selects each expert, in percent."""
    layers = profile.spec.layer_of_expert
    return [
        f"| {layer} | "
        + " ".join(f"{100 * f:.0f}" for f in profile.frequency[layers == layer])
        + " |"
        for layer in np.unique(layers)
    ]


def card(profile: Profile, moe: MoEModel, windows: np.ndarray) -> str:
    """Return the card as Markdown."""
    training = moe.model.config.training
    spec, room = moe.spec, profile.head_room()
    bits_per_byte, damage = damage_table(moe, windows)
    parameters = sum(p.numel() for p in moe.model.parameters())
    change = profile.router_norm_change
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "tags: [moe, olmoe, byte-level]",
        "---",
        "",
        "# The reference model of dmpq",
        "",
        "A small OLMoE on bytes, so that every part of `dmpq` runs on a real, trained",
        "Mixture-of-Experts model without a download. It is not meant to write text.",
        "",
        f"- Architecture: `OlmoeForCausalLM`, {spec.num_layers} layers of "
        f"{spec.moe_layers[0].num_experts} experts, top-{spec.moe_layers[0].top_k}, hidden size "
        f"{spec.hidden_size}, expert size {spec.moe_layers[0].intermediate_size}; "
        f"{parameters / 1e6:.2f} M parameters, {spec.expert_parameters / 1e6:.2f} M in experts.",
        "- Training text: the training side of the standard library of CPython 3.11 (code and "
        "docstrings; `dmpq/embedded.py`), by `benchmarks/train_reference.py`.",
        f"- {training['tokens'] / 1e6:.1f} M tokens (bytes) in {training['seconds'] / 60:.0f} "
        "minutes on two CPU cores.",
        f"- Held-out bits per byte: **{bits_per_byte:.4f}** on {windows.size:,} bytes of modules "
        "that training never saw (`heldout_modules.json`).",
        f"- Head-room AM/GM: {room['within_layers']:.2f} within layers (squared output error at "
        f"2 bits), {room['whole_model']:.2f} over all experts (sensitivity at 2 bits).",
        f"- Router rows have grown by {change.mean():.2f} on average since initialisation "
        f"({change.min():.2f} to {change.max():.2f}; `router_init_norms` in `config.json`).",
        "",
        "Held-out loss increase of uniform maps, nats per byte, and KL to full precision in "
        "parentheses. Groups are never wider than the input: 64 for gate and up, 128 for down.",
        "",
        "| quantizer | " + " | ".join(f"{b} bits" for b in WIDTHS) + " |",
        "| --- |" + " ---: |" * len(WIDTHS),
        *damage,
        "",
        f"Share of tokens that selects each expert, per cent ({profile.tokens:,} calibration "
        "tokens; even would be 12.5):",
        "",
        "| layer | experts |",
        "| --- | --- |",
        *routing_table(profile),
        "",
        "Printed by `python benchmarks/reference_card.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the card, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write README.md beside the model")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = reference_path().parent
    if arguments.write:
        profile = Session(SearchConfig(serve="projection")).profile()
        profile.save(folder / "profile.safetensors")
    moe, tokenizer = load_model()
    request = TokenRequest(0, 0, 0, HELDOUT_TOKENS)
    length = moe.model.config.max_position_embeddings
    splits = load_splits("embedded", tokenizer, length=length, tokens=request, seed=0)
    text = card(reference_profile(), moe, splits.heldout)
    print(text)
    if arguments.write:
        (folder / "README.md").write_text(text, encoding="utf-8")
        hashes = json.dumps(fingerprint("heldout"), indent=2) + "\n"
        (folder / "heldout_modules.json").write_text(hashes, encoding="utf-8")


if __name__ == "__main__":
    main()
