"""The causal mix along the sequence, its transpose, and the gradient of its operator."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrec_kernels import LANES
from jaxrec_kernels.attention_tile import LOG2E, dot
from jaxrec_kernels.positional_kernel_attention.slab import Slab, kept, only
from jaxrec_kernels.positional_kernel_attention.spec import Member, Mix, query_blocks
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


Put = Callable[[slice, Array], None]


def mix(slab: Slab, mix: Mix, table: Any, x: Any, put: Put) -> None:
    """Hands over float32 rows of `out[j] = sum_{k <= j} T[j, k] x[k]`, a block at a time."""
    for rows in query_blocks(slab.spec.length):
        columns = (_first_column(rows[0], mix.band), rows[1])
        slab.alone(functools.partial(_product, slab, mix, table, x, put, rows, columns))


def mix_turned(slab: Slab, mix: Mix, table: Any, g: Any, put: Put) -> None:
    """The same of `out[k] = sum_{j >= k} T[j, k] g[j]`; `table` is T transposed."""
    length = slab.spec.length
    for rows in query_blocks(length):
        columns = (rows[0], min(length, -(-(rows[1] + mix.band - 1) // LANES) * LANES))
        run = functools.partial(_product, slab, mix, table, g, put, rows, columns)
        slab.alone(run, unless=slab.spec.packed > 1)


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
    put(slice(*rows), functools.reduce(jnp.add, parts))


def add_table_gradient(slab: Slab, mix: Mix, out: Any, x: Any, g: Any) -> None:
    """Adds `dT[j, k] = <g[j], x[k]>` for the entries within the band, a block of rows at a time."""

    def add(rows: tuple[int, int], columns: tuple[int, int], operator: _Operator) -> None:
        mine = only(slab.spec, operator.members, g[slice(*rows)])
        part = operator.masked(dot(mine, x[slice(*columns)], (1, 1)), rows, columns)
        out[operator.table, slice(*rows), slice(*columns)] += part

    for rows in query_blocks(slab.spec.length):
        columns = (_first_column(rows[0], mix.band), rows[1])
        for operator in _operators(slab, mix):
            slab.alone(functools.partial(add, rows, columns, operator), unless=slab.spec.packed > 1)


class Mixed(NamedTuple):
    key: Any
    value: Any
    factor: float  # what products with the keys must still be multiplied by


def mix_both(slab: Slab, k: Any, v: Any) -> Mixed:
    spec = slab.spec
    key, value, factor = k, v, spec.scale * LOG2E
    if spec.logits.groups:
        key = slab.refs[kept("key")]

        def put_key(rows: slice, mixed: Array) -> None:
            # Before they are rounded, so that the factor costs neither digits nor a pass.
            key[rows] = (mixed * _F32(spec.scale * LOG2E)).astype(key.dtype)

        mix(slab, spec.logits, slab.refs["logit_table"], k, put_key)
        factor = 1.0
    if spec.values.groups:
        value = slab.refs[kept("value")]

        def put_value(rows: slice, mixed: Array) -> None:
            value[rows] = mixed.astype(value.dtype)

        mix(slab, spec.values, slab.refs["value_table"], v, put_value)
    return Mixed(key, value, factor)


def backward_mix(
    slab: Slab, name: str, mix: Mix, x: Any, sums: Any, factor: float, result: str
) -> None:
    """From the gradient of a mixed array, in `sums`, to those of the array and its operator."""
    g = slab.refs[kept("g")]
    for queries in query_blocks(slab.spec.length):
        rows = slice(*queries)
        part = sums[rows] if factor == 1.0 else sums[rows] * _F32(factor)
        if mix.groups:
            g[rows] = part.astype(g.dtype)
        else:
            slab.write(result, part, rows)
    if mix.groups:

        def put(rows: slice, part: Array) -> None:
            slab.write(result, part, rows)

        mix_turned(slab, mix, slab.refs[f"{name}_table_turned"], g, put)
        add_table_gradient(slab, mix, slab.refs[f"d_{name}_table"], x, g)
