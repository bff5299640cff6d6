"""Events while they are being read: columns that grow batch by batch, and then as a whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.data import _times
from jaxrec.data._sources import BadRow, ParquetSource, Source
from jaxrec.data.filters import compact, k_core
from jaxrec.errors import UserError

Progress = Callable[[str, float], None]

_NUMBER = r"^(?i)[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?$|^[-+]?(nan|inf|infinity)$"


@dataclass
class Events:
    """Columns of events as they grow batch by batch, and then as a whole."""

    wanted: dict[str, str]
    time_format: str | None
    drop_missing: bool
    rows: int = 0
    dropped: int = 0
    unit: Any = "s"
    users: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    items: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    user_ids: pa.Array = None
    item_ids: pa.Array = None
    times: np.ndarray | None = None
    ratings: np.ndarray | None = None
    _chunks: dict[str, list[Any]] = field(default_factory=dict)
    _text: set[str] = field(default_factory=set)

    def read(self, source: Source, progress: Progress) -> None:
        """Adds all rows of a file."""
        ids = [self.wanted["user"], self.wanted["item"]]
        self._text |= {role for role in ("user", "item") if source.is_text(self.wanted[role])}
        if isinstance(source, ParquetSource):
            _check_id_types(source, ids)
        label = f"reading {source.path.name}"
        progress(label, 0.0)
        record = 0
        for batch in source.batches(list(self.wanted.values()), ids):
            self._add(source, batch, record)
            record += len(batch)
            progress(label, source.fraction_read())
        self.rows += record

    def _add(self, source: Source, batch: pa.RecordBatch, record: int) -> None:
        columns = {role: batch.column(name) for role, name in self.wanted.items()}
        for role in ("user", "item"):
            columns[role] = _dictionary_of_text(columns[role])
        kept: np.ndarray | None = None
        if self.drop_missing:
            missing = pa.array(np.zeros(len(batch), bool))
            for role, column in columns.items():
                of_ids = role in ("user", "item")
                missing = pc.or_(missing, _no_id(column) if of_ids else _times.is_missing(column))
            if pc.any(missing).as_py():
                kept = np.flatnonzero(~missing.to_numpy(zero_copy_only=False))
                self.dropped += len(batch) - len(kept)
                columns = {role: column.take(pa.array(kept)) for role, column in columns.items()}

        def locate(row: int, problem: str, role: str = "time") -> UserError:
            place = source.place(record + (row if kept is None else int(kept[row])))
            return UserError(f"{source.path}: {place}, column {self.wanted[role]!r}: {problem}")

        for role, column in columns.items():
            if len(column) == 0:
                continue
            try:
                self._chunks.setdefault(role, []).append(self._checked(role, column, locate))
            except BadRow as bad:
                raise locate(bad.record, bad.problem, role) from None

    def _checked(self, role: str, column: pa.Array, locate: Any) -> Any:
        name = self.wanted[role]
        if role in ("user", "item"):
            row = pc.index(_no_id(column), True).as_py()
            if row >= 0:
                raise BadRow(
                    row, name, f"no {role} id; fill it in, or pass --drop-missing (drop_missing)"
                )
            row = _broken_id(column)
            if row is not None:
                problem = f"the {role} id holds a line break; is there a quote that never closes?"
                raise BadRow(row, name, problem)
            return column
        missing = _times.is_missing(column) if column.null_count else None
        if missing is not None:
            row = pc.index(missing, True).as_py()
            raise BadRow(row, name, f"no {role}; fill it in, or pass --drop-missing (drop_missing)")
        if role == "time":
            return _times.parse(column, name, self.time_format, locate)
        return _parsed_ratings(column, name)

    def finish(self, paths: Sequence[Path], time_unit: _times.TimeOption) -> None:
        """Turns the batches into whole columns."""
        files = ", ".join(str(path) for path in paths)
        if "user" not in self._chunks:
            raise UserError(f"{files}: no row is complete, so there are no events")
        self.users, self.user_ids = self._codes("user")
        self.items, self.item_ids = self._codes("item")
        if "rating" in self.wanted:
            self.ratings = np.concatenate(self._chunks.pop("rating"))
        if "time" in self.wanted:
            try:
                self.times, self.unit = _times.combine(self._chunks.pop("time"), time_unit)
            except _times.MixedTimes as mixed:
                raise mixed.piece.locate(mixed.row, mixed.problem) from None

    def _codes(self, role: str) -> tuple[np.ndarray, pa.Array]:
        """Codes of one column's ids, numbered in the order of the ids."""
        unified = pa.chunked_array(self._chunks.pop(role)).unify_dictionaries()
        codes = np.empty(len(unified), np.int32)
        start = 0
        for chunk in unified.chunks:
            codes[start : start + len(chunk)] = chunk.indices.to_numpy()
            start += len(chunk)
        # A dictionary may hold ids of no event, blank ones of dropped rows among them.
        codes, ids = compact(codes, unified.chunk(0).dictionary)
        if role not in self._text:
            ids = _as_integers(ids)
        order = pc.array_sort_indices(ids).to_numpy()
        rank = np.empty(len(ids), np.int32)
        rank[order] = np.arange(len(ids), dtype=np.int32)
        return rank[codes], ids.take(pa.array(order))

    def keep_rated(self, min_rating: float) -> int:
        """Drops events below a rating; returns how many."""
        assert self.ratings is not None
        kept = self.ratings >= np.float32(min_rating)
        if not kept.any():
            highest = float(self.ratings.max())
            raise UserError(
                f"no event has a rating of {min_rating:g} or more (the highest is {highest:g}); "
                "lower --min-rating (min_rating)"
            )
        return self._keep(kept)

    def keep_core(self, min_user_events: int, min_item_events: int) -> int:
        """Drops events outside the k-core; returns how many."""
        kept = k_core(self.users, self.items, min_user_events, min_item_events)
        if not kept.any():
            raise UserError(
                f"nothing is left where every user has {min_user_events} events and every item "
                f"{min_item_events}; lower --min-user-events or --min-item-events"
            )
        return self._keep(kept)

    def _keep(self, kept: np.ndarray) -> int:
        self.users, self.items = self.users[kept], self.items[kept]
        self.times = None if self.times is None else self.times[kept]
        self.ratings = None if self.ratings is None else self.ratings[kept]
        return int(len(kept) - kept.sum())


