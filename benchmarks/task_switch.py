"""A small Switch Transformer for `benchmarks/tasks.py`: an encoder-decoder that translates.

Every feed-forward layer has experts, of which a token reads one (arXiv 2101.03961, section 2.1).
No token is ever dropped: an expert has room for the longest sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from task_models import Recipe
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
)

SWITCH = "translation-encoder-decoder"
"""Its name among the recipes of `benchmarks/tasks.py`."""
SWITCH_RECIPE = Recipe(
    vocabulary=2500,
    epochs=5,
    hidden=128,
    layers=2,
    intermediate=256,
    learning_rate=3e-3,
    longest=128,
)


def untrained_switch(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return a random model with as many layers in the encoder as in the decoder."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=len(tokenizer),
        d_model=recipe.hidden,
        d_kv=recipe.hidden // 4,
        d_ff=recipe.intermediate,
        num_heads=4,
        num_layers=recipe.layers,
        num_decoder_layers=recipe.layers,
        num_sparse_encoder_layers=recipe.layers,
        num_sparse_decoder_layers=recipe.layers,
        num_experts=recipe.experts,
        expert_capacity=recipe.longest,
        dropout_rate=recipe.dropout,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:  # all experts are to learn before the router has made up its mind
                parameter.normal_(std=recipe.hidden**-0.5)
    return model
