"""Positional kernel attention on TPU, whole sequences in VMEM: forward and backward.

Why a kernel. Composed, the op writes mixed keys and values, logits or weights and their gradients
to HBM: at [128, 200, 1, 64] in bfloat16 three squares of 128 x 200 x 256 float32 numbers (26 MB
each) besides twelve arrays of the input's size (padded to 128 lanes, 6.5 MB each). Here the squares
and the mixed arrays stay in VMEM: forward reads q, k, v and writes o; backward reads q, k, v, o, do
and writes dq, dk, dv; the operators of the mix are read once. FLOPs a sequence and head, causal
half: 4 n^2 d forward (two mixes, two products), 11 n^2 d backward (the two mixes and the logits
again, four products of the attention, four of the mixes). At [128, 200, 1, 64]: 4.9 GFLOP, 25 us at
a v5e's 197 TFLOP/s; 79 MB, 96 us at its 819 GB/s, half of which the padding of 64 lanes costs.

Logits are held transposed, keys down and queries along the lanes: the statistics of the softmax are
then rows, which reduce and broadcast over sublanes, and every product that backward needs is a
plain one or has a narrow operand transposed, never a square one.

A *slab* is an array [length, lanes] of what is computed at once: some heads of a batch row side by
side in the lanes, or of several batch rows where one fills less than half of them. Its *members*
share a product where their operator is the same; in the logits a member is picked by zeroing the
other lanes of one operand, which costs the MXU nothing below 128 lanes and moves no lanes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import compat
from jaxrec_kernels.attention_dropout import keep_bits
from jaxrec_kernels.positional_kernel_attention import LANES, heads_of_slab

_ROWS = 8  # batch rows of a program at most
_PACKED_UP_TO = 256  # longer rows are not put side by side
_LOG2E = math.log2(math.e)
_F32 = jnp.float32
# Stands for `no sequence`: the slot is padding.
NOBODY = -(2**31)
MASKED = -1e30


class Spec(NamedTuple):
    """Static description of one call."""

    batch: int
    length: int
    heads: int
    head_dim: int
    scale: float
    dropout_rate: float
    logits: "Mix"
    values: "Mix"
    masked: bool  # some slots are padding, or there are several segments
    segmented: bool  # the operators must be masked too
    rows: int  # batch rows of a program
    packed: int  # batch rows of a slab
    slab_heads: int  # heads of a batch row in a slab

    @property
    def block_lanes(self) -> int:
        """Of one batch row."""
        return self.slab_heads * self.head_dim

    @property
    def lanes(self) -> int:
        return self.packed * self.block_lanes

    @property
    def members(self) -> list["Member"]:
        pairs = itertools.product(range(self.packed), range(self.slab_heads))
        return [
            Member(row, head, number * self.head_dim, (number + 1) * self.head_dim)
            for number, (row, head) in enumerate(pairs)
        ]

    @property
    def grid(self) -> tuple[int, int]:
        return self.heads // self.slab_heads, self.batch // self.rows


class Mix(NamedTuple):
    """One of the two operators."""

    groups: int  # 0: the identity; 1: one for all members; else one for each head of a slab
    band: int  # entries further below the diagonal than this are zero


class Member(NamedTuple):
    """One head of one batch row of a slab."""

    row: int
    head: int
    first: int  # lane
    end: int

    @property
    def lanes(self) -> slice:
        return slice(self.first, self.end)

    @property
    def here(self) -> slice:
        return slice(self.head, self.head + 1)


def rows_of_program(batch: int, length: int) -> int:
    """Batch rows that a program takes: enough to hide its start, few enough for VMEM."""
    wanted = max(1, min(_ROWS, 2048 // length))
    return next(rows for rows in range(wanted, 0, -1) if batch % rows == 0)


def rows_of_slab(rows: int, lanes: int, length: int) -> int:
    """Batch rows that are computed side by side in the lanes."""
    if length > _PACKED_UP_TO:
        return 1
    return next(count for count in (8, 4, 2, 1) if count * lanes <= LANES and rows % count == 0)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + LANES, length)) for start in range(0, length, LANES)]


def _key_tiles(end: int) -> list[tuple[int, int]]:
    return _query_blocks(end)


class _Ids(NamedTuple):
    """The sequence of every slot of one batch row, along the lanes and down the sublanes."""

    lanes: Array  # int32[1, length]
    sublanes: Array  # int32[length, 1]

    def real(self) -> Array:
        return self.sublanes != NOBODY


class _Slab:
    """The batch rows that are computed at once, and how their arrays lie side by side."""

    def __init__(self, spec: Spec, refs: dict[str, Any], first_row: Any) -> None:
        self.spec, self.refs, self.first_row = spec, refs, first_row
        self.ids = [self._ids(first_row + i) for i in range(spec.packed)]

    def _ids(self, row: Any) -> _Ids | None:
        if not self.spec.masked:
            return None
        lanes = self.refs["ids"][row]
        down = jnp.transpose(jnp.broadcast_to(lanes, (8, self.spec.length)))
        return _Ids(lanes, down[:, :1])

    def read(self, name: str) -> Any:
        """[length, lanes], zeros on padding: an operand side by side for all batch rows."""
        parts = []
        for i, ids in enumerate(self.ids):
            part = self.refs[name][self.first_row + i]
            if ids is not None:
                part = jnp.where(ids.real(), part, jnp.zeros((), part.dtype))
            parts.append(part)
        return self.keep(name, _beside(parts))

    def keep(self, name: str, value: Array) -> Any:
        """A buffer with the value, to be read where and as far as it is needed.

        A value that is needed late and early would be spilled there and back by the compiler.
        """
        buffer = self.refs[_kept(name)]
        buffer[...] = value
        return buffer

    def write(self, name: str, x: Array, rows: slice) -> None:
        """Rows of a result [rows, lanes], zeros on padding."""
        width, ref = self.spec.block_lanes, self.refs[name]
        for i, ids in enumerate(self.ids):
            part = x if len(self.ids) == 1 else x[:, i * width : (i + 1) * width]
            self._put(ref, i, ids, part, rows)

    def write_turned(self, name: str, down: Array, rows: slice) -> None:
        """The same, given as [lanes, rows]."""
        width, ref = self.spec.block_lanes, self.refs[name]
        for i, ids in enumerate(self.ids):
            self._put(ref, i, ids, jnp.transpose(down[i * width : (i + 1) * width]), rows)

    def _put(self, ref: Any, i: int, ids: _Ids | None, part: Array, rows: slice) -> None:
        if ids is not None:
            part = jnp.where(ids.real()[rows], part, jnp.zeros((), part.dtype))
        ref[self.first_row + i, rows] = part.astype(ref.dtype)


def _kept(name: str) -> str:
    return f"kept_{name}"


def _beside(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _below(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=_F32)


def _only(spec: Spec, members: list[Member], x: Array) -> Array:
    """The slab with the lanes of other members zeroed."""
    if len(members) == len(spec.members):
        return x
    lane = lax.broadcasted_iota(jnp.int32, (1, spec.lanes), 1)
    mask = functools.reduce(jnp.logical_or, [(lane >= m.first) & (lane < m.end) for m in members])
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


class _Operator(NamedTuple):
    """A mix as some members of a slab see it."""

    table: int
    ids: _Ids | None  # what its entries are masked by
    members: list[Member]

    def masked(self, part: Array, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
        if self.ids is None:
            return part
        same = self.ids.sublanes[slice(*rows)] == self.ids.lanes[:, slice(*columns)]
        return jnp.where(same, part, jnp.zeros((), part.dtype))


def _operators(slab: _Slab, mix: Mix) -> list[_Operator]:
    """The members sorted by the operator that is theirs."""
    spec = slab.spec
    found: dict[tuple[int, int], list[Member]] = {}
    for member in spec.members:
        table = member.head if mix.groups > 1 else 0
        row = member.row if spec.segmented else 0
        found.setdefault((table, row), []).append(member)
    return [
        _Operator(table, slab.ids[row] if spec.segmented else None, members)
        for (table, row), members in found.items()
    ]


def _first_column(start: int, band: int) -> int:
    return max(0, (start - band + 1) // LANES * LANES)


def _mix(slab: _Slab, mix: Mix, table: Any, x: Any) -> Iterator[tuple[slice, Array]]:
    """float32 rows of `out[j] = sum_{k <= j} T[j, k] x[k]`, a block at a time."""
    for start, end in _query_blocks(slab.spec.length):
        first = _first_column(start, mix.band)
        parts = []
        for operator in _operators(slab, mix):
            part = operator.masked(
                table[operator.table, start:end, first:end], (start, end), (first, end)
            )
            parts.append(_only(slab.spec, operator.members, _dot(part, x[first:end], (1, 0))))
        yield slice(start, end), functools.reduce(jnp.add, parts)


def _mix_turned(slab: _Slab, mix: Mix, table: Any, g: Any) -> Iterator[tuple[slice, Array]]:
    """The same of `out[k] = sum_{j >= k} T[j, k] g[j]`; `table` is T transposed."""
    length = slab.spec.length
    for start, end in _query_blocks(length):
        last = min(length, -(-(end + mix.band - 1) // LANES) * LANES)
        parts = []
        for operator in _operators(slab, mix):
            part = operator.masked(
                table[operator.table, start:end, start:last], (start, end), (start, last)
            )
            parts.append(_only(slab.spec, operator.members, _dot(part, g[start:last], (1, 0))))
        yield slice(start, end), functools.reduce(jnp.add, parts)


def _add_table_gradient(slab: _Slab, mix: Mix, out: Any, x: Any, g: Any) -> None:
    """Adds `dT[j, k] = <g[j], x[k]>` for the entries within the band, a block of rows at a time."""
    for rows in _query_blocks(slab.spec.length):
        columns = (_first_column(rows[0], mix.band), rows[1])
        for operator in _operators(slab, mix):
            mine = _only(slab.spec, operator.members, g[slice(*rows)])
            part = operator.masked(_dot(mine, x[slice(*columns)], (1, 1)), rows, columns)
            out[operator.table, slice(*rows), slice(*columns)] += part


class _Weights:
    """How the weights of a member's tile follow from its logits."""

    def __init__(self, slab: _Slab, member: Member, first_head: Any, batch_row: Any) -> None:
        self.spec, self.ids = slab.spec, slab.ids[member.row]
        self.seeds: Any = slab.refs.get("seeds")
        # Where the member's rows of weights begin among all of the batch.
        whole = (batch_row + member.row) * self.spec.heads + first_head + member.head
        self.start = whole * self.spec.length

    def visible(self, keys: tuple[int, int], queries: tuple[int, int]) -> Array | None:
        """bool[keys, queries], or None where every query of the tile sees all of its keys."""
        mask = None
        shape = (keys[1] - keys[0], queries[1] - queries[0])
        # Tiles of keys and blocks of queries begin at the same slots.
        if keys[0] == queries[0]:
            key, query = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            mask = key <= query
        if self.ids is not None:
            same = self.ids.sublanes[slice(*keys)] == self.ids.lanes[:, slice(*queries)]
            mask = same if mask is None else mask & same
        return mask

    def kept(self, keys: tuple[int, int], queries: tuple[int, int]) -> Array:
        """float32[keys, queries], the factor of dropout: 0, or 1 / (1 - rate)."""
        rate = self.spec.dropout_rate
        query = queries[0] + lax.broadcasted_iota(jnp.int32, (1, queries[1] - queries[0]), 1)
        key = keys[0] + lax.broadcasted_iota(jnp.int32, (keys[1] - keys[0], 1), 0)
        keep = keep_bits(self.seeds[0], self.seeds[1], self.start + query, key, rate)
        return jnp.where(keep, _F32(1 / (1 - rate)), _F32(0))


