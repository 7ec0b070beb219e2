"""A bit map as exporters read it: the format of every matrix, by layer and expert, with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dmpq.bitmap import BitMap
from dmpq.exporters.names import LayerNames, layer_names, parts_of, side_of
from dmpq.formats import Format

Pair = tuple[Format, Format]
"""The format of an expert's gate+up, and of its down."""


def pairs_of(bitmap: BitMap) -> NDArray[np.int64]:
    """Return the menu indices of a map, (N, 2): each expert's gate+up and down."""
    experts = bitmap.geometry.num_experts
    flat = bitmap.to_assignment(bitmap.geometry).reshape(experts, -1)
    return np.broadcast_to(flat, (experts, 2)).copy()


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer: its names, and the formats of its experts.

    Attributes:
        names: What its matrices are called.
        parts: An expert's matrices, in order.
        in_features: Part → input width, for groups that are never wider than that.
        experts: The formats of each expert.
    """

    names: LayerNames
    parts: tuple[str, ...]
    in_features: Mapping[str, int]
    experts: tuple[Pair, ...]

    def format_of(self, expert: int, part: str) -> Format:
        """Return the format of one matrix."""
        return self.experts[expert][side_of(part)]

    def group_of(self, expert: int, part: str) -> int:
        """Return the group size of one matrix: its format's, or the whole row if that is less."""
        return self.format_of(expert, part).group_along(self.in_features[part])

    @cached_property
    def by_format(self) -> dict[tuple[str, ...], dict[tuple[Format, int], list[int]]]:
        """Experts by format and group: for all parts together where they agree, else by part.

        Keys are groups of parts that share a format in every expert of the layer.
        """
        whole = all(
            up == down and self.group_of(e, self.parts[0]) == self.group_of(e, self.parts[-1])
            for e, (up, down) in enumerate(self.experts)
        )
        together = [self.parts] if whole else [self.parts[:-1], self.parts[-1:]]
        result: dict[tuple[str, ...], dict[tuple[Format, int], list[int]]] = {}
        for parts in together:
            groups: dict[tuple[Format, int], list[int]] = {}
            for expert in range(len(self.experts)):
                fmt = self.format_of(expert, parts[0])
                key = (fmt, self.group_of(expert, parts[0]) if fmt.is_quantized else 0)
                groups.setdefault(key, []).append(expert)
            result[parts] = dict(sorted(groups.items()))
        return result


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole map, laid out for exporters.

    Attributes:
        bitmap: The map.
        layers: Its layers, in order.
    """

    bitmap: BitMap
    layers: tuple[LayerPlan, ...]

    @classmethod
    def of(cls, bitmap: BitMap) -> Plan:
        """Lay out a bit map.

        Raises:
            InputError: If the family's names on disk are unknown.
        """
        spec, menu = bitmap.geometry, bitmap.menu
        pairs = pairs_of(bitmap)
        names = layer_names(spec, architecture=bitmap.model["architecture"])
        layers, start = [], 0
        for layer, named in zip(spec.moe_layers, names, strict=True):
            rows = pairs[start : start + layer.num_experts]
            start += layer.num_experts
            parts = parts_of(layer)
            widths = (layer.gate_up_shape[1], layer.down_shape[1])
            layers.append(
                LayerPlan(
                    names=named,
                    parts=parts,
                    in_features={part: widths[side_of(part)] for part in parts},
                    experts=tuple((menu.formats[up], menu.formats[down]) for up, down in rows),
                )
            )
        return cls(bitmap, tuple(layers))

    @property
    def symmetric(self) -> bool:
        """Whether codes are symmetric around zero."""
        return self.bitmap.menu.symmetric

    @cached_property
    def commonest(self) -> tuple[int, int]:
        """Width and group size that most quantized matrices have; of several, the widest."""
        counts: dict[tuple[int, int], int] = {}
        for layer in self.layers:
            for parts, groups in layer.by_format.items():
                for (fmt, group), experts in groups.items():
                    if fmt.is_quantized:
                        key = (fmt.bits, group)
                        counts[key] = counts.get(key, 0) + len(experts) * len(parts)
        return max(counts, key=lambda key: (counts[key], key)) if counts else (8, 128)


def leaves_of(matrices: Mapping[str, str], parts: Sequence[str]) -> list[str]:
    """Return the last parts of names, as ``gate_proj``."""
    return [matrices[part].rpartition(".")[2] for part in parts]
