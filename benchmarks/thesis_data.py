"""What `benchmarks/thesis.py` trains on: its data sets, and a bare encoder with a tokenizer."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, PreTrainedTokenizerFast

from dmpq.tasks.examples import Encoder
from dmpq.tasks.splits import TASKS
from dmpq.tasks.tables import read_tables

Row = dict[str, Any]
PAD, CLS, SEP = "[PAD]", "[CLS]", "[SEP]"
LONGEST = 60
CLASSIFICATION, ENTITIES = "classification", "token-classification"


@dataclass(frozen=True)
class Study:
    """One data set of the experiment.

    Attributes:
        name: What it is called.
        task: As ``--task`` spells it.
        dataset: A file, a folder, or a hub name.
    """

    name: str
    task: str
    dataset: str


def _unpacked(file: Path) -> str:
    return gzip.decompress(file.read_bytes()).decode("utf8")


def _sst2(data: Path) -> dict[str, list[Row]]:
    names = ("negative", "positive")
    found = {}
    for split in ("train", "test"):
        lines = _unpacked(data / f"sst2/{split}.tsv.gz").splitlines()
        pairs = [line.rsplit("\t", 1) for line in lines]
        found[split] = [{"sentence": s.strip(), "label": names[int(n)]} for s, n in pairs]
    return found


def _sentences(text: str) -> list[Row]:
    """Return the sentences of a file of a word and its tag per line.

    Sentences of more than :data:`LONGEST` words, which may be more tokens than the encoder reads,
    are left out; the page says how many examples there are.
    """
    rows = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        pairs = [line.split() for line in block.splitlines() if line.strip()]
        pairs = [pair for pair in pairs if len(pair) > 1 and pair[0] != "-DOCSTART-"]
        if 0 < len(pairs) <= LONGEST:
            rows.append({"tokens": [p[0] for p in pairs], "ner_tags": [p[-1] for p in pairs]})
    return rows


def _wikigold(data: Path) -> dict[str, list[Row]]:
    """Return sentences, every fifth of which is held out: there is no official split."""
    rows = _sentences(_unpacked(data / "wikigold/wikigold.conll.txt.gz"))
    return {"train": [r for i, r in enumerate(rows) if i % 5], "test": rows[::5]}


def _wnut17(data: Path) -> dict[str, list[Row]]:
    train = _unpacked(data / "wnut17/wnut17train.conll.gz")
    test = _unpacked(data / "wnut17/emerging.test.annotated.gz")
    return {"train": _sentences(train), "test": _sentences(test)}


OURS: dict[str, tuple[str, Callable[[Path], dict[str, list[Row]]]]] = {
    "sst2": (CLASSIFICATION, _sst2),
    "wikigold": (ENTITIES, _wikigold),
    "wnut17": (ENTITIES, _wnut17),
}


def our_studies(data: Path, work: Path) -> list[Study]:
    """Return the three data sets of the thesis, written as tables of one row per line.

    Args:
        data: Where the public files are.
        work: Where the tables are written.
    """
    found = []
    for name, (task, read) in OURS.items():
        folder = work / f"{name}-data"
        if not folder.exists():
            partial = work / f".{name}-{os.getpid()}"
            partial.mkdir(parents=True)
            for split, rows in read(data).items():
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (partial / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            os.replace(partial, folder)
        found.append(Study(name, task, str(folder)))
    return found


def texts_of(study: Study) -> list[str]:
    """Return the texts that a data set trains on: of its columns of texts or of words."""
    tables = read_tables(study.dataset)
    bare = TASKS[study.task](Encoder(None, {}, 0, 0))
    columns = bare.columns(tables.columns, text=None, label=None, where=study.dataset)
    names = [name for purpose, name in columns.items() if purpose in ("text", "second", "words")]
    values = [row[name] for row in tables.calibration for name in names]
    return [" ".join(value) if isinstance(value, list) else str(value) for value in values]


def bare_encoder(folder: Path, texts: Sequence[str], *, vocabulary: int, hidden: int) -> Path:
    """Write the configuration of a small BERT, and a tokenizer learned from texts; no weights.

    Args:
        folder: Where to.
        texts: Of any script: the tokenizer works on bytes.
        vocabulary: Tokens, at most.
        hidden: Width; an FFN has twice that.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, CLS, SEP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B {SEP}",
        special_tokens=[(CLS, core.token_to_id(CLS)), (SEP, core.token_to_id(SEP))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        cls_token=CLS,
        sep_token=SEP,
        clean_up_tokenization_spaces=False,
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.1,
        initializer_range=0.05,
        dtype="float32",
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
