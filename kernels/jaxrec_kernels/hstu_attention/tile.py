"""Tiles of pairs of events inside the kernels: who sees whom, the bias, SiLU and its derivative.

Either side of a tile may lie along sublanes and the other along lanes; they broadcast against each
other, so that forward, with queries on sublanes, and backward, with keys on them, share all of it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrec_kernels import LANES

# What stands for the bias of a pair that is not seen; no sum of two learned biases comes near it.
HIDDEN = -3.0e38
# Behind every slot.
NEVER = 2**31 - 1
_LOG_STEP = 0.301


class Events(NamedTuple):
    """One side of a tile, `[rows, 1]`, `[rows, cols]` or `[1, cols]` each.

    `place`: a query's slot, or -1 for one that is not there; a key's slot, or `NEVER`.
    `until`: of candidates their own slot, behind which nobody sees them; else `NEVER`.
    `bias`: of a key, to candidates.
    """

    place: Int[Array, "..."]
    segment: Int[Array, "..."] | None
    time: Int[Array, "..."] | None
    until: Int[Array, "..."] | None
    bias: Float[Array, "..."] | None


def seen(queries: Events, keys: Events) -> Bool[Array, "rows cols"]:
    mask = jnp.less_equal(keys.place, queries.place)
    if keys.until is not None:
        mask = mask & (queries.place <= keys.until)
    if keys.segment is not None:
        mask = mask & (queries.segment == keys.segment)
    return mask


def is_candidate(queries: Events) -> Bool[Array, "..."]:
    assert queries.until is not None
    return jnp.not_equal(queries.until, NEVER)


def take_lanes(row: Array, lanes: Int[Array, "rows cols"]) -> Array:
    """`row[lanes]`, for a row that fills one register's lanes."""
    dims = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    # Not `take_along_axis`, which would spend operations on negative indices.
    return lax.gather(
        jnp.broadcast_to(row, (lanes.shape[0], LANES)),
        lanes[..., None],
        dims,
        slice_sizes=(1, 1),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def bucket(queries: Events, keys: Events, edges: Int[Array, "1 lanes"]) -> Int[Array, "rows cols"]:
    """`floor(ln(max(|x|, 1)) / 0.301)` of the difference x of two times, exact at every edge.

    A float32 logarithm finds the nearest edge; that is the bucket's own or the next one, which an
    integer comparison tells. Differences are modulo 2^32, as edges are; a number and the edge next
    to it differ by less than 2^31, so that the sign of their difference is right everywhere.
    """
    assert queries.time is not None
    assert keys.time is not None
    apart = jnp.maximum(queries.time, keys.time) - jnp.minimum(queries.time, keys.time)
    x = apart.astype(jnp.float32)
    x = jnp.where(apart < 0, x + 2.0**32, x)
    # Adding 2^23 rounds to a whole number, which is then in the lowest bits.
    rounded = jnp.log(jnp.maximum(x, 1.0)) * (1 / _LOG_STEP) + 2.0**23
    nearest = lax.bitcast_convert_type(rounded, jnp.int32) & (LANES - 1)
    return nearest + lax.shift_right_arithmetic(apart - take_lanes(edges, nearest), 31)


def scaled(x: Array, factor: float) -> Array:
    return x if factor == 1.0 else x * factor


def weight(score: Float[Array, "rows cols"]) -> Float[Array, "rows cols"]:
    """SiLU, by one transcendental operation."""
    half = 0.5 * score
    return half + half * jnp.tanh(half)


def weight_and_slope(score: Float[Array, "rows cols"]) -> tuple[Array, Array]:
    """SiLU and its derivative."""
    half = 0.5 * jnp.tanh(0.5 * score)
    gate = 0.5 + half
    silu = score * gate
    return silu, gate + silu * (0.5 - half)


def dot(a: Array, b: Array, over: tuple[int, int]) -> Float[Array, "rows cols"]:
    """The product of two matrices over the named axes."""
    dims = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
