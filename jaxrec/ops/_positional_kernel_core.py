"""The differentiable core of positional kernel attention.

XLA's form mixes keys and values, then attends; it keeps the mixed arrays for backward, as the
kernels for long rows do. The kernel for whole rows mixes them again, and in their place keeps the
arrays that it was given, which costs nothing: one tuple of residuals serves all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxrec.ops import _attention_core as _attention
from jaxrec.ops import _attention_factors as _factors
from jaxrec.ops import _attention_mix_tables as _tables
from jaxrec.ops._dispatch import platform_switch
from jaxrec.ops._manual_axes import vary_together
from jaxrec_kernels.positional_kernel_attention import LONGEST_WHOLE, spec

# The slot of no sequence, for the kernels.
_NOBODY = -(2**31)


class Options(NamedTuple):
    """Static arguments."""

    scale: float
    dropout_rate: float
    structures: tuple[str, str]
    upper: tuple[bool, bool]  # a full factor is U, to be transposed
    kernel: bool  # the Pallas kernel runs where there is one for the platform


class Inputs(NamedTuple):
    """The factors have a leading axis: one for all heads, or one a head."""

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length heads head_dim"]
    value: Float[Array, "batch length heads value_dim"]
    logit_kernel: Float[Array, "groups ..."] | None
    value_kernel: Float[Array, "groups ..."] | None
    valid: Bool[Array, "batch length"] | None
    segment_ids: Int[Array, "batch length"] | None
    positions: Int[Array, "batch length"] | None
    seeds: UInt32[Array, "2"] | None


class _Residuals(NamedTuple):
    inputs: Inputs
    key: Array  # mixed, or as it was given
    value: Array
    out: Array
    log_sum_exp: Array


@partial(jax.jit, static_argnums=0, inline=True)
def attend(options: Options, inputs: Inputs) -> Float[Array, "batch length heads value_dim"]:
    if inputs.value.size == 0:
        return jnp.zeros_like(inputs.value)
    return _attend(options, Inputs(*vary_together(*inputs)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> Array:
    return _forward(options, inputs)[0]


def _forward(options: Options, inputs: Inputs) -> tuple[Array, _Residuals]:
    out, lse, key, value = _run_forward(options, inputs)
    return out, _Residuals(inputs, key, value, out, lse)


def _backward(options: Options, residuals: _Residuals, d_out: Array) -> tuple[Inputs]:
    return (_run_backward(options, residuals, d_out),)


_attend.defvjp(_forward, _backward)


# A gradient of the gradient passes through the two below. A kernel has none, so that it is XLA's,
# of the whole op and by its inputs; nothing reaches them by way of the other residuals.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_forward(options: Options, inputs: Inputs) -> tuple[Array, ...]:
    xla, kernels = partial(_xla_forward, options), _on_tpu(options, _kernel_forward)
    return platform_switch(xla, kernels, inputs)


def _run_forward_kept(options: Options, inputs: Inputs) -> tuple[tuple[Array, ...], Inputs]:
    return _run_forward(options, inputs), inputs


def _run_forward_backward(
    options: Options, inputs: Inputs, gradients: tuple[Array, ...]
) -> tuple[Inputs]:
    return (_plain_gradients(options, inputs, gradients[0]),)


_run_forward.defvjp(_run_forward_kept, _run_forward_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_backward(options: Options, residuals: _Residuals, d_out: Array) -> Inputs:
    xla, kernels = partial(_xla_backward, options), _on_tpu(options, _kernel_backward)
    return platform_switch(xla, kernels, residuals, d_out)


def _run_backward_kept(
    options: Options, residuals: _Residuals, d_out: Array
) -> tuple[Inputs, tuple[_Residuals, Array]]:
    return _run_backward(options, residuals, d_out), (residuals, d_out)


def _run_backward_backward(
    options: Options, kept: tuple[_Residuals, Array], second: Inputs
) -> tuple[_Residuals, Array]:
    residuals, d_out = kept
    inputs = residuals.inputs

    def gradients(arrays: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
        found = _plain_gradients(options, _with_arrays(inputs, arrays), d_out)
        return _arrays(found)

    _, pull = jax.vjp(gradients, _arrays(inputs), d_out)
    by_arrays, by_d_out = pull(_arrays(second))
    others = (jnp.zeros_like(x) for x in residuals[1:])
    return _Residuals(_gradients(*by_arrays), *others), by_d_out


_run_backward.defvjp(_run_backward_kept, _run_backward_backward)


def _arrays(inputs: Inputs) -> tuple[Any, ...]:
    """What there are gradients of."""
    return inputs[:5]


def _with_arrays(inputs: Inputs, arrays: tuple[Any, ...]) -> Inputs:
    return inputs._replace(**dict(zip(Inputs._fields, arrays, strict=False)))


def _plain_gradients(options: Options, inputs: Inputs, d_out: Array) -> Inputs:
    """XLA's, in code that can be differentiated."""

    def plain(arrays: tuple[Any, ...]) -> Array:
        given = _with_arrays(inputs, arrays)
        key = _mix(options, given, 0, given.logit_kernel, given.key)
        value = _mix(options, given, 1, given.value_kernel, given.value)
        attention = _attention_inputs(given, key, value)
        out: Array = _attention.attend(_attention_options(options, given), attention)
        return out

    (found,) = jax.vjp(plain, _arrays(inputs))[1](d_out)
    return _gradients(*found)


