"""What is in a prepared set, in numbers, and which sets there are."""

import os
from datetime import UTC, datetime
from typing import Any

import numpy as np

from jaxrec.data.paths import dataset_dir, dataset_names
from jaxrec.data.prepared import Interactions, open_prepared
from jaxrec.errors import UserError

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def describe(interactions: Interactions) -> dict[str, Any]:
    """Figures that tell one data set from another.

    - `density`: events / (users * items); above 1 is possible where events repeat.
    - `events_per_user`, `events_per_item`: mean and quantiles.
    - `item_gini`: inequality of the items' popularity, 0 for all alike, near 1 for a few that
      take all: sum_k (2 k - I - 1) n_k / (I sum n) over the counts n_1 <= .. <= n_I.
    - `top_1_percent_share`: share of events that fall on the most popular hundredth of items.
    - `tied_steps`: share of consecutive events of a user that carry the same time; their order
      rests on `tie_order` alone.
    - `users_with_tied_last_events`: share of users (with two events or more) whose last event is
      at the time of the one before, so that leave-one-out rests on `tie_order`.
    - `repeated_events`: share of events whose item the same user had before.
    - `immediate_repeats`: share of consecutive events of a user that are of the same item.

    Args:
        interactions: the set.

    Returns:
        A dict ready for JSON; what needs time or ratings is None without them.

    Cost: one pass and one sort of the E pairs of user and item.
    """
    offsets, items = interactions.offsets, np.asarray(interactions.items)
    lengths = np.diff(offsets)
    counts = np.bincount(items, minlength=interactions.num_items)
    events, users = interactions.num_events, interactions.num_users
    user_of = np.repeat(np.arange(users, dtype=np.int64), lengths)
    same_user = user_of[1:] == user_of[:-1]
    steps = int(same_user.sum())
    pairs = user_of * interactions.num_items + items
    pairs.sort()
    repeated = int(np.sum(pairs[1:] == pairs[:-1]))
    popular = np.sort(counts)[::-1][: max(1, interactions.num_items // 100)]
    return {
        "name": interactions.name,
        "hash": interactions.hash,
        "users": users,
        "items": interactions.num_items,
        "events": events,
        "density": events / (users * interactions.num_items),
        "events_per_user": _spread(lengths),
        "events_per_item": _spread(counts),
        "item_gini": _gini(counts),
        "top_1_percent_share": float(popular.sum() / events),
        "repeated_events": repeated / events,
        "immediate_repeats": _share(int(np.sum(same_user & (items[1:] == items[:-1]))), steps),
        **_of_time(interactions, same_user, lengths),
        "ratings": _of_ratings(interactions),
        "titles": _titles(interactions),
        "vector_width": (
            None if interactions.item_vectors is None else int(interactions.item_vectors.shape[1])
        ),
        "tie_order": interactions.manifest["tie_order"],
    }


def list_prepared(data_dir: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """One summary a prepared set under `data_dir` (default `jaxrec.data.data_dir()`), by name.

    Returns:
        Dicts with name, path, users, items, events, has_time, has_ratings, hash, bytes on disk
        and source; for a set that cannot be opened name, path and `error`.
    """
    return [_summary(name, data_dir) for name in dataset_names(data_dir)]


def _summary(name: str, root: str | os.PathLike[str] | None) -> dict[str, Any]:
    path = dataset_dir(name, root)
    try:
        interactions = open_prepared(path)
    except UserError as error:
        return {"name": name, "path": str(path), "error": str(error)}
    manifest = interactions.manifest
    return {
        "name": name,
        "path": str(path),
        "users": interactions.num_users,
        "items": interactions.num_items,
        "events": interactions.num_events,
        "has_time": interactions.timestamps is not None,
        "has_ratings": interactions.ratings is not None,
        "hash": interactions.hash,
        "bytes": sum(record["bytes"] for record in manifest["files"].values()),
        "source": _origin(manifest["source"]),
    }


def _origin(source: dict[str, Any]) -> str:
    if source.get("files"):
        return ", ".join(str(file.get("name")) for file in source["files"])
    return str(source.get("name") or source.get("kind") or "")


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _spread(counts: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(counts, _QUANTILES)
    spread = {"mean": float(counts.mean())}
    for quantile, value in zip(_QUANTILES, quantiles, strict=True):
        spread[{0.0: "min", 0.5: "median", 1.0: "max"}.get(quantile, f"p{quantile:.0%}"[:-1])] = (
            float(value)
        )
    return spread


def _gini(counts: np.ndarray) -> float:
    ordered = np.sort(counts).astype(np.float64)
    size = len(ordered)
    rank = np.arange(1, size + 1)
    return float(np.sum((2 * rank - size - 1) * ordered) / (size * ordered.sum()))


def _of_time(
    interactions: Interactions, same_user: np.ndarray, lengths: np.ndarray
) -> dict[str, Any]:
    if interactions.timestamps is None:
        return {
            "time_unit": None,
            "first_time": None,
            "last_time": None,
            "tied_steps": None,
            "users_with_tied_last_events": None,
        }
    times = np.asarray(interactions.timestamps)
    tied = same_user & (times[1:] == times[:-1])
    last = interactions.offsets[1:][lengths >= 2] - 1
    return {
        "time_unit": interactions.time_unit,
        "first_time": _moment(int(times.min()), interactions),
        "last_time": _moment(int(times.max()), interactions),
        "tied_steps": _share(int(tied.sum()), int(same_user.sum())),
        "users_with_tied_last_events": _share(int(tied[last - 1].sum()), len(last)),
    }


def _moment(time: int, interactions: Interactions) -> str:
    try:
        seconds = time / (interactions.ticks_per_second or 1)
        return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{time} {interactions.time_unit}"


def _of_ratings(interactions: Interactions) -> dict[str, float] | None:
    if interactions.ratings is None:
        return None
    ratings = np.asarray(interactions.ratings, np.float64)
    return {
        "mean": float(ratings.mean()),
        "min": float(ratings.min()),
        "max": float(ratings.max()),
    }


def _titles(interactions: Interactions) -> int | None:
    """How many items have a title; None where the set has no titles at all."""
    if interactions.item_titles is None:
        return None
    return sum(title is not None for title in interactions.item_titles)
