"""Matrix products by real low-bit kernels: torch's own on CPU and CUDA, gemlite's on CUDA.

A kernel is offered only after a check of its answers against the dequantized weights on the very
device, so that one that is missing, or means its arguments otherwise, is left out with the reason.
torch is imported when a kernel is first asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmpq.errors import first_line
from dmpq.formats import FULL_WIDTH, Format
from dmpq.hw_models import machine

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int]
Stored = tuple[Any, ...]

TOLERANCE: Final = 0.02
"""Largest error of a product, relative to the largest entry: bf16 rounds to 3 digits."""
_CHECKED_SHAPE: Final = (256, 512)
_CHECKED_GROUP: Final = 128
_CHECKED_TOKENS: Final = (1, 5, 64)
"""A kernel may be several, by the rows of the activations: a vector, a few, many."""


@dataclass(frozen=True)
class Codes:
    """A weight matrix as a kernel sees it: ``weight = codes * scale + shift`` by groups.

    Attributes:
        codes: (out, in), int32, from 0 to ``2**bits - 1``.
        scale: (out, groups), bfloat16.
        shift: (out, groups), bfloat16.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor

    def weight(self) -> Tensor:
        """Return the dequantized weight, (out, in), float32."""
        out, groups = self.scale.shape
        by_group = self.codes.reshape(out, groups, -1).float()
        weight = by_group * self.scale.float()[:, :, None] + self.shift.float()[:, :, None]
        return weight.reshape(self.codes.shape)


@dataclass(frozen=True)
class Kernel:
    """A way to multiply bf16 activations by stored weights.

    Attributes:
        name: What it is called.
        bits: Width of the weights.
        fits: Whether it takes a matrix of shape (out, in) in groups of a size; a kernel with one
            scale per row takes any.
        grouped: Whether it has a scale per group.
        pack: Turns codes, or the bf16 weight of a 16-bit kernel, into what it stores.
        multiply: Multiplies (tokens, in) by what is stored, to (tokens, out).
    """

    name: str
    bits: int
    fits: Callable[[Shape, int], bool]
    grouped: bool
    pack: Callable[[Any, int], Stored]
    multiply: Callable[..., Tensor]

    def group_size(self, group: int) -> int:
        """Return the group that it runs with, where asked for ``group``; 0 for none."""
        return group if self.grouped else 0

    def store(self, weight: Tensor, group: int) -> Stored:
        """Return a bf16 weight, (out, in), as the kernel stores it."""
        if self.bits == FULL_WIDTH:
            return self.pack(weight, group)
        return self.pack(self.codes(weight, group), group)

    def codes(self, weight: Tensor, group: int) -> Codes:
        """Return a weight rounded to nearest; per row and symmetric where there are no groups."""
        return quantize(weight, self.bits, group if self.grouped else None)

    def __call__(self, x: Tensor, stored: Stored) -> Tensor:
        """Return the product of (tokens, in) with stored weights, (tokens, out)."""
        return self.multiply(x, *stored)


def quantize(weight: Tensor, bits: int, group: int | None) -> Codes:
    """Round a weight to nearest: in groups, or per row and symmetric where there are none."""
    import torch

    top, middle = 2**bits - 1, 2 ** (bits - 1)
    out = weight.shape[0]
    parts = weight.float().reshape(out, -1, group or weight.shape[1])
    if group is None:
        scale = (parts.abs().amax(2) / (middle - 1)).clamp_min(1e-8).bfloat16()
        shift = -middle * scale
    else:
        low, high = parts.amin(2), parts.amax(2)
        scale = ((high - low) / top).clamp_min(1e-8).bfloat16()
        shift = low.bfloat16()
    codes = (parts - shift.float()[:, :, None]) / scale.float()[:, :, None]
    rounded = codes.round().clamp(0, top).to(torch.int32).reshape(weight.shape)
    return Codes(rounded, scale, shift)


