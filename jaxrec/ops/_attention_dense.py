"""Causal attention for short sequences: a few query blocks, each against all keys before its end.

A block of queries needs the keys up to its own last row only, so that with r blocks the logits are
(r + 1) / 2r of a square. The blocks do not depend on each other, which also lets a CPU, whose
batched products run on one core each, work on several at once.
"""

from itertools import pairwise
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.ops import _attention_distance as _distance
from jaxrec.ops._attention_dropout import keep_mask
from jaxrec.ops._checks import statistics_dtype
from jaxrec.ops._masking import masked_logits, visible

_ROWS, _MOST_BLOCKS = 64, 8


def row_blocks(length: int) -> list[tuple[int, int]]:
    """Blocks of equal size but for the last, which is half to one and a half of the others.

    They begin at multiples of 64, so that tiles of a TPU are not cut; but rows of up to 128, which
    lie in one tile, are halved evenly.

    >>> row_blocks(200), row_blocks(120), row_blocks(90)
    ([(0, 64), (64, 128), (128, 200)], [(0, 60), (60, 120)], [(0, 90)])
    """
    size = _ROWS * max(1, -(-length // (_ROWS * _MOST_BLOCKS)))
    count = max(1, round(length / size))
    if length <= 2 * _ROWS:
        size = length // count
    return list(pairwise([*(size * i for i in range(count)), length]))


def heads_first(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2)


def dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=statistics_dtype(a.dtype))


def _mask(inputs: Any, start: int, end: int) -> Array:
    valid, segments = inputs.valid, inputs.segment_ids
    mask = visible(
        jnp.arange(start, end),
        jnp.arange(end),
        None if valid is None else valid[:, :end],
        None if segments is None else segments[:, start:end],
        None if segments is None else segments[:, :end],
    )
    if inputs.distance_bias is not None and valid is not None:
        # A bias that only invalid rows would meet is met by nobody, even if it is NaN.
        mask = mask & valid[:, start:end, None]
    return mask


def _bias(inputs: Any, dtype: Any) -> Array | None:
    bias = inputs.distance_bias
    return None if bias is None else _distance.square(bias.astype(dtype))


def _logits(
    options: Any, inputs: Any, bias: Array | None, q_rows: Array, k: Array, start: int, end: int
) -> Array:
    logits = dot("bhid,bhjd->bhij", q_rows, k[:, :, :end]) * options.scale
    if bias is not None:
        logits = logits + bias[None, :, start:end, :end]
    return masked_logits(logits, _mask(inputs, start, end))


def _dropout_factor(options: Any, inputs: Any, start: int, end: int, dtype: Any) -> Array:
    batch, length, heads, _ = inputs.query.shape
    keep = keep_mask(
        inputs.seeds,
        options.dropout_rate,
        batch=batch,
        heads=heads,
        length=length,
        rows=jnp.arange(start, end),
        cols=jnp.arange(end),
    )
    return jnp.where(keep, jnp.asarray(1 / (1 - options.dropout_rate), dtype), jnp.zeros((), dtype))


def forward(
    options: Any, inputs: Any
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads length"]]:
    q, k, v = map(heads_first, (inputs.query, inputs.key, inputs.value))
    bias = _bias(inputs, statistics_dtype(q.dtype))
    outs, stats = [], []
    for start, end in row_blocks(q.shape[2]):
        logits = _logits(options, inputs, bias, q[:, :, start:end], k, start, end)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        if options.dropout_rate:
            weights *= _dropout_factor(options, inputs, start, end, weights.dtype)
        out = dot("bhij,bhje->bhie", weights.astype(v.dtype), v[:, :, :end])
        outs.append(out / total.astype(out.dtype))
        stats.append((top + jnp.log(total))[..., 0])
    out = jnp.concatenate(outs, axis=2)
    return heads_first(out).astype(v.dtype), jnp.concatenate(stats, axis=2)


def backward(
    options: Any,
    inputs: Any,
    out: Float[Array, "batch length heads value_dim"],
    log_sum_exp: Float[Array, "batch heads length"],
    d_out: Float[Array, "batch length heads value_dim"],
) -> tuple[Array, Array, Array, Array | None]:
    q, k, v, o, g = map(heads_first, (inputs.query, inputs.key, inputs.value, out, d_out))
    stat = log_sum_exp.dtype
    delta = (o.astype(stat) * g.astype(stat)).sum(-1, keepdims=True)
    d_query: list[Array] = []
    d_key: list[Array] = []
    d_value: list[Array] = []
    bias = _bias(inputs, stat)
    d_bias: list[Array] = []
    blocks = row_blocks(q.shape[2])
    for start, end in blocks:
        q_rows, g_rows = q[:, :, start:end], g[:, :, start:end]
        logits = _logits(options, inputs, bias, q_rows, k, start, end)
        weights = jnp.exp(logits - log_sum_exp[:, :, start:end, None])
        d_weights = dot("bhie,bhje->bhij", g_rows, v[:, :, :end]).astype(stat)
        dropped = weights
        if options.dropout_rate:
            factor = _dropout_factor(options, inputs, start, end, stat)
            dropped, d_weights = weights * factor, d_weights * factor
        d_logits = weights * (d_weights - delta[:, :, start:end])
        if bias is not None:
            rows = _distance.sum_to_groups(d_logits, bias.shape[0])
            d_bias.append(jnp.pad(rows, ((0, 0), (0, 0), (0, q.shape[2] - end))))
        d_logits = d_logits.astype(q.dtype)
        d_query.append(dot("bhij,bhjd->bhid", d_logits, k[:, :, :end]))
        d_key.append(dot("bhij,bhid->bhjd", d_logits, q_rows))
        d_value.append(dot("bhij,bhie->bhje", dropped.astype(v.dtype), g_rows))
    dq = jnp.concatenate(d_query, axis=2) * options.scale
    dk = sum_over_queries(blocks, d_key) * options.scale
    dv = sum_over_queries(blocks, d_value)
    db = None
    if bias is not None:
        db = _distance.square_gradient(jnp.concatenate(d_bias, axis=1))
        db = db.astype(inputs.distance_bias.dtype)
    dq, dk, dv = (heads_first(d).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, db


def sum_over_queries(blocks: list[tuple[int, int]], parts: list[Array]) -> Array:
    """Sum of arrays of growing length: rows `start:end` are in the parts from their block on."""
    rows = []
    for i, (start, end) in enumerate(blocks):
        total = parts[i][:, :, start:end]
        for part in parts[i + 1 :]:
            total = total + part[:, :, start:end]
        rows.append(total)
    return jnp.concatenate(rows, axis=2)
