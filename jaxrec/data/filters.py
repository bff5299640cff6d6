"""Filters on events: k-core, ratings, repeats; on arrays, and on a prepared set."""

import os
from typing import Any

import numpy as np
import pyarrow as pa

from jaxrec.data.paths import dataset_dir
from jaxrec.data.prepared import Interactions, write_prepared
from jaxrec.errors import UserError


def k_core(
    users: np.ndarray, items: np.ndarray, min_user_events: int, min_item_events: int
) -> np.ndarray:
    """Marks the largest set of events in which every user and every item has enough of them.

    Users and items with too few events are removed in turns until none is left with too few. The
    result does not depend on the order of removal.

    Args:
        users: int[E], user codes, not negative.
        items: int[E], item codes, not negative.
        min_user_events: events a user needs; 0 and 1 ask nothing.
        min_item_events: events an item needs.

    Returns:
        bool[E], True for the events that stay.

    Cost: O(E) a round for the events still there; a few to some tens of rounds.

    >>> import numpy as np
    >>> k_core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 1]), 2, 2)
    array([ True,  True,  True,  True, False])
    """
    if users.shape != items.shape or users.ndim != 1:
        raise ValueError(f"users {users.shape} and items {items.shape} must be one event a row")
    # Indices of the events still there; None stands for all, which needs no array.
    rows: np.ndarray | None = None
    while len(users):
        enough_user = np.bincount(users) >= min_user_events
        enough_item = np.bincount(items) >= min_item_events
        kept = enough_user[users] & enough_item[items]
        if kept.all():
            break
        users, items = users[kept], items[kept]
        rows = np.flatnonzero(kept) if rows is None else rows[kept]
    if rows is None:
        return np.ones(len(users), bool)
    raise NotImplementedError
