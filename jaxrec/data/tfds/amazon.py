"""Reading the Amazon product data of 2014: reviews as JSON lines, metadata as Python literals."""

import ast
import html
import io
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from jaxrec.data.tfds.archives import open_lines
from jaxrec.data.tfds.columns import Columns
from jaxrec.errors import UserError

_BLOCK = 1 << 24
_SAMPLE = 80
_LONGEST_LINE = 1 << 24
_SCHEMA = pa.schema(
    [
        ("reviewerID", pa.string()),
        ("asin", pa.string()),
        ("overall", pa.float32()),
        ("unixReviewTime", pa.int64()),
    ]
)
_NAMES = {"reviewerID": "user", "asin": "item", "overall": "rating", "unixReviewTime": "timestamp"}
# Lines of the metadata begin with the product's id; a line that begins otherwise is parsed whole.
_STARTS_WITH_ASIN = re.compile(rb"\s*\{'asin': '([^'\\]*)'")


def read_reviews(path: Path) -> Iterator[Columns]:
    """Batches of reviews in the order of the publisher's file.

    Args:
        path: `reviews_CATEGORY_5.json.gz`, or the same unpacked.

    Returns:
        Columns `user` and `item` (object arrays of str), `rating` float32, `timestamp` int64
        (Unix seconds; the publisher gives the day only).

    Raises:
        UserError: for a file that is damaged or of another kind, or a malformed line.
    """
    lines = 0
    rows = 0
    with open_lines(path) as stream:
        for block in _blocks(stream, path):
            try:
                table = pajson.read_json(
                    io.BytesIO(block),
                    read_options=pajson.ReadOptions(block_size=len(block) + 1, use_threads=False),
                    parse_options=pajson.ParseOptions(
                        explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"
                    ),
                )
                columns = _as_columns(table)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, _Malformed) as error:
                raise _first_bad_line(path, block, lines, error) from None
            lines += block.count(b"\n")
            rows += table.num_rows
            yield columns
    if rows == 0:
        raise UserError(f"{path}: the file holds no reviews")


class _Malformed(Exception):
    pass


def _blocks(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """Whole lines, about 16 MB at a time."""
    rest = b""
    while block := stream.read(_BLOCK):
        head, newline, tail = (rest + block).rpartition(b"\n")
        if newline:
            if head.strip():
                yield head + newline
            rest = tail
        else:
            rest = tail
            if len(rest) > _LONGEST_LINE:
                raise UserError(f"{path}: a line of more than {_LONGEST_LINE:,} bytes")
    if rest.strip():
        yield rest


def _as_columns(table: pa.Table) -> Columns:
    columns: Columns = {}
    for field, name in _NAMES.items():
        column = table.column(field)
        if column.null_count:
            raise _Malformed(f"{field} is missing")
        columns[name] = column.to_numpy()
    if table.num_rows and (
        not np.isfinite(columns["rating"]).all()
        or columns["timestamp"].min() < 0
        or not all(columns["user"])
        or not all(columns["item"])
    ):
        raise _Malformed("a value is empty, negative or not a number")
    return columns


def _first_bad_line(path: Path, block: bytes, before: int, error: Exception) -> UserError:
    """Reads a block again, line by line, to say which line it is."""
    for number, line in enumerate(block.splitlines(), start=before + 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        shown = repr(line[:_SAMPLE].decode("utf-8", "replace"))
        try:
            review = json.loads(line)
        except ValueError as problem:
            return UserError(f"{where} is not JSON ({problem}): {shown}")
        if not isinstance(review, dict):
            return UserError(f"{where} is not a review (a JSON object): {shown}")
        for field in _NAMES:
            if not _is_good(field, review.get(field)):
                given = repr(review[field]) if field in review else "missing"
                return UserError(
                    f"{where}: {field} is {given}; a review needs "
                    "reviewerID and asin (text), overall (number), unixReviewTime (whole seconds)"
                )
    return UserError(f"{path}: a line after line {before} cannot be read ({error})")


def _is_good(field: str, value: Any) -> bool:
    if field in ("reviewerID", "asin"):
        return isinstance(value, str) and value != ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if field == "unixReviewTime":
        return isinstance(value, int) and value >= 0
    return bool(np.isfinite(value))


def read_metadata(path: Path, wanted: frozenset[str]) -> Columns:
    """Titles, brands and categories of the products that are wanted.

    The metadata lists every product of a category, of which the 5-core reviews keep a twentieth;
    only lines of wanted products are parsed.

    Args:
        path: `meta_CATEGORY.json.gz`, or the same unpacked.
        wanted: ids (asin) of the products.

    Returns:
        Columns `item`, `title`, `brand`, `categories` (a path joined by ` > `, paths by ` | `):
        object arrays of str, empty where the metadata says nothing, in the order of the file. HTML
        entities are resolved and white space is collapsed. A product listed twice counts once, as
        it is listed first.

    Raises:
        UserError: for a file that is damaged or of another kind, or a malformed line.
    """
    found: dict[str, tuple[str, str, str]] = {}
    with open_lines(path) as stream, warnings.catch_warnings():
        # Product texts hold backslashes that Python's parser comments on.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for number, line in enumerate(stream, start=1):
            start = _STARTS_WITH_ASIN.match(line)
            if (start and start[1].decode("utf-8", "replace") not in wanted) or not line.strip():
                continue
            product = _parse_product(line, path, number)
            asin = product["asin"]
            if asin in wanted and asin not in found:
                found[asin] = (
                    _text(product.get("title")),
                    _text(product.get("brand")),
                    _categories(product.get("categories")),
                )
    if not found:
        raise UserError(
            f"{path}: none of the {len(wanted):,} reviewed products is in it; "
            "pass the metadata of the same category (meta_CATEGORY.json.gz)"
        )
    columns = zip(*found.values(), strict=True)
    return {
        "item": np.array(list(found), object),
        **{
            name: np.array(column, object)
            for name, column in zip(("title", "brand", "categories"), columns, strict=True)
        },
    }


def _parse_product(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        # Literals only: nothing in the file is executed.
        product = ast.literal_eval(line.decode("utf-8").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        shown = repr(line[:_SAMPLE].decode("utf-8", "replace"))
        raise UserError(f"{path} line {number} is not a Python literal: {shown}") from None
    if not isinstance(product, dict) or not isinstance(product.get("asin"), str):
        raise UserError(f"{path} line {number} is not a product (a dict with 'asin')")
    return product


def _text(value: Any) -> str:
    return " ".join(html.unescape(value).split()) if isinstance(value, str) else ""


def _categories(value: Any) -> str:
    if not isinstance(value, list):
        return ""
    paths = [path for path in value if isinstance(path, list)]
    return " | ".join(" > ".join(_text(part) for part in path) for path in paths)
