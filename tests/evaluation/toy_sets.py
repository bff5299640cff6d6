"""Small data sets in memory and on disk."""

from pathlib import Path

import numpy as np

from jaxrec.data.prepared import Interactions, write_prepared


def in_memory(histories, num_items, times=None) -> Interactions:
    """A set from one list of item indices a user, without files."""
    offsets = np.append(0, np.cumsum([len(items) for items in histories])).astype(np.int64)
    items = np.array([item for items in histories for item in items], np.int32)
    timestamps = None if times is None else np.array([t for ts in times for t in ts], np.int64)
    manifest = {"counts": {"items": num_items}, "time_unit": None, "hash": "abc"}
    return Interactions("toy", Path(), manifest, offsets, items, timestamps, None)


def on_disk(folder, histories, user_ids, item_ids, item_table=None) -> Interactions:
    """A prepared set, written and opened."""
    return write_prepared(
        Path(folder) / "shop",
        name="shop",
        users=np.repeat(np.arange(len(histories)), [len(items) for items in histories]),
        items=np.array([item for items in histories for item in items], np.int32),
        timestamps=None,
        ratings=None,
        user_ids=user_ids,
        item_ids=item_ids,
        item_table=item_table,
        source={},
        tie_order="as given",
    )
