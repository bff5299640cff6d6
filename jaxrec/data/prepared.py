"""The prepared form of a data set: users and their ordered events, in memory-mapped columns.

A set is a folder:

    manifest.json      schema version, counts, hashes, source, how ties were ordered
    offsets.npy        int64[U + 1]; user u owns the events offsets[u] to offsets[u + 1]
    items.npy          int32[E], item index of each event
    timestamps.npy     int64[E], in the manifest's time_unit; absent without time
    ratings.npy        float32[E]; absent without ratings
    item_vectors.npy   float[I, D], row i belongs to item i; optional
    users.parquet      user_id by user index
    items.parquet      item_id by item index, title and other metadata
"""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.data import paths
from jaxrec.data._ids import Id, IdIndex, as_id_array
from jaxrec.data._manifest import (
    FORMAT,
    SCHEMA_VERSION,
    TICKS_PER_SECOND,
    TimeUnit,
    check_file,
    content_hash,
    file_records,
    ids_digest,
    jaxrec_version,
    manifest_hash,
    read_manifest,
)
from jaxrec.data._order import stable_order
from jaxrec.data._store import check_free, new_folder
from jaxrec.data.paths import MANIFEST, check_name, dataset_dir, dataset_names
from jaxrec.errors import UserError

_COLUMNS: dict[str, np.dtype] = {
    "offsets": np.dtype(np.int64),
    "items": np.dtype(np.int32),
    "timestamps": np.dtype(np.int64),
    "ratings": np.dtype(np.float32),
}
_TITLE = "title"
_EVENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False, repr=False)
class Interactions:
    """A prepared data set, opened: events by user in time order, and the original ids.

    Attributes:
        name: the set's name.
        path: its folder.
        manifest: what manifest.json holds.
        offsets: int64[U + 1]; user u owns the events `offsets[u]` to `offsets[u + 1]`.
        items: int32[E], item index of each event, memory-mapped.
        timestamps: int64[E] in `time_unit`, not decreasing within a user, or None.
        ratings: float32[E] or None.
    """

    name: str
    path: Path
    manifest: dict[str, Any]
    offsets: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None
    ratings: np.ndarray | None

    def __repr__(self) -> str:
        return (
            f"Interactions({self.name!r}: {self.num_users:,} users, {self.num_items:,} items, "
            f"{self.num_events:,} events)"
        )

    def __reduce__(self) -> Any:
        # Worker processes map the files anew instead of receiving a copy of the columns.
        return open_prepared, (self.path,)

    @property
    def num_users(self) -> int:
        """Number of users, U."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """Number of items, I."""
        return int(self.manifest["counts"]["items"])

    @property
    def num_events(self) -> int:
        """Number of events, E."""
        return len(self.items)

    @property
    def hash(self) -> str:
        """SHA-256 over events, ids and item vectors: what a trained model depends on."""
        return str(self.manifest["hash"])

    @property
    def time_unit(self) -> TimeUnit | None:
        """Unit of `timestamps` since 1970 (UTC): s, ms, us or ns; None without time."""
        return self.manifest["time_unit"]

    @property
    def ticks_per_second(self) -> int | None:
        """How many steps of `timestamps` are one second; None without time."""
        return None if self.time_unit is None else TICKS_PER_SECOND[self.time_unit]

    def history(self, user_index: int) -> np.ndarray:
        """int32[n], the items of one user in order.

        Raises:
            UserError: where there is no such user.
        """
        if not 0 <= user_index < self.num_users:
            raise UserError(
                f"user index {user_index} is out of range: {self.name} has {self.num_users:,} users"
            )
        return self.items[self.offsets[user_index] : self.offsets[user_index + 1]]

    @cached_property
    def _users(self) -> IdIndex:
        ids = _read_table(self.path, "users.parquet", self.num_users)["user_id"]
        return IdIndex(ids.combine_chunks(), "user", self.name)

    @cached_property
    def _items(self) -> IdIndex:
        return IdIndex(self.item_table["item_id"].combine_chunks(), "item", self.name)

    @cached_property
    def user_ids(self) -> np.ndarray:
        """Original user ids by index: int64[U], or an object array of strings."""
        return self._users.array()

    @cached_property
    def item_ids(self) -> np.ndarray:
        """Original item ids by index: int64[I], or an object array of strings."""
        return self._items.array()

    @cached_property
    def item_table(self) -> pa.Table:
        """All that is known of the items, a row an item: item_id, title, other columns."""
        return _read_table(self.path, "items.parquet", self.num_items)

    @cached_property
    def item_titles(self) -> list[str | None] | None:
        """Titles by index, None for an item without one; None where the set has no titles."""
        if _TITLE not in self.item_table.column_names:
            return None
        return self.item_table[_TITLE].to_pylist()

    @cached_property
    def item_vectors(self) -> np.ndarray | None:
        """float[I, D], memory-mapped, row i belongs to item i; None where there are none."""
        if "item_vectors.npy" not in self.manifest["files"]:
            return None
        vectors = _load_column(self.path, "item_vectors", None)
        if vectors.ndim != 2 or len(vectors) != self.num_items:
            raise UserError(
                f"{self.path / 'item_vectors.npy'}: the array is {list(vectors.shape)}, wanted "
                f"[{self.num_items}, D]; import the set again"
            )
        return vectors

    def user_id(self, user_index: int) -> Id:
        """Original id of a user, an int or a string."""
        return self._users.id(user_index)

    def item_id(self, item_index: int) -> Id:
        """Original id of an item, an int or a string."""
        return self._items.id(item_index)

    def user_index(self, user_id: Id) -> int:
        """Index of a user given the original id, or its text as a command line gives it.

        Raises:
            UserError: where the set has no such user; it names the id and a near one.
        """
        return self._users.find(user_id)

    def item_index(self, item_id: Id) -> int:
        """Index of an item given the original id or its text.

        Raises:
            UserError: where the set has no such item; it names the id and a near one.
        """
        return self._items.find(item_id)

    def user_indices(self, user_ids: Any) -> np.ndarray:
        """int32[n], indices of many original ids (sequence, NumPy or Arrow); -1 for unknown."""
        return self._users.find_all(user_ids)

    def item_indices(self, item_ids: Any) -> np.ndarray:
        """int32[n], indices of many original ids (sequence, NumPy or Arrow); -1 for unknown."""
        return self._items.find_all(item_ids)

    def item_text(self, item_index: int) -> str:
        """What to show a person for an item: its title, or its original id."""
        item_id = self.item_id(item_index)
        title = None if self.item_titles is None else self.item_titles[item_index]
        return title or str(item_id)


def write_prepared(
    path: Path | str,
    *,
    name: str,
    users: np.ndarray,
    items: np.ndarray,
    timestamps: np.ndarray | None,
    ratings: np.ndarray | None,
    user_ids: Any,
    item_ids: Any,
    item_table: pa.Table | None = None,
    item_vectors: np.ndarray | None = None,
    source: Mapping[str, Any],
    tie_order: str,
    overwrite: bool = False,
    time_unit: TimeUnit = "s",
    options: Mapping[str, Any] | None = None,
) -> Interactions:
    """Writes a data set in its prepared form, whole or not at all.

    Events are sorted stably by (user, time): events of one user at the same time stand in the
    order in which they are given. Without timestamps the given order is the order.

    Args:
        path: folder to create, usually `dataset_dir(name)`.
        name: what the set calls itself.
        users: int[E], user index of each event, in any order.
        items: int[E], item index of each event.
        timestamps: int64[E] in `time_unit` since 1970, not negative; None for no time.
        ratings: float[E], finite; None for none.
        user_ids: U original ids by index: integers or strings (list, NumPy or Arrow), distinct.
        item_ids: I original ids by index.
        item_table: Arrow table of I rows with what is known of the items; `title` is what a
            person is shown; no column `item_id`.
        item_vectors: float16 or float32 [I, D].
        source: where the data came from (JSON): file names, sizes, hashes.
        tie_order: the rule that ordered events of equal time, in words.
        overwrite: replace a set that is there.
        time_unit: unit of `timestamps`: s, ms, us or ns.
        options: import options to keep in the manifest (JSON).

    Returns:
        The set, opened.

    Raises:
        UserError: where the name is taken or the disk refuses.
        ValueError: where the arrays do not fit together.

    Cost: one sort of E 64-bit keys; about 40 bytes an event of memory beside the input.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shop = write_prepared(
    ...         folder + "/shop", name="shop", users=np.array([1, 0, 1]),
    ...         items=np.array([0, 0, 1]), timestamps=np.array([9, 5, 7]), ratings=None,
    ...         user_ids=["ann", "bob"], item_ids=[10, 20], source={}, tie_order="as given")
    ...     print(shop, shop.history(shop.user_index("bob")))
    Interactions('shop': 2 users, 2 items, 3 events) [1 0]
    """
    target = Path(path).expanduser().absolute()
    check_name(name)
    check_free(target, overwrite=overwrite)
    user_array, item_array = as_id_array(user_ids, "user"), as_id_array(item_ids, "item")
    _check_events(users, items, timestamps, ratings, len(user_array), len(item_array))
    table = _items_with_metadata(item_array, item_table)
    if time_unit not in TICKS_PER_SECOND:
        raise ValueError(f"time_unit must be one of {list(TICKS_PER_SECOND)}, not {time_unit!r}")

    order = stable_order(users, timestamps)
    with new_folder(target, overwrite=overwrite) as folder:
        np.save(folder / "offsets.npy", _offsets(users, len(user_array)), allow_pickle=False)
        for column, values in (("items", items), ("timestamps", timestamps), ("ratings", ratings)):
            if values is not None:
                sorted_values = values if order is None else values[order]
                typed = sorted_values.astype(_COLUMNS[column], copy=False)
                np.save(folder / f"{column}.npy", typed, allow_pickle=False)
        if item_vectors is not None:
            vectors = _checked_vectors(item_vectors, len(item_array))
            np.save(folder / "item_vectors.npy", vectors, allow_pickle=False)
        pq.write_table(
            pa.table({"user_id": user_array}), folder / "users.parquet", compression="zstd"
        )
        pq.write_table(table, folder / "items.parquet", compression="zstd")
        manifest = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "jaxrec_version": jaxrec_version(),
            "name": name,
            "counts": {"users": len(user_array), "items": len(item_array), "events": len(items)},
            "time_unit": None if timestamps is None else time_unit,
            "has_ratings": ratings is not None,
            "ids": {
                "user": {"type": str(user_array.type), "sha256": ids_digest(user_array)},
                "item": {"type": str(item_array.type), "sha256": ids_digest(item_array)},
            },
            "tie_order": tie_order,
            "source": dict(source),
            "options": dict(options or {}),
            "files": file_records(folder),
        }
        manifest["hash"] = content_hash(manifest)
        # Of the entries as they will be read: text keys, lists instead of tuples.
        manifest["manifest_hash"] = manifest_hash(json.loads(json.dumps(manifest)))
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return open_prepared(target)


def open_prepared(
    name_or_path: str | Path,
    verify: bool = False,
    *,
    data_dir: str | os.PathLike[str] | None = None,
) -> Interactions:
    """Opens a prepared data set.

    Args:
        name_or_path: a set's name, or the path of its folder (a `Path`, or text with a `/`).
        verify: also compare every file with its hash and check order and ranges: one read of the
            set, a second for some 20 million events with times and ratings.
        data_dir: folder of the sets where a name is given; default `jaxrec.data.data_dir()`.

    Returns:
        The set; its columns are memory-mapped, so opening without `verify` costs no reading.

    Raises:
        UserError: naming the set or file, where it is unknown, incomplete, altered, truncated or
            written by a newer jaxrec.
    """
    path = _locate(name_or_path, data_dir)
    manifest = read_manifest(path)
    events, users = manifest["counts"]["events"], manifest["counts"]["users"]
    for file, record in manifest["files"].items():
        check_file(path / file, record, verify=verify)
    offsets = _load_column(path, "offsets", (users + 1,))
    if offsets[0] != 0 or offsets[-1] != events or bool(np.any(np.diff(offsets) < 0)):
        raise UserError(f"{path / 'offsets.npy'}: the offsets are not valid; import the set again")
    interactions = Interactions(
        name=manifest["name"],
        path=path,
        manifest=manifest,
        offsets=offsets,
        items=_load_column(path, "items", (events,)),
        timestamps=_load_column(path, "timestamps", (events,)) if manifest["time_unit"] else None,
        ratings=_load_column(path, "ratings", (events,)) if manifest["has_ratings"] else None,
    )
    if verify:
        _verify(interactions)
    return interactions


def _check_events(
    users: np.ndarray,
    items: np.ndarray,
    timestamps: np.ndarray | None,
    ratings: np.ndarray | None,
    num_users: int,
    num_items: int,
) -> None:
    columns = {"users": users, "items": items, "timestamps": timestamps, "ratings": ratings}
    for column, values in columns.items():
        if values is not None and values.shape != (len(users),):
            raise ValueError(f"{column} has shape {values.shape}, wanted ({len(users)},) as users")
    if len(users) == 0:
        raise ValueError("a data set needs at least one event")
    for column, codes, size in (("users", users, num_users), ("items", items, num_items)):
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"{column} must be integers, not {codes.dtype}")
        if int(codes.min()) < 0 or int(codes.max()) >= size:
            raise ValueError(f"{column} must lie in [0, {size}), the number of ids")
    if timestamps is not None and (timestamps.dtype != np.int64 or int(timestamps.min()) < 0):
        raise ValueError(f"timestamps must be int64 and not negative, not {timestamps.dtype}")
    if ratings is not None and not bool(np.all(np.isfinite(ratings))):
        raise ValueError("ratings must be finite")


def _items_with_metadata(item_ids: pa.Array, item_table: pa.Table | None) -> pa.Table:
    table = pa.table({"item_id": item_ids})
    if item_table is None:
        return table
    if item_table.num_rows != len(item_ids):
        raise ValueError(f"item_table has {item_table.num_rows} rows for {len(item_ids)} items")
    for field in item_table.schema:
        if field.name == "item_id":
            raise ValueError("item_table must not hold item_id: rows are by item index")
        table = table.append_column(field, item_table[field.name])
    if _TITLE in table.column_names and not pa.types.is_string(table.schema.field(_TITLE).type):
        place = table.column_names.index(_TITLE)
        table = table.set_column(place, _TITLE, table[_TITLE].cast(pa.string()))
    return table


def _checked_vectors(vectors: np.ndarray, num_items: int) -> np.ndarray:
    if vectors.ndim != 2 or len(vectors) != num_items:
        raise ValueError(f"item_vectors has shape {vectors.shape}, wanted ({num_items}, D)")
    if vectors.dtype not in (np.float16, np.float32):
        raise ValueError(f"item_vectors must be float16 or float32, not {vectors.dtype}")
    return np.ascontiguousarray(vectors)


def _offsets(users: np.ndarray, num_users: int) -> np.ndarray:
    offsets = np.zeros(num_users + 1, np.int64)
    np.cumsum(np.bincount(users, minlength=num_users), out=offsets[1:])
    return offsets


def _locate(name_or_path: str | Path, root: str | os.PathLike[str] | None) -> Path:
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or os.sep in text:
        path = Path(text).expanduser().absolute()
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path}: not a prepared data set (there is no {MANIFEST} in it)")
        return path
    path = dataset_dir(text, root)
    if not (path / MANIFEST).is_file():
        names = dataset_names(root)
        close = difflib.get_close_matches(text, names, n=1)
        known = f"there are: {', '.join(names)}" if names else "there are none yet"
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"no data set {text!r} in {root or paths.data_dir()} ({known}){meant}; "
            f"make it with `jaxrec data import FILE --name {text}` or "
            f"`jaxrec data generate --name {text}`; `jaxrec data list` shows public sets too"
        )
    return path


def _load_column(path: Path, column: str, shape: tuple[int, ...] | None) -> np.ndarray:
    file = path / f"{column}.npy"
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{file}: the file is missing; import the set again") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}); import the set again") from None
    wanted = _COLUMNS.get(column, values.dtype)
    if values.dtype != wanted or (shape is not None and values.shape != shape):
        raise UserError(
            f"{file}: holds {values.dtype}{list(values.shape)}, wanted "
            f"{wanted}{list(shape or values.shape)}; import the set again"
        )
    return values


def _read_table(path: Path, file: str, rows: int) -> pa.Table:
    try:
        table = pq.read_table(path / file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path / file}: cannot be read ({error}); import the set again") from None
    id_column = "user_id" if file == "users.parquet" else "item_id"
    if table.num_rows != rows or id_column not in table.column_names:
        raise UserError(
            f"{path / file}: holds {table.num_rows:,} rows {table.column_names}, wanted {rows:,} "
            f"with {id_column}; import the set again"
        )
    return table


def _verify(interactions: Interactions) -> None:
    path, manifest = interactions.path, interactions.manifest
    if content_hash(manifest) != manifest["hash"]:
        raise UserError(f"{path / MANIFEST}: altered, its hashes disagree; import the set again")
    items = interactions.items
    if int(items.min()) < 0 or int(items.max()) >= interactions.num_items:
        raise UserError(f"{path / 'items.npy'}: item indices out of range; import the set again")
    if interactions.timestamps is not None and _decrease(
        interactions.timestamps, interactions.offsets
    ):
        raise UserError(f"{path / 'timestamps.npy'}: times decrease; import the set again")


def _decrease(times: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether some event is earlier than the one before it of the same user."""
    for start in range(0, len(times) - 1, _EVENTS_AT_ONCE):
        part = times[start : start + _EVENTS_AT_ONCE + 1]
        earlier = start + 1 + np.flatnonzero(part[1:] < part[:-1])
        # The first event of a user may be.
        if bool(np.any(offsets[np.searchsorted(offsets, earlier)] != earlier)):
            return True
    return False
