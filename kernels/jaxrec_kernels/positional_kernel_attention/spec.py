"""What is static in a call of the kernel, and how it is cut."""

import itertools
from typing import NamedTuple

from jaxrec_kernels.positional_kernel_attention import LANES

_ROWS = 8  # batch rows of a program at most
_PACKED_UP_TO = 256  # longer rows are not put side by side


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


def query_blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + LANES, length)) for start in range(0, length, LANES)]


def key_tiles(end: int) -> list[tuple[int, int]]:
    return query_blocks(end)
