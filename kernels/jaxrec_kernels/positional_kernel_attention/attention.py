"""Attention of one slab: weights from mixed keys, forward and backward."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

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
from jaxrec_kernels.slot_ids import same

_F32 = jnp.float32

Tile = tuple[int, int]


class _Weights:
    """How the weights of a member's tile follow from its logits."""

    def __init__(self, slab: Slab, member: Member) -> None:
        self.spec, self.ids = slab.spec, slab.ids[member.row]
        self.seeds: Any = slab.refs.get("seeds")
        # Where the member's rows of weights begin among all of the batch.
        row, head = slab.batch_row + member.row, slab.first_head + member.head
        whole = row * self.spec.heads + head
        self.start = whole * self.spec.length

    def visible(self, keys: tuple[int, int], queries: tuple[int, int]) -> Array | None:
        """bool[keys, queries], or None where every query of the tile sees all of its keys."""
        # Tiles of keys and blocks of queries begin at the same slots.
        shape, diagonal = (keys[1] - keys[0], queries[1] - queries[0]), keys[0] == queries[0]
        if self.ids is None:
            return visible(shape, diagonal=diagonal)
        mine = same(self.ids, slice(*keys), self.ids, slice(*queries))
        return visible(shape, diagonal=diagonal, same=mine)

    def kept(self, keys: tuple[int, int], queries: tuple[int, int]) -> Array | None:
        """float32[keys, queries], the factor of dropout: 0, or 1 / (1 - rate)."""
        rate = self.spec.dropout_rate
        if not rate:
            return None
        query = queries[0] + lax.broadcasted_iota(jnp.int32, (1, queries[1] - queries[0]), 1)
        key = keys[0] + lax.broadcasted_iota(jnp.int32, (keys[1] - keys[0], 1), 0)
        keep = keep_bits(self.seeds[0, 0], self.seeds[0, 1], self.start + query, key, rate)
        return jnp.where(keep, _F32(1 / (1 - rate)), _F32(0))


def forward_slab(slab: Slab) -> None:
    spec = slab.spec
    _, k, v = map(slab.read, "qkv")
    mixed = mix_both(slab, k, v)
    slab.keep("value_down", jnp.transpose(mixed.value[...]))
    for queries in query_blocks(spec.length):
        for member in spec.members:
            for lot in key_tiles(queries[1]):
                run = functools.partial(_forward_member, slab, member, queries, lot, mixed)
                slab.alone(run, unless=spec.short)
        at = slice(*queries)
        slab.write_turned("o", slab.refs[kept("out")][:, : at.stop - at.start], at)


def _forward_member(
    slab: Slab, member: Member, queries: Tile, lot: list[Tile], mixed: "Mixed"
) -> None:
    """Some queries of a member meet some tiles of keys; those before them are in the state."""
    spec, refs, at = slab.spec, slab.refs, slice(*queries)
    weights_of = _Weights(slab, member)
    values = refs[kept("value_down")]
    query = only(spec, [member], refs[kept("q")][at])
    here = slice(0, at.stop - at.start)
    largest, total = refs[kept("largest")].at[:, here], refs[kept("total")].at[:, here]
    out = refs[kept("out")].at[member.lanes, here]
    state: Softmax | None = None
    if lot[0][0] > 0:
        state = Softmax(largest[...], total[...], out[...])
    for keys in lot:
        mask = weights_of.visible(keys, queries)
        logits = logits_of(mixed.key[slice(*keys)], query, mixed.factor, mask)
        keep = weights_of.kept(keys, queries)
        state = absorb(state, logits, values[member.lanes, slice(*keys)], keep)
    assert state is not None
    if lot[-1][1] < queries[1]:
        largest[...], total[...], out[...] = state
        return
    out[...] = state.out / state.total
    refs["lse"][slab.first_row + member.row, member.here, at] = state.log_sum_exp


def backward_slab(slab: Slab) -> None:
    spec, refs = slab.spec, slab.refs
    _, k, v = map(slab.read, "qkv")
    d_out, out = slab.refs[kept("do")], slab.refs[kept("o")]

    def read() -> None:
        slab.read("do")
        slab.read("o")

    slab.alone(read)
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
            for lot in key_tiles(queries[1]):
                run = functools.partial(_backward_member, slab, member, queries, lot, mixed, delta)
                slab.alone(run, unless=spec.short)
        # The mixed keys have the logits' factor in them already, in units of log 2.
        units = 1 / LOG2E if spec.logits.groups else spec.scale
        slab.write_turned("dq", d_query[:, : at.stop - at.start] * _F32(units), at)
    backward_mix(slab, "logit", spec.logits, k, d_key, spec.scale, "dk")
    of_values = functools.partial(backward_mix, slab, "value", spec.values, v, d_value, 1.0, "dv")
    slab.alone(of_values, unless=spec.short)


def _backward_member(
    slab: Slab, member: Member, queries: Tile, lot: list[Tile], mixed: "Mixed", delta: Array
) -> None:
    spec, refs, at = slab.spec, slab.refs, slice(*queries)
    weights_of = _Weights(slab, member)
    names = ("q", "do", "key_down", "d_key", "d_value", "d_query")
    q, d_out, key_down, d_key, d_value, d_query = (refs[kept(name)] for name in names)
    query, d_mine = (only(spec, [member], x[at]) for x in (q, d_out))
    lse = refs["lse"][slab.first_row + member.row, member.here, at] * _F32(LOG2E)
    mine = d_query.at[member.lanes, : at.stop - at.start]
    total = mine[...] if lot[0][0] > 0 else None
    for keys in lot:
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
    mine[...] = total
