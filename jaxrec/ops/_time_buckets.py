"""Buckets of time differences on a log scale, the table read through them, and its gradient.

`bucket(x) = min(buckets, floor(ln(max(|x|, 1)) / 0.301))`. A difference of 32-bit seconds reaches
bucket 73, so a table is read by comparing with at most 73 edges, in one fused pass: exact, and
without the gather (forward) and the scatter (backward) over every pair of events that
accelerators are slow at.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_LOG_STEP = 0.301


def edges(buckets: int, bits: int) -> list[int]:
    """The least difference of each bucket from 1 on, of those that `bits` bits can hold."""
    found: list[int] = []
    for bucket in range(1, buckets + 1):
        # exp(0.301 k) is never a whole number; up to 2^32 float64 tells on which side of one it is.
        edge = math.ceil(math.exp(_LOG_STEP * bucket))
        if edge >= 2**bits:
            break
        found.append(edge)
    return found


def distance(a: Int[Array, "*#shape"], b: Int[Array, "*#shape"]) -> Array:
    """`|a - b|` as an unsigned integer, which the difference of any two signed ones fits."""
    wide = max(jnp.dtype(jnp.int32), a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    a, b = a.astype(wide), b.astype(wide)
    unsigned = jnp.uint64 if wide.itemsize == 8 else jnp.uint32
    # Conversion and subtraction are modulo 2^bits, so the difference is right where it fits.
    return jnp.maximum(a, b).astype(unsigned) - jnp.minimum(a, b).astype(unsigned)


def _edges_for(table: Array, apart: Array) -> list[int]:
    return edges(table.shape[0] - 1, 8 * apart.dtype.itemsize)


def lookup(table: Float[Array, " entries"], apart: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`table[bucket(apart)]`."""
    out = jnp.broadcast_to(table[0], apart.shape)
    for bucket, edge in enumerate(_edges_for(table, apart), 1):
        out = jnp.where(apart >= jnp.asarray(edge, apart.dtype), table[bucket], out)
    return out


def lookup_gradient(
    table: Float[Array, " entries"], apart: Int[Array, "*shape"], d_out: Float[Array, "*shape"]
) -> Float[Array, " entries"]:
    """`out[k]`: sum of `d_out` where the bucket is `k`."""
    lower = [0, *_edges_for(table, apart)]
    # A bucket ends before the next begins, and may be empty; the last one has no end.
    upper = [*(edge - 1 for edge in lower[1:]), 2 ** (8 * apart.dtype.itemsize) - 1]

    def bucket(bounds: tuple[Array, Array]) -> Array:
        inside = (apart >= bounds[0]) & (apart <= bounds[1])
        return jnp.where(inside, d_out, jnp.zeros((), d_out.dtype)).sum()

    # One bucket after the other: side by side, a compiler may write the masks down.
    sums = lax.map(bucket, (jnp.asarray(lower, apart.dtype), jnp.asarray(upper, apart.dtype)))
    return jnp.pad(sums, (0, table.shape[0] - sums.shape[0]))
