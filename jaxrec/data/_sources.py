"""Tables on disk, CSV or Parquet, read in batches."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.data._csv_source import CsvOptions, CsvSource
from jaxrec.errors import UserError

_PARQUET_BATCH = 1 << 20
_NOT_TABLES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"\x93NUMPY": "a NumPy array; a table with a header is wanted",
    b"\x89HDF": "an HDF5 file; write the table as CSV or Parquet",
    b"SQLite format 3": "an SQLite database; write the table as CSV or Parquet",
}


class BadRow(Exception):
    """A row that cannot be used: which record of the file, which column, and why."""

    def __init__(self, record: int, column: str, problem: str) -> None:
        super().__init__(problem)
        self.record, self.column, self.problem = record, column, problem


class Source(Protocol):
    """A table on disk."""

    path: Path
    names: list[str]

    def batches(self, columns: Sequence[str], ids: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Batches of `columns`, in file order; text among `ids` comes dictionary-encoded."""

    def is_text(self, column: str) -> bool:
        """Whether the file says that a column holds text (a CSV file never does)."""

    def place(self, record: int) -> str:
        """Where a record (counted from 0) stands, for a message."""

    def fraction_read(self) -> float:
        """Share of the file that the running `batches` has consumed."""


def open_source(path: Path | str, required: Sequence[str], options: CsvOptions) -> Source:
    """Opens a CSV or Parquet file; what it is, its first bytes say.

    Args:
        path: the file; CSV may be compressed with gzip, zstd or bz2.
        required: columns that are going to be read, to tell delimiters apart.
        options: for CSV.

    Raises:
        UserError: where there is no such file, or it is not a table.
    """
    file = Path(path).expanduser()
    head = _first_bytes(file)
    for magic, what in _NOT_TABLES.items():
        if head.startswith(magic):
            raise UserError(f"{file}: not a table but {what}")
    if head.startswith(b"PAR1"):
        return ParquetSource(file)
    if file.suffix.lower() in (".parquet", ".pq"):
        raise UserError(f"{file}: not a Parquet file, though its name says so")
    return CsvSource(file, head, required, options)


def _first_bytes(file: Path) -> bytes:
    if file.is_dir():
        inside = sorted(entry.name for entry in file.iterdir() if entry.is_file())
        listing = f" (it holds {', '.join(inside[:4])}{', ...' if len(inside) > 4 else ''})"
        raise UserError(f"{file}: a folder; name the files in it{listing if inside else ''}")
    try:
        with file.open("rb") as stream:
            head = stream.read(32)
    except FileNotFoundError:
        close: list[str] = []
        if file.parent.is_dir():
            close = difflib.get_close_matches(file.name, [e.name for e in file.parent.iterdir()], 1)
        meant = f"; did you mean {file.parent / close[0]}?" if close else ""
        raise UserError(f"{file}: no such file{meant}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{file}: the file is empty")
    return head


def check_columns(source: Source, wanted: dict[str, str], advice: dict[str, str]) -> None:
    """Raises UserError unless each wanted column is in the table once.

    Args:
        source: the table.
        wanted: role -> column name, such as {"time": "timestamp"}.
        advice: role -> what to do where the column is missing.
    """
    for role, column in wanted.items():
        count = source.names.count(column)
        if count > 1:
            raise UserError(f"{source.path}: column {column!r} stands {count} times in the header")
        if count == 0:
            close = difflib.get_close_matches(column, source.names, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            shown = ", ".join(source.names[:20]) + (", ..." if len(source.names) > 20 else "")
            hint = ""
            if any(_is_number(name) for name in source.names):
                hint = "; if the first line is no header, name the columns with --columns (columns)"
            raise UserError(
                f"{source.path}: no column {column!r}{meant} (its columns: {shown}); "
                f"{advice[role]}{hint}"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class ParquetSource:
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                self._schema = file.schema_arrow
                self._rows = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})"
            ) from None
        self.names = list(self._schema.names)
        self._done = 0
        if self._rows == 0:
            raise UserError(f"{path}: a table without rows")

    def type_of(self, column: str) -> pa.DataType:
        """The column's Arrow type."""
        return self._schema.field(column).type

    def is_text(self, column: str) -> bool:
        kind = self.type_of(column)
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def fraction_read(self) -> float:
        return self._done / self._rows

    def batches(self, columns: Sequence[str], ids: Sequence[str]) -> Iterator[pa.RecordBatch]:
        self._done = 0
        text_ids = [name for name in ids if self.is_text(name)]
        try:
            with pq.ParquetFile(self.path, read_dictionary=text_ids) as file:
                for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=list(columns)):
                    self._done += len(batch)
                    yield batch.select(list(columns))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path}: the Parquet file is damaged ({str(error).splitlines()[0]})"
            ) from None

    def place(self, record: int) -> str:
        return f"row {record + 1} (the first is row 1)"
