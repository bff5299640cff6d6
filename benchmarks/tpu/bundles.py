"""The TPU compiler's schedule of one program, as bundles times how often they run.

A TPU core is a VLIW machine without reordering: the compiler packs operations into bundles, one a
cycle, and writes them out as `*-final_bundles.txt`, with `*-final_hlo-static-per-bundle-
utilization.txt` beside it. This module finds the loops and predicated regions in that listing. The
format is the compiler's own and undocumented, so whatever is not understood is an error, never a
number.

Not in it: waiting for DMAs, which overlap with the bundles where a program is well made.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

# A branch takes effect after this many more bundles.
DELAY_SLOTS = 4

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*>*\s*\{", re.MULTILINE)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)(%\w+)\) )?target = \$region(\d+)")
_COMPARE = r"{} = scmp\.(ge|lt)\.s32\.totalorder (%\w+), (\d+)\b"
_JOINED = r"{} = (pnand|pand|por) (!?)(%\w+), (!?)(%\w+)"
_VECTOR = re.compile(r"%v\w+ = (\w+)")
# A register of 8 by 128 words; the bytes that one store moves.
_STORE_BYTES = 4096
_COLUMNS = re.compile(r"^== CAPAC[A-Z]*:\n(.*)\n(.*)\n== UTILIZATION:\n", re.MULTILINE)


class NoScheduleError(Exception):
    """The compiler's output holds no schedule that this module can read; says what is missing."""


class Region(NamedTuple):
    """Bundles from `first` up to `stop`, run `times` as often as what is around them.

    `kind` is "loop", "conditional", or "guard": the condition around nearly all of a loop by which
    its first and last rounds only move data; its `times` are the share of rounds in which it holds.
    A loop whose number of rounds is no constant has `times` None and is counted once; it is a
    "copy" where it only moves, for the pipeline, a block of what lies in VMEM. A guard that is not
    understood has None too, and counts in every round.
    """

    kind: str
    first: int
    stop: int
    times: float | None


class _Branch(NamedTuple):
    """A branch that is taken where the predicate holds, or does not."""

    predicate: str  # empty: always taken
    negated: bool


class _Counter(NamedTuple):
    """Of a loop: the register that holds it within a round, its first value, and all rounds."""

    register: str
    start: int
    rounds: int


class Bundles(NamedTuple):
    """One program.

    `cycles` counts conditional regions as often as it is known that they run, else whenever control
    passes them, an upper limit; a copy as if it moved all that is moved within VMEM, which is one
    too; and other loops without a constant number of rounds once, a lower limit: `open_loops` says
    how many there are.
    """

    cycles: int
    conditional: int  # of `cycles`, in conditional regions
    conditions_known: bool
    bundles: int
    open_loops: int
    spills: int  # stores and loads of registers that did not fit, in the code
    fills: int
    busy: dict[str, float]  # unit -> share of its slots that is used
    regions: tuple[Region, ...]


def read_bundles(
    listing: str,
    utilization: str,
    shares: tuple[float, ...] = (),
    moved_in_vmem: int | None = None,
) -> Bundles:
    """Reads the two files of one program.

    Args:
      listing: text of `*-final_bundles.txt`.
      utilization: text of `*-final_hlo-static-per-bundle-utilization.txt`.
      shares: how often each condition in the body of the program's loop holds, from 0 to 1, in
        their order (`regions` has them, inside the guard). They are used if the listing has as many
        conditional regions there: a short one may have been turned into predicates.
      moved_in_vmem: bytes that the pipeline around the loop moves from VMEM to VMEM; None if that
        is not known, and copies then are open loops.

    Raises:
      NoScheduleError: the text is not of the expected form.
    """
    texts = _split(listing)
    regions = _regions(texts, listing)
    columns, capacity, slots = _read_utilization(utilization)
    if len(slots) != len(texts):
        raise NoScheduleError(
            f"no schedule found: {len(texts)} bundles in the listing, {len(slots)} rows of usage"
        )
    conditions = _conditions(texts, regions, len(shares))
    known = len(shares) == len(conditions)
    share_of = dict(zip(conditions, shares, strict=True)) if known else {}
    times = [1.0] * len(texts)
    inside = [False] * len(texts)
    for region in regions:
        factor = region.times or 1.0
        if region.kind == "conditional":
            factor = share_of.get(region, 1.0)
        elif region.kind == "copy" and moved_in_vmem is not None:
            a_round = _STORE_BYTES * _stores(texts[region.first : region.stop])
            # Of all its visits together.
            factor = moved_in_vmem / a_round / times[region.first]
        for place in range(region.first, region.stop):
            times[place] *= factor
            inside[place] |= region.kind == "conditional"
    used = [
        sum(t * row[c] for t, row in zip(times, slots, strict=True)) for c in range(len(columns))
    ]
    cycles = sum(times)

    def count(column: str) -> int:
        place = columns.index(column)
        return sum(row[place] for row in slots)

    return Bundles(
        cycles=round(cycles),
        conditional=round(sum(t for t, i in zip(times, inside, strict=True) if i)),
        conditions_known=known,
        bundles=len(texts),
        open_loops=sum(
            (r.kind == "loop" and r.times is None) or (r.kind == "copy" and moved_in_vmem is None)
            for r in regions
        ),
        spills=count("VSTORE:SPILL"),
        fills=count("VLOAD:FILL"),
        busy={
            name: total / (slots_a_bundle * cycles)
            for name, total, slots_a_bundle in zip(columns, used, capacity, strict=True)
        },
        regions=regions,
    )