def _logits(factor: float, mask: Array | None, key: Array, query: Array) -> Array:
    """float32[keys, queries], in units of log 2."""
    logits = _dot(key, query, (1, 1))
    if factor != 1.0:
        logits = logits * _F32(factor)
    return logits if mask is None else jnp.where(mask, logits, _F32(MASKED))


class _Mixed(NamedTuple):
    key: Any
    value: Any
    factor: float  # what products with the keys must still be multiplied by


def _mixed(slab: _Slab, k: Any, v: Any) -> _Mixed:
    spec = slab.spec
    key, value, factor = k, v, spec.scale * _LOG2E
    if spec.logits.groups:
        key = slab.refs[_kept("key")]
        for rows, mixed in _mix(slab, spec.logits, slab.refs["logit_table"], k):
            # Before they are rounded, so that the factor costs neither digits nor a pass.
            key[rows] = (mixed * _F32(factor)).astype(key.dtype)
        factor = 1.0
    if spec.values.groups:
        value = slab.refs[_kept("value")]
        for rows, mixed in _mix(slab, spec.values, slab.refs["value_table"], v):
            value[rows] = mixed.astype(value.dtype)
    return _Mixed(key, value, factor)


def _forward_slab(slab: _Slab, first_head: Any, batch_row: Any) -> None:
    spec = slab.spec
    _, k, v = map(slab.read, "qkv")
    mixed = _mixed(slab, k, v)
    slab.keep("value_down", jnp.transpose(mixed.value[...]))
    for queries in _query_blocks(spec.length):
        for member in spec.members:
            weights_of = _Weights(slab, member, first_head, batch_row)
            run = functools.partial(_forward_member, slab, member, queries, mixed, weights_of)
            _alone(batch_row < spec.batch + queries[0] + member.first, run)
        at = slice(*queries)
        slab.write_turned("o", slab.refs[_kept("out")][:, : at.stop - at.start], at)


