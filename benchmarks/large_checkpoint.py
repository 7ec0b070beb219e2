"""A checkpoint larger than the memory it may take: profiled and quantized, with the peaks.

    python benchmarks/large_checkpoint.py --folder SCRATCH        # 6.6 GB, about 12 GB of disk

Writes a synthetic checkpoint of OLMoE's widths and a small vocabulary (random weights: only sizes
and memory are measured) and a map of mixed widths for it; then, in processes of their own, takes a
profile by gradients of some random tokens, and runs ``python -m dmpq.apply``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from dmpq.bitmap import BitMap, assignment_from
from dmpq.checkpoints.checkpoint import INDEX, Checkpoint
from dmpq.checkpoints.tensor_files import TensorFileWriter, TensorInfo
from dmpq.formats import Menu

HERE = Path(__file__).parent
_IMPORTS = (
    "import dmpq.hf, dmpq.apply, dmpq.checkpoints.quantized, dmpq.checkpoints.streamed_profile; "
    "import dmpq.console; dmpq.console.quiet_libraries()"
)


def main() -> int:
    """Write the checkpoint where it is not there, quantize it, and print sizes and the peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder")
    parser.add_argument("--layers", type=int, default=4, help="of 1.64 GB each")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=1024, help="that are profiled")
    parser.add_argument("--quantizer", default="rtn")
    parser.add_argument("--max-memory", default="0.65", help="GB beside the imports")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    model = arguments.folder / f"synthetic-{arguments.layers}"
    if not (model / INDEX).exists():
        write_checkpoint(model, arguments.layers, arguments.vocabulary)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    bitmap = arguments.folder / "bitmap.json"
    write_map(model, bitmap, arguments.quantizer)
    out = arguments.folder / f"quantized-{time.time_ns()}"
    base, _ = peak_memory(["-c", _IMPORTS])
    limit = float(arguments.max_memory) * 1e9
    call = f"profile({str(model)!r}, {arguments.tokens}, {limit})"
    code = f"from large_checkpoint import profile; {call}"
    os.environ["PYTHONPATH"] = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    profiled, took = peak_memory(["-c", f"{_IMPORTS}; {code}"])
    print(f"profiled {arguments.tokens} tokens in {took:.0f} s")
    print(f"peak resident memory over the imports: {(profiled - base) / 1e6:,.0f} MB\n")
    command = ["-m", "dmpq.apply", str(bitmap), "--model", str(model), "--out", str(out)]
    peak, seconds = peak_memory([*command, "--max-memory", arguments.max_memory])
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"\nsource {size / 1e9:.2f} GB, quantized {written / 1e9:.2f} GB in {seconds:.0f} s")
    print(f"peak resident memory {peak / 1e6:,.0f} MB, the imports' {base / 1e6:,.0f} MB")
    print(f"peak resident memory over the imports: {(peak - base) / 1e6:,.0f} MB")
    return 0


