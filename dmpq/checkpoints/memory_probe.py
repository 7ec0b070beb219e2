"""``python -m dmpq.checkpoints.memory_probe FOLDER``: what it takes once loaded, as JSON.

A process of its own, because memory that another model has used does not come back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from dmpq.errors import InputError

_TOKENS: Final = 64


def resident_bytes(folder: Path) -> int:
    """Return by how much a process grows that loads a checkpoint and runs it once.

    Args:
        folder: An ordinary checkpoint, or one of ``dmpq.apply``.

    Raises:
        InputError: If it cannot be loaded.
    """
    command = [sys.executable, "-m", "dmpq.checkpoints.memory_probe", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise InputError(f"{folder} cannot be loaded to measure its memory: {reason[:200]}.")
    return int(json.loads(done.stdout)["resident_bytes"])


def main() -> int:
    """Load, run once, print; returns the exit code."""
    import psutil
    import torch
    from transformers import AutoConfig

    import dmpq.hf
    from dmpq.console import quiet_libraries
    from dmpq.families import auto_class

    assert dmpq.hf.METHOD
    quiet_libraries()
    torch.set_num_threads(1)
    process = psutil.Process()
    before = process.memory_info().rss
    kind = auto_class(AutoConfig.from_pretrained(sys.argv[1]))
    model = kind.from_pretrained(sys.argv[1], dtype="auto", use_safetensors=True)
    ids = torch.arange(_TOKENS)[None] % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        model(**inputs, use_cache=False)
    grown = process.memory_info().rss - before
    sys.stdout.write(json.dumps({"resident_bytes": grown}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
