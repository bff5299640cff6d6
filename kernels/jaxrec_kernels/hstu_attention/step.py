"""A kernel at work on a pair of blocks, and its loops over what is in them.

A kernel is a row of short loops that hand tiles to each other through scratch memory. One long body
would keep more values alive than there are registers, and spill.

Every body gets the row of the program's batch last; what comes before it is a Python integer in a
row that is one block, and may be traced otherwise.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl

from jaxrec_kernels import LANES
from jaxrec_kernels.hstu_attention.facts import Fields, fields_of
from jaxrec_kernels.hstu_attention.plan import Plan, size_of, tuned_plan

# The scalar memory holds so many blocks' least and largest segment ids.
_MOST_RANGES = 1 << 15

Index = Any  # a Python integer, or a traced one


class Settings(NamedTuple):
    """All that is static in a kernel."""

    plan: Plan
    fields: Fields
    scale: float
    normalizer: float
    head_dim: int
    value_dim: int
    holes: bool  # some slots are nobody's, and hold anything
    lags: bool  # there is a bias by position
    times: bool  # there is one by time
    queries_down: bool  # queries lie along sublanes, keys along lanes; else the other way round
    skips: bool  # blocks that share no segment are not computed


def settings_of(
    kernel: str,
    inputs: Any,
    scale: float,
    normalizer: float,
    plan: Plan | None,
    queries_down: bool,
) -> Settings:
    """`kernel`: its name, by which a plan is looked up where none is given."""
    fields, times = fields_of(inputs), inputs.time_table is not None
    if plan is None:
        plan = tuned_plan(kernel, size_of(inputs.query, inputs.value, fields.rows), times)
        if plan is None:
            raise ValueError("hstu_attention: these arrays do not fit the kernel's memory")
    return Settings(
        plan,
        fields,
        scale,
        normalizer,
        inputs.query.shape[3],
        inputs.value.shape[3],
        holes=inputs.valid is not None or plan.block * plan.blocks > inputs.query.shape[1],
        lags=inputs.distance_bias is not None,
        times=times,
        queries_down=queries_down,
        skips=fields.segment is not None and 1 < plan.blocks <= _MOST_RANGES // len(inputs.query),
    )


class Step(NamedTuple):
    """A kernel, its memory, and the blocks that it stands at: `i` of queries, `j` of keys."""

    settings: Settings
    refs: Any
    i: Index = 0
    j: Index = 0
    diagonal: bool = True

    @property
    def plan(self) -> Plan:
        return self.settings.plan

    def chunks_apart(self, down: Index, along: Index) -> Index:
        """How many chunks the queries of a tile stand behind its keys."""
        steps = down - along if self.settings.queries_down else along - down
        return steps if self.plan.whole else (self.i - self.j) * self.plan.chunks + steps


def slots(chunk: Index, size: int, first: int = 0) -> Any:
    """So many slots of a chunk, in its block."""
    start = chunk * LANES
    return pl.ds(first + (start if isinstance(chunk, int) else pl.multiple_of(start, LANES)), size)


def over(step: Step, count: int, body: Callable[[Index], None]) -> None:
    """`body(i)` for all i below a number, each scheduled by itself.

    A loop that is known to have one turn would be scheduled together with what stands around it, so
    the compiler is not told.
    """

    def turn(i: Index, carry: int) -> int:
        body(0 if count == 1 else i)
        return carry

    lax.fori_loop(0, step.refs.once[0, 0] if count == 1 else count, turn, 0)


def over_rows(step: Step, body: Callable[[Index], None]) -> None:
    """`body(b)` for a program's rows, some of them scheduled together."""

    def some(rows: list[Index]) -> None:
        for b in rows:
            body(b)

    over_some_rows(step, step.plan.together, some)


def over_some_rows(step: Step, count: int, body: Callable[[list[Index]], None]) -> None:
    """`body(rows)` for a program's rows, so many at a time."""

    def some(first: Index) -> None:
        body([first * count + b for b in range(count)])

    over(step, step.plan.sequences // count, some)


def alone(step: Step, body: Callable[[], Any]) -> None:
    """Runs what is scheduled by itself."""

    def turn(_: Index) -> None:
        body()

    over(step, 1, turn)


def spans(step: Step) -> list[tuple[int, int, slice]]:
    """Each chunk on sublanes, its size, and all lanes that it may meet."""
    plan, found = step.plan, []
    for down in range(plan.chunks):
        meeting = _meeting(step, down) if step.diagonal else range(plan.chunks)
        along = slice(meeting.start * LANES, min(meeting.stop * LANES, plan.block))
        found.append((down, plan.chunk(down), along))
    return found


def over_chunks(step: Step, body: Callable[[Index, int, Index], None]) -> None:
    """`body(chunk, size, b)` for all chunks of a block."""
    if not step.plan.whole:
        over(step, step.plan.chunks, lambda chunk: body(chunk, LANES, 0))
        return

    def all_chunks(b: Index) -> None:
        for chunk in range(step.plan.chunks):
            body(chunk, step.plan.chunk(chunk), b)

    over_rows(step, all_chunks)


def over_tiles(step: Step, body: Callable[[Index, Index, int, Index], None]) -> None:
    """`body(down, along, size, b)` for all pairs of chunks that may meet, `down` on sublanes."""
    if not step.diagonal:
        count = step.plan.chunks
        over(step, count, lambda d: over(step, count, lambda a: body(d, a, LANES, 0)))
        return
    for down in range(step.plan.chunks):
        meeting = _meeting(step, down)
        if step.plan.whole:
            for along in meeting:
                over_rows(step, partial(body, down, along, step.plan.chunk(down)))
        else:
            tiles = partial(_offset, body, down, meeting.start)
            over(step, len(meeting), tiles)


def _offset(
    body: Callable[[Index, Index, int, Index], None], down: int, first: int, along: Index
) -> None:
    body(down, first + along, LANES, 0)


def over_spans(
    step: Step,
    body: Callable[[Index, int, slice, Index], None],
    widest: int | None = None,
) -> None:
    """`body(down, size, along, b)` for each chunk on sublanes and all lanes that it may meet.

    `widest`: more lanes than that are taken one part after the other.
    """

    def parts(first: int, last: int) -> list[slice]:
        width = widest or last - first
        return [slice(lane, min(lane + width, last)) for lane in range(first, last, width)]

    block, chunks = step.plan.block, step.plan.chunks
    if not step.diagonal:
        for along in parts(0, block):
            over(step, chunks, partial(_whole_chunk, body, along))
        return
    for down in range(chunks):
        meeting = _meeting(step, down)
        for along in parts(meeting.start * LANES, min(meeting.stop * LANES, block)):
            over_rows(step, partial(body, down, step.plan.chunk(down), along))


def _whole_chunk(
    body: Callable[[Index, int, slice, Index], None], along: slice, down: Index
) -> None:
    body(down, LANES, along, 0)


def _meeting(step: Step, down: int) -> range:
    """Chunks along lanes that a chunk on sublanes meets, in a block on the diagonal."""
    return range(down + 1) if step.settings.queries_down else range(down, step.plan.chunks)


def over_bundles(step: Step, body: Callable[[Index], None]) -> None:
    """`body(w)` for the bundles of heads of a program."""
    if step.plan.group == step.plan.bundle:
        body(0)
    else:
        over(step, step.plan.group // step.plan.bundle, body)
