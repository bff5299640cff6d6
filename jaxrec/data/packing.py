"""Several sequences share a row, so that nothing is computed on padding.

Rows are as long as the longest sequence may be. A sequence lies in one piece in one row; its slots
carry its segment id (1, 2, ... within a row; 0 is padding), and ops attend within equal ids only.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Places(NamedTuple):
    """Where each sequence of a batch lies."""

    row: NDArray[np.int64]
    offset: NDArray[np.int64]
    segment: NDArray[np.int32]
    rows: int
    """Number of rows used."""


class Rows(NamedTuple):
    """A batch of packed rows; all arrays are [rows, length]."""

    items: NDArray[np.int32]
    valid: NDArray[np.bool_]
    segment_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    timestamps: NDArray[np.int32] | None = None
    """Seconds since the sequence's first event; only for models that read them."""


def place(lengths: NDArray[np.integer], capacity: int) -> Places:
    """First-fit decreasing: the longest sequence first, each into the first row with room.

    Uses at most 11/9 of the fewest possible rows (plus a constant), in practice 1 to 3 % more.

    Args:
      lengths: int[sequences], each between 1 and `capacity`.
      capacity: slots of a row.

    Raises:
      ValueError: a sequence is empty or does not fit into a row.

    Cost: O(sequences * rows) comparisons in NumPy, one vector operation a sequence.
    """
    count = len(lengths)
    if count and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"lengths must be in [1, {capacity}], got {lengths.min()} to {lengths.max()}"
        )
    row = np.zeros(count, np.int64)
    offset = np.zeros(count, np.int64)
    segment = np.zeros(count, np.int32)
    room = np.full(count, capacity, np.int64)
    used = np.zeros(count, np.int32)
    rows = 0
    # A row without room for the shortest sequence can never be chosen again.
    first, shortest = 0, int(lengths.min()) if count else 0
    for i in np.argsort(-lengths, kind="stable"):
        need = int(lengths[i])
        while first < rows and room[first] < shortest:
            first += 1
        # room[rows] is an untouched row, so there is always one that fits.
        r = first + int(np.argmax(room[first : rows + 1] >= need))
        row[i], offset[i] = r, capacity - room[r]
        used[r] += 1
        segment[i] = used[r]
        room[r] -= need
        rows = max(rows, r + 1)
    return Places(row, offset, segment, rows)


def place_alone(count: int) -> Places:
    """Every sequence in a row of its own."""
    return Places(np.arange(count), np.zeros(count, np.int64), np.ones(count, np.int32), count)


def slots(
    places: Places, lengths: NDArray[np.integer], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Flat slot of every event, and the event's index within its sequence (oldest is 0)."""
    lengths = lengths.astype(np.int64)
    first_slot = places.row * capacity + places.offset
    first_event = np.cumsum(lengths) - lengths
    index = np.arange(int(lengths.sum())) - np.repeat(first_event, lengths)
    return np.repeat(first_slot, lengths) + index, index


def fill(
    places: Places,
    lengths: NDArray[np.integer],
    items: NDArray[np.integer],
    *,
    rows: int,
    capacity: int,
    count_from_newest: bool = False,
    timestamps: NDArray[np.integer] | None = None,
) -> tuple[Rows, NDArray[np.int64]]:
    """Writes the sequences into `rows` rows of `capacity` slots.

    Args:
      places: from `place`.
      lengths: int[sequences].
      items: the sequences' items, one after the other.
      rows: at least `places.rows`; the rest stays padding, so that shapes are static.
      capacity: slots of a row.
      count_from_newest: positions count back from the newest event instead of from the oldest.
      timestamps: of every event, in the order of `items`; differences beyond int32 are clipped.

    Returns:
      The rows, and the flat slot of every event in the order of `items`.
    """
    slot, index = slots(places, lengths, capacity)

    def column(values: NDArray[np.integer]) -> NDArray[np.int32]:
        out = np.zeros(rows * capacity, np.int32)
        out[slot] = values
        return out.reshape(rows, capacity)

    segment_ids = column(np.repeat(places.segment, lengths))
    if count_from_newest:
        index = np.repeat(lengths, lengths) - 1 - index
    filled = Rows(
        items=column(items),
        valid=segment_ids > 0,
        segment_ids=segment_ids,
        positions=column(index),
        timestamps=None if timestamps is None else column(_since_first(timestamps, lengths)),
    )
    return filled, slot


def _since_first(
    timestamps: NDArray[np.integer], lengths: NDArray[np.integer]
) -> NDArray[np.int64]:
    lengths = lengths.astype(np.int64)
    first = np.repeat(timestamps[np.cumsum(lengths) - lengths], lengths)
    limit = np.iinfo(np.int32)
    return np.clip(timestamps.astype(np.int64) - first, limit.min, limit.max)
