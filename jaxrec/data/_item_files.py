"""Item metadata and item vectors that come with a table of events."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.data._csv_source import CsvOptions
from jaxrec.data._ids import IdIndex
from jaxrec.data._sources import ParquetSource, Source, check_columns, open_source
from jaxrec.errors import UserError

_TITLE = "title"
_ROWS_AT_ONCE = 1 << 16


@dataclass
class ItemFile:
    """What an items file says of the items of a set.

    Attributes:
        table: a row an item of the set, in index order; null where the file has no row for it.
        vectors: float[I, D] or None; zero for an item that the file does not have.
        counts: rows of the file, rows without events, items of the set without a row.
    """

    table: pa.Table
    vectors: np.ndarray | None
    counts: dict[str, int]


class ItemReader:
    """An items file and its vectors: looked into at once, read when the set's items are known."""

    def __init__(
        self,
        path: Path,
        *,
        id_column: str,
        title_column: str | None,
        vectors_file: Path | None,
        options: CsvOptions,
    ) -> None:
        """Opens the files.

        Args:
            path: CSV or Parquet, a row an item.
            id_column: column of the items' ids.
            title_column: column of the titles; None takes `title` where there is one.
            vectors_file: .npy, float [rows, D]; row k belongs to row k of the items file.
            options: how to read CSV.

        Raises:
            UserError: where a file or a column is missing, or the vectors are not an array.
        """
        self._id_column, self._title_column = id_column, title_column
        self._source = open_source(path, [id_column], options)
        self._vectors_file = vectors_file
        self._vectors = None if vectors_file is None else _open_vectors(vectors_file)
        wanted = {"item": id_column}
        if title_column is not None:
            wanted["title"] = title_column
        check_columns(
            self._source,
            wanted,
            {
                "item": "name the column of ids with --items-id-column (items_id_column)",
                "title": "name another with --title-column (title_column)",
            },
        )

    def read(self, item_ids: pa.Array) -> ItemFile:
        """Puts the rows in the order of the set's items, whose original ids are given.

        Raises:
            UserError: where an id is empty or stands twice, no id is known to the events, or the
                vectors do not fit.
        """
        source = self._source
        rows = _read(source, self._id_column)
        ids = _checked_ids(source, rows, self._id_column)
        place = IdIndex(item_ids, "item", "the events").find_all(ids)
        known = place >= 0
        if not known.any():
            raise UserError(
                f"{source.path}: none of its {len(ids):,} ids in column {self._id_column!r} (such "
                f"as {ids[0].as_py()!r}) occurs among the events' items (such as "
                f"{item_ids[0].as_py()!r})"
            )
        row_of = np.full(len(item_ids), -1, np.int64)
        row_of[place[known]] = np.flatnonzero(known)
        absent = row_of < 0
        picked = pa.array(np.maximum(row_of, 0), mask=absent)
        table = _titled(rows.drop_columns([self._id_column]).take(picked), self._title_column)
        vectors = None
        if self._vectors is not None and self._vectors_file is not None:
            _check_vectors(self._vectors, self._vectors_file, len(ids), source.path)
            vectors = np.asarray(self._vectors[np.maximum(row_of, 0)])
            vectors = vectors if vectors.dtype == np.float16 else vectors.astype(np.float32)
            vectors[absent] = 0
        counts = {
            "rows": len(ids),
            "rows_without_events": int(np.sum(~known)),
            "items_without_a_row": int(np.sum(absent)),
        }
        return ItemFile(table, vectors, counts)


def _read(source: Source, id_column: str) -> pa.Table:
    names = [name for name in source.names if name and source.names.count(name) == 1]
    if isinstance(source, ParquetSource):
        names = [name for name in names if not pa.types.is_nested(source.type_of(name))]
        names = list(dict.fromkeys([*names, id_column]))
    # All text in a CSV file: what looks like a number may be a code with leading zeros.
    return pa.Table.from_batches(source.batches(names, []))


def _checked_ids(source: Source, rows: pa.Table, id_column: str) -> pa.Array:
    column = rows[id_column].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise UserError(
            f"{source.path}: column {id_column!r} is of type {column.type}; ids are integers or "
            "text"
        )
    ids = column.cast(pa.string())
    empty = pc.or_(ids.is_null(), pc.equal(pc.utf8_trim_whitespace(ids), "").fill_null(True))
    first = pc.index(empty, True).as_py()
    if first >= 0:
        raise UserError(f"{source.path}: {source.place(first)}, column {id_column!r}: no id")
    codes = ids.dictionary_encode().indices.to_numpy()
    # Codes count up at first sight, so the first that does not is an id seen before.
    seen_before = codes[1:] <= np.maximum.accumulate(codes)[:-1]
    if bool(seen_before.any()):
        second = int(np.argmax(seen_before)) + 1
        raise UserError(
            f"{source.path}: {source.place(second)}, column {id_column!r}: the id "
            f"{ids[second].as_py()!r} stands twice; keep one row an item"
        )
    return ids


def _titled(table: pa.Table, title_column: str | None) -> pa.Table:
    names = list(table.column_names)
    if title_column is not None and title_column != _TITLE:
        if _TITLE in names:
            names[names.index(_TITLE)] = "original_title"
        names[names.index(title_column)] = _TITLE
        table = table.rename_columns(names)
    if "item_id" in names:
        names[names.index("item_id")] = "original_item_id"
        table = table.rename_columns(names)
    if _TITLE in names:
        titles = table[_TITLE]
        if pa.types.is_dictionary(titles.type):
            titles = titles.cast(titles.type.value_type)
        titles = pc.utf8_trim_whitespace(titles.cast(pa.string()))
        titles = pc.if_else(pc.equal(titles, ""), pa.scalar(None, pa.string()), titles)
        table = table.set_column(names.index(_TITLE), _TITLE, titles)
    return table


def _open_vectors(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such file of item vectors")
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = str(error).splitlines()[0]
        if "pickle" in why or "Python objects" in why:
            why = "it holds Python objects, or is no .npy file"
        raise UserError(
            f"{path}: not an array of item vectors ({why}); write float32 [rows, D] with numpy.save"
        ) from None
    if not isinstance(vectors, np.ndarray):
        vectors.close()
        raise UserError(f"{path}: an archive of arrays; write one array with numpy.save")
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating) or 0 in vectors.shape:
        raise UserError(
            f"{path}: holds {vectors.dtype}{list(vectors.shape)}; wanted floats [rows, D]"
        )
    return vectors


def _check_vectors(vectors: np.ndarray, path: Path, rows: int, items_file: Path) -> None:
    if len(vectors) != rows:
        raise UserError(
            f"{path}: {len(vectors):,} rows where {items_file.name} has {rows:,}; row k of the one "
            "must belong to row k of the other"
        )
    for start in range(0, rows, _ROWS_AT_ONCE):
        strange = ~np.isfinite(vectors[start : start + _ROWS_AT_ONCE]).all(axis=1)
        if strange.any():
            bad = start + int(np.argmax(strange))
            raise UserError(f"{path}: row {bad} (the first is row 0) holds NaN or infinity")
