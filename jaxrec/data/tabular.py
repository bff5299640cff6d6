"""Import of a user's own table of events, CSV or Parquet, into the prepared form."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.data import _times
from jaxrec.data._item_files import ItemFile, read_items
from jaxrec.data._sources import (
    BadRow,
    CsvOptions,
    ParquetSource,
    Source,
    check_columns,
    open_source,
)
from jaxrec.data._store import check_free, sha256_file
from jaxrec.data.filters import compact, k_core
from jaxrec.data.paths import dataset_dir
from jaxrec.data.prepared import Interactions, write_prepared
from jaxrec.errors import UserError

Progress = Callable[[str, float], None]
PathLike = str | os.PathLike[str]

_DEFAULT_RATING = "rating"
_TIE_ORDER = "by time; events of a user at the same time in the order of the files and their rows"
_FILE_ORDER = "no time was read: events of a user in the order of the files and their rows"


def import_table(
    files: PathLike | Sequence[PathLike],
    name: str,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str = "timestamp",
    rating_column: str | None = None,
    delimiter: str | None = None,
    columns: Sequence[str] | None = None,
    quote_char: str | None = '"',
    encoding: str = "utf-8",
    time_unit: _times.TimeOption = "auto",
    time_format: str | None = None,
    no_time: bool = False,
    min_rating: float | None = None,
    min_user_events: int = 0,
    min_item_events: int = 0,
    drop_missing: bool = False,
    items_file: PathLike | None = None,
    items_id_column: str | None = None,
    title_column: str | None = None,
    item_vectors_file: PathLike | None = None,
    overwrite: bool = False,
    data_dir: PathLike | None = None,
    progress: Progress | None = None,
) -> Interactions:
    """Imports events from CSV or Parquet files as a prepared data set.

    A row is an event: who, what, when, and perhaps a rating. Events are put in order of user and
    time; at the same time the order of the files and of their rows decides. Users and items are
    numbered in the order of their ids: numbers by size, text by its bytes. Ids may be anything:
    where all of a column are plain whole numbers they are kept as integers, else as text, so
    that `007` stays `007`; text columns of Parquet files stay text.

    Args:
        files: CSV (plain, or compressed with gzip, zstd or bz2) or Parquet; several are read
            one after the other. A file's first bytes say what it is.
        name: name of the set.
        user_column, item_column, time_column: columns to read.
        rating_column: None takes `rating` where it is there.
        delimiter: between fields, one or two characters; None finds out (comma, tab, semicolon,
            bar or `::`) from the first line.
        columns: names of the columns of CSV files that have no header line.
        quote_char: encloses fields in CSV; None where quotes mean nothing.
        encoding: of CSV files.
        time_unit: unit of numbers since 1970: "s", "ms", "us", "ns"; "iso" for ISO 8601 only
            (without a zone it is taken as UTC); "auto" goes by form and size, and refuses
            columns that mix.
        time_format: strptime format for other forms of time, such as "%d/%m/%Y".
        no_time: read no time: the order of the rows is the order of events.
        min_rating: keep events rated at least that.
        min_user_events, min_item_events: keep the largest set in which each user and each item
            has that many events (k-core).
        drop_missing: leave out rows with an empty user, item, time or rating, and count them
            in the manifest, instead of refusing them.
        items_file: CSV or Parquet with a row an item: id, title, other columns, all kept.
        items_id_column: its id column; default `item_column`.
        title_column: its title column; None takes `title` where it is there.
        item_vectors_file: .npy of floats [rows, D]; row k belongs to row k of `items_file`.
            An item without a row gets zeros.
        overwrite: replace a set of that name.
        data_dir: folder of the sets; default `jaxrec.data.data_dir()`.
        progress: called with what is being done and the share of it that is done.

    Returns:
        The set, opened.

    Raises:
        UserError: one line naming file, row and column for anything that does not fit. Nothing
            is left behind, and a set to be replaced stays.

    Cost: about 60 bytes an event of memory beside the distinct ids.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = pathlib.Path(folder, "shop.csv")
    ...     _ = table.write_text("user_id,item_id,timestamp\\nann,7,20\\nbob,7,10\\nann,8,15\\n")
    ...     shop = import_table(table, "shop", data_dir=folder)
    ...     print(shop, [shop.item_id(i) for i in shop.history(shop.user_index("ann"))])
    Interactions('shop': 2 users, 2 items, 3 events) [8, 7]
    """
    paths = [Path(file).expanduser() for file in _as_list(files)]
    _check_options(
        paths, time_unit, min_user_events, min_item_events, items_file, item_vectors_file, columns
    )
    target = dataset_dir(name, data_dir)
    check_free(target, overwrite=overwrite)
    report = progress or _silent
    csv_options = CsvOptions(delimiter, columns, quote_char or None, encoding)

    wanted = {"user": user_column, "item": item_column}
    if not no_time:
        wanted["time"] = time_column
    sources = [open_source(path, list(wanted.values()), csv_options) for path in paths]
    rating = _rating_column(sources, rating_column, min_rating)
    if rating is not None:
        wanted["rating"] = rating
    for source in sources:
        check_columns(source, wanted, _ADVICE)
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"the columns {', '.join(wanted.values())} must differ from each other")

    events = _Events(wanted, time_format, drop_missing)
    for source in sources:
        events.read(source, report)
    report("sorting out ids", 0.0)
    events.finish(paths, time_unit)
    dropped = {"missing": events.dropped}
    if min_rating is not None:
        dropped["below_min_rating"] = events.keep_rated(min_rating)
    if min_user_events > 1 or min_item_events > 1:
        dropped["outside_k_core"] = events.keep_core(min_user_events, min_item_events)
    users, user_ids = compact(events.users, events.user_ids)
    items, item_ids = compact(events.items, events.item_ids)

    metadata = ItemFile(pa.table({}), None, {})
    if items_file is not None:
        metadata = read_items(
            Path(items_file).expanduser(),
            item_ids,
            id_column=items_id_column or item_column,
            title_column=title_column,
            vectors_file=None if item_vectors_file is None else Path(item_vectors_file),
            options=CsvOptions(delimiter, None, quote_char or None, encoding),
        )
    report("writing", 0.0)
    read_files = [*paths, *(Path(f) for f in (items_file, item_vectors_file) if f is not None)]
    return write_prepared(
        target,
        name=name,
        users=users,
        items=items,
        timestamps=events.times,
        ratings=events.ratings,
        user_ids=user_ids,
        item_ids=item_ids,
        item_table=metadata.table if metadata.table.num_columns else None,
        item_vectors=metadata.vectors,
        source={
            "kind": "table",
            "files": [_file_record(file) for file in read_files],
            "rows": events.rows,
            "dropped": dropped,
            "items_file": metadata.counts,
        },
        tie_order=_FILE_ORDER if no_time else _TIE_ORDER,
        overwrite=overwrite,
        time_unit=events.unit,
        options={
            "columns": wanted,
            "time_unit": time_unit,
            "time_format": time_format,
            "min_rating": min_rating,
            "min_user_events": min_user_events,
            "min_item_events": min_item_events,
            "drop_missing": drop_missing,
        },
    )


_ADVICE = {
    "user": "name the column of users with --user-column (user_column)",
    "item": "name the column of items with --item-column (item_column)",
    "time": "name the column of times with --time-column (time_column), or pass --no-time "
    "(no_time) where the order of the rows is the order of events",
    "rating": "name the column of ratings with --rating-column (rating_column)",
}


@dataclass
class _Events:
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
            empty = _no_id(column)
            if pc.any(empty).as_py():
                row = pc.index(empty, True).as_py()
                raise BadRow(row, name, f"no {role} id; fill it in, or pass --drop-missing")
            return column
        missing = _times.is_missing(column) if column.null_count else None
        if missing is not None:
            row = pc.index(missing, True).as_py()
            raise BadRow(row, name, f"no {role}; fill it in, or pass --drop-missing")
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
        ids = unified.chunk(0).dictionary
        if role not in self._text:
            ids = _as_integers(ids)
        order = pc.array_sort_indices(ids).to_numpy()
        rank = np.empty(len(ids), np.int32)
        rank[order] = np.arange(len(ids), dtype=np.int32)
        codes = np.empty(len(unified), np.int32)
        start = 0
        for chunk in unified.chunks:
            codes[start : start + len(chunk)] = rank[chunk.indices.to_numpy()]
            start += len(chunk)
        return codes, ids.take(pa.array(order))

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


def _as_list(files: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [files] if isinstance(files, str | os.PathLike) else list(files)


def _silent(what: str, share: float) -> None:
    pass


def _check_options(
    paths: Sequence[Path],
    time_unit: str,
    min_user_events: int,
    min_item_events: int,
    items_file: PathLike | None,
    item_vectors_file: PathLike | None,
    columns: Sequence[str] | None,
) -> None:
    if not paths:
        raise UserError("no file is given to import")
    if time_unit not in _times.TIME_OPTIONS:
        raise UserError(
            f"time_unit is {time_unit!r}; wanted one of {', '.join(_times.TIME_OPTIONS)}"
        )
    for option, value in (("min_user_events", min_user_events), ("min_item_events", min_item_events)):
        if value < 0:
            raise UserError(f"{option} is {value}; wanted 0 or more")
    if item_vectors_file is not None and items_file is None:
        raise UserError(
            "item vectors need the items file whose rows they belong to: pass --items-file "
            "(items_file)"
        )
    if columns is not None and len(set(columns)) < len(columns):
        raise UserError(f"columns names a column twice: {', '.join(columns)}")


def _rating_column(
    sources: Sequence[Source], rating_column: str | None, min_rating: float | None
) -> str | None:
    if rating_column is not None:
        return rating_column
    having = [_DEFAULT_RATING in source.names for source in sources]
    if all(having):
        return _DEFAULT_RATING
    if min_rating is not None:
        source = sources[having.index(False)]
        raise UserError(
            f"{source.path}: min_rating needs a rating, and there is no column "
            f"{_DEFAULT_RATING!r} (its columns: {', '.join(source.names[:12])}); name it with "
            "--rating-column (rating_column)"
        )
    if any(having):
        without = sources[having.index(False)].path
        raise UserError(
            f"{without}: no column {_DEFAULT_RATING!r}, which the other files have; give it one, or "
            "rename it in the others"
        )
    return None


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
            raise BadRow(row, name, f"{problem}; fill it in, or pass --drop-missing")
        values = column.cast(pa.float64())
    if values is None:
        raise BadRow(0, name, f"values of type {column.type} are not ratings")
    ratings = values.to_numpy(zero_copy_only=False).astype(np.float32)
    strange = ~np.isfinite(ratings)
    if strange.any():
        row = int(np.argmax(strange))
        raise BadRow(row, name, f"the rating is {column[row].as_py()}; wanted a finite number")
    return ratings


_NUMBER = r"^(?i)[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?$|^[-+]?(nan|inf|infinity)$"


def _file_record(file: Path) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _batches(source: Source) -> Iterator[pa.RecordBatch]:  # pragma: no cover
    yield from source.batches(source.names, [])
