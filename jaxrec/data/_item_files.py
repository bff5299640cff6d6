"""Item metadata and item vectors that come with a table of events."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.data._ids import IdIndex
from jaxrec.data._sources import CsvOptions, ParquetSource, Source, check_columns, open_source
from jaxrec.errors import UserError

_TITLE = "title"


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


def read_items(
    path: Path,
    item_ids: pa.Array,
    *,
    id_column: str,
    title_column: str | None,
    vectors_file: Path | None,
    options: CsvOptions,
) -> ItemFile:
    """Reads an items file and puts its rows in the order of the set's items.

    Args:
        path: CSV or Parquet, a row an item.
        item_ids: original ids of the set's items, by index.
        id_column: column of the items' ids.
        title_column: column of the titles; None takes `title` where there is one.
        vectors_file: .npy, float [rows, D]; row k belongs to row k of the items file.
        options: how to read CSV.

    Raises:
        UserError: where a column is missing, an id is empty or stands twice, no id is known to
            the events, or the vectors do not fit.
    """
    source = open_source(path, [id_column], options)
    wanted = {"item": id_column}
    if title_column is not None:
        wanted["title"] = title_column
    check_columns(
        source,
        wanted,
        {
            "item": "name the column of ids with --items-id-column (items_id_column)",
            "title": "name another with --title-column (title_column)",
        },
    )
    rows = _read(source, id_column)
    ids = _checked_ids(source, rows, id_column)
    place = IdIndex(item_ids, "item", "the events").find_all(ids)
    if not bool(np.any(place >= 0)):
        raise UserError(
            f"{path}: none of its {len(ids):,} ids in column {id_column!r} (such as "
            f"{ids[0].as_py()!r}) occurs among the events' items (such as {item_ids[0].as_py()!r})"
        )
    row_of = np.full(len(item_ids), -1, np.int64)
    known = place >= 0
    row_of[place[known]] = np.flatnonzero(known)
    picked = pa.array(np.maximum(row_of, 0), mask=row_of < 0)
    table = _titled(rows.drop_columns([id_column]).take(picked), title_column)
    vectors = None
    if vectors_file is not None:
        vectors = _read_vectors(vectors_file, len(ids), path)[np.maximum(row_of, 0)]
        vectors[row_of < 0] = 0
    counts = {
        "rows": len(ids),
        "rows_without_events": int(np.sum(~known)),
        "items_without_a_row": int(np.sum(row_of < 0)),
    }
    return ItemFile(table, vectors, counts)


def _read(source: Source, id_column: str) -> pa.Table:
    names = [name for name in source.names if source.names.count(name) == 1]
    if isinstance(source, ParquetSource):
        names = [name for name in names if not pa.types.is_nested(source.type_of(name))]
        if id_column not in names:
            raise UserError(
                f"{source.path}: column {id_column!r} is of type {source.type_of(id_column)}; ids "
                "are integers or text"
            )
    # All text in a CSV file: what looks like a number may be a code with leading zeros.
    return pa.Table.from_batches(source.batches(names, []))


def _checked_ids(source: Source, rows: pa.Table, id_column: str) -> pa.Array:
    column = rows[id_column].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
        if not pa.types.is_large_string(column.type):
            raise UserError(
                f"{source.path}: column {id_column!r} is of type {column.type}; ids are integers "
                "or text"
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


def _read_vectors(path: Path, rows: int, items_file: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such file of item vectors")
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = "it holds Python objects" if "pickle" in str(error).lower() else str(error)
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
    if len(vectors) != rows:
        raise UserError(
            f"{path}: {len(vectors):,} rows where {items_file.name} has {rows:,}; row k of the one "
            "must belong to row k of the other"
        )
    for start in range(0, rows, 1 << 16):
        strange = ~np.isfinite(vectors[start : start + (1 << 16)]).all(axis=1)
        if strange.any():
            bad = start + int(np.argmax(strange))
            raise UserError(f"{path}: row {bad} (the first is row 0) holds NaN or infinity")
    return vectors if vectors.dtype == np.float16 else vectors.astype(np.float32, copy=False)
