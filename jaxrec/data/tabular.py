"""Import of a user's own table of events, CSV or Parquet, into the prepared form."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from jaxrec.data import _times
from jaxrec.data._csv_source import CsvOptions
from jaxrec.data._events import Events, Progress
from jaxrec.data._item_files import ItemFile, ItemReader
from jaxrec.data._sources import Source, check_columns, open_source
from jaxrec.data._store import check_free, hashing_beside
from jaxrec.data.filters import compact
from jaxrec.data.paths import dataset_dir
from jaxrec.data.prepared import Interactions, write_prepared
from jaxrec.errors import UserError

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
    that `007` stays `007`; text columns of Parquet files stay text. Repeated events are kept;
    `jaxrec.data.refine` drops the immediate ones.

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

    item_reader = None
    extra_files = [Path(f).expanduser() for f in (items_file, item_vectors_file) if f is not None]
    if extra_files:
        item_reader = ItemReader(
            extra_files[0],
            id_column=items_id_column or item_column,
            title_column=title_column,
            vectors_file=extra_files[1] if len(extra_files) > 1 else None,
            options=CsvOptions(None, None, quote_char or None, encoding),
        )

    # Reading keeps one core busy at most, so hashing beside it costs no time.
    with hashing_beside([*paths, *extra_files]) as hashes:
        events = Events(wanted, time_format, drop_missing)
        for source in sources:
            events.read(source, report)
        report("sorting", 0.0)
        events.finish(paths, time_unit)
        dropped = {"missing": events.dropped}
        if min_rating is not None:
            dropped["below_min_rating"] = events.keep_rated(min_rating)
        if min_user_events > 1 or min_item_events > 1:
            dropped["outside_k_core"] = events.keep_core(min_user_events, min_item_events)
        users, user_ids = compact(events.users, events.user_ids)
        items, item_ids = compact(events.items, events.item_ids)
        metadata = ItemFile(pa.table({}), None, {})
        if item_reader is not None:
            metadata = item_reader.read(item_ids)
        interactions = write_prepared(
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
                "files": [
                    {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256.result()}
                    for file, sha256 in zip([*paths, *extra_files], hashes, strict=True)
                ],
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
    report("written", 1.0)
    return interactions


_ADVICE = {
    "user": "name the column of users with --user-column (user_column)",
    "item": "name the column of items with --item-column (item_column)",
    "time": "name the column of times with --time-column (time_column), or pass --no-time "
    "(no_time) where the order of the rows is the order of events",
    "rating": "name the column of ratings with --rating-column (rating_column)",
}


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
    for option, value in (
        ("min_user_events", min_user_events),
        ("min_item_events", min_item_events),
    ):
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
            f"{_DEFAULT_RATING!r} (its columns: {', '.join(source.names[:20])}); name it with "
            "--rating-column (rating_column)"
        )
    if any(having):
        without = sources[having.index(False)].path
        raise UserError(
            f"{without}: no column {_DEFAULT_RATING!r}, which the other files have; give it one, "
            "or rename it in the others"
        )
    return None
