"""Reading MovieLens as GroupLens publishes it: four archives in three formats."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from jaxrec.data.tfds.archives import MovieLensArchive
from jaxrec.data.tfds.columns import Columns
from jaxrec.errors import UserError

_BLOCK = 1 << 22
_SAMPLE = 80
_FIELDS = ("user", "item", "rating", "timestamp")


@dataclass(frozen=True)
class _Format:
    ratings: str
    movies: str
    separator: str
    encoding: str
    ratings_header: str = ""
    movies_header: str = ""


_TAB = _Format("u.data", "u.item", "\t", "latin-1")
_COLONS = _Format("ratings.dat", "movies.dat", "::", "latin-1")
_CSV = _Format(
    "ratings.csv",
    "movies.csv",
    ",",
    "utf-8",
    ratings_header="userId,movieId,rating,timestamp",
    movies_header="movieId,title,genres",
)

FORMATS = {"100k": _TAB, "1m": _COLONS, "20m": _CSV, "25m": _CSV}

# MovieLens 100K marks genres by columns of 0 and 1, in this order (its u.genre).
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip


def read_ratings(archive: MovieLensArchive, config: str) -> Iterator[Columns]:
    """Batches of ratings in the order of the publisher's file.

    Args:
        archive: the archive of the set.
        config: `100k`, `1m`, `20m` or `25m`.

    Returns:
        Columns `user` int32, `item` int32, `rating` float32, `timestamp` int64 (Unix seconds).

    Raises:
        UserError: for an archive that is not the set's, is damaged, or holds a malformed line.
    """
    form = FORMATS[config]
    rows = 0
    try:
        with archive.open(form.ratings) as stream:
            _check_header(stream, form.ratings_header, archive, form.ratings)
            for batch in _open_ratings(stream, form):
                columns = _as_columns(batch)
                rows += batch.num_rows
                yield columns
    except (pa.ArrowInvalid, _BadValue) as error:
        raise _first_bad_line(archive, form, error) from None
    if rows == 0:
        raise UserError(f"{archive.path}: {form.ratings} holds no ratings")


def _is_whole(field: str, below: int) -> bool:
    return field.isdecimal() and field.isascii() and int(field) < below


def _is_number(field: str) -> bool:
    try:
        return bool(np.isfinite(float(field)))
    except ValueError:
        return False


_CHECKS: tuple[Callable[[str], bool], ...] = (
    lambda field: _is_whole(field, 2**31),
    lambda field: _is_whole(field, 2**31),
    _is_number,
    lambda field: _is_whole(field, 2**63),
)


class _BadValue(Exception):
    pass


def _check_header(stream: IO[bytes], header: str, archive: MovieLensArchive, member: str) -> None:
    """Reads the first line where there is to be a header: its columns are taken by their place."""
    if not header:
        return
    first = stream.readline().decode("utf-8", "replace").removeprefix("\ufeff").rstrip("\r\n")
    if first != header:
        raise UserError(
            f"{archive.path}: {member} begins with {first[:_SAMPLE]!r}, and {header!r} is wanted; "
            f"pass {archive.folder}.zip as its publisher offers it"
        )


def _open_ratings(stream: IO[bytes], form: _Format) -> pacsv.CSVStreamingReader:
    types: dict[str, pa.DataType] = {
        "user": pa.int32(),
        "item": pa.int32(),
        "rating": pa.float32(),
        "timestamp": pa.int64(),
    }
    names = list(_FIELDS)
    if form.separator == "::":
        # Arrow takes one character: between two colons lies a column that must be empty.
        names = ["user", "_0", "item", "_1", "rating", "_2", "timestamp"]
        types |= {name: pa.null() for name in names if name.startswith("_")}
    return pacsv.open_csv(
        stream,
        read_options=pacsv.ReadOptions(column_names=names, block_size=_BLOCK),
        parse_options=pacsv.ParseOptions(delimiter=form.separator[0], quote_char=False),
        convert_options=pacsv.ConvertOptions(
            column_types=types, include_columns=names, null_values=[""]
        ),
    )


def _as_columns(batch: pa.RecordBatch) -> Columns:
    columns: Columns = {}
    for name in _FIELDS:
        column = batch.column(batch.schema.get_field_index(name))
        if column.null_count:
            raise _BadValue(f"{name} is missing")
        columns[name] = column.to_numpy(zero_copy_only=False)
    if not np.isfinite(columns["rating"]).all():
        raise _BadValue("rating is not a number")
    if columns["timestamp"].min(initial=0) < 0:
        raise _BadValue("timestamp is negative")
    if min(columns["user"].min(initial=0), columns["item"].min(initial=0)) < 0:
        raise _BadValue("an id is negative")
    return columns


def _first_bad_line(archive: MovieLensArchive, form: _Format, error: Exception) -> UserError:
    """Reads again, slowly, to say which line it is."""
    rows = 0
    with archive.open(form.ratings) as stream:
        for number, line in enumerate(io.TextIOWrapper(stream, "latin-1"), start=1):
            if not line.strip() or (form.ratings_header and number == 1):
                continue
            rows += 1
            fields = line.rstrip("\r\n").split(form.separator)
            shown = repr(line.rstrip("\r\n")[:_SAMPLE])
            where = f"{archive.path}: {form.ratings} line {number}"
            if len(fields) != len(_FIELDS):
                return UserError(
                    f"{where} has {len(fields)} fields, and {len(_FIELDS)} are wanted "
                    f"({', '.join(_FIELDS)}): {shown}"
                )
            for name, check, field in zip(_FIELDS, _CHECKS, fields, strict=True):
                if not check(field):
                    return UserError(f"{where}: {name} {field!r} is not a valid number: {shown}")
    if rows == 0:
        return UserError(f"{archive.path}: {form.ratings} holds no ratings")
    return UserError(f"{archive.path}: {form.ratings} cannot be read ({error})")


def read_movies(archive: MovieLensArchive, config: str) -> Columns:
    """The films of the set, rated or not, in the order of the publisher's file.

    Args:
        archive: the archive of the set.
        config: `100k`, `1m`, `20m` or `25m`.

    Returns:
        Columns `item` int32, `title` (as published, year included) and `genres` (joined by `|`),
        the texts as object arrays of str.

    Raises:
        UserError: for an archive that is not the set's, is damaged, or holds a malformed line.
    """
    form = FORMATS[config]
    items: list[int] = []
    titles: list[str] = []
    genres: list[str] = []
    with archive.open(form.movies) as stream:
        _check_header(stream, form.movies_header, archive, form.movies)
        text = io.TextIOWrapper(stream, form.encoding, newline="")
        try:
            for number, fields in _movie_lines(text, form):
                try:
                    item, title, kinds = _movie(fields, form)
                except (ValueError, IndexError) as error:
                    raise UserError(
                        f"{archive.path}: {form.movies} line {number} is not a film of "
                        f"{archive.folder} ({error}): {form.separator.join(fields)[:_SAMPLE]!r}"
                    ) from None
                items.append(item)
                titles.append(title)
                genres.append(kinds)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{archive.path}: {form.movies} is not {form.encoding} ({error.reason})"
            ) from None
    if not items:
        raise UserError(f"{archive.path}: {form.movies} holds no films")
    return {
        "item": np.array(items, np.int32),
        "title": np.array(titles, object),
        "genres": np.array(genres, object),
    }


def _movie_lines(text: IO[str], form: _Format) -> Iterator[tuple[int, list[str]]]:
    if form is _CSV:
        reader = csv.reader(text)
        for fields in reader:
            yield reader.line_num + 1, fields
        return
    separator = "|" if form is _TAB else form.separator
    for number, line in enumerate(text, start=1):
        if line.strip():
            yield number, line.rstrip("\r\n").split(separator)


def _movie(fields: list[str], form: _Format) -> tuple[int, str, str]:
    if form is _TAB:
        if len(fields) != 5 + len(GENRES_100K):
            raise ValueError(f"{len(fields)} fields, and {5 + len(GENRES_100K)} are wanted")
        flags = zip(GENRES_100K, fields[5:], strict=True)
        return int(fields[0]), fields[1].strip(), "|".join(name for name, on in flags if on == "1")
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} fields, and 3 are wanted")
    return int(fields[0]), fields[1].strip(), fields[2].strip()
