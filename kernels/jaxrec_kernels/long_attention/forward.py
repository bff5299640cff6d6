"""The forward kernel on long rows: a block of queries meets its blocks of keys one by one."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels.attention_tile import MASKED, Softmax, absorb, logits_of
from jaxrec_kernels.long_attention.call import (
    Call,
    Settings,
    Step,
    flat,
    from_slabs,
    masks_of,
    tiles,
)
from jaxrec_kernels.long_attention.plan import by_query, plan_of

_F32 = jnp.float32
# Tiles of keys that are scheduled as one: more take fewer cycles, and spill.
_TOGETHER = 2


def forward(
    query: Array,
    key: Array,
    value: Array,
    ids: Array | None,
    seeds: Array | None,
    *,
    factor: float,
    dropout_rate: float,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Output [batch, length, heads, head_dim] and log-sum-exp float32[batch, heads, length].

    Args:
      query, key, value: [batch, length, heads, head_dim]; rows of nobody hold anything.
      ids: int32[batch, length], NOBODY for padding; an event sees its like.
      seeds: uint32[2], for dropout.
      factor: products of queries and keys times this are logits in units of log 2.
      dropout_rate: of the weights.
      interpret: as in `pallas_call`.
    """
    plan = plan_of(query)
    settings = Settings(plan, factor, dropout_rate)
    call = Call(settings, masks_of(plan, ids), by_query(plan.blocks, plan.blocks - 1))
    call.read_seeds(seeds)
    call.read("q", flat(query), *call.wide(of_queries=True))
    call.read("k", flat(key), *call.wide(of_queries=False))
    call.read("v", flat(value), *call.wide(of_queries=False))
    out = jax.ShapeDtypeStruct(flat(value).shape, value.dtype)
    call.write("o", out, *call.wide(of_queries=True))
    lse = jax.ShapeDtypeStruct((plan.batch, plan.slabs, plan.slab_heads, plan.padded), _F32)
    call.write("lse", lse, *call.statistics())
    row = pltpu.VMEM((plan.slab_heads, plan.block), _F32)
    call.scratch |= {
        "largest": row,
        "total": row,
        "out": pltpu.VMEM((plan.lanes, plan.block), _F32),
        "value_down": pltpu.VMEM((plan.lanes, plan.block), value.dtype),
    }
    found = call.run(_step, "long_attention_forward", interpret)
    return found["o"].reshape(value.shape), from_slabs(plan, found["lse"])


def _step(step: Step) -> None:
    refs, i, j = step.refs, step.query_block, step.key_block

    def start() -> None:
        refs["largest"][...] = jnp.full_like(refs["largest"], MASKED)
        refs["total"][...] = jnp.zeros_like(refs["total"])
        refs["out"][...] = jnp.zeros_like(refs["out"])

    def finish() -> None:
        _pair(step, diagonal=True)
        _finish(step)

    step.when(j == 0, start)
    step.when((j < i) & step.meets(), partial(_pair, step, diagonal=False))
    step.when(j == i, finish)


def _pair(step: Step, diagonal: bool) -> None:
    step.fill_key_ids()
    step.refs["value_down"][...] = jnp.transpose(step.clean_keys("v"))
    number = 0
    for queries, head in itertools.product(tiles(0, step.plan.block), range(step.plan.slab_heads)):
        block = tiles(0, queries.stop if diagonal else step.plan.block)
        for first in range(0, len(block), _TOGETHER):
            number += 1
            some = block[first : first + _TOGETHER]
            step.alone(number, partial(_member, step, head, queries, some, diagonal))


def _member(step: Step, head: int, queries: slice, block: list[slice], diagonal: bool) -> None:
    refs, own, one = step.refs, step.plan.lanes_of(head), slice(head, head + 1)
    query = step.member(head, refs["q"][0, queries])
    state = _state(step, head, queries)
    for keys in block:
        mask = step.mask(keys, queries, diagonal and keys.start == queries.start)
        logits = logits_of(refs["k"][0, keys], query, step.settings.factor, mask)
        keep = step.keep(keys, queries, head)
        state = absorb(state, logits, refs["value_down"][own, keys], keep)
    refs["largest"][one, queries] = state.largest
    refs["total"][one, queries] = state.total
    refs["out"][own, queries] = state.out


def _state(step: Step, head: int, queries: slice) -> Softmax:
    refs, one = step.refs, slice(head, head + 1)
    largest, total = (refs[name][one, queries] for name in ("largest", "total"))
    return Softmax(largest, total, refs["out"][step.plan.lanes_of(head), queries])


def _finish(step: Step) -> None:
    step.fill_query_ids()
    for number, queries in enumerate(tiles(0, step.plan.block)):
        step.alone(number, partial(_finish_queries, step, queries))


def _finish_queries(step: Step, queries: slice) -> None:
    refs, parts = step.refs, []
    for head in range(step.plan.slab_heads):
        state = _state(step, head, queries)
        parts.append(state.out / state.total)
        refs["lse"][0, 0, head : head + 1, queries] = state.log_sum_exp
    out = jnp.transpose(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0))
    if step.masked:
        out = step.query_ids.clean(out, queries)
    refs["o"][0, queries] = out.astype(refs["o"].dtype)
