"""What pointwise attention knows of each event beside its vectors: its distance, times and role."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrec.ops._checks import check_float, check_rank
from jaxrec.ops._dispatch import platform_switch


class Rows(NamedTuple):
    candidates: Bool[Array, "batch length"] | None
    candidate_bias: Float[Array, "batch length"] | None
    query_times: Int[Array, "batch length"] | None
    key_times: Int[Array, "batch length"] | None


def check_normalizer(op: str, normalizer: Any) -> None:
    if not isinstance(normalizer, int) or isinstance(normalizer, bool) or normalizer < 1:
        raise ValueError(f"{op}: normalizer must be a positive Python integer, got {normalizer!r}")


def check_tables(
    op: str, position_table: Any, length: int, time_table: Any, times: dict[str, Any]
) -> None:
    """`length`: how many distances the position table must reach."""
    if position_table is not None:
        check_rank(op, "position_table", position_table, 1, "2 N - 1")
        check_float(op, "position_table", position_table)
        size = position_table.shape[0]
        if size % 2 == 0 or size < 2 * length - 1:
            raise ValueError(
                f"{op}: position_table must be [2 N - 1] with N >= {length}, got shape ({size},)"
            )
    if time_table is not None:
        check_rank(op, "time_table", time_table, 1, "buckets + 1")
        check_float(op, "time_table", time_table)
        if time_table.shape[0] == 0:
            raise ValueError(f"{op}: time_table must have at least one entry")
    for name, x in times.items():
        if (x is None) != (time_table is None):
            given, wanted = ("time_table", name) if x is None else (name, "time_table")
            raise ValueError(f"{op}: {given} needs {wanted}; give both or neither")


def check_candidates(
    op: str, num_candidates: Any, batch: int, segment_ids: Any
) -> Int[Array, " batch"] | None:
    if num_candidates is None:
        return None
    num_candidates = jnp.asarray(num_candidates)
    if num_candidates.shape != (batch,) or not jnp.issubdtype(num_candidates.dtype, jnp.integer):
        raise ValueError(
            f"{op}: num_candidates must be int[batch] = [{batch}], "
            f"got {num_candidates.dtype.name}{list(num_candidates.shape)}"
        )
    if segment_ids is not None:
        raise ValueError(
            f"{op}: num_candidates counts the last events of a row, and a packed row ends with one "
            "of its sequences only; give each sequence a row of its own"
        )
    return num_candidates


def by_distance(
    position_table: Float[Array, " positions"] | None, length: int
) -> Float[Array, "1 length"] | None:
    """`out[0, i - j] = table[N - 1 + j - i]`, for table `[2 N - 1]`."""
    if position_table is None:
        return None
    middle = (position_table.shape[0] + 1) // 2
    return position_table[middle - length : middle][None, ::-1]


def describe(
    shape: tuple[int, int],
    distance_bias: Float[Array, "1 length"] | None,
    timestamps: Int[Array, "batch length"] | None,
    valid: Bool[Array, "batch length"] | None,
    segment_ids: Int[Array, "batch length"] | None,
    num_candidates: Int[Array, " batch"] | None,
) -> Rows:
    """For rows of a shape without a zero."""
    if num_candidates is None:
        asked = None if timestamps is None else next_times(timestamps, valid, segment_ids)
        return Rows(None, None, asked, timestamps)
    if valid is None:
        valid = jnp.ones(shape, jnp.bool_)
    behind = lax.cumsum(valid.astype(jnp.int32), axis=1, reverse=True)
    candidates = valid & (behind <= num_candidates.astype(jnp.int32)[:, None])
    # All candidates stand where the first one does, each as if it were alone there.
    first = jnp.argmax(candidates, axis=1)[:, None]
    candidate_bias = None
    if distance_bias is not None:
        distance = jnp.maximum(first - jnp.arange(shape[1])[None], 0)
        candidate_bias = jnp.take(distance_bias[0], distance)
    if timestamps is None:
        return Rows(candidates, candidate_bias, None, None)
    there = jnp.take_along_axis(timestamps, first, axis=1)
    query_times, key_times = (
        jnp.where(candidates, there, times)
        for times in (next_times(timestamps, valid, None), timestamps)
    )
    return Rows(candidates, candidate_bias, query_times, key_times)


def next_times(
    times: Int[Array, "batch length"],
    valid: Bool[Array, "batch length"] | None,
    segment_ids: Int[Array, "batch length"] | None,
) -> Int[Array, "batch length"]:
    """Time of the next valid event of the segment; where there is none, the event's own."""
    return platform_switch(_by_doubling, {"cpu": _by_gather}, times, valid, segment_ids)


def _by_gather(times: Array, valid: Array | None, segment_ids: Array | None) -> Array:
    """Ends in a gather: XLA repeats cheaper operations on a CPU for every pair of events."""
    length = times.shape[1]
    slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), times.shape)
    following = slots if valid is None else jnp.where(valid, slots, length)
    following = lax.cummin(following, axis=1, reverse=True)[:, 1:]
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=length)
    found, ahead = following < length, jnp.minimum(following, length - 1)
    if segment_ids is not None:
        found = found & (_at(segment_ids, ahead) == segment_ids)
    return _at(times, jnp.where(found, ahead, slots))


def _at(x: Array, slots: Array) -> Array:
    """x[b, slots[b, i]]."""
    rows = jnp.arange(x.shape[0], dtype=slots.dtype)[:, None]
    return x.at[rows, slots].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _by_doubling(times: Array, valid: Array | None, segment_ids: Array | None) -> Array:
    """What stands one slot behind, or else two, or else four.

    A gather would take a TPU longer than the attention itself.
    """
    length = times.shape[1]
    carried = [times] if segment_ids is None else [times, segment_ids]
    there = jnp.ones_like(times, jnp.bool_) if valid is None else valid
    found, *ahead = (_behind(x, 1) for x in (there, *carried))
    steps = 1
    while valid is not None and steps < length:
        ahead = [jnp.where(found, x, _behind(x, steps)) for x in ahead]
        found = found | _behind(found, steps)
        steps *= 2
    if segment_ids is not None:
        found = found & (ahead[1] == segment_ids)
    return jnp.where(found, ahead[0], times)


def _behind(x: Shaped[Array, "batch length"], steps: int) -> Shaped[Array, "batch length"]:
    """`x[:, i + steps]` at i; zero behind the end."""
    return jnp.pad(x[:, steps:], ((0, 0), (0, min(steps, x.shape[1]))))
