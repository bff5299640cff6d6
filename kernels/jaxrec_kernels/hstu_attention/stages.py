"""Inside the forward kernel: scores, their weights, and the products of these with the values.

The three hand over through the chip's memory, so that many tiles can be at work without being held
in registers: while the matrix unit is at one's product another's weights are computed.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from itertools import chain
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import LANES
from jaxrec_kernels.generations import V5E
from jaxrec_kernels.hstu_attention import tile as _tile
from jaxrec_kernels.hstu_attention.biases import cleaned
from jaxrec_kernels.hstu_attention.heads import Sum, head_of
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
from jaxrec_kernels.tuning import device_kind


class _Regions(NamedTuple):
    """How much is in a region that the compiler schedules by itself.

    More hides better what a product waits for, until registers are spilled. Found by the schedules
    of the named shapes, a chip at a time.
    """

    tiles: int  # of scores, 128 by 128, of some heads and rows of the batch
    lanes: int  # of scores that go through a stage at once
    apart: bool  # each stage in a region of its own


def _regions(plan: Plan) -> _Regions:
    if device_kind() in V5E:
        return _Regions(tiles=8, lanes=LANES, apart=False)
    return _Regions(tiles=16, lanes=2 * LANES, apart=not plan.whole)


def output_of(settings: Settings) -> Sum:
    return Sum(settings.plan, "out", settings.value_dim, 1 / settings.normalizer)


def add_stages(settings: Settings, operands: Operands, value_dtype: Any) -> None:
    """The memory through which stages hand over."""
    plan = settings.plan
    shape = (math.prod(_at_once(plan)), _filled(plan.block), plan.chunks * LANES)
    operands.scratch["scores"] = pltpu.VMEM(shape, jnp.float32)
    operands.scratch["weights"] = pltpu.VMEM(shape, value_dtype)


def add_weighted_values(step: Step, w: Index) -> None:
    """Adds to the output what the keys of a pair of blocks contribute, of the heads of a bundle."""
    at_once = _at_once(step.plan)
    for first in range(0, step.plan.bundle, at_once.heads):
        heads = range(first, min(first + at_once.heads, step.plan.bundle))
        over_some_rows(step, at_once.rows, partial(_lot, step, w, heads))


class _Job(NamedTuple):
    """A chunk of queries of some heads that share registers, and all keys that it may see."""

    places: slice  # in the scratch memory, one a head
    heads: range
    chunk: int
    size: int
    along: slice
    b: Index

    @property
    def rows(self) -> Any:
        return slots(self.chunk, self.size)

    def parts(self, lanes: int) -> list["_Job"]:
        """The same with so many keys at most."""
        first, last = self.along.start, self.along.stop
        return [
            self._replace(along=slice(key, min(key + lanes, last)))
            for key in range(first, last, lanes)
        ]

    @property
    def filled(self) -> int:
        """Rows of the chunk in whole registers, however narrow its numbers are."""
        return _filled(self.size)


def _filled(rows: int) -> int:
    return up_to(rows, 2 * SUBLANES)


class _AtOnce(NamedTuple):
    """How many heads of a bundle, of how many rows of the batch, go through a stage together."""

    heads: int
    rows: int


def _at_once(plan: Plan) -> _AtOnce:
    tiles = plan.chunks * (plan.chunks + 1) // 2
    heads = max(1, min(_regions(plan).tiles // tiles, plan.bundle))
    rows = max(1, _regions(plan).tiles // (tiles * heads))
    return _AtOnce(heads, max(r for r in range(1, rows + 1) if plan.sequences % r == 0))


def _parties(settings: Settings, heads: range) -> list[range]:
    """Those of the heads that share registers, as all of a bundle do that fills one."""
    widest = max(settings.head_dim, settings.value_dim) * settings.plan.bundle
    return [heads] if widest <= LANES else [range(h, h + 1) for h in heads]


def _lot(step: Step, w: Index, heads: range, rows: list[Index]) -> None:
    """Some tiles of scores, that hide what each waits for."""
    jobs, place = [], 0
    for b in rows:
        for party in _parties(step.settings, heads):
            places = slice(place, place + len(party))
            jobs += [_Job(places, party, *span, b) for span in spans(step)]
            place = places.stop
    regions = _regions(step.plan)
    parts = [job.parts(regions.lanes) for job in jobs]
    if not regions.apart:
        alone(step, lambda: _in_turn(step, w, jobs, parts))
        return

    def all_of(stage: Callable[[Step, Index, _Job], None], some: list[_Job]) -> None:
        for job in some:
            stage(step, w, job)

    every = list(chain(*parts))
    for stage, some in ((_score, every), (_weigh, every), (_output, jobs)):
        alone(step, partial(all_of, stage, some))


def _in_turn(step: Step, w: Index, jobs: list[_Job], parts: list[list[_Job]]) -> None:
    """The scores of a part before the weights of the last one, while their product runs."""
    waiting: list[tuple[_Job, _Job | None]] = []
    for job, own in zip(jobs, parts, strict=True):
        for part in own:
            _score(step, w, part)
            _finish(step, w, waiting)
            waiting.append((part, job if part is own[-1] else None))
    _finish(step, w, waiting)


def _finish(step: Step, w: Index, waiting: list[tuple[_Job, _Job | None]]) -> None:
    """The weights of the part that waits, and the output of the job that it is the last one of."""
    while waiting:
        part, job = waiting.pop()
        _weigh(step, w, part)
        if job is not None:
            _output(step, w, job)


def _score(step: Step, w: Index, job: _Job) -> None:
    refs, below = step.refs, ((0, job.filled - job.size), (0, 0))
    members = [head_of(step, w, head, "query") for head in job.heads]
    registers = members[0].registers
    query = jnp.pad(refs.query[job.b, job.rows, registers], below)
    # One product for all of them: what the matrix unit holds of the keys is the same.
    queries = jnp.concatenate([own.only(query) for own in members])
    scores = _tile.dot(queries, refs.key[job.b, job.along, registers], (1, 1))
    scores = scores.reshape(len(job.heads), job.filled, -1)[:, : job.size]
    refs.scores[job.places, job.rows, job.along] = scores


def _weigh(step: Step, w: Index, job: _Job) -> None:
    refs = step.refs
    bias = refs.bias[job.b, job.rows, job.along]
    seen = bias != _tile.HIDDEN
    for place in range(job.places.start, job.places.stop):
        at = (place, job.rows, job.along)
        weight = _tile.weight(_tile.scaled(refs.scores[at], step.settings.scale) + bias)
        refs.weights[at] = jnp.where(seen, weight, 0.0).astype(refs.weights.dtype)


def _output(step: Step, w: Index, job: _Job) -> None:
    refs = step.refs
    members = [head_of(step, w, head, "value") for head in job.heads]
    registers = members[0].registers
    weights = refs.weights[job.places, slots(job.chunk, job.filled), job.along]
    weights = weights.reshape(-1, weights.shape[2])
    products = _tile.dot(weights, cleaned(step, "value")[job.b, job.along, registers], (1, 0))
    products = products.reshape(len(members), job.filled, -1)[:, : job.size]
    own_products = [own.only(x) for own, x in zip(members, products, strict=True)]
    out = reduce(jnp.add, own_products)
    output_of(step.settings).add(step, job.heads, (job.b, job.rows, registers), out)
