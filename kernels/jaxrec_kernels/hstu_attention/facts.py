"""What the kernels read of each event beside its vectors, and the tables as they read them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrec_kernels import LANES
from jaxrec_kernels.hstu_attention.tile import NEVER, Events


class Fields(NamedTuple):
    """In which row of the facts each field of `Events` stands; None where a call has none."""

    place: int
    segment: int | None
    time: int | None
    until: int | None
    bias: int | None

    @property
    def rows(self) -> int:
        return sum(row is not None for row in self)

    def events(self, row: Callable[[int], Array]) -> Events:
        """`row(i)`: row i of the facts, laid out for its side of a tile."""

        def maybe(i: int | None) -> Array | None:
            return None if i is None else row(i)

        bias = maybe(self.bias)
        if bias is not None:
            bias = lax.bitcast_convert_type(bias, jnp.float32)
        return Events(
            row(self.place), maybe(self.segment), maybe(self.time), maybe(self.until), bias
        )


def fields_of(inputs: Any) -> Fields:
    given = [
        x is not None
        for x in (
            inputs.segment_ids,
            inputs.query_times,
            inputs.candidates,
            inputs.candidate_bias,
        )
    ]
    segment, time, until, bias = (
        1 + sum(given[:i]) if there else None for i, there in enumerate(given)
    )
    return Fields(0, segment, time, until, bias)


def facts(
    inputs: Any, length: int
) -> tuple[Int[Array, "batch fields length"], Int[Array, "batch fields length"]]:
    """Facts of the events as queries and as keys, in rows that are filled up to a length."""
    batch, own = inputs.query.shape[:2]
    slot = jnp.broadcast_to(jnp.arange(own, dtype=jnp.int32), (batch, own))
    asking = asked = slot
    if inputs.valid is not None:
        asking, asked = jnp.where(inputs.valid, slot, -1), jnp.where(inputs.valid, slot, NEVER)
    until = None if inputs.candidates is None else jnp.where(inputs.candidates, slot, NEVER)
    bias = inputs.candidate_bias
    if bias is not None:
        bias = lax.bitcast_convert_type(bias.astype(jnp.float32), jnp.int32)

    def stack(place: Array, behind: int, times: Array | None) -> Array:
        rows = [(place, behind), (inputs.segment_ids, 0), (times, 0), (until, NEVER), (bias, 0)]
        return jnp.stack(
            [
                jnp.pad(x.astype(jnp.int32), ((0, 0), (0, length - own)), constant_values=filler)
                for x, filler in rows
                if x is not None
            ],
            axis=1,
        )

    return stack(asking, -1, inputs.query_times), stack(asked, NEVER, inputs.key_times)


def segment_ranges(segment_ids: Int[Array, "batch length"], block: int) -> Int[Array, " ranges"]:
    """The least and the largest id of every block of every row, `[batch, blocks, 2]` in one row."""
    batch, length = segment_ids.shape
    ids = segment_ids.astype(jnp.int32)
    ids = jnp.pad(ids, ((0, 0), (0, -length % block)), mode="edge").reshape(batch, -1, block)
    return jnp.stack([ids.min(2), ids.max(2)], axis=2).reshape(-1)


def lag_rows(
    distance_bias: Float[Array, "1 length"], distances: int
) -> Float[Array, "distances lanes_twice"]:
    """`out[d, m % 256] = bias[128 d + m]` for `m` from -128 to 127; zero where there is none.

    Row d is the first row of the tile of biases whose queries, on lanes, stand d chunks behind its
    keys; each further row is the one before, turned by a lane.
    """
    behind = distances * LANES - distance_bias.shape[1]
    lags = jnp.pad(distance_bias[0].astype(jnp.float32), (LANES, behind)).reshape(-1, LANES)
    return jnp.concatenate([lags[1:], lags[:-1]], axis=1)


def lag_tiles_gradient(
    d_tiles: Float[Array, "distances keys queries"], length: int
) -> Float[Array, "1 length"]:
    """Sums along the diagonals of the tiles, by lag."""
    distances = d_tiles.shape[0]
    # Rows of 256 lanes read as rows of 257: each row moves one lane to the left of the one before,
    # so that the lag m of a tile comes to stand in column 128 + m.
    rows = jnp.pad(d_tiles, ((0, 0), (0, 0), (0, LANES))).reshape(distances, -1)
    rows = jnp.pad(rows, ((0, 0), (LANES, 0))).reshape(distances, LANES, 2 * LANES + 1)
    by_lag = rows.sum(1)
    before, behind = by_lag[:, :LANES], by_lag[:, LANES : 2 * LANES]
    lags = jnp.pad(before, ((0, 1), (0, 0))) + jnp.pad(behind, ((1, 0), (0, 0)))
    return lags.reshape(-1)[LANES : LANES + length][None]


def time_row(time_table: Float[Array, " entries"]) -> Float[Array, "1 lanes"]:
    """The table by bucket; a bucket behind its end has its last entry."""
    lanes = jnp.minimum(jnp.arange(LANES), time_table.shape[0] - 1)
    return jnp.take(time_table, lanes).astype(jnp.float32)[None]


def time_row_gradient(d_row: Float[Array, " buckets"], entries: int) -> Float[Array, " entries"]:
    if entries >= d_row.shape[0]:
        return jnp.pad(d_row, (0, entries - d_row.shape[0]))
    return jnp.append(d_row[: entries - 1], d_row[entries - 1 :].sum())


def edge_row(edges: tuple[int, ...]) -> Int[Array, "1 lanes"]:
    """The least difference of each bucket, modulo 2^32.

    Behind the last one stand zeros, which are 2^32: no difference reaches it.
    """
    wrapped = [0, *(e - 2**32 if e >= 2**31 else e for e in edges)]
    return jnp.asarray([wrapped + [0] * (LANES - len(wrapped))], jnp.int32)
