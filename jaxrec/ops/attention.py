"""Causal softmax attention over packed or padded sequences."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _attention_dropout as _dropout
from jaxrec.ops._checks import (
    check_dropout,
    check_int_rows,
    check_qkv,
    check_scale,
    check_valid,
    statistics_dtype,
)
from jaxrec.ops._dispatch import choose

_NO_KERNEL = "there is no Pallas kernel for this op yet"


def causal_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads value_dim"],
    *,
    valid: Bool[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: str | None = None,
) -> Float[Array, "batch length heads value_dim"]:
    """Softmax attention of each event over itself and the events before it."""
    op = "causal_attention"
    check_qkv(op, query, key, value)
    check_valid(op, valid, query.shape[:2])
    check_int_rows(op, "segment_ids", segment_ids, query.shape[:2])
    scale = check_scale(op, scale, query.shape[3])
    rate = check_dropout(op, dropout_rate, dropout_key)
    choose(op, implementation, _NO_KERNEL)

    batch, length, heads, _ = query.shape
    stat = statistics_dtype(query.dtype)
    if valid is not None:
        query, key, value = (
            jnp.where(valid[:, :, None, None], x, jnp.zeros((), x.dtype))
            for x in (query, key, value)
        )
    index = jnp.arange(length)
    mask = (index[None, :] <= index[:, None])[None]
    if valid is not None:
        mask = mask & valid[:, None, :] & valid[:, :, None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    logits = jnp.einsum("bihd,bjhd->bhij", query, key, preferred_element_type=stat)
    logits = jnp.where(mask[:, None], logits * jnp.asarray(scale, stat), -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, jnp.zeros((), stat)))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, jnp.ones((), stat))
    if rate > 0.0:
        keep = _dropout.keep_mask(
            _dropout.dropout_seeds(dropout_key),
            rate,
            batch=batch,
            heads=heads,
            length=length,
            rows=index,
            cols=index,
        )
        weights = jnp.where(keep, weights / jnp.asarray(1.0 - rate, stat), jnp.zeros((), stat))
    out = jnp.einsum(
        "bhij,bjhe->bihe",
        weights.astype(value.dtype),
        value,
        preferred_element_type=statistics_dtype(value.dtype),
    )
    return out.astype(value.dtype)
