"""Statistics of each position over the catalogue: one pass over blocks of items.

The logits of a block lie as [items, positions], so that what belongs to a position is a row of
lanes and every reduction runs along sublanes. With the running maximum m of a position::

    l = E h                          in the matrix units, written to VMEM         (block j)
    w = exp(l - m)                   in the vector units, read from VMEM          (block j - 1)
    O = O exp(m' - m) + Eᵀ w         in the matrix units                          (block j - 1)

The exponentials of a block need the maximum over all of it, so they wait for its product; done one
block behind, they run beside the product of the next block. Those of the last one follow by
themselves.
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
from jaxrec_kernels.linear_cross_entropy.layout import (
    Layout,
    across,
    by_sublane,
    column,
    layout_for,
    precision_for,
    product,
)
from jaxrec_kernels.linear_cross_entropy.tiling import FORWARD, Blocks, tuned_blocks

_F32 = jnp.float32
# Exponentials at a time without a product beside them: more do not fit in the registers.
_ALONE = LANES // 2


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
    weights: Any = None  # [items, positions]
    before: Any = None  # the item rows of the block that the logits are of


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
      blocks: sizes; by default `tuned_blocks`.
      interpret: as `pl.pallas_call`.

    Cost: 2 P V D FLOPs, twice that with `weighted`, and P V exponentials. Reads the table once for
    each block of positions.
    """
    positions, width = hidden.shape
    items = table.shape[0]
    blocks = blocks or tuned_blocks(
        FORWARD, positions, items, width, hidden.dtype.itemsize, biased=bias is not None
    )
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

    def here(i: Any, j: Any) -> Any:
        return call.layout.place(i)

    def items_of(i: Any, j: Any) -> Any:
        return call.layout.place(j)

    def line(i: Any, j: Any) -> Any:
        return 0, i

    inputs = [
        pl.BlockSpec(call.layout.shape(of_positions, width), here),
        pl.BlockSpec(call.layout.shape(of_items, width), items_of),
        pl.BlockSpec((1, of_positions), line),
    ]
    if call.biased:
        inputs.append(pl.BlockSpec((1, of_items), lambda i, j: (0, j)))
    outputs = [pl.BlockSpec((1, of_positions), line)] * 3
    scratch = {"logits": pltpu.VMEM((of_items, of_positions), _F32)}
    for name in ("largest", "total", "target", "running", "shift"):
        scratch[name] = pltpu.VMEM((8, of_positions), _F32)
    if call.weighted:
        outputs.append(pl.BlockSpec((width, of_positions), line))
        scratch["weights"] = pltpu.VMEM((of_items, of_positions), dtype)
        scratch["before"] = pltpu.VMEM(call.layout.shape(of_items, width), dtype)
    blocks, size = rows // of_positions, rows * call.items
    return pl.pallas_call(
        partial(_kernel, call),
        grid=(blocks, call.item_blocks),
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
        name=FORWARD,
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

    def each(size: int, *parts: Callable[[int, Any], None]) -> None:
        def one(k: Any, carry: None) -> None:
            for part in parts:
                part(size, k * size)

        lax.fori_loop(0, call.blocks.items // size, one, None)

    chunk = call.blocks.chunk

    item = step * call.blocks.items
    logits = partial(_logits, call, state, hidden_ref, table_ref, labels_ref, bias_ref, item)
    exponentials = partial(_exponentials, call, state)

    def weigh_rows() -> None:
        if weighted_ref is not None:
            each(chunk, partial(_add_weighted, call, state, weighted_ref))

    state.largest[...] = jnp.full_like(state.largest, -jnp.inf)

    @pl.when(step == 0)
    def _() -> None:
        state.running[...] = jnp.full_like(state.running, -jnp.inf)
        for ref in (state.total, state.target):
            ref[...] = jnp.zeros_like(ref)
        if weighted_ref is not None:
            weighted_ref[...] = jnp.zeros_like(weighted_ref)
        each(chunk, logits)

    if call.item_blocks > 1:

        @pl.when(step > 0)
        def _() -> None:
            # Of the block before, whose logits then make room.
            each(chunk, exponentials, logits)
            weigh_rows()

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
        state.before[...] = table_ref[...]

    @pl.when(step == call.item_blocks - 1)
    def _() -> None:
        if call.weighted:
            _clear_left_over(call, state)
        each(_ALONE, exponentials)
        weigh_rows()
        largest_ref[...] = state.running[:1]
        total_ref[...] = state.total[...].sum(0, keepdims=True)
        target_ref[...] = state.target[...].sum(0, keepdims=True)


def _exponentials(call: _Call, state: _State, size: int, start: Any) -> None:
    """Of a chunk of logits, against the maximum of their block."""
    rows = pl.ds(pl.multiple_of(start, size), size)
    weights = jnp.exp(by_sublane(state.logits[rows, :]) - state.shift[...][None])
    state.total[...] += weights.sum(0)
    if call.weighted:
        weights = weights.reshape(size, call.blocks.positions)
        state.weights[rows, :] = weights.astype(state.weights.dtype)


def _logits(
    call: _Call,
    state: _State,
    hidden_ref: Any,
    table_ref: Any,
    labels_ref: Any,
    bias_ref: Any,
    block: Any,
    size: int,
    start: Any,
) -> None:
    """Of a chunk of this block, whose first item is `block`."""
    axis, item = call.layout.width_axis, block + start
    rows = table_ref[call.layout.rows(start, size)]
    logits = product(rows, hidden_ref[...], (axis, axis), call.precision)
    if call.biased:
        of_items = pl.ds(pl.multiple_of(start, size), size)
        logits += across(column(bias_ref[:, of_items]), call.blocks.positions)
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    # Needed in the last block alone; with it in all of them the registers are enough everywhere.
    logits = jnp.where(ids < call.items - item, logits, _F32(-jnp.inf))
    state.logits[pl.ds(pl.multiple_of(start, size), size), :] = logits
    state.largest[...] = jnp.maximum(state.largest[...], by_sublane(logits).max(0))
    hit = jnp.where(ids == labels_ref[...] - item, logits, _F32(0))
    state.target[...] += by_sublane(hit).sum(0)


def _add_weighted(call: _Call, state: _State, weighted_ref: Any, size: int, start: Any) -> None:
    """The weighted item rows of a chunk of the block that the exponentials are of."""
    rows = state.before[call.layout.rows(start, size)]
    weights = state.weights[pl.ds(pl.multiple_of(start, size), size), :]
    weighted_ref[...] += product(rows, weights, (1 - call.layout.width_axis, 0), call.precision)


def _clear_left_over(call: _Call, state: _State) -> None:
    """Zeros in the rows that only fill the last block: 0 times NaN is NaN."""
    if call.left_over:
        end = slice(call.blocks.items - call.left_over, None)
        place = (slice(None), end) if call.layout.transposed else (end, slice(None))
        state.before[place] = jnp.zeros_like(state.before[place])
