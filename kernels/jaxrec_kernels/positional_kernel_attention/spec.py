"""What is static in a call of the kernel, and how it is cut."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxrec_kernels import LANES, tuning
from jaxrec_kernels.positional_kernel_attention import heads_of_slab
from jaxrec_kernels.positional_kernel_attention.regions import SHORT, Regions, regions_for

FORWARD, BACKWARD = "positional_kernel_attention_forward", "positional_kernel_attention_backward"
# Half of what a v5e or v6e has. The default of 16 MiB does not hold the operators of length 1024.
VMEM_BYTES = 64 << 20
# Left to the compiler.
SPARE_BYTES = 8 << 20
_ROWS = 8  # batch rows of a program at most


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
    regions: Regions

    @property
    def block_lanes(self) -> int:
        """Of one batch row."""
        return self.slab_heads * self.head_dim

    @property
    def lanes(self) -> int:
        return self.packed * self.block_lanes

    @property
    def together(self) -> int:
        """Slabs that are computed at once."""
        cut = Cut(self.rows, self.packed)
        return slabs_together(cut, self.slab_heads, self.length, self.regions)

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


class Cut(NamedTuple):
    """Batch rows of a program, and of a slab: those that are computed side by side."""

    rows: int
    packed: int


class Size(NamedTuple):
    """Sizes of a call; `mixes` counts its operators, `groups` their squares."""

    batch: int
    length: int
    heads: int
    head_dim: int
    slab_heads: int
    itemsize: int
    mixes: int
    groups: int
    regions: Regions


def size_of(query: Any, operators: tuple[Any, ...]) -> Size:
    """The sizes of a call; an operator's first axis has one for all heads or one a head."""
    batch, length, heads, head_dim = query.shape
    slab_heads = heads_of_slab(heads, head_dim)
    assert slab_heads is not None
    given = [x for x in operators if x is not None]
    groups = sum(min(x.shape[0], slab_heads) for x in given)
    itemsize = query.dtype.itemsize
    regions = regions_for(tuning.device_kind(), length)
    sizes = batch, length, heads, head_dim, slab_heads, itemsize, len(given), groups
    size = Size(*sizes, regions)
    # Wide slabs of which fewer fit at once.
    while regions.group_tiles > 1 and vmem_bytes(size, cut_for(size)) > VMEM_BYTES - SPARE_BYTES:
        regions = regions._replace(group_tiles=regions.group_tiles // 2)
        size = Size(*sizes, regions)
    return size


def tuned_cut(kernel: str, size: Size) -> Cut:
    """That of the tuning table for such a call, where there is one that fits; else `cut_for`.

    `kernel`: the name given to `pl.pallas_call`.
    """
    return tuning.tuned(kernel, call_class(size), partial(fit, size), partial(cut_for, size))


def call_class(size: Size) -> dict[str, int]:
    """What tells calls apart in a tuning table; batches of all sizes are cut alike."""
    return {
        "length": size.length,
        "heads": size.heads,
        "head_dim": size.head_dim,
        "itemsize": size.itemsize,
        "mixes": size.mixes,
    }


def fit(size: Size, *, rows: int, packed: int) -> Cut | None:
    """The cut with these sizes; None where the call cannot be cut so."""
    lanes = packed * size.slab_heads * size.head_dim
    beside = packed == 1 or (lanes <= LANES and size.length <= SHORT)
    if size.batch % rows or rows % packed or not beside:
        return None
    cut = Cut(rows, packed)
    return cut if vmem_bytes(size, cut) <= VMEM_BYTES - SPARE_BYTES else None


def cut_for(size: Size) -> Cut:
    """Rows enough to hide a program's start, as many side by side as fill the lanes."""
    rows = rows_of_program(size.batch, size.length)
    return Cut(rows, rows_of_slab(rows, size.slab_heads * size.head_dim, size.length))


def vmem_bytes(size: Size, cut: Cut) -> int:
    """Of the backward kernel, which takes more than the forward one."""
    length, item = rounded_rows(size.length), size.itemsize
    wide = -(-size.slab_heads * size.head_dim // LANES) * LANES
    lanes = -(-cut.packed * size.slab_heads * size.head_dim // LANES) * LANES
    filled = -(-size.length // LANES) * LANES
    members = cut.packed * size.slab_heads
    # Operands are there twice, one for the next program: q, k, v, o, do and dq, dk, dv.
    operands = 2 * cut.rows * (8 * length * wide * item + 2 * 8 * filled * 4)
    # Operators as they are and turned, and their gradients in float32.
    squares = 2 * size.groups * length * filled * (2 * item + 4)
    # A slab's k, v, mixed and their gradients, o, do; q and do of each member; keys turned, and dq.
    kept = (8 + 2 * members) * length * item + 2 * length * 4 + filled * (item + 4)
    deltas = -(-members // 8) * 8 * filled * 4
    together = slabs_together(cut, size.slab_heads, size.length, size.regions)
    slabs = together * (lanes * kept + deltas)
    # Two lots of two squares.
    lots = 4 * LANES * max(size.regions.lot_tiles * LANES, filled) * item
    ids = cut.rows * length * LANES * 4
    return operands + squares + slabs + lots + ids


def rounded_rows(rows: int) -> int:
    """So many that they fill tiles of memory, of any of the dtypes."""
    return -(-rows // 32) * 32


def slabs_together(cut: Cut, slab_heads: int, length: int, regions: Regions) -> int:
    """Slabs of a program that are computed at once."""
    slabs, blocks = cut.rows // cut.packed, -(-length // LANES)
    tiles = cut.packed * slab_heads * blocks * (blocks + 1) // 2
    most = max(1, regions.group_tiles // tiles)
    return next(count for count in range(min(most, slabs), 0, -1) if slabs % count == 0)


def rows_of_program(batch: int, length: int) -> int:
    """Batch rows that a program takes: enough to hide its start, few enough for VMEM."""
    wanted = max(1, min(_ROWS, 2048 // length))
    return next(rows for rows in range(wanted, 0, -1) if batch % rows == 0)


def rows_of_slab(rows: int, lanes: int, length: int) -> int:
    """Batch rows that are computed side by side in the lanes."""
    if length > SHORT or lanes > LANES:
        return 1
    return next(count for count in (8, 4, 2, 1) if count * lanes <= LANES and rows % count == 0)


def query_blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + LANES, length)) for start in range(0, length, LANES)]


class Place(NamedTuple):
    """A job of a lot: one member's block of queries, and where the lot has room for it."""

    slab: int
    member: int
    queries: tuple[int, int]
    number: int  # in its lot
    first: int  # row of the lot's squares

    @property
    def stop(self) -> int:
        return self.first + rounded_rows(self.queries[1])


def lots_of_jobs(spec: Spec) -> list[list[Place]]:
    """The jobs of a group, in lots that go through the stages together."""
    jobs = list(
        itertools.product(query_blocks(spec.length), range(spec.together), range(len(spec.members)))
    )
    regions = spec.regions
    most = regions.lot_tiles if spec.slab_heads == 1 else regions.lot_tiles_of_heads
    lots = []
    for lot in in_lots(jobs, lambda job: -(-job[0][1] // LANES), most):
        places: list[Place] = []
        for queries, slab, member in lot:
            first = places[-1].stop if places else 0
            places.append(Place(slab, member, queries, len(places), first))
        lots.append(places)
    return lots


def in_lots(jobs: list[Any], size: Callable[[Any], int], most: int) -> list[list[Any]]:
    """Jobs one after another in lots that are no larger than `most`, if no job is."""
    lots: list[list[Any]] = []
    total = 0
    for job in jobs:
        if not lots or total + size(job) > most:
            lots.append([])
            total = 0
        lots[-1].append(job)
        total += size(job)
    return lots
