"""One tile of pointwise attention: who sees whom, the bias, and the bias's gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _time_buckets
from jaxrec.ops._masking import visible


class Events(NamedTuple):
    """One side of a tile: its rows (queries) or its columns (keys)."""

    slots: Int[Array, " size"]
    valid: Bool[Array, "batch size"] | None
    segments: Int[Array, "batch size"] | None
    candidates: Bool[Array, "batch size"] | None
    times: Int[Array, "batch size"] | None


class Biases(NamedTuple):
    """What the bias of a tile is read from, and, in the backward pass, its gradients.

    `distance`: by `i - j`, the tile of it. `candidate`: the row that all candidates share, the
    tile's columns of it. `time`: the whole table.
    """

    distance: Float[Array, "1 rows cols"] | None
    candidate: Float[Array, "batch cols"] | None
    time: Float[Array, " entries"] | None


def mask(rows: Events, cols: Events) -> Bool[Array, "#batch rows cols"]:
    """Rows are masked too, so that nothing of a table is read for an event that is not there."""
    seen = visible(rows.slots, cols.slots, cols.valid, rows.segments, cols.segments)
    if rows.valid is not None:
        seen = seen & rows.valid[:, :, None]
    if cols.candidates is not None:
        itself = (rows.slots[:, None] == cols.slots[None, :])[None]
        seen = seen & (itself | ~cols.candidates[:, None, :])
    return seen


def bias(biases: Biases, rows: Events, cols: Events) -> Float[Array, "#batch rows cols"] | None:
    total = biases.distance
    if total is not None and biases.candidate is not None:
        assert rows.candidates is not None
        total = jnp.where(rows.candidates[:, :, None], biases.candidate[:, None, :], total)
    if biases.time is None:
        return total
    in_time = _time_buckets.lookup(biases.time, _apart(rows, cols))
    return in_time if total is None else total + in_time


def bias_gradient(
    biases: Biases, rows: Events, cols: Events, d_bias: Float[Array, "batch rows cols"]
) -> Biases:
    d_distance, d_candidate, d_time = None, None, None
    if biases.time is not None:
        d_time = _time_buckets.lookup_gradient(biases.time, _apart(rows, cols), d_bias)
    if biases.distance is not None:
        nothing = jnp.zeros((), d_bias.dtype)
        if biases.candidate is not None:
            assert rows.candidates is not None
            by_candidate = rows.candidates[:, :, None]
            d_candidate = jnp.where(by_candidate, d_bias, nothing).sum(1)
            d_bias = jnp.where(by_candidate, nothing, d_bias)
        d_distance = d_bias.sum(0)[None]
    return Biases(d_distance, d_candidate, d_time)


def _apart(rows: Events, cols: Events) -> Array:
    assert rows.times is not None
    assert cols.times is not None
    return _time_buckets.distance(rows.times[:, :, None], cols.times[:, None, :])


def scores(
    products: Float[Array, "batch heads rows cols"],
    scale: float,
    bias: Float[Array, "#batch rows cols"] | None,
) -> Float[Array, "batch heads rows cols"]:
    products = products * scale
    return products if bias is None else products + bias[:, None]


def weights(
    scores: Float[Array, "batch heads rows cols"], seen: Bool[Array, "#batch rows cols"]
) -> Float[Array, "batch heads rows cols"]:
    """SiLU, without the division by the normaliser."""
    return _where(seen, scores * jax.nn.sigmoid(scores))


def weights_gradient(
    scores: Float[Array, "batch heads rows cols"],
    seen: Bool[Array, "#batch rows cols"],
    d_weights: Float[Array, "batch heads rows cols"],
) -> Float[Array, "batch heads rows cols"]:
    gate = jax.nn.sigmoid(scores)
    return _where(seen, d_weights * gate * (1 + scores * (1 - gate)))


def _where(seen: Array, x: Array) -> Any:
    return jnp.where(seen[:, None], x, jnp.zeros((), x.dtype))
