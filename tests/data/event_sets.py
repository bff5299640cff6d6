"""Small prepared sets for tests."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.data.prepared import Interactions, write_prepared


def make_set(
    path: Path,
    users: Any,
    items: Any,
    timestamps: Any = None,
    ratings: Any = None,
    **options: Any,
) -> Interactions:
    """A set of integer ids, counted from the largest code given."""
    users, items = np.asarray(users), np.asarray(items)
    defaults: dict[str, Any] = {
        "name": path.name,
        "user_ids": np.arange(users.max() + 1) + 100,
        "item_ids": np.arange(items.max() + 1) + 500,
        "source": {"kind": "test"},
        "tie_order": "as given",
        "overwrite": True,
    }
    return write_prepared(
        path,
        users=users,
        items=items,
        timestamps=None if timestamps is None else np.asarray(timestamps, np.int64),
        ratings=None if ratings is None else np.asarray(ratings, np.float32),
        **(defaults | options),
    )
