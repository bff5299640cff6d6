"""The gradient of the item table: the logits again, from the statistics of the forward pass.

For a block of items, over all blocks of positions::

    d = g (exp(E h - lse) - c [v = y])       [items, positions], written to VMEM
    dEᵀ += hᵀ d

The two products are separate loops over the block, since a matrix unit holds one right operand at a
time: fused, the compiler keeps d in registers until they spill.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import LANES, compat
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
    biased: bool
    hit: float
    precision: lax.Precision


class _State(NamedTuple):
    """Scratch memory."""

    delta: Any  # [items, positions]
    table: Any  # float32 [D, items]
    # float32 [items, LANES]:
    bias: Any = None  # alike in all lanes
    bias_gradient: Any = None  # a part in each lane


def table_gradient(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
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
    call = _Call(blocks, layout, bias is not None, hit, precision_for(hidden.dtype))
    rows = pl.cdiv(positions, blocks.positions) * blocks.positions
    # A gain of 0 leaves the positions added here out, as long as their shares are finite.
    hidden = jnp.pad(hidden, ((0, rows - positions), (0, 0)))
    lines = [
        jnp.pad(x, (0, rows - positions), constant_values=fill)[None, :]
        for x, fill in ((labels, -1), (log_sum_exp, jnp.inf), (gain, 0))
    ]
    operands = [layout.given(hidden), layout.given(table), *lines]
    if bias is not None:
        operands.append(bias[None, :])
    out = [jax.ShapeDtypeStruct(layout.shape(items, width), dtype or table.dtype)]
    if bias is not None:
        out.append(jax.ShapeDtypeStruct((1, items), _F32))
    out = [compat.like(operands, x) for x in out]
    found = _build(call, hidden, items, out, interpret)(*operands)
    return TableGradient(layout.given(found[0]), found[1][0] if call.biased else None)


def _build(call: _Call, hidden: jax.Array, items: int, out: Any, interpret: Any) -> Any:
    (rows, width), dtype = hidden.shape, hidden.dtype
    of_positions, of_items = call.blocks.positions, call.blocks.items

    def positions_of(i: Any, j: Any) -> Any:
        return call.layout.place(j)

    def here(i: Any, j: Any) -> Any:
        return call.layout.place(i)

    line = pl.BlockSpec((1, of_positions), lambda i, j: (0, j))
    item_line = pl.BlockSpec((1, of_items), lambda i, j: (0, i))
    item_rows = pl.BlockSpec(call.layout.shape(of_items, width), here)
    inputs = [pl.BlockSpec(call.layout.shape(of_positions, width), positions_of), item_rows]
    inputs += [line] * 3
    outputs = [item_rows]
    scratch = {
        "delta": pltpu.VMEM((of_items, of_positions), dtype),
        "table": pltpu.VMEM((width, of_items), _F32),
    }
    if call.biased:
        inputs.append(item_line)
        outputs.append(item_line)
        scratch["bias"] = scratch["bias_gradient"] = pltpu.VMEM((of_items, LANES), _F32)
    blocks, size = pl.cdiv(items, of_items), rows * items
    return pl.pallas_call(
        partial(_kernel, call),
        grid=(blocks, rows // of_positions),
        in_specs=inputs,
        out_specs=outputs,
        out_shape=out,
        scratch_shapes=scratch,
        compiler_params=compat.compiler_params(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * size * width,
            transcendentals=size,
            bytes_accessed=(blocks * rows + 2 * items) * width * dtype.itemsize,
        ),
        interpret=interpret,
        name=BACKWARD,
    )


def _kernel(call: _Call, hidden_ref: Any, table_ref: Any, *refs: Any, **scratch: Any) -> None:
    lines, rest = refs[:3], list(refs[3:])
    bias_ref = rest.pop(0) if call.biased else None
    table_out = rest.pop(0)
    bias_out = rest.pop(0) if call.biased else None
    state = _State(**scratch)
    item, step = pl.program_id(0) * call.blocks.items, pl.program_id(1)

    chunks = call.blocks.items // call.blocks.chunk

    @pl.when(step == 0)
    def _() -> None:
        state.table[...] = jnp.zeros_like(state.table)
        if call.biased:
            state.bias_gradient[...] = jnp.zeros_like(state.bias_gradient)
            lax.fori_loop(0, chunks, partial(_spread_bias, call, state, bias_ref), None)

    delta = partial(_delta, call, state, hidden_ref, table_ref, lines, item)
    lax.fori_loop(0, chunks, delta, None)
    lax.fori_loop(0, chunks, partial(_add, call, state, hidden_ref), None)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        lax.fori_loop(0, chunks, partial(_write, call, state, table_out), None)
        if bias_out is not None:
            bias_out[...] = state.bias_gradient[...].T.sum(0, keepdims=True)


def _spread_bias(call: _Call, state: _State, bias_ref: Any, k: Any, carry: None) -> None:
    """A chunk of the bias, into all lanes."""
    _, rows = _chunk(call, k)
    state.bias[rows, :] = column(bias_ref[:, rows])


def _delta(
    call: _Call,
    state: _State,
    hidden_ref: Any,
    table_ref: Any,
    lines: Any,
    item: Any,
    k: Any,
    carry: None,
) -> None:
    """The loss's gradient by a chunk of logits; `item` is the block's first."""
    labels_ref, log_sum_exp_ref, gain_ref = lines
    axis, start, rows = call.layout.width_axis, *_chunk(call, k)
    items = table_ref[call.layout.rows(start, call.blocks.chunk)]
    logits = product(items, hidden_ref[...], (axis, axis), call.precision)
    if call.biased:
        logits += across(state.bias[rows, :], call.blocks.positions)
    shares = jnp.exp(logits - log_sum_exp_ref[...])
    ids = lax.broadcasted_iota(jnp.int32, shares.shape, 0)
    delta = jnp.where(ids == labels_ref[...] - (item + start), shares - _F32(call.hit), shares)
    delta = delta * gain_ref[...]
    state.delta[rows, :] = delta.astype(state.delta.dtype)
    if call.biased:
        parts = [delta[:, n : n + LANES] for n in range(0, delta.shape[1], LANES)]
        state.bias_gradient[rows, :] += sum(parts[1:], parts[0])


def _add(call: _Call, state: _State, hidden_ref: Any, k: Any, carry: None) -> None:
    """A chunk's part of the gradient; what rows beyond the items give is never written."""
    _, rows = _chunk(call, k)
    over = (1 - call.layout.width_axis, 1)
    state.table[:, rows] += product(hidden_ref[...], state.delta[rows, :], over, call.precision)


def _write(call: _Call, state: _State, table_out: Any, k: Any, carry: None) -> None:
    """A chunk of the finished gradient, as the table lies."""
    start, rows = _chunk(call, k)
    found = state.table[:, rows] if call.layout.transposed else state.table[:, rows].T
    table_out[call.layout.rows(start, call.blocks.chunk)] = found.astype(table_out.dtype)


def _chunk(call: _Call, k: Any) -> tuple[Any, Any]:
    """Where the k-th chunk of the block begins, and its indices."""
    start = k * call.blocks.chunk
    return start, pl.ds(pl.multiple_of(start, call.blocks.chunk), call.blocks.chunk)