def _forward_member(
    slab: _Slab, member: Member, queries: tuple[int, int], mixed: "_Mixed", weights_of: _Weights
) -> None:
    spec, refs, at = slab.spec, slab.refs, slice(*queries)
    values = refs[_kept("value_down")]
    query = _only(spec, [member], refs[_kept("q")][at])
    # The largest logit so far, the sum of weights, and that of weighted values.
    state: tuple[Array, Array, Array] | None = None
    for keys in _key_tiles(queries[1]):
        mask = weights_of.visible(keys, queries)
        logits = _logits(mixed.factor, mask, mixed.key[slice(*keys)], query)
        top = jnp.max(logits, axis=0, keepdims=True)
        if state is not None:
            top = jnp.maximum(top, state[0])
        weights = jnp.exp2(logits - top)
        part = jnp.sum(weights, axis=0, keepdims=True)
        if spec.dropout_rate:
            weights = weights * weights_of.kept(keys, queries)
        product = _dot(values[member.lanes, slice(*keys)], weights.astype(values.dtype), (1, 0))
        if state is not None:
            shrink = jnp.exp2(state[0] - top)
            part, product = state[1] * shrink + part, state[2] * shrink + product
        state = top, part, product
    assert state is not None
    largest, total, out = state
    refs[_kept("out")][member.lanes, : at.stop - at.start] = out / total
    lse = (largest + jnp.log2(total)) * _F32(1 / _LOG2E)
    refs["lse"][slab.first_row + member.row, member.here, at] = lse


