"""Ranges of events, which is what a user's part of a split is."""

import numpy as np
from numpy.typing import NDArray


def events_of(starts: NDArray[np.integer], stops: NDArray[np.integer]) -> NDArray[np.int64]:
    """int64: the members of the ranges [starts, stops), one range after the other.

    >>> events_of(np.array([5, 0, 9]), np.array([7, 3, 10])).tolist()
    [5, 6, 0, 1, 2, 9]
    """
    lengths = (stops - starts).astype(np.int64)
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(starts - before, lengths)
