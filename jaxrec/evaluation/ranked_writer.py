"""Writes ranked lists to a file, in blocks, whole or not at all."""

import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from jaxrec.data.prepared import Interactions
from jaxrec.errors import UserError
from jaxrec.evaluation._table_files import delimiter_of

Form = Literal["long", "wide"]
FORMS: tuple[str, ...] = ("long", "wide")

_BLOCK_USERS = 1 << 16


class RankedWriter:
    """Writes ranked lists block by block to a file that appears when all is written.

    The file is a temporary sibling until the `with` block ends well; it then takes the name,
    replacing a file that is there. After an error or an interrupt nothing is left.

    Args:
      path: .csv, .tsv (each also .gz), .parquet or .pq.
      interactions: the data set, for its original ids.
      form: "long" (a row an item: user_id, item_id, rank, score) or "wide" (a row a user:
        user_id, items; a list column in Parquet, ids apart by spaces in text).
      scores: whether scores are written; "long" only.
      titles: whether item titles are written, empty where unknown; "long" only.

    Raises:
      UserError: an unknown ending, a folder that is not there or cannot be written to, options
        that the form has no place for.

    Cost: one block of lists in memory.

    Source: the interface of `jaxrec recommend --all --out`.

    >>> import tempfile
    >>> from jaxrec.data.prepared import write_prepared
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shop = write_prepared(
    ...         folder + "/shop", name="shop", users=np.array([0, 1]), items=np.array([0, 1]),
    ...         timestamps=None, ratings=None, user_ids=["ann", "bob"], item_ids=[10, 20],
    ...         source={}, tie_order="as given")
    ...     with RankedWriter(Path(folder, "lists.csv"), shop) as out:
    ...         out.write([1], [[0, -1]])
    ...     print(Path(folder, "lists.csv").read_text())
    user_id,item_id,rank
    bob,10,1
    <BLANKLINE>
    """

    def __init__(
        self,
        path: str | Path,
        interactions: Interactions,
        *,
        form: Form = "long",
        scores: bool = False,
        titles: bool = False,
    ) -> None:
        self.path = Path(path)
        self._delimiter = delimiter_of(self.path)
        self._form = form
        self._scores = scores
        self._titles = titles
        self._check_options(interactions)
        self._num_items = interactions.num_items
        self._users = pa.array(interactions.user_ids)
        self._items = pa.array(interactions.item_ids)
        self._title = pa.array(interactions.item_titles, pa.string()) if titles else None
        if form == "wide" and self._delimiter is not None:
            self._items = self._items.cast(pa.string())
            self._refuse_spaces()
        self._written = np.zeros(interactions.num_users, bool)
        self._schema = self._columns()
        self._temporary = self.path.with_name(f".{self.path.name}.new-{secrets.token_hex(4)}")
        self._stack = ExitStack()
        self._sink: Any = None

    def __enter__(self) -> "RankedWriter":
        try:
            self._open()
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise UserError(f"{self.path}: cannot be written: {_reason(error)}") from None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._stack.close()
            os.replace(self._temporary, self.path)
        except BaseException as failure:
            self._discard()
            if isinstance(failure, OSError):
                raise UserError(f"{self.path}: cannot be written: {_reason(failure)}") from None
            raise

    def write(self, users: ArrayLike, lists: ArrayLike, scores: ArrayLike | None = None) -> None:
        """Writes the lists of some users.

        Args:
          users: int[n], user index; each user is written once.
          lists: int[n, K], item index, best first; slots of -1 are left out.
          scores: float[n, K], where the writer was made with `scores=True`.

        Raises:
          UserError: shapes that do not fit, a user twice, an index out of range, a score that is
            not finite, a disk that refuses.
        """
        owner, ranked = np.asarray(users), np.asarray(lists)
        if ranked.ndim != 2 or owner.shape != ranked.shape[:1]:
            raise UserError(
                f"wanted users [n] and lists [n, K], got {owner.shape} and {ranked.shape}"
            )
        if self._scores != (scores is not None):
            raise UserError("scores are written for all lists or for none: see scores=True")
        if not owner.size:
            return
        self._check_block(owner, ranked)
        table = self._table(owner, ranked, None if scores is None else np.asarray(scores))
        try:
            self._sink.write_table(table)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {_reason(error)}") from None
        self._written[owner] = True

    def _check_options(self, interactions: Interactions) -> None:
        if self._form not in FORMS:
            raise UserError(f"form must be one of {', '.join(FORMS)}, got {self._form!r}")
        if self._form == "wide" and (self._scores or self._titles):
            raise UserError("the wide form has no place for scores or titles: use form='long'")
        if self._titles and interactions.item_titles is None:
            raise UserError(f"{interactions.name} has no item titles to write")
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a folder, wanted a file name")
        if not self.path.absolute().parent.is_dir():
            raise UserError(f"{self.path}: the folder {self.path.parent} does not exist")

    def _refuse_spaces(self) -> None:
        spaced = pc.match_substring_regex(self._items, r"\s")
        if pc.any(spaced).as_py():
            item = self._items[pc.index(spaced, True).as_py()].as_py()
            raise UserError(
                f"{self.path}: item id {item!r} holds a space, which separates ids in the wide "
                "form: use form='long' or Parquet"
            )

    def _columns(self) -> pa.Schema:
        fields = [("user_id", self._users.type)]
        if self._form == "wide":
            text = self._delimiter is not None
            fields.append(("items", pa.string() if text else pa.list_(self._items.type)))
            return pa.schema(fields)
        fields += [("item_id", self._items.type), ("rank", pa.int32())]
        fields += [("score", pa.float32())] if self._scores else []
        fields += [("title", pa.string())] if self._titles else []
        return pa.schema(fields)

    def _open(self) -> None:
        if self._delimiter is None:
            writer: Callable[..., Any] = pq.ParquetWriter
            self._sink = self._stack.enter_context(
                writer(self._temporary, self._schema, compression="zstd")
            )
            return
        target: Any = self._stack.enter_context(pa.OSFile(str(self._temporary), "wb"))
        if self.path.name.lower().endswith(".gz"):
            target = self._stack.enter_context(pa.CompressedOutputStream(target, "gzip"))
        plain = not self._titles and not any(map(self._needs_quotes, (self._users, self._items)))
        options = pacsv.WriteOptions(
            delimiter=self._delimiter, quoting_style="none" if plain else "needed"
        )
        if plain:
            # The writer quotes every name of the header, whatever the style.
            target.write((self._delimiter.join(self._schema.names) + "\n").encode())
            options.include_header = False
        self._sink = self._stack.enter_context(
            pacsv.CSVWriter(target, self._schema, write_options=options)
        )

    def _needs_quotes(self, ids: pa.Array) -> bool:
        special = rf'["\r\n{self._delimiter}]'
        return pa.types.is_string(ids.type) and bool(
            pc.any(pc.match_substring_regex(ids, special)).as_py()
        )

    def _check_block(self, owner: NDArray[Any], ranked: NDArray[Any]) -> None:
        for what, indices, lowest, size in (
            ("user", owner, 0, self._written.size),
            ("item", ranked, -1, self._num_items),
        ):
            if not np.issubdtype(indices.dtype, np.integer):
                raise UserError(f"{what} indices must be integers, got {indices.dtype}")
            if indices.size and (indices.min() < lowest or indices.max() >= size):
                raise UserError(f"{what} indices must lie between {lowest} and {size - 1}")
        if self._written[owner].any() or len(np.unique(owner)) != owner.size:
            raise UserError(f"{self.path}: a user has two lists, wanted one")

    def _table(
        self, owner: NDArray[Any], ranked: NDArray[Any], scores: NDArray[Any] | None
    ) -> pa.Table:
        row, slot = np.nonzero(ranked >= 0)
        items = self._items.take(pa.array(ranked[row, slot]))
        if self._form == "wide":
            offsets = np.append(0, np.cumsum((ranked >= 0).sum(axis=1)))
            lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items)
            columns = [
                self._users.take(pa.array(owner)),
                lists if self._delimiter is None else pc.binary_join(lists, " "),
            ]
            return pa.Table.from_arrays(columns, schema=self._schema)
        # An empty slot takes no rank, so that ranks in a file run from 1 without a gap.
        rank = np.cumsum(ranked >= 0, axis=1, dtype=np.int32)[row, slot]
        columns = [self._users.take(pa.array(owner[row])), items, pa.array(rank, pa.int32())]
        if scores is not None:
            if scores.shape != ranked.shape:
                raise UserError(f"wanted a score a slot, {ranked.shape}, got {scores.shape}")
            kept = scores[row, slot].astype(np.float32)
            if not np.isfinite(kept).all():
                raise UserError(f"{self.path}: the score of an item is not a finite number")
            columns.append(pa.array(kept))
        if self._title is not None:
            columns.append(self._title.take(pa.array(ranked[row, slot])))
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _discard(self) -> None:
        try:
            self._stack.close()
        except Exception:
            # The file is thrown away: what its writer has to say about it no longer matters.
            pass
        finally:
            self._temporary.unlink(missing_ok=True)


