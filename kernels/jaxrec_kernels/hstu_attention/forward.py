"""The forward kernel.

The outer blocks are of queries. For a pair of blocks: the biases of all tiles, then head by head
the weights of a chunk of queries for all keys, and their product with the values.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxrec_kernels import LANES
from jaxrec_kernels.generations import V5E
from jaxrec_kernels.hstu_attention import tile as _tile
from jaxrec_kernels.hstu_attention.biases import (
    clean,
    cleaned,
    fill_lag_tiles,
    spread,
    write_biases,
)
from jaxrec_kernels.hstu_attention.heads import Sum, add_lanes, head_of
from jaxrec_kernels.hstu_attention.operands import (
    Operand,
    Operands,
    first_program,
    flat,
    flat_like,
    meets,
)
from jaxrec_kernels.hstu_attention.plan import FORWARD, Plan
from jaxrec_kernels.hstu_attention.step import (
    Index,
    Settings,
    Step,
    over_bundles,
    over_spans,
    settings_of,
    slots,
)
from jaxrec_kernels.tuning import device_kind


def forward(
    inputs: Any,
    *,
    scale: float,
    normalizer: float,
    edges: tuple[int, ...],
    plan: Plan | None = None,
    interpret: Any = False,
) -> Float[Array, "batch length heads value_dim"]:
    """The output; rows of invalid slots are zero.

    Args:
      inputs: an object with the fields of `Inputs` of the op's core; what stands in invalid slots
        is read by nobody.
      scale, normalizer: as in the op.
      edges: the least difference of each bucket from 1 on.
      plan: by default `tuned_plan`.
      interpret: as in `pl.pallas_call`.
    """
    settings = settings_of(FORWARD, inputs, scale, normalizer, plan, queries_down=True)
    query, key, value = inputs.query, inputs.key, inputs.value
    operands = Operands(settings, query.shape[0], query.shape[2])
    operands.add_common(inputs, edges)
    add_lanes(settings, operands)
    for name, x, of_keys in (("query", query, False), ("key", key, True), ("value", value, True)):
        operands.inputs[name] = Operand(flat(x), operands.vectors(x.shape[3], of_keys))
    operands.outputs["out"] = Operand(
        flat_like(value), operands.vectors(settings.value_dim, of_keys=False)
    )
    _out(settings).add_scratch(operands)
    if settings.holes:
        width = settings.plan.group * settings.value_dim
        operands.add_row_scratch("clean_value", settings.plan.block, width, dtype=value.dtype)
    found = operands.call(partial(_body, settings), FORWARD, interpret)
    return found.out.reshape(value.shape)


def _out(settings: Settings) -> Sum:
    widest = _widest()
    in_parts = widest is not None and settings.plan.block > widest
    factor = 1 / settings.normalizer
    return Sum(settings.plan, "out", settings.value_dim, factor, in_parts=in_parts)


def _widest() -> int | None:
    """Lanes of scores that are weighted together; None: all.

    By the schedules: the masks of more are spilled on a v6e, and are not on a v5e.
    """
    return None if device_kind() in V5E else 2 * LANES


def _body(settings: Settings, refs: Any) -> None:
    plan, out = settings.plan, _out(settings)
    step = Step(settings, refs)
    if settings.lags:
        pl.when(first_program(plan))(lambda: fill_lag_tiles(step))
    if plan.whole:
        spread(step)
        out.start(step)
        _pair(step)
        out.finish(step)
        return

    b, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
    step = step._replace(i=i, j=j)

    @pl.when(j == 0)
    def _() -> None:
        spread(step)
        out.start(step)

    off_diagonal = j < i
    if settings.skips:
        off_diagonal = off_diagonal & meets(refs, plan, b, i, j)
    pl.when(off_diagonal)(lambda: _pair(step._replace(diagonal=False)))

    @pl.when(j == i)
    def _() -> None:
        _pair(step)
        out.finish(step)


def _pair(step: Step) -> None:
    # In a whole row the keys are the queries, of which it is known already who is there.
    clean(step, None if step.plan.whole else step.refs.keys, "value")
    write_biases(step)

    def bundle(w: Index) -> None:
        for head in range(step.plan.bundle):
            over_spans(step, partial(_head, step, w, head), widest=_widest())

    over_bundles(step, bundle)


def _head(step: Step, w: Index, head: int, down: Index, size: int, along: slice, b: Index) -> None:
    settings, refs, rows = step.settings, step.refs, slots(down, size)
    own = head_of(step, w, head, "query")
    query = own.only(refs.query[b, rows, own.registers])
    score = _tile.dot(query, refs.key[b, along, own.registers], (1, 1))
    bias = refs.bias[b, rows, along]
    weight = _tile.weight(_tile.scaled(score, settings.scale) + bias)
    weight = jnp.where(bias != _tile.HIDDEN, weight, 0.0)

    own = head_of(step, w, head, "value")
    value = cleaned(step, "value")[b, along, own.registers]
    out = own.only(_tile.dot(weight.astype(value.dtype), value, (1, 0)))
    _out(settings).add(step, head, (b, rows, own.registers), out)
