"""The differentiable core of pointwise attention: which form runs; it keeps its inputs alone.

The kernel and XLA's forms share these residuals, so that each may run forward or backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _hstu_blockwise, _hstu_dense, _time_buckets
from jaxrec.ops._dispatch import differentiable_switch
from jaxrec.ops._manual_axes import vary_together
from jaxrec.ops._masking import clean


class Options(NamedTuple):
    """Static arguments."""

    scale: float
    normalizer: float
    block: int | None  # side of a tile of XLA's form; None: the dense one
    kernel: bool  # the Pallas kernel runs where there is one for the platform


class Inputs(NamedTuple):
    """The first six are differentiated."""

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length heads head_dim"]
    value: Float[Array, "batch length heads value_dim"]
    distance_bias: Float[Array, "1 length"] | None
    candidate_bias: Float[Array, "batch length"] | None  # the row that all candidates share
    time_table: Float[Array, " entries"] | None
    valid: Bool[Array, "batch length"] | None
    segment_ids: Int[Array, "batch length"] | None
    candidates: Bool[Array, "batch length"] | None
    query_times: Int[Array, "batch length"] | None
    key_times: Int[Array, "batch length"] | None


def _form(options: Options) -> Any:
    return _hstu_dense if options.block is None else _hstu_blockwise


@partial(jax.jit, static_argnums=0, inline=True)
def attend(options: Options, inputs: Inputs) -> Float[Array, "batch length heads value_dim"]:
    return _attend(options, Inputs(*vary_together(*inputs)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> Array:
    return _forward(options, inputs)[0]


def _clean_inputs(inputs: Inputs) -> Inputs:
    return inputs._replace(
        query=clean(inputs.query, inputs.valid),
        key=clean(inputs.key, inputs.valid),
        value=clean(inputs.value, inputs.valid),
    )


def _forward(options: Options, inputs: Inputs) -> tuple[Array, Inputs]:
    xla, kernels = partial(_xla_forward, options), _on_tpu(options, _kernel_forward)
    return differentiable_switch(xla, kernels, inputs), inputs


def _backward(options: Options, inputs: Inputs, d_out: Array) -> tuple[Inputs]:
    xla, kernels = partial(_xla_backward, options), _on_tpu(options, _kernel_backward)
    (d_query, d_key, d_value), d_biases = differentiable_switch(xla, kernels, inputs, d_out)
    d_distance, d_candidate, d_time = (
        None if x is None else d.astype(x.dtype)
        for d, x in zip(
            d_biases, (inputs.distance_bias, inputs.candidate_bias, inputs.time_table), strict=True
        )
    )
    learned = (d_query, d_key, d_value, d_distance, d_candidate, d_time)
    return (Inputs(*learned, None, None, None, None, None),)


_attend.defvjp(_forward, _backward)


def _on_tpu(options: Options, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"tpu": partial(function, options)} if options.kernel else {}


def _xla_forward(options: Options, inputs: Inputs) -> Array:
    out = _form(options).forward(options, _clean_inputs(inputs))
    return clean(out, inputs.valid)


def _xla_backward(options: Options, inputs: Inputs, d_out: Array) -> tuple[Any, Any]:
    gradients, d_biases = _form(options).backward(
        options, _clean_inputs(inputs), clean(d_out, inputs.valid)
    )
    return tuple(clean(g, inputs.valid) for g in gradients), d_biases


def _kernel_options(options: Options) -> dict[str, Any]:
    return {
        "scale": options.scale,
        "normalizer": options.normalizer,
        # Of all buckets that differences of 32 bits reach; a shorter table is repeated at its end.
        "edges": tuple(_time_buckets.edges(127, 32)),
    }


def _kernel_forward(options: Options, inputs: Inputs) -> Array:
    from jaxrec_kernels.hstu_attention import tpu

    return tpu.forward(inputs, **_kernel_options(options))


def _kernel_backward(options: Options, inputs: Inputs, d_out: Array) -> tuple[Any, Any]:
    from jaxrec_kernels.hstu_attention import tpu

    return tpu.backward(inputs, d_out, **_kernel_options(options))
