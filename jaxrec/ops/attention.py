"""Causal softmax attention over packed or padded sequences."""

from functools import partial
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _positional_kernel_core as _mixing
from jaxrec.ops._attention_core import Inputs, Options, attend, block_for
from jaxrec.ops._attention_dropout import dropout_seeds
from jaxrec.ops._checks import (
    check_distance_bias,
    check_dropout,
    check_int_rows,
    check_qkv,
    check_scale,
    check_valid,
)
from jaxrec.ops._dispatch import Implementation, choose
from jaxrec.ops._manual_axes import not_manual
from jaxrec_kernels.positional_kernel_attention import slower, supports

_NO_BIAS = "the kernel has no bias by distance"


def causal_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads value_dim"],
    *,
    valid: Bool[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    distance_bias: Float[Array, "length"] | Float[Array, "heads length"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch length heads value_dim"]:
    """Softmax attention of each event over itself and the events before it.

    `out[i] = sum_j w[i, j] value[j] / sum_j w[i, j]` a head, with
    `w[i, j] = exp(scale <query[i], key[j]> + distance_bias[i - j])` for the `j <= i` that are valid
    and share the segment of `i`, and 0 for all others.

    Args:
      query, key: `[batch, length, heads, head_dim]`, float32 or bfloat16.
      value: `[batch, length, heads, value_dim]`, float32 or bfloat16.
      valid: `bool[batch, length]`, `False` for padding. Invalid slots are read by nobody, whatever
        they hold, NaN included; as queries they give zeros and zero gradients.
      segment_ids: `int[batch, length]`: several sequences in one row, each attending to itself.
      distance_bias: `[length]`, or `[heads, length]` with one row a head: added to the logits by
        how many slots the key lies before the query (`t5_bias`, `alibi_bias`). Within a segment
        without holes that is the distance of their positions. Its gradient is the sum of the
        logits' gradients at each distance, over the batch, and over heads for the first form.
        Entries that no valid pair of events meets are not read and get a zero gradient. `-inf`
        shuts a distance out; the entry of distance 0 must be finite.
      scale: factor of the products; `None` is `1 / sqrt(head_dim)`.
      dropout_rate: probability in [0, 1) that a weight is dropped; the others are divided by
        `1 - dropout_rate`, after the softmax.
      dropout_key: JAX random key, needed when the rate is positive. Which weight is dropped is a
        hash of the key and of the weight's batch row, head, query index and key index: the same
        whatever the blocking, in the backward pass, and in a kernel that never stores the
        weights. Inside `shard_map` the batch row is the local one: fold the shard's index into
        the key.
      implementation: `"xla"`, `"pallas"`, or `None` for the best that runs.

    Returns:
      `[batch, length, heads, value_dim]` in the dtype of `value`. The softmax runs in float32.

    Raises:
      ValueError: wrong ranks, shapes or dtypes; dropout without a key; a forced implementation
        that cannot run.

    Cost: `2 n^2 (head_dim + value_dim)` FLOPs a head and sequence of length `n`, half of which
    causality saves, 2.5 times that for the gradient. Below length 1024 the weights of a row are
    formed, `[heads, n, n]` in float32; from there on memory is O(n) a row, and key blocks that
    share no segment with a query block are skipped. A bias of distances adds one pass over the
    weights, and one more for its gradient. Reverse mode only (no `jvp`).

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1, with a causal mask;
    blockwise form: Rabe and Staats, arXiv 2112.05682, and Dao, arXiv 2307.08691.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
      >>> out = causal_attention(x, x, x, segment_ids=jnp.array([[0, 0, 1, 1]]))
      >>> bool(jnp.allclose(out[:, 2], x[:, 2]))  # the first event of a segment sees itself alone
      True
    """
    op = "causal_attention"
    query, key, value = check_qkv(op, query, key, value)
    valid = check_valid(op, valid, query.shape[:2])
    segment_ids = check_int_rows(op, "segment_ids", segment_ids, query.shape[:2])
    bias = check_distance_bias(op, distance_bias, query.shape[2], query.shape[1])
    scale = check_scale(op, scale, query.shape[3])
    rate = check_dropout(op, dropout_rate, dropout_key)
    unsupported = _NO_BIAS if bias is not None else supports(query, value) or not_manual()
    look_up = partial(_mixing.look_up, query, (None, None))
    choice = choose(op, implementation, unsupported, slower=slower(query), blocks=look_up)
    seeds = dropout_seeds(dropout_key) if rate else None
    if choice.implementation == "xla":
        inputs = Inputs(query, key, value, valid, segment_ids, seeds, bias)
        return attend(Options(scale, rate, block_for(query.shape[1])), inputs)
    # The kernel of `positional_kernel_attention`, with nothing to mix.
    options = _mixing.Options(scale, rate, ("identity",) * 2, (False,) * 2, kernel=True)
    mixing = _mixing.Inputs(query, key, value, None, None, valid, segment_ids, None, seeds)
    return _mixing.attend(options, mixing)