def _backward_slab(slab: _Slab, first_head: Any, batch_row: Any) -> None:
    spec, refs = slab.spec, slab.refs
    _, k, v, d_out, out = map(slab.read, ("q", "k", "v", "do", "o"))
    mixed = _mixed(slab, k, v)
    slab.keep("key_down", jnp.transpose(mixed.key[...]))
    d_key, d_value, d_query = (refs[_kept(name)] for name in ("d_key", "d_value", "d_query"))
    for sums in (d_key, d_value):
        sums[...] = jnp.zeros_like(sums)
    for queries in _query_blocks(spec.length):
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
        units = 1 / _LOG2E if spec.logits.groups else spec.scale
        slab.write_turned("dq", d_query[:, : at.stop - at.start] * _F32(units), at)
    _backward_mix(slab, "logit", spec.logits, k, d_key, spec.scale, "dk")
    _backward_mix(slab, "value", spec.values, v, d_value, 1.0, "dv")


def _backward_member(
    slab: _Slab,
    member: Member,
    queries: tuple[int, int],
    mixed: "_Mixed",
    weights_of: _Weights,
    delta: Array,
) -> None:
    spec, refs, at = slab.spec, slab.refs, slice(*queries)
    names = ("q", "do", "key_down", "d_key", "d_value", "d_query")
    q, d_out, key_down, d_key, d_value, d_query = (refs[_kept(name)] for name in names)
    query, d_mine = (_only(spec, [member], x[at]) for x in (q, d_out))
    lse = refs["lse"][slab.first_row + member.row, member.here, at] * _F32(_LOG2E)
    total = None
    for keys in _key_tiles(queries[1]):
        these = slice(*keys)
        mask = weights_of.visible(keys, queries)
        weights = jnp.exp2(_logits(mixed.factor, mask, mixed.key[these], query) - lse)
        d_weights = _dot(mixed.value[these], d_mine, (1, 1))
        dropped = weights
        if spec.dropout_rate:
            kept = weights_of.kept(keys, queries)
            dropped, d_weights = weights * kept, d_weights * kept
        d_value[these] += _dot(dropped.astype(d_mine.dtype), d_mine, (1, 0))
        d_logits = (weights * (d_weights - delta)).astype(query.dtype)
        d_key[these] += _dot(d_logits, query, (1, 0))
        part = _dot(key_down[member.lanes, these], d_logits, (1, 0))
        total = part if total is None else total + part
    d_query[member.lanes, : at.stop - at.start] = total


