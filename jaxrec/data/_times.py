"""Times as tables give them: whole or decimal numbers since 1970, ISO 8601, Arrow timestamps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.data._sources import BadRow
from jaxrec.data.prepared import TICKS_PER_SECOND, TimeUnit

TimeOption = Literal["auto", "s", "ms", "us", "ns", "iso"]
TIME_OPTIONS = ("auto", "s", "ms", "us", "ns", "iso")

# Numbers below each bound are taken for that unit: 1e11 s is the year 5138, 1e11 ms is 1973.
_BOUNDS: tuple[tuple[TimeUnit, float], ...] = (("s", 1e11), ("ms", 1e14), ("us", 1e17))
_WANTED = "wanted a number of s, ms, us or ns since 1970, or ISO 8601 such as 2024-05-01 12:30:00"
# Parsers of text, most usual first; the kind of a column is that of the first that takes it all.
_TEXT_KINDS: tuple[tuple[str, pa.DataType], ...] = (
    ("whole numbers", pa.int64()),
    ("decimal numbers", pa.float64()),
    ("ISO 8601 times", pa.timestamp("us")),
    ("ISO 8601 times", pa.timestamp("ns")),
    ("ISO 8601 times with a zone", pa.timestamp("us", "UTC")),
    ("ISO 8601 times with a zone", pa.timestamp("ns", "UTC")),
)
_HEAD = 8
_STRETCH = 4096  # a power of two
_NUMBERS = ("whole numbers", "decimal numbers")


@dataclass
class Piece:
    """Times of consecutive rows of one file.

    Attributes:
        kind: what they were, in words.
        values: int64[n], or float64[n] of decimal numbers.
        unit: of `values`, where the kind fixes it; None for plain numbers.
        locate: row of the piece -> the error for it.
    """

    kind: str
    values: np.ndarray
    unit: TimeUnit | None
    locate: Callable[[int, str], Exception]


class MixedTimes(Exception):
    """Pieces that do not go together: the one to blame, its row, and why."""

    def __init__(self, piece: Piece, row: int, problem: str) -> None:
        super().__init__(problem)
        self.piece, self.row, self.problem = piece, row, problem


def parse(
    column: pa.Array, name: str, time_format: str | None, locate: Callable[[int, str], Exception]
) -> Piece:
    """Times of one batch.

    Raises:
        BadRow: with the batch's row number, for the first value that is no time.
    """
    kind, values, unit = _numbers_of(column, name, time_format)
    if values.dtype == np.float64:
        strange = ~np.isfinite(values)
        if strange.any():
            row = int(np.argmax(strange))
            raise BadRow(row, name, f"{_shown(column, row)} is not a time; {_WANTED}")
        huge = values >= 2.0**63
        if huge.any():
            row = int(np.argmax(huge))
            raise BadRow(row, name, f"{_shown(column, row)} is too large for a time")
    negative = values < 0
    if len(values) and bool(negative.any()):
        row = int(np.argmax(negative))
        raise BadRow(
            row, name, f"{_shown(column, row)} lies before 1970; times must not be negative"
        )
    return Piece(kind, values, unit, locate)


def is_missing(column: pa.Array) -> pa.Array:
    """bool[n]: null, blank, or (in a column of decimal numbers) NaN."""
    missing = column.is_null()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        blank = pc.equal(pc.utf8_trim_whitespace(column), "").fill_null(True)
        return pc.or_(missing, blank)
    if pa.types.is_floating(column.type):
        return pc.or_(missing, pc.is_nan(column).fill_null(True))
    return missing


def combine(pieces: list[Piece], option: TimeOption) -> tuple[np.ndarray, TimeUnit]:
    """All times as int64 in one unit.

    Plain numbers are read in the unit of `option`; "auto" goes by their size, and refuses a
    column whose numbers are of different sizes. Decimal numbers are kept to the microsecond
    where they are not whole. Pieces are freed as they are used.

    Raises:
        MixedTimes: where the pieces are of different kinds or sizes.
    """
    _check_kinds(pieces, option)
    if pieces[0].unit is not None:
        return _combine_known(pieces)
    decimal = any(piece.values.dtype == np.float64 for piece in pieces)
    unit = _detected(pieces) if option == "auto" or option == "iso" else option
    values = _concatenated(pieces, np.dtype(np.float64 if decimal else np.int64))
    if not decimal:
        return values, unit
    if bool(np.all(values == np.floor(values))):
        return values.astype(np.int64), unit
    if unit in ("us", "ns"):
        return np.rint(values).astype(np.int64), unit
    scale = TICKS_PER_SECOND["us"] // TICKS_PER_SECOND[unit]
    return np.rint(values * scale).astype(np.int64), "us"


def _numbers_of(
    column: pa.Array, name: str, time_format: str | None
) -> tuple[str, np.ndarray, TimeUnit | None]:
    kind = column.type
    if time_format is not None and pa.types.is_integer(kind):
        column = column.cast(pa.string())
        kind = column.type
    if pa.types.is_timestamp(kind):
        return "timestamps", _int64(column), kind.unit
    if pa.types.is_date(kind):
        return "timestamps", _int64(column.cast(pa.timestamp("s"))), "s"
    if pa.types.is_integer(kind):
        if pa.types.is_uint64(kind):
            huge = column.to_numpy() >= 2**63
            if huge.any():
                row = int(np.argmax(huge))
                raise BadRow(row, name, f"{_shown(column, row)} is too large for a time")
        return "whole numbers", _int64(column.cast(pa.int64())), None
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "decimal numbers", column.cast(pa.float64()).to_numpy(zero_copy_only=False), None
    if pa.types.is_dictionary(kind):
        return _numbers_of(column.dictionary_decode(), name, time_format)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadRow(0, name, f"values of type {kind} are not times; {_WANTED}")
    return _parsed_text(column, name, time_format)


def _parsed_text(
    column: pa.Array, name: str, time_format: str | None
) -> tuple[str, np.ndarray, TimeUnit | None]:
    if time_format is not None:
        parsed = pc.strptime(column, format=time_format, unit="s", error_is_null=True)
        if parsed.null_count:
            row = pc.index(parsed.is_null(), True).as_py()
            raise BadRow(row, name, f"{column[row].as_py()!r} is not a time of {time_format!r}")
        return "formatted times", _int64(parsed), "s"
    # Trimming costs as much as parsing, and few files need it.
    for text in (column, pc.utf8_trim_whitespace(column)):
        for kind, arrow_type in _TEXT_KINDS:
            values = _cast(text, arrow_type)
            if values is None:
                continue
            if kind in _NUMBERS:
                return kind, values.to_numpy(zero_copy_only=False), None
            return kind, _int64(values), values.type.unit
    row = max(_first_unparsed(text, arrow_type) for _, arrow_type in _TEXT_KINDS)
    if not column[row].as_py().strip():
        raise BadRow(row, name, "no time; fill it in, or pass --drop-missing (drop_missing)")
    like = " like those before it" if row else ""
    raise BadRow(row, name, f"{_shown(column, row)!r} is not a time{like}; {_WANTED}")


def _cast(text: pa.Array, arrow_type: pa.DataType) -> pa.Array | None:
    """The texts as another type; None where one of them is none of that type."""
    try:
        # A cast that fails goes on to the end and fails for each value, which takes long.
        text.slice(0, _HEAD).cast(arrow_type)
        return text.cast(arrow_type)
    except pa.ArrowInvalid:
        return None


def _first_unparsed(text: pa.Array, arrow_type: pa.DataType) -> int:
    """Index of the first value that does not parse, given that there is one."""
    start, size = 0, _STRETCH
    while _cast(text.slice(start, size), arrow_type) is not None:
        start += size
    while size > 1:
        size //= 2
        if _cast(text.slice(start, size), arrow_type) is not None:
            start += size
    return start


def _int64(column: pa.Array) -> np.ndarray:
    return column.cast(pa.int64()).to_numpy(zero_copy_only=False)


def _shown(column: pa.Array, row: int) -> str:
    return str(column[row].as_py())


def _check_kinds(pieces: list[Piece], option: TimeOption) -> None:
    first = pieces[0]
    if option not in ("auto", "iso") and first.unit is not None:
        raise MixedTimes(first, 0, f"the times are {first.kind}, not numbers of {option}")
    if option == "iso" and first.unit is None:
        raise MixedTimes(first, 0, f"the times are {first.kind}, not ISO 8601")
    for piece in pieces:
        alike = piece.kind == first.kind or (piece.kind in _NUMBERS and first.kind in _NUMBERS)
        if not alike:
            problem = f"the column turns from {first.kind} to {piece.kind}; use one form of time"
            raise MixedTimes(piece, 0, problem)


def _combine_known(pieces: list[Piece]) -> tuple[np.ndarray, TimeUnit]:
    units = {piece.unit for piece in pieces if piece.unit is not None}
    unit = max(units, key=lambda one: TICKS_PER_SECOND[one])
    for piece in pieces:
        assert piece.unit is not None
        if piece.unit != unit:
            piece.values = piece.values * (TICKS_PER_SECOND[unit] // TICKS_PER_SECOND[piece.unit])
    values = _concatenated(pieces, np.dtype(np.int64))
    if unit == "s":
        return values, unit
    # Finer units than the data needs would only hide what it is: days or seconds, mostly.
    whole = TICKS_PER_SECOND[unit]
    if bool(np.all(values % whole == 0)):
        values //= whole
        return values, "s"
    return values, unit


def _detected(pieces: list[Piece]) -> TimeUnit:
    found = _unit_of(float(pieces[0].values[0])) if len(pieces[0].values) else None
    for piece in pieces:
        if len(piece.values) == 0:
            continue
        for extreme in (np.argmin, np.argmax):
            row = int(extreme(piece.values))
            unit = _unit_of(float(piece.values[row]))
            if found is None:
                found = unit
            if unit != found:
                raise MixedTimes(
                    piece,
                    row,
                    f"{piece.values[row]} looks like {unit} since 1970 where the first row has "
                    f"{found}; pass --time-unit (time_unit) if they are all of one unit",
                )
    _refuse_dates(pieces)
    return found or "s"


def _refuse_dates(pieces: list[Piece]) -> None:
    """Raises for whole numbers that are all dates written as YYYYMMDD."""
    for piece in pieces:
        values = piece.values
        month, day = values // 100 % 100, values % 100
        dates = (values >= 19700101) & (values <= 20991231)
        dates &= (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
        if not bool(np.all(dates)):
            return
    problem = (
        f"{int(pieces[0].values[0])} looks like a date; pass --time-format %Y%m%d (time_format), "
        "or --time-unit s if these are seconds"
    )
    raise MixedTimes(pieces[0], 0, problem)


def _unit_of(time: float) -> TimeUnit:
    return next((unit for unit, bound in _BOUNDS if time < bound), "ns")


def _concatenated(pieces: list[Piece], dtype: np.dtype) -> np.ndarray:
    out = np.empty(sum(len(piece.values) for piece in pieces), dtype)
    start = 0
    for piece in pieces:
        stop = start + len(piece.values)
        out[start:stop] = piece.values
        piece.values = piece.values[:0]
        start = stop
    return out