def _check_id_types(source: ParquetSource, ids: Sequence[str]) -> None:
    for name in ids:
        if not (source.is_text(name) or pa.types.is_integer(source.type_of(name))):
            raise UserError(
                f"{source.path}: column {name!r} is of type {source.type_of(name)}; ids are "
                "integers or text"
            )


def _dictionary_of_text(column: pa.Array) -> pa.DictionaryArray:
    """Ids as codes into a dictionary of strings."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    if column.type.value_type != pa.string() or column.type.index_type != pa.int32():
        column = pa.DictionaryArray.from_arrays(
            column.indices.cast(pa.int32()), column.dictionary.cast(pa.string())
        )
    return column


def _no_id(column: pa.DictionaryArray) -> pa.Array:
    """bool[n]: rows whose id is null or blank."""
    blank = pc.equal(pc.utf8_trim_whitespace(column.dictionary), "")
    if not pc.any(blank).as_py():
        return column.is_null()
    return blank.take(column.indices).fill_null(True)


def _broken_id(column: pa.DictionaryArray) -> int | None:
    """First row whose id runs over several lines: two rows in one, as a stray quote makes them."""
    broken = pc.match_substring(column.dictionary, "\n")
    if not pc.any(broken).as_py():
        return None
    row = pc.index(broken.take(column.indices), True).as_py()
    return None if row < 0 else row


def _as_integers(ids: pa.Array) -> pa.Array:
    """The ids as int64 where each is a plain whole number, else as they are."""
    if not pc.all(pc.match_substring_regex(ids, r"^(0|-?[1-9][0-9]{0,18})$")).as_py():
        return ids
    try:
        return ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids


def _parsed_ratings(column: pa.Array, name: str) -> np.ndarray:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    try:
        values = column.cast(pa.float64())
    except pa.ArrowInvalid:
        values = None
    except pa.ArrowNotImplementedError:
        raise BadRow(0, name, f"values of type {column.type} are not ratings") from None
    if values is None and is_text:
        column = pc.utf8_trim_whitespace(column)
        numbers = pc.match_substring_regex(column, _NUMBER)
        row = pc.index(numbers, False).as_py()
        if row >= 0:
            text = column[row].as_py()
            problem = f"{text!r} is not a number" if text else "no rating"
            raise BadRow(row, name, f"{problem}; fill it in, or pass --drop-missing (drop_missing)")
        values = column.cast(pa.float64())
    if values is None:
        raise BadRow(0, name, f"values of type {column.type} are not ratings")
    ratings = values.to_numpy(zero_copy_only=False).astype(np.float32)
    strange = ~np.isfinite(ratings)
    if strange.any():
        row = int(np.argmax(strange))
        raise BadRow(row, name, f"the rating is {column[row].as_py()}; wanted a finite number")
    return ratings
