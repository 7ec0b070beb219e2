"""A packed checkpoint on a GPU: the same weights as on the CPU, and text from them."""

import pytest
import torch
from conftest import build
from test_apply import bitmap_of
from transformers import AutoModelForCausalLM

import dmpq.hf  # noqa: F401, registers the format
from dmpq.checkpoints.checkpoint import Checkpoint
from dmpq.checkpoints.packed import PackedExperts
from dmpq.checkpoints.quantized import QuantizedCheckpoint
from dmpq.formats import Menu
from dmpq.moe import MoEModel


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", ["hqq", "rtn", "hqq+lr4"])
def test_a_gpu_dequantizes_the_cpu_s_weights_and_generates(quantizer, tmp_path, token_ids):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = build("olmoe").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    moe = MoEModel(model, name=str(tmp_path / "model"))
    menu = Menu.parse("2,3,4,8,16", quantizer=quantizer)
    assignment = torch.arange(moe.spec.num_experts).numpy() % len(menu)
    bitmap = bitmap_of(moe, menu, assignment, tmp_path)
    made = QuantizedCheckpoint(bitmap, Checkpoint(str(tmp_path / "model")))
    made.write(tmp_path / "out", card="")

    on_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    on_gpu = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    on_gpu = on_gpu.to("cuda")
    pairs = [
        [one for one in m.modules() if isinstance(one, PackedExperts)] for m in (on_cpu, on_gpu)
    ]
    for here, there in zip(*pairs, strict=True):
        for expert in range(here.layout.layer.num_experts):
            for side in (0, 1):
                wanted = here.weights(expert, side, torch.bfloat16)
                got = there.weights(expert, side, torch.bfloat16)
                assert got.is_cuda
                assert torch.equal(got.cpu(), wanted)

    with torch.no_grad():
        wanted = on_cpu(input_ids=token_ids).logits
        got = on_gpu(input_ids=token_ids.to("cuda")).logits
    torch.testing.assert_close(got.cpu(), wanted, rtol=0.1, atol=0.05)
    written = on_gpu.generate(token_ids[:1].to("cuda"), max_new_tokens=8, do_sample=False)
    assert written.shape[1] > token_ids.shape[1]
