"""Pointwise attention for long sequences, in the tiles of the blockwise softmax form.

Without a softmax there is nothing to carry along a row but the sum: memory is one tile a head.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxrec.ops import _attention_blockwise as _blockwise
from jaxrec.ops import _attention_distance as _distance
from jaxrec.ops import _hstu_tile as _tile
from jaxrec.ops._attention_blockwise import at, cut_heads, dot, join_heads, zeros
from jaxrec.ops._checks import statistics_dtype


class _Row(NamedTuple):
    """What describes the events of a row, cut into blocks; the bias tables as one."""

    tiling: _blockwise.Tiling
    candidates: Array | None
    query_times: Array | None
    key_times: Array | None
    lags: Array | None
    candidate_bias: Array | None
    time_table: Array | None


def _row(options: Any, inputs: Any) -> _Row:
    batch, length = inputs.query.shape[:2]
    stat = statistics_dtype(inputs.query.dtype)
    # Always there, so that the slots behind the end are nobody's.
    valid = jnp.ones((batch, length), jnp.bool_) if inputs.valid is None else inputs.valid
    tiling = _blockwise.tile(length, valid, inputs.segment_ids, options.block)

    def cut(x: Array | None) -> Array | None:
        return None if x is None else _blockwise.cut(x, tiling.size, tiling.blocks)

    distance, candidate, time = (
        None if x is None else x.astype(stat)
        for x in (inputs.distance_bias, inputs.candidate_bias, inputs.time_table)
    )
    if distance is not None:
        distance = _distance.lag_values(distance, tiling.size * tiling.blocks)
    return _Row(
        tiling,
        cut(inputs.candidates),
        cut(inputs.query_times),
        cut(inputs.key_times),
        distance,
        cut(candidate),
        time,
    )


def _sides(row: _Row, i: Array, j: Array) -> tuple[_tile.Events, _tile.Events]:
    offsets = jnp.arange(row.tiling.size)

    def side(block: Array, times: Array | None) -> _tile.Events:
        return _tile.Events(
            block * row.tiling.size + offsets,
            at(row.tiling.valid, block),
            at(row.tiling.segments, block),
            at(row.candidates, block),
            at(times, block),
        )

    return side(i, row.query_times), side(j, row.key_times)


def _biases(row: _Row, i: Array, j: Array) -> _tile.Biases:
    distance = None
    if row.lags is not None:
        distance = _distance.tile(row.lags, row.tiling.size, i - j)
    return _tile.Biases(distance, at(row.candidate_bias, j), row.time_table)


def forward(options: Any, inputs: Any) -> Float[Array, "batch length heads value_dim"]:
    batch, length, heads, _ = inputs.query.shape
    row = _row(options, inputs)
    tiling = row.tiling
    q, k, v = (cut_heads(x, tiling) for x in (inputs.query, inputs.key, inputs.value))

    def query_block(_: None, i: Array) -> tuple[None, Array]:
        q_i = at(q, i)

        def key_block(j: Array, total: Array) -> Array:
            rows, cols = _sides(row, i, j)
            bias = _tile.bias(_biases(row, i, j), rows, cols)
            products = dot("bhid,bhjd->bhij", q_i, at(k, j))
            weights = _tile.weights(
                _tile.scores(products, options.scale, bias), _tile.mask(rows, cols)
            )
            return total + dot("bhij,bhje->bhie", weights.astype(v.dtype), at(v, j))

        shape = (batch, heads, tiling.size, v.shape[-1])
        total = zeros(shape, statistics_dtype(v.dtype), q)
        total = lax.fori_loop(tiling.first[i], i + 1, key_block, total)
        return None, (total / options.normalizer).astype(v.dtype)

    _, out = lax.scan(query_block, None, jnp.arange(tiling.blocks))
    return join_heads(out, length)


def backward(
    options: Any, inputs: Any, d_out: Float[Array, "batch length heads value_dim"]
) -> tuple[tuple[Array, Array, Array], tuple[Array | None, Array | None, Array | None]]:
    batch, length = inputs.query.shape[:2]
    row = _row(options, inputs)
    tiling = row.tiling
    q, k, v, g = (cut_heads(x, tiling) for x in (inputs.query, inputs.key, inputs.value, d_out))
    stat = statistics_dtype(q.dtype)
    factor = options.scale / options.normalizer

    def key_block(carry: Any, j: Array) -> Any:
        k_j, v_j = at(k, j), at(v, j)

        def query_block(i: Array, carry: Any) -> Any:
            d_query, d_lags, d_time, d_k, d_v, d_candidate = carry
            q_i, g_i = at(q, i), at(g, i)
            rows, cols = _sides(row, i, j)
            biases, seen = _biases(row, i, j), _tile.mask(rows, cols)
            scores = _tile.scores(
                dot("bhid,bhjd->bhij", q_i, k_j), options.scale, _tile.bias(biases, rows, cols)
            )
            weights = _tile.weights(scores, seen)
            d_weights = dot("bhie,bhje->bhij", g_i, v_j).astype(stat)
            d_scores = _tile.weights_gradient(scores, seen, d_weights)
            d_biases = _tile.bias_gradient(biases, rows, cols, d_scores.sum(1))
            if d_biases.distance is not None:
                d_lags = _distance.add_tile_gradient(d_lags, d_biases.distance, i - j)
            if d_biases.time is not None:
                d_time = d_time + d_biases.time
            if d_biases.candidate is not None:
                d_candidate = d_candidate + d_biases.candidate
            d_scores = d_scores.astype(q.dtype)
            d_query = _blockwise.add_at(d_query, i, dot("bhij,bhjd->bhid", d_scores, k_j))
            d_k = d_k + dot("bhij,bhid->bhjd", d_scores, q_i)
            d_v = d_v + dot("bhij,bhie->bhje", weights.astype(v.dtype), g_i)
            return d_query, d_lags, d_time, d_k, d_v, d_candidate

        start = (
            *carry,
            zeros(k_j.shape, stat, q),
            zeros(v_j.shape, statistics_dtype(v.dtype), q),
            None if row.candidate_bias is None else zeros((batch, tiling.size), stat, q),
        )
        *carry, d_k, d_v, d_candidate = lax.fori_loop(j, tiling.last[j] + 1, query_block, start)
        d_k = (d_k * factor).astype(k.dtype)
        d_v = (d_v / options.normalizer).astype(v.dtype)
        return tuple(carry), (d_k, d_v, d_candidate)

    first = (
        zeros(q.shape, stat, q),
        *(None if x is None else zeros(x.shape, stat, q) for x in (row.lags, row.time_table)),
    )
    index = jnp.arange(tiling.blocks)
    (dq, d_lags, d_time), (dk, dv, d_candidate) = lax.scan(key_block, first, index)
    dq = (dq * factor).astype(q.dtype)
    if d_lags is not None:
        d_lags = _distance.lag_values_gradient(d_lags, length)
    if d_candidate is not None:
        d_candidate = jnp.moveaxis(d_candidate, 0, 1).reshape(batch, -1)[:, :length]
    d_tables = (
        None if d is None else d / options.normalizer for d in (d_lags, d_candidate, d_time)
    )
    dq, dk, dv = (join_heads(d, length) for d in (dq, dk, dv))
    return (dq, dk, dv), tuple(d_tables)  # type: ignore[return-value]
