"""Which sequence each slot of a row belongs to, where a kernel compares them.

A comparison needs the ids of one side along the lanes and of the other down the sublanes. The
latter are written to VMEM once, alike in all lanes: as a column in registers they would fill most
of those for as long as a row takes, and every use would spread them over the lanes again.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import LANES
from jaxrec_kernels.attention_tile import zeroed

# The id of no sequence: the slot is padding.
NOBODY = -(2**31)


def down_buffer(slots: int) -> Any:
    """Scratch memory for `SlotIds.down`."""
    return pltpu.VMEM((slots, LANES), jnp.int32)


def fill_down(along: Any, down: Any, slots: slice) -> None:
    """`SlotIds.down` of several rows, int32[rows, all, LANES], from their ids [rows, 1, all]."""
    rows = range(along.shape[0])
    turned = jnp.transpose(jnp.concatenate([along[row, :, slots] for row in rows], axis=0))
    for row in rows:
        down[row, slots] = jnp.broadcast_to(turned[:, row : row + 1], (turned.shape[0], LANES))


class SlotIds(NamedTuple):
    """The ids of some slots."""

    along: Any  # int32[1, slots], an array or a reference
    down: Any  # a reference to int32[slots, LANES], of use once filled

    def fill(self) -> None:
        along = self.along[...]
        self.down[...] = jnp.transpose(jnp.broadcast_to(along, (LANES, along.shape[1])))

    def spread(self, rows: slice, width: int) -> Array:
        """int32[rows, width]."""
        part = self.down[rows, : min(width, LANES)]
        if width <= LANES:
            return part
        return jnp.concatenate([part] * -(-width // LANES), axis=1)[:, :width]

    def clean(self, x: Array, rows: slice = slice(None)) -> Array:
        """[rows, lanes], zero where there is nobody."""
        return zeroed(self.spread(rows, x.shape[1]) != NOBODY, x)


def same(down: SlotIds, rows: slice, along: SlotIds, columns: slice) -> Array:
    """bool[rows, columns]: which slots are of one sequence."""
    ids = along.along[:, columns]
    return down.spread(rows, ids.shape[1]) == ids