def kernels(device: str) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    """Return the kernels that work on a device, and one note for each that does not.

    Args:
        device: ``"cpu"`` or a CUDA device of torch.
    """
    return _checked(device)


def choose(found: Sequence[Kernel], fmt: Format, shapes: Iterable[Shape]) -> tuple[Kernel, int]:
    """Return the kernel that runs a format, and the group size it runs with (0 for none).

    Its own width's, else the next wider one's that takes all the shapes; 16 bits take any.

    Args:
        found: Kernels by rising width, as :func:`kernels` returns them.
        fmt: The format.
        shapes: Of the matrices, (out, in).
    """
    asked = [(shape, min(fmt.group_size, shape[1])) for shape in shapes]
    for kernel in found:
        if kernel.bits >= fmt.bits and all(kernel.fits(*one) for one in asked):
            return kernel, kernel.group_size(max(group for _, group in asked))
    raise AssertionError("every device has a 16-bit kernel that takes any shape")


@cache
def _checked(device: str) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    offered: list[Kernel] = []
    notes: list[str] = []
    # Of two kernels of one width the first that fits is taken: gemlite's, where it is installed.
    for make in (_gemlite, _torch_cuda) if device.startswith("cuda") else (_torch_cpu,):
        try:
            candidates = make(device)
        except Exception as error:  # a library that does not load may raise anything
            notes.append(f"{make.__name__.strip('_')} cannot be used: {first_line(error)}")
            continue
        for kernel in candidates:
            reason = fault(kernel, device)
            if reason is None:
                offered.append(kernel)
            else:
                notes.append(f"{kernel.name} is left out: {reason}")
    keep_tuning(device)
    return tuple(sorted(offered, key=lambda kernel: kernel.bits)), tuple(notes)