def _split(listing: str) -> list[str]:
    """The text of each bundle; its place in the list is its address."""
    starts = list(_BUNDLE.finditer(listing))
    if not starts:
        raise NoScheduleError("no schedule found: the listing holds no bundles")
    addresses = [int(m.group(1), 16) for m in starts]
    if addresses != list(range(len(starts))):
        raise NoScheduleError("no schedule found: the bundles' addresses are not consecutive")
    ends = [m.start() for m in starts[1:]] + [len(listing)]
    return [listing[m.start() : end] for m, end in zip(starts, ends, strict=True)]


def _regions(texts: list[str], listing: str) -> tuple[Region, ...]:
    begins: dict[str, int] = {}
    for place, text in enumerate(texts):
        for number in _REGION.findall(text):
            begins.setdefault(number, place)
    # The region at the very end has no mark of its own.
    exits = "/* exit bundle" in texts[-1] and re.search(r" (PF|CT):", texts[-1].partition("{")[0])
    found, branches = [], {}
    for place, text in enumerate(texts):
        for negated, predicate, target in _BRANCH.findall(text):
            branch = _Branch(predicate, bool(negated))
            if target not in begins and exits:
                begins[target] = len(texts) - 1
            if target not in begins:
                raise NoScheduleError(
                    f"no schedule found: a branch to region {target}, which is not in the listing"
                )
            after, to = min(place + 1 + DELAY_SLOTS, len(texts)), begins[target]
            if to <= place:
                counter = _counter(branch, listing)
                found.append(Region("loop", to, after, counter and counter.rounds))
            elif to > after:
                found.append(Region("conditional", after, to, None))
            else:
                continue
            branches[found[-1]] = branch
    found.sort(key=lambda r: (r.first, -r.stop))
    # Of the outermost loops.
    loops = [r for r in found if r.kind == "loop"]
    outer = [a for a in loops if not any(b.first < a.first and a.stop < b.stop for b in loops)]
    guards = {}
    for loop in outer:
        guard = next((r for r in found if _fills(r, loop)), None)
        if guard is not None:
            counter = _counter(branches[loop], listing)
            share = counter and _share_of_rounds(branches[guard], counter, listing)
            guards[guard] = guard._replace(kind="guard", times=share)
    found = [guards.get(r, r) for r in found]
    moves = [r for r in found if _moves_blocks(r, found, texts)]

    def copies(region: Region) -> bool:
        around = any(_holds(r, region) for r in moves)
        open_loop = (region.kind, region.times) == ("loop", None)
        return open_loop and around and _only_moves(texts[region.first : region.stop])

    return tuple(r._replace(kind="copy") if copies(r) else r for r in found)


def _moves_blocks(region: Region, regions: Sequence[Region], texts: list[str]) -> bool:
    """Whether by this condition the pipeline moves blocks: before the guard, or at its very end."""
    guard = next((r for r in regions if r.kind == "guard"), None)
    if guard is None or region.kind != "conditional":
        return False
    text = texts[region.first : region.stop]
    if any("dma." in bundle for bundle in text):
        return True
    outside = region.stop <= guard.first or guard.stop <= region.first
    # Behind it there may be further blocks that are moved, by conditions that became predicates.
    return _only_moves(text if outside else texts[region.first : guard.stop])


def _only_moves(texts: list[str]) -> bool:
    """Whether vectors are loaded and stored here, and nothing else."""
    made = {kind for text in texts for kind in _VECTOR.findall(text)}
    return made == {"vld"} and _stores(texts) > 0


def _stores(texts: list[str]) -> int:
    return sum(text.count("= vst [vmem:") for text in texts)


