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
    stays = np.ones(len(users), bool)
    rows = np.arange(len(users)) if len(users) else np.empty(0, np.int64)
    while len(users):
        enough_user = np.bincount(users) >= min_user_events
        enough_item = np.bincount(items) >= min_item_events
        kept = enough_user[users] & enough_item[items]
        if kept.all():
            break
        stays[rows[~kept]] = False
        users, items, rows = users[kept], items[kept], rows[kept]
    return stays


def compact(codes: np.ndarray, ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Renumbers codes without gaps and drops the ids that no code stands for; order stays.

    Args:
        codes: int[E], in `[0, len(ids))`.
        ids: one id a code.

    >>> import numpy as np, pyarrow as pa
    >>> codes, ids = compact(np.array([2, 0, 2]), pa.array(["a", "b", "c"]))
    >>> codes.tolist(), ids.to_pylist()
    ([1, 0, 1], ['a', 'c'])
    """
    used = np.bincount(codes, minlength=len(ids)) > 0
    if used.all():
        return codes, ids
    number = (np.cumsum(used) - 1).astype(np.int32)
    return number[codes], ids.filter(pa.array(used))


def refine(
    interactions: Interactions,
    name: str,
    *,
    min_rating: float | None = None,
    drop_consecutive_repeats: bool = False,
    min_user_events: int = 0,
    min_item_events: int = 0,
    overwrite: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> Interactions:
    """Writes a part of a prepared set as a set of its own.

    Filters apply in the order of the arguments: ratings, then repeats, then the k-core. Ids,
    order, titles and item vectors of what remains are kept.

    Args:
        interactions: the set to take from; it stays as it is.
        name: name of the new set.
        min_rating: keep events rated at least that.
        drop_consecutive_repeats: of a user's run of events with one item keep the first.
        min_user_events, min_item_events: see `k_core`.
        overwrite: replace a set of the new name.
        data_dir: folder of the sets; default `jaxrec.data.data_dir()`.

    Returns:
        The new set, opened; its manifest names the old one and its hash.

    Raises:
        UserError: where nothing is left, the name is taken, or there are no ratings to filter by.
    """
    users = np.repeat(
        np.arange(interactions.num_users, dtype=np.int32), np.diff(interactions.offsets)
    )
    rows = np.arange(interactions.num_events)
    if min_rating is not None:
        if interactions.ratings is None:
            raise UserError(f"{interactions.name}: min_rating needs ratings, and the set has none")
        rows = rows[interactions.ratings >= np.float32(min_rating)]
    if drop_consecutive_repeats:
        same = np.zeros(len(rows), bool)
        same[1:] = interactions.items[rows[1:]] == interactions.items[rows[:-1]]
        same[1:] &= users[rows[1:]] == users[rows[:-1]]
        rows = rows[~same]
    if min_user_events > 1 or min_item_events > 1:
        core = k_core(users[rows], interactions.items[rows], min_user_events, min_item_events)
        rows = rows[core]
    options = {
        "min_rating": min_rating,
        "drop_consecutive_repeats": drop_consecutive_repeats,
        "min_user_events": min_user_events,
        "min_item_events": min_item_events,
    }
    if len(rows) == 0:
        raise UserError(f"{interactions.name}: no event is left with {_told(options)}")

    user_codes, user_places = compact(users[rows], pa.array(np.arange(interactions.num_users)))
    item_codes, item_places = compact(
        np.asarray(interactions.items[rows]), pa.array(np.arange(interactions.num_items))
    )
    table = interactions.item_table.take(item_places)
    vectors = interactions.item_vectors
    metadata = table.drop_columns(["item_id"])
    return write_prepared(
        dataset_dir(name, data_dir),
        name=name,
        users=user_codes,
        items=item_codes,
        timestamps=None if interactions.timestamps is None else interactions.timestamps[rows],
        ratings=None if interactions.ratings is None else interactions.ratings[rows],
        user_ids=pa.array(interactions.user_ids).take(user_places),
        item_ids=table["item_id"],
        item_table=metadata if metadata.num_columns else None,
        item_vectors=None if vectors is None else vectors[item_places.to_numpy()],
        source={
            "kind": "refined",
            "name": interactions.name,
            "hash": interactions.hash,
            "dropped": interactions.num_events - len(rows),
        },
        tie_order=interactions.manifest["tie_order"],
        overwrite=overwrite,
        time_unit=interactions.time_unit or "s",
        options=options,
    )


def _told(options: dict[str, Any]) -> str:
    return ", ".join(f"{option}={value}" for option, value in options.items() if value)
