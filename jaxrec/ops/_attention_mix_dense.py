"""The mix for short sequences: a triangular matrix product, cut into a few blocks of rows.

Without segments one matrix serves the whole batch. With them each row masks its own copy, a block
of rows at a time; a block reads the slots from the start of its band to its own end.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops._dispatch import platform_switch
from jaxrec.ops._masking import same_segment

_ROWS, _MOST_BLOCKS = 64, 8


class Block(NamedTuple):
    """Rows `start:end` of the matrix, and its columns `first:end`."""

    start: int
    end: int
    first: int


def blocks(length: int, band: int) -> list[Block]:
    count = min(_MOST_BLOCKS, max(1, round(length / _ROWS)))
    edges = [round(length * i / count) for i in range(count + 1)]
    return [Block(a, b, max(0, a - band + 1)) for a, b in pairwise(edges)]


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=a.dtype)


class Shared:
    """One matrix for all rows: taps, or a full factor indexed by the slot."""

    def __init__(
        self,
        table: Float[Array, "groups length length"],
        segment_ids: Int[Array, "batch length"] | None,
    ) -> None:
        self.table = table
        self.segment_ids = segment_ids

    def _same(self, block: Block) -> Bool[Array, "batch 1 rows cols"]:
        assert self.segment_ids is not None
        rows = self.segment_ids[:, block.start : block.end]
        return same_segment(rows, self.segment_ids[:, block.first : block.end])[:, None]

    def matrix(self, block: Block) -> Float[Array, "#batch groups rows cols"]:
        part = self.table[None, :, block.start : block.end, block.first : block.end]
        if self.segment_ids is None:
            return part
        return jnp.where(self._same(block), part, jnp.zeros((), part.dtype))

    def gradient(self, parts: list[tuple[Block, Array, Array]]) -> Array:
        """Gradient of the table from blocks of output gradient and input."""
        length = self.table.shape[-1]
        rows = []
        for block, g, x in parts:
            if self.segment_ids is None:
                outer = _dot("bgjc,bgkc->gjk", g, x)
            else:
                outer = _dot("bgjc,bgkc->bgjk", g, x)
                outer = jnp.where(self._same(block), outer, jnp.zeros((), outer.dtype)).sum(0)
            rows.append(jnp.pad(outer, ((0, 0), (0, 0), (block.first, length - block.end))))
        return jnp.concatenate(rows, axis=1)


class Placed:
    """A full factor read at the positions of each row: `T[j, k] = table[p_j, p_k]`.

    A position outside the table has a zero row and a zero column.
    """

    def __init__(
        self,
        table: Float[Array, "groups size size"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None,
    ) -> None:
        self.table, self.positions, self.segment_ids = table, positions, segment_ids

    def _mask(self, block: Block) -> Bool[Array, "#batch 1 rows cols"]:
        rows, cols = jnp.arange(block.start, block.end), jnp.arange(block.first, block.end)
        mask = (cols[None, :] <= rows[:, None])[None]
        inside = (self.positions >= 0) & (self.positions < self.table.shape[-1])
        at_rows, at_cols = _places(inside, block)
        mask = mask & at_rows[:, :, None] & at_cols[:, None, :]
        if self.segment_ids is not None:
            mask = mask & same_segment(*_places(self.segment_ids, block))
        return mask[:, None]

    def matrix(self, block: Block) -> Float[Array, "batch groups rows cols"]:
        part = _switch(_gather, _select, self.table, *_places(self.positions, block))
        return jnp.where(self._mask(block), part, jnp.zeros((), part.dtype))

    def gradient(self, parts: list[tuple[Block, Array, Array]]) -> Array:
        total = jnp.zeros_like(self.table)
        for block, g, x in parts:
            outer = _dot("bgjc,bgkc->bgjk", g, x)
            outer = jnp.where(self._mask(block), outer, jnp.zeros((), outer.dtype))
            total = _switch(_scatter, _spread, total, *_places(self.positions, block), outer)
        return total


def _places(x: Array, block: Block) -> tuple[Array, Array]:
    return x[:, block.start : block.end], x[:, block.first : block.end]


def _switch(on_cpu: Callable[..., Array], elsewhere: Callable[..., Array], *args: Array) -> Array:
    """A CPU gathers and scatters single numbers well and multiplies badly; accelerators, the
    reverse, and there a scatter would also add in an order that changes from run to run."""
    return platform_switch(elsewhere, {"cpu": on_cpu}, *args)


def _gather(table: Array, rows: Array, cols: Array) -> Array:
    top = table.shape[-1] - 1
    rows, cols = jnp.clip(rows, 0, top), jnp.clip(cols, 0, top)
    return jnp.moveaxis(table[:, rows[:, :, None], cols[:, None, :]], 0, 1)


def _scatter(total: Array, rows: Array, cols: Array, outer: Array) -> Array:
    top = total.shape[-1] - 1
    rows, cols = jnp.clip(rows, 0, top), jnp.clip(cols, 0, top)
    return total.at[:, rows[:, :, None], cols[:, None, :]].add(jnp.moveaxis(outer, 1, 0))


def _one_hot(positions: Array, table: Array) -> Array:
    index = jnp.arange(table.shape[-1], dtype=positions.dtype)
    return (positions[:, :, None] == index[None, None]).astype(table.dtype)


def _select(table: Array, rows: Array, cols: Array) -> Array:
    picked = _dot("bjp,gpq->bgjq", _one_hot(rows, table), table)
    return _dot("bgjq,bkq->bgjk", picked, _one_hot(cols, table))


def _spread(total: Array, rows: Array, cols: Array, outer: Array) -> Array:
    wide = _dot("bgjk,bkq->bgjq", outer, _one_hot(cols, total))
    return total + _dot("bjp,bgjq->gpq", _one_hot(rows, total), wide)


def forward(operator: Shared | Placed, x: Array, band: int) -> Array:
    outs = []
    for block in blocks(x.shape[2], band):
        matrix, cols = operator.matrix(block), x[:, :, block.first : block.end]
        if matrix.shape[0] == 1:
            outs.append(_dot("gjk,bgkc->bgjc", matrix[0], cols))
        else:
            outs.append(_dot("bgjk,bgkc->bgjc", matrix, cols))
    return jnp.concatenate(outs, axis=2)


def backward(operator: Shared | Placed, x: Array, d_out: Array, band: int) -> tuple[Array, Array]:
    """Gradients of the table and of the input."""
    cut = blocks(x.shape[2], band)
    parts, d_cols = [], []
    for block in cut:
        g, cols = d_out[:, :, block.start : block.end], x[:, :, block.first : block.end]
        parts.append((block, g, cols))
        matrix = operator.matrix(block)
        if matrix.shape[0] == 1:
            d_cols.append(_dot("gjk,bgjc->bgkc", matrix[0], g))
        else:
            d_cols.append(_dot("bgjk,bgjc->bgkc", matrix, g))
    d_rows = []
    for i, (start, end, _) in enumerate(cut):
        total = d_cols[i][:, :, start - cut[i].first :]
        for block, part in zip(cut[i + 1 :], d_cols[i + 1 :], strict=True):
            if block.first < end:
                skip = max(0, block.first - start)
                piece = part[:, :, start + skip - block.first : end - block.first]
                total = total + jnp.pad(piece, ((0, 0), (0, 0), (skip, 0), (0, 0)))
        d_rows.append(total)
    return operator.gradient(parts), jnp.concatenate(d_rows, axis=2)
