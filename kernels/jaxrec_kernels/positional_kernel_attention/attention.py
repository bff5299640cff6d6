"""Attention of some slabs: weights from mixed keys, forward and backward.

A *job* is a member's block of queries with all the keys before its end. Jobs are done in lots, in
stages, each of which leaves what it made in VMEM for the next: a product takes much longer to come
out of the matrix unit than to go in, so a stage is worth having when many tiles that do not wait
for each other are in it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxrec_kernels.attention_dropout import keep_bits
from jaxrec_kernels.attention_tile import LOG2E, MASKED, dot, logits_of, through_softmax
from jaxrec_kernels.positional_kernel_attention.mixing import Mixed, backward_mix, mix_both
from jaxrec_kernels.positional_kernel_attention.slab import Group, Slab
from jaxrec_kernels.positional_kernel_attention.spec import (
    Member,
    Place,
    lots_of_jobs,
    query_blocks,
)
from jaxrec_kernels.slot_ids import same

_F32 = jnp.float32

Tile = tuple[int, int]


class _Job:
    """Queries of a member, their keys, and where their lot keeps what belongs to them."""

    def __init__(self, group: Group, place: Place, buffer: int) -> None:
        self.slab: Slab = group.slabs[place.slab]
        self.spec, self.refs = group.spec, group.refs
        self.member: Member = group.spec.members[place.member]
        self.place, self.buffer = place, buffer
        self.queries = place.queries
        self.at = slice(*place.queries)
        self.width = self.at.stop - self.at.start
        self.keys = query_blocks(self.at.stop)
        self.ids = self.slab.ids[self.member.row]

    def tile(self, name: str, keys: Tile) -> Any:
        """A reference to [keys, queries] in the lot's squares of this name."""
        first = self.place.first
        square = self.refs[name].at[self.buffer]
        return square.at[first + keys[0] : first + keys[1], : self.width]

    def put(self, name: str, eight: Array) -> None:
        """Keeps float32[8, queries] under this name."""
        self.refs[name][self.buffer, self.place.number, :, : self.width] = eight

    def get(self, name: str) -> Array:
        part: Array = self.refs[name][self.buffer, self.place.number, :, : self.width]
        return part

    def mine(self, name: str) -> Array:
        """[queries, lanes], those of other members zeroed."""
        if len(self.spec.members) == 1:
            alone: Array = self.slab.own(name)[self.at]
            return alone
        part: Array = self.slab.own(f"{name}_of")[self.place.member, self.at]
        return part

    @property
    def statistics(self) -> Any:
        """A reference to float32[1, queries]."""
        slab, member = self.slab, self.member
        return self.refs["lse"].at[slab.first_row + member.row, member.here, self.at]

    def logits(self, key: Any, query: Array, factor: float, keys: Tile) -> Array:
        """float32[keys, queries], in units of log 2, `MASKED` where a query does not see a key."""
        logits = logits_of(key[slice(*keys)], query, factor, None)
        # Tiles of keys and blocks of queries begin at the same slots.
        if keys[0] < self.at.start:
            if self.ids is None:
                return logits
            seen = same(self.ids, slice(*keys), self.ids, self.at)
            return jnp.where(seen, logits, _F32(MASKED))
        # A register's rows at a time, beside a constant: the numbers of all rows would be kept.
        later = lax.broadcasted_iota(jnp.int32, (8, self.width), 1)
        later = later - lax.broadcasted_iota(jnp.int32, (8, self.width), 0)
        parts = []
        for first in range(0, keys[1] - keys[0], 8):
            rows = slice(first, min(first + 8, keys[1] - keys[0]))
            mask = later[: rows.stop - first] >= first
            if self.ids is not None:
                here = slice(keys[0] + rows.start, keys[0] + rows.stop)
                mask = mask & same(self.ids, here, self.ids, self.at)
            parts.append(jnp.where(mask, logits[rows], _F32(MASKED)))
        return jnp.concatenate(parts, axis=0)

    def kept(self, keys: Tile) -> Array | None:
        """float32[keys, queries], the factor of dropout: 0, or 1 / (1 - rate)."""
        rate = self.spec.dropout_rate
        if not rate:
            return None
        seeds: Any = self.refs["seeds"]
        # Where the member's rows of weights begin among all of the batch.
        row = self.slab.batch_row + self.member.row
        whole = row * self.spec.heads + self.slab.first_head + self.member.head
        query = self.at.start + lax.broadcasted_iota(jnp.int32, (1, self.width), 1)
        key = keys[0] + lax.broadcasted_iota(jnp.int32, (keys[1] - keys[0], 1), 0)
        start = whole * self.spec.length
        keep = keep_bits(seeds[0, 0], seeds[0, 1], start + query, key, rate)
        return jnp.where(keep, _F32(1 / (1 - rate)), _F32(0))


