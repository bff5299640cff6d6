"""Causal attention for long sequences: blocks of queries against blocks of keys, online softmax.

Memory is O(length) a row: one [block, block] tile of logits a head lives at a time. The loop over
key blocks stops at the diagonal, and starts at the first block that can share a segment with the
query block, so that packed rows cost what their segments cost. The weights are computed again in
the backward pass.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _attention_distance as _distance
from jaxrec.ops._attention_dropout import keep_mask
from jaxrec.ops._checks import statistics_dtype
from jaxrec.ops._manual_axes import vary_together
from jaxrec.ops._masking import MASKED, masked_logits, visible


class Tiling(NamedTuple):
    """A row cut into `blocks` pieces of `size`, and which pairs of blocks meet."""

    size: int
    blocks: int
    valid: Bool[Array, "blocks batch size"] | None
    segments: Int[Array, "blocks batch size"] | None
    first: Int[Array, " blocks"]  # of the key blocks that a query block meets
    last: Int[Array, " blocks"]  # of the query blocks that a key block meets


def cut(x: Array, size: int, count: int, mode: str = "constant") -> Array:
    """[batch, length, ...] -> [count, batch, size, ...], zeros behind the end."""
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, size * count - x.shape[1])
    x = jnp.pad(x, pad, mode=mode).reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def cut_heads(x: Array, tiling: Tiling) -> Array:
    """[batch, length, heads, width] -> [count, batch, heads, size, width]."""
    return jnp.swapaxes(cut(x, tiling.size, tiling.blocks), 2, 3)


def join_heads(x: Array, length: int) -> Array:
    count, batch, heads, size, width = x.shape
    x = jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(batch, count * size, heads, width)
    return x[:, :length]


def tile(length: int, valid: Array | None, segment_ids: Array | None, size: int) -> Tiling:
    count = -(-length // size)
    index = jnp.arange(count)
    first, last = jnp.zeros_like(index), jnp.full_like(index, count - 1)
    segments = None
    if segment_ids is not None:
        segments = cut(segment_ids, size, count, mode="edge")
        # Blocks can only meet where their ranges of ids overlap; sorted ids or not, this is safe.
        low, high = segments.min(2), segments.max(2)
        meet = (low[:, None] <= high[None]) & (low[None] <= high[:, None])
        meet = meet.any(2) & (index[None, :] <= index[:, None])
        first = jnp.argmax(meet, axis=1).astype(index.dtype)
        last = count - 1 - jnp.argmax(meet[::-1], axis=0).astype(index.dtype)
    return Tiling(
        size, count, None if valid is None else cut(valid, size, count), segments, first, last
    )


def at(x: Array | None, i: Array) -> Any:
    return None if x is None else lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def add_at(x: Array, i: Array, delta: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, at(x, i) + delta, i, 0)


def zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """A loop's first carry, which must vary over the mesh as what is added to it does."""
    return vary_together(jnp.zeros(shape, dtype), like)[0]


def dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=statistics_dtype(a.dtype))


def _tile(options: Any, inputs: Any) -> Tiling:
    batch, length = inputs.query.shape[:2]
    valid = inputs.valid
    if inputs.distance_bias is not None and valid is None:
        valid = jnp.ones((batch, length), jnp.bool_)
    return tile(length, valid, inputs.segment_ids, options.block)


def _bias(inputs: Any, tiling: Tiling, dtype: Any) -> Array | None:
    bias = inputs.distance_bias
    if bias is None:
        return None
    return _distance.lag_values(bias.astype(dtype), tiling.size * tiling.blocks)


def _logits(
    options: Any,
    tiling: Tiling,
    bias: Array | None,
    q_i: Array,
    k_j: Array,
    i: Array,
    j: Array,
) -> Array:
    offsets = jnp.arange(tiling.size)
    mask = visible(
        i * tiling.size + offsets,
        j * tiling.size + offsets,
        at(tiling.valid, j),
        at(tiling.segments, i),
        at(tiling.segments, j),
    )
    logits = dot("bhid,bhjd->bhij", q_i, k_j) * options.scale
    if bias is not None:
        logits = logits + _distance.tile(bias, tiling.size, i - j)[None]
        # A bias that only invalid rows would meet is met by nobody, even if it is NaN; and rows
        # behind the end, whose log-sum-exp is a made-up 0, must not meet a large one.
        mask = mask & at(tiling.valid, i)[:, :, None]
    return masked_logits(logits, mask)


def _dropout_factor(
    options: Any, inputs: Any, tiling: Tiling, i: Array, j: Array, dtype: Any
) -> Array:
    batch, length, heads, _ = inputs.query.shape
    offsets = jnp.arange(tiling.size)
    keep = keep_mask(
        inputs.seeds,
        options.dropout_rate,
        batch=batch,
        heads=heads,
        length=length,
        rows=i * tiling.size + offsets,
        cols=j * tiling.size + offsets,
    )
    return jnp.where(keep, jnp.asarray(1 / (1 - options.dropout_rate), dtype), jnp.zeros((), dtype))


