"""The causal mix along the sequence, its transpose, and the gradient of its operator."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrec_kernels import LANES
from jaxrec_kernels.attention_tile import LOG2E, dot, zeroed
from jaxrec_kernels.positional_kernel_attention.slab import Group, Slab, only
from jaxrec_kernels.positional_kernel_attention.spec import (
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
        return zeroed(mine, part)


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


class Mixing(NamedTuple):
    """One mix of a group's arrays."""

    mix: Mix
    table: str  # [groups, length, length]
    x: str  # a slab's buffer of what is mixed
    put: Put  # takes float32 rows of the result


def _blocks(group: Group) -> list[tuple[Slab, tuple[int, int]]]:
    return [(slab, rows) for rows in query_blocks(group.spec.length) for slab in group.slabs]


def _mix(group: Group, mixings: list[Mixing], *, turned: bool = False) -> None:
    """Hands over rows of `out[j] = sum_{k <= j} T[j, k] x[k]`, a block at a time.

    `turned`: of `out[k] = sum_{j >= k} T[j, k] x[j]`; the table is then T transposed.
    """
    length, regions = group.spec.length, group.spec.regions
    # Beyond the triangle and the band an operator is zero.
    depth = regions.depth_tiles * LANES

    def columns(mix: Mix, rows: tuple[int, int]) -> tuple[int, int]:
        start, stop = _first_column(rows[0], mix.band), rows[1]
        if turned:
            start, stop = rows[0], -(-(rows[1] + mix.band - 1) // LANES) * LANES
        return start // depth * depth, min(length, -(-stop // depth) * depth)

    for mixing in mixings:
        jobs = [(slab, rows, columns(mixing.mix, rows)) for slab, rows in _blocks(group)]

        def size(job: Any, mix: Mix = mixing.mix) -> int:
            slab, _, cut = job
            return len(_operators(slab, mix)) * len(_tiles(cut))

        def run(lot: list[Any], mixing: Mixing = mixing) -> None:
            for job in lot:
                _product(mixing, *job)

        one = len(_operators(group.slabs[0], mixing.mix)) == 1
        most = regions.mix_tiles
        if one:
            several = len(group.slabs) > 1 and not turned
            most = regions.mix_tiles_of_slabs if several else regions.mix_tiles_alone
        for lot in in_lots(jobs, size, most):
            group.alone(functools.partial(run, lot))


def _tiles(columns: tuple[int, int]) -> list[tuple[int, int]]:
    start, stop = columns
    return [(first, min(first + LANES, stop)) for first in range(start, stop, LANES)]


def _product(mixing: Mixing, slab: Slab, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    parts, x = [], slab.own(mixing.x)
    table, step = slab.refs[mixing.table], slab.spec.regions.product_tiles * LANES
    for operator in _operators(slab, mixing.mix):
        products = []
        for start in range(*columns, step):
            some = (start, min(start + step, columns[1]))
            part = table[operator.table, slice(*rows), slice(*some)]
            products.append(dot(operator.masked(part, rows, some), x[slice(*some)], (1, 0)))
        parts.append(only(slab.spec, operator.members, functools.reduce(jnp.add, products)))
    mixing.put(slab, slice(*rows), functools.reduce(jnp.add, parts))


class _Gradient(NamedTuple):
    """A block of rows of an operator's gradient."""

    mix: Mix
    name: str
    g: str
    x: str
    table: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    slabs: list[Slab]

    def add(self, group: Group) -> None:
        """Adds `dT[j, k] = <g[j], x[k]>`."""
        rows, out = slice(*self.rows), group.refs[self.name]
        for tile in _tiles(self.columns):
            parts = []
            for slab in self.slabs:
                g, x = slab.own(self.g)[rows], slab.own(self.x)[slice(*tile)]
                for operator in _operators(slab, self.mix):
                    if operator.table == self.table:
                        products = dot(only(slab.spec, operator.members, g), x, (1, 1))
                        parts.append(operator.masked(products, self.rows, tile))
            out[self.table, rows, slice(*tile)] += functools.reduce(jnp.add, parts)


class Mixed(NamedTuple):
    key: Any
    value: Any
    factor: float  # what products with the keys must still be multiplied by


def mix_both(group: Group) -> dict[Slab, Mixed]:
    spec = group.spec
    key, value, factor = "k", "v", spec.scale * LOG2E
    mixings = []
    if spec.logits.groups:
        key, factor = "key", 1.0

        def put_key(slab: Slab, rows: slice, mixed: Array) -> None:
            # Before they are rounded, so that the factor costs neither digits nor a pass.
            keys = slab.own("key")
            keys[rows] = (mixed * _F32(spec.scale * LOG2E)).astype(keys.dtype)

        mixings.append(Mixing(spec.logits, "logit_table", "k", put_key))
    if spec.values.groups:
        value = "value"

        def put_value(slab: Slab, rows: slice, mixed: Array) -> None:
            values = slab.own("value")
            values[rows] = mixed.astype(values.dtype)

        mixings.append(Mixing(spec.values, "value_table", "v", put_value))
    _mix(group, mixings)
    return {slab: Mixed(slab.own(key), slab.own(value), factor) for slab in group.slabs}


def backward_mix(group: Group) -> None:
    """From the gradients of mixed arrays to those of the arrays and the operators."""
    spec, regions = group.spec, group.spec.regions
    both = (
        (spec.logits, "logit", "d_key", spec.scale, "k", "dk"),
        (spec.values, "value", "d_value", 1.0, "v", "dv"),
    )

    def round_or_write() -> None:
        for mix, name, sums, factor, _, result in both:
            for slab, queries in _blocks(group):
                rows = slice(*queries)
                part = slab.own(sums)[rows]
                if factor != 1.0:
                    part = part * _F32(factor)
                if mix.groups:
                    g = slab.own(f"g_{name}")
                    g[rows] = part.astype(g.dtype)
                else:
                    slab.write(result, part, rows)

    group.alone(round_or_write)
    mixings, gradients = [], []
    for mix, name, _, _, x, result in both:
        if not mix.groups:
            continue

        def put(slab: Slab, rows: slice, part: Array, result: str = result) -> None:
            slab.write(result, part, rows)

        def operators(slab: Slab, mix: Mix = mix) -> int:
            return len(_operators(slab, mix))

        mixings.append(Mixing(mix, f"{name}_table_turned", f"g_{name}", put))
        gradients += [
            _Gradient(
                mix,
                f"d_{name}_table",
                f"g_{name}",
                x,
                table,
                rows,
                (_first_column(rows[0], mix.band), rows[1]),
                slabs,
            )
            for slabs in in_lots(group.slabs, operators, regions.gradient_parts)
            for rows in query_blocks(spec.length)
            for table in range(mix.groups)
        ]
    _mix(group, mixings, turned=True)

    def add(lot: list[_Gradient]) -> None:
        for gradient in lot:
            gradient.add(group)

    def parts(gradient: _Gradient) -> int:
        operators = len(_operators(group.slabs[0], gradient.mix)) // gradient.mix.groups
        return len(gradient.slabs) * operators

    def size(gradient: _Gradient) -> int:
        return parts(gradient) * len(_tiles(gradient.columns))

    most = regions.gradient_tiles
    if spec.packed == 1:
        several = len(group.slabs) > 1
        most = regions.gradient_tiles_of_slabs if several else regions.mix_tiles
    for lot in in_lots(gradients, size, most):
        group.alone(functools.partial(add, lot))