Stage = Callable[[list[_Job]], None]


def _in_stages(group: Group, stages: list[Stage]) -> None:
    """All jobs in all stages; a lot is in one while the next lot is in the one before.

    What is scheduled together was chosen by the schedules for v5e and v6e, for no registers to be
    spilled: products always, what is between them only where heads share a batch row, and nothing
    when the last lot is through the first stage.
    """
    lots = [
        [_Job(group, place, number % 2) for place in places]
        for number, places in enumerate(lots_of_jobs(group.spec))
    ]

    def run(step: int, numbers: list[int]) -> None:
        for number in numbers:
            if 0 <= step - number < len(lots):
                stages[number](lots[step - number])

    last = len(stages) - 1
    between = list(range(last - 1, 0, -1))
    for step in range(len(lots) + last):
        if step == 0 and group.spec.regions.first_jobs_alone:
            for job in lots[0]:
                group.alone(functools.partial(stages[0], [job]))
            continue
        if step >= len(lots):
            regions = [[last], between]
        elif group.spec.slab_heads > 1:
            regions = [[last, *between, 0]]
        else:
            regions = [between, [last, 0]]
        for numbers in regions:
            if any(0 <= step - number < len(lots) for number in numbers):
                group.alone(functools.partial(run, step, numbers))


def forward_group(group: Group) -> None:
    group.read("q", "k", "v")
    mixed = mix_both(group)

    def turn(slab: Slab, rows: slice) -> None:
        slab.own("value_down")[:, rows] = jnp.transpose(mixed[slab].value[rows])

    group.by_blocks(turn)

    def logits(jobs: list[_Job]) -> None:
        for job in jobs:
            _logits(job, mixed[job.slab])

    def weights(jobs: list[_Job]) -> None:
        for job in jobs:
            _weights(job)

    def outputs(jobs: list[_Job]) -> None:
        for job in jobs:
            _output(job)

    _in_stages(group, [logits, weights, outputs])
    group.write_turned("o", "out", 1.0)


