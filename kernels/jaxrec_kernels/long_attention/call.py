"""A kernel over pairs of blocks: its operands by name, its grid, what it knows of segments."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import LANES, compat
from jaxrec_kernels.attention_dropout import keep_bits, seed_words
from jaxrec_kernels.attention_tile import visible
from jaxrec_kernels.long_attention.plan import Order, Plan
from jaxrec_kernels.slot_ids import NOBODY, SlotIds, down_buffer, same

_F32 = jnp.float32
# The scalar memory holds so many blocks' least and largest ids.
_MOST_RANGES = 1 << 14
# Gradients of the queries of a whole row stay in VMEM: 8 MB at length 16,384.
_VMEM = 64 * 2**20


class Masks(NamedTuple):
    """Who sees whom beside causality: nobody sees NOBODY, and ids see their like."""

    ids: Array | None  # int32[batch, 1, padded]
    ranges: Array | None  # int32[1, 2 * batch * blocks]: least and largest id of a block


def masks_of(plan: Plan, ids: Array | None) -> Masks:
    """`ids`: int32[batch, length], NOBODY for padding; None where all events see each other."""
    if ids is None and plan.padded == plan.length:
        return Masks(None, None)
    segmented = ids is not None
    if ids is None:
        ids = jnp.zeros((plan.batch, plan.length), jnp.int32)
    behind = plan.padded - plan.length
    ids = jnp.pad(ids, ((0, 0), (0, behind)), constant_values=NOBODY)
    ranges = None
    if segmented and plan.batch * plan.blocks <= _MOST_RANGES:
        blocks = ids.reshape(plan.batch, plan.blocks, plan.block)
        least = jnp.where(blocks == NOBODY, 2**31 - 1, blocks).min(-1)
        ranges = jnp.stack([least, blocks.max(-1)], -1).reshape(1, -1)
    return Masks(ids[:, None], ranges)


class Settings(NamedTuple):
    """All that is static in a kernel."""

    plan: Plan
    factor: float  # products of queries and keys times this are logits in units of log 2
    dropout_rate: float


class _Operand(NamedTuple):
    """An array, or the type of a result; the shape of its block, and where that lies."""

    array: Any
    shape: tuple[int, ...] | None  # None: whole, in the scalar memory
    place: Callable[..., tuple[Any, ...]] | None  # of row, slab, query block, key block


class Call:
    """Collects what a kernel reads and writes; runs it on the pairs of blocks that meet.

    `axes`: the grid, from the outermost; the pairs are two axes of it.
    """

    def __init__(
        self,
        settings: Settings,
        masks: Masks,
        order: Order,
        axes: tuple[str, str, str] = ("row", "slab", "pair"),
    ) -> None:
        self.settings, self.order, self.axes = settings, order, axes
        self.inputs: dict[str, _Operand] = {}
        self.outputs: dict[str, _Operand] = {}
        self.scratch: dict[str, Any] = {}
        block = settings.plan.block
        if masks.ids is not None:
            shape = (1, 1, block)
            self.read("query_ids", masks.ids, shape, lambda row, _, i, j: (row, 0, i))
            self.read("key_ids", masks.ids, shape, lambda row, _, i, j: (row, 0, j))
            for name in ("query_ids", "key_ids"):
                self.scratch[f"{name}_down"] = down_buffer(block)
        if masks.ranges is not None:
            self.inputs["ranges"] = _Operand(masks.ranges, None, None)

    def read(self, name: str, array: Any, shape: tuple[int, ...], place: Any) -> None:
        """`place(row, slab, query block, key block)`."""
        self.inputs[name] = _Operand(array, shape, place)

    def write(self, name: str, array: Any, shape: tuple[int, ...], place: Any) -> None:
        self.outputs[name] = _Operand(array, shape, place)

    def read_seeds(self, seeds: Array | None) -> None:
        if seeds is not None:
            self.inputs["seeds"] = _Operand(seed_words(seeds), None, None)

    def wide(self, *, of_queries: bool) -> tuple[tuple[int, ...], Any]:
        """Blocks of [batch, length, heads * head_dim]."""
        plan = self.settings.plan
        return (1, plan.block, plan.lanes), lambda row, slab, i, j: (
            row,
            i if of_queries else j,
            slab,
        )

    def statistics(self) -> tuple[tuple[int, ...], Any]:
        """Blocks of [batch, slabs, heads of a slab, padded], of queries."""
        plan = self.settings.plan
        shape = (1, 1, plan.slab_heads, plan.block)
        return shape, lambda row, slab, i, j: (row, slab, 0, i)

    def run(self, body: Callable[["Step"], None], name: str, interpret: Any) -> dict[str, Any]:
        """Outputs by name."""
        plan = self.settings.plan
        sizes = {"row": (plan.batch,), "slab": (plan.slabs,), "pair": self.order[:2]}
        grid = [n for axis in self.axes for n in sizes[axis]]
        # Sums that go beyond a row or a slab are taken in order.
        parallel = self.axes.index("pair")
        arrays = [x.array for x in self.inputs.values()]
        names = (*self.inputs, *self.outputs, *self.scratch)

        def kernel(*refs: Any) -> None:
            at = self._at([pl.program_id(axis) for axis in range(len(grid))])
            body(Step(self.settings, at, dict(zip(names, refs, strict=True))))

        found = pl.pallas_call(
            kernel,
            grid=tuple(grid),
            in_specs=[self._spec(x) for x in self.inputs.values()],
            out_specs=[self._spec(x) for x in self.outputs.values()],
            out_shape=[compat.like(arrays, x.array) for x in self.outputs.values()],
            scratch_shapes=list(self.scratch.values()),
            compiler_params=compat.compiler_params(
                dimension_semantics=tuple(
                    "parallel" if axis < parallel else "arbitrary" for axis in range(len(grid))
                ),
                vmem_limit_bytes=_VMEM,
            ),
            name=name,
            interpret=interpret,
        )(*arrays)
        return dict(zip(self.outputs, found, strict=True))

    def _at(self, indices: Sequence[Any]) -> "_At":
        """Where a step of the grid is."""
        left = list(indices)
        of = {axis: [left.pop(0) for _ in range(1 + (axis == "pair"))] for axis in self.axes}
        return _At(of["row"][0], of["slab"][0], *self.order.place(*of["pair"]))

    def _spec(self, operand: _Operand) -> pl.BlockSpec:
        place = operand.place
        if place is None:
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        return pl.BlockSpec(operand.shape, lambda *indices: place(*self._at(indices)[:4]))


class _At(NamedTuple):
    row: Any
    slab: Any
    query_block: Any
    key_block: Any
    exists: Any  # whether the two blocks meet


class Step:
    """A pair of blocks at work."""

    def __init__(self, settings: Settings, at: _At, refs: dict[str, Any]) -> None:
        self.settings, self.plan, self.refs = settings, settings.plan, refs
        self.row, self.slab, self.query_block, self.key_block, self._exists = at

    def when(self, condition: Any, run: Callable[[], None]) -> None:
        """Runs it if the condition holds and there is a pair."""
        pl.when(self._exists & condition)(run)

    @property
    def masked(self) -> bool:
        return "query_ids" in self.refs

    def meets(self) -> Any:
        """Whether the two blocks can share an id."""
        if "ranges" not in self.refs:
            return True

        def ends(block: Any) -> tuple[Any, Any]:
            at = 2 * (self.row * self.plan.blocks + block)
            return self.refs["ranges"][0, at], self.refs["ranges"][0, at + 1]

        (low, high), (low_key, high_key) = ends(self.query_block), ends(self.key_block)
        return (low <= high_key) & (low_key <= high)

    @property
    def query_ids(self) -> SlotIds:
        return SlotIds(self.refs["query_ids"].at[0], self.refs["query_ids_down"])

    @property
    def key_ids(self) -> SlotIds:
        return SlotIds(self.refs["key_ids"].at[0], self.refs["key_ids_down"])

    def fill_query_ids(self) -> None:
        """Once for a block of queries, before it is cleaned."""
        if self.masked:
            self.query_ids.fill()

    def fill_key_ids(self) -> None:
        """Once for a block of keys, before it is cleaned or its tiles are masked."""
        if self.masked:
            self.key_ids.fill()

    def clean_queries(self, name: str) -> Array:
        """[block, lanes], zero where there is nobody."""
        x = self.refs[name][0]
        return self.query_ids.clean(x) if self.masked else x

    def clean_keys(self, name: str) -> Array:
        x = self.refs[name][0]
        return self.key_ids.clean(x) if self.masked else x

    def write_clean(self, name: str, to: str, *, of_queries: bool) -> None:
        """The same into a buffer, some rows after others: masks of all would be spilled."""
        ids = self.query_ids if of_queries else self.key_ids
        for number, rows in enumerate(tiles(0, self.plan.block)):

            def write(rows: slice = rows) -> None:
                x = self.refs[name][0, rows]
                self.refs[to][rows] = ids.clean(x, rows) if self.masked else x

            # Beyond the numbers of what comes after it.
            self.alone(self.plan.block + number, write)

    def mask(self, keys: slice, queries: slice, diagonal: bool) -> Array | None:
        shape = (keys.stop - keys.start, queries.stop - queries.start)
        if not self.masked:
            return visible(shape, diagonal=diagonal)
        mine = same(self.key_ids, keys, self.query_ids, queries)
        return visible(shape, diagonal=diagonal, same=mine)

    def keep(self, keys: slice, queries: slice, head: int) -> Array | None:
        """The factor of dropout: 0, or 1 / (1 - rate); None without dropout."""
        rate, plan, seeds = self.settings.dropout_rate, self.plan, self.refs.get("seeds")
        if not rate:
            return None
        assert seeds is not None
        heads = self.row * plan.heads + self.slab * plan.slab_heads + head
        start = heads * plan.length + self.query_block * plan.block + queries.start
        query = start + lax.broadcasted_iota(jnp.int32, (1, queries.stop - queries.start), 1)
        start = self.key_block * plan.block + keys.start
        key = start + lax.broadcasted_iota(jnp.int32, (keys.stop - keys.start, 1), 0)
        keep = keep_bits(seeds[0, 0], seeds[0, 1], query, key, rate)
        return jnp.where(keep, _F32(1 / (1 - rate)), _F32(0))

    def member(self, head: int, x: Array) -> Array:
        """A slab's rows with the lanes of other heads zeroed."""
        if self.plan.slab_heads == 1:
            return x
        lane = lax.broadcasted_iota(jnp.int32, (1, self.plan.lanes), 1)
        own = self.plan.lanes_of(head)
        return jnp.where((lane >= own.start) & (lane < own.stop), x, jnp.zeros((), x.dtype))

    def alone(self, number: int, run: Callable[[], None]) -> None:
        """Runs what the compiler must not begin earlier: it would, and spill what that gives.

        It sees through a condition that it can prove, and joins what has the same one.
        """
        place = self.row + self.slab + self.key_block
        pl.when(place < self.plan.batch + self.plan.slabs + self.plan.blocks + number)(run)


def tiles(first: int, stop: int) -> list[slice]:
    return [slice(start, start + LANES) for start in range(first, stop, LANES)]


def flat(x: Array) -> Array:
    """[batch, length, heads * head_dim]."""
    return x.reshape(*x.shape[:2], -1)


def to_slabs(plan: Plan, x: Array) -> Array:
    """float32[batch, slabs, heads of a slab, padded] of [batch, heads, length]."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.padded - plan.length)))
    return x.reshape(plan.batch, plan.slabs, plan.slab_heads, plan.padded)


def from_slabs(plan: Plan, x: Array) -> Array:
    return x.reshape(plan.batch, plan.heads, plan.padded)[..., : plan.length]
