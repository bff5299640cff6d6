"""Argument checks that the ops share; all of them run while tracing.

Those of arrays give them back as JAX's, so that lists and NumPy's arrays do.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

_FLOATS = ("bfloat16", "float16", "float32", "float64")


def as_arrays(*given: ArrayLike | None) -> tuple[Any, ...]:
    return tuple(None if x is None else jnp.asarray(x) for x in given)


def check_rank(op: str, name: str, x: Any, rank: int, layout: str) -> None:
    if jnp.ndim(x) != rank:
        raise ValueError(f"{op}: {name} must be [{layout}], got shape {jnp.shape(x)}")


def check_float(op: str, name: str, x: Array) -> None:
    if x.dtype.name not in _FLOATS:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16, got {x.dtype.name}")


def check_qkv(
    op: str, query: ArrayLike, key: ArrayLike, value: ArrayLike
) -> tuple[Array, Array, Array]:
    query, key, value = map(jnp.asarray, (query, key, value))
    layout = "batch, length, heads, head_dim"
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_rank(op, name, x, 4, layout)
        check_float(op, name, x)
    if query.shape != key.shape:
        raise ValueError(
            f"{op}: query and key must have the same shape, got {query.shape} and {key.shape}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{op}: value must agree with key in [batch, length, heads], "
            f"got {value.shape} and {key.shape}"
        )
    if query.dtype != key.dtype:
        raise ValueError(
            f"{op}: query and key must have the same dtype, "
            f"got {query.dtype.name} and {key.dtype.name}"
        )
    if query.shape[3] == 0:
        raise ValueError(f"{op}: head_dim must be positive, got shape {query.shape}")
    return query, key, value


def check_valid(
    op: str, valid: ArrayLike | None, batch_length: tuple[int, ...], name: str = "valid"
) -> Array | None:
    if valid is None:
        return None
    valid = jnp.asarray(valid)
    if valid.shape != batch_length:
        raise ValueError(
            f"{op}: {name} must be [batch, length] = {list(batch_length)}, got shape {valid.shape}"
        )
    if valid.dtype != jnp.bool_:
        raise ValueError(f"{op}: {name} must be bool, got {valid.dtype.name}")
    return valid


def check_int_rows(
    op: str, name: str, x: ArrayLike | None, batch_length: tuple[int, ...]
) -> Array | None:
    """In at least 32 bits, so that a bound that it is compared with fits."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != batch_length:
        raise ValueError(
            f"{op}: {name} must be [batch, length] = {list(batch_length)}, got shape {x.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{op}: {name} must be integer, got {x.dtype.name}")
    return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x


def check_times(
    op: str, name: str, x: ArrayLike | None, batch_length: tuple[int, ...]
) -> Array | None:
    x = check_int_rows(op, name, x, batch_length)
    if x is not None and jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        raise ValueError(
            f"{op}: {name} must be signed, got {x.dtype.name}; subtract a start and cast to int32"
        )
    return x


def check_distance_bias(op: str, bias: Array | None, heads: int, length: int) -> Array | None:
    """The bias with an axis for heads: one for all, or one a head."""
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if bias.shape not in ((length,), (heads, length)):
        raise ValueError(
            f"{op}: distance_bias must be [length] = [{length}] or [heads, length] = "
            f"[{heads}, {length}], got shape {bias.shape}"
        )
    check_float(op, "distance_bias", bias)
    return bias[None] if bias.ndim == 1 else bias


def check_scale(op: str, scale: float | None, head_dim: int) -> float:
    if scale is None and head_dim == 0:
        raise ValueError(f"{op}: head_dim must be positive")
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be a finite Python number or None, got {scale!r}")
    return float(scale)


def check_dropout(op: str, rate: float, key: Array | None) -> float:
    if not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
        raise ValueError(f"{op}: dropout_rate must be a Python number in [0, 1), got {rate!r}")
    if rate > 0.0 and key is None:
        raise ValueError(f"{op}: dropout_rate={rate} needs a dropout_key")
    return float(rate)


def statistics_dtype(dtype: Any) -> Any:
    """float32, or float64 where the data are float64 already."""
    return jnp.float64 if jnp.dtype(dtype).itemsize > 4 else jnp.float32
