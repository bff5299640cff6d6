"""The differentiable core of the causal mix: which form runs, and what it keeps for backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _attention_blockwise as _blockwise
from jaxrec.ops import _attention_mix_blockwise, _attention_mix_dense
from jaxrec.ops import _attention_mix_tables as _tables
from jaxrec.ops._checks import statistics_dtype
from jaxrec.ops._manual_axes import vary_together
from jaxrec.ops._masking import clean


class Options(NamedTuple):
    """Static arguments."""

    structure: str  # "toeplitz" or "full"
    upper: bool  # a full factor is U, to be transposed
    block: int | None  # side of a tile; None: the dense form


class Inputs(NamedTuple):
    """The kernel has a leading axis: one for all heads, or one a head."""

    kernel: Float[Array, "groups ..."]
    x: Float[Array, "batch length heads width"]
    valid: Bool[Array, "batch length"] | None
    segment_ids: Int[Array, "batch length"] | None
    positions: Int[Array, "batch length"] | None


@partial(jax.jit, static_argnums=0, inline=True)
def mix(options: Options, inputs: Inputs) -> Float[Array, "batch length heads width"]:
    """`out[j] = sum_{k <= j} T[j, k] x[k]`, zero in invalid slots."""
    if inputs.x.size == 0:
        return jnp.zeros_like(inputs.x)
    return _mix(options, Inputs(*vary_together(*inputs)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(options: Options, inputs: Inputs) -> Array:
    return _forward(options, inputs)[0]


def _forward(options: Options, inputs: Inputs) -> tuple[Array, Inputs]:
    form = _form(options, inputs)
    out = form.forward(form.table(inputs.kernel), _group(inputs, inputs.x))
    return clean(_ungroup(inputs, out).astype(inputs.x.dtype), inputs.valid), inputs


def _backward(options: Options, inputs: Inputs, d_out: Array) -> tuple[Inputs]:
    form = _form(options, inputs)
    table, to_kernel = jax.vjp(form.table, inputs.kernel)
    d_table, d_x = form.backward(table, _group(inputs, inputs.x), _group(inputs, d_out))
    (d_kernel,) = to_kernel(d_table)
    d_x = clean(_ungroup(inputs, d_x).astype(inputs.x.dtype), inputs.valid)
    return (Inputs(d_kernel, d_x, None, None, None),)


_mix.defvjp(_forward, _backward)


def _group(inputs: Inputs, x: Array) -> Float[Array, "batch groups length channels"]:
    """Heads that share a kernel side by side as channels; statistics precision, clean."""
    x = clean(x, inputs.valid).astype(statistics_dtype(x.dtype))
    if inputs.kernel.shape[0] > 1:
        return jnp.swapaxes(x, 1, 2)
    return x.reshape(x.shape[0], 1, x.shape[1], -1)


def _ungroup(inputs: Inputs, x: Array) -> Float[Array, "batch length heads width"]:
    return jnp.swapaxes(x, 1, 2).reshape(inputs.x.shape)


class _Form(NamedTuple):
    table: Callable[[Array], Array]  # from the kernel, by differentiable code
    forward: Callable[[Array, Array], Array]
    backward: Callable[[Array, Array, Array], tuple[Array, Array]]  # gradients of table and x


def _form(options: Options, inputs: Inputs) -> _Form:
    _, length, _, _ = inputs.x.shape
    toeplitz = options.structure == "toeplitz"
    band = min(inputs.kernel.shape[-1], length) if toeplitz else length
    if options.block is None:
        return _short(options, inputs, band)
    return _long(options, inputs, options.block, band)


def _as_statistics(inputs: Inputs, kernel: Array) -> Array:
    return kernel.astype(statistics_dtype(inputs.x.dtype))


def _short(options: Options, inputs: Inputs, band: int) -> _Form:
    length = inputs.x.shape[1]

    def table(kernel: Array) -> Array:
        kernel = _as_statistics(inputs, kernel)
        if options.structure == "toeplitz":
            return _tables.taps_table(kernel, length)
        triangle = _tables.triangle_table(kernel, upper=options.upper)
        return triangle if inputs.positions is not None else triangle[:, :length, :length]

    def operator(table: Array) -> Any:
        if options.structure == "full" and inputs.positions is not None:
            return _attention_mix_dense.Placed(table, inputs.positions, inputs.segment_ids)
        return _attention_mix_dense.Shared(table, inputs.segment_ids)

    return _Form(
        table,
        lambda t, x: _attention_mix_dense.forward(operator(t), x, band),
        lambda t, x, g: _attention_mix_dense.backward(operator(t), x, g, band),
    )


def _long(options: Options, inputs: Inputs, block: int, band: int) -> _Form:
    length = inputs.x.shape[1]
    tiling = _blockwise.tile(length, None, inputs.segment_ids, block)
    side = tiling.size * tiling.blocks

    def table(kernel: Array) -> Array:
        kernel = _as_statistics(inputs, kernel)
        if options.structure == "toeplitz":
            return _tables.taps_tiles(kernel[:, :length], tiling.size, tiling.blocks)
        triangle = _tables.triangle_table(kernel, upper=options.upper)
        if inputs.positions is not None:
            return triangle
        behind = side - length
        return jnp.pad(triangle[:, :length, :length], ((0, 0), (0, behind), (0, behind)))

    def operator(table: Array) -> Any:
        if options.structure == "toeplitz":
            return _attention_mix_blockwise.Tiles(table, tiling)
        if inputs.positions is None:
            return _attention_mix_blockwise.Sliced(table, tiling)
        # The slots behind the end get position -1, which lies outside every table.
        positions = _blockwise.cut(inputs.positions + 1, tiling.size, tiling.blocks) - 1
        return _attention_mix_blockwise.Placed(table, positions, tiling)

    def cut(x: Array) -> Array:
        return _blockwise.cut_heads(jnp.swapaxes(x, 1, 2), tiling)

    def join(x: Array) -> Array:
        return jnp.swapaxes(_blockwise.join_heads(x, length), 1, 2)

    def backward(t: Array, x: Array, g: Array) -> tuple[Array, Array]:
        d_table, d_x = _attention_mix_blockwise.backward(operator(t), cut(x), cut(g), band)
        return d_table, join(d_x)

    return _Form(
        table,
        lambda t, x: join(_attention_mix_blockwise.forward(operator(t), cut(x), band)),
        backward,
    )
