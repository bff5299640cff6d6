"""The gradient of the item table: the logits again, from the statistics of the forward pass.

For a block of items, over all blocks of positions::

    d = exp(E h - lse), at the label what it is less c      [items, positions], written to VMEM
    dEᵀ += (g h)ᵀ d

The two products are separate loops over the block, since a matrix unit holds one right operand at a
time: fused, the compiler keeps d in registers until they spill.

What the products give waits in registers for the vector units, which are slower. Therefore those
have few operations left to do: the matrix units add the bias and take lse off (`sides`), d at the
label is known beforehand, the gains belong to the positions, and the gradient of the bias is a row
of the second product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import LANES, compat
from jaxrec_kernels.linear_cross_entropy import sides
from jaxrec_kernels.linear_cross_entropy.layout import (
    Layout,
    across,
    column,
    layout_for,
    precision_for,
    product,
)
from jaxrec_kernels.linear_cross_entropy.tiling import BACKWARD, Blocks, tuned_blocks

_F32 = jnp.float32


class TableGradient(NamedTuple):
    """[V, D] in the asked dtype, and float32 [V] where there is a bias."""

    table: jax.Array
    bias: jax.Array | None


class _Call(NamedTuple):
    """What is known when the kernel is built."""

    blocks: Blocks
    layout: Layout
    items: int
    width: int
    biased: bool
    precision: lax.Precision

    @property
    def sided(self) -> bool:
        """Whether the matrix units add to the products what else belongs to the logits."""
        return self.layout.transposed

    @property
    def rows(self) -> int:
        """Of the width, and beside it."""
        return sides.rows_of(self.width)

    @property
    def gradient_rows(self) -> int:
        """Of the table's gradient, and beside it for that of the bias."""
        return self.rows if self.biased else self.width


class _Lines(NamedTuple):
    """Of the positions, [1, positions] each."""

    labels: Any
    at_label: Any
    log_sum_exp: Any
    gain: Any


class _State(NamedTuple):
    """Scratch memory."""

    delta: Any  # [items, positions]
    gained: Any  # [gradient_rows, positions], the positions times their gain
    gradient: Any  # float32 [gradient_rows, items]
    # Where sided, with what is beside them:
    items: Any = None  # [rows, items]
    positions: Any = None  # [rows, positions]
    # Where not:
    bias: Any = None  # float32 [items, LANES], alike in all lanes


