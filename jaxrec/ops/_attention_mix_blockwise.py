"""The mix for long sequences: blocks of the triangular operator, one at a time.

Nothing of size [length, length] is formed beyond a full factor's own parameters. The taps of a
Toeplitz factor fill one [size, size] tile a block distance. The loop over input blocks is bounded
by the diagonal, by the band, and by the first block that can share a segment.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops._attention_blockwise import Tiling, at, zeros
from jaxrec.ops._masking import same_segment


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=a.dtype)


class Tiles:
    """Taps: block (i, j) is tile `i - j` for every row."""

    def __init__(self, table: Float[Array, "count groups size size"], tiling: Tiling) -> None:
        self.table, self.tiling = table, tiling

    def matrix(self, i: Array, j: Array) -> Float[Array, "#batch groups size size"]:
        part = at(self.table, i - j)[None]
        return _within_segments(self.tiling, i, j, part)

    def add(self, total: Array, i: Array, j: Array, outer: Array) -> Array:
        outer = _within_segments(self.tiling, i, j, outer).sum(0)
        return lax.dynamic_update_index_in_dim(total, at(total, i - j) + outer, i - j, 0)


class Sliced:
    """A full factor indexed by the slot: block (i, j) is a slice of it."""

    def __init__(self, table: Float[Array, "groups padded padded"], tiling: Tiling) -> None:
        self.table, self.tiling = table, tiling

    def _slice(self, x: Array, i: Array, j: Array) -> Array:
        size = self.tiling.size
        start = (jnp.zeros_like(i), i * size, j * size)
        return lax.dynamic_slice(x, start, (x.shape[0], size, size))

    def matrix(self, i: Array, j: Array) -> Float[Array, "1 groups size size"]:
        return self._slice(self.table, i, j)[None]

    def add(self, total: Array, i: Array, j: Array, outer: Array) -> Array:
        size = self.tiling.size
        part = self._slice(total, i, j) + outer.sum(0)
        return lax.dynamic_update_slice(total, part, (jnp.zeros_like(i), i * size, j * size))


class Placed:
    """A full factor read at the positions of each row: `T[j, k] = table[p_j, p_k]`."""

    def __init__(
        self,
        table: Float[Array, "groups size size"],
        positions: Int[Array, "count batch size"],
        tiling: Tiling,
    ) -> None:
        self.table, self.positions, self.tiling = table, positions, tiling

    def _places(self, i: Array, j: Array) -> tuple[Array, Array, Bool[Array, "batch size size"]]:
        top = self.table.shape[-1] - 1
        rows, cols = at(self.positions, i), at(self.positions, j)
        inside = ((rows >= 0) & (rows <= top))[:, :, None] & ((cols >= 0) & (cols <= top))[:, None]
        offsets = jnp.arange(self.tiling.size)
        size = self.tiling.size
        causal = (j * size + offsets)[None, :] <= (i * size + offsets)[:, None]
        keep = inside & causal[None]
        rows, cols = jnp.clip(rows, 0, top), jnp.clip(cols, 0, top)
        return rows[:, :, None], cols[:, None, :], keep

    def matrix(self, i: Array, j: Array) -> Float[Array, "batch groups size size"]:
        rows, cols, keep = self._places(i, j)
        part = jnp.moveaxis(self.table[:, rows, cols], 0, 1)
        part = jnp.where(keep[:, None], part, jnp.zeros((), part.dtype))
        return _within_segments(self.tiling, i, j, part)

    def add(self, total: Array, i: Array, j: Array, outer: Array) -> Array:
        rows, cols, keep = self._places(i, j)
        outer = jnp.where(keep[:, None], outer, jnp.zeros((), outer.dtype))
        outer = _within_segments(self.tiling, i, j, outer)
        return total.at[:, rows, cols].add(jnp.moveaxis(outer, 1, 0))


Operator = Tiles | Sliced | Placed


def _within_segments(tiling: Tiling, i: Array, j: Array, part: Array) -> Array:
    if tiling.segments is None:
        return part
    same = same_segment(at(tiling.segments, i), at(tiling.segments, j))
    return jnp.where(same[:, None], part, jnp.zeros((), part.dtype))


def _reach(tiling: Tiling, band: int) -> int:
    """How many blocks back the band reaches."""
    return min(tiling.blocks - 1, -(-(band - 1) // tiling.size))


def _apply(matrix: Array, x: Array, transpose: bool) -> Array:
    rows = "kj" if transpose else "jk"
    if matrix.shape[0] == 1:
        return _dot(f"g{rows},bgkc->bgjc", matrix[0], x)
    return _dot(f"bg{rows},bgkc->bgjc", matrix, x)


def forward(
    operator: Operator, x: Float[Array, "count batch groups size channels"], band: int
) -> Float[Array, "count batch groups size channels"]:
    tiling = operator.tiling
    reach = _reach(tiling, band)

    def out_block(_: None, i: Array) -> tuple[None, Array]:
        def in_block(j: Array, total: Array) -> Array:
            return total + _apply(operator.matrix(i, j), at(x, j), transpose=False)

        first = jnp.maximum(tiling.first[i], i - reach)
        return None, lax.fori_loop(first, i + 1, in_block, zeros(x.shape[1:], x.dtype, x))

    return lax.scan(out_block, None, jnp.arange(tiling.blocks))[1]


def backward(operator: Operator, x: Array, d_out: Array, band: int) -> tuple[Array, Array]:
    """Gradients of the table and of the input."""
    tiling = operator.tiling
    reach = _reach(tiling, band)

    def in_block(d_table: Array, j: Array) -> tuple[Array, Array]:
        x_j = at(x, j)

        def out_block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_table, d_x = carry
            g = at(d_out, i)
            d_x = d_x + _apply(operator.matrix(i, j), g, transpose=True)
            outer = _dot("bgjc,bgkc->bgjk", g, x_j)
            return operator.add(d_table, i, j, outer), d_x

        last = jnp.minimum(tiling.last[j], j + reach)
        return lax.fori_loop(j, last + 1, out_block, (d_table, zeros(x_j.shape, x.dtype, x)))

    table: Any = operator.table
    return lax.scan(in_block, zeros(table.shape, table.dtype, x), jnp.arange(tiling.blocks))