def _backward_mix(
    slab: _Slab, name: str, mix: Mix, x: Any, sums: Any, factor: float, result: str
) -> None:
    """From the gradient of a mixed array, in `sums`, to those of the array and its operator."""
    g = slab.refs[_kept("g")]
    for queries in _query_blocks(slab.spec.length):
        rows = slice(*queries)
        part = sums[rows] if factor == 1.0 else sums[rows] * _F32(factor)
        if mix.groups:
            g[rows] = part.astype(g.dtype)
        else:
            slab.write(result, part, rows)
    if mix.groups:
        for rows, part in _mix_turned(slab, mix, slab.refs[f"{name}_table_turned"], g):
            slab.write(result, part, rows)
        _add_table_gradient(slab, mix, slab.refs[f"d_{name}_table"], x, g)


def _alone(always: Any, run: Callable[[], None]) -> None:
    """Runs what the compiler must not begin earlier: it would, and spill what that gives.

    It sees through a condition that it can prove, and joins what has the same one. On a v5e at
    [128, 200, 1, 64] the schedule is a third shorter without this, but spills 280 registers a row.
    """
    pl.when(always)(run)


def _buffers(spec: Spec, dtype: Any, backward: bool) -> dict[str, Any]:
    """What a slab keeps in VMEM."""
    across, down = (spec.length, spec.lanes), (spec.lanes, spec.length)
    wanted = dict.fromkeys(("q", "k", "v", "key", "value"), (across, dtype))
    if backward:
        wanted |= dict.fromkeys(("do", "o", "g"), (across, dtype))
        wanted |= dict.fromkeys(("d_key", "d_value"), (across, _F32))
        wanted["key_down"] = (down, dtype)
        wanted["d_query"] = ((spec.lanes, LANES), _F32)
    else:
        wanted["value_down"] = (down, dtype)
        wanted["out"] = ((spec.lanes, LANES), _F32)
    return {_kept(name): pltpu.VMEM(*what) for name, what in wanted.items()}


class Arrays(NamedTuple):
    """The operands: arrays of the op, and operators as squares."""

    query: Array  # [batch, length, heads, head_dim]
    key: Array
    value: Array
    ids: Array | None  # int32[batch, length], NOBODY for padding
    seeds: Array | None  # uint32[2]
    logit_table: Array | None  # [1 or heads, length, length], lower triangular
    value_table: Array | None


def _spec(
    arrays: Arrays, scale: float, rate: float, bands: tuple[int, int], segmented: bool
) -> Spec:
    batch, length, heads, head_dim = arrays.query.shape
    slab_heads = heads_of_slab(heads, head_dim)
    assert slab_heads is not None

    def mix(table: Array | None, band: int) -> Mix:
        groups = 0 if table is None else min(table.shape[0], slab_heads)
        return Mix(groups, min(band, length))

    rows = rows_of_program(batch, length)

    return Spec(
        batch=batch,
        length=length,
        heads=heads,
        head_dim=head_dim,
        scale=scale,
        dropout_rate=rate,
        logits=mix(arrays.logit_table, bands[0]),
        values=mix(arrays.value_table, bands[1]),
        masked=arrays.ids is not None,
        segmented=segmented,
        rows=rows,
        packed=rows_of_slab(rows, slab_heads * head_dim, length),
        slab_heads=slab_heads,
    )


