"""What evaluation asks: one ranked list each, given a history, judged by relevant items."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Split, Targets
from jaxrec.errors import UserError
from jaxrec.evaluation.metrics import RelevantSets

Part = Literal["validation", "test"]
PARTS = ("validation", "test")

# Events gathered at once; some 100 MB of temporaries.
_BLOCK_EVENTS = 1 << 21
# And ranges: lists are made of them.
_BLOCK_ROWS = 1 << 16


class Questions(NamedTuple):
    """One list is asked for a row.

    Attributes:
      users: int[m], user index.
      starts: int64[m], first event of the history.
      stops: int64[m], one past its last event.
      relevant: what the list is judged by: item indices int[m], or sets.
    """

    users: NDArray[np.integer]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    relevant: NDArray[np.integer] | RelevantSets

    @property
    def relevant_sets(self) -> RelevantSets:
        if isinstance(self.relevant, RelevantSets):
            return self.relevant
        return RelevantSets(np.arange(len(self.users) + 1, dtype=np.int64), self.relevant)


def targets_of(split: Split, part: str) -> Targets:
    """The targets of a part of a split."""
    if part not in PARTS:
        raise UserError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    targets: Targets = getattr(split, part)
    if len(targets) == 0:
        raise UserError(f"the {part} part of the split {split.name} has no targets")
    return targets


def one_list_per_target(interactions: Interactions, targets: Targets) -> Questions:
    """Every target by itself, given what its user did before it."""
    items = np.asarray(interactions.items[targets.targets])
    return Questions(targets.users, targets.starts, targets.stops, items)


def one_list_per_user(interactions: Interactions, targets: Targets) -> Questions:
    """All targets of a user together, given what the user did before the first of them."""
    order = np.lexsort((targets.targets, targets.users))
    users = targets.users[order]
    first = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    if len(first) == len(users):
        return one_list_per_target(interactions, targets.take(order))
    offsets = np.append(first, len(users)).astype(np.int64)
    relevant = RelevantSets(offsets, np.asarray(interactions.items[targets.targets[order]]))
    earliest = order[first]
    return Questions(users[first], targets.starts[earliest], targets.stops[earliest], relevant)


class Histories(NamedTuple):
    """The events of a block of ranges, laid out flat.

    Attributes:
      rows: which of the ranges.
      owners: int64[n], the range of each event, counted from `rows.start`.
      events: int64[n], the event's index in the data set's columns.
    """

    rows: slice
    owners: NDArray[np.int64]
    events: NDArray[np.int64]


def histories(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Iterator[Histories]:
    """Blocks of consecutive ranges whose events together stay within a bound of memory.

    A single longer range is a block of its own.
    """
    lengths = np.asarray(stops - starts, np.int64)
    ends = np.cumsum(lengths)
    begin = 0
    while begin < len(lengths):
        before = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, before + _BLOCK_EVENTS, side="right"))
        end = min(max(end, begin + 1), begin + _BLOCK_ROWS, len(lengths))
        block = lengths[begin:end]
        owners = np.repeat(np.arange(end - begin), block)
        shift = starts[begin:end] - (np.cumsum(block) - block)
        yield Histories(slice(begin, end), owners, np.arange(owners.size) + shift[owners])
        begin = end


def count_seen(lists: NDArray[np.integer], questions: Questions, items: NDArray[np.int32]) -> int:
    """How many slots of the lists name an item of the list's own history."""
    total = 0
    for block in histories(questions.starts, questions.stops):
        owner, slot = np.nonzero(lists[block.rows] >= 0)
        named = lists[block.rows][owner, slot]
        total += _count_found(owner, named, block.owners, items[block.events])
    return total


def count_repeats(questions: Questions, items: NDArray[np.int32]) -> int:
    """How many relevant items stand in the history already, where filtering makes them misses."""
    total = 0
    offsets, relevant = questions.relevant_sets
    for block in histories(questions.starts, questions.stops):
        bounds = offsets[block.rows.start : block.rows.stop + 1]
        owner = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        wanted = relevant[bounds[0] : bounds[-1]]
        total += _count_found(owner, wanted, block.owners, items[block.events], once=True)
    return total


def _count_found(
    owner: NDArray[np.integer],
    item: NDArray[np.integer],
    history_owner: NDArray[np.int64],
    history_item: NDArray[np.int32],
    *,
    once: bool = False,
) -> int:
    """How many pairs (owner, item) occur among the pairs of the histories.

    The few pairs are sorted and the many looked up among them: histories are long and come in
    order of owner, so that the look-ups stay near each other.
    """
    if not item.size or not history_item.size:
        return 0
    width = int(max(item.max(), history_item.max())) + 1
    pairs, times = np.unique(owner * width + item, return_counts=True)
    looked_up = history_owner * width + history_item
    place = np.minimum(np.searchsorted(pairs, looked_up), pairs.size - 1)
    found = np.zeros(pairs.size, bool)
    found[place[pairs[place] == looked_up]] = True
    return int(found.sum() if once else times[found].sum())
