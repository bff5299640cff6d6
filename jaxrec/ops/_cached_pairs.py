"""New events against a cache of earlier ones: products, who sees whom, and how far apart.

The keys of a new event are the cache's slots and then its own side: all new events, of which it
sees those before it, or, where new events are independent candidates, itself alone.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops._attention_dense import dot
from jaxrec.ops._checks import check_float, check_rank, check_valid
from jaxrec.ops._masking import clean

Mode = Literal["causal", "independent"]
MODES = ("causal", "independent")


class New(NamedTuple):
    """New events and the cache, checked; what may not be read is zero."""

    query: Float[Array, "batch new heads head_dim"]
    key: Float[Array, "batch slots heads head_dim"]
    value: Float[Array, "batch slots heads value_dim"]
    own_key: Float[Array, "batch new heads head_dim"]
    own_value: Float[Array, "batch new heads value_dim"]
    filled: Bool[Array, "batch slots"]
    length: Int[Array, " batch"]
    valid: Bool[Array, "batch new"]
    causal: bool


def prepare(
    op: str,
    query: Array,
    key: Array,
    value: Array,
    own_key: Array,
    own_value: Array,
    length: Array,
    mode: str,
    own_valid: Array | None,
) -> New:
    query, key, value, own_key, own_value = map(
        jnp.asarray, (query, key, value, own_key, own_value)
    )
    named = {"query": query, "key": key, "value": value, "own_key": own_key, "own_value": own_value}
    for name, x in named.items():
        check_rank(op, name, x, 4, "batch, length, heads, head_dim")
        check_float(op, name, x)
    batch, slots, heads, head_dim = key.shape
    new, value_dim = query.shape[1], value.shape[3]
    for name, x, shape in (
        ("query", query, (batch, new, heads, head_dim)),
        ("value", value, (batch, slots, heads, value_dim)),
        ("own_key", own_key, (batch, new, heads, head_dim)),
        ("own_value", own_value, (batch, new, heads, value_dim)),
    ):
        if x.shape != shape:
            raise ValueError(
                f"{op}: {name} must be {shape} beside key {key.shape}, got shape {x.shape}"
            )
    for name, x, like in (
        ("query", query, key),
        ("own_key", own_key, key),
        ("own_value", own_value, value),
    ):
        if x.dtype != like.dtype:
            raise ValueError(
                f"{op}: {name} must have the cache's dtype {like.dtype.name}, got {x.dtype.name}"
            )
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be 'causal' or 'independent', got {mode!r}")
    length = jnp.asarray(length)
    if length.shape != (batch,) or not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(
            f"{op}: length must be int[batch] = [{batch}], "
            f"got {length.dtype.name}{list(length.shape)}"
        )
    own_valid = check_valid(op, own_valid, (batch, new), "own_valid")
    if own_valid is None:
        own_valid = jnp.ones((batch, new), jnp.bool_)
    length = length.astype(jnp.int32)
    filled = jnp.arange(slots, dtype=jnp.int32)[None] < length[:, None]
    return New(
        clean(query, own_valid),
        clean(key, filled),
        clean(value, filled),
        clean(own_key, own_valid),
        clean(own_value, own_valid),
        filled,
        length,
        own_valid,
        mode == "causal",
    )


def products(x: New) -> Float[Array, "batch heads new keys"]:
    cache = dot("bmhd,bshd->bhms", x.query, x.key)
    if x.causal:
        own = dot("bmhd,bkhd->bhmk", x.query, x.own_key)
    else:
        own = dot("bmhd,bmhd->bhm", x.query, x.own_key)[..., None]
    return jnp.concatenate([cache, own], axis=-1)


def mix(x: New, weights: Float[Array, "batch heads new keys"]) -> Any:
    """Sum of the values, in statistics precision; zero for new events that are not there."""
    weights = weights.astype(x.value.dtype)
    slots = x.key.shape[1]
    cache, own = weights[..., :slots], weights[..., slots:]
    out = dot("bhms,bshe->bmhe", cache, x.value)
    if x.causal:
        out = out + dot("bhmk,bkhe->bmhe", own, x.own_value)
    else:
        out = out + dot("bhm,bmhe->bmhe", own[..., 0], x.own_value)
    return clean(out, x.valid)


def seen(x: New) -> Bool[Array, "batch new keys"]:
    batch, new = x.valid.shape
    cache = jnp.broadcast_to(x.filled[:, None, :], (batch, new, x.filled.shape[1]))
    if x.causal:
        own = jnp.tril(jnp.ones((new, new), jnp.bool_))[None] & x.valid[:, None, :]
    else:
        own = x.valid[:, :, None]
    return jnp.concatenate([cache, own], axis=-1) & x.valid[:, :, None]


def steps(x: New) -> Int[Array, "batch new keys"]:
    """How many slots a key lies before the query, were the new events appended to the cache."""
    new, slots = x.query.shape[1], x.key.shape[1]
    event = jnp.arange(new, dtype=jnp.int32)
    at = x.length[:, None] + (event[None] if x.causal else jnp.zeros_like(event)[None])
    cache = at[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None]
    own = event[:, None] - event[None, :] if x.causal else jnp.zeros((new, 1), jnp.int32)
    own = jnp.broadcast_to(own[None], (x.query.shape[0], *own.shape))
    return jnp.concatenate([cache, own], axis=-1)


def bias_at(
    bias: Float[Array, "groups length"], x: New, where: Bool[Array, "batch new keys"]
) -> Float[Array, "batch groups new keys"]:
    """`bias[steps]` where asked for; NaN for steps it does not reach, 0 elsewhere."""
    distance = jnp.where(where, steps(x), 0)
    # A negative index would count from the end.
    distance = jnp.where(distance < 0, bias.shape[1], distance)
    found = jnp.take(bias, distance, axis=1, mode="fill", fill_value=jnp.nan)
    found = jnp.moveaxis(found, 0, 1)
    return jnp.where(where[:, None], found, jnp.zeros((), found.dtype))
