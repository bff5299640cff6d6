"""The causal mix along the sequence, its transpose, and the gradient of its operator."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrec_kernels import LANES
from jaxrec_kernels.attention_tile import LOG2E, dot
from jaxrec_kernels.positional_kernel_attention.slab import Group, Slab, only
from jaxrec_kernels.positional_kernel_attention.spec import (
    MIX_TILES,
    Member,
    Mix,
    in_lots,
    query_blocks,
)
from jaxrec_kernels.slot_ids import SlotIds, same

_F32 = jnp.float32


class _Operator(NamedTuple):
    """A mix as some members of a slab see it."""

    table: int
    ids: SlotIds | None  # what its entries are masked by
    members: list[Member]

    def masked(self, part: Array, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
        if self.ids is None:
            return part
        mine = same(self.ids, slice(*rows), self.ids, slice(*columns))
        return jnp.where(mine, part, jnp.zeros((), part.dtype))


def _operators(slab: Slab, mix: Mix) -> list[_Operator]:
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


Put = Callable[[Slab, slice, Array], None]


def _mix(group: Group, mix: Mix, table: str, x: str, put: Put, *, turned: bool = False) -> None:
    """Hands over float32 rows of `out[j] = sum_{k <= j} T[j, k] x[k]`, a block at a time.

    `turned`: of `out[k] = sum_{j >= k} T[j, k] x[j]`; the table is then T transposed.
    """
    length = group.spec.length

    def columns(rows: tuple[int, int]) -> tuple[int, int]:
        if turned:
            return (rows[0], min(length, -(-(rows[1] + mix.band - 1) // LANES) * LANES))
        return (_first_column(rows[0], mix.band), rows[1])

    jobs = [(slab, rows, columns(rows)) for rows in query_blocks(length) for slab in group.slabs]

    def run(lot: list[Any]) -> None:
        for slab, rows, cut in lot:
            _product(slab, mix, slab.refs[table], slab.own(x), put, rows, cut)

    for lot in in_lots(jobs, lambda job: _size(group, mix, job[2]), MIX_TILES):
        group.alone(functools.partial(run, lot))


def _size(group: Group, mix: Mix, columns: tuple[int, int]) -> int:
    return len(_operators(group.slabs[0], mix)) * -(-(columns[1] - columns[0]) // LANES)


def _product(
    slab: Slab,
    mix: Mix,
    table: Any,
    x: Any,
    put: Put,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    parts = []
    for operator in _operators(slab, mix):
        part = operator.masked(table[operator.table, slice(*rows), slice(*columns)], rows, columns)
        parts.append(only(slab.spec, operator.members, dot(part, x[slice(*columns)], (1, 0))))
    put(slab, slice(*rows), functools.reduce(jnp.add, parts))


def _add_table_gradient(group: Group, mix: Mix, name: str, x: str) -> None:
    """Adds `dT[j, k] = <g[j], x[k]>` for the entries within the band, a block of rows at a time."""

    def one(rows: tuple[int, int], columns: tuple[int, int], table: int) -> None:
        total: Array | None = None
        for slab in group.slabs:
            for operator in _operators(slab, mix):
                if operator.table == table:
                    mine = only(slab.spec, operator.members, slab.own("g")[slice(*rows)])
                    products = dot(mine, slab.own(x)[slice(*columns)], (1, 1))
                    part = operator.masked(products, rows, columns)
                    total = part if total is None else total + part
        group.refs[name][table, slice(*rows), slice(*columns)] += total

    jobs = []
    for rows in query_blocks(group.spec.length):
        columns = (_first_column(rows[0], mix.band), rows[1])
        jobs += [(rows, columns, table) for table in range(mix.groups)]

    def run(lot: list[Any]) -> None:
        for job in lot:
            one(*job)

    size = len(_operators(group.slabs[0], mix)) * len(group.slabs) // mix.groups
    for lot in in_lots(jobs, lambda job: size * -(-(job[1][1] - job[1][0]) // LANES), MIX_TILES):
        group.alone(functools.partial(run, lot))


class Mixed(NamedTuple):
    key: Any
    value: Any
    factor: float  # what products with the keys must still be multiplied by


def mix_both(group: Group) -> list[Mixed]:
    spec = group.spec
    key, value, factor = "k", "v", spec.scale * LOG2E
    if spec.logits.groups:
        key, factor = "key", 1.0

        def put_key(slab: Slab, rows: slice, mixed: Array) -> None:
            # Before they are rounded, so that the factor costs neither digits nor a pass.
            keys = slab.own("key")
            keys[rows] = (mixed * _F32(spec.scale * LOG2E)).astype(keys.dtype)

        _mix(group, spec.logits, "logit_table", "k", put_key)
    if spec.values.groups:
        value = "value"

        def put_value(slab: Slab, rows: slice, mixed: Array) -> None:
            values = slab.own("value")
            values[rows] = mixed.astype(values.dtype)

        _mix(group, spec.values, "value_table", "v", put_value)
    return [Mixed(slab.own(key), slab.own(value), factor) for slab in group.slabs]


def backward_mix(
    group: Group, name: str, mix: Mix, x: str, sums: str, factor: float, result: str
) -> None:
    """From the gradient of a mixed array, in `sums`, to those of the array and its operator."""

    def put(slab: Slab, rows: slice, part: Array) -> None:
        slab.write(result, part, rows)

    def scaled() -> None:
        for slab in group.slabs:
            g = slab.own("g")
            for queries in query_blocks(group.spec.length):
                rows = slice(*queries)
                part = slab.own(sums)[rows]
                if factor != 1.0:
                    part = part * _F32(factor)
                if mix.groups:
                    g[rows] = part.astype(g.dtype)
                else:
                    put(slab, rows, part)

    group.alone(scaled)
    if mix.groups:
        _mix(group, mix, f"{name}_table_turned", "g", put, turned=True)
        _add_table_gradient(group, mix, f"d_{name}_table", x)
