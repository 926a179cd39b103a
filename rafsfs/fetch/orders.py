"""In what order loaders read a file of weights. Pure: tensors in, ranges of the file out.

Decided here: what an order's name means. Rule: whatever the order, the ranges begin with the header, are disjoint and cover the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from ..weights.tensor import Tensor

Order = Literal["offset", "name"]
ORDERS: Final[tuple[Order, ...]] = ("offset", "name")
"""`offset`: from start to end, as llama.cpp, a copy, and loaders that keep to the order of the file read.
`name`: tensors by their name, as who goes over the sorted keys of a safetensors file."""


def in_order(tensors: Sequence[Tensor], size: int, order: Order) -> list[tuple[int, int]]:
    """Return (offset, length) ranges of a file of `size` bytes in the order of a loader. `tensors` are sorted by offset."""
    if order == "offset" or not tensors:
        return [(0, size)] if size else []
    ranges = [(0, tensors[0].offset)] if tensors[0].offset else []
    ranges += [(tensor.offset, tensor.length) for tensor in sorted(tensors, key=lambda tensor: tensor.name)]
    position = tensors[0].offset
    gaps = []
    for tensor in tensors:
        if tensor.offset > position:
            gaps.append((position, tensor.offset - position))
        position = tensor.stop
    if position < size:
        gaps.append((position, size - position))
    return ranges + gaps
