"""The operands of the kernels by name, where their blocks lie, and how much memory they take."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxrec_kernels import LANES, compat
from jaxrec_kernels.hstu_attention import facts as _facts
from jaxrec_kernels.hstu_attention.plan import DEFAULT_BYTES, SPARE_BYTES, SUBLANES, Plan, up_to
from jaxrec_kernels.hstu_attention.step import Index, Settings


class Operand(NamedTuple):
    """An array, or what is known of an output, and how it is cut."""

    array: Any
    spec: pl.BlockSpec


class Operands:
    """Inputs, outputs and scratch of a `pallas_call`, by name."""

    def __init__(self, settings: Settings, batch: int, heads: int) -> None:
        plan = settings.plan
        programs = (batch // plan.sequences, heads // plan.group)
        self._settings = settings
        self.grid = programs if plan.whole else (*programs, plan.blocks, plan.blocks)
        self.inputs: dict[str, Operand] = {}
        self.outputs: dict[str, Operand] = {}
        self.scratch: dict[str, Any] = {}

    def block(self, shape: tuple[int | None, ...], index: Callable[..., Any]) -> pl.BlockSpec:
        """`index(b, g, i, j)`: a program's block at query block i and key block j.

        Forward the outer blocks are those of queries, backward those of keys. Pairs with j > i are
        not computed; they fetch what the next pair that is will need.
        """
        if self._settings.plan.whole:
            return pl.BlockSpec(shape, lambda b, g: index(b, g, 0, 0))
        if self._settings.queries_down:
            return pl.BlockSpec(shape, lambda b, g, i, j: index(b, g, i, jnp.minimum(i, j)))
        return pl.BlockSpec(shape, lambda b, g, j, i: index(b, g, jnp.maximum(i, j), j))

    def vectors(self, width: int, of_keys: bool) -> pl.BlockSpec:
        """Blocks of `[batch, length, heads * width]`, at the block of keys or of queries."""
        plan = self._settings.plan
        shape = (plan.sequences, plan.block, plan.group * width)
        return self.block(shape, lambda b, g, i, j: (b, j if of_keys else i, g))

    def everywhere(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """An array that every program sees all of."""
        return self.block(shape, lambda b, g, i, j: (0,) * len(shape))

    def add_table(self, name: str, x: Array) -> None:
        self.inputs[name] = Operand(x, self.everywhere(x.shape))

    def add_scalars(self, name: str, x: Array) -> None:
        """Scalars as `[1, count]`: a vector that is batched by `vmap` is no block of a TPU's."""
        self.inputs[name] = Operand(x[None], pl.BlockSpec(memory_space=pltpu.SMEM))

    def add_common(self, inputs: Any, edges: tuple[int, ...]) -> None:
        """What both kernels read beside the vectors, and the tiles that they form of it."""
        plan, fields = self._settings.plan, self._settings.fields
        queries, keys = _facts.facts(inputs, plan.filled)
        facts = (plan.sequences, fields.rows, plan.chunks * LANES)
        self.inputs["queries"] = Operand(queries, self.block(facts, lambda b, g, i, j: (b, 0, i)))
        self.inputs["keys"] = Operand(keys, self.block(facts, lambda b, g, i, j: (b, 0, j)))
        if self._settings.lags:
            self.add_table("lag_rows", _facts.lag_rows(inputs.distance_bias, plan.distances))
            self.scratch["lag_tiles"] = pltpu.VMEM((plan.distances, LANES, LANES), jnp.float32)
        if self._settings.times:
            self.add_table("edges", _facts.edge_row(edges))
            self.add_table("time_row", _facts.time_row(inputs.time_table))
        self.add_scalars("once", jnp.ones(1, jnp.int32))
        if self._settings.skips:
            self.add_scalars("ranges", _facts.segment_ranges(inputs.segment_ids, plan.block))
        self.add_row_scratch("wide", fields.rows, plan.block, LANES, dtype=jnp.int32)
        self.add_row_scratch("bias", plan.block, plan.chunks * LANES)

    def add_row_scratch(self, name: str, *shape: int, dtype: Any = jnp.float32) -> None:
        """Scratch for each row of the batch that a program takes."""
        self.scratch[name] = pltpu.VMEM((self._settings.plan.sequences, *shape), dtype)

    def call(self, body: Callable[[Any], None], name: str, interpret: Any) -> Any:
        """Runs the kernel; gives its outputs by name."""
        names = (*self.inputs, *self.outputs, *self.scratch)
        arrays = [x.array for x in self.inputs.values()]
        out = pl.pallas_call(
            lambda *refs: body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
            grid=self.grid,
            in_specs=[x.spec for x in self.inputs.values()],
            out_specs=[x.spec for x in self.outputs.values()],
            out_shape=[compat.like(arrays, x.array) for x in self.outputs.values()],
            scratch_shapes=list(self.scratch.values()),
            compiler_params=compat.compiler_params(
                # In order: the tables' gradients are summed over the whole grid.
                dimension_semantics=("arbitrary",) * len(self.grid),
                vmem_limit_bytes=max(self.vmem_bytes() + SPARE_BYTES, DEFAULT_BYTES),
            ),
            name=name,
            interpret=interpret,
        )(*arrays)
        return SimpleNamespace(**dict(zip(self.outputs, out, strict=True)))

    def vmem_bytes(self) -> int:
        """Blocks are there twice, one for the next program."""
        blocks = [
            (x.spec.block_shape, x.array.dtype)
            for x in (*self.inputs.values(), *self.outputs.values())
            if x.spec.block_shape is not None
        ]
        scratch = sum(_filled_bytes(x.shape, x.dtype) for x in self.scratch.values())
        return scratch + sum(2 * _filled_bytes(shape, dtype) for shape, dtype in blocks)


def _filled_bytes(shape: Any, dtype: Any) -> int:
    """Of an array in the vector memory, where the last two axes fill whole tiles."""
    *outer, rows, lanes = (1 if n is None else n for n in (1, *shape))
    itemsize = jnp.dtype(dtype).itemsize
    return math.prod(outer) * up_to(rows, SUBLANES * 4 // itemsize) * up_to(lanes, LANES) * itemsize


def flat(x: Array) -> Array:
    """`[batch, length, heads, width]` with the heads side by side."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, heads * width)


def flat_like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] * x.shape[3]), x.dtype)


def first_program(plan: Plan) -> Array:
    """Whether this is the first step of the whole grid."""
    first = pl.program_id(0) == 0
    for axis in range(1, 2 if plan.whole else 4):
        first = first & (pl.program_id(axis) == 0)
    return first


def meets(refs: Any, plan: Plan, b: Index, i: Index, j: Index) -> Array:
    """Whether a query block and a key block of a row can share a segment."""

    def ends(block: Index) -> tuple[Array, Array]:
        at = 2 * (b * plan.blocks + block)
        return refs.ranges[0, at], refs.ranges[0, at + 1]

    (low_i, high_i), (low_j, high_j) = ends(i), ends(j)
    return (low_i <= high_j) & (low_j <= high_i)
