"""Statistics of each position over the catalogue: one pass over blocks of items.

The logits of a block lie as [items, positions], so that what belongs to a position is a row of
lanes and every reduction runs along sublanes. With the running maximum m of a position::

    l = E h                          in the matrix units, written to VMEM         (block j)
    w = exp(l - m)                   in the vector units, read from VMEM          (block j - 1)
    O = O exp(m' - m) + Eᵀ w         in the matrix units                          (block j - 1)

The exponentials of a block need the maximum over all of it, so they wait for its product; done one
block behind, they run beside the product of the next block. The grid has one step more, for the
last block's exponentials.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import compat
from jaxrec_kernels.linear_cross_entropy.layout import (
    Layout,
    across,
    by_sublane,
    layout_for,
    precision_for,
    product,
    spread,
)
from jaxrec_kernels.linear_cross_entropy.tiling import LANES, Blocks, blocks_for

_F32 = jnp.float32


class Statistics(NamedTuple):
    """Of each position, over the items of `table`; float32.

    With l_pv = <hidden_p, table_v> + bias_v.
    """

    largest: jax.Array  # [P]: max_v l_pv
    total: jax.Array  # [P]: sum_v exp(l_pv - largest_p)
    target: jax.Array  # [P]: l_p,y_p; 0 where the label is none of these items
    weighted: jax.Array | None  # [P, D]: sum_v exp(l_pv - largest_p) table_v


class _Call(NamedTuple):
    """What is known when the kernel is built."""

    blocks: Blocks
    layout: Layout
    items: int
    biased: bool
    weighted: bool
    precision: lax.Precision

    @property
    def item_blocks(self) -> int:
        return pl.cdiv(self.items, self.blocks.items)

    @property
    def left_over(self) -> int:
        """Rows of the last block beyond the items; they hold anything."""
        return self.item_blocks * self.blocks.items - self.items


class _State(NamedTuple):
    """Scratch memory."""

    logits: Any  # [items, positions]
    # [8, positions], a part in each sublane:
    largest: Any  # of this block
    total: Any
    target: Any
    # [8, positions], the same in all sublanes:
    running: Any  # the largest so far
    shift: Any  # what exponentials are taken against
    bias: Any = None  # [items, LANES]
    weights: Any = None  # [items, positions]
    before: Any = None  # the item rows of the block before


def statistics(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    weighted: bool,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Statistics:
    """Statistics of every position over all items, never holding [P, V].

    Args:
      hidden: [P, D], float32 or bfloat16, D at most 256.
      table: [V, D] in the dtype of `hidden`.
      labels: int32 [P]; rows of `table`, anything else where the label is none of them.
      bias: float32 [V] or None.
      weighted: whether the weighted sum of item rows is wanted: one product more.
      blocks: sizes; by default `blocks_for`.
      interpret: as `pl.pallas_call`.

    Cost: 2 P V D FLOPs, twice that with `weighted`, and P V exponentials. Reads the table once for
    each block of positions.
    """
    positions, width = hidden.shape
    items = table.shape[0]
    blocks = blocks or blocks_for(positions, items, width, hidden.dtype.itemsize)
    call = _Call(
        blocks, layout_for(width), items, bias is not None, weighted, precision_for(hidden.dtype)
    )
    rows = pl.cdiv(positions, blocks.positions) * blocks.positions
    hidden = jnp.pad(hidden, ((0, rows - positions), (0, 0)))
    # A label beyond the items would pick a row that only fills the last block.
    labels = jnp.where(labels < items, labels, jnp.int32(-1))
    labels = jnp.pad(labels, (0, rows - positions), constant_values=-1)
    operands = [call.layout.given(hidden), call.layout.given(table), labels[None, :]]
    if bias is not None:
        operands.append(bias[None, :])
    out = [jax.ShapeDtypeStruct((1, rows), _F32)] * 3
    if weighted:
        out.append(jax.ShapeDtypeStruct((width, rows), _F32))
    out = [compat.like(operands, x) for x in out]
    found = _build(call, hidden, out, interpret)(*operands)
    largest, total, target = (x[0, :positions] for x in found[:3])
    return Statistics(largest, total, target, found[3].T[:positions] if weighted else None)


def _build(call: _Call, hidden: jax.Array, out: Any, interpret: Any) -> Any:
    (rows, width), dtype = hidden.shape, hidden.dtype
    of_positions, of_items = call.blocks.positions, call.blocks.items
    last = call.item_blocks - 1

    def here(i: Any, j: Any) -> Any:
        return call.layout.place(i)

    def items_of(i: Any, j: Any) -> Any:
        # The last step needs no items: what is there stays.
        return call.layout.place(jnp.minimum(j, last))

    def line(i: Any, j: Any) -> Any:
        return 0, i

    inputs = [
        pl.BlockSpec(call.layout.shape(of_positions, width), here),
        pl.BlockSpec(call.layout.shape(of_items, width), items_of),
        pl.BlockSpec((1, of_positions), line),
    ]
    if call.biased:
        inputs.append(pl.BlockSpec((1, of_items), lambda i, j: (0, jnp.minimum(j, last))))
    outputs = [pl.BlockSpec((1, of_positions), line)] * 3
    scratch = {"logits": pltpu.VMEM((of_items, of_positions), _F32)}
    for name in ("largest", "total", "target", "running", "shift"):
        scratch[name] = pltpu.VMEM((8, of_positions), _F32)
    if call.biased:
        scratch["bias"] = pltpu.VMEM((of_items, LANES), _F32)
    if call.weighted:
        outputs.append(pl.BlockSpec((width, of_positions), line))
        scratch["weights"] = pltpu.VMEM((of_items, of_positions), dtype)
        scratch["before"] = pltpu.VMEM(call.layout.shape(of_items, width), dtype)
    blocks, size = rows // of_positions, rows * call.items
    return pl.pallas_call(
        partial(_kernel, call),
        grid=(blocks, call.item_blocks + 1),
        in_specs=inputs,
        out_specs=outputs,
        out_shape=out,
        scratch_shapes=scratch,
        compiler_params=compat.compiler_params(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * size * width * (2 if call.weighted else 1),
            transcendentals=size,
            bytes_accessed=(blocks * call.items + 2 * rows) * width * dtype.itemsize,
        ),
        interpret=interpret,
        name="linear_cross_entropy_forward",
    )


def _kernel(
    call: _Call, hidden_ref: Any, table_ref: Any, labels_ref: Any, *refs: Any, **scratch: Any
) -> None:
    rest = list(refs)
    bias_ref = rest.pop(0) if call.biased else None
    largest_ref, total_ref, target_ref = rest[:3]
    weighted_ref = rest[3] if call.weighted else None
    state = _State(**scratch)
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        state.running[...] = jnp.full_like(state.running, -jnp.inf)
        # Of the block before the first one: its exponentials are 0.
        state.logits[...] = jnp.full_like(state.logits, -jnp.inf)
        for ref in (state.shift, state.total, state.target):
            ref[...] = jnp.zeros_like(ref)
        if weighted_ref is not None:
            weighted_ref[...] = jnp.zeros_like(weighted_ref)
            state.before[...] = jnp.zeros_like(state.before)

    state.largest[...] = jnp.full_like(state.largest, -jnp.inf)
    if bias_ref is not None:
        spread(bias_ref, state.bias, call.blocks.chunk)

    def chunk(k: Any, carry: None) -> None:
        start = k * call.blocks.chunk
        _exponentials(call, state, start)
        item = step * call.blocks.items + start
        _logits(call, state, hidden_ref, table_ref, labels_ref, start, item)

    chunks = call.blocks.items // call.blocks.chunk
    lax.fori_loop(0, chunks, chunk, None)

    if weighted_ref is not None:
        lax.fori_loop(0, chunks, partial(_add_weighted, call, state, weighted_ref), None)
        _keep_rows(call, state, table_ref, step)

    @pl.when(step < call.item_blocks)
    def _() -> None:
        # What was summed so far moves to the new maximum.
        before = state.running[...]
        largest = jnp.maximum(before, state.largest[...].max(0, keepdims=True))
        shift = jnp.where(largest == -jnp.inf, _F32(0), largest)
        factor = jnp.exp(before - shift)
        state.running[...] = largest
        state.shift[...] = shift
        state.total[...] = factor * state.total[...]
        if weighted_ref is not None:
            weighted_ref[...] = factor[:1] * weighted_ref[...]

    @pl.when(step == call.item_blocks)
    def _() -> None:
        largest_ref[...] = state.running[:1]
        total_ref[...] = state.total[...].sum(0, keepdims=True)
        target_ref[...] = state.target[...].sum(0, keepdims=True)


def _exponentials(call: _Call, state: _State, start: Any) -> None:
    """Of a chunk of the block before, from its logits."""
    rows = pl.ds(pl.multiple_of(start, call.blocks.chunk), call.blocks.chunk)
    weights = jnp.exp(by_sublane(state.logits[rows, :]) - state.shift[...][None])
    state.total[...] += weights.sum(0)
    if call.weighted:
        shape = (call.blocks.chunk, call.blocks.positions)
        state.weights[rows, :] = weights.reshape(shape).astype(state.weights.dtype)


def _logits(
    call: _Call,
    state: _State,
    hidden_ref: Any,
    table_ref: Any,
    labels_ref: Any,
    start: Any,
    item: Any,
) -> None:
    """Of a chunk of this block, in the place of those of the block before."""
    size, axis = call.blocks.chunk, call.layout.width_axis
    rows = table_ref[call.layout.rows(start, size)]
    logits = product(rows, hidden_ref[...], (axis, axis), call.precision)
    if call.biased:
        column = state.bias[pl.ds(pl.multiple_of(start, size), size), :]
        logits += across(column, call.blocks.positions)
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    # Needed in the last block alone; with it in all of them the registers are enough everywhere.
    logits = jnp.where(ids < call.items - item, logits, _F32(-jnp.inf))
    state.logits[pl.ds(pl.multiple_of(start, size), size), :] = logits
    state.largest[...] = jnp.maximum(state.largest[...], by_sublane(logits).max(0))
    hit = jnp.where(ids == labels_ref[...] - item, logits, _F32(0))
    state.target[...] += by_sublane(hit).sum(0)


def _add_weighted(call: _Call, state: _State, weighted_ref: Any, k: Any, carry: None) -> None:
    """The weighted item rows of a chunk of the block before."""
    start, size = k * call.blocks.chunk, call.blocks.chunk
    rows = state.before[call.layout.rows(start, size)]
    weights = state.weights[pl.ds(pl.multiple_of(start, size), size), :]
    weighted_ref[...] += product(rows, weights, (1 - call.layout.width_axis, 0), call.precision)


def _keep_rows(call: _Call, state: _State, table_ref: Any, step: Any) -> None:
    """This block's item rows for the next step, zeros beyond the items: 0 times NaN is NaN."""
    state.before[...] = table_ref[...]
    if call.left_over:

        @pl.when(step == call.item_blocks - 1)
        def _() -> None:
            end = slice(call.blocks.items - call.left_over, None)
            place = (slice(None), end) if call.layout.transposed else (end, slice(None))
            state.before[place] = jnp.zeros_like(state.before[place])
