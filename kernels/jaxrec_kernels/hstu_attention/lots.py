"""Tiles of scores that go through a kernel's stages in lots.

A kernel forms scores by a product, weights of them, and further products of the weights. The stages
hand over through the chip's memory, so that many tiles can be at work without being held in
registers: while the matrix unit is at one's product another's weights are computed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxrec_kernels import LANES
from jaxrec_kernels.hstu_attention.heads import Head, Side, head_of
from jaxrec_kernels.hstu_attention.operands import Operands
from jaxrec_kernels.hstu_attention.plan import SUBLANES, Plan, up_to
from jaxrec_kernels.hstu_attention.step import (
    Index,
    Settings,
    Step,
    alone,
    over_some_rows,
    slots,
    spans,
)

# Of the batch in a region: more short ones take more cycles of a v6e again.
_MOST_ROWS = 4


class Regions(NamedTuple):
    """How much is in a region that the compiler schedules by itself.

    More hides better what a product waits for, until registers are spilled. Found by the schedules
    of the named shapes, a chip at a time.
    """

    tiles: int  # of scores, 128 by 128, of some heads and rows of the batch
    lanes: int  # of scores that go through a stage at once
    apart: bool  # each stage in a region of its own


class Job(NamedTuple):
    """A chunk that lies on sublanes, of some heads that share registers, and all that it meets."""

    places: slice  # in the memory for handing over, one a head
    heads: range
    chunk: int
    size: int
    along: slice
    b: Index

    @property
    def rows(self) -> Any:
        return slots(self.chunk, self.size)

    @property
    def filled(self) -> Any:
        """The rows up to a whole register, however narrow its numbers are."""
        return slots(self.chunk, _filled(self.size))

    def parts(self, lanes: int) -> list["Job"]:
        """The same with so many lanes at most."""
        first, last = self.along.start, self.along.stop
        return [
            self._replace(along=slice(lane, min(lane + lanes, last)))
            for lane in range(first, last, lanes)
        ]

    def side(self, step: Step, w: Index, side: Side) -> "Members":
        return Members(self, [head_of(step, w, head, side) for head in self.heads])


class Members(NamedTuple):
    """The heads of a job, in the registers of queries or of values."""

    job: Job
    heads: list[Head]

    @property
    def registers(self) -> Any:
        return self.heads[0].registers

    def stacked(self, x: Array) -> Array:
        """A chunk's vectors once for each head, with zeros in the lanes of the others.

        What the matrix unit holds of a product's other side then serves all of them.
        """
        filled = jnp.pad(x, ((0, _filled(self.job.size) - self.job.size), (0, 0)))
        return jnp.concatenate([head.only(filled) for head in self.heads])

    def apart(self, stacked: Array) -> Array:
        """`[heads, rows, lanes]` of a product of what was stacked."""
        return stacked.reshape(len(self.heads), _filled(self.job.size), -1)[:, : self.job.size]

    def summed(self, stacked: Array) -> Array:
        """The sum over heads, each in its own lanes alone."""
        terms = zip(self.heads, self.apart(stacked), strict=True)
        first, *others = [head.only(x) for head, x in terms]
        return sum(others, first)


def add_handover(settings: Settings, operands: Operands, regions: Regions, **dtypes: Any) -> None:
    """Memory by which stages hand over, a square for each place of a lot."""
    plan = settings.plan
    shape = (math.prod(_at_once(plan, regions)), _filled(plan.block), plan.chunks * LANES)
    for name, dtype in dtypes.items():
        operands.scratch[name] = pltpu.VMEM(shape, dtype)


def over_lots(step: Step, w: Index, regions: Regions, body: Callable[[list[Job]], None]) -> None:
    """`body(jobs)` for all tiles of a bundle's heads, so many at a time as go together."""
    at_once = _at_once(step.plan, regions)
    for first in range(0, step.plan.bundle, at_once.heads):
        heads = range(first, min(first + at_once.heads, step.plan.bundle))
        over_some_rows(step, at_once.rows, partial(_lot, step, heads, body))


def _lot(step: Step, heads: range, body: Callable[[list[Job]], None], rows: list[Index]) -> None:
    jobs, place = [], 0
    for b in rows:
        for party in _parties(step.settings, heads):
            places = slice(place, place + len(party))
            jobs += [Job(places, party, *span, b) for span in spans(step)]
            place = places.stop
    body(jobs)


def in_stages(
    step: Step,
    regions: Regions,
    jobs: list[Job],
    begin: Callable[[Job], None],
    finish: Callable[[Job], None],
    use: Callable[[Job], None],
) -> None:
    """All parts of all jobs are begun and finished, then a job's whole lanes are used.

    A part is begun before the last one is finished, whose products run meanwhile.
    """
    parts = [job.parts(regions.lanes) for job in jobs]

    def in_turn() -> None:
        waiting: list[Callable[[], None]] = []
        for job, own in zip(jobs, parts, strict=True):
            for part in own:
                begin(part)
                _all(waiting)
                waiting = [partial(finish, part)]
            waiting.append(partial(use, job))
        _all(waiting)

    if not regions.apart:
        alone(step, in_turn)
        return
    every = [part for own in parts for part in own]
    for stage, some in ((begin, every), (finish, every), (use, jobs)):
        alone(step, partial(_all, [partial(stage, job) for job in some]))


def _all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _filled(rows: int) -> int:
    return up_to(rows, 2 * SUBLANES)


class _AtOnce(NamedTuple):
    """How many heads of a bundle, of how many rows of the batch, go through a stage together."""

    heads: int
    rows: int


def _at_once(plan: Plan, regions: Regions) -> _AtOnce:
    tiles = plan.chunks * (plan.chunks + 1) // 2
    heads = max(1, min(regions.tiles // tiles, plan.bundle))
    rows = max(1, min(regions.tiles // (tiles * heads), _MOST_ROWS))
    return _AtOnce(heads, max(r for r in range(1, rows + 1) if plan.sequences % r == 0))


def _parties(settings: Settings, heads: range) -> list[range]:
    """Those of the heads that share registers, as all of a bundle do that fills one."""
    widest = max(settings.head_dim, settings.value_dim) * settings.plan.bundle
    return [heads] if widest <= LANES else [range(h, h + 1) for h in heads]