def profile(model: str, tokens: int, limit: float) -> None:
    """Take a profile of random tokens, in windows of 128, within a limit of bytes."""
    from dmpq.checkpoints.streamed_profile import batch_tokens, streamed_profile

    torch.set_num_threads(1)
    files = sorted(Path(model).glob("*.safetensors"))
    size, started = sum(file.stat().st_size for file in files), time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass
    plain = time.monotonic() - started
    source = Checkpoint(model)
    vocabulary = source.moe.spec.vocab_size
    windows = np.random.default_rng(0).integers(vocabulary, size=(tokens // 128, 128))
    before, started = _bytes_read(), time.monotonic()
    with tempfile.TemporaryDirectory(dir=Path(model).parent) as kept:
        found = streamed_profile(
            source,
            Menu.parse("2,4,8", quantizer="rtn"),
            windows,
            text="random tokens",
            lot=batch_tokens(source, 128, limit),
            kept=Path(kept),
        )
    took, read = time.monotonic() - started, _bytes_read() - before
    print(f"experts hit: {int((found.hits > 0).sum())} of {found.spec.num_experts}")
    print(
        f"read {read / 1e9:.1f} GB, {read / size:.1f} times the checkpoint, in {took:.0f} s; "
        f"reading it once and doing nothing took {plain:.1f} s"
    )


def _bytes_read() -> int:
    """Return what this process has read so far, from the disk or its cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def peak_memory(arguments: list[str]) -> tuple[int, float]:
    """Run Python, and return its largest resident memory, bytes, and its wall time, seconds."""
    started = time.monotonic()
    process = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{arguments} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, time.monotonic() - started


def write_checkpoint(folder: Path, layers: int, vocabulary: int) -> None:
    """Write an OLMoE of random weights, a file per layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        "olmoe", num_hidden_layers=layers, vocab_size=vocabulary, dtype="bfloat16"
    )
    config.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    text["architectures"] = ["OlmoeForCausalLM"]
    (folder / "config.json").write_text(json.dumps(text))
    hidden, width = config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(1 << 24, generator=generator) * 0.02).bfloat16()
    shards = {
        "model-embeddings.safetensors": {
            "model.embed_tokens.weight": (config.vocab_size, hidden),
            "lm_head.weight": (config.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes = {f"{prefix}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{prefix}.self_attn.{p}_norm.weight": (hidden,) for p in "qk"}
        shapes |= {
            f"{prefix}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")
        }
        shapes[f"{prefix}.mlp.gate.weight"] = (config.num_experts, hidden)
        for expert in range(config.num_experts):
            own = f"{prefix}.mlp.experts.{expert}"
            shapes |= {f"{own}.{p}_proj.weight": (width, hidden) for p in ("gate", "up")}
            shapes[f"{own}.down_proj.weight"] = (hidden, width)
        shards[f"model-layer-{layer:03}.safetensors"] = shapes
    for name, shapes in shards.items():
        infos = {key: TensorInfo(torch.bfloat16, shape) for key, shape in shapes.items()}
        with TensorFileWriter(folder / name, infos, {"format": "pt"}) as writer:
            for key, info in infos.items():
                rows = max(1, len(pool) // torch.Size(info.shape[1:]).numel())
                for start in range(0, info.shape[0], rows):
                    shape = (min(rows, info.shape[0] - start), *info.shape[1:])
                    count = torch.Size(shape).numel()
                    shift = int(torch.randint(len(pool), (), generator=generator))
                    writer.write(key, pool.roll(shift)[:count].reshape(shape), row=start)
    weight_map = {key: name for name, shapes in shards.items() for key in shapes}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_map(model: Path, path: Path, quantizer: str) -> None:
    """Write a map of mixed widths, drawn at random, for a checkpoint."""
    source = Checkpoint(str(model))
    spec, menu = source.moe.spec, Menu.parse("2,3,4,8", quantizer=quantizer)
    chosen = np.random.default_rng(0).integers(len(menu), size=spec.num_experts)
    BitMap(
        model={
            "id": str(model),
            "revision": None,
            "architecture": "OlmoeForCausalLM",
            "fingerprint": source.fingerprint(),
        },
        geometry=spec,
        menu=menu,
        assignment=assignment_from(spec, menu, chosen),
        objective={"weights": {"acc": 1.0}, "signal": "kl"},
        constraints={},
        hardware={
            "name": "a100",
            "stack": "gemlite",
            "calibrated": False,
            "source": "none: random widths",
            "cost_geometry": "own",
        },
        workload={"phase": "decode", "batch": 1, "context": 2048},
        text={"dataset": "none", "sequence_length": 2, "heldout_tokens": 1},
        serve="expert",
        metrics={"predicted": {}, "measured": {}},
        search={"agent": "random", "seed": 0, "evaluations": 0, "tokens": 0.0},
    ).write(path)


if __name__ == "__main__":
    sys.exit(main())
