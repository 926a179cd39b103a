"""Loaders' orders: all of the file, each byte once, the header first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.fetch.orders import ORDERS, Order, in_order
from rafsfs.weights.tensor import Tensor

parts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.text("abc", min_size=1, max_size=3)), max_size=20)


@settings(max_examples=200, deadline=None)
@given(parts, st.integers(0, 5), st.sampled_from(ORDERS))
def test_an_order_covers_the_file_once_and_begins_with_the_header(
    parts: list[tuple[int, int, str]], tail: int, order: Order
) -> None:
    tensors, position = [], 8
    for gap, length, name in parts:
        tensors.append(Tensor(name, "U8", (length,), position + gap, length))
        position += gap + length
    size = position + tail
    ranges = in_order(tensors, size, order)
    assert ranges[0][0] == 0
    assert sorted(byte for offset, length in ranges for byte in range(offset, offset + length)) == list(range(size))
    if order == "name" and tensors:
        assert [offset for offset, _ in ranges[1 : len(tensors) + 1]] == [
            tensor.offset for tensor in sorted(tensors, key=lambda tensor: tensor.name)
        ]
