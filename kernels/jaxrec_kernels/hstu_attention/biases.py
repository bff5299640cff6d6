"""Inside the kernels: facts along sublanes, rows without their holes, the biases of a tile."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxrec_kernels import LANES
from jaxrec_kernels.hstu_attention import tile as _tile
from jaxrec_kernels.hstu_attention.step import Index, Step, over, over_chunks, over_tiles, slots


def _down(facts: Any, field: int, chunk: Index, size: int, b: Index) -> Array:
    """A fact of a chunk turned along sublanes, the same in all lanes."""
    row = facts[b, field : field + 1, slots(chunk, LANES)]
    return jnp.broadcast_to(row, (LANES, LANES)).T[:size]


def spread(step: Step) -> None:
    """Puts the facts of the block that lies along sublanes into `refs.wide`."""
    refs = step.refs
    facts = refs.queries if step.settings.queries_down else refs.keys

    def write(chunk: Index, size: int, b: Index) -> None:
        for field in range(step.settings.fields.rows):
            refs.wide[b, field, slots(chunk, size)] = _down(facts, field, chunk, size, b)

    over_chunks(step, write)


def clean(step: Step, facts: Any, *names: str) -> None:
    """Copies rows, with zeros where nobody is: what stands there may be no number.

    `facts`: of their block, or None for the block that is spread.
    """
    if not step.settings.holes:
        return

    def copy(chunk: Index, size: int, b: Index) -> None:
        if facts is None:
            place = step.refs.wide[b, 0, slots(chunk, size)]
        else:
            place = _down(facts, 0, chunk, size, b)
        # A query that is not there has -1, a key the largest number.
        there = (place >= 0) & (place != _tile.NEVER)
        for name in names:
            rows, to = getattr(step.refs, name), getattr(step.refs, f"clean_{name}")
            for lane in range(0, rows.shape[2], LANES):
                at = (b, slots(chunk, size), slice(lane, min(lane + LANES, rows.shape[2])))
                x = rows[at]
                to[at] = jnp.where(there[:, : x.shape[1]], x, jnp.zeros((), x.dtype))

    over_chunks(step, copy)


def cleaned(step: Step, name: str) -> Any:
    return getattr(step.refs, f"clean_{name}" if step.settings.holes else name)


def sides(
    step: Step, down: Index, along: Index, size: int, b: Index
) -> tuple[_tile.Events, _tile.Events]:
    """Queries and keys of a tile."""
    refs, fields = step.refs, step.settings.fields

    def on_lanes(facts: Any) -> Callable[[int], Array]:
        return lambda field: facts[b, field : field + 1, slots(along, LANES)]

    on_sublanes = fields.events(lambda field: refs.wide[b, field, slots(down, size)])
    if step.settings.queries_down:
        return on_sublanes, fields.events(on_lanes(refs.keys))
    return fields.events(on_lanes(refs.queries)), on_sublanes


def fill_lag_tiles(step: Step) -> None:
    """The tile of position biases for every distance between two chunks."""
    refs = step.refs

    def fill(distance: Index) -> None:
        row = jnp.broadcast_to(refs.lag_rows[pl.ds(distance, 1)], (LANES, 2 * LANES))
        square = pltpu.roll(row, 0, 1, stride=1, stride_axis=0)[:, :LANES]
        refs.lag_tiles[distance] = square.T if step.settings.queries_down else square

    over(step, step.plan.distances, fill)


def write_biases(step: Step) -> None:
    """The biases of all tiles; backward their buckets beside them."""
    over_tiles(step, partial(_write_bias, step))


def _write_bias(step: Step, down: Index, along: Index, size: int, b: Index) -> None:
    settings, refs = step.settings, step.refs
    queries, keys = sides(step, down, along, size, b)
    at = (b, slots(down, size), slots(along, LANES))
    seen = _tile.seen(queries, keys)
    total = jnp.zeros((size, LANES), jnp.float32)
    if settings.lags:
        total = refs.lag_tiles[step.chunks_apart(down, along), :size]
        if keys.bias is not None:
            total = jnp.where(_tile.is_candidate(queries), keys.bias, total)
    if settings.times:
        bucket = _tile.bucket(queries, keys, refs.edges[...])
        total = total + _tile.take_lanes(refs.time_row[...], bucket)
        if not settings.queries_down:
            refs.buckets[at] = bucket
            least = jnp.where(seen, bucket, LANES).min(0, keepdims=True)
            largest = jnp.where(seen, bucket, -1).max(0, keepdims=True)
            refs.limits[b, 0, down, pl.ds(along, 1)] = least
            refs.limits[b, 1, down, pl.ds(along, 1)] = largest
    refs.bias[at] = jnp.where(seen, total, _tile.HIDDEN)
