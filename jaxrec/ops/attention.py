"""Causal softmax attention over packed or padded sequences."""

from typing import Any

from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops._attention_core import Inputs, Options, attend
from jaxrec.ops._attention_dropout import dropout_seeds
from jaxrec.ops._checks import (
    check_dropout,
    check_int_rows,
    check_qkv,
    check_scale,
    check_valid,
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
    seeds = dropout_seeds(dropout_key) if rate else None
    inputs = Inputs(query, key, value, valid, segment_ids, seeds)
    return attend(Options(scale, rate), inputs)
