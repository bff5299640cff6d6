"""What is static in a call on long rows, and how it is cut."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrec_kernels import LANES, tuning
from jaxrec_kernels.positional_kernel_attention import heads_of_slab

# A row is cut into equal blocks of whole tiles, this long at most.
_LARGEST_BLOCK = 512
# Of the 64 MiB that the kernels ask for; the rest is for rows, and for the compiler.
_MOST_SQUARES = 32 << 20


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
    block = tuned_block(length, heads, head_dim, x.dtype.itemsize)
    return Plan(batch, length, heads, head_dim, block, slab_heads)


def tuned_block(length: int, heads: int, head_dim: int, itemsize: int) -> int:
    """That of the tuning table for such a call, where there is one that fits; else `block_of`.

    One block for all kernels of a call, since an operator that is cut once is read by several.
    """
    return tuning.tuned(
        "long_attention",
        call_class(length, heads, head_dim, itemsize),
        partial(fit, length, heads, head_dim),
        partial(block_of, length),
    )


def call_class(length: int, heads: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """What tells calls apart in a tuning table; batches of all sizes are cut alike."""
    return {"length": length, "heads": heads, "head_dim": head_dim, "itemsize": itemsize}


def fit(length: int, heads: int, head_dim: int, *, block: int) -> int | None:
    """The block; None where a row cannot be cut so, or is filled up further than by the rule."""
    # The gradient of an operator a head, which is there twice, takes most.
    squares = 2 * 4 * block * block * (heads_of_slab(heads, head_dim) or heads)
    if block % LANES or squares > _MOST_SQUARES:
        return None
    rule = block_of(length)
    return block if -(-length // block) * block <= -(-length // rule) * rule else None


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