def _on_tpu(options: Options, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"tpu": partial(function, options)} if options.kernel else {}


def _gradients(query: Any, key: Any, value: Any, logit_kernel: Any, value_kernel: Any) -> Inputs:
    return Inputs(query, key, value, logit_kernel, value_kernel, None, None, None, None)


def _mix(options: Options, inputs: Inputs, which: int, kernel: Any, x: Array) -> Array:
    factor = _factors.Factor(options.structures[which], kernel, options.upper[which])
    return _factors.apply(factor, x, inputs.valid, inputs.segment_ids, inputs.positions)


def _attention_inputs(inputs: Inputs, key: Array, value: Array) -> _attention.Inputs:
    return _attention.Inputs(
        inputs.query, key, value, inputs.valid, inputs.segment_ids, inputs.seeds
    )


def _attention_options(options: Options, inputs: Inputs) -> _attention.Options:
    block = _attention.block_for(inputs.query.shape[1])
    return _attention.Options(options.scale, options.dropout_rate, block)


def _xla_forward(options: Options, inputs: Inputs) -> tuple[Array, ...]:
    key = _mix(options, inputs, 0, inputs.logit_kernel, inputs.key)
    value = _mix(options, inputs, 1, inputs.value_kernel, inputs.value)
    out, kept = _attention.forward(
        _attention_options(options, inputs), _attention_inputs(inputs, key, value)
    )
    return out, kept.log_sum_exp, key, value


def _xla_backward(options: Options, residuals: _Residuals, d_out: Array) -> Inputs:
    inputs = residuals.inputs
    kept = _attention.Residuals(
        _attention_inputs(inputs, residuals.key, residuals.value),
        residuals.out,
        residuals.log_sum_exp,
    )
    (d,) = _attention.backward(_attention_options(options, inputs), kept, d_out)
    gradients = []
    for which, (kernel, x, g) in enumerate(
        ((inputs.logit_kernel, inputs.key, d.key), (inputs.value_kernel, inputs.value, d.value))
    ):
        # What runs forward here is not read, and so not computed.
        _, pull = jax.vjp(partial(_mix, options, inputs, which), kernel, x)
        gradients.append(pull(g))
    (d_logit_kernel, d_key), (d_value_kernel, d_value) = gradients
    return _gradients(d.query, d_key, d_value, d_logit_kernel, d_value_kernel)


def _kernel_ids(inputs: Inputs) -> Int[Array, "batch length"] | None:
    """What the kernels tell events apart by."""
    ids = inputs.segment_ids
    if inputs.valid is None and ids is None:
        return None
    ids = jnp.zeros(inputs.query.shape[:2], jnp.int32) if ids is None else ids
    ids = ids.astype(jnp.int32)
    if inputs.valid is None:
        return ids
    return jnp.where(inputs.valid, jnp.maximum(ids, _NOBODY + 1), _NOBODY)


class _Whole(NamedTuple):
    """The kernel that has a whole row in the vector memory, and the operators as squares."""

    options: Options
    inputs: Inputs

    def table(self, which: int, kernel: Array) -> Float[Array, "groups length length"]:
        length, kernel = self.inputs.query.shape[1], kernel.astype(jnp.float32)
        if self.options.structures[which] == "toeplitz":
            return _tables.taps_table(kernel, length)
        return _tables.triangle_table(kernel, upper=self.options.upper[which])[:, :length, :length]

    def _call(self) -> tuple[Any, Any]:
        from jaxrec_kernels.positional_kernel_attention import tpu

        inputs = self.inputs
        tables = _each_kernel(inputs, self.table)
        arrays = inputs.query, inputs.key, inputs.value, _kernel_ids(inputs), inputs.seeds
        static = {
            "scale": self.options.scale,
            "dropout_rate": self.options.dropout_rate,
            "bands": tuple(_band(self.options, inputs, which) for which in (0, 1)),
            "segmented": inputs.segment_ids is not None,
        }
        return tpu.Arrays(*arrays, *tables), static

    def forward(self) -> tuple[Array, ...]:
        from jaxrec_kernels.positional_kernel_attention import tpu

        arrays, static = self._call()
        out, lse = tpu.forward(arrays, **static)
        # It mixes them again.
        return out, lse, self.inputs.key, self.inputs.value

    def backward(self, residuals: _Residuals, d_out: Array) -> Any:
        from jaxrec_kernels.positional_kernel_attention import tpu

        arrays, static = self._call()
        return tpu.backward(arrays, residuals.out, residuals.log_sum_exp, d_out, **static)