def write_ranked(
    path: str | Path,
    interactions: Interactions,
    users: ArrayLike,
    lists: ArrayLike,
    scores: ArrayLike | None = None,
    *,
    form: Form = "long",
    titles: bool = False,
) -> None:
    """Writes ranked lists to a file that `read_ranked` reads back.

    Args:
      path: .csv, .tsv (each also .gz), .parquet or .pq; an existing file is replaced at the end.
      interactions: the data set, for its original ids.
      users: int[n], user index, each once.
      lists: int[n, K], item index, best first, -1 for none.
      scores: float[n, K], written in a column `score`.
      form: "long" or "wide", as in `RankedWriter`.
      titles: also write item titles, in a column `title`.

    Raises:
      UserError: as `RankedWriter`.

    Cost: O(n K), in blocks of users.

    Source: the interface of `jaxrec recommend --all --out`.

    >>> import tempfile
    >>> from jaxrec.data.prepared import write_prepared
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shop = write_prepared(
    ...         folder + "/shop", name="shop", users=np.array([0, 1]), items=np.array([0, 1]),
    ...         timestamps=None, ratings=None, user_ids=["ann", "bob"], item_ids=[10, 20],
    ...         source={}, tie_order="as given")
    ...     write_ranked(Path(folder, "lists.parquet"), shop, [0], [[1, 0]], [[2.0, 1.0]])
    ...     pq.read_table(Path(folder, "lists.parquet"))["item_id"].to_pylist()
    [20, 10]
    """
    owner, ranked = np.asarray(users), np.asarray(lists)
    points = None if scores is None else np.asarray(scores)
    with RankedWriter(
        path, interactions, form=form, scores=points is not None, titles=titles
    ) as out:
        for start in range(0, max(1, len(owner)), _BLOCK_USERS):
            rows = slice(start, start + _BLOCK_USERS)
            out.write(owner[rows], ranked[rows], None if points is None else points[rows])


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
