"""Pointwise attention with biases by position and time: the attention of HSTU."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _hstu_rows as _rows
from jaxrec.ops._attention_core import block_for
from jaxrec.ops._checks import (
    as_arrays,
    check_int_rows,
    check_qkv,
    check_scale,
    check_times,
    check_valid,
)
from jaxrec.ops._dispatch import Implementation, choose
from jaxrec.ops._hstu_core import Inputs, Options, attend
from jaxrec.ops._manual_axes import not_manual
from jaxrec_kernels.hstu_attention import look_up, supports


def hstu_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads value_dim"],
    *,
    normalizer: int,
    position_table: Float[Array, " positions"] | None = None,
    time_table: Float[Array, " buckets_and_one"] | None = None,
    timestamps: Int[Array, "batch length"] | None = None,
    valid: Bool[Array, "batch length"] | None = None,
    segment_ids: Int[Array, "batch length"] | None = None,
    num_candidates: Int[Array, " batch"] | None = None,
    scale: float | None = 1.0,
    implementation: Implementation | None = None,
) -> Float[Array, "batch length heads value_dim"]:
    """Causal attention whose weights are SiLU of the logits, without a softmax.

    `out[i] = (1 / normalizer) sum_j silu(scale <query[i], key[j]> + rab[i, j]) value[j]` a head,
    over the `j <= i` that are valid and share the segment of `i`, with
    `rab[i, j] = position_table[N - 1 + j - i] + time_table[bucket(t[i + 1] - t[j])]` and
    `bucket(x) = min(buckets, floor(ln(max(|x|, 1)) / 0.301))`.

    `t[i + 1]` is the time of the next valid event of the segment: the time that the prediction is
    for. The last event has none and takes its own.

    Args:
      query, key: `[batch, length, heads, head_dim]`, float32 or bfloat16.
      value: `[batch, length, heads, value_dim]`, float32 or bfloat16.
      normalizer: a constant of the model, the length that rows are padded to in training, not the
        length of a row: the output depends on it, so training, evaluation and serving must agree.
      position_table: `[2 N - 1]` with `N >= length`, shared by the heads. The entries for `j > i`
        are never read.
      time_table: `[buckets + 1]`, shared by the heads; the source has 128 buckets, of which
        differences of 32-bit seconds reach 73.
      timestamps: `int[batch, length]`, seconds; given if and only if `time_table` is. Differences
        do not overflow.
      valid: `bool[batch, length]`, `False` for padding. Invalid slots are read by nobody, whatever
        they hold, NaN included; as queries they give zeros and zero gradients.
      segment_ids: `int[batch, length]`: several sequences in one row, each attending to itself.
        For the times, a segment is a run of equal ids.
      num_candidates: `int[batch]`: so many of a row's last valid events are candidates to be
        scored, not history. Each attends to the history and to itself, none to another. All
        stand where the first one stands, in position and in time, whatever their own timestamps,
        so that a candidate scores the same alone and among others.
      scale: factor of the products inside SiLU; the source has 1, its serving variant
        `1 / sqrt(head_dim)`, which is also what `None` is.
      implementation: `"xla"`, `"pallas"`, or `None` for the best that runs.

    Returns:
      `[batch, length, heads, value_dim]` in the dtype of `value`. Logits, biases and sums are
      float32. A row that sees nothing is zero.

    Raises:
      ValueError: wrong ranks, shapes or dtypes; a normaliser that is no positive integer; a
        position table too short for the length; one of `time_table` and `timestamps` without the
        other; candidates in packed rows; a forced implementation that cannot run.

    Cost: `2 n^2 (head_dim + value_dim)` FLOPs a head and sequence of length `n`, half of which
    causality saves, 2.5 times that for the gradient; a time table adds some 150 comparisons and
    selections a pair of events, for all heads together, and as many for its gradient. Backward
    keeps the inputs alone. Below length 1024 weights and biases of a row are formed; from there on
    memory is O(n) a row, and key blocks that share no segment with a query block are skipped. The
    TPU kernel forms none of them in main memory, computes a bucket by a logarithm, and takes three
    operations a pair and bucket for the time table's gradient, of the buckets that a tile has.
    Reverse mode only (no `jvp`).

    Source: Zhai et al., "Actions Speak Louder than Words", ICML 2024, arXiv 2402.17152, section
    3.2; the tables, buckets and the constant normaliser as in the authors' research code.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
      >>> seconds = jnp.array([[0, 60, 3600, 86400]])
      >>> tables = {"position_table": jnp.zeros(2 * 4 - 1), "time_table": jnp.zeros(129)}
      >>> out = hstu_attention(x, x, x, normalizer=4, timestamps=seconds, **tables)
      >>> first = jax.nn.silu((x[:, 0] ** 2).sum(-1, keepdims=True)) * x[:, 0] / 4
      >>> bool(jnp.allclose(out[:, 0], first, atol=1e-6))  # the first event sees itself alone
      True
    """
    op = "hstu_attention"
    query, key, value = check_qkv(op, query, key, value)
    batch, length = query.shape[:2]
    valid = check_valid(op, valid, (batch, length))
    segment_ids = check_int_rows(op, "segment_ids", segment_ids, (batch, length))
    timestamps = check_times(op, "timestamps", timestamps, (batch, length))
    _rows.check_normalizer(op, normalizer)
    position_table, time_table = as_arrays(position_table, time_table)
    _rows.check_tables(op, position_table, length, time_table, {"timestamps": timestamps})
    num_candidates = _rows.check_candidates(op, num_candidates, batch, segment_ids)
    scale = check_scale(op, scale, query.shape[3])
    integers = segment_ids, timestamps
    unsupported = supports(
        query,
        value,
        tables=(position_table, time_table),
        integers=integers,
        candidates=num_candidates is not None,
    )
    unsupported = unsupported or not_manual()
    choice = choose(
        op,
        implementation,
        unsupported,
        blocks=partial(look_up, query, value, integers, time_table, num_candidates is not None),
    )

    if value.size == 0:
        return jnp.zeros_like(value)
    distance_bias = _rows.by_distance(position_table, length)
    rows = _rows.describe(
        (batch, length), distance_bias, timestamps, valid, segment_ids, num_candidates
    )
    inputs = Inputs(
        query,
        key,
        value,
        distance_bias,
        rows.candidate_bias,
        time_table,
        valid,
        segment_ids,
        rows.candidates,
        rows.query_times,
        rows.key_times,
    )
    kernel = choice.implementation == "pallas"
    return attend(Options(scale, float(normalizer), block_for(length), kernel), inputs)
