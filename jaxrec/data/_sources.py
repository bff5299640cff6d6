"""Tables on disk, CSV or Parquet, read in batches; and where in the file a bad row stands."""

import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from jaxrec.errors import UserError

_CSV_BLOCK = 32 << 20
_PARQUET_BATCH = 1 << 20
_COMPRESSION = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_NOT_TABLES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"\x93NUMPY": "a NumPy array; a table with a header is wanted",
    b"\x89HDF": "an HDF5 file; write the table as CSV or Parquet",
    b"SQLite format 3": "an SQLite database; write the table as CSV or Parquet",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = (",", "\t", ";", "|", "::")
# Stands for a delimiter of two characters inside the reader; a control character made for this.
_UNIT_SEPARATOR = "\x1f"
_CELL_LIMIT = 1 << 26
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True)
class CsvOptions:
    """How to read text tables.

    Attributes:
        delimiter: character(s) between fields; None finds it out from the first line.
        columns: names for a file that has no header line; None where it has one.
        quote_char: what encloses a field that holds a delimiter; None for no quoting.
        encoding: character encoding.
    """

    delimiter: str | None = None
    columns: Sequence[str] | None = None
    quote_char: str | None = '"'
    encoding: str = "utf-8"


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
            shown = ", ".join(source.names[:12]) + (", ..." if len(source.names) > 12 else "")
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


