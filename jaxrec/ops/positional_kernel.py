"""Positional kernel attention: causal attention over keys and values mixed along the sequence."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops._checks import (
    check_dropout,
    check_float,
    check_int_rows,
    check_qkv,
    check_scale,
    check_valid,
    statistics_dtype,
)
from jaxrec.ops._dispatch import choose
from jaxrec.ops.attention import causal_attention

Structure = Literal["identity", "toeplitz", "full"]
_STRUCTURES = ("identity", "toeplitz", "full")
_NO_KERNEL = "there is no Pallas kernel for this op yet"


def _resolve(
    op: str, name: str, kernel: Array | None, structure: str | None, length: int, heads: int
) -> str:
    if structure is not None and structure not in _STRUCTURES:
        raise ValueError(f"{op}: structure must be one of {_STRUCTURES} or None, got {structure!r}")
    if kernel is None:
        return "identity"
    check_float(op, name, kernel)
    shape = kernel.shape
    taps = kernel.ndim == 1 or (kernel.ndim == 2 and shape[0] == heads)
    full = kernel.ndim in (2, 3) and shape[-1] == shape[-2]
    if kernel.ndim == 3:
        full = full and shape[0] == heads
    if structure is None:
        if taps and full:
            raise ValueError(
                f"{op}: {name} of shape {shape} can be taps [heads, w] or a full factor [n, n]; "
                "give structure='toeplitz' or 'full'"
            )
        structure = "toeplitz" if taps else "full"
    ok = {"identity": False, "toeplitz": taps, "full": full}[structure]
    if not ok or shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} of shape {shape} does not fit structure={structure!r} with "
            f"{heads} heads: taps are [w] or [heads, w], a full factor is [n, n] or [heads, n, n], "
            "the identity is None"
        )
    return structure


def _operator(
    kernel: Array, structure: str, length: int, *, upper: bool
) -> Float[Array, "... length length"]:
    """Lower-triangular [n, n] (or [heads, n, n]) matrix that mixes along the sequence."""
    index = jnp.arange(length)
    lag = index[:, None] - index[None, :]
    if structure == "toeplitz":
        width = kernel.shape[-1]
        inside = (lag >= 0) & (lag < width)
        taken = jnp.take(kernel, jnp.clip(lag, 0, width - 1), axis=-1)
        return jnp.where(inside, taken, jnp.zeros((), kernel.dtype))
    if upper:
        kernel = jnp.swapaxes(kernel, -1, -2)
    return jnp.where(lag >= 0, kernel[..., :length, :length], jnp.zeros((), kernel.dtype))


def positional_mix(
    kernel: Float[Array, "..."] | None,
    x: Float[Array, "batch length heads head_dim"],
    *,
    structure: Structure | None = None,
    upper: bool = False,
    valid: Bool[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    positions: Int[Array, "batch length"] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Causal mix along the sequence: `out[j] = sum_{k <= j} T[j, k] x[k]`."""
    op = "positional_mix"
    batch, length, heads, _ = x.shape
    structure_ = _resolve(op, "kernel", kernel, structure, length, heads)
    if valid is not None:
        x = jnp.where(valid[:, :, None, None], x, jnp.zeros((), x.dtype))
    if kernel is None or structure_ == "identity":
        return x
    stat = statistics_dtype(x.dtype)
    per_head = kernel.ndim == (2 if structure_ == "toeplitz" else 3)
    size = kernel.shape[-1]
    if structure_ == "full" and size < length and positions is None:
        raise ValueError(
            f"{op}: a full factor of size {size} is shorter than the sequence ({length})"
        )
    same = None
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
    if structure_ == "full" and (positions is not None or segment_ids is not None):
        if positions is None:
            assert same is not None
            live = same if valid is None else same & valid[:, None, :]
            index = jnp.arange(length, dtype=jnp.int32)
            first = jnp.min(jnp.where(live, index[None, None, :], length), axis=2)
            positions = jnp.maximum(index[None, :] - first, 0)
        table = jnp.swapaxes(kernel, -1, -2) if upper else kernel
        table = jnp.tril(table)
        causal = jnp.tril(jnp.ones((length, length), bool))
        inside = (positions >= 0) & (positions < size)
        ok = causal[None] & inside[:, :, None] & inside[:, None, :]
        pos = jnp.clip(positions, 0, size - 1)
        matrix = table[..., pos[:, :, None], pos[:, None, :]]  # [(heads,) batch, n, n]
        matrix = jnp.where(ok if same is None else ok & same, matrix, jnp.zeros((), kernel.dtype))
        subscripts = "hbjk,bkhe->bjhe" if per_head else "bjk,bkhe->bjhe"
    else:
        matrix = _operator(kernel, structure_, length, upper=upper)
        subscripts = "hjk,bkhe->bjhe" if per_head else "jk,bkhe->bjhe"
        if same is not None:
            matrix = jnp.where(same, jnp.expand_dims(matrix, -3), jnp.zeros((), kernel.dtype))
            subscripts = "hbjk,bkhe->bjhe" if per_head else "bjk,bkhe->bjhe"
    return jnp.einsum(subscripts, matrix.astype(stat), x.astype(stat)).astype(x.dtype)


