"""The differentiable core of causal attention: which form runs, and what it keeps for backward."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxrec.ops import _attention_blockwise, _attention_dense, _manual_axes
from jaxrec.ops._masking import clean

_BLOCKWISE_FROM, _BLOCK = 1024, 256


class Options(NamedTuple):
    """Static arguments."""

    scale: float
    dropout_rate: float
    block: int | None  # side of a tile; None: the dense form


class Inputs(NamedTuple):
    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length heads head_dim"]
    value: Float[Array, "batch length heads value_dim"]
    valid: Bool[Array, "batch length"] | None
    segment_ids: Int[Array, "batch length"] | None
    seeds: UInt32[Array, "2"] | None
    distance_bias: Float[Array, "groups length"] | None = None  # one for all heads, or one a head


class Residuals(NamedTuple):
    """All that backward reads; the weights are computed again from the log-sum-exp."""

    inputs: Inputs
    out: Float[Array, "batch length heads value_dim"]
    log_sum_exp: Float[Array, "batch heads length"]


def block_for(length: int) -> int | None:
    """From 1024 on nothing of size [length, length] is formed."""
    return _BLOCK if length >= _BLOCKWISE_FROM else None


def _form(options: Options) -> Any:
    return _attention_dense if options.block is None else _attention_blockwise


# Compiled as one: called eagerly, its fifty small operations would be compiled one by one.
@partial(jax.jit, static_argnums=0, inline=True)
def attend(options: Options, inputs: Inputs) -> Float[Array, "batch length heads value_dim"]:
    if inputs.value.size == 0:
        return jnp.zeros_like(inputs.value)
    return _attend(options, Inputs(*_manual_axes.vary_together(*inputs)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> Array:
    return forward(options, inputs)[0]


def _clean_inputs(inputs: Inputs) -> Inputs:
    return inputs._replace(
        query=clean(inputs.query, inputs.valid),
        key=clean(inputs.key, inputs.valid),
        value=clean(inputs.value, inputs.valid),
    )


def forward(options: Options, inputs: Inputs) -> tuple[Array, Residuals]:
    out, lse = _form(options).forward(options, _clean_inputs(inputs))
    out = clean(out, inputs.valid)
    return out, Residuals(inputs, out, lse)


def backward(options: Options, residuals: Residuals, d_out: Array) -> tuple[Inputs]:
    inputs = residuals.inputs
    *gradients, d_bias = _form(options).backward(
        options,
        _clean_inputs(inputs),
        residuals.out,
        residuals.log_sum_exp,
        clean(d_out, inputs.valid),
    )
    d_query, d_key, d_value = (clean(g, inputs.valid) for g in gradients)
    return (Inputs(d_query, d_key, d_value, None, None, None, d_bias),)


_attend.defvjp(forward, backward)
