"""Pointwise attention for short sequences, in the row blocks of the dense softmax form.

The bias is the same for all heads; it is formed block by block, `[batch, rows, keys]`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.ops import _attention_distance as _distance
from jaxrec.ops import _hstu_tile as _tile
from jaxrec.ops._attention_dense import dot, heads_first, row_blocks, sum_over_queries
from jaxrec.ops._checks import statistics_dtype


class _Block(NamedTuple):
    """Some rows of queries against all keys before their end: what describes the pairs."""

    rows: _tile.Events
    cols: _tile.Events
    biases: _tile.Biases


def _block(inputs: Any, biases: _tile.Biases, start: int, end: int) -> _Block:
    def side(first: int, times: Array | None) -> _tile.Events:
        per_event = (inputs.valid, inputs.segment_ids, inputs.candidates, times)
        cut = (None if x is None else x[:, first:end] for x in per_event)
        return _tile.Events(jnp.arange(first, end), *cut)

    here = _tile.Biases(
        None if biases.distance is None else biases.distance[:, start:end, :end],
        None if biases.candidate is None else biases.candidate[:, :end],
        biases.time,
    )
    return _Block(side(start, inputs.query_times), side(0, inputs.key_times), here)


def _biases(inputs: Any) -> _tile.Biases:
    """Of the whole square, but for the time bias: of that, the table."""
    stat = statistics_dtype(inputs.query.dtype)
    distance, candidate, time = (
        None if x is None else x.astype(stat)
        for x in (inputs.distance_bias, inputs.candidate_bias, inputs.time_table)
    )
    distance = None if distance is None else _distance.square(distance)
    return _tile.Biases(distance, candidate, time)


def forward(options: Any, inputs: Any) -> Float[Array, "batch length heads value_dim"]:
    q, k, v = map(heads_first, (inputs.query, inputs.key, inputs.value))
    biases = _biases(inputs)
    outs = []
    for start, end in row_blocks(q.shape[2]):
        rows, cols, here = _block(inputs, biases, start, end)
        products = dot("bhid,bhjd->bhij", q[:, :, start:end], k[:, :, :end])
        scores = _tile.scores(products, options.scale, _tile.bias(here, rows, cols))
        weights = _tile.weights(scores, _tile.mask(rows, cols))
        outs.append(dot("bhij,bhje->bhie", weights.astype(v.dtype), v[:, :, :end]))
    out = jnp.concatenate(outs, axis=2) / options.normalizer
    return heads_first(out).astype(v.dtype)


def backward(
    options: Any, inputs: Any, d_out: Float[Array, "batch length heads value_dim"]
) -> tuple[tuple[Array, Array, Array], tuple[Array | None, Array | None, Array | None]]:
    q, k, v, g = map(heads_first, (inputs.query, inputs.key, inputs.value, d_out))
    stat = statistics_dtype(q.dtype)
    length = q.shape[2]
    biases = _biases(inputs)
    d_query: list[Array] = []
    d_key: list[Array] = []
    d_value: list[Array] = []
    d_biases: list[_tile.Biases] = []
    blocks = row_blocks(length)
    for start, end in blocks:
        q_rows, g_rows = q[:, :, start:end], g[:, :, start:end]
        rows, cols, here = _block(inputs, biases, start, end)
        seen = _tile.mask(rows, cols)
        products = dot("bhid,bhjd->bhij", q_rows, k[:, :, :end])
        scores = _tile.scores(products, options.scale, _tile.bias(here, rows, cols))
        weights = _tile.weights(scores, seen)
        d_weights = dot("bhie,bhje->bhij", g_rows, v[:, :, :end]).astype(stat)
        d_scores = _tile.weights_gradient(scores, seen, d_weights)
        d_biases.append(_padded(_tile.bias_gradient(here, rows, cols, d_scores.sum(1)), length))
        d_scores = d_scores.astype(q.dtype)
        d_query.append(dot("bhij,bhjd->bhid", d_scores, k[:, :, :end]))
        d_key.append(dot("bhij,bhid->bhjd", d_scores, q_rows))
        d_value.append(dot("bhij,bhie->bhje", weights.astype(v.dtype), g_rows))
    factor = options.scale / options.normalizer
    dq = jnp.concatenate(d_query, axis=2) * factor
    dk = sum_over_queries(blocks, d_key) * factor
    dv = sum_over_queries(blocks, d_value) / options.normalizer
    dq, dk, dv = (heads_first(d).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return (dq, dk, dv), _bias_gradients(d_biases, options.normalizer)


def _bias_gradients(
    parts: list[_tile.Biases], normalizer: float
) -> tuple[Array | None, Array | None, Array | None]:
    """From those of the blocks, each with the keys of a whole row."""
    distances, candidates, times = (
        [x for x in column if x is not None] for column in zip(*parts, strict=True)
    )

    def total(arrays: list[Array]) -> Array | None:
        return sum(arrays[1:], start=arrays[0]) / normalizer if arrays else None

    rows = jnp.concatenate(distances, axis=1) if distances else None
    return (
        None if rows is None else _distance.square_gradient(rows) / normalizer,
        total(candidates),
        total(times),
    )


def _padded(d_biases: _tile.Biases, length: int) -> _tile.Biases:
    """With zeros for the keys behind a block's end."""

    def pad(x: Array | None) -> Array | None:
        if x is None:
            return None
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])

    return _tile.Biases(pad(d_biases.distance), pad(d_biases.candidate), d_biases.time)
