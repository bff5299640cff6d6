"""The causal mix of long rows: products with blocks of its operator, and the operator's gradient.

Of taps, the block (i, j) of the operator is the tile `i - j`: a call reads as many tiles as there
are blocks in a row, and nothing of size [length, length] exists. A full factor is cut in blocks.
Heads that share an operator lie side by side, so that its product with them fills the lanes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import LANES
from jaxrec_kernels.attention_tile import dot
from jaxrec_kernels.long_attention.call import Call, Settings, Step, flat, masks_of, tiles
from jaxrec_kernels.long_attention.plan import Plan, by_distance, by_key, by_query, plan_of
from jaxrec_kernels.slot_ids import same

_F32 = jnp.float32
# Of heads that share an operator; of their sums, so many at once stay in registers.
_MOST_LANES, _LANES_AT_ONCE, _ROWS_AT_ONCE = 1024, 256, 256


class Operator(NamedTuple):
    """A lower-triangular operator in blocks.

    `blocks` is [distances, groups, block, block] of taps, or [groups, padded, padded] of a full
    factor, with a group for all heads or one a head; entries above the diagonal are zero, or
    anything in a gradient.
    """

    blocks: Array
    band: int  # entries further below the diagonal are zero
    segmented: bool  # entries between different ids are zero

    @property
    def toeplitz(self) -> bool:
        return self.blocks.ndim == 4

    @property
    def groups(self) -> int:
        return self.blocks.shape[1 if self.toeplitz else 0]

    def reach(self, plan: Plan) -> int:
        """How many blocks back the band reaches."""
        return min(plan.blocks - 1, -(-(self.band - 1) // plan.block))

    def plan(self, x: Any) -> Plan:
        return plan_of(x, _MOST_LANES if self.groups == 1 else LANES)

    def place(self, plan: Plan, *, turned: bool = False) -> tuple[tuple[int, ...], Any]:
        """The shape of a block, and where it lies; `turned`: of the operator transposed."""
        heads = plan.slab_heads if self.groups > 1 else 1
        square = (heads, plan.block, plan.block)
        shared = self.groups == 1
        if self.toeplitz:
            return (1, *square), lambda row, slab, i, j: (i - j, 0 if shared else slab, 0, 0)
        return square, lambda row, slab, i, j: (
            0 if shared else slab,
            *((j, i) if turned else (i, j)),
        )


def mix(
    operator: Operator,
    x: Array,
    ids: Array | None,
    *,
    factor: float = 1.0,
    interpret: Any = False,
) -> Array:
    """`out[j] = factor sum_{k <= j} T[j, k] x[k]` of [batch, length, heads, head_dim].

    Args:
      operator: T.
      x: rows of nobody hold anything.
      ids: int32[batch, length], NOBODY for padding, whose result is zero.
      factor: taken before the result is rounded.
      interpret: as in `pallas_call`.
    """
    return _mix(operator, x, ids, factor, turned=False, interpret=interpret)


def mix_turned(
    operator: Operator,
    x: Array,
    ids: Array | None,
    *,
    factor: float = 1.0,
    interpret: Any = False,
) -> Array:
    """`out[k] = factor sum_{j >= k} T[j, k] x[j]`; the rest as of `mix`."""
    return _mix(operator, x, ids, factor, turned=True, interpret=interpret)


def _mix(
    operator: Operator, x: Array, ids: Array | None, factor: float, *, turned: bool, interpret: Any
) -> Array:
    plan = operator.plan(x)
    reach = operator.reach(plan)
    masks = masks_of(plan, ids)
    order = (by_key if turned else by_query)(plan.blocks, reach)
    call = Call(Settings(plan, factor, 0.0), masks, order)
    blocks = operator.blocks.astype(x.dtype)
    blocks = jnp.swapaxes(blocks, -1, -2) if turned else blocks
    call.read("x", flat(x), *call.wide(of_queries=turned))
    call.read("operator", blocks, *operator.place(plan, turned=turned))
    out = jax.ShapeDtypeStruct(flat(x).shape, x.dtype)
    call.write("out", out, *call.wide(of_queries=not turned))
    call.scratch["sum"] = pltpu.VMEM((plan.block, plan.lanes), _F32)
    call.scratch["clean"] = pltpu.VMEM((plan.block, plan.lanes), x.dtype)
    body = partial(_mix_step, operator._replace(blocks=blocks), reach, turned)
    name = "causal_mix_turned" if turned else "causal_mix"
    found = call.run(body, name, interpret)
    return found["out"].reshape(x.shape)


def _mix_step(operator: Operator, reach: int, turned: bool, step: Step) -> None:
    refs, i, j = step.refs, step.query_block, step.key_block

    def start() -> None:
        refs["sum"][...] = jnp.zeros_like(refs["sum"])

    def finish() -> None:
        out = refs["sum"][...]
        if step.settings.factor != 1.0:
            out = out * _F32(step.settings.factor)
        if step.masked:
            out = (step.key_ids if turned else step.query_ids).clean(out)
        refs["out"][0] = out.astype(refs["out"].dtype)

    add = partial(_add, operator, turned, step)

    def begin_with_own() -> None:
        start()
        add(diagonal=True)

    def end_with_own() -> None:
        add(diagonal=True)
        finish()

    off_diagonal = (j < i) & step.meets() if operator.segmented else j < i
    if turned:
        step.when(i == j, begin_with_own)
        step.when(off_diagonal, partial(add, diagonal=False))
        step.when(i == jnp.minimum(j + reach, step.plan.blocks - 1), finish)
    else:
        step.when(j == jnp.maximum(i - reach, 0), start)
        step.when(off_diagonal, partial(add, diagonal=False))
        step.when(i == j, end_with_own)


def _add(operator: Operator, turned: bool, step: Step, *, diagonal: bool) -> None:
    plan = step.plan
    fill = [step.fill_query_ids, step.fill_key_ids]
    cleaned, other = fill if turned else fill[::-1]
    cleaned()
    # The block that is summed is the same up to the diagonal, or from it on.
    if operator.segmented or diagonal:
        other()
    if step.masked:
        step.write_clean("x", "clean", of_queries=turned)
    for number, rows in enumerate(tiles(0, plan.block)):
        across = slice(0, plan.block)
        if diagonal:
            across = slice(rows.start, plan.block) if turned else slice(0, rows.stop)
        run = partial(_add_rows, operator, turned, step, rows, across)
        step.alone(number, run)


def _add_rows(operator: Operator, turned: bool, step: Step, rows: slice, across: slice) -> None:
    refs, plan = step.refs, step.plan
    x = refs["clean"] if step.masked else refs["x"].at[0]
    for head in range(plan.slab_heads if operator.groups > 1 else 1):
        at = (0, head) if operator.toeplitz else (head,)
        part = refs["operator"][(*at, rows, across)]
        if operator.segmented:
            ids = (step.query_ids, step.key_ids)
            down, along = ids[::-1] if turned else ids
            part = jnp.where(same(down, rows, along, across), part, jnp.zeros((), part.dtype))
        for start in range(0, plan.lanes, _LANES_AT_ONCE):
            lanes = slice(start, min(start + _LANES_AT_ONCE, plan.lanes))
            mine = x[across, lanes]
            if operator.groups > 1:
                mine = step.member(head, mine)
            refs["sum"][rows, lanes] += dot(part, mine, (1, 0))


def operator_gradient(
    operator: Operator, x: Array, g: Array, ids: Array | None, *, interpret: Any = False
) -> Array:
    """`dT[j, k] = <g[j], x[k]>` for `k <= j`, float32 in blocks as the operator is.

    Above the diagonal, and beyond the band, it is anything.
    """
    plan = operator.plan(x)
    axes = ("slab", "pair", "row") if operator.groups > 1 else ("pair", "row", "slab")
    call = Call(
        Settings(plan, 1.0, 0.0),
        masks_of(plan, ids),
        by_distance(plan.blocks, operator.reach(plan)),
        axes,
    )
    call.read("x", flat(x), *call.wide(of_queries=False))
    call.read("g", flat(g), *call.wide(of_queries=True))
    out = jax.ShapeDtypeStruct(operator.blocks.shape, _F32)
    call.write("out", out, *operator.place(plan))
    clean = pltpu.VMEM((plan.block, plan.lanes), x.dtype)
    call.scratch |= {"clean_x": clean, "clean_g": clean}
    body = partial(_gradient_step, operator)
    found = call.run(body, "causal_mix_gradient", interpret)
    return found["out"]


def _gradient_step(operator: Operator, step: Step) -> None:
    refs, i, j = step.refs, step.query_block, step.key_block
    # The first pair at this distance, or of this block of a full factor.
    first = step.row == 0
    if operator.toeplitz:
        first = first & (j == 0)
    if operator.groups == 1:
        first = first & (step.slab == 0)

    def start() -> None:
        refs["out"][...] = jnp.zeros_like(refs["out"])

    off_diagonal = (j < i) & step.meets() if operator.segmented else j < i
    step.when(first, start)
    step.when(off_diagonal, partial(_add_outer, operator, step, diagonal=False))
    step.when(i == j, partial(_add_outer, operator, step, diagonal=True))


def _add_outer(operator: Operator, step: Step, *, diagonal: bool) -> None:
    plan = step.plan
    step.fill_query_ids()
    step.fill_key_ids()
    if step.masked:
        step.write_clean("x", "clean_x", of_queries=False)
        step.write_clean("g", "clean_g", of_queries=True)
    number = 0
    for columns in tiles(0, plan.block):
        for head in range(plan.slab_heads if operator.groups > 1 else 1):
            for start in range(columns.start if diagonal else 0, plan.block, _ROWS_AT_ONCE):
                rows = slice(start, min(start + _ROWS_AT_ONCE, plan.block))
                number += 1
                run = partial(_add_outer_part, operator, step, head, rows, columns)
                step.alone(number, run)


def _add_outer_part(operator: Operator, step: Step, head: int, rows: slice, columns: slice) -> None:
    refs = step.refs
    x, g = (refs[f"clean_{name}"] if step.masked else refs[name].at[0] for name in ("x", "g"))
    g = g[rows]
    if operator.groups > 1:
        g = step.member(head, g)
    at = (0, head) if operator.toeplitz else (head,)
    part = dot(g, x[columns], (1, 1))
    if operator.segmented:
        mine = same(step.query_ids, rows, step.key_ids, columns)
        part = jnp.where(mine, part, _F32(0))
    refs["out"][(*at, rows, columns)] += part
