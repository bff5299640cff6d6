"""Delimited text in batches, and the first row at fault where it cannot be read."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.csv as pacsv

from jaxrec.errors import UserError

_BLOCK = 16 << 20
_COMPRESSION = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
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
        self._share = 0.0
        self.has_header = options.columns is None
        self._delimiter = ","
        if options.delimiter is not None:
            self._choose(_checked_delimiter(options.delimiter))
        first = self._first_records(1)
        if not first:
            raise UserError(f"{path}: the file is empty")
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
        return self._share

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
                    block_size=_BLOCK,
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
            for count, batch in enumerate(reader, 1):
                # The reader runs ahead, so its place in the file says little.
                self._share = min(1.0, count * _BLOCK / max(1.0, tap.expected_bytes()))
                yield batch.rename_columns(list(keys))
        except (pa.ArrowException, OSError, UnicodeError) as error:
            self._explain(error, bool(ragged))
        # Not closed on the way out of an error: the reader's threads may be reading ahead still,
        # and the last of them to let go of the file closes it.
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
        return found

    # -- reading

    def _open(self) -> "_Tap":
        raw = pa.OSFile(str(self.path))
        stream = raw
        if self._compression is not None:
            stream = pa.CompressedInputStream(raw, self._compression)
        replaced = self._delimiter.encode(self._encoding) if len(self._delimiter) > 1 else None
        return _Tap(raw, stream, replaced, (self._quote or "").encode())

    @contextmanager
    def _reader(self, strict: bool = False) -> Iterator[Any]:
        encoding = "utf-8-sig" if self._encoding in ("utf-8", "utf8") else self._encoding
        limit = csv.field_size_limit(_CELL_LIMIT)
        tap = self._open()
        try:
            text = io.TextIOWrapper(
                io.BufferedReader(tap, 1 << 16), encoding=encoding, errors="replace", newline=""
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
        with self._reader() as reader:
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
        with self._reader(strict=True) as reader:
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
        raise UserError(
            f"delimiter {delimiter!r}: wanted one or two characters, such as ',' or '::'"
        )
    return delimiter


class _Tap(io.RawIOBase):
    """Passes a stream on, counts its quotes and puts one character for a delimiter of two."""

    def __init__(self, raw: Any, inner: Any, replaced: bytes | None, quote: bytes) -> None:
        super().__init__()
        self._raw, self._size = raw, raw.size()
        self._passed = 0
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
        self._passed += len(data)
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

    def expected_bytes(self) -> float:
        """Bytes that the whole file comes to, going by what was read of it."""
        return self._passed * self._size / max(1, self._raw.tell())

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()
