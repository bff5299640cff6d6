"""The forward kernel.

The outer blocks are of queries. For a pair of blocks: the biases of all tiles, then for some heads
at a time the scores of chunks of queries, their weights and the products of these with the values,
which hand over through the chip's memory.
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
from jaxrec_kernels.hstu_attention.heads import Sum, add_lanes
from jaxrec_kernels.hstu_attention.lots import Job, Regions, add_handover, in_stages, over_lots
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
    settings_of,
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
    add_handover(
        settings, operands, _regions(settings.plan), scores=jnp.float32, weights=value.dtype
    )
    if settings.holes:
        width = settings.plan.group * settings.value_dim
        operands.add_row_scratch("clean_value", settings.plan.block, width, dtype=value.dtype)
    found = operands.call(partial(_body, settings), FORWARD, interpret)
    return found.out.reshape(value.shape)


def _out(settings: Settings) -> Sum:
    return Sum(settings.plan, "out", settings.value_dim, 1 / settings.normalizer)


def _regions(plan: Plan) -> Regions:
    if device_kind() in V5E:
        return Regions(tiles=8, lanes=LANES, apart=False)
    return Regions(tiles=16, lanes=2 * LANES, apart=not plan.whole)


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
    over_bundles(step, partial(_bundle, step))


def _bundle(step: Step, w: Index) -> None:
    regions = _regions(step.plan)

    def lot(jobs: list[Job]) -> None:
        stages = (partial(stage, step, w) for stage in (_score, _weigh, _output))
        in_stages(step, regions, jobs, *stages)

    over_lots(step, w, regions, lot)


def _score(step: Step, w: Index, job: Job) -> None:
    refs, members = step.refs, job.side(step, w, "query")
    query = members.stacked(refs.query[job.b, job.rows, members.registers])
    key = refs.key[job.b, job.along, members.registers]
    scores = members.apart(_tile.dot(query, key, (1, 1)))
    refs.scores[job.places, job.rows, job.along] = scores


def _weigh(step: Step, w: Index, job: Job) -> None:
    refs = step.refs
    bias = refs.bias[job.b, job.rows, job.along]
    seen = bias != _tile.HIDDEN
    for place in range(job.places.start, job.places.stop):
        at = (place, job.rows, job.along)
        weight = _tile.weight(_tile.scaled(refs.scores[at], step.settings.scale) + bias)
        refs.weights[at] = jnp.where(seen, weight, 0.0).astype(refs.weights.dtype)


def _output(step: Step, w: Index, job: Job) -> None:
    members = job.side(step, w, "value")
    weights = step.refs.weights[job.places, job.filled, job.along]
    value = cleaned(step, "value")[job.b, job.along, members.registers]
    out = members.summed(_tile.dot(weights.reshape(-1, weights.shape[2]), value, (1, 0)))
    _out(step.settings).add(step, job.heads, (job.b, job.rows, members.registers), out)
