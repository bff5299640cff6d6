"""The ops as one would write them down: every `[n, n]` or `[positions, items]` array is formed.

They do the same work as the ops of `benchmarks.cases` on the same arguments: several sequences
in a row, padding where the id is 0.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.cases import Case
from jaxrec_kernels.shapes import CatalogueShape


def naive(case: Case) -> Callable[..., Array]:
    """The dense form of the case's op, of the same arguments."""
    return _FORMS[case.op]


def dense_bytes(case: Case) -> int:
    """Bytes of the one large array that the dense form cannot do without, in float32."""
    size = case.size
    if isinstance(size, CatalogueShape):
        return 4 * size.positions * size.items
    return 4 * size.batch * size.heads * size.length**2


def causal_attention(query: Array, key: Array, value: Array, ids: Array) -> Array:
    logits = _products(query, key) / math.sqrt(query.shape[-1])
    seen = _seen(ids)[:, None]
    # A row of padding sees nothing and must not become NaN.
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1) * seen.astype(jnp.float32)
    return _weighted(weights, value)


def positional_kernel_attention(
    query: Array, key: Array, value: Array, logits: Array, values: Array, ids: Array
) -> Array:
    seen = _seen(ids)

    def mix(taps: Array, x: Array) -> Array:
        lags = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])[None]
        factor = jnp.where(seen, taps[jnp.maximum(lags, 0)][None], 0.0)
        mixed = jnp.einsum("bjk,bkhd->bjhd", factor, x.astype(jnp.float32))
        return mixed.astype(x.dtype)

    return causal_attention(query, mix(logits, key), mix(values, value), ids)


def hstu_attention(
    query: Array, key: Array, value: Array, places: Array, times: Array, seconds: Array, ids: Array
) -> Array:
    length = query.shape[1]
    last = (places.shape[0] - 1) // 2
    lags = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    # The prediction is for the time of the next event of the same sequence.
    later = jnp.concatenate([seconds[:, 1:], seconds[:, -1:]], axis=1)
    follows = jnp.concatenate([ids[:, 1:] == ids[:, :-1], jnp.zeros_like(ids[:, :1], bool)], axis=1)
    asked = jnp.where(follows, later, seconds)
    apart = jnp.abs(asked[:, :, None] - seconds[:, None, :]).astype(jnp.float32)
    buckets = jnp.floor(jnp.log(jnp.maximum(apart, 1.0)) / 0.301).astype(jnp.int32)
    bias = places[last - lags][None] + times[jnp.minimum(buckets, times.shape[0] - 1)]
    weights = jax.nn.silu(_products(query, key) + bias[:, None]) / length
    return _weighted(jnp.where(_seen(ids)[:, None], weights, 0.0), value)


def linear_cross_entropy(hidden: Array, item_table: Array, labels: Array) -> Array:
    logits = jnp.matmul(hidden, item_table.T, preferred_element_type=jnp.float32)
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - target


def mean_linear_cross_entropy(hidden: Array, item_table: Array, labels: Array) -> Array:
    return linear_cross_entropy(hidden, item_table, labels).mean()


def _seen(ids: Array) -> Array:
    """bool[batch, length, length]: the event is valid, not later, and of the same sequence."""
    length = ids.shape[1]
    causal = jnp.tri(length, dtype=bool)[None]
    return causal & (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, None, :]


def _products(query: Array, key: Array) -> Array:
    return jnp.einsum("bihd,bjhd->bhij", query, key, preferred_element_type=jnp.float32)


def _weighted(weights: Array, value: Array) -> Array:
    out = jnp.einsum(
        "bhij,bjhd->bihd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return out.astype(value.dtype)


_FORMS: dict[str, Callable[..., Any]] = {
    "causal_attention": causal_attention,
    "positional_kernel_attention": positional_kernel_attention,
    "hstu_attention": hstu_attention,
    "linear_cross_entropy": linear_cross_entropy,
    "mean_linear_cross_entropy": mean_linear_cross_entropy,
}
