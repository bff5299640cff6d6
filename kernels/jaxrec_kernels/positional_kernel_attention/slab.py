"""The arrays of some batch rows side by side, and what the kernel does to them."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import LANES
from jaxrec_kernels.positional_kernel_attention.spec import Member, Spec
from jaxrec_kernels.slot_ids import SlotIds, down_buffer

_F32 = jnp.float32


class Slab:
    """The batch rows that are computed at once, and how their arrays lie side by side."""

    def __init__(
        self, spec: Spec, refs: dict[str, Any], first_head: Any, first_row: Any, batch_row: Any
    ) -> None:
        """`first_row` is of the program's block, `batch_row` the same row of the whole batch."""
        self.spec, self.refs = spec, refs
        self.first_head, self.first_row, self.batch_row = first_head, first_row, batch_row
        self._regions = 0
        self.ids = [self._ids(i) for i in range(spec.packed)]

    def _ids(self, i: int) -> SlotIds | None:
        if not self.spec.masked:
            return None
        ids = SlotIds(self.refs["ids"].at[self.first_row + i], self.refs[kept(f"ids_{i}")])
        ids.fill()
        return ids

    def read(self, name: str) -> Any:
        """[length, lanes], zeros on padding: an operand side by side for all batch rows."""
        parts = []
        for i, ids in enumerate(self.ids):
            part = self.refs[name][self.first_row + i]
            parts.append(part if ids is None else ids.clean(part))
        return self.keep(name, beside(parts))

    def keep(self, name: str, value: Array) -> Any:
        """A buffer with the value, to be read where and as far as it is needed.

        A value that is needed late and early would be spilled there and back by the compiler.
        """
        buffer = self.refs[kept(name)]
        buffer[...] = value
        return buffer

    def alone(self, run: Callable[[], None], *, unless: bool = False) -> None:
        """Runs what the compiler must not begin earlier: it would, and spill what that gives.

        It sees through a condition that it can prove, and joins what has the same one. Schedules
        are shorter without this, but spill hundreds of registers.
        `unless`: what is run fits the registers together with what is around it.
        """
        if unless:
            run()
            return
        self._regions += 1
        pl.when(self.batch_row < self.spec.batch + self._regions)(run)

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


def kept(name: str) -> str:
    return f"kept_{name}"


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
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def buffers(spec: Spec, dtype: Any, backward: bool) -> dict[str, Any]:
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
        wanted |= dict.fromkeys(("largest", "total"), ((1, LANES), _F32))
    made = {kept(name): pltpu.VMEM(*what) for name, what in wanted.items()}
    if spec.masked:
        made |= {kept(f"ids_{i}"): down_buffer(spec.length) for i in range(spec.packed)}
    return made
