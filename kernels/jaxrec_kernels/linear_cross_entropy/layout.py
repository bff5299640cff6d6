"""Rows that lie as [width, rows] or as [rows, width], read alike."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxrec_kernels import LANES


class Layout(NamedTuple):
    """How [rows, width] arrays lie: with `transposed` as [width, rows]."""

    transposed: bool

    @property
    def width_axis(self) -> int:
        return 0 if self.transposed else 1

    def given(self, array: jax.Array) -> jax.Array:
        """The array as it lies: a view where the compiler lays it out so, and back again."""
        return array.T if self.transposed else array

    def shape(self, rows: int, width: int) -> tuple[int, int]:
        return (width, rows) if self.transposed else (rows, width)

    def place(self, block: Any) -> tuple[Any, Any]:
        """Where a block of rows is, counted in blocks."""
        return (0, block) if self.transposed else (block, 0)

    def rows(self, start: Any, size: int) -> tuple[Any, Any]:
        """Indices of `size` rows, from a multiple of `size`."""
        part = pl.ds(pl.multiple_of(start, size), size)
        return (slice(None), part) if self.transposed else (part, slice(None))


def layout_for(width: int) -> Layout:
    """As the TPU compiler lays out arrays of this width."""
    return Layout(transposed=width % LANES != 0)


def product(a: jax.Array, b: jax.Array, over: tuple[int, int], precision: Any) -> jax.Array:
    """The matrix product over these axes, summed in float32."""
    dims = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def precision_for(dtype: Any) -> lax.Precision:
    """bfloat16 products are exact in one pass."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if str(dtype) == "float32" and asked in ("highest", "float32"):
        return lax.Precision.HIGHEST
    return lax.Precision.DEFAULT


def by_sublane(chunk: jax.Array) -> jax.Array:
    """[rows, lanes] as [rows / 8, 8, lanes]: a reduction over the first axis keeps to a lane."""
    return chunk.reshape(chunk.shape[0] // 8, 8, chunk.shape[1])


def column(line: jax.Array) -> jax.Array:
    """A line [1, rows] as [rows, LANES], alike in all lanes."""
    return jnp.broadcast_to(line, (LANES, line.shape[1])).T


def across(column: jax.Array, lanes: int) -> jax.Array:
    """[rows, LANES], alike in all lanes, as [rows, lanes]."""
    return jnp.tile(column, (1, lanes // LANES))
