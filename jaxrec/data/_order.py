"""Stable sorting of events by user and time, for tens of millions of events."""

import numpy as np

_RADIX = 16  # NumPy's stable sort of 16-bit keys is a radix sort, linear in the number of keys


def stable_order(
    users: np.ndarray, timestamps: np.ndarray | None, num_users: int
) -> np.ndarray | None:
    """The permutation that puts events in order of (user, time, place in the file).

    Args:
        users: int[E], user codes in `[0, num_users)`.
        timestamps: int64[E], not negative, or None where the file's order is the order.
        num_users: number of user codes.

    Returns:
        int64[E] such that `users[order]` is sorted and times do not decrease within a user;
        None where the events are in order already.
    """
    if _is_ordered(users, timestamps):
        return None
    by_time = None if timestamps is None else _order_by_time(timestamps)
    keys = users if by_time is None else users[by_time]
    by_user = _order_by_code(keys, num_users)
    return by_user if by_time is None else by_time[by_user]


def _is_ordered(users: np.ndarray, timestamps: np.ndarray | None) -> bool:
    later_user = users[1:] > users[:-1]
    same_user = users[1:] == users[:-1]
    if timestamps is not None:
        same_user &= timestamps[1:] >= timestamps[:-1]
    return bool(np.all(later_user | same_user))


def _order_by_time(timestamps: np.ndarray) -> np.ndarray | None:
    if len(timestamps) == 0 or bool(np.all(timestamps[1:] >= timestamps[:-1])):
        return None
    first = int(timestamps.min())
    place_bits = max(1, (len(timestamps) - 1).bit_length())
    time_bits = (int(timestamps.max()) - first).bit_length()
    if time_bits + place_bits > 64:
        return np.argsort(timestamps, kind="stable")
    # Time in the high bits and the place in the file in the low ones: the keys are distinct, so
    # the fast unstable sort of plain integers gives the stable order, without an index array.
    keys = (timestamps - first).astype(np.uint64)
    keys <<= np.uint64(place_bits)
    keys |= np.arange(len(timestamps), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64((1 << place_bits) - 1)
    return keys.view(np.int64)


def _order_by_code(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Stable order of `codes`, least significant 16 bits first."""
    order = np.argsort((codes & 0xFFFF).astype(np.uint16), kind="stable")
    shift = _RADIX
    while (num_codes - 1) >> shift > 0:
        digit = ((codes >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
        shift += _RADIX
    return order
