"""The arrays of some batch rows side by side, and what the kernel does to them."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import LANES
from jaxrec_kernels.attention_tile import zeroed
from jaxrec_kernels.positional_kernel_attention.spec import (
    Member,
    Spec,
    in_lots,
    lots_of_jobs,
    query_blocks,
    rounded_rows,
)
from jaxrec_kernels.slot_ids import SlotIds, fill_down

_F32 = jnp.float32


class Slab:
    """Batch rows side by side in the lanes, and where their arrays lie."""

    def __init__(
        self,
        spec: Spec,
        refs: dict[str, Any],
        number: int,
        first_head: Any,
        first_row: Any,
        batch_row: Any,
    ) -> None:
        """`first_row` is of the program's block, `batch_row` the same row of the whole batch."""
        self.spec, self.refs, self.number = spec, refs, number
        self.first_head, self.first_row, self.batch_row = first_head, first_row, batch_row
        rows = [first_row + i for i in range(spec.packed)]
        self.ids = [self._ids(row) if spec.masked else None for row in rows]

    def _ids(self, row: Any) -> SlotIds:
        return SlotIds(self.refs["ids"].at[row], self.refs["ids_down"].at[row])

    def own(self, name: str) -> Any:
        """Its buffer of this name."""
        return self.refs[name_of_own(name)].at[self.number]

    def read(self, name: str, rows: slice) -> None:
        """Rows of an operand [rows, lanes], zeros on padding, side by side for all batch rows.

        Into buffers, to be read where and as far as they are needed: a value that is needed late
        and early would be spilled there and back by the compiler.
        """
        parts = []
        for i, ids in enumerate(self.ids):
            part = self.refs[name][self.first_row + i, rows]
            parts.append(part if ids is None else ids.clean(part, rows))
        whole = beside(parts)
        # Products of a member have those of others zeroed: once, not in every tile.
        if name in ("q", "do") and len(self.spec.members) > 1:
            for number, member in enumerate(self.spec.members):
                self.own(f"{name}_of")[number, rows] = only(self.spec, [member], whole)
        if name != "q" or len(self.spec.members) == 1:
            self.own(name)[rows] = whole

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

    def _put(self, ref: Any, i: int, ids: SlotIds | None, part: Array, rows: slice) -> None:
        if ids is not None:
            part = ids.clean(part, rows)
        ref[self.first_row + i, rows] = part.astype(ref.dtype)


class Group:
    """The slabs that are computed at once: what they do not share does not wait for each other."""

    def __init__(self, spec: Spec, refs: dict[str, Any], slabs: list[Slab]) -> None:
        self.spec, self.refs, self.slabs = spec, refs, slabs
        self._regions = 0

    def alone(self, run: Callable[[], None]) -> None:
        """Runs what the compiler must not begin earlier: it would, and spill what that gives.

        It sees through a condition that it can prove, and joins what has the same one. Schedules
        are shorter without this, but spill hundreds of registers.
        """
        self._regions += 1
        pl.when(self.slabs[0].batch_row < self.spec.batch + self._regions)(run)

    def read(self, *names: str) -> None:
        """Operands into the slabs' buffers of the same name."""

        def read(slab: Slab, rows: slice) -> None:
            for name in names:
                slab.read(name, rows)

        self.by_blocks(read)

    def write_turned(self, name: str, source: str, factor: float) -> None:
        """A result from a buffer float32[lanes, length], times a factor."""

        def write(slab: Slab, rows: slice) -> None:
            part = slab.own(source)[:, rows]
            slab.write_turned(name, part if factor == 1.0 else part * _F32(factor), rows)

        self.by_blocks(write)

    def by_blocks(self, run: Callable[[Slab, slice], None]) -> None:
        """Runs for all blocks of rows of all slabs, a few at a time."""
        blocks = [(slab, rows) for slab in self.slabs for rows in query_blocks(self.spec.length)]

        def some(lot: list[Any]) -> None:
            for slab, rows in lot:
                run(slab, slice(*rows))

        def slots(block: tuple[Slab, tuple[int, int]]) -> int:
            start, stop = block[1]
            return self.spec.packed * (stop - start)

        for lot in in_lots(blocks, slots, self.spec.regions.slots):
            self.alone(functools.partial(some, lot))


def fill_ids(spec: Spec, refs: dict[str, Any]) -> None:
    """What the slabs of a program compare, for all of them: a block of slots at a time."""
    if spec.masked:
        for number, slots in enumerate(query_blocks(spec.length)):
            fill = functools.partial(fill_down, refs["ids"], refs["ids_down"], slice(*slots))
            pl.when(pl.program_id(1) < spec.batch + number)(fill)


def name_of_own(name: str) -> str:
    return f"own_{name}"


def beside(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def below(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def only(spec: Spec, members: list[Member], x: Array) -> Array:
    """The slab with the lanes of other members zeroed."""
    if len(members) == len(spec.members):
        return x
    lane = lax.broadcasted_iota(jnp.int32, (1, spec.lanes), 1)
    mask = functools.reduce(jnp.logical_or, [(lane >= m.first) & (lane < m.end) for m in members])
    return zeroed(mask, x)


def buffers(spec: Spec, dtype: Any, backward: bool) -> dict[str, Any]:
    """What is kept in VMEM: by each slab of a group, and by a lot of jobs."""
    # Rows as many as fill tiles of memory, which are then stored whole.
    rows = rounded_rows(spec.length)
    across, down = (rows, spec.lanes), (spec.lanes, spec.length)
    wanted: dict[str, Any] = dict.fromkeys(("q", "k", "v", "key", "value"), (across, dtype))
    if len(spec.members) > 1:
        of = ((len(spec.members), rows, spec.lanes), dtype)
        del wanted["q"]
        wanted |= dict.fromkeys(("q_of", "do_of") if backward else ("q_of",), of)
    if backward:
        wanted |= dict.fromkeys(("do", "o", "g_logit", "g_value"), (across, dtype))
        wanted |= dict.fromkeys(("d_key", "d_value"), (across, _F32))
        wanted["key_down"] = (down, dtype)
        wanted["d_query"] = (down, _F32)
        wanted["delta"] = ((len(spec.members), spec.length), _F32)
    else:
        wanted["value_down"] = (down, dtype)
        wanted["out"] = (down, _F32)
    made = {
        name_of_own(name): pltpu.VMEM((spec.together, *shape), kind)
        for name, (shape, kind) in wanted.items()
    }
    if spec.masked:
        made["ids_down"] = pltpu.VMEM((spec.rows, rows, LANES), jnp.int32)
    lots = lots_of_jobs(spec)
    # Twice, since two lots are on their way.
    square = (2, max(lot[-1].stop for lot in lots), LANES)
    row = (2, max(map(len, lots)), 8, LANES)
    if backward:
        made |= {name: pltpu.VMEM(square, dtype) for name in ("weights", "d_logits")}
    else:
        made |= {"logits": pltpu.VMEM(square, _F32), "weights": pltpu.VMEM(square, dtype)}
        made |= {name: pltpu.VMEM(row, _F32) for name in ("largest", "total")}
    return made
