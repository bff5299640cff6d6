"""Columns of a CSV or Parquet file, with errors that name the file and the row."""

import csv
import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jaxrec.errors import UserError

# suffix -> (delimiter of the text, or None for Parquet)
FORMATS: dict[str, str | None] = {
    ".csv": ",",
    ".csv.gz": ",",
    ".tsv": "\t",
    ".tsv.gz": "\t",
    ".parquet": None,
    ".pq": None,
}
_LONGEST_HEADER = 1 << 20
_SPOILT = re.compile(r"Row #(\d+): (?:Expected (\d+) columns, got (\d+))?")


def delimiter_of(path: Path) -> str | None:
    """The delimiter that a file's name promises; `None` for Parquet."""
    for suffix, delimiter in FORMATS.items():
        if path.name.lower().endswith(suffix):
            return delimiter
    raise UserError(f"{path}: wanted a file named {', '.join('*' + s for s in FORMATS)}")


class Column(NamedTuple):
    """One column, and how to name its rows.

    Attributes:
      file: where it is from.
      name: of the column.
      values: its values; of a column of lists, those of all lists one after the other.
      first_row: number of the file's first row; a CSV file's header is row 1.
      owners: the row of each value, from 0, where that is not the value's own place.
    """

    file: Path
    name: str
    values: pa.Array
    first_row: int
    owners: NDArray[np.int64] | None = None

    def row(self, index: int) -> int:
        """The number of the row that a value stands in."""
        return self.first_row + int(index if self.owners is None else self.owners[index])

    def error(self, index: int, problem: str) -> UserError:
        """An error at one value of the column."""
        return UserError(f"{self.file}: row {self.row(index)}: {problem}")

    def numbers(self) -> NDArray[np.float64]:
        """The column as finite numbers."""
        values = self.values
        if pa.types.is_string(values.type):
            values = pc.utf8_trim_whitespace(values)
        try:
            numbers = values.cast(pa.float64(), safe=False)
        except pa.ArrowNotImplementedError:
            raise UserError(
                f"{self.file}: the column {self.name} holds {values.type}, wanted numbers"
            ) from None
        except pa.ArrowInvalid:
            index = next(i for i, text in enumerate(values.to_pylist()) if not _is_number(text))
            problem = f"{self.name} is {values[index].as_py()!r}, wanted a number"
            raise self.error(index, problem) from None
        result: NDArray[np.float64] = numbers.fill_null(np.nan).to_numpy(zero_copy_only=False)
        wrong = ~np.isfinite(result)
        if wrong.any():
            index = int(wrong.argmax())
            shown = "empty" if not values[index].is_valid else f"{result[index]}"
            raise self.error(index, f"{self.name} is {shown}, wanted a finite number")
        return result

    def ids(self) -> pa.Array:
        """The column as ids: int64 or string, none of them missing."""
        values = plain(self.values)
        if pa.types.is_floating(values.type):
            # What a table library makes of whole numbers beside a missing one.
            whole = pc.equal(values, pc.floor(values))
            wrong = np.flatnonzero(~np.asarray(whole.fill_null(False)))
            if not wrong.size:
                return values.cast(pa.int64())
            shown = values[int(wrong[0])].as_py()
            raise self.error(
                int(wrong[0]), f"{self.name} is {'empty' if shown is None else shown}, wanted an id"
            )
        text = pa.types.is_string(values.type)
        if not text and not pa.types.is_integer(values.type):
            raise UserError(
                f"{self.file}: the column {self.name} holds {values.type}, wanted whole numbers "
                "or text"
            )
        missing = values.is_null()
        if text:
            missing = pc.or_(missing, pc.equal(values, "").fill_null(True))
        if pc.any(missing).as_py():
            raise self.error(pc.index(missing, True).as_py(), f"{self.name} is empty")
        return values


def read_columns(path: Path, wanted: Sequence[str]) -> dict[str, Column]:
    """Reads those of the wanted columns that the file has.

    Args:
      path: a CSV, TSV (gzip or not) or Parquet file.
      wanted: names of columns.

    Raises:
      UserError: the file is missing, empty, not what its name says, spoilt, or without rows.
    """
    delimiter = delimiter_of(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, wanted a file")
    try:
        names = header(path)
        for name in wanted:
            if names.count(name) > 1:
                raise UserError(f"{path}: the column {name} stands {names.count(name)} times")
        chosen = [name for name in names if name in wanted]
        if delimiter is None:
            read = _read_parquet(path, chosen)
        else:
            # Without a column the reader would take all of them, and could not count the rows.
            read = _read_csv(path, delimiter, chosen or names[:1])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from None
    if not read.num_rows:
        raise UserError(f"{path}: holds no rows")
    first_row = 1 if delimiter is None else 2
    return {name: Column(path, name, plain(read[name]), first_row) for name in read.column_names}


def header(path: Path) -> list[str]:
    """Names of the file's columns, for messages."""
    delimiter = delimiter_of(path)
    return _parquet_names(path) if delimiter is None else _csv_names(path, delimiter)


def plain(values: Any) -> pa.Array:
    """One array without chunks, dictionaries or 64-bit offsets."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        array = array.cast(pa.string())
    if pa.types.is_integer(array.type) and array.type != pa.int64():
        array = array.cast(pa.int64())
    return array


def _read_csv(path: Path, delimiter: str, columns: Sequence[str]) -> pa.Table:
    def read(*, threads: bool) -> pa.Table:
        return pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(use_threads=threads),
            parse_options=pacsv.ParseOptions(delimiter=delimiter),
            convert_options=pacsv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, pa.string()),
                strings_can_be_null=False,
            ),
        )

    try:
        return read(threads=True)
    except pa.ArrowInvalid:
        pass
    try:
        # Only the reader that goes line by line can tell the row.
        return read(threads=False)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: {_spoilt_row(str(error))}") from None


def _spoilt_row(message: str) -> str:
    found = _SPOILT.search(message)
    if found is None:
        return f"cannot be read as CSV: {_one_line(message)}"
    row, expected, got = found.groups()
    if expected is not None:
        return f"row {row}: has {got} fields, the header has {expected}"
    if "UTF8" in message:
        return f"row {row}: is not UTF-8 text"
    return f"row {row}: cannot be read as CSV: {_one_line(message)}"


def _csv_names(path: Path, delimiter: str) -> list[str]:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        # One line of bytes: text would be decoded, and could fail, beyond the header.
        with opener(path, "rb") as stream:
            line = stream.readline(_LONGEST_HEADER).decode("utf-8-sig")
        row = next(csv.reader([line], delimiter=delimiter), None)
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is not a whole gzip file: {_one_line(error)}") from None
    except csv.Error as error:
        raise UserError(f"{path}: row 1: cannot be read as CSV: {_one_line(error)}") from None
    if not row:
        raise UserError(f"{path}: is empty, wanted a header row and a row an item")
    return row


def _parquet_names(path: Path) -> list[str]:
    try:
        names: list[str] = pq.read_schema(path).names
    except pa.ArrowInvalid:
        raise UserError(f"{path}: is not a whole Parquet file") from None
    return names


def _read_parquet(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: is not a whole Parquet file: {_one_line(error)}") from None


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _one_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
