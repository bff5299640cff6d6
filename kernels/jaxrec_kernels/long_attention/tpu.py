"""Positional kernel attention on long rows: the mixes, then the attention."""

from typing import Any, NamedTuple

from jax import Array

from jaxrec_kernels.attention_tile import LOG2E
from jaxrec_kernels.long_attention import backward as _backward
from jaxrec_kernels.long_attention import forward as _forward
from jaxrec_kernels.long_attention.mix import Operator, mix, mix_turned, operator_gradient


class Arrays(NamedTuple):
    """The operands: arrays of the op, and its operators in blocks."""

    query: Array  # [batch, length, heads, head_dim]
    key: Array
    value: Array
    ids: Array | None  # int32[batch, length], NOBODY for padding
    seeds: Array | None  # uint32[2]
    logit_operator: Operator | None
    value_operator: Operator | None


class Mixed(NamedTuple):
    """What backward reads beside the operands. Mixed keys have the factor of the logits in them."""

    key: Array
    value: Array


def forward(
    arrays: Arrays, *, scale: float, dropout_rate: float, interpret: Any = False
) -> tuple[Array, Array, Mixed]:
    """Output, log-sum-exp float32[batch, heads, length], and the mixed arrays.

    Args:
      arrays: the operands.
      scale: of the logits.
      dropout_rate: of the weights.
      interpret: as in `pallas_call`.
    """
    key, value, factor = arrays.key, arrays.value, scale * LOG2E
    if arrays.logit_operator is not None:
        key = mix(arrays.logit_operator, key, arrays.ids, factor=factor, interpret=interpret)
        factor = 1.0
    if arrays.value_operator is not None:
        value = mix(arrays.value_operator, value, arrays.ids, interpret=interpret)
    out, lse = _forward.forward(
        arrays.query,
        key,
        value,
        arrays.ids,
        arrays.seeds,
        factor=factor,
        dropout_rate=dropout_rate,
        interpret=interpret,
    )
    return out, lse, Mixed(key, value)


class Gradients(NamedTuple):
    query: Array
    key: Array
    value: Array
    logit_blocks: Array | None  # float32, as the operator's; anything above the diagonal
    value_blocks: Array | None


def backward(
    arrays: Arrays,
    mixed: Mixed,
    out: Array,
    log_sum_exp: Array,
    d_out: Array,
    *,
    scale: float,
    dropout_rate: float,
    interpret: Any = False,
) -> Gradients:
    """Gradients of all arrays; arguments as in `forward`, and its results."""
    factor = scale * LOG2E
    d_query, d_key, d_value = _backward.backward(
        arrays.query,
        mixed.key,
        mixed.value,
        arrays.ids,
        arrays.seeds,
        out,
        log_sum_exp,
        d_out,
        factor=factor if arrays.logit_operator is None else 1.0,
        dropout_rate=dropout_rate,
        interpret=interpret,
    )
    d_logits = d_values = None
    if arrays.logit_operator is not None:
        operator = arrays.logit_operator
        d_logits = factor * operator_gradient(
            operator, arrays.key, d_key, arrays.ids, interpret=interpret
        )
        d_key = mix_turned(operator, d_key, arrays.ids, factor=factor, interpret=interpret)
    if arrays.value_operator is not None:
        operator = arrays.value_operator
        d_values = operator_gradient(
            operator, arrays.value, d_value, arrays.ids, interpret=interpret
        )
        d_value = mix_turned(operator, d_value, arrays.ids, interpret=interpret)
    return Gradients(d_query, d_key, d_value, d_logits, d_values)
