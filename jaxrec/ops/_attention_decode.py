"""Positional kernel attention one event at a time, with an explicit cache."""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _attention_factors as _factors
from jaxrec.ops import _positional_kernel_core as _core
from jaxrec.ops._attention_factors import Factor, Structures
from jaxrec.ops._attention_positions import segment_positions
from jaxrec.ops._checks import (
    as_arrays,
    check_float,
    check_qkv,
    check_scale,
    check_valid,
    statistics_dtype,
)
from jaxrec.ops._dispatch import Implementation, choose
from jaxrec.ops._manual_axes import not_manual
from jaxrec.ops._masking import MASKED, clean
from jaxrec.ops.attention import causal_attention
from jaxrec_kernels.positional_kernel_attention import slower, supports

_NO_KERNEL = "there is no Pallas kernel of this op yet"


class PositionalKernelState(NamedTuple):
    """What decoding keeps of each sequence: a pytree, for `jit`, `scan` and donation.

    Mixed keys and values of past events never change when an event is added, so they are appended
    to; of the raw ones only as many as a kernel is wide are kept, in a ring.
    """

    mixed_key: Float[Array, "batch capacity heads head_dim"]
    mixed_value: Float[Array, "batch capacity heads value_dim"]
    raw_key: Float[Array, "batch ring_k heads head_dim"]
    raw_value: Float[Array, "batch ring_v heads value_dim"]
    stored: Bool[Array, "batch capacity"]
    length: Int[Array, " batch"]

    @property
    def capacity(self) -> int:
        return self.mixed_key.shape[1]

    @property
    def overflowed(self) -> Bool[Array, " batch"]:
        """Sequences that got more events than fit; their outputs since then are NaN."""
        return self.length > self.capacity