class CsvSource:
    """Delimited text, perhaps compressed."""

    def __init__(
        self, path: Path, head: bytes, required: Sequence[str], options: CsvOptions
    ) -> None:
        self.path = path
        self._encoding = _checked_encoding(path, head, options.encoding)
        self._compression = next(
            (name for magic, name in _COMPRESSION.items() if head.startswith(magic)), None
        )
        self._quote = options.quote_char
        self._raw: Any = None
        self._delimiter = ","
        if options.delimiter is not None:
            self._choose(_checked_delimiter(options.delimiter))
        first = self._first_records(1)
        if not first:
            raise UserError(f"{path}: the file is empty")
        self.has_header = options.columns is None
        if options.delimiter is None:
            self._choose(self._found_delimiter(required, options.columns))
        records = self._first_records(2)
        line, fields = records[0]
        if options.columns is None:
            self.names = [name.strip() for name in fields]
            self._skipped_lines = line
            if len(records) == 1:
                raise UserError(f"{path}: a header and no rows after it")
        else:
            self.names = list(options.columns)
            self._skipped_lines = 0
            if len(fields) != len(self.names):
                raise UserError(
                    f"{path}: columns names {len(self.names)} columns ({', '.join(self.names)}) "
                    f"and the first row has {len(fields)} fields"
                )

    def is_text(self, column: str) -> bool:
        return False

    def fraction_read(self) -> float:
        size = self.path.stat().st_size
        return min(1.0, self._raw.tell() / size) if self._raw is not None and size else 0.0

    def batches(self, columns: Sequence[str], ids: Sequence[str]) -> Iterator[pa.RecordBatch]:
        # Names of our own: those of the file may repeat, or hold anything at all.
        keys = {name: str(self.names.index(name)) for name in columns}
        ragged: list[Any] = []

        def refuse(row: Any) -> str:
            ragged.append(row)
            return "error"

        tap = self._open()
        try:
            reader = pacsv.open_csv(
                pa.PythonFile(tap, mode="r"),
                read_options=pacsv.ReadOptions(
                    column_names=[str(place) for place in range(len(self.names))],
                    skip_rows=self._skipped_lines,
                    block_size=_CSV_BLOCK,
                    encoding=self._encoding,
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=self._char,
                    quote_char=self._quote or False,
                    newlines_in_values=self._quote is not None,
                    invalid_row_handler=refuse,
                ),
                convert_options=pacsv.ConvertOptions(
                    include_columns=list(keys.values()),
                    column_types={
                        key: _DICTIONARY if name in ids else pa.string()
                        for name, key in keys.items()
                    },
                    strings_can_be_null=False,
                ),
            )
            for batch in reader:
                yield batch.rename_columns(list(keys))
        except (pa.ArrowException, OSError, UnicodeError) as error:
            self._explain(error, bool(ragged))
        finally:
            tap.close()
        if tap.quotes % 2:
            self._refuse_open_quote()

    def place(self, record: int) -> str:
        return self._row_text(next(line for n, (line, _) in enumerate(self._data()) if n == record))

    def _row_text(self, line: int) -> str:
        return f"row {line} (the {'header' if self.has_header else 'first line'} is row 1)"

    # -- what the first lines say

    def _choose(self, delimiter: str) -> None:
        self._delimiter = delimiter
        if len(delimiter) > 1:
            self._quote = None  # files with such delimiters do not quote, and titles hold quotes

    @property
    def _char(self) -> str:
        return self._delimiter if len(self._delimiter) == 1 else _UNIT_SEPARATOR

    def _found_delimiter(self, required: Sequence[str], columns: Sequence[str] | None) -> str:
        usual = "\t" if ".tsv" in [suffix.lower() for suffix in self.path.suffixes] else ","
        for delimiter in (usual, *_DELIMITERS):
            self._delimiter = delimiter
            _, fields = self._first_records(1)[0]
            names = [name.strip() for name in fields]
            if set(required) <= set(names) if columns is None else len(names) == len(columns):
                return delimiter
        return usual

    def _first_records(self, count: int) -> list[tuple[int, list[str]]]:
        """The first records that are not blank, each with the number of its last line."""
        found: list[tuple[int, list[str]]] = []
        with self._reader() as reader:
            try:
                for fields in reader:
                    if fields:
                        found.append((reader.line_num, fields))
                    if len(found) == count:
                        break
            except csv.Error as error:
                raise UserError(f"{self.path}: not a table of text ({error})") from None
            except (pa.ArrowException, OSError) as error:
                self._explain_broken(error)
            except UnicodeError:
                self._explain_encoding()
        return found

    # -- reading

    def _open(self) -> "_Tap":
        self._raw = pa.OSFile(str(self.path))
        stream = self._raw
        if self._compression is not None:
            stream = pa.CompressedInputStream(stream, self._compression)
        replaced = self._delimiter.encode(self._encoding) if len(self._delimiter) > 1 else None
        return _Tap(stream, replaced, (self._quote or "").encode())

    @contextmanager
    def _reader(self, errors: str = "strict", strict: bool = False) -> Iterator[Any]:
        encoding = "utf-8-sig" if self._encoding in ("utf-8", "utf8") else self._encoding
        limit = csv.field_size_limit(_CELL_LIMIT)
        tap = self._open()
        try:
            text = io.TextIOWrapper(
                io.BufferedReader(tap, 1 << 16), encoding=encoding, errors=errors, newline=""
            )
            options: dict[str, Any] = {"delimiter": self._char, "strict": strict}
            if self._quote is None:
                yield csv.reader(text, quoting=csv.QUOTE_NONE, **options)
            else:
                yield csv.reader(text, quotechar=self._quote, **options)
        finally:
            csv.field_size_limit(limit)
            tap.close()

    def _data(self) -> Iterable[tuple[int, list[str]]]:
        """Data records, each with the number of its first line."""
        with self._reader(errors="replace") as reader:
            line = 1
            for fields in reader:
                if fields and line > self._skipped_lines:
                    yield line, fields
                line = reader.line_num + 1

    # -- what went wrong

    def _explain(self, error: Exception, ragged: bool) -> NoReturn:
        text = str(error)
        if ragged:
            width = len(self.names)
            for line, fields in self._data():
                if len(fields) != width:
                    counted = "the header has" if self.has_header else "there are names for"
                    raise UserError(
                        f"{self.path}: {self._row_text(line)}: {len(fields)} fields where "
                        f"{counted} {width}{self._quoting_hint(fields)}"
                    ) from None
        if "UTF8" in text or isinstance(error, UnicodeError):
            self._explain_encoding()
        if "straddling" in text:
            self._refuse_open_quote()
        if isinstance(error, OSError) and not isinstance(error, pa.ArrowInvalid):
            self._explain_broken(error)
        summary = text.splitlines()[0] if text else type(error).__name__
        raise UserError(f"{self.path}: cannot be read as CSV ({summary})") from None

    def _quoting_hint(self, fields: list[str]) -> str:
        if any("\n" in field for field in fields):
            return "; a quoted field runs over several lines: is its quote closed?"
        return ""

    def _explain_broken(self, error: Exception) -> NoReturn:
        if self._compression is not None:
            how = "truncated" if "runcated" in str(error) else "damaged"
            raise UserError(f"{self.path}: the {self._compression} file is {how}; get it again")
        raise UserError(f"{self.path}: cannot be read ({error})")

    def _explain_encoding(self) -> NoReturn:
        """Finds the first line that is not in the encoding."""
        tap = self._open()
        try:
            for number, line in enumerate(io.BufferedReader(tap), 1):
                try:
                    line.decode(self._encoding)
                except UnicodeError as error:
                    raise UserError(
                        f"{self.path}: {self._row_text(number)} is not {self._encoding} text "
                        f"({_undecodable(error)}); pass --encoding (encoding), for instance latin-1"
                    ) from None
        finally:
            tap.close()
        raise UserError(f"{self.path}: not {self._encoding} text; pass --encoding (encoding)")

    def _refuse_open_quote(self) -> None:
        """Raises where the file ends inside a quoted field, which would swallow rows."""
        line = 1
        with self._reader(errors="replace", strict=True) as reader:
            while True:
                try:
                    next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    if "unexpected end of data" not in str(error):
                        return  # a quote inside a field: ugly, and not a lost row
                    raise UserError(
                        f"{self.path}: {self._row_text(line)}: a quoted field opens here and "
                        "never closes; repair it, or pass --quote-char '' (quote_char=None) for a "
                        "file without quoting"
                    ) from None
                line = reader.line_num + 1


