"""What is static in a call on long rows, and how it is cut."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

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


class Order(NamedTuple):
    """How the pairs of blocks that meet are visited, `reach` blocks apart at most.

    An outer block goes with some inner ones; `place` gives a pair's block of queries, its block of
    keys, and whether there is such a pair. Where there is none, it names the nearest one, so that
    nothing is fetched for it.
    """

    outer: int
    inner: int
    place: Callable[[Any, Any], tuple[Any, Any, Any]]


def by_query(blocks: int, reach: int) -> Order:
    """A query's blocks of keys together, its own as the last."""

    def place(outer: Any, inner: Any) -> tuple[Any, Any, Any]:
        key = outer - reach + inner
        return outer, jnp.maximum(key, 0), key >= 0

    return Order(blocks, reach + 1, place)


def by_key(blocks: int, reach: int) -> Order:
    """A key's blocks of queries together, its own as the first."""

    def place(outer: Any, inner: Any) -> tuple[Any, Any, Any]:
        query = outer + inner
        return jnp.minimum(query, blocks - 1), outer, query < blocks

    return Order(blocks, reach + 1, place)


def by_distance(blocks: int, reach: int) -> Order:
    """Those at the same distance together."""

    def place(outer: Any, inner: Any) -> tuple[Any, Any, Any]:
        query = jnp.maximum(inner, outer)
        return query, query - outer, inner >= outer

    return Order(reach + 1, blocks, place)
