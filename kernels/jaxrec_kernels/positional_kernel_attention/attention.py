"""Attention of one slab: weights from mixed keys, forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jaxrec_kernels.attention_dropout import keep_bits
from jaxrec_kernels.attention_tile import (
    LOG2E,
    Softmax,
    absorb,
    dot,
    logits_of,
    through_softmax,
    visible,
)
from jaxrec_kernels.positional_kernel_attention.mixing import Mixed, backward_mix, mix_both
from jaxrec_kernels.positional_kernel_attention.slab import Slab, kept, only
from jaxrec_kernels.positional_kernel_attention.spec import Member, key_tiles, query_blocks

_F32 = jnp.float32


class _Weights:
    """How the weights of a member's tile follow from its logits."""

    def __init__(self, slab: Slab, member: Member, first_head: Any, batch_row: Any) -> None:
        self.spec, self.ids = slab.spec, slab.ids[member.row]
        self.seeds: Any = slab.refs.get("seeds")
        # Where the member's rows of weights begin among all of the batch.
        whole = (batch_row + member.row) * self.spec.heads + first_head + member.head
        self.start = whole * self.spec.length

    def visible(self, keys: tuple[int, int], queries: tuple[int, int]) -> Array | None:
        """bool[keys, queries], or None where every query of the tile sees all of its keys."""
        # Tiles of keys and blocks of queries begin at the same slots.
        shape, diagonal = (keys[1] - keys[0], queries[1] - queries[0]), keys[0] == queries[0]
        if self.ids is None:
            return visible(shape, diagonal=diagonal)
        return visible(
            shape,
            diagonal=diagonal,
            key_ids=self.ids.sublanes[slice(*keys)],
            query_ids=self.ids.lanes[:, slice(*queries)],
        )

    def kept(self, keys: tuple[int, int], queries: tuple[int, int]) -> Array | None:
        """float32[keys, queries], the factor of dropout: 0, or 1 / (1 - rate)."""
        rate = self.spec.dropout_rate
        if not rate:
            return None
        query = queries[0] + lax.broadcasted_iota(jnp.int32, (1, queries[1] - queries[0]), 1)
        key = keys[0] + lax.broadcasted_iota(jnp.int32, (keys[1] - keys[0], 1), 0)
        keep = keep_bits(self.seeds[0], self.seeds[1], self.start + query, key, rate)
        return jnp.where(keep, _F32(1 / (1 - rate)), _F32(0))


def forward_slab(slab: Slab, first_head: Any, batch_row: Any) -> None:
    spec = slab.spec
    _, k, v = map(slab.read, "qkv")
    mixed = mix_both(slab, k, v)
    slab.keep("value_down", jnp.transpose(mixed.value[...]))
    for queries in query_blocks(spec.length):
        for member in spec.members:
            weights_of = _Weights(slab, member, first_head, batch_row)
            run = functools.partial(_forward_member, slab, member, queries, mixed, weights_of)
            _alone(batch_row < spec.batch + queries[0] + member.first, run)
        at = slice(*queries)
        slab.write_turned("o", slab.refs[kept("out")][:, : at.stop - at.start], at)


def _forward_member(
    slab: Slab, member: Member, queries: tuple[int, int], mixed: "Mixed", weights_of: _Weights
) -> None:
    spec, refs, at = slab.spec, slab.refs, slice(*queries)
    values = refs[kept("value_down")]
    query = only(spec, [member], refs[kept("q")][at])
    state: Softmax | None = None
    for keys in key_tiles(queries[1]):
        mask = weights_of.visible(keys, queries)
        logits = logits_of(mixed.key[slice(*keys)], query, mixed.factor, mask)
        keep = weights_of.kept(keys, queries)
        state = absorb(state, logits, values[member.lanes, slice(*keys)], keep)
    assert state is not None
    refs[kept("out")][member.lanes, : at.stop - at.start] = state.out / state.total
    refs["lse"][slab.first_row + member.row, member.here, at] = state.log_sum_exp


def backward_slab(slab: Slab, first_head: Any, batch_row: Any) -> None:
    spec, refs = slab.spec, slab.refs
    _, k, v, d_out, out = map(slab.read, ("q", "k", "v", "do", "o"))
    mixed = mix_both(slab, k, v)
    slab.keep("key_down", jnp.transpose(mixed.key[...]))
    d_key, d_value, d_query = (refs[kept(name)] for name in ("d_key", "d_value", "d_query"))
    for sums in (d_key, d_value):
        sums[...] = jnp.zeros_like(sums)
    for queries in query_blocks(spec.length):
        at = slice(*queries)
        products = jnp.transpose(out[at].astype(_F32) * d_out[at].astype(_F32))
        for member in spec.members:
            delta = jnp.sum(products[member.lanes], axis=0, keepdims=True)
            weights_of = _Weights(slab, member, first_head, batch_row)
            run = functools.partial(
                _backward_member, slab, member, queries, mixed, weights_of, delta
            )
            _alone(batch_row < spec.batch + queries[0] + member.first, run)
        # The mixed keys have the logits' factor in them already, in units of log 2.
        units = 1 / LOG2E if spec.logits.groups else spec.scale
        slab.write_turned("dq", d_query[:, : at.stop - at.start] * _F32(units), at)
    backward_mix(slab, "logit", spec.logits, k, d_key, spec.scale, "dk")
    backward_mix(slab, "value", spec.values, v, d_value, 1.0, "dv")


def _backward_member(
    slab: Slab,
    member: Member,
    queries: tuple[int, int],
    mixed: "Mixed",
    weights_of: _Weights,
    delta: Array,
) -> None:
    spec, refs, at = slab.spec, slab.refs, slice(*queries)
    names = ("q", "do", "key_down", "d_key", "d_value", "d_query")
    q, d_out, key_down, d_key, d_value, d_query = (refs[kept(name)] for name in names)
    query, d_mine = (only(spec, [member], x[at]) for x in (q, d_out))
    lse = refs["lse"][slab.first_row + member.row, member.here, at] * _F32(LOG2E)
    total = None
    for keys in key_tiles(queries[1]):
        these = slice(*keys)
        mask = weights_of.visible(keys, queries)
        logits = logits_of(mixed.key[these], query, mixed.factor, mask)
        d_weights = dot(mixed.value[these], d_mine, (1, 1))
        keep = weights_of.kept(keys, queries)
        weights, d_tile = through_softmax(logits, lse, d_weights, delta, keep)
        d_value[these] += dot(weights.astype(d_mine.dtype), d_mine, (1, 0))
        d_logits = d_tile.astype(query.dtype)
        d_key[these] += dot(d_logits, query, (1, 0))
        part = dot(key_down[member.lanes, these], d_logits, (1, 0))
        total = part if total is None else total + part
    d_query[member.lanes, : at.stop - at.start] = total


def _alone(always: Any, run: Callable[[], None]) -> None:
    """Runs what the compiler must not begin earlier: it would, and spill what that gives.

    It sees through a condition that it can prove, and joins what has the same one. On a v5e at
    [128, 200, 1, 64] the schedule is a third shorter without this, but spills 280 registers a row.
    """
    pl.when(always)(run)
