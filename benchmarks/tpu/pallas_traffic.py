"""What the grid of a Pallas kernel does: bytes it moves, and how often its conditions hold.

A block is fetched when its index differs from the step before, and written when the next step's
differs, which is what the pipeline around a TPU kernel does. Blocks are counted as they lie in
memory: the last axis in lanes of 128, the one before in sublanes, so that a table of width 64 costs
what one of width 128 does.

A `pl.when` on program ids is counted over the grid.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

# Of what conditions on program ids are made.
_SCALAR_OPERATIONS = {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "add", "sub", "mul"}
_MONOTONE = {"and", "or", "convert_element_type"}
_SCALAR_OPERATIONS |= {"rem", "div", "min", "max", "convert_element_type"}


class KernelTraffic(NamedTuple):
    """What one call of a kernel moves of each of its inputs and outputs, in their order.

    `bytes` is None where index maps depend on data, or where the kernel starts DMAs of its own.
    `conditions` are the shares of steps in which each `pl.when` holds, in the order of the kernel;
    None where one depends on data alone.
    """

    name: str
    steps: int
    bytes: tuple[int, ...] | None
    conditions: tuple[float, ...] | None


def kernel_traffic(f: Any, *specs: Any) -> list[KernelTraffic]:
    """The Pallas kernels in a function, in the order of the program, and what each moves."""
    return [_of_call(eqn) for eqn in _calls(jax.make_jaxpr(f)(*specs))]


def _calls(jaxpr: Any) -> Iterator[Any]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _calls(value)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _of_call(eqn: Any) -> KernelTraffic:
    mapping = eqn.params["grid_mapping"]
    name = str(eqn.params.get("name") or "kernel")
    grid = mapping.grid
    if mapping.num_index_operands or not all(isinstance(n, int) for n in grid):
        return KernelTraffic(name, 0, None, None)
    steps = prod(grid)
    # Program ids of every step, the last axis fastest.
    ids = [i.reshape(-1) for i in np.indices(grid, np.int32)]
    conditions = _conditions(eqn.params["jaxpr"], ids, grid)
    moved = []
    for block in mapping.block_mappings:
        if str(getattr(block.transformed_block_aval, "memory_space", None)) in ("any", "hbm"):
            return KernelTraffic(name, steps, None, conditions)
        moved.append(_blocks_moved(block.index_map_jaxpr, ids, steps) * _block_bytes(block))
    return KernelTraffic(name, steps, tuple(moved), conditions)


def _blocks_moved(index_map: Any, ids: list[np.ndarray], steps: int) -> int:
    """How often the block changes, the first one counted."""
    if not ids:
        return 1
    function = jax.extend.core.jaxpr_as_fun(_closed(index_map))
    places = np.stack([np.asarray(x) for x in jax.vmap(function)(*ids)], 1).reshape(steps, -1)
    return 1 + int((places[1:] != places[:-1]).any(1).sum())


def _closed(jaxpr: Any) -> Any:
    return jaxpr if hasattr(jaxpr, "consts") else jax.extend.core.ClosedJaxpr(jaxpr, ())


def _block_bytes(block: Any) -> int:
    itemsize = block.array_aval.dtype.itemsize
    sizes = [n for n in map(_extent, block.block_shape) if n is not None]
    return padded_elements(sizes, itemsize) * itemsize


def padded_elements(shape: list[int] | tuple[int, ...], itemsize: int) -> int:
    """Elements of an array with its last two axes filled up to whole tiles.

    >>> padded_elements((100, 64), 2), padded_elements((1, 512), 4), padded_elements((3,), 4)
    (13312, 512, 128)
    """
    if not shape:
        return 1
    *outer, last = shape
    lanes = -(-last // 128) * 128
    if not outer:
        return lanes
    *outer, rows = outer
    # Few rows lie in a smaller tile: eight sublanes hold 8, 4, 2 or 1 of them.
    whole = 8 * max(1, 4 // itemsize // 2)
    tile = min(whole, 1 << (rows - 1).bit_length())
    return prod(outer) * (-(-rows // tile) * tile) * lanes


def _extent(dim: Any) -> int | None:
    """The size of one axis of a block; None where the axis is squeezed out."""
    if isinstance(dim, int):
        return dim
    return getattr(dim, "block_size", None)


def _conditions(kernel: Any, ids: list[np.ndarray], grid: tuple[int, ...]) -> Any:
    """The share of steps in which each condition of the kernel's body holds.

    Where it depends on data besides, as on which segments meet, the largest that it can be.
    """
    known: dict[Any, Any] = {}
    at_most: set[Any] = set()
    shares = []

    def value(x: Any) -> Any:
        return x.val if hasattr(x, "val") else known.get(x)

    def is_at_most(x: Any) -> bool:
        return not hasattr(x, "val") and x in at_most

    for eqn in kernel.eqns:
        name = eqn.primitive.name
        if name == "program_id":
            known[eqn.outvars[0]] = ids[eqn.params["axis"]]
        elif name == "num_programs":
            known[eqn.outvars[0]] = np.int32(grid[eqn.params["axis"]])
        elif name == "cond":
            index = value(eqn.invars[0])
            if index is None:
                return None
            shares.append(float(np.mean(np.asarray(index) != 0)))
        elif _is_conjunction(eqn) and sum(value(x) is not None for x in eqn.invars) == 1:
            known[eqn.outvars[0]] = next(value(x) for x in eqn.invars if value(x) is not None)
            at_most.add(eqn.outvars[0])
        elif name not in _MONOTONE and any(is_at_most(x) for x in eqn.invars):
            continue
        elif name in _SCALAR_OPERATIONS and all(value(x) is not None for x in eqn.invars):
            found = eqn.primitive.bind(*np.broadcast_arrays(*map(value, eqn.invars)), **eqn.params)
            known[eqn.outvars[0]] = np.asarray(found)
            at_most.update(eqn.outvars if any(is_at_most(x) for x in eqn.invars) else ())
    return tuple(shares)


def _is_conjunction(eqn: Any) -> bool:
    return eqn.primitive.name == "and" and eqn.outvars[0].aval.dtype == bool