def fault(kernel: Kernel, device: str) -> str | None:
    """Return what is wrong with a kernel's answers on a device, ``None`` for nothing."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, columns = _CHECKED_SHAPE
    weight = torch.randn(rows, columns, generator=generator).mul(0.02).bfloat16().to(device)
    if kernel.bits == FULL_WIDTH:
        exact = weight.float()
    else:
        exact = kernel.codes(weight, _CHECKED_GROUP).weight()
    try:
        stored = kernel.store(weight, _CHECKED_GROUP)
        for tokens in _CHECKED_TOKENS:
            x = torch.randn(tokens, columns, generator=generator).bfloat16().to(device)
            expected = x.float() @ exact.T
            error = (kernel(x, stored).float() - expected).abs().max() / expected.abs().max()
            if not error.item() < TOLERANCE:
                return f"its products are off by {error.item():.3g} of the largest entry"
    except Exception as error:  # whatever a missing or changed kernel raises
        return first_line(error)
    return None


def library_versions(device: str) -> dict[str, str]:
    """Return the versions of the libraries whose kernels are used."""
    import torch

    found = {"torch": str(torch.__version__)}
    if device.startswith("cuda"):
        for name in ("gemlite", "triton"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
    return found


def _multiple(divisor_out: int, divisor_in: int, groups: tuple[int, ...]) -> Any:
    def fits(shape: Shape, group: int) -> bool:
        out, columns = shape
        whole = out % divisor_out == 0 and columns % divisor_in == 0
        return whole and (not groups or (group in groups and columns % group == 0))

    return fits


def _full_width(name: str) -> Kernel:
    import torch

    return Kernel(
        name=name,
        bits=FULL_WIDTH,
        fits=_multiple(1, 1, ()),
        grouped=False,
        pack=lambda weight, _group: (weight.clone(),),
        multiply=torch.nn.functional.linear,
    )


def _int8(name: str) -> Kernel:
    import torch

    def pack(codes: Codes, _group: int) -> Stored:
        signed = (codes.codes - 128).to(torch.int8).contiguous()
        return signed, codes.scale.flatten().contiguous()

    return Kernel(
        name=name,
        bits=8,
        fits=_multiple(1, 1, ()),
        grouped=False,
        pack=pack,
        multiply=torch.ops.aten._weight_int8pack_mm,
    )


def _torch_cpu(_device: str) -> list[Kernel]:
    """Return torch's CPU kernels.

    ``aten._weight_int4pack_mm_for_cpu`` takes groups of 32, 64, 128 or 256 and whole blocks of 16
    rows; ``aten._weight_int8pack_mm`` has one scale per row.
    """
    import torch

    def pack(codes: Codes, group: int) -> Stored:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes, 1)
        return packed, group, _scales_and_zeros(codes)

    int4 = Kernel(
        name="torch aten._weight_int4pack_mm_for_cpu",
        bits=4,
        fits=_multiple(16, 2, (32, 64, 128, 256)),
        grouped=True,
        pack=pack,
        multiply=torch.ops.aten._weight_int4pack_mm_for_cpu,
    )
    return [int4, _int8("torch aten._weight_int8pack_mm"), _full_width("torch linear (bf16)")]


def _torch_cuda(_device: str) -> list[Kernel]:
    """Return torch's CUDA kernels: tinygemm at 4 bits, int8 with one scale per row."""
    import torch

    def pack(codes: Codes, group: int) -> Stored:
        nibbles = (codes.codes[:, ::2] << 4 | codes.codes[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
        return packed, group, _scales_and_zeros(codes)

    int4 = Kernel(
        name="torch aten._weight_int4pack_mm (tinygemm)",
        bits=4,
        fits=_multiple(8, 128, (32, 64, 128, 256)),
        grouped=True,
        pack=pack,
        multiply=torch.ops.aten._weight_int4pack_mm,
    )
    return [int4, _int8("torch aten._weight_int8pack_mm"), _full_width("torch linear (bf16)")]


def _gemlite(device: str) -> list[Kernel]:
    """Return gemlite's Triton kernels, where it is installed."""
    try:
        make_layer = import_module("gemlite.helper").A16Wn
    except ModuleNotFoundError as error:
        if error.name == "gemlite":
            return []
        raise
    import torch

    tuned = _tuning_file(device)
    if tuned.is_file():
        import_module("gemlite").load_config(str(tuned))

    def make(bits: int) -> Kernel:
        def pack(codes: Codes, group: int) -> Stored:
            zeros = -codes.shift.float() / codes.scale.float()  # weight = (code - zero) * scale
            layer = make_layer(device=device, dtype=torch.bfloat16).from_weights(
                codes.codes.to(torch.uint8), codes.scale, zeros, bits, group
            )
            return (layer,)

        return Kernel(
            name=f"gemlite A16W{bits}",
            bits=bits,
            fits=lambda shape, group: group >= 16 and shape[1] % max(group, 32) == 0,
            grouped=True,
            pack=pack,
            multiply=lambda x, layer: layer(x),
        )

    return [make(bits) for bits in (2, 4, 8)]


def keep_tuning(device: str) -> None:
    """Keep what gemlite has tuned itself to, minutes of work, for the next process on this GPU."""
    gemlite = sys.modules.get("gemlite")
    if gemlite is not None and device.startswith("cuda"):
        with suppress(OSError):  # no place to keep it: the next process tunes again
            file = _tuning_file(device)
            file.parent.mkdir(parents=True, exist_ok=True)
            gemlite.cache_config(str(file))


def _tuning_file(device: str) -> Path:
    import torch

    gpu = torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")
    return machine.cache_folder("tuning") / f"{gpu}-gemlite-{version('gemlite')}.json"


def _scales_and_zeros(codes: Codes) -> Tensor:
    """Return (groups, out, 2), by which ``weight = (code - 8) * scale + zero``."""
    import torch

    zero = codes.shift.float() + 8 * codes.scale.float()
    both = torch.stack([codes.scale, zero.bfloat16()], dim=-1)
    return both.transpose(0, 1).contiguous()