def positional_kernel_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads value_dim"],
    logit_kernel: Float[Array, "..."] | None,
    value_kernel: Float[Array, "..."] | None,
    *,
    structure: Structure | tuple[Structure | None, Structure | None] | None = None,
    tie: bool = False,
    valid: Bool[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    positions: Int[Array, "batch length"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: str | None = None,
) -> Float[Array, "batch length heads value_dim"]:
    """Causal attention whose logits and values are mixed along the sequence."""
    op = "positional_kernel_attention"
    check_qkv(op, query, key, value)
    check_valid(op, valid, query.shape[:2])
    check_int_rows(op, "segment_ids", segment_ids, query.shape[:2])
    check_int_rows(op, "positions", positions, query.shape[:2])
    scale = check_scale(op, scale, query.shape[3])
    rate = check_dropout(op, dropout_rate, dropout_key)
    choose(op, implementation, _NO_KERNEL)
    first, second = structure if isinstance(structure, tuple) else (structure, structure)
    if tie and value_kernel is not None:
        raise ValueError(f"{op}: tie=True uses logit_kernel for the values: give value_kernel=None")
    key = positional_mix(
        logit_kernel,
        key,
        structure=first,
        upper=True,
        valid=valid,
        segment_ids=segment_ids,
        positions=positions,
    )
    value = positional_mix(
        logit_kernel if tie else value_kernel,
        value,
        structure=first if tie else second,
        upper=tie,
        valid=valid,
        segment_ids=segment_ids,
        positions=positions,
    )
    return causal_attention(
        query,
        key,
        value,
        valid=valid,
        segment_ids=segment_ids,
        scale=scale,
        dropout_rate=rate,
        dropout_key=dropout_key,
    )


def init_positional_kernel(
    structure: Structure,
    length: int,
    *,
    band: int | None = None,
    heads: int | None = None,
    init: Literal["identity", "powerlaw"] = "identity",
    power: float = 1.0,
    dtype: Any = jnp.float32,
) -> Array | None:
    """Starting value of one factor: taps, a full factor, or `None` for the identity."""
    width = length if band is None else band
    lag = jnp.arange(width)
    if structure == "identity":
        return None
    if init == "identity":
        taps = (lag == 0).astype(dtype)
    else:
        taps = (lag + 1).astype(jnp.float32) ** -jnp.float32(power)
        taps = jnp.where(taps < 1e-6, jnp.float32(0), taps).astype(dtype)
    kernel = taps if structure == "toeplitz" else _operator(taps, "toeplitz", length, upper=False)
    return kernel if heads is None else jnp.tile(kernel[None], (heads,) + (1,) * kernel.ndim)
