"""Pointwise attention for short sequences, in the row blocks of the dense softmax form.

The bias is the same for all heads and is formed once, `[batch, length, length]`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.ops import _attention_distance as _distance
from jaxrec.ops import _hstu_tile as _tile
from jaxrec.ops._attention_dense import dot, heads_first, row_blocks, sum_over_queries
from jaxrec.ops._checks import statistics_dtype


def _sides(inputs: Any) -> tuple[_tile.Events, _tile.Events]:
    index = jnp.arange(inputs.query.shape[1])
    shared = (index, inputs.valid, inputs.segment_ids, inputs.candidates)
    return (
        _tile.Events(*shared, inputs.query_times),
        _tile.Events(*shared, inputs.key_times),
    )


def _biases(inputs: Any) -> _tile.Biases:
    stat = statistics_dtype(inputs.query.dtype)
    distance, candidate, time = (
        None if x is None else x.astype(stat)
        for x in (inputs.distance_bias, inputs.candidate_bias, inputs.time_table)
    )
    distance = None if distance is None else _distance.square(distance)
    return _tile.Biases(distance, candidate, time)


def _slice(x: Array | None, start: int, end: int) -> Array | None:
    return None if x is None else x[:, start:end, :end]


def forward(options: Any, inputs: Any) -> Float[Array, "batch length heads value_dim"]:
    q, k, v = map(heads_first, (inputs.query, inputs.key, inputs.value))
    rows, cols = _sides(inputs)
    bias = _tile.bias(_biases(inputs), rows, cols)
    seen = _tile.mask(rows, cols)
    outs = []
    for start, end in row_blocks(q.shape[2]):
        products = dot("bhid,bhjd->bhij", q[:, :, start:end], k[:, :, :end])
        scores = _tile.scores(products, options.scale, _slice(bias, start, end))
        weights = _tile.weights(scores, seen[:, start:end, :end])
        outs.append(dot("bhij,bhje->bhie", weights.astype(v.dtype), v[:, :, :end]))
    out = jnp.concatenate(outs, axis=2) / options.normalizer
    return heads_first(out).astype(v.dtype)


def backward(
    options: Any, inputs: Any, d_out: Float[Array, "batch length heads value_dim"]
) -> tuple[tuple[Array, Array, Array], tuple[Array | None, Array | None, Array | None]]:
    q, k, v, g = map(heads_first, (inputs.query, inputs.key, inputs.value, d_out))
    stat = statistics_dtype(q.dtype)
    length = q.shape[2]
    rows, cols = _sides(inputs)
    biases = _biases(inputs)
    bias = _tile.bias(biases, rows, cols)
    seen = _tile.mask(rows, cols)
    d_query: list[Array] = []
    d_key: list[Array] = []
    d_value: list[Array] = []
    d_bias: list[Array] = []
    blocks = row_blocks(length)
    for start, end in blocks:
        q_rows, g_rows = q[:, :, start:end], g[:, :, start:end]
        seen_here = seen[:, start:end, :end]
        products = dot("bhid,bhjd->bhij", q_rows, k[:, :, :end])
        scores = _tile.scores(products, options.scale, _slice(bias, start, end))
        weights = _tile.weights(scores, seen_here)
        d_weights = dot("bhie,bhje->bhij", g_rows, v[:, :, :end]).astype(stat)
        d_scores = _tile.weights_gradient(scores, seen_here, d_weights)
        if bias is not None:
            d_bias.append(jnp.pad(d_scores.sum(1), ((0, 0), (0, 0), (0, length - end))))
        d_scores = d_scores.astype(q.dtype)
        d_query.append(dot("bhij,bhjd->bhid", d_scores, k[:, :, :end]))
        d_key.append(dot("bhij,bhid->bhjd", d_scores, q_rows))
        d_value.append(dot("bhij,bhie->bhje", weights.astype(v.dtype), g_rows))
    factor = options.scale / options.normalizer
    dq = jnp.concatenate(d_query, axis=2) * factor
    dk = sum_over_queries(blocks, d_key) * factor
    dv = sum_over_queries(blocks, d_value) / options.normalizer
    dq, dk, dv = (heads_first(d).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    d_distance = d_candidate = d_time = None
    if bias is not None:
        d_rows = jnp.concatenate(d_bias, axis=1) / options.normalizer
        d_distance, d_candidate, d_time = _tile.bias_gradient(biases, rows, cols, d_rows)
    if d_distance is not None:
        d_distance = _distance.square_gradient(d_distance)
    return (dq, dk, dv), (d_distance, d_candidate, d_time)