class _Operands:
    """Collects what a kernel reads and writes: arrays, blocks and names."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.names: list[str] = []
        self.values: list[Any] = []
        self.blocks: list[pl.BlockSpec] = []

    def add(self, name: str, value: Any, block: pl.BlockSpec) -> None:
        self.names.append(name)
        self.values.append(value)
        self.blocks.append(block)

    def wide(self, name: str, value: Any) -> None:
        """[batch, length, heads * head_dim], a slab of some rows a program."""
        spec = self.spec
        shape = (spec.rows, spec.length, spec.block_lanes)
        self.add(name, value, pl.BlockSpec(shape, lambda slab, row: (row, 0, slab)))

    def statistics(self, name: str, value: Any) -> None:
        """[slabs, batch, heads of a slab, length]."""
        spec = self.spec
        shape = (None, spec.rows, spec.slab_heads, spec.length)
        self.add(name, value, pl.BlockSpec(shape, lambda slab, row: (slab, row, 0, 0)))

    def ids(self, value: Array | None) -> None:
        if value is not None:
            shape = (self.spec.rows, 1, self.spec.length)
            self.add("ids", value[:, None], pl.BlockSpec(shape, lambda slab, row: (row, 0, 0)))

    def seeds(self, value: Array | None) -> None:
        if value is not None:
            words = lax.bitcast_convert_type(value, jnp.int32)
            self.add("seeds", words, pl.BlockSpec(memory_space=pltpu.SMEM))

    def table(self, name: str, value: Any) -> None:
        """[1 or heads, length, length]: fetched once, or once a slab."""
        if value is not None:
            groups, side = value.shape[0], value.shape[1]
            if groups == 1:
                self.add(name, value, pl.BlockSpec((1, side, side), lambda slab, row: (0, 0, 0)))
            else:
                shape = (self.spec.slab_heads, side, side)
                self.add(name, value, pl.BlockSpec(shape, lambda slab, row: (slab, 0, 0)))


def _wide(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1)


def _call(
    spec: Spec,
    body: Callable[..., None],
    given: _Operands,
    made: _Operands,
    *,
    scratch: dict[str, Any],
    parallel: bool,
    interpret: Any,
) -> list[Array]:
    names = [*given.names, *made.names, *scratch]

    def kernel(*refs: Any) -> None:
        body(dict(zip(names, refs, strict=True)))

    kind = "parallel" if parallel else "arbitrary"
    results: list[Array] = pl.pallas_call(
        kernel,
        grid=spec.grid,
        in_specs=given.blocks,
        out_specs=made.blocks,
        out_shape=[compat.like(given.values, value) for value in made.values],
        scratch_shapes=list(scratch.values()),
        compiler_params=compat.compiler_params(
            dimension_semantics=(kind, kind), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
    )(*given.values)
    return results


# Half of what a v5e or v6e has. The default of 16 MiB does not hold the operators of length 1024.
_VMEM = 64 * 2**20


def forward(
    arrays: Arrays,
    *,
    scale: float,
    dropout_rate: float,
    bands: tuple[int, int],
    segmented: bool,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Output [batch, length, heads, head_dim] and log-sum-exp float32[batch, heads, length].

    Args:
      arrays: the operands.
      scale: of the logits.
      dropout_rate: of the weights.
      bands: entries of the operators this far or further below the diagonal are zero.
      segmented: the mix must not cross from one id to another.
      interpret: as in `pallas_call`.
    """
    spec = _spec(arrays, scale, dropout_rate, bands, segmented)
    given, made = _Operands(spec), _Operands(spec)
    given.wide("q", _wide(arrays.query))
    given.wide("k", _wide(arrays.key))
    given.wide("v", _wide(arrays.value))
    given.ids(arrays.ids)
    given.seeds(arrays.seeds)
    dtype = arrays.query.dtype
    given.table("logit_table", _as(dtype, arrays.logit_table))
    given.table("value_table", _as(dtype, arrays.value_table))
    made.wide("o", jax.ShapeDtypeStruct(given.values[0].shape, arrays.value.dtype))
    made.statistics("lse", jax.ShapeDtypeStruct(_statistics_shape(spec), _F32))

    def body(refs: dict[str, Any]) -> None:
        _each_slab(spec, refs, _forward_slab)

    out, lse = _call(
        spec,
        body,
        given,
        made,
        scratch=_buffers(spec, arrays.query.dtype, backward=False),
        parallel=True,
        interpret=interpret,
    )
    return out.reshape(arrays.value.shape), _from_slabs(spec, lse)