def forward(
    options: Any, inputs: Any
) -> tuple[Float[Array, "batch length heads value_dim"], Float[Array, "batch heads length"]]:
    batch, length, heads, _ = inputs.query.shape
    tiling = _tile(options, inputs)
    q, k, v = (cut_heads(x, tiling) for x in (inputs.query, inputs.key, inputs.value))
    stat = statistics_dtype(q.dtype)
    bias = _bias(inputs, tiling, stat)

    def query_block(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        q_i = at(q, i)

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, acc = carry
            logits = _logits(options, tiling, bias, q_i, at(k, j), i, j)
            new_top = jnp.maximum(top, logits.max(-1))
            weights = jnp.exp(logits - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(-1)
            if options.dropout_rate:
                weights *= _dropout_factor(options, inputs, tiling, i, j, stat)
            update = dot("bhij,bhje->bhie", weights.astype(v.dtype), at(v, j))
            return new_top, total, acc * shrink[..., None].astype(acc.dtype) + update

        rows = (batch, heads, tiling.size)
        nothing = zeros(rows, stat, q)
        acc = zeros((*rows, v.shape[-1]), statistics_dtype(v.dtype), q)
        top, total, acc = lax.fori_loop(
            tiling.first[i], i + 1, key_block, (nothing + MASKED, nothing, acc)
        )
        out = (acc / total[..., None].astype(acc.dtype)).astype(v.dtype)
        return None, (out, top + jnp.log(total))

    _, (out, lse) = lax.scan(query_block, None, jnp.arange(tiling.blocks))
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, -1)[:, :, :length]
    return join_heads(out, length), lse


def backward(
    options: Any,
    inputs: Any,
    out: Float[Array, "batch length heads value_dim"],
    log_sum_exp: Float[Array, "batch heads length"],
    d_out: Float[Array, "batch length heads value_dim"],
) -> tuple[Array, Array, Array, Array | None]:
    length = inputs.query.shape[1]
    tiling = _tile(options, inputs)
    q, k, v, o, g = (
        cut_heads(x, tiling) for x in (inputs.query, inputs.key, inputs.value, out, d_out)
    )
    stat = log_sum_exp.dtype
    delta = (o.astype(stat) * g.astype(stat)).sum(-1)
    lse = cut_heads(jnp.swapaxes(log_sum_exp, 1, 2)[..., None], tiling)[..., 0]
    bias = _bias(inputs, tiling, stat)

    def key_block(carry: Any, j: Array) -> Any:
        k_j, v_j = at(k, j), at(v, j)

        def query_block(i: Array, carry: Any) -> Any:
            d_query, d_bias, d_k, d_v = carry
            q_i, g_i = at(q, i), at(g, i)
            logits = _logits(options, tiling, bias, q_i, k_j, i, j)
            weights = jnp.exp(logits - at(lse, i)[..., None])
            d_weights = dot("bhie,bhje->bhij", g_i, v_j).astype(stat)
            dropped = weights
            if options.dropout_rate:
                factor = _dropout_factor(options, inputs, tiling, i, j, stat)
                dropped, d_weights = weights * factor, d_weights * factor
            d_logits = weights * (d_weights - at(delta, i)[..., None])
            if d_bias is not None:
                d_tile = _distance.sum_to_groups(d_logits, d_bias.shape[0])
                d_bias = _distance.add_tile_gradient(d_bias, d_tile, i - j)
            d_logits = d_logits.astype(q.dtype)
            d_query = add_at(d_query, i, dot("bhij,bhjd->bhid", d_logits, k_j))
            d_k = d_k + dot("bhij,bhid->bhjd", d_logits, q_i)
            d_v = d_v + dot("bhij,bhie->bhje", dropped.astype(v.dtype), g_i)
            return d_query, d_bias, d_k, d_v

        start = (
            *carry,
            zeros(k_j.shape, stat, q),
            zeros(v_j.shape, statistics_dtype(v.dtype), q),
        )
        *carry, d_k, d_v = lax.fori_loop(j, tiling.last[j] + 1, query_block, start)
        return tuple(carry), ((d_k * options.scale).astype(k.dtype), d_v.astype(v.dtype))

    first = (zeros(q.shape, stat, q), None if bias is None else zeros(bias.shape, stat, q))
    (dq, db), (dk, dv) = lax.scan(key_block, first, jnp.arange(tiling.blocks))
    dq = (dq * options.scale).astype(q.dtype)
    if db is not None:
        db = _distance.lag_values_gradient(db, length).astype(inputs.distance_bias.dtype)
    return join_heads(dq, length), join_heads(dk, length), join_heads(dv, length), db