def _undecodable(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} in column {error.start + 1}"
    return str(error)


def _checked_encoding(path: Path, head: bytes, encoding: str) -> str:
    try:
        "".encode(encoding)
    except LookupError:
        raise UserError(f"encoding {encoding!r} is not known; wanted one like utf-8") from None
    if head.startswith(_UTF16) and not encoding.lower().replace("-", "").startswith("utf16"):
        raise UserError(f"{path}: UTF-16 text; pass --encoding utf-16 (encoding)")
    return encoding.lower()


def _checked_delimiter(delimiter: str) -> str:
    named = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "space": " "}
    delimiter = named.get(delimiter, delimiter)
    if not delimiter or len(delimiter) > 2 or "\n" in delimiter or "\r" in delimiter:
        raise UserError(f"delimiter {delimiter!r}: wanted one or two characters, such as ',' or '::'")
    return delimiter


class _Tap(io.RawIOBase):
    """Passes a stream on, counts its quotes and puts one character for a delimiter of two."""

    def __init__(self, inner: Any, replaced: bytes | None, quote: bytes) -> None:
        super().__init__()
        self._inner, self._replaced, self._quote = inner, replaced, quote
        self._held = b""
        self.quotes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._replaced is None:
            data = self._inner.read(size) if size >= 0 else self._inner.read()
        else:
            data = self._read_replaced(size)
        if self._quote:
            self.quotes += data.count(self._quote)
        return data

    def _read_replaced(self, size: int) -> bytes:
        assert self._replaced is not None
        while True:
            # One byte less, to leave room for one that was held back.
            fresh = self._inner.read(max(1, size - 1)) if size >= 0 else self._inner.read()
            data = (self._held + fresh).replace(self._replaced, _UNIT_SEPARATOR.encode())
            self._held = b""
            if fresh and data.endswith(self._replaced[:1]):
                # Perhaps the first half of a delimiter: it waits for what comes next.
                self._held, data = data[-1:], data[:-1]
            if data or not fresh:
                return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


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
