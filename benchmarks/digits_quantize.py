"""Eight bits for the digits models, by what torch and torchao have today, and their files.

- The baseline, static: weights and activations int8, activation ranges observed on training
  images; torchao's PT2E with ``X86InductorQuantizer``, run by oneDNN's int8 products.
- The MoE, dynamic: int8 weights per row, activations quantized per row as they come;
  torchao's ``Int8DynamicActivationInt8WeightConfig`` on linear layers and on the 3-D parameters of
  the experts. torchao's int8 tensors have no grouped product, so experts run one after the other.
- Both again by ``torch.ao.quantization``, which torch deprecates for these two and still has: it
  quantizes modules, so that experts are a list of linear layers, and runs FBGEMM's products.

The router stays in fp32 everywhere.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
from digits_models import EXPERTS, SparseMoE, by_expert
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.fx import GraphModule, Node

from dmpq.files import replace_atomically

QUANTIZED: Final = ("input", "experts.up", "experts.down", "head")
"""The MoE's matrices that are quantized; the router is not."""


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep deprecations out of the way that are the libraries' own, or said in this module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def static_int8(model: nn.Sequential, calibration: torch.Tensor) -> GraphModule:
    """Return the baseline with static int8 weights and activations, as torchao's PT2E makes it.

    The graph is a reference: it computes in fp32 what int8 numbers stand for; :func:`lowered`
    makes it run on int8. Activations are 7 bits wide, since 8-bit products overflow their 16-bit
    sums on CPUs without VNNI.

    Args:
        model: The trained baseline.
        calibration: fp32 (N, pixels), what activation ranges are observed on.
    """
    with _no_warnings(), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        rows = ({0: torch.export.Dim.DYNAMIC},)
        graph = torch.export.export(model, (calibration,), dynamic_shapes=rows).module()
        settings = x86.get_default_x86_inductor_quantization_config(reduce_range=True)
        observed = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(settings))
        observed(calibration)
        converted: GraphModule = convert_pt2e(observed)
    return converted


def lowered(converted: GraphModule, rows: int, pixels: int) -> GraphModule:
    """Return a statically quantized graph that runs int8 products, for batches of so many rows."""
    with _no_warnings(), torch.no_grad():
        from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

        ready: GraphModule = lower_pt2e_quantized_to_x86(converted, (torch.zeros(rows, pixels),))
    return ready


def dynamic_int8(model: SparseMoE) -> SparseMoE:
    """Return the MoE with int8 weights of torchao, activations quantized as they come."""
    with _no_warnings():
        from torchao.quantization import (
            FqnToConfig,
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        quantized = deepcopy(model)
        quantized.dispatch = by_expert
        config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        names = {f"{name}.weight" if "." not in name else name: config for name in QUANTIZED}
        quantize_(quantized, FqnToConfig(names), filter_fn=None)
    return quantized


class ExpertList(nn.Module):
    """The experts as linear layers, for quantizers that know modules only.

    Args:
        experts: What is copied.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        weights = dict(experts.named_parameters())
        for name in ("up", "down"):
            pairs = zip(weights[name], weights[f"{name}_bias"], strict=True)
            setattr(self, name, nn.ModuleList(_linear(w, b) for w, b in pairs))

    def one(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Return what one expert makes of rows (R, 256): (R, 128)."""
        result: torch.Tensor = self.down[expert](self.up[expert](rows).relu())
        return result


def static_int8_eager(model: nn.Sequential, calibration: torch.Tensor) -> nn.Module:
    """Return the baseline with static int8 numbers by ``torch.ao.quantization``."""
    with _no_warnings(), torch.no_grad():
        from torch.ao import quantization

        wrapped = quantization.QuantWrapper(deepcopy(model)).eval()
        wrapped.qconfig = quantization.get_default_qconfig("x86")
        observed = quantization.prepare(wrapped)
        observed(calibration)
        converted: nn.Module = quantization.convert(observed)
    return converted


def dynamic_int8_eager(model: SparseMoE) -> SparseMoE:
    """Return the MoE with dynamically quantized linear layers by ``torch.ao.quantization``."""
    with _no_warnings():
        from torch.ao import quantization

        listed = deepcopy(model)
        listed.dispatch = by_expert
        listed.experts = ExpertList(model.experts)
        names = {
            name
            if "." not in name
            else f"{name}.{expert}": quantization.per_channel_dynamic_qconfig
            for name in QUANTIZED
            for expert in range(EXPERTS)
        }
        quantized: SparseMoE = quantization.quantize_dynamic(listed, names)
    return quantized


def save_float(model: nn.Module, path: Path) -> int:
    """Write a model in fp32 as safetensors; returns the file's bytes."""
    return _write(path, save(model.state_dict()))


def save_static(converted: GraphModule, path: Path) -> int:
    """Write a statically quantized baseline as safetensors; returns the file's bytes.

    Of layer i: ``i.weight`` int8 (out, in), ``i.weight_scale`` fp32 (out,), ``i.bias`` fp32
    (out,), ``i.input_scale`` fp32 and ``i.input_zero_point`` uint8 of its activations, which are
    uint8. That is all that it takes to run it, see ``run_static_file`` in the tests.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer, linear in enumerate(_calls(converted, torch.ops.aten.linear.default)):
        rows, weight, bias = (_node(one) for one in linear.args)
        quantize = _node(rows.args[0])
        packed, scale, zero = (_constant(converted, _node(one)) for one in weight.args[:3])
        assert not zero.any(), "the quantizer's weights are symmetric"
        tensors[f"{layer}.weight"] = packed.contiguous()
        tensors[f"{layer}.weight_scale"] = scale
        tensors[f"{layer}.bias"] = _constant(converted, bias).detach()
        tensors[f"{layer}.input_scale"] = torch.tensor(quantize.args[1])
        tensors[f"{layer}.input_zero_point"] = torch.tensor(quantize.args[2], dtype=torch.uint8)
    return _write(path, save(tensors))


def save_dynamic(quantized: SparseMoE, path: Path) -> int:
    """Write a dynamically quantized MoE as torchao's safetensors; returns the file's bytes."""
    with _no_warnings():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict(quantized.state_dict())
    return _write(path, save(tensors, metadata=_text(metadata)))


def load_dynamic(path: Path, pixels: int) -> SparseMoE:
    """Return the MoE that :func:`save_dynamic` wrote."""
    with _no_warnings():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state, left = unflatten_tensor_state_dict(tensors, file.metadata())
    assert not left, "every tensor of the file is one of the model's"
    model = SparseMoE(pixels, by_expert)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as safetensors takes it: text only."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


def _calls(graph: GraphModule, operation: Any) -> Iterator[Node]:
    return (node for node in graph.graph.nodes if node.target == operation)


def _node(value: Any) -> Node:
    assert isinstance(value, Node)
    return value


def _constant(graph: GraphModule, node: Node) -> torch.Tensor:
    """Return the tensor that a node of a graph stands for."""
    owner, _, name = str(node.target).rpartition(".")
    tensor: torch.Tensor = getattr(graph.get_submodule(owner), name)
    return tensor


def _write(path: Path, data: bytes) -> int:
    replace_atomically(path, data)
    return path.stat().st_size
