"""Heads side by side in registers, and sums over them.

A product of two whole registers costs the matrix unit what one of half a register costs, so a head
is picked by zeros in the other heads' lanes, of one operand or of the result; no lanes are moved.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxrec_kernels import LANES
from jaxrec_kernels.hstu_attention.operands import Operands
from jaxrec_kernels.hstu_attention.plan import Plan, up_to
from jaxrec_kernels.hstu_attention.step import Index, Settings, Step, over_chunks, slots

Side = Literal["query", "value"]


class Head(NamedTuple):
    """Where the vectors of a head lie: whole registers, and its own lanes of them."""

    registers: Any
    number: int
    lanes: Array | None  # whose each lane of the registers is; None: all are its own

    def only(self, x: Array) -> Array:
        """Zeros in the lanes of other heads."""
        if self.lanes is None:
            return x
        return jnp.where(self.lanes == self.number, x, jnp.zeros((), x.dtype))


def head_of(step: Step, bundle: Index, head: int, side: Side) -> Head:
    """A head of a bundle, of the vectors that are as wide as queries or as values."""
    plan, width = step.plan, _width(step.settings, side)
    total = plan.bundle * width
    first, last = head * width, (head + 1) * width
    start, stop = first // LANES * LANES, min(up_to(last, LANES), total)
    registers: Any = slice(start, stop)
    if plan.group != plan.bundle:
        registers = pl.ds(pl.multiple_of(bundle * total + start, LANES), stop - start)
    own = (first, last) == (start, stop)
    return Head(registers, head, None if own else getattr(step.refs, _table(side))[:, start:stop])


def add_lanes(settings: Settings, operands: Operands) -> None:
    """The head of each lane of a bundle, read where it is compared.

    Numbers of lanes, of which it could be told too, would be made once for all loops, and spilled.
    """
    if settings.plan.bundle > 1:
        for side in get_args(Side):
            width = _width(settings, side)
            lanes = jnp.arange(settings.plan.bundle * width, dtype=jnp.int32)
            operands.add_table(_table(side), lanes[None] // width)


def _width(settings: Settings, side: Side) -> int:
    return settings.head_dim if side == "query" else settings.value_dim


def _table(side: Side) -> str:
    return f"head_of_{side}_lane"


class Sum(NamedTuple):
    """An output that is summed over heads or blocks in float32, then scaled and written.

    Heads that share registers add up there, each with zeros in the lanes of the others.
    """

    plan: Plan
    name: str
    width: int
    factor: float
    rows: int | None = None  # of the sum, where it outlives the output's block

    @property
    def _at_once(self) -> bool:
        """The heads of a bundle alone meet in their registers, and come one after the other."""
        same_registers = self.plan.bundle == 1 or self.plan.bundle * self.width <= LANES
        return self.plan.whole and same_registers

    def _ref(self, refs: Any) -> Any:
        return getattr(refs, f"sum_{self.name}")

    def add_scratch(self, operands: Operands) -> None:
        if not self._at_once or self.plan.bundle > 1:
            rows = self.rows or self.plan.sequences
            shape = (rows, self.plan.block, self.plan.group * self.width)
            operands.scratch[f"sum_{self.name}"] = pltpu.VMEM(shape, jnp.float32)

    def start(self, step: Step, row: Index = None) -> None:
        if self._at_once:
            return
        ref = self._ref(step.refs)
        ref = ref if row is None else ref.at[row]
        ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def add(self, step: Step, heads: range, at: Any, value: Array, row: Index = None) -> None:
        """Adds the term of some heads at `(b, rows, registers)`.

        Heads come in their order; `row` is of the sum where it is not b.
        """
        if not self._at_once:
            self._ref(step.refs)[at if row is None else (row, *at[1:])] += value
            return
        if heads.start > 0:
            value = value + self._ref(step.refs)[at]
        if heads.stop == self.plan.bundle:
            self._write(step, at, value)
        else:
            self._ref(step.refs)[at] = value

    def finish(self, step: Step, row: Index = None) -> None:
        if self._at_once:
            return

        def write(chunk: Index, size: int, b: Index) -> None:
            rows = slots(chunk, size)
            self._write(step, (b, rows), self._ref(step.refs)[b if row is None else row, rows])

        over_chunks(step, write)

    def _write(self, step: Step, at: Any, value: Array) -> None:
        out = getattr(step.refs, self.name)
        out[at] = (value * self.factor).astype(out.dtype)
