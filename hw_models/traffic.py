"""What crosses a systolic array's edge to off-chip memory during one product.

Folds follow each other in SCALE-Sim's order, column by column of the array's tiles. An operand
that is needed again is kept if it fits into the half of its on-chip memory that is not being
filled; else it is fetched again, and partial sums that do not fit go out and come back. A compiler
that tiles the tokens as well would move less.
"""

from __future__ import annotations

from typing import NamedTuple

from dmpq.hw_models.accelerator import Accelerator
from dmpq.hw_models.base import BITS_PER_BYTE


class Product(NamedTuple):
    """A matrix product (tokens, inputs) x (inputs, outputs)."""

    tokens: int
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Elements of the second factor."""
        return self.inputs * self.outputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.tokens * self.weights


def offchip_bytes(facts: Accelerator, product: Product, weight_bytes: float) -> float:
    """Return the bytes that a product moves to and from off-chip memory.

    Args:
        facts: The accelerator.
        product: The product.
        weight_bytes: Size of the second factor as it is stored.
    """
    tokens, inputs, outputs = product
    activation = facts.activation_bits / BITS_PER_BYTE
    partial = facts.accumulator_bits / BITS_PER_BYTE
    ifmap, ofmap = tokens * inputs * activation, tokens * outputs * activation
    rows, columns = facts.array_rows, facts.array_columns
    match facts.dataflow:
        case "ws":
            again = -(-outputs // columns)
            tile = tokens * min(outputs, columns) * partial
            return (
                weight_bytes
                + _fetched(ifmap, ifmap, again, facts.ifmap_sram_bytes)
                + _written(ofmap, tile, -(-inputs // rows), product, facts)
            )
        case "os":
            tile = weight_bytes * min(outputs, columns) / outputs
            return (
                _fetched(weight_bytes, tile, -(-tokens // rows), facts.filter_sram_bytes)
                + _fetched(ifmap, ifmap, -(-outputs // columns), facts.ifmap_sram_bytes)
                + ofmap
            )
        case "is":
            again = -(-tokens // columns)
            tile = outputs * min(tokens, columns) * partial
            return (
                ifmap
                + _fetched(weight_bytes, weight_bytes, again, facts.filter_sram_bytes)
                + _written(ofmap, tile, -(-inputs // rows), product, facts)
            )


def _fetched(operand: float, kept: float, times: int, memory: int) -> float:
    """Return the bytes read of an operand that is used ``times``: once if ``kept`` fits."""
    return operand if 2 * kept <= memory else operand * times


def _written(ofmap: float, tile: float, folds: int, product: Product, facts: Accelerator) -> float:
    """Return the bytes of the outputs, and of partial sums that go out and come back."""
    if 2 * tile <= facts.ofmap_sram_bytes:
        return ofmap
    partial = product.tokens * product.outputs * facts.accumulator_bits / BITS_PER_BYTE
    return ofmap + 2 * (folds - 1) * partial