class Gradients(NamedTuple):
    query: Array
    key: Array
    value: Array
    logit_table: (
        Array | None
    )  # float32[1 or heads, length, length]; zero or not, above the diagonal
    value_table: Array | None


def backward(
    arrays: Arrays,
    out: Array,
    log_sum_exp: Array,
    d_out: Array,
    *,
    scale: float,
    dropout_rate: float,
    bands: tuple[int, int],
    segmented: bool,
    interpret: Any = False,
) -> Gradients:
    """Gradients of all arrays; arguments as in `forward`, and its results."""
    spec = _spec(arrays, scale, dropout_rate, bands, segmented)
    given, made = _Operands(spec), _Operands(spec)
    given.wide("q", _wide(arrays.query))
    given.wide("k", _wide(arrays.key))
    given.wide("v", _wide(arrays.value))
    given.wide("o", _wide(out))
    given.wide("do", _wide(d_out))
    given.statistics("lse", _to_slabs(spec, log_sum_exp))
    given.ids(arrays.ids)
    given.seeds(arrays.seeds)
    shape = given.values[0].shape
    for name, x in (("dq", arrays.query), ("dk", arrays.key), ("dv", arrays.value)):
        made.wide(name, jax.ShapeDtypeStruct(shape, x.dtype))
    for name, table in (("logit", arrays.logit_table), ("value", arrays.value_table)):
        if table is not None:
            given.table(f"{name}_table", _as(arrays.query.dtype, table))
            turned = jnp.swapaxes(table, 1, 2)
            given.table(f"{name}_table_turned", _as(arrays.query.dtype, turned))
            made.table(f"d_{name}_table", jax.ShapeDtypeStruct(table.shape, _F32))
    scratch = _buffers(spec, arrays.query.dtype, backward=True)

    def body(refs: dict[str, Any]) -> None:
        for name, table in (("logit", arrays.logit_table), ("value", arrays.value_table)):
            if table is not None:
                first = pl.program_id(1) == 0
                if table.shape[0] == 1:
                    first = first & (pl.program_id(0) == 0)
                _zero_when(first, refs[f"d_{name}_table"])
        _each_slab(spec, refs, _backward_slab)

    results = _call(spec, body, given, made, scratch=scratch, parallel=False, interpret=interpret)
    found = dict(zip(made.names, results, strict=True))
    return Gradients(
        found["dq"].reshape(arrays.query.shape),
        found["dk"].reshape(arrays.key.shape),
        found["dv"].reshape(arrays.value.shape),
        found.get("d_logit_table"),
        found.get("d_value_table"),
    )


def _zero_when(condition: Any, ref: Any) -> None:
    @pl.when(condition)
    def _() -> None:
        ref[...] = jnp.zeros_like(ref)


def _each_slab(spec: Spec, refs: dict[str, Any], one: Callable[[_Slab, Any, Any], None]) -> None:
    """Runs `one` on all slabs of the program, with its first head and its first batch row."""
    first_head = pl.program_id(0) * spec.slab_heads
    first_row = pl.program_id(1) * spec.rows

    def some(number: Any) -> None:
        row = number * spec.packed
        one(_Slab(spec, refs, row), first_head, first_row + row)

    slabs = spec.rows // spec.packed
    if slabs == 1:
        some(0)
    else:
        lax.fori_loop(0, slabs, lambda i, _: some(i), None)


def _as(dtype: Any, table: Array | None) -> Array | None:
    return None if table is None else table.astype(dtype)


def _statistics_shape(spec: Spec) -> tuple[int, ...]:
    return (spec.heads // spec.slab_heads, spec.batch, spec.slab_heads, spec.length)


def _from_slabs(spec: Spec, x: Array) -> Array:
    return jnp.swapaxes(x, 0, 1).reshape(spec.batch, spec.heads, spec.length)


def _to_slabs(spec: Spec, x: Array) -> Array:
    slabs = spec.heads // spec.slab_heads
    return jnp.swapaxes(x.reshape(spec.batch, slabs, spec.slab_heads, spec.length), 0, 1)
