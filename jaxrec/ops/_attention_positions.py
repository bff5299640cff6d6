"""Positions of events inside packed or padded rows."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxrec.ops._checks import as_arrays, check_int_rows, check_valid


def segment_positions(
    segment_ids: Int[Array, "batch length"] | None = None,
    *,
    valid: Bool[Array, "batch length"] | None = None,
    origin: Literal["oldest", "newest"] = "oldest",
    size: int | None = None,
) -> Int[Array, "batch length"]:
    """Position of each slot inside its segment, counted from the oldest or the newest event.

    `oldest`: `j - first`, the first valid slot of the segment being 0.
    `newest`: `size - 1 - (last - j)`, the last valid slot of the segment being `size - 1`, so that
    an index into a learned table means "so many events ago".

    Args:
      segment_ids: `int[batch, length]`; a segment is a run of equal ids. `None`: a row is one.
      valid: `bool[batch, length]`; slots before the first or behind the last valid one of their
        segment get positions outside the range.
      origin: where to count from.
      size: entries of the table that the positions index, for `newest`; `None`: the row's length.

    Returns:
      `int32[batch, length]`.

    Raises:
      ValueError: wrong shapes or dtypes, an unknown origin, or neither array given.

    Example:
      >>> import jax.numpy as jnp
      >>> ids = jnp.array([[7, 7, 7, 9, 9]])
      >>> segment_positions(ids).tolist()
      [[0, 1, 2, 0, 1]]
      >>> segment_positions(ids, origin="newest", size=4).tolist()
      [[1, 2, 3, 2, 3]]
    """
    op = "segment_positions"
    segment_ids, valid = as_arrays(segment_ids, valid)
    given = segment_ids if segment_ids is not None else valid
    if given is None:
        raise ValueError(f"{op}: give segment_ids or valid")
    shape = given.shape
    if len(shape) != 2:
        raise ValueError(f"{op}: wants [batch, length], got shape {shape}")
    segment_ids = check_int_rows(op, "segment_ids", segment_ids, shape)
    valid = check_valid(op, valid, shape)
    if origin not in ("oldest", "newest"):
        raise ValueError(f"{op}: origin must be 'oldest' or 'newest', got {origin!r}")
    if shape[1] == 0:
        return jnp.zeros(shape, jnp.int32)
    return _positions(segment_ids, valid, origin, size)


@partial(jax.jit, static_argnums=(2, 3), inline=True)
def _positions(
    segment_ids: Array | None, valid: Array | None, origin: str, size: int | None
) -> Array:
    given = segment_ids if segment_ids is not None else valid
    assert given is not None
    batch, length = given.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    starts = index == 0
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = starts | jnp.pad(changes, ((0, 0), (1, 0)))
    if valid is None:
        valid = jnp.ones((batch, length), jnp.bool_)
    if origin == "oldest":
        return index - _first_valid(starts, valid, index)
    # The last valid slot is the first one of the row read backwards.
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    last = length - 1 - _first_valid(ends[:, ::-1], valid[:, ::-1], index)[:, ::-1]
    return jnp.int32((length if size is None else size) - 1) - (last - index)


def _first_valid(starts: Array, valid: Array, index: Array) -> Array:
    """Index of the first valid slot of each slot's segment; its first slot where none is valid."""
    start = lax.cummax(jnp.where(starts, index, 0), axis=1)
    length = index.shape[1]
    # The nearest valid slot at or behind each slot, then the one that the segment's start sees.
    following = lax.cummin(jnp.where(valid, index, length), axis=1, reverse=True)
    first = jnp.take_along_axis(following, start, axis=1)
    same = jnp.take_along_axis(start, jnp.minimum(first, length - 1), axis=1) == start
    return jnp.where(same & (first < length), first, start)