def table_gradient(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    target: jax.Array,
    log_sum_exp: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None = None,
    *,
    hit: float = 1.0,
    dtype: Any = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> TableGradient:
    """dE_v = sum_p g_p (exp(l_pv - lse_p) - hit [v = y_p]) h_p, and the same sum without h_p.

    Args:
      hidden: [P, D], float32 or bfloat16, D at most 256.
      table: [V, D] in the dtype of `hidden`.
      labels: int32 [P]; rows of `table`, anything else where the label is none of them.
      target: float32 [P], the label's logit.
      log_sum_exp: float32 [P], lse.
      gain: float32 [P], g.
      bias: float32 [V] or None, part of the logits l.
      hit: what is taken off at the label; 1 without label smoothing.
      dtype: of the table's gradient, by default that of `table`.
      blocks: sizes; by default `tuned_blocks`.
      interpret: as `pl.pallas_call`.

    Cost: 4 P V D FLOPs and P V exponentials. Reads `hidden` once for each block of items.
    """
    positions, width = hidden.shape
    items = table.shape[0]
    blocks = blocks or tuned_blocks(
        BACKWARD, positions, items, width, hidden.dtype.itemsize, biased=bias is not None
    )
    layout = layout_for(width)
    call = _Call(blocks, layout, items, width, bias is not None, precision_for(hidden.dtype))
    more = -positions % blocks.positions
    # A gain of 0 leaves the positions added here out, as long as their shares are finite.
    hidden = jnp.pad(hidden, ((0, more), (0, 0)))
    at_label = jnp.exp(target - log_sum_exp) - _F32(hit)
    # Infinite where all items are removed: taken off -inf, that is no number.
    log_sum_exp = jnp.where(log_sum_exp == -jnp.inf, _F32(jnp.nan), log_sum_exp)
    lines = [
        jnp.pad(x, (0, more), constant_values=fill)[None, :]
        for x, fill in ((labels, -1), (at_label, 0), (log_sum_exp, jnp.inf), (gain, 0))
    ]
    operands = [layout.given(hidden), layout.given(table), *lines]
    if bias is not None:
        operands.append(bias[None, :])
    out = [jax.ShapeDtypeStruct(layout.shape(items, width), dtype or table.dtype)]
    if bias is not None:
        out.append(jax.ShapeDtypeStruct((1, items), _F32))
    out = [compat.like(operands, x) for x in out]
    found = _build(call, positions + more, hidden.dtype, out, interpret)(*operands)
    return TableGradient(layout.given(found[0]), found[1][0] if call.biased else None)


def _build(call: _Call, count: int, dtype: Any, out: Any, interpret: Any) -> Any:
    of_positions, of_items, _ = call.blocks

    def positions_of(i: Any, j: Any) -> Any:
        return call.layout.place(j)

    def here(i: Any, j: Any) -> Any:
        return call.layout.place(i)

    line = pl.BlockSpec((1, of_positions), lambda i, j: (0, j))
    item_line = pl.BlockSpec((1, of_items), lambda i, j: (0, i))
    item_rows = pl.BlockSpec(call.layout.shape(of_items, call.width), here)
    inputs = [pl.BlockSpec(call.layout.shape(of_positions, call.width), positions_of), item_rows]
    inputs += [line] * 4
    outputs = [item_rows]
    scratch = {
        "delta": pltpu.VMEM((of_items, of_positions), dtype),
        "gained": pltpu.VMEM((call.gradient_rows, of_positions), dtype),
        "gradient": pltpu.VMEM((call.gradient_rows, of_items), _F32),
    }
    if call.sided:
        scratch["items"] = pltpu.VMEM((call.rows, of_items), dtype)
        scratch["positions"] = pltpu.VMEM((call.rows, of_positions), dtype)
    elif call.biased:
        scratch["bias"] = pltpu.VMEM((of_items, LANES), _F32)
    if call.biased:
        inputs.append(item_line)
        outputs.append(item_line)
    blocks, size = pl.cdiv(call.items, of_items), count * call.items
    return pl.pallas_call(
        partial(_kernel, call),
        grid=(blocks, count // of_positions),
        in_specs=inputs,
        out_specs=outputs,
        out_shape=out,
        scratch_shapes=scratch,
        compiler_params=compat.compiler_params(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * size * call.width,
            transcendentals=size,
            bytes_accessed=(blocks * count + 2 * call.items) * call.width * dtype.itemsize,
        ),
        interpret=interpret,
        name=BACKWARD,
    )


def _kernel(call: _Call, hidden_ref: Any, table_ref: Any, *refs: Any, **scratch: Any) -> None:
    lines, rest = _Lines(*refs[:4]), list(refs[4:])
    bias_ref = rest.pop(0) if call.biased else None
    table_out = rest.pop(0)
    bias_out = rest.pop(0) if call.biased else None
    state = _State(**scratch)
    item, step = pl.program_id(0) * call.blocks.items, pl.program_id(1)

    def each(size: int, part: Callable[[int, Any], None]) -> None:
        lax.fori_loop(0, call.blocks.items // size, lambda k, _: part(size, k * size), None)

    @pl.when(step == 0)
    def _() -> None:
        state.gradient[...] = jnp.zeros_like(state.gradient)
        if call.sided:
            bias = _F32(0) if bias_ref is None else bias_ref[...]
            sides.fill(state.items, table_ref[...], sides.of_items(call.blocks.items, bias))
        elif bias_ref is not None:
            each(call.blocks.chunk, partial(_spread_bias, state, bias_ref))

    _fill_positions(call, state, hidden_ref, lines)
    # What the vector units do in the other case needs more registers.
    size = call.blocks.chunk if call.sided else call.blocks.half
    each(size, partial(_delta, call, state, hidden_ref, table_ref, lines, item))
    each(call.blocks.chunk, partial(_add, call, state))

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        each(call.blocks.chunk, partial(_write, call, state, table_out))
        if bias_out is not None:
            bias_out[...] = sides.summed(state.gradient[call.gradient_rows - sides.SIDE :, :])


def _fill_positions(call: _Call, state: _State, hidden_ref: Any, lines: _Lines) -> None:
    """What both products take of the positions."""
    down = hidden_ref[...]
    if call.sided:
        side = sides.of_positions(call.blocks.positions, lines.log_sum_exp[...])
        sides.fill(state.positions, down, side)
    else:
        down = down.T
    gained = (lines.gain[...] * down.astype(_F32)).astype(down.dtype)
    if call.biased:
        sides.fill(state.gained, gained, sides.of_gains(lines.gain[...]))
    else:
        state.gained[...] = gained


def _spread_bias(state: _State, bias_ref: Any, size: int, start: Any) -> None:
    """That of some items, into all lanes."""
    rows = _rows(start, size)
    state.bias[rows, :] = column(bias_ref[:, rows])


def _delta(
    call: _Call,
    state: _State,
    hidden_ref: Any,
    table_ref: Any,
    lines: _Lines,
    block: Any,
    size: int,
    start: Any,
) -> None:
    """The loss's gradient by some logits, for a gain of 1; `block` is the block's first item."""
    rows = _rows(start, size)
    if call.sided:
        logits = product(state.items[:, rows], state.positions[...], (0, 0), call.precision)
    else:
        logits = product(table_ref[rows, :], hidden_ref[...], (1, 1), call.precision)
        if call.biased:
            logits += across(state.bias[rows, :], call.blocks.positions)
        logits -= lines.log_sum_exp[...]
    shares = jnp.exp(logits)
    ids = lax.broadcasted_iota(jnp.int32, shares.shape, 0)
    delta = jnp.where(ids == lines.labels[...] - (block + start), lines.at_label[...], shares)
    state.delta[rows, :] = delta.astype(state.delta.dtype)


def _add(call: _Call, state: _State, size: int, start: Any) -> None:
    """The part of some items in the gradient; what rows beyond them give is never written."""
    rows = _rows(start, size)
    part = product(state.gained[...], state.delta[rows, :], (1, 1), call.precision)
    state.gradient[:, rows] += part


def _write(call: _Call, state: _State, table_out: Any, size: int, start: Any) -> None:
    """Some of the finished gradient, as the table lies."""
    found = state.gradient[: call.width, _rows(start, size)]
    found = found if call.layout.transposed else found.T
    table_out[call.layout.rows(start, size)] = found.astype(table_out.dtype)


def _rows(start: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(start, size), size)