def _whole_registers(keys: Tile) -> Tile:
    """With rows beyond the last key, which are later than any query: they are masked."""
    return keys[0], -(-keys[1] // 8) * 8


def _eights(x: Array) -> Array:
    """[rows, queries] as [rows / 8, 8, queries], to be reduced register by register."""
    return x.reshape(-1, 8, x.shape[1])


def _logits(job: _Job, mixed: Mixed) -> None:
    query, tops = job.mine("q"), []
    for keys in map(_whole_registers, job.keys):
        logits = job.logits(mixed.key, query, mixed.factor, keys)
        job.tile("logits", keys)[...] = logits
        tops.append(jnp.max(_eights(logits), axis=0))
    job.put("largest", functools.reduce(jnp.maximum, tops))


def _weights(job: _Job) -> None:
    largest, sums = jnp.max(job.get("largest"), axis=0, keepdims=True), []
    for keys in map(_whole_registers, job.keys):
        weights = jnp.exp2(job.tile("logits", keys)[...] - largest)
        sums.append(jnp.sum(_eights(weights), axis=0))
        keep = job.kept(keys)
        if keep is not None:
            weights = weights * keep
        tile = job.tile("weights", keys)
        tile[...] = weights.astype(tile.dtype)
    total = jnp.sum(functools.reduce(jnp.add, sums), axis=0, keepdims=True)
    job.put("total", jnp.broadcast_to(total, (8, job.width)))
    job.statistics[...] = (largest + jnp.log2(total)) * _F32(1 / LOG2E)


def _output(job: _Job) -> None:
    values, lanes, all_keys = job.slab.own("value_down"), job.member.lanes, (0, job.at.stop)
    out = dot(values[lanes, slice(*all_keys)], job.tile("weights", all_keys)[...], (1, 0))
    job.slab.own("out")[lanes, job.at] = out / job.get("total")[:1]


def backward_group(group: Group) -> None:
    group.read("q", "k", "v", "do", "o")
    spec = group.spec
    mixed = mix_both(group)

    def prepare(slab: Slab, rows: slice) -> None:
        slab.own("key_down")[:, rows] = jnp.transpose(mixed[slab].key[rows])
        out, d_out = (slab.own(name)[rows].astype(_F32) for name in ("o", "do"))
        products = jnp.transpose(out * d_out)
        for number, member in enumerate(spec.members):
            delta = jnp.sum(products[member.lanes], axis=0, keepdims=True)
            slab.own("delta")[number : number + 1, rows] = delta

    group.by_blocks(prepare)
    reached = dict.fromkeys(group.slabs, 0)

    def squares(jobs: list[_Job]) -> None:
        for job in jobs:
            _squares(job, mixed[job.slab])

    def sums(jobs: list[_Job]) -> None:
        for slab in group.slabs:
            mine = [job for job in jobs if job.slab is slab]
            if mine:
                _sums(mine, reached[slab])
                reached[slab] = max(job.at.stop for job in mine)
        for job in jobs:
            _d_query(job)

    _in_stages(group, [squares, sums])
    # The mixed keys have the logits' factor in them already, in units of log 2.
    group.write_turned("dq", "d_query", 1 / LOG2E if spec.logits.groups else spec.scale)
    backward_mix(group)


def _squares(job: _Job, mixed: Mixed) -> None:
    """The weights and the gradient of the logits."""
    query, d_out = job.mine("q"), job.mine("do")
    number = job.place.member
    delta = job.slab.own("delta")[number : number + 1, job.at]
    lse = job.statistics[...] * _F32(LOG2E)
    for keys in job.keys:
        these = slice(*keys)
        logits = job.logits(mixed.key, query, mixed.factor, keys)
        d_weights = dot(mixed.value[these], d_out, (1, 1))
        weights, d_logits = through_softmax(logits, lse, d_weights, delta, job.kept(keys))
        for name, square in (("weights", weights), ("d_logits", d_logits)):
            tile = job.tile(name, keys)
            tile[...] = square.astype(tile.dtype)


def _sums(jobs: list[_Job], reached: int) -> None:
    """Gradients of mixed keys and values; those of keys before `reached` have a sum already."""
    slab = jobs[0].slab
    for keys in query_blocks(max(job.at.stop for job in jobs)):
        these = slice(*keys)
        for name, square, of in (("d_value", "weights", "do"), ("d_key", "d_logits", "q")):
            part = functools.reduce(
                jnp.add,
                [
                    dot(job.tile(square, keys)[...], job.mine(of), (1, 0))
                    for job in jobs
                    if these.start < job.at.stop
                ],
            )
            sums = slab.own(name)
            sums[these] = sums[these] + part if these.start < reached else part


def _d_query(job: _Job) -> None:
    keys, lanes, all_keys = job.slab.own("key_down"), job.member.lanes, (0, job.at.stop)
    d_query = dot(keys[lanes, slice(*all_keys)], job.tile("d_logits", all_keys)[...], (1, 0))
    job.slab.own("d_query")[lanes, job.at] = d_query
