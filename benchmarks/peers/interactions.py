"""The training part of a prepared set as a file that both sides read."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import leave_one_out


def write_interactions(interactions: Interactions, path: Path, users: int = 0) -> dict[str, Any]:
    """Writes the leave-one-out training events, in the prepared set's order.

    Items that never occur in what is written are left out of the numbering, so that both sides
    have the same catalogue. `order` counts the events of a user: it stands for the time, because
    real times have ties that each side might order in its own way.

    Args:
      interactions: the set.
      path: CSV file to write: user_id, item_id, order.
      users: only the first so many; 0 for all.

    Returns:
      Name, hash and counts of what was written.
    """
    train = leave_one_out(interactions).train
    count = min(users, len(train)) if users else len(train)
    starts, stops = train.starts[:count], train.stops[:count]
    lengths = stops - starts
    begins = np.cumsum(lengths) - lengths
    order = np.arange(int(lengths.sum())) - np.repeat(begins, lengths)
    events = np.repeat(starts, lengths) + order
    known, items = np.unique(interactions.items[events], return_inverse=True)
    table = pa.table(
        {
            "user_id": np.repeat(np.arange(count), lengths),
            "item_id": items.astype(np.int64),
            "order": order,
        }
    )
    pacsv.write_csv(table, path)
    return {
        "name": interactions.name,
        "hash": interactions.hash,
        "users": count,
        "items": len(known),
        "events": len(items),
    }


def read_interactions(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Items (int32), starts and stops of the users' ranges (int64), and the number of items."""
    table = pacsv.read_csv(path)
    users = table["user_id"].to_numpy()
    items = table["item_id"].to_numpy().astype(np.int32)
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    return items, starts, np.append(starts[1:], len(items)), int(items.max()) + 1
