"""What the ops over a whole item catalogue share: checks of arguments, blocks of rows."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxrec.ops._manual_axes import vary_together

Carry = TypeVar("Carry")
_FLOATS = ("float32", "bfloat16")


def check_matrices(op: str, hidden: Any, item_table: Any) -> None:
    """Raises unless `hidden` is [rows, D] and `item_table` is [V, D] of one supported dtype."""
    for name, array in (("hidden", hidden), ("item_table", item_table)):
        check_float(op, name, array)
        if array.ndim != 2:
            hint = "; flatten its leading axes" if name == "hidden" and array.ndim > 2 else ""
            raise ValueError(f"{op}: {name} must have rank 2, got shape {array.shape}{hint}")
    if hidden.shape[1] != item_table.shape[1]:
        raise ValueError(
            f"{op}: hidden and item_table must have one width, got {hidden.shape[1]} and "
            f"{item_table.shape[1]}"
        )
    if hidden.dtype != item_table.dtype:
        raise ValueError(
            f"{op}: hidden and item_table must have one dtype, got {hidden.dtype} and "
            f"{item_table.dtype}; cast one of them"
        )
    for axis, what in enumerate(("item", "number an item")):
        if item_table.shape[axis] == 0:
            raise ValueError(
                f"{op}: item_table must hold at least one {what}, got {item_table.shape}"
            )


def check_float(op: str, name: str, array: Any) -> None:
    if str(array.dtype) not in _FLOATS:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16, got {array.dtype}")


def check_integer(op: str, name: str, array: Any) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{op}: {name} must hold integers, got {array.dtype}")


def check_bool(op: str, name: str, array: Any) -> None:
    if array.dtype != jnp.bool_:
        raise ValueError(f"{op}: {name} must be bool, got {array.dtype}")


def check_shape(op: str, name: str, array: Any, want: tuple[int, ...]) -> None:
    if array.shape != want:
        raise ValueError(f"{op}: {name} must have shape {want}, got {array.shape}")


class Shard(NamedTuple):
    """That a table is one of several that lie along a mesh axis, in order, inside `shard_map`.

    `items` counts those of all shards; rows of the last ones beyond it are padding.
    """

    axis: str
    items: int

    def first(self, rows: int) -> jax.Array:
        """The id of this shard's first item."""
        return lax.axis_index(self.axis) * rows

    def real(self, rows: int) -> jax.Array | None:
        """bool[rows]: which of this shard's rows are items; None for all."""
        if self.items == lax.axis_size(self.axis) * rows:
            return None
        return self.first(rows) + jnp.arange(rows, dtype=jnp.int32) < self.items


def make_shard(op: str, table: Any, item_axis: str | None, num_items: int | None) -> Shard | None:
    """What the caller says about the table, checked."""
    if item_axis is None:
        if num_items is not None:
            raise ValueError(f"{op}: num_items goes with item_axis; cut item_table instead")
        return None
    try:
        shards = lax.axis_size(item_axis)
    except NameError:
        raise ValueError(
            f"{op}: item_axis {item_axis!r} is no mesh axis here; it is for use inside "
            "jax.shard_map"
        ) from None
    rows = shards * table.shape[0]
    items = rows if num_items is None else int(num_items)
    if not 0 < items <= rows:
        raise ValueError(
            f"{op}: num_items must be from 1 to the {rows} rows of all {shards} shards, got {items}"
        )
    return Shard(item_axis, items)


def together(shard: Shard | None, *arguments: Any) -> tuple[Any, ...]:
    """The arguments varying alike, over the items' axis too: its sums then give one result."""
    if shard is None:
        return vary_together(*arguments)
    return vary_together(*arguments, lax.axis_index(shard.axis))[:-1]


def alike(shard: Shard | None, result: jax.Array) -> jax.Array:
    """The result, which every shard of the items has, as one that does not vary over them."""
    return result if shard is None else lax.pmean(result, shard.axis)


def from_all(shard: Shard | None, g: jax.Array) -> jax.Array:
    """The cotangents of all shards' results, each of which depends on every shard's rows."""
    return g if shard is None else lax.psum(g, shard.axis)


def ids_as_int32(ids: jax.Array) -> jax.Array:
    """`ids` in int32; what int32 cannot hold becomes -1 instead of wrapping to another id."""
    narrow = jnp.iinfo(jnp.int32)
    if jnp.iinfo(ids.dtype).max > narrow.max:
        outside = ids > narrow.max
        if jnp.iinfo(ids.dtype).min < narrow.min:
            outside |= ids < narrow.min
        ids = jnp.where(outside, jnp.array(-1).astype(ids.dtype), ids)
    return ids.astype(jnp.int32)


class Rows(NamedTuple):
    """One block of consecutive rows, and which of them no earlier block held.

    All blocks have one size, so the last one begins early and repeats rows where the size does
    not divide the count; `fresh` is False there. This needs no padded copy of the array.
    """

    start: jax.Array
    size: int
    fresh: jax.Array

    def take(self, array: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, self.start, self.size)

    def take_fresh(self, array: jax.Array) -> jax.Array:
        """The block's rows, zeros in the repeated ones: sums then count every row once."""
        block = self.take(array)
        mask = self.fresh.reshape((self.size,) + (1,) * (block.ndim - 1))
        return jnp.where(mask, block, jnp.zeros((), block.dtype))

    def put(self, array: jax.Array, block: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, block, self.start, 0)

    def add(self, array: jax.Array, block: jax.Array) -> jax.Array:
        return self.put(array, self.take(array) + block)


def balanced(count: int, largest: int, multiple: int = 8) -> int:
    """Size of equal blocks, none above `largest`, so that the last one repeats few rows.

    >>> balanced(1000, 512), balanced(12800, 512), balanced(7, 512)
    (504, 512, 7)
    """
    blocks = -(-count // largest)
    return min(count, largest, -(-count // (blocks * multiple)) * multiple)


def over_rows(
    count: int,
    size: int,
    body: Callable[[Rows, Carry], Carry],
    carry: Carry,
    *,
    end: jax.Array | None = None,
) -> Carry:
    """Runs `body` on every block of `size` rows out of `count`, in order.

    Blocks that begin at row `end` or after it are left out where there are several. The loop then
    has no reverse mode.
    """
    size = min(size, count)
    blocks = -(-count // size)

    def step(index: jax.Array, carry: Carry) -> Carry:
        begin = index * size
        start = jnp.minimum(begin, count - size)
        return body(Rows(start, size, start + jnp.arange(size, dtype=jnp.int32) >= begin), carry)

    if blocks == 1:
        return step(jnp.zeros((), jnp.int32), carry)
    rounds = jnp.int32(blocks) if end is None else -(-end // jnp.int32(size))
    return lax.fori_loop(jnp.int32(0), rounds, step, carry)
