"""The arrays of some batch rows side by side, and what the kernel does to them."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels.attention_tile import NOBODY
from jaxrec_kernels.positional_kernel_attention import LANES
from jaxrec_kernels.positional_kernel_attention.spec import Member, Spec

_F32 = jnp.float32


class Ids(NamedTuple):
    """The sequence of every slot of one batch row, along the lanes and down the sublanes."""

    lanes: Array  # int32[1, length]
    sublanes: Array  # int32[length, 1]

    def real(self) -> Array:
        return self.sublanes != NOBODY


class Slab:
    """The batch rows that are computed at once, and how their arrays lie side by side."""

    def __init__(self, spec: Spec, refs: dict[str, Any], first_row: Any) -> None:
        self.spec, self.refs, self.first_row = spec, refs, first_row
        self.ids = [self._ids(first_row + i) for i in range(spec.packed)]

    def _ids(self, row: Any) -> Ids | None:
        if not self.spec.masked:
            return None
        lanes = self.refs["ids"][row]
        down = jnp.transpose(jnp.broadcast_to(lanes, (8, self.spec.length)))
        return Ids(lanes, down[:, :1])

    def read(self, name: str) -> Any:
        """[length, lanes], zeros on padding: an operand side by side for all batch rows."""
        parts = []
        for i, ids in enumerate(self.ids):
            part = self.refs[name][self.first_row + i]
            if ids is not None:
                part = jnp.where(ids.real(), part, jnp.zeros((), part.dtype))
            parts.append(part)
        return self.keep(name, beside(parts))

    def keep(self, name: str, value: Array) -> Any:
        """A buffer with the value, to be read where and as far as it is needed.

        A value that is needed late and early would be spilled there and back by the compiler.
        """
        buffer = self.refs[kept(name)]
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

    def _put(self, ref: Any, i: int, ids: Ids | None, part: Array, rows: slice) -> None:
        if ids is not None:
            part = jnp.where(ids.real()[rows], part, jnp.zeros((), part.dtype))
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
    return {kept(name): pltpu.VMEM(*what) for name, what in wanted.items()}