def positional_kernel_prefill(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads value_dim"],
    logit_kernel: Float[Array, "..."] | None,
    value_kernel: Float[Array, "..."] | None,
    *,
    capacity: int,
    structure: Structures = None,
    tie: bool = False,
    valid: Bool[Array, "batch length"] | None = None,
    origin: Literal["oldest", "newest"] = "oldest",
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch length heads value_dim"], PositionalKernelState]:
    """`positional_kernel_attention` over a history, and the state that more events extend.

    One sequence a row, padded on either side. Later steps give what the same op would give on the
    longer sequence, exactly, until the sequence outgrows the window a model was trained on: a
    window that slides drops events whose share in later mixed keys and values stays in the cache.
    Prefill anew on the shortened window then.

    Args:
      query, key, value, logit_kernel, value_kernel, structure, tie, valid, scale: as in
        `positional_kernel_attention`. With both kernels `None` this caches plain attention.
      capacity: the most events a sequence can reach, at least `length`.
      origin: where positions in a full factor count from. Only `"oldest"` can be extended: from
        the newest, every new event would move all others.
      implementation: `"xla"`, `"pallas"`, or `None` for the best that runs.

    Returns:
      The outputs, those of `positional_kernel_attention` with
      `positions=segment_positions(valid=valid)`, and the state.

    Raises:
      ValueError: as `positional_kernel_attention`; a capacity below the length, or above the size
        of a full factor; a full factor with positions from the newest event.

    Cost: that of the op; the state holds `capacity (head_dim + value_dim)` numbers a head and
    sequence, and as many again for a full factor, or `width` instead of `capacity` for taps.

    Source: as `positional_kernel_attention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (1, 5, 1, 4))
      >>> taps = jnp.array([1.0, 0.5])
      >>> _, state = positional_kernel_prefill(
      ...     x[:, :4], x[:, :4], x[:, :4], taps, taps, capacity=8
      ... )
      >>> event = x[:, 4]
      >>> out, state = positional_kernel_step(state, event, event, event, taps, taps)
      >>> from jaxrec.ops import positional_kernel_attention
      >>> whole = positional_kernel_attention(x, x, x, taps, taps)
      >>> bool(jnp.allclose(out, whole[:, 4], atol=1e-6)), state.length.tolist()
      (True, [5])
    """
    op = "positional_kernel_prefill"
    query, key, value = check_qkv(op, query, key, value)
    valid = check_valid(op, valid, query.shape[:2])
    scale = check_scale(op, scale, query.shape[3])
    batch, length, heads, _ = query.shape
    if capacity < max(length, 1):
        raise ValueError(f"{op}: capacity must be at least the length {length}, got {capacity}")
    logits, values = _factors.factors(op, logit_kernel, value_kernel, structure, tie, heads)
    if origin not in ("oldest", "newest"):
        raise ValueError(f"{op}: origin must be 'oldest' or 'newest', got {origin!r}")
    for name, factor in (("logit_kernel", logits), ("value_kernel", values)):
        if factor.structure != "full":
            continue
        if origin == "newest":
            raise ValueError(
                f"{op}: {name} is a full factor, and positions that count from the newest event "
                "move with every new one: there is no exact step; use origin='oldest', or "
                "positional_kernel_attention on the whole sequence"
            )
        if factor.size < capacity:
            raise ValueError(
                f"{op}: {name} is a full factor of size {factor.size}; capacity must not exceed "
                f"it, got {capacity}"
            )
    # Of the attention; the mixes are XLA's.
    unsupported = supports(query, value) or not_manual()
    look_up = partial(_core.look_up, query, (None, None))
    choice = choose(op, implementation, unsupported, slower=slower(query), blocks=look_up)
    positions = None if valid is None else segment_positions(valid=valid)
    mixed_key = _factors.apply(logits, key, valid, None, positions)
    mixed_value = _factors.apply(values, value, valid, None, positions)
    options: dict[str, Any] = {"scale": scale, "implementation": choice.implementation}
    out = causal_attention(query, mixed_key, mixed_value, valid=valid, **options)

    if valid is None:
        valid = jnp.ones((batch, length), jnp.bool_)
    first, count = _span(valid)
    stored = _aligned(valid, first, capacity)
    state = PositionalKernelState(
        mixed_key=clean(_aligned(mixed_key, first, capacity), stored),
        mixed_value=clean(_aligned(mixed_value, first, capacity), stored),
        raw_key=_ring(clean(_aligned(key, first, capacity), stored), count, logits),
        raw_value=_ring(clean(_aligned(value, first, capacity), stored), count, values),
        stored=stored,
        length=count,
    )
    return out, state


def _span(valid: Bool[Array, "batch length"]) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """First valid slot of each row, and how many slots it is to the last one, inclusive."""
    length = valid.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    first = jnp.min(jnp.where(valid, index, length), axis=1, initial=length)
    last = jnp.max(jnp.where(valid, index, -1), axis=1, initial=-1)
    return first, jnp.maximum(last - first + 1, 0)


def _aligned(x: Array, first: Int[Array, " batch"], capacity: int) -> Array:
    """Rows moved so that slot `first` comes to stand at 0, zeros behind the end."""
    length = x.shape[1]
    # One slot more than the row has: what is read beyond the end is zero.
    padded = jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
    index = jnp.minimum(first[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None], length)
    return jnp.take_along_axis(padded, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _ring_size(factor: Factor, capacity: int) -> int:
    return {
        "identity": 0,
        "toeplitz": min(factor.size, capacity),
        "full": capacity,
    }[factor.structure]


def _ring(x: Array, count: Int[Array, " batch"], factor: Factor) -> Array:
    """The last events of aligned `x`: event t at slot `t mod size`."""
    size = _ring_size(factor, x.shape[1])
    if size == 0:
        return x[:, :0]
    slot = jnp.arange(size, dtype=jnp.int32)[None]
    newest = count[:, None] - 1
    event = newest - jnp.mod(newest - slot, size)
    taken = jnp.take_along_axis(x, jnp.maximum(event, 0)[:, :, None, None], axis=1)
    return clean(taken, event >= 0)


def positional_kernel_step(
    state: PositionalKernelState,
    query: Float[Array, "batch heads head_dim"],
    key: Float[Array, "batch heads head_dim"],
    value: Float[Array, "batch heads value_dim"],
    logit_kernel: Float[Array, "..."] | None,
    value_kernel: Float[Array, "..."] | None,
    *,
    structure: Structures = None,
    tie: bool = False,
    valid: Bool[Array, " batch"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch heads value_dim"], PositionalKernelState]:
    """Appends one event a sequence, and attends from it over the sequence so far.

    Args:
      state: from `positional_kernel_prefill` (of a length-0 history, to start from nothing) or
        from the step before, with the same kernels and structure.
      query, key: the event, `[batch, heads, head_dim]`.
      value: `[batch, heads, value_dim]`.
      logit_kernel, value_kernel, structure, tie, scale: as in the prefill.
      valid: `bool[batch]`; a sequence without an event this time keeps its state and gets zeros.
      implementation: `"xla"`, `"pallas"`, or `None` for the best that runs.

    Returns:
      `[batch, heads, value_dim]` in the dtype of `value`, and the new state. A sequence that is
      already full stores nothing more: its output is NaN and `state.overflowed` is true, since
      nothing can be raised from inside a compiled function.

    Raises:
      ValueError: shapes, dtypes or kernels that do not belong to the state.

    Cost: one read of the cache; `O(capacity)` a head and sequence.

    Source: as `positional_kernel_attention`.

    Example: see `positional_kernel_prefill`.
    """
    op = "positional_kernel_step"
    batch, capacity, heads, head_dim = state.mixed_key.shape
    wanted = {
        "query": (batch, heads, head_dim),
        "key": (batch, heads, head_dim),
        "value": (batch, heads, state.mixed_value.shape[3]),
    }
    query, key, value, valid = as_arrays(query, key, value, valid)
    for (name, shape), x in zip(wanted.items(), (query, key, value), strict=True):
        check_float(op, name, x)
        if x.shape != shape:
            raise ValueError(f"{op}: {name} must be {shape} as in the state, got {x.shape}")
    if key.dtype != state.mixed_key.dtype or value.dtype != state.mixed_value.dtype:
        raise ValueError(
            f"{op}: key and value must have the state's dtypes {state.mixed_key.dtype.name} and "
            f"{state.mixed_value.dtype.name}, got {key.dtype.name} and {value.dtype.name}"
        )
    if query.dtype != key.dtype:
        raise ValueError(
            f"{op}: query and key must have the same dtype, "
            f"got {query.dtype.name} and {key.dtype.name}"
        )
    if valid is None:
        valid = jnp.ones((batch,), jnp.bool_)
    if valid.shape != (batch,) or valid.dtype != jnp.bool_:
        raise ValueError(
            f"{op}: valid must be bool[{batch}], got {valid.dtype.name}{list(valid.shape)}"
        )
    scale = check_scale(op, scale, head_dim)
    logits, values = _factors.factors(op, logit_kernel, value_kernel, structure, tie, heads)
    for name, factor, raw in (
        ("logit_kernel", logits, state.raw_key),
        ("value_kernel", values, state.raw_value),
    ):
        size = _ring_size(factor, capacity)
        if raw.shape[1] != size or (factor.structure == "full" and factor.size < capacity):
            raise ValueError(
                f"{op}: {name} ({factor.structure}, size {factor.size}) is not the one the state "
                f"was made with: it keeps {raw.shape[1]} raw events, this kernel needs {size}"
            )
    choose(op, implementation, _NO_KERNEL)

    key, value, query = (
        jnp.where(valid[:, None, None], x, jnp.zeros((), x.dtype)) for x in (key, value, query)
    )
    event = state.length
    fits = valid & (event < capacity)
    raw_key, mixed_key = _mix_one(logits, state.raw_key, key, event, fits)
    raw_value, mixed_value = _mix_one(values, state.raw_value, value, event, fits)
    slot = jnp.where(fits, event, capacity)
    row = jnp.arange(batch)
    new = PositionalKernelState(
        mixed_key=state.mixed_key.at[row, slot].set(mixed_key, mode="drop"),
        mixed_value=state.mixed_value.at[row, slot].set(mixed_value, mode="drop"),
        raw_key=raw_key,
        raw_value=raw_value,
        stored=state.stored.at[row, slot].set(True, mode="drop"),
        length=event + valid.astype(event.dtype),
    )
    out = _attend_one(query, new, scale)
    out = jnp.where((valid & ~fits)[:, None, None], jnp.asarray(jnp.nan, out.dtype), out)
    return jnp.where(valid[:, None, None], out, jnp.zeros((), out.dtype)), new


def _mix_one(
    factor: Factor, ring: Array, x: Array, event: Int[Array, " batch"], fits: Bool[Array, " batch"]
) -> tuple[Array, Array]:
    """The ring with the event in it, and the event mixed with those before it."""
    if factor.kernel is None:
        return ring, x
    size = ring.shape[1]
    slot = jnp.where(fits, jnp.mod(event, size), size)
    ring = ring.at[jnp.arange(x.shape[0]), slot].set(x, mode="drop")
    stat = statistics_dtype(x.dtype)
    lag = jnp.mod(event[:, None] - jnp.arange(size, dtype=event.dtype)[None], size)
    kernel = factor.kernel.astype(stat)
    if factor.structure == "toeplitz":
        weights = jnp.take(kernel, lag, axis=1)  # [groups, batch, size]
    else:
        rows = jnp.swapaxes(kernel, 1, 2) if factor.upper else kernel
        at_event = jnp.minimum(event, factor.size - 1)
        weights = jnp.take(rows[:, :, :size], at_event, axis=1)
    weights = jnp.where((lag <= event[:, None])[None], weights, jnp.zeros((), stat))
    groups = kernel.shape[0]
    shape = (x.shape[0], size, groups, math.prod(x.shape[1:]) // groups)
    mixed = jnp.einsum("gbs,bsgc->bgc", weights, ring.astype(stat).reshape(shape))
    return ring, mixed.reshape(x.shape).astype(x.dtype)


def _attend_one(query: Array, state: PositionalKernelState, scale: float) -> Array:
    stat = statistics_dtype(query.dtype)
    logits = jnp.einsum(
        "bhd,bshd->bhs", query, state.mixed_key, preferred_element_type=stat
    ) * jnp.asarray(scale, stat)
    logits = jnp.where(state.stored[:, None], logits, jnp.asarray(MASKED, stat))
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    value = state.mixed_value
    out = jnp.einsum(
        "bhs,bshe->bhe",
        weights.astype(value.dtype),
        value,
        preferred_element_type=statistics_dtype(value.dtype),
    )
    return out.astype(value.dtype)
