"""The backward kernel.

Keys lie along sublanes, queries along lanes, so that of the three products with a square only that
for the gradient of the queries needs it transposed. The outer blocks are of keys. Their gradients
are complete when all query blocks have passed; those of a query block when its own key block has,
which is the last one that the queries see.

For a pair of blocks: the biases of all tiles; head by head the squares of weights and of their
gradients, and the products with them; then the gradients of the tables, of all heads together.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxrec_kernels import LANES
from jaxrec_kernels.generations import V5E
from jaxrec_kernels.hstu_attention import facts as _facts
from jaxrec_kernels.hstu_attention import tile as _tile
from jaxrec_kernels.hstu_attention.biases import (
    clean,
    cleaned,
    fill_lag_tiles,
    sides,
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
from jaxrec_kernels.hstu_attention.plan import BACKWARD, BUCKETS, SUBLANES, Plan, up_to
from jaxrec_kernels.hstu_attention.step import (
    Index,
    Settings,
    Step,
    over_bundles,
    over_chunks,
    over_spans,
    over_tiles,
    settings_of,
    slots,
)
from jaxrec_kernels.tuning import device_kind

# Buckets whose gradients are summed in one pass over a tile.
_AT_ONCE = 4

Gradients = tuple[Array, Array, Array]
BiasGradients = tuple[Array | None, Array | None, Array | None]


def backward(
    inputs: Any,
    d_out: Float[Array, "batch length heads value_dim"],
    *,
    scale: float,
    normalizer: float,
    edges: tuple[int, ...],
    plan: Plan | None = None,
    interpret: Any = False,
) -> tuple[Gradients, BiasGradients]:
    """Gradients of query, key and value, and in float32 of the biases by distance, of candidates
    and by time.

    Arguments as of `forward`; what stands in invalid slots of `d_out` is read by nobody.
    """
    settings = settings_of(BACKWARD, inputs, scale, normalizer, plan, queries_down=False)
    query, key, value = inputs.query, inputs.key, inputs.value
    batch, length, heads, _ = query.shape
    operands = Operands(settings, batch, heads)
    operands.add_common(inputs, edges)
    add_lanes(settings, operands)
    for name, x, of_keys in (
        ("query", query, False),
        ("key", key, True),
        ("value", value, True),
        ("d_out", d_out, False),
    ):
        operands.inputs[name] = Operand(flat(x), operands.vectors(x.shape[3], of_keys))
    # The gradient of a query block is written where that of its own key block is.
    for name, x in (("d_query", query), ("d_key", key), ("d_value", value)):
        operands.outputs[name] = Operand(flat_like(x), operands.vectors(x.shape[3], of_keys=True))
    _add_table_outputs(settings, operands, batch, heads // settings.plan.group)
    _add_scratch(settings, operands, query.dtype, value.dtype, d_out.dtype)
    found = operands.call(partial(_body, settings), BACKWARD, interpret)

    gradients = (
        found.d_query.reshape(query.shape),
        found.d_key.reshape(key.shape),
        found.d_value.reshape(value.shape),
    )
    d_distance = d_candidate = d_time = None
    if settings.lags:
        d_distance = _facts.lag_tiles_gradient(found.d_lags, length) / normalizer
    if settings.fields.bias is not None:
        d_candidate = found.d_candidate.sum((1, 2))[:, :length] / normalizer
    if settings.times:
        by_bucket = found.d_times.sum((1, 2)) / normalizer
        d_time = _facts.time_row_gradient(by_bucket, inputs.time_table.shape[0])
    return gradients, (d_distance, d_candidate, d_time)


def _add_table_outputs(settings: Settings, operands: Operands, batch: int, groups: int) -> None:
    plan = settings.plan

    def add(name: str, *shape: int) -> None:
        struct = jax.ShapeDtypeStruct(shape, jnp.float32)
        operands.outputs[name] = Operand(struct, operands.everywhere(shape))

    if settings.lags:
        add("d_lags", plan.distances, LANES, LANES)
    if settings.times:
        add("d_times", BUCKETS, SUBLANES, LANES)
    if settings.fields.bias is not None:
        struct = jax.ShapeDtypeStruct((batch, groups, 1, plan.filled), jnp.float32)
        block = (plan.sequences, None, 1, plan.chunks * LANES)
        operands.outputs["d_candidate"] = Operand(
            struct, operands.block(block, lambda b, g, i, j: (b, g, 0, j))
        )


def _add_scratch(
    settings: Settings, operands: Operands, query: Any, value: Any, d_out: Any
) -> None:
    plan, add = settings.plan, operands.add_row_scratch
    rows, lanes = up_to(plan.block, SUBLANES), plan.chunks * LANES
    query_width, value_width = plan.group * settings.head_dim, plan.group * settings.value_dim
    add("weights", rows, lanes, dtype=value)
    add("d_scores", rows, lanes, dtype=query)
    if settings.lags or settings.times:
        add("d_bias", rows, lanes)
    if settings.times:
        add("buckets", rows, lanes, dtype=jnp.int32)
        add("limits", 2, plan.chunks, plan.chunks, LANES, dtype=jnp.int32)
    if settings.fields.bias is not None:
        add("by_candidates", plan.block, LANES)
    if settings.holes:
        add("clean_query", plan.block, query_width, dtype=query)
        add("clean_key", plan.block, query_width, dtype=query)
        add("clean_d_out", plan.block, value_width, dtype=d_out)
    for total in _sums(settings):
        total.add_scratch(operands)


class _Sums(NamedTuple):
    query: Sum
    key: Sum
    value: Sum


def _sums(settings: Settings) -> _Sums:
    plan, head_dim = settings.plan, settings.head_dim
    factor = settings.scale / settings.normalizer
    # That of the queries is of all blocks: a key block adds to its own and those behind it.
    blocks = None if plan.whole else plan.blocks
    return _Sums(
        Sum(plan, "d_query", head_dim, factor, blocks),
        Sum(plan, "d_key", head_dim, factor),
        Sum(plan, "d_value", settings.value_dim, 1 / settings.normalizer),
    )


def _body(settings: Settings, refs: Any) -> None:
    plan, sums = settings.plan, _sums(settings)
    step = Step(settings, refs)
    pl.when(first_program(plan))(lambda: _start_tables(step))
    if plan.whole:
        _start_keys(step)
        sums.query.start(step)
        _pair(step)
        sums.query.finish(step)
        _finish_keys(step)
        return

    b, j, i = (pl.program_id(axis) for axis in (0, 2, 3))
    step = step._replace(i=i, j=j)
    pl.when(j == 0)(lambda: sums.query.start(step, row=i))

    @pl.when(i == j)
    def _() -> None:
        _start_keys(step)
        _pair(step)
        sums.query.finish(step, row=j)

    off_diagonal = i > j
    if settings.skips:
        off_diagonal = off_diagonal & meets(refs, plan, b, i, j)
    pl.when(off_diagonal)(lambda: _pair(step._replace(diagonal=False)))
    pl.when(i == plan.blocks - 1)(lambda: _finish_keys(step))


def _start_tables(step: Step) -> None:
    settings, refs = step.settings, step.refs
    zeroed = []
    if settings.lags:
        fill_lag_tiles(step)
        zeroed.append(refs.d_lags)
    if settings.times:
        zeroed.append(refs.d_times)
    if zeroed:
        # Behind the end of a row, too, where nothing is ever written.
        zeroed.append(refs.d_bias)
    for ref in zeroed:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _start_keys(step: Step) -> None:
    spread(step)
    clean(step, None, "key")
    sums = _sums(step.settings)
    sums.key.start(step)
    sums.value.start(step)
    if step.settings.fields.bias is not None:
        ref = step.refs.by_candidates
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _finish_keys(step: Step) -> None:
    sums = _sums(step.settings)
    sums.key.finish(step)
    sums.value.finish(step)
    if step.settings.fields.bias is not None:
        over_chunks(step, partial(_write_candidates, step))


def _write_candidates(step: Step, chunk: Index, size: int, b: Index) -> None:
    # By key on sublanes; its sum over lanes is one over the sublanes of its transpose.
    square = step.refs.by_candidates[b, slots(chunk, size)]
    square = jnp.pad(square, ((0, LANES - size), (0, 0)))
    step.refs.d_candidate[b, :, slots(chunk, LANES)] = square.T.sum(0, keepdims=True)


def _pair(step: Step) -> None:
    settings, refs, plan = step.settings, step.refs, step.plan
    # In a whole row the queries are the keys, of which it is known already who is there.
    clean(step, None if plan.whole else refs.queries, "query", "d_out")
    write_biases(step)
    biased = settings.lags or settings.times
    if biased and plan.group > 1:
        over_tiles(step, partial(_start_bias, step))

    def bundle(w: Index) -> None:
        for head in range(plan.bundle):
            over_spans(step, partial(_squares, step, w, head), widest=_widest())
            over_spans(step, partial(_keys, step, w, head))
            turned = step._replace(settings=settings._replace(queries_down=True))
            over_spans(turned, partial(_queries, step, w, head))

    over_bundles(step, bundle)
    if settings.lags:
        over_tiles(step, partial(_lags, step))
    if settings.times:
        over_tiles(step, partial(_times, step))


def _widest() -> int:
    """Lanes of scores that fit the registers with all that is formed of them.

    By the schedules: from a v6e on more come out of the matrix units than can be held.
    """
    return 2 * LANES if device_kind() in V5E else LANES


def _start_bias(step: Step, down: Index, along: Index, size: int, b: Index) -> None:
    at = (b, slots(down, size), slots(along, LANES))
    step.refs.d_bias[at] = jnp.zeros((size, LANES), jnp.float32)


def _squares(
    step: Step, w: Index, head: int, down: Index, size: int, along: slice, b: Index
) -> None:
    """The weights and the gradient of the scores, both transposed."""
    settings, refs, rows = step.settings, step.refs, slots(down, size)
    at = (b, rows, along)
    own = head_of(step, w, head, "query")
    key = own.only(refs.key[b, rows, own.registers])
    score = _tile.dot(key, refs.query[b, along, own.registers], (1, 1))
    bias = refs.bias[at]
    seen = bias != _tile.HIDDEN
    weight, slope = _tile.weight_and_slope(_tile.scaled(score, settings.scale) + bias)
    refs.weights[at] = jnp.where(seen, weight, 0.0).astype(refs.weights.dtype)

    own = head_of(step, w, head, "value")
    value = own.only(refs.value[b, rows, own.registers])
    d_weight = _tile.dot(value, refs.d_out[b, along, own.registers], (1, 1))
    d_score = jnp.where(seen, d_weight * slope, 0.0)
    refs.d_scores[at] = d_score.astype(refs.d_scores.dtype)
    if not (settings.lags or settings.times):
        return
    if step.plan.group == 1:
        refs.d_bias[at] = d_score
    else:
        refs.d_bias[at] += d_score


def _keys(step: Step, w: Index, head: int, down: Index, size: int, along: slice, b: Index) -> None:
    settings, refs, rows = step.settings, step.refs, slots(down, size)
    sums = _sums(settings)
    own = head_of(step, w, head, "value")
    d_out = cleaned(step, "d_out")[b, along, own.registers]
    d_value = own.only(_tile.dot(refs.weights[b, rows, along], d_out, (1, 0)))
    sums.value.add(step, range(head, head + 1), (b, rows, own.registers), d_value)

    own = head_of(step, w, head, "query")
    query = cleaned(step, "query")[b, along, own.registers]
    d_key = own.only(_tile.dot(refs.d_scores[b, rows, along], query, (1, 0)))
    sums.key.add(step, range(head, head + 1), (b, rows, own.registers), d_key)


def _queries(
    step: Step, w: Index, head: int, chunk: Index, size: int, keys: slice, b: Index
) -> None:
    """A chunk of queries, which lies along lanes, and all keys that it sees."""
    own = head_of(step, w, head, "query")
    d_score = step.refs.d_scores[b, keys, slots(chunk, size)]
    key = cleaned(step, "key")[b, keys, own.registers]
    d_query = own.only(_tile.dot(d_score, key, (0, 0)))
    at = (b, slots(chunk, size), own.registers)
    row = None if step.plan.whole else step.i
    _sums(step.settings).query.add(step, range(head, head + 1), at, d_query, row)


def _lags(step: Step, down: Index, along: Index, size: int, b: Index) -> None:
    refs = step.refs
    d_bias = refs.d_bias[b, slots(down, size), slots(along, LANES)]
    if step.settings.fields.bias is not None:
        queries, _ = sides(step, down, along, size, b)
        of_candidates = jnp.where(_tile.is_candidate(queries), d_bias, 0.0)
        refs.by_candidates[b, slots(down, size)] += of_candidates
        d_bias = d_bias - of_candidates
    refs.d_lags[step.chunks_apart(down, along), :size] += d_bias


def _times(step: Step, down: Index, along: Index, size: int, b: Index) -> None:
    """Adds the gradients of a tile to those of their buckets, some buckets at a time.

    There is no scatter on a TPU; a bucket costs a comparison, a selection and an addition a pair.
    Only those between the least and the largest of the tile are gone through.
    """
    refs = step.refs
    first = refs.limits[b, 0, down, pl.ds(along, 1)].min()
    last = refs.limits[b, 1, down, pl.ds(along, 1)].max()

    # Whole registers: what is behind the end of a row has no gradient.
    at = (b, slots(down, up_to(size, SUBLANES)), slots(along, LANES))

    def some(turn: Index, carry: int) -> int:
        buckets, d_bias = refs.buckets[at], refs.d_bias[at]
        for k in range(_AT_ONCE):
            bucket = first + turn * _AT_ONCE + k
            mine = jnp.where(buckets == bucket, d_bias, 0.0)
            refs.d_times[bucket] += mine.reshape(-1, SUBLANES, LANES).sum(0)
        return carry

    # None for a tile in which nobody sees anybody.
    turns = lax.div(jnp.maximum(last - first, -_AT_ONCE) + _AT_ONCE, _AT_ONCE)
    lax.fori_loop(0, turns, some, 0)
