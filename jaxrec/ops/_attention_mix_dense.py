"""The mix for short sequences: a triangular matrix product, cut into a few blocks of rows.

Without segments one matrix serves the whole batch. With them each row masks its own copy, a block
of rows at a time; a block reads the slots from the start of its band to its own end.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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

    Rows and columns are selected by products with one-hot matrices: an accelerator has no fast
    gather of [batch, length, length] single numbers, and a CPU no fast scatter of them.
    """

    def __init__(
        self,
        table: Float[Array, "groups size size"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None,
    ) -> None:
        self.table = table
        self.segment_ids = segment_ids
        # A position outside the table selects nothing: its row and column are zero.
        index = jnp.arange(table.shape[-1], dtype=positions.dtype)
        self.one_hot = (positions[:, :, None] == index[None, None]).astype(table.dtype)

    def _mask(self, block: Block) -> Bool[Array, "#batch 1 rows cols"]:
        rows, cols = jnp.arange(block.start, block.end), jnp.arange(block.first, block.end)
        mask = (cols[None, :] <= rows[:, None])[None]
        if self.segment_ids is not None:
            ids = self.segment_ids
            mask = mask & same_segment(
                ids[:, block.start : block.end], ids[:, block.first : block.end]
            )
        return mask[:, None]

    def matrix(self, block: Block) -> Float[Array, "batch groups rows cols"]:
        rows = self.one_hot[:, block.start : block.end]
        cols = self.one_hot[:, block.first : block.end]
        picked = _dot("bjp,gpq->bgjq", rows, self.table)
        part = _dot("bgjq,bkq->bgjk", picked, cols)
        return jnp.where(self._mask(block), part, jnp.zeros((), part.dtype))

    def gradient(self, parts: list[tuple[Block, Array, Array]]) -> Array:
        total: Any = 0.0
        for block, g, x in parts:
            outer = _dot("bgjc,bgkc->bgjk", g, x)
            outer = jnp.where(self._mask(block), outer, jnp.zeros((), outer.dtype))
            rows = self.one_hot[:, block.start : block.end]
            cols = self.one_hot[:, block.first : block.end]
            spread = _dot("bgjk,bkq->bgjq", outer, cols)
            total = total + _dot("bjp,bgjq->gpq", rows, spread)
        return total


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
