"""Buckets of time differences on a log scale, the table read through them, and its gradient.

`bucket(x) = min(buckets, floor(ln(max(|x|, 1)) / 0.301))`. A difference of 32-bit seconds reaches
bucket 73, so a table is read by comparing with at most 73 edges, in one fused pass: exact, and
without the gather (forward) and the scatter (backward) over every pair of events that
accelerators are slow at. A CPU is good at both, and computes the bucket: a sum by bucket is then
some thirty times faster there, and reading somewhat faster.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrec.ops._dispatch import platform_switch

_LOG_STEP = 0.301
_LANES = 128


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


def _bucket(lower: list[int], apart: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The last k with `lower[k] <= apart`, where the edges are those of `edges`, from 0 on.

    Read as an integer, the bits of a float are its logarithm, by straight lines between powers of
    two: 0 to 0.086 too low in base 2, 0.2 of a bucket. So the number of the nearest edge is
    within 0.6 of the logarithm in buckets, and one exact comparison tells on which side to be.
    """
    as_float = jnp.maximum(apart, jnp.ones((), apart.dtype)).astype(jnp.float32)
    bits = lax.bitcast_convert_type(as_float, jnp.int32).astype(jnp.float32)
    per_doubling = math.log(2) / _LOG_STEP
    nearest = bits * jnp.float32(per_doubling / 2**23) - jnp.float32(127 * per_doubling - 0.6)
    guess = jnp.minimum(nearest.astype(jnp.int32), len(lower) - 1)
    edge = _entries(jnp.asarray(lower, apart.dtype), guess)
    return guess - (apart < edge).astype(jnp.int32)


def _entries(table: Array, index: Array) -> Array:
    return table.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def lookup(table: Float[Array, " entries"], apart: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`table[bucket(apart)]`."""
    return platform_switch(_lookup_by_edges, {"cpu": _lookup_by_number}, table, apart)


def _lookup_by_number(table: Array, apart: Array) -> Array:
    lower = [0, *_edges_for(table, apart)]

    def part(apart: Array) -> Array:
        return _entries(table, _bucket(lower, apart))

    # In a loop, so that what is read is written down: fused with what follows, the reading would
    # keep the sigmoid from being vectorised.
    return lax.map(part, apart) if apart.ndim > 1 else part(apart)


def _lookup_by_edges(table: Array, apart: Array) -> Array:
    out = jnp.broadcast_to(table[0], apart.shape)
    for bucket, edge in enumerate(_edges_for(table, apart), 1):
        out = jnp.where(apart >= jnp.asarray(edge, apart.dtype), table[bucket], out)
    return out


def lookup_gradient(
    table: Float[Array, " entries"], apart: Int[Array, "*shape"], d_out: Float[Array, "*shape"]
) -> Float[Array, " entries"]:
    """`out[k]`: sum of `d_out` where the bucket is `k`."""
    return platform_switch(_sums_by_edges, {"cpu": _sums_by_number}, table, apart, d_out)


def _sums_by_number(table: Array, apart: Array, d_out: Array) -> Array:
    bucket = _bucket([0, *_edges_for(table, apart)], apart)
    # Sums side by side: shorter ones round less, and an addition need not wait for the last one.
    lanes = jnp.arange(apart.size, dtype=jnp.int32) % _LANES
    index = lanes * table.shape[0] + bucket.reshape(-1)
    sums = jnp.zeros(_LANES * table.shape[0], d_out.dtype)
    sums = sums.at[index].add(
        d_out.reshape(-1), mode="promise_in_bounds", wrap_negative_indices=False
    )
    sums = sums.reshape(_LANES, -1)
    while sums.shape[0] > 1:
        half = sums.shape[0] // 2
        sums = sums[:half] + sums[half:]
    return sums[0]


def _sums_by_edges(table: Array, apart: Array, d_out: Array) -> Array:
    lower = [0, *_edges_for(table, apart)]
    # A bucket ends before the next begins, and may be empty; the last one has no end.
    upper = [*(edge - 1 for edge in lower[1:]), 2 ** (8 * apart.dtype.itemsize) - 1]

    def bucket(bounds: tuple[Array, Array]) -> Array:
        inside = (apart >= bounds[0]) & (apart <= bounds[1])
        return jnp.where(inside, d_out, jnp.zeros((), d_out.dtype)).sum()

    # One bucket after the other: side by side, a compiler may write the masks down.
    sums = lax.map(bucket, (jnp.asarray(lower, apart.dtype), jnp.asarray(upper, apart.dtype)))
    return jnp.pad(sums, (0, table.shape[0] - sums.shape[0]))
