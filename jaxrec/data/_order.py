"""Stable sorting of events by user and time, for tens of millions of events."""

import numpy as np


def stable_order(users: np.ndarray, timestamps: np.ndarray | None) -> np.ndarray | None:
    """The permutation that puts events in order of (user, time, place in the file).

    Args:
        users: int[E], user codes, not negative.
        timestamps: int64[E], or None where the file's order is the order.

    Returns:
        int64[E] such that `users[order]` is sorted and times do not decrease within a user;
        None where the events are in order already.
    """
    if _is_ordered(users, timestamps):
        return None
    by_time = None if timestamps is None else _order_of(timestamps)
    if by_time is None:
        return _order_of(users)
    by_user = _order_of(users[by_time])
    return by_time if by_user is None else by_time[by_user]


def _is_ordered(users: np.ndarray, timestamps: np.ndarray | None) -> bool:
    in_order = users[1:] == users[:-1]
    if timestamps is not None:
        in_order &= timestamps[1:] >= timestamps[:-1]
    in_order |= users[1:] > users[:-1]
    return bool(in_order.all())


def _order_of(values: np.ndarray) -> np.ndarray | None:
    """Stable order of integers; None where they are sorted already."""
    if bool(np.all(values[1:] >= values[:-1])):
        return None
    first = int(values.min())
    place_bits = (len(values) - 1).bit_length()
    if (int(values.max()) - first).bit_length() + place_bits > 64:
        return np.argsort(values, kind="stable")
    # The value in the high bits and its place in the low ones: such keys are distinct, so the
    # plain sort of integers, several times as fast as a stable argsort, gives the stable order.
    keys = values.astype(np.int64)
    keys -= first
    keys = keys.view(np.uint64)
    keys <<= np.uint64(place_bits)
    keys |= np.arange(len(values), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64((1 << place_bits) - 1)
    return keys.view(np.int64)
