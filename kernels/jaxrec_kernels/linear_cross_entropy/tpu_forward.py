"""Statistics of each position over the catalogue: one pass over blocks of items.

The logits of a block lie as [items, positions], so that what belongs to a position is a row of
lanes and every reduction runs along sublanes. With the running maximum m of a position::

    l = E h                          in the matrix units, written to VMEM         (block j)
    w = exp(l - m)                   in the vector units, read from VMEM          (block j - 1)
    O = O exp(m' - m) + Eᵀ w         in the matrix units                          (block j - 1)

The exponentials of a block need the maximum over all of it, so they wait for its product; done one
block behind, they run beside the product of the next block. Those of the last one follow by
themselves.

The matrix units are up to twice as fast as the vector units, and what they give waits in registers.
Therefore they add the bias, and what takes an item out, to the logits (`sides`), and a chunk is no
longer than what may wait.
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
    width: int
    biased: bool
    weighted: bool
    precision: lax.Precision

    @property
    def sided(self) -> bool:
        """Whether the matrix units add to the products what else belongs to the logits."""
        return self.layout.transposed

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
    ids: Any  # int32 [chunk, LANES], alike in all lanes: the number of the row
    # This block of the table and the one before, by turns; where sided, with what is beside them.
    items: Any
    positions: Any = None  # with what is beside them, where sided
    bias: Any = None  # float32 [items, LANES], alike in all lanes, where not
    weights: Any = None  # [items, positions]


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
        blocks,
        layout_for(width),
        items,
        width,
        bias is not None,
        weighted,
        precision_for(hidden.dtype),
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
    # What the kernel has for -inf.
    none = largest <= sides.LOWEST / 2
    total = jnp.where(none, _F32(0), total)
    largest, target = (
        jnp.where(x <= sides.LOWEST / 2, _F32(-jnp.inf), x) for x in (largest, target)
    )
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
    scratch["ids"] = pltpu.VMEM((call.blocks.chunk, LANES), jnp.int32)
    for name in ("largest", "total", "target", "running", "shift"):
        scratch[name] = pltpu.VMEM((8, of_positions), _F32)
    if call.weighted:
        outputs.append(pl.BlockSpec((width, of_positions), line))
        scratch["weights"] = pltpu.VMEM((of_items, of_positions), dtype)
    if call.sided:
        with_side = sides.rows_of(width)
        scratch["items"] = pltpu.VMEM((2, with_side, of_items), dtype)
        scratch["positions"] = pltpu.VMEM((with_side, of_positions), dtype)
    else:
        scratch["items"] = pltpu.VMEM((2, of_items, width), dtype)
        if call.biased:
            scratch["bias"] = pltpu.VMEM((of_items, LANES), _F32)
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

    chunk, item, turn = call.blocks.chunk, step * call.blocks.items, step % 2
    logits = partial(_logits, call, state, hidden_ref, labels_ref, item, turn)
    exponentials = partial(_exponentials, call, state)

    @pl.when(step == 0)
    def _() -> None:
        state.running[...] = jnp.full_like(state.running, -jnp.inf)
        for ref in (state.total, state.target):
            ref[...] = jnp.zeros_like(ref)
        if weighted_ref is not None:
            weighted_ref[...] = jnp.zeros_like(weighted_ref)
        state.ids[...] = lax.broadcasted_iota(jnp.int32, state.ids.shape, 0)
        if call.sided:
            side = sides.of_positions(call.blocks.positions)
            sides.fill(state.positions, hidden_ref[...], side)

    state.largest[...] = jnp.full_like(state.largest, -jnp.inf)
    _fill(call, state, table_ref, bias_ref, each, step)
    if state.bias is not None:
        each(chunk, partial(_spread_bias, state, bias_ref, call.items - item))

    def add_weighted(of: Any) -> None:
        if weighted_ref is not None:
            each(chunk, partial(_add_weighted, call, state, weighted_ref, of))

    @pl.when(step == 0)
    def _() -> None:
        each(chunk if call.sided else call.blocks.half, logits)

    if call.item_blocks > 1:

        @pl.when(step > 0)
        def _() -> None:
            # Of the block before, whose logits then make room.
            each(chunk, exponentials, logits)
            add_weighted(1 - turn)

    if call.left_over and not (call.sided or call.biased):

        @pl.when(step == call.item_blocks - 1)
        def _remove_left_over() -> None:
            beyond = jnp.full((call.left_over, call.blocks.positions), -jnp.inf, _F32)
            state.logits[call.blocks.items - call.left_over :, :] = beyond

    factor = _move_to_new_largest(state)
    if weighted_ref is not None:
        weighted_ref[...] = factor[:1] * weighted_ref[...]

    @pl.when(step == call.item_blocks - 1)
    def _() -> None:
        each(_ALONE, exponentials)
        add_weighted(turn)
        largest_ref[...] = state.running[:1]
        total_ref[...] = state.total[...].sum(0, keepdims=True)
        target_ref[...] = state.target[...].sum(0, keepdims=True)


def _move_to_new_largest(state: _State) -> Any:
    """Moves what was summed so far to the new maximum; gives the factor that does it."""
    before = state.running[...]
    largest = jnp.maximum(before, state.largest[...].max(0, keepdims=True))
    shift = jnp.where(largest == -jnp.inf, _F32(0), largest)
    factor = jnp.exp(before - shift)
    state.running[...] = largest
    state.shift[...] = shift
    state.total[...] = factor * state.total[...]
    return factor


def _fill(call: _Call, state: _State, table_ref: Any, bias_ref: Any, each: Any, step: Any) -> None:
    """This block of the table; beyond the items zeros, and logits of -inf."""
    turn, left = step % 2, call.items - step * call.blocks.items
    rows: Any = slice(None, call.width) if call.sided else slice(None)
    state.items[turn, rows, :] = table_ref[...]

    def side(size: int, start: Any) -> None:
        columns = pl.ds(pl.multiple_of(start, size), size)
        inside = lax.broadcasted_iota(jnp.int32, (1, size), 1) < left - start
        bias = _F32(0) if bias_ref is None else bias_ref[:, columns]
        bias = jnp.where(inside, bias, _F32(sides.LOWEST))
        sides.fill_side(state.items.at[turn, :, columns], call.width, sides.of_items(size, bias))

    if call.sided and call.biased:
        each(call.blocks.chunk, side)
    elif call.sided:

        @pl.when((step < 2) | (step == call.item_blocks - 1))
        def _() -> None:
            # Otherwise as it was two blocks before.
            each(call.blocks.chunk, side)

    if call.left_over:

        @pl.when(step == call.item_blocks - 1)
        def _() -> None:
            end = slice(call.blocks.items - call.left_over, None)
            place: Any = (turn, rows, end) if call.sided else (turn, end, slice(None))
            if call.sided or call.biased:
                state.items[place] = jnp.zeros_like(state.items[place])
            else:
                # Whose logits are no larger than the largest.
                row = state.items[turn, :1, :]
                state.items[place] = jnp.broadcast_to(row, (call.left_over, call.width))


def _spread_bias(state: _State, bias_ref: Any, left: Any, size: int, start: Any) -> None:
    """That of some items, into all lanes; -inf beyond the items."""
    of_items = pl.ds(pl.multiple_of(start, size), size)
    inside = lax.broadcasted_iota(jnp.int32, (1, size), 1) < left - start
    state.bias[of_items, :] = column(jnp.where(inside, bias_ref[:, of_items], _F32(-jnp.inf)))


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
    labels_ref: Any,
    block: Any,
    turn: Any,
    size: int,
    start: Any,
) -> None:
    """Of some items of this block, whose first one is `block`."""
    item, of_items = block + start, pl.ds(pl.multiple_of(start, size), size)
    ids = across(state.ids[:size, :], call.blocks.positions)
    if call.sided:
        rows = state.items[turn, :, of_items]
        logits = product(rows, state.positions[...], (0, 0), call.precision)
    else:
        rows = state.items[turn, of_items, :]
        logits = product(rows, hidden_ref[...], (1, 1), call.precision)
        if call.biased:
            logits += across(state.bias[of_items, :], call.blocks.positions)
    state.logits[of_items, :] = logits
    parts, hits = by_sublane(logits), by_sublane(ids == labels_ref[...] - item)
    state.largest[...] = jnp.maximum(state.largest[...], parts.max(0))
    state.target[...] += jnp.where(hits, parts, _F32(0)).sum(0)


def _add_weighted(
    call: _Call, state: _State, weighted_ref: Any, turn: Any, size: int, start: Any
) -> None:
    """The weighted item rows of some items of a block."""
    of_items = pl.ds(pl.multiple_of(start, size), size)
    if call.sided:
        rows, axis = state.items[turn, : call.width, of_items], 1
    else:
        rows, axis = state.items[turn, of_items, :], 0
    weighted_ref[...] += product(rows, state.weights[of_items, :], (axis, 0), call.precision)
