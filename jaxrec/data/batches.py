"""From a split to batches: which sequences go together, and the arrays a step reads.

Batches are *stratified by length*: within an epoch, every batch draws about one sequence from each
quantile of length. Which sequences meet is still random, but all batches hold nearly the same
number of events, so one static number of packed rows fits them all with little left empty. An epoch
has ceil(sequences / batch_size) batches whose sizes differ by at most one, packed or not.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxrec.data.packing import Places, Rows, fill, place, place_alone
from jaxrec.data.ranges import events_of
from jaxrec.errors import UserError

# Batches that are packed to find out how many rows they need: enough for the rare ones to show.
_PROBED_BATCHES = 512


class Sequences(NamedTuple):
    """Ranges of a data set's flat event columns: events[starts[i]:stops[i]] is sequence i."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.stops - self.starts


def recent(starts: NDArray[np.int64], stops: NDArray[np.int64], length: int) -> Sequences:
    """The ranges cut to their `length` most recent events."""
    return Sequences(np.maximum(starts, stops - length), np.asarray(stops))


def stratified_batches(
    lengths: NDArray[np.integer], batches: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Deals all sequences to `batches` batches, one of every stratum of length to each.

    Args:
      lengths: int[sequences].
      batches: how many; sizes differ by at most one.
      rng: decides everything that is random.
    """
    count = len(lengths)
    # Random order first, so that a stable sort leaves equal lengths in random order.
    order = rng.permutation(count)
    order = order[np.argsort(np.take(lengths, order), kind="stable")]
    # One row a stratum, shuffled within; a column is a batch.
    strata = math.ceil(count / batches)
    grid: NDArray[np.int64] = np.full(strata * batches, -1, np.int64)
    grid[:count] = order
    grid = rng.permuted(grid.reshape(strata, batches), axis=1)
    dealt = [column[column >= 0] for column in grid.T]
    return [dealt[i] for i in rng.permutation(batches)]


class TrainingBatches:
    """Random access to the batches of every epoch: a data source for Grain.

    Element `i` is batch `i % batches_per_epoch` of epoch `i // batches_per_epoch`; it depends on
    the arguments and `i` alone, which is what makes a resumed run bitwise the same. It holds the
    rows (`items`, `valid`, `segment_ids`, `positions`, each [rows, length]) and, so that the loss
    runs on real events only, a list of them: `slots` (flat index into the rows), `targets` (the
    next item) and `target_valid` (False beyond the last), each [events].

    Args:
      items: int32[events], the data set's flat item column.
      starts, stops: the training ranges; the last event of each is a target only.
      batch_size: sequences a batch.
      max_length: slots of a row; longer sequences keep their most recent events.
      epochs: length of the source.
      seed: of the shuffles.
      packed: several sequences a row, or one.
      count_from_newest: of the positions.
      shards: the sequences of a batch are dealt to this many parts of equal shape, one after the
        other along the first axis of every array; `slots` count within the part. For training on
        several devices: the sequences of a batch are the same whatever the number.
      timestamps: int64[events]; given, the batches hold `timestamps` too, [rows, length], in
        seconds since each sequence's first event.

    Raises:
      UserError: no range has the two events that one training example needs.
    """

    def __init__(
        self,
        items: NDArray[np.int32],
        starts: NDArray[np.int64],
        stops: NDArray[np.int64],
        *,
        batch_size: int,
        max_length: int,
        epochs: int,
        seed: int,
        packed: bool = True,
        count_from_newest: bool = False,
        shards: int = 1,
        timestamps: NDArray[np.int64] | None = None,
    ) -> None:
        enough = stops - starts >= 2
        # Inputs are all but the last event, so one event more than max_length is of use.
        sequences = recent(starts[enough], stops[enough], max_length + 1)
        if not len(sequences.starts):
            raise UserError("the training part has no user with two or more events")
        self._items = items
        self._timestamps = timestamps
        self._starts = sequences.starts
        self._lengths = sequences.lengths - 1
        self.max_length = max_length
        self._seed = seed
        self._epochs = epochs
        self._packed = packed
        self._count_from_newest = count_from_newest
        self._shards = shards
        self.batches_per_epoch = math.ceil(len(self._starts) / batch_size)
        # Threads of the loader share one source: each keeps the epoch it is in.
        self._epoch_batches = lru_cache(maxsize=2)(self._deal)
        self._shard_rows, self._shard_events = self._capacity()

    @property
    def sequences(self) -> int:
        return len(self._starts)

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self._shard_rows * self._shards

    @property
    def events_capacity(self) -> int:
        """Length of a batch's list of events."""
        return self._shard_events * self._shards

    @property
    def events(self) -> int:
        """Training targets an epoch."""
        return int(self._lengths.sum())

    @property
    def occupancy(self) -> float:
        """Share of the slots of an epoch that hold an event."""
        return self.events / (self.rows * self.max_length * self.batches_per_epoch)

    def _capacity(self) -> tuple[int, int]:
        """Rows and events of one part that hold every part of the first epochs, with a little to
        spare."""
        rows = events = 0
        for epoch in range(math.ceil(_PROBED_BATCHES / self.batches_per_epoch)):
            for chosen in self._deal(epoch):
                for part in self._parts(chosen):
                    events = max(events, int(self._lengths[part].sum()))
                    rows = max(rows, self._place(part).rows)
        # An epoch further on may hold a batch that packs one row worse; another shape would be
        # compiled for it.
        spare = 1 if self._packed and self.batches_per_epoch > 1 else 0
        largest = math.ceil(self.sequences / self.batches_per_epoch / self._shards)
        return min(rows + spare, largest), _round_up(events + events // 64, 8)

    def _parts(self, chosen: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        # Sequences come in the order of their strata of length, so every part gets all lengths.
        return [chosen[part :: self._shards] for part in range(self._shards)]

    def _place(self, chosen: NDArray[np.int64]) -> Places:
        if self._packed:
            return place(self._lengths[chosen], self.max_length)
        return place_alone(len(chosen))

    def _deal(self, epoch: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self._seed, epoch])
        return stratified_batches(self._lengths, self.batches_per_epoch, rng)

    def __len__(self) -> int:
        return self.batches_per_epoch * self._epochs

    def __getitem__(self, index: Any) -> dict[str, NDArray[Any]]:
        epoch, number = divmod(int(index), self.batches_per_epoch)
        parts = self._parts(self._epoch_batches(epoch)[number])
        placements = [self._place(part) for part in parts]
        # Where the spare is not enough the shapes grow by eighths: nothing is ever dropped.
        rows = _grown(self._shard_rows, max(p.rows for p in placements))
        most = max(int(self._lengths[part].sum()) for part in parts)
        capacity = _grown(self._shard_events, most)
        filled = [
            self._fill(part, places, rows, capacity)
            for part, places in zip(parts, placements, strict=True)
        ]
        if len(filled) == 1:
            return filled[0]
        return {name: np.concatenate([one[name] for one in filled]) for name in filled[0]}

    def _fill(
        self, chosen: NDArray[np.int64], places: Places, rows: int, capacity: int
    ) -> dict[str, NDArray[Any]]:
        starts, lengths = self._starts[chosen], self._lengths[chosen]
        events = events_of(starts, starts + lengths)
        filled, slot = fill(
            places,
            lengths,
            self._items[events],
            rows=rows,
            capacity=self.max_length,
            count_from_newest=self._count_from_newest,
            timestamps=None if self._timestamps is None else self._timestamps[events],
        )
        slots = np.zeros(capacity, np.int32)
        slots[: len(events)] = slot
        targets = np.zeros(capacity, np.int32)
        targets[: len(events)] = self._items[events + 1]
        return {
            **columns(filled),
            "slots": slots,
            "targets": targets,
            "target_valid": np.arange(capacity) < len(events),
        }


def columns(rows: Rows) -> dict[str, NDArray[Any]]:
    """The arrays that a model reads, by name."""
    return {name: column for name, column in rows._asdict().items() if column is not None}


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _grown(capacity: int, needed: int) -> int:
    if needed <= capacity:
        return capacity
    return capacity + _round_up(needed - capacity, max(1, capacity // 8))


class ContextBatch(NamedTuple):
    """Sequences whose next item is asked for."""

    columns: dict[str, NDArray[Any]]
    """What a model reads, by name; [rows, length] each."""
    last: NDArray[np.int32]
    """int32[users]: flat slot of each sequence's newest event."""
    which: NDArray[np.int64]
    """int64[users]: which sequence each is, in the caller's order; -1 where a batch has fewer, and
    0 in `last` there."""


class ContextBatches:
    """Batches of sequences to rank items for; every sequence exactly once.

    Args:
      items: int32[events].
      starts, stops: the contexts; none may be empty.
      batch_size: sequences a batch.
      max_length, packed, count_from_newest, shards, timestamps: as in `TrainingBatches`.
    """

    def __init__(
        self,
        items: NDArray[np.int32],
        starts: NDArray[np.int64],
        stops: NDArray[np.int64],
        *,
        batch_size: int,
        max_length: int,
        packed: bool = True,
        count_from_newest: bool = False,
        shards: int = 1,
        timestamps: NDArray[np.int64] | None = None,
    ) -> None:
        sequences = recent(starts, stops, max_length)
        if len(starts) and sequences.lengths.min() < 1:
            raise ValueError("every context needs at least one event")
        self._items = items
        self._timestamps = timestamps
        self._starts, self._lengths = sequences.starts, sequences.lengths
        self._max_length = max_length
        self._count_from_newest = count_from_newest
        self._shards = shards
        self._shard_size = math.ceil(min(batch_size, max(1, len(starts))) / shards)
        self.batch_size = self._shard_size * shards
        count = math.ceil(len(starts) / self.batch_size)
        dealt = stratified_batches(self._lengths, count, np.random.default_rng(0)) if count else []
        self._parts = [[chosen[part::shards] for part in range(shards)] for chosen in dealt]
        self._placements = [
            [
                place(self._lengths[part], max_length) if packed else place_alone(len(part))
                for part in parts
            ]
            for parts in self._parts
        ]
        self._shard_rows = max((p.rows for batch in self._placements for p in batch), default=0)

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self._shard_rows * self._shards

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> ContextBatch:
        pairs = zip(self._parts[number], self._placements[number], strict=True)
        filled = [self._fill(part, places) for part, places in pairs]
        if len(filled) == 1:
            return filled[0]
        names = filled[0].columns
        return ContextBatch(
            {name: np.concatenate([one.columns[name] for one in filled]) for name in names},
            np.concatenate([one.last for one in filled]),
            np.concatenate([one.which for one in filled]),
        )

    def _fill(self, chosen: NDArray[np.int64], places: Places) -> ContextBatch:
        starts, lengths = self._starts[chosen], self._lengths[chosen]
        events = events_of(starts, starts + lengths)
        rows, _ = fill(
            places,
            lengths,
            self._items[events],
            rows=self._shard_rows,
            capacity=self._max_length,
            count_from_newest=self._count_from_newest,
            timestamps=None if self._timestamps is None else self._timestamps[events],
        )
        last = np.zeros(self._shard_size, np.int32)
        last[: len(chosen)] = places.row * self._max_length + places.offset + lengths - 1
        which = np.full(self._shard_size, -1, np.int64)
        which[: len(chosen)] = chosen
        return ContextBatch(columns(rows), last, which)
