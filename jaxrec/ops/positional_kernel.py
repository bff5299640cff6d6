"""Positional kernel attention: causal attention over keys and values mixed along the sequence."""

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _attention_factors as _factors
from jaxrec.ops import _attention_mix_tables as _tables
from jaxrec.ops import _positional_kernel_core as _core
from jaxrec.ops._attention_dropout import dropout_seeds
from jaxrec.ops._attention_factors import Factor, Structure, Structures
from jaxrec.ops._attention_positions import segment_positions
from jaxrec.ops._checks import (
    check_dropout,
    check_float,
    check_int_rows,
    check_qkv,
    check_rank,
    check_scale,
    check_valid,
)
from jaxrec.ops._dispatch import Implementation, choose
from jaxrec.ops._manual_axes import not_manual
from jaxrec.ops._masking import clean
from jaxrec_kernels.positional_kernel_attention import slower, supports

_NO_KERNEL = "the kernel mixes within an attention only"
# Power-law taps below this are cut off.
_LEAST_TAP = 1e-6


def positional_kernel_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads value_dim"],
    logit_kernel: Float[Array, "..."] | None,
    value_kernel: Float[Array, "..."] | None,
    *,
    structure: Structures = None,
    tie: bool = False,
    valid: Bool[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    positions: Int[Array, "batch length"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch length heads value_dim"]:
    """Causal softmax attention with a learned kernel over positions in the logits and the values.

    `O = softmax(Q K^T scale U + M) (L V)` a head, with `U` upper triangular (`logit_kernel`), `L`
    lower triangular (`value_kernel`) and `M` the causal mask. It is computed in the folded form

    `K' = U^T K`,  `V' = L V`,  `O = causal_attention(Q, K', V')`,

    since `S U = Q (U^T K)^T scale`: keys and values become learned causal mixtures of the events
    before them, and `S U` is never formed. A Toeplitz factor has taps, `U[k, j] = u[j - k]` and
    `L[j, k] = l[j - k]` for `0 <= j - k < width`, which makes the mix a causal convolution and
    the result independent of where a sequence stands in its row. With both kernels `None` this is
    `causal_attention`.

    Args:
      query, key: `[batch, length, heads, head_dim]`, float32 or bfloat16.
      value: `[batch, length, heads, value_dim]`, float32 or bfloat16.
      logit_kernel: `U`. `None` is the identity; `[width]` or `[heads, width]` are taps;
        `[size, size]` or `[heads, size, size]` is a full factor, whose entries below the diagonal
        are ignored and get a zero gradient. Taps beyond the width are zero.
      value_kernel: `L`, likewise; the entries above the diagonal are ignored.
      structure: `"identity"`, `"toeplitz"` or `"full"`, or a pair for `(logits, values)`; `None`
        tells it from the shapes. It must be given for a rank-2 array that could be both
        (`[heads, width]` with `heads == width`).
      tie: `L = U^T`; `value_kernel` is `None`.
      valid: `bool[batch, length]`. Invalid slots are read by nobody, whatever they hold, NaN
        included, and give zeros.
      segment_ids: `int[batch, length]`: several sequences in one row. Neither the mix nor the
        attention crosses from one id to another.
      positions: `int[batch, length]`, where each slot stands in a full factor; Toeplitz factors
        do not read it. `None`: the slot's index in the row, or with `segment_ids` its distance
        from the first valid slot of its segment (`segment_positions`). Positions outside the
        factor see a zero kernel. Positions that count from the newest event move all others with
        every new event: such a model can be evaluated, but has no exact decode step.
      scale: factor of the logits; `None` is `1 / sqrt(head_dim)`.
      dropout_rate: probability in [0, 1) that an attention weight is dropped. Kernels are not.
      dropout_key: JAX random key, needed when the rate is positive (`causal_attention`).
      implementation: `"xla"`, `"pallas"`, or `None` for the best that runs.

    Returns:
      `[batch, length, heads, value_dim]` in the dtype of `value`. The mix accumulates in float32.

    Raises:
      ValueError: wrong ranks, shapes or dtypes; a kernel that fits no structure, or two; a full
        factor shorter than the sequence and no positions; dropout without a key; a forced
        implementation that cannot run.

    Cost: attention `4 n^2 d` FLOPs a head and sequence, halved by causality, and as much again for
    each factor (`2 n w d` for a band of `w`). Memory beside the attention's: two mixed arrays of
    the input's size; for short packed rows also one `[batch, n, n]` masked operator a factor; no
    `[n, n]` beyond a full factor's own size from length 1024 on. Reverse mode only.

    Source: Nabiev and Frolov, "Position-Aware Sequential Attention for Accurate Next Item
    Recommendations", arXiv 2602.21052. The paper's equation was not at hand; this is the reading
    that is causal, uses both factors in the order named there, and gives one kernel `C = U L`
    without the softmax.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 1, 4))
      >>> taps = jnp.array([1.0, 0.5])  # an event and, half as much, the one before it
      >>> positional_kernel_attention(x, x, x, taps, taps).shape
      (2, 5, 1, 4)
    """
    op = "positional_kernel_attention"
    query, key, value = check_qkv(op, query, key, value)
    valid = check_valid(op, valid, query.shape[:2])
    segment_ids = check_int_rows(op, "segment_ids", segment_ids, query.shape[:2])
    positions = check_int_rows(op, "positions", positions, query.shape[:2])
    scale = check_scale(op, scale, query.shape[3])
    check_dropout(op, dropout_rate, dropout_key)
    logits, values = _factors.factors(
        op, logit_kernel, value_kernel, structure, tie, heads=query.shape[2]
    )
    for name, factor in (("logit_kernel", logits), ("value_kernel", values)):
        if positions is None:
            _factors.check_reach(op, name, factor, query.shape[1])
    unsupported = _unsupported(query, value, logits, values, segment_ids, positions)
    kernels = logits.kernel, values.kernel
    look_up = partial(_core.look_up, query, kernels)
    choice = choose(op, implementation, unsupported, slower=slower(query), blocks=look_up)
    if positions is None and segment_ids is not None:
        positions = segment_positions(segment_ids, valid=valid)
    inputs = _core.Inputs(
        query,
        key,
        value,
        logits.kernel,
        values.kernel,
        valid,
        segment_ids,
        positions,
        dropout_seeds(dropout_key) if dropout_rate else None,
    )
    options = _core.Options(
        scale,
        float(dropout_rate),
        (logits.structure, values.structure),
        (logits.upper, values.upper),
        kernel=choice.implementation == "pallas",
    )
    return _core.attend(options, inputs)


def _unsupported(
    query: Array,
    value: Array,
    logits: Factor,
    values: Factor,
    segment_ids: Array | None,
    positions: Array | None,
) -> str | None:
    """Why the Pallas kernel cannot take a call; None if it can."""
    full = "full" in (logits.structure, values.structure)
    if full and (positions is not None or segment_ids is not None):
        return "the kernel reads a full factor at the slots of a row, not at given positions"
    return supports(query, value) or not_manual()


def positional_mix(
    kernel: Float[Array, "..."] | None,
    x: Float[Array, "batch length heads width"],
    *,
    structure: Structure | None = None,
    upper: bool = False,
    valid: Bool[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    positions: Int[Array, "batch length"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch length heads width"]:
    """Causal linear mix along the sequence, the building block of positional kernel attention.

    `out[j] = sum_{k <= j} T[j, k] x[k]`, with `T[j, k] = taps[j - k]`, or `T = tril(L)`, or with
    `upper` `T = triu(U)^T`. Other places of a kernel (on the output of an attention, on queries)
    are one call of this.

    Args:
      kernel: `None` for the identity, taps `[width]` or `[heads, width]`, or a full factor
        `[size, size]` or `[heads, size, size]`.
      x: `[batch, length, heads, width]`, float32 or bfloat16.
      structure: as in `positional_kernel_attention`.
      upper: a full `kernel` is upper triangular and is applied transposed.
      valid, segment_ids, positions: as in `positional_kernel_attention`.
      implementation: `"xla"`, `"pallas"`, or `None` for the best that runs.

    Returns:
      The shape and dtype of `x`, accumulated in float32; zeros in invalid slots.

    Raises:
      ValueError: as `positional_kernel_attention`.

    Cost: `2 n^2 d` FLOPs a head and sequence, halved by causality; `2 n w d` for a band of `w`.

    Source: as `positional_kernel_attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.arange(1.0, 5.0)[None, :, None, None]
      >>> positional_mix(jnp.array([1.0, -1.0]), x)[0, :, 0, 0].tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    op, x = "positional_mix", jnp.asarray(x)
    check_rank(op, "x", x, 4, "batch, length, heads, width")
    check_float(op, "x", x)
    valid = check_valid(op, valid, x.shape[:2])
    segment_ids = check_int_rows(op, "segment_ids", segment_ids, x.shape[:2])
    positions = check_int_rows(op, "positions", positions, x.shape[:2])
    factor = _factors.factor(op, "kernel", kernel, structure, x.shape[2], upper=upper)
    if positions is None:
        _factors.check_reach(op, "kernel", factor, x.shape[1])
    choose(op, implementation, _NO_KERNEL)
    if factor.kernel is None:
        return clean(x, valid)
    if positions is None and segment_ids is not None:
        positions = segment_positions(segment_ids, valid=valid)
    return _factors.apply(factor, x, valid, segment_ids, positions)


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
    """Starting value of one factor of a positional kernel.

    `identity`: taps `(1, 0, ..., 0)` or the identity matrix, so that training starts from plain
    causal attention. `powerlaw`: taps `(t + 1)^-power`, zero where below 1e-6.

    Args:
      structure: `"identity"` (no parameters), `"toeplitz"` (taps) or `"full"` (a matrix).
      length: the longest sequence: size of a full factor, and default width of the taps.
      band: number of taps, at most `length`; a full factor starts as the matrix of that band.
      heads: one kernel a head; `None`: one kernel shared by all.
      init: which start.
      power: exponent of the power law.
      dtype: of the parameters; keep float32.

    Returns:
      `None`, taps `[band]` or `[heads, band]`, or a factor `[length, length]` or
      `[heads, length, length]`. A full power-law factor is filled symmetrically, so that the
      same array serves as `U` and as `L`, which read one triangle each.

    Raises:
      ValueError: an unknown structure or start, or sizes that are not positive.

    Source: the power law and its cut are those of the position weights in GA-SATF and LA-SATF
    (Frolov and Oseledets, IEEE Access 2023).

    Example:
      >>> init_positional_kernel("toeplitz", 4).tolist()
      [1.0, 0.0, 0.0, 0.0]
      >>> init_positional_kernel("full", 2, init="powerlaw").tolist()
      [[1.0, 0.5], [0.5, 1.0]]
    """
    op = "init_positional_kernel"
    if structure not in _factors.STRUCTURES:
        raise ValueError(f"{op}: structure must be one of {_factors.STRUCTURES}, got {structure!r}")
    if init not in ("identity", "powerlaw"):
        raise ValueError(f"{op}: init must be 'identity' or 'powerlaw', got {init!r}")
    width = length if band is None else band
    if length < 1 or not 1 <= width <= length or (heads is not None and heads < 1):
        raise ValueError(
            f"{op}: wants length >= 1, 1 <= band <= length and heads >= 1, "
            f"got length={length}, band={band}, heads={heads}"
        )
    if structure == "identity":
        return None
    lag = jnp.arange(width)
    if init == "identity":
        taps = (lag == 0).astype(jnp.float32)
    else:
        taps = (lag + 1).astype(jnp.float32) ** -jnp.float32(power)
        taps = jnp.where(taps < _LEAST_TAP, jnp.float32(0), taps)
    kernel = taps
    if structure == "full":
        both = jnp.pad(taps, (0, length - width))
        kernel = _tables.toeplitz(jnp.concatenate([both[:0:-1], both]))
    kernel = kernel.astype(dtype)
    return kernel if heads is None else jnp.tile(kernel, (heads,) + (1,) * kernel.ndim)
