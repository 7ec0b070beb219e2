"""Weight quantizers: round to nearest and HQQ, in groups along the input dimension."""

from dmpq.quantization.packing import pack_codes, unpack_codes
from dmpq.quantization.quantizers import quantize
from dmpq.quantization.tensor import QuantizedTensor

__all__ = ["QuantizedTensor", "pack_codes", "quantize", "unpack_codes"]
