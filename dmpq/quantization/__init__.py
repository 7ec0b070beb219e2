"""Weight quantizers in groups along the input dimension: RTN, HQQ, GPTQ, and compensators."""

from dmpq.quantization.gptq import gptq, inverse_factor
from dmpq.quantization.packing import pack_codes, unpack_codes
from dmpq.quantization.quantizers import quantize, quantize_expert
from dmpq.quantization.tensor import QuantizedTensor, stacked

__all__ = [
    "QuantizedTensor",
    "gptq",
    "inverse_factor",
    "pack_codes",
    "quantize",
    "quantize_expert",
    "stacked",
    "unpack_codes",
]