class _Long(NamedTuple):
    """The kernels for rows that are cut, and the operators in blocks."""

    options: Options
    inputs: Inputs

    def table(self, which: int, kernel: Array) -> Float[Array, "..."]:
        from jaxrec_kernels.long_attention.plan import plan_of

        plan, kernel = plan_of(self.inputs.query), kernel.astype(jnp.float32)
        length, behind = plan.length, plan.padded - plan.length
        if self.options.structures[which] == "toeplitz":
            return _tables.taps_tiles(kernel[:, :length], plan.block, plan.blocks)
        triangle = _tables.triangle_table(kernel, upper=self.options.upper[which])
        return jnp.pad(triangle[:, :length, :length], ((0, 0), (0, behind), (0, behind)))

    def _call(self) -> tuple[Any, Any]:
        from jaxrec_kernels.long_attention import mix, tpu

        inputs = self.inputs
        operators = (
            None
            if blocks is None
            else mix.Operator(
                blocks, _band(self.options, inputs, which), inputs.segment_ids is not None
            )
            for which, blocks in enumerate(_each_kernel(inputs, self.table))
        )
        arrays = inputs.query, inputs.key, inputs.value, _kernel_ids(inputs), inputs.seeds
        static = {"scale": self.options.scale, "dropout_rate": self.options.dropout_rate}
        return tpu.Arrays(*arrays, *operators), static

    def forward(self) -> tuple[Array, ...]:
        from jaxrec_kernels.long_attention import tpu

        arrays, static = self._call()
        out, lse, mixed = tpu.forward(arrays, **static)
        return out, lse, *mixed

    def backward(self, residuals: _Residuals, d_out: Array) -> Any:
        from jaxrec_kernels.long_attention import tpu

        arrays, static = self._call()
        mixed = tpu.Mixed(residuals.key, residuals.value)
        kept = mixed, residuals.out, residuals.log_sum_exp
        return tpu.backward(arrays, *kept, d_out, **static)


def _kernel_for(options: Options, inputs: Inputs) -> _Whole | _Long:
    kernel = _Whole if inputs.query.shape[1] <= LONGEST_WHOLE else _Long
    return kernel(options, inputs)


def look_up(query: Any, kernels: tuple[Any, ...]) -> Any:
    """How the forward kernel cuts a call with these operators, [1 or heads, ...] or None."""
    if query.shape[1] <= LONGEST_WHOLE:
        return spec.tuned_cut(spec.FORWARD, spec.size_of(query, kernels))
    from jaxrec_kernels.long_attention.plan import plan_of

    return plan_of(query)


def _each_kernel(inputs: Inputs, table: Callable[[int, Array], Any]) -> list[Any]:
    kernels = inputs.logit_kernel, inputs.value_kernel
    return [
        None if kernel is None else table(which, kernel) for which, kernel in enumerate(kernels)
    ]


def _band(options: Options, inputs: Inputs, which: int) -> int:
    """Entries of the operator this far or further below the diagonal are zero."""
    kernel = (inputs.logit_kernel, inputs.value_kernel)[which]
    taps = kernel is not None and options.structures[which] == "toeplitz"
    length = inputs.query.shape[1]
    return min(kernel.shape[-1], length) if taps and kernel is not None else length


def _kernel_forward(options: Options, inputs: Inputs) -> tuple[Array, ...]:
    return _kernel_for(options, inputs).forward()


def _kernel_backward(options: Options, residuals: _Residuals, d_out: Array) -> Inputs:
    inputs = residuals.inputs
    kernel = _kernel_for(options, inputs)
    *d_arrays, d_logits, d_values = kernel.backward(residuals, d_out)
    d_tables = d_logits, d_values

    def through_table(which: int, factor: Array) -> Any:
        return jax.vjp(partial(kernel.table, which), factor)[1](d_tables[which])[0]

    return _gradients(*d_arrays, *_each_kernel(inputs, through_table))
