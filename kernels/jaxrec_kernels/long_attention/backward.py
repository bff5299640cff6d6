"""The backward kernel on long rows: a block of keys meets the blocks of queries that see it.

One pass gives all three gradients: those of the keys and values of a block add up while its queries
go by, those of the queries of a whole row stay in VMEM until their last block of keys.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels.attention_tile import LOG2E, dot, logits_of, through_softmax
from jaxrec_kernels.generations import V6E
from jaxrec_kernels.long_attention.call import (
    Call,
    Settings,
    Step,
    flat,
    masks_of,
    tiles,
    to_slabs,
)
from jaxrec_kernels.long_attention.plan import by_key, plan_of
from jaxrec_kernels.slot_ids import NOBODY
from jaxrec_kernels.tuning import device_kind

_F32 = jnp.float32


class Gradients(NamedTuple):
    query: Array
    key: Array
    value: Array


def backward(
    query: Array,
    key: Array,
    value: Array,
    ids: Array | None,
    seeds: Array | None,
    out: Array,
    log_sum_exp: Array,
    d_out: Array,
    *,
    factor: float,
    dropout_rate: float,
    interpret: Any = False,
) -> Gradients:
    """Gradients of queries, keys and values; arguments as of `forward`, and its results."""
    plan = plan_of(query)
    settings = Settings(plan, factor, dropout_rate)
    call = Call(settings, masks_of(plan, ids), by_key(plan.blocks, plan.blocks - 1))
    call.read_seeds(seeds)
    for name, x, of_queries in (
        ("q", query, True),
        ("k", key, False),
        ("v", value, False),
        ("do", d_out, True),
    ):
        call.read(name, flat(x), *call.wide(of_queries=of_queries))
    delta = jnp.swapaxes((out.astype(_F32) * d_out.astype(_F32)).sum(-1), 1, 2)
    statistics = {"lse": log_sum_exp * _F32(LOG2E), "delta": delta}
    if ids is not None:
        # What stands in padding may be NaN, and times zero still is.
        here = (ids != NOBODY)[:, None]
        statistics = {name: jnp.where(here, x, _F32(0)) for name, x in statistics.items()}
    for name, x in statistics.items():
        call.read(name, to_slabs(plan, x), *call.statistics())
    for name, x in (("dq", query), ("dk", key), ("dv", value)):
        # That of the queries of the keys' block is whole once its own keys were there.
        shape = jax.ShapeDtypeStruct(flat(x).shape, x.dtype)
        call.write(name, shape, *call.wide(of_queries=False))
    across = (plan.block, plan.lanes)
    call.scratch |= {
        "query": pltpu.VMEM(across, query.dtype),
        "d_out": pltpu.VMEM(across, d_out.dtype),
        "key": pltpu.VMEM(across, key.dtype),
        "value": pltpu.VMEM(across, value.dtype),
        "key_down": pltpu.VMEM((plan.lanes, plan.block), key.dtype),
        "d_key": pltpu.VMEM(across, _F32),
        "d_value": pltpu.VMEM(across, _F32),
        "d_query": pltpu.VMEM((plan.blocks, plan.lanes, plan.block), _F32),
    }
    found = call.run(_step, "long_attention_backward", interpret)
    shaped = (found[name].reshape(query.shape) for name in ("dq", "dk", "dv"))
    return Gradients(*shaped)


def _step(step: Step) -> None:
    refs, i, j = step.refs, step.query_block, step.key_block

    def start() -> None:
        step.fill_key_ids()
        for name in ("key", "value"):
            refs[name][...] = step.clean_keys(name[0])
        refs["key_down"][...] = jnp.transpose(refs["key"][...])
        for name in ("d_key", "d_value"):
            refs[name][...] = jnp.zeros_like(refs[name])

    def start_queries() -> None:
        zero = refs["d_query"].at[i]
        zero[...] = jnp.zeros_like(zero)

    def own_queries() -> None:
        _pair(step, diagonal=True)
        _write_queries(step)

    def finish() -> None:
        # Keys carry the factor of the logits where that is 1, in units of log 2.
        units = step.settings.factor / LOG2E
        refs["dk"][0] = (refs["d_key"][...] * _F32(units)).astype(refs["dk"].dtype)
        refs["dv"][0] = refs["d_value"][...].astype(refs["dv"].dtype)

    step.when(i == j, start)
    step.when(j == 0, start_queries)
    step.when(i == j, own_queries)
    step.when((j < i) & step.meets(), partial(_pair, step, diagonal=False))
    step.when(i == step.plan.blocks - 1, finish)


def _write_queries(step: Step) -> None:
    refs, units = step.refs, step.settings.factor / LOG2E
    for queries in tiles(0, step.plan.block):
        down = refs["d_query"][step.query_block, :, queries]
        refs["dq"][0, queries] = (jnp.transpose(down) * _F32(units)).astype(refs["dq"].dtype)


def _pair(step: Step, diagonal: bool) -> None:
    refs = step.refs
    step.fill_query_ids()
    refs["query"][...] = step.clean_queries("q")
    refs["d_out"][...] = step.clean_queries("do")
    number = 0
    for queries in tiles(0, step.plan.block):
        for head in range(step.plan.slab_heads):
            number += 1
            step.alone(number, partial(_member, step, head, queries, diagonal))


def _member(step: Step, head: int, queries: slice, diagonal: bool) -> None:
    refs, own, one = step.refs, step.plan.lanes_of(head), slice(head, head + 1)
    query, d_out = (step.member(head, refs[name][queries]) for name in ("query", "d_out"))
    lse, delta = (refs[name][0, 0, one, queries] for name in ("lse", "delta"))
    total = refs["d_query"][step.query_block, own, queries]
    # The schedules of a v6e have fewer cycles so, and nothing spilled; those of a v5e more.
    keys_first = device_kind() in V6E
    for keys in tiles(0, queries.stop if diagonal else step.plan.block):
        mask = step.mask(keys, queries, diagonal and keys.start == queries.start)
        logits = logits_of(refs["key"][keys], query, step.settings.factor, mask)
        d_weights = dot(refs["value"][keys], d_out, (1, 1))
        keep = step.keep(keys, queries, head)
        weights, d_logits = through_softmax(logits, lse, d_weights, delta, keep)
        d_logits = d_logits.astype(query.dtype)
        sums = [
            ("d_value", weights.astype(d_out.dtype), d_out),
            ("d_key", d_logits, query),
        ]
        if keys_first:
            sums.reverse()
        for name, x, y in sums:
            refs[name][keys] += dot(x, y, (1, 0))
        total = total + dot(refs["key_down"][own, keys], d_logits, (1, 0))
    refs["d_query"][step.query_block, own, queries] = total
