"""What is static in a call on long rows, and how it is cut."""

from typing import Any, NamedTuple

from jaxrec_kernels.positional_kernel_attention import LANES, heads_of_slab

# A row is cut into equal blocks of whole tiles, this long at most.
_LARGEST_BLOCK = 512


class Plan(NamedTuple):
    batch: int
    length: int
    heads: int
    head_dim: int
    block: int
    slab_heads: int  # heads side by side in the lanes of a block

    @property
    def lanes(self) -> int:
        return self.slab_heads * self.head_dim

    @property
    def slabs(self) -> int:
        return self.heads // self.slab_heads

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)

    @property
    def padded(self) -> int:
        """Length of a row in whole blocks."""
        return self.blocks * self.block

    def lanes_of(self, head: int) -> slice:
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


def plan_of(x: Any, most_lanes: int = LANES) -> Plan:
    """Of an array, or a shape, [batch, length, heads, head_dim].

    `most_lanes`: of a slab, where heads need not be told apart.
    """
    batch, length, heads, head_dim = x.shape
    least = heads_of_slab(heads, head_dim)
    assert least is not None
    slab_heads = max(
        count
        for count in range(least, heads + 1, least)
        if heads % count == 0 and (count == least or count * head_dim <= most_lanes)
    )
    return Plan(batch, length, heads, head_dim, block_of(length), slab_heads)


def block_of(length: int) -> int:
    count = -(-length // _LARGEST_BLOCK)
    return -(-length // (count * LANES)) * LANES


Pairs = list[tuple[int, int]]


def by_query(blocks: int, reach: int | None = None) -> Pairs:
    """Blocks of queries and of keys that meet, `reach` blocks apart at most; a query's together."""
    reach = blocks if reach is None else reach
    return [(i, j) for i in range(blocks) for j in range(max(0, i - reach), i + 1)]


def by_key(blocks: int, reach: int | None = None) -> Pairs:
    """The same, a key's together, from its own block on."""
    reach = blocks if reach is None else reach
    return [(i, j) for j in range(blocks) for i in range(j, min(blocks, j + reach + 1))]


def by_distance(blocks: int, reach: int | None = None) -> Pairs:
    """The same, those at the same distance together."""
    reach = blocks if reach is None else reach
    return [(i, i - d) for d in range(min(blocks, reach + 1)) for i in range(d, blocks)]