def _conditions(texts: list[str], regions: tuple[Region, ...], count: int) -> list[Region]:
    """The conditions in the body of the program's loop, of which `count` are the kernel's own."""
    guard = next((r for r in regions if r.kind == "guard"), None)
    if guard is None:
        return []
    body = [r for r in regions if r != guard and _holds(guard, r)]
    found = [
        r
        for r in body
        if r.kind == "conditional"
        and not any("dma." in text for text in texts[r.first : r.stop])
        and not any(_holds(other, r) and not _holds(r, other) for other in body)
    ]
    # A kernel's own last one may only move, too.
    extra = len(found) > count and _moves_blocks(found[-1], regions, texts)
    return found[:-1] if extra else found


def _holds(outer: Region, inner: Region) -> bool:
    return outer.first <= inner.first and inner.stop <= outer.stop


def _fills(region: Region, loop: Region) -> bool:
    inside = loop.first < region.first and region.stop <= loop.stop
    long = 2 * (region.stop - region.first) > loop.stop - loop.first
    return region.kind == "conditional" and inside and long


def _counter(branch: _Branch, listing: str) -> _Counter | None:
    """Of the loop that is closed by this branch; None if its rounds are not constant.

    The counter starts at a constant, goes up by one, and the loop is left when it reaches another.
    """
    predicate = re.escape(branch.predicate)
    compare = re.search(_COMPARE.format(predicate), listing) if predicate else None
    if compare is None or (compare.group(1) == "ge") != branch.negated:
        return None
    counter, limit = _origin(compare.group(2), listing), int(compare.group(3))
    step = re.search(rf"{re.escape(counter)} = sadd\.s32 1, (%\w+)", listing)
    if step is None:
        return None
    before = _origin(step.group(1), listing)
    phi = re.search(rf"{re.escape(before)} = sphi (%\w+|\d+), (%\w+)", listing)
    if phi is None or _origin(phi.group(2), listing) != counter:
        return None
    start = _origin(phi.group(1), listing)
    if not start.isdecimal():
        return None
    return _Counter(before, int(start), max(limit - int(start), 1))


def _share_of_rounds(branch: _Branch, counter: _Counter, listing: str) -> float | None:
    """In which share of a loop's rounds this branch is not taken; None if that is not known."""
    holds = _condition(branch.predicate, counter, listing)
    if holds is None:
        return None
    rounds = range(counter.start, counter.start + counter.rounds)
    return sum(holds(i) == branch.negated for i in rounds) / counter.rounds or None


def _condition(predicate: str, counter: _Counter, listing: str) -> Callable[[int], bool] | None:
    """The predicate as a function of a loop's counter; None where it depends on anything else."""
    name = re.escape(predicate)
    compare = re.search(_COMPARE.format(name), listing) if predicate else None
    if compare is not None and _origin(compare.group(2), listing) == counter.register:
        limit, below = int(compare.group(3)), compare.group(1) == "lt"
        return lambda i: (i < limit) == below
    joined = re.search(_JOINED.format(name), listing) if predicate else None
    if joined is None:
        return None
    how, *parts = joined.groups()
    one, other = (_condition(part, counter, listing) for part in parts[1::2])
    if one is None or other is None:
        return None
    turned, other_turned = (bool(sign) for sign in parts[::2])

    def both(i: int) -> tuple[bool, bool]:
        return one(i) != turned, other(i) != other_turned

    if how == "por":
        return lambda i: any(both(i))
    return lambda i: all(both(i)) == (how == "pand")


def _origin(register: str, listing: str) -> str:
    """The register or number that this one is a copy of, moved or kept in memory for a while."""
    for _ in range(8):
        if not register.startswith("%"):
            break
        name = re.escape(register)
        # A move on a condition is one that was pulled up into the end of the loop before.
        move = re.search(rf"{name} = smov (?:\(!?%\w+\), )?(%\w+|\d+)\b", listing)
        load = re.search(rf"{name} = sld (\[smem:\[#allocation\w+\]\])", listing)
        if load is not None:
            move = re.search(rf"sst {re.escape(load.group(1))} (%\w+)", listing)
        if move is None:
            break
        register = move.group(1)
    return register


def _read_utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Names of the units, slots each has in a bundle, and slots used, one row a bundle."""
    head = _COLUMNS.search(text)
    if head is None:
        raise NoScheduleError("no schedule found: the usage of units has no heading")
    columns = [name.strip() for name in head.group(1).split(",")]
    try:
        capacity = [int(x) for x in head.group(2).split()]
        rows = [[int(x) for x in line.split()] for line in text[head.end() :].splitlines()]
    except ValueError as error:
        raise NoScheduleError(f"no schedule found: the usage of units: {error}") from None
    if {len(columns)} != {len(capacity), *map(len, rows)}:
        raise NoScheduleError("no schedule found: the usage of units has ragged rows")
    missing = {"MXU", "VALU", "VSTORE:SPILL", "VLOAD:FILL"} - set(columns)
    if missing:
        raise NoScheduleError(f"no schedule found: no unit {', '.join(sorted(missing))}")
    return columns, capacity, rows
