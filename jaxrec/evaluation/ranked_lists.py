"""Ranked lists in files: anybody's lists can be evaluated, and ours can be read by anybody.

Two forms, each as CSV, TSV (either with .gz) or Parquet, with a header and in original ids:

- long: one row an item, `user_id, item_id, rank` and perhaps `score`; ranks count from 1. Without
  a rank column the score ranks, the first row first among equals.
- wide: one row a user, `user_id, items`; `items` is a list column, or text with the ids apart by
  spaces (where ids are whole numbers, by any of space , ; | and brackets).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Split
from jaxrec.errors import UserError
from jaxrec.evaluation._questions import one_list_per_user, targets_of
from jaxrec.evaluation._table_files import Column, header, plain, read_columns
from jaxrec.evaluation.metrics import DEFAULT_KS
from jaxrec.evaluation.results import Evaluation, evaluate_lists


@dataclass(frozen=True, eq=False)
class RankedFile:
    """What a ranked-lists file says, in indices of a data set.

    Attributes:
      users: int32[n], user index, rising.
      lists: int32[n, K], item index, best first, -1 after a list's end.
      lengths: int64[n], items that the file names for each user, also those beyond K.
      notes: what was found odd but not wrong, one line each.
    """

    users: NDArray[np.int32]
    lists: NDArray[np.int32]
    lengths: NDArray[np.int64]
    notes: tuple[str, ...] = ()


def read_ranked(
    path: str | Path,
    interactions: Interactions,
    *,
    k: int | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    rank_column: str = "rank",
    score_column: str = "score",
    items_column: str = "items",
    item_separator: str | None = None,
) -> RankedFile:
    """Reads a ranked-lists file of either form and checks it whole.

    Args:
      path: .csv, .tsv (each also .gz), .parquet or .pq.
      interactions: the data set whose original ids the file uses.
      k: keep the first `k` items of each list; all by default.
      user_column, item_column, rank_column, score_column, items_column: what the columns are
        called; other columns are ignored. A file with `items_column` and without `item_column`
        is of the wide form.
      item_separator: what separates the ids of the wide form in text; white space by default.

    Returns:
      `RankedFile`, users in order of index.

    Raises:
      UserError: naming the file and the row (in CSV the header is row 1, empty lines are not
        counted): a file that cannot be read, a missing column, an empty or unknown id, an item
        twice for one user, ranks that are not 1 to n, a score that is not a finite number, a user
        twice in the wide form.

    Cost: reading, and one sort of the rows; some 100 bytes a row.

    Source: the interface of `jaxrec evaluate --ranked`.

    >>> import tempfile
    >>> from jaxrec.data.prepared import write_prepared
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shop = write_prepared(
    ...         folder + "/shop", name="shop", users=np.array([0, 1]), items=np.array([0, 1]),
    ...         timestamps=None, ratings=None, user_ids=["ann", "bob"], item_ids=[10, 20],
    ...         source={}, tie_order="as given")
    ...     _ = Path(folder, "lists.csv").write_text("user_id,items\\nbob,20 10\\n")
    ...     read_ranked(Path(folder, "lists.csv"), shop).lists
    array([[1, 0]], dtype=int32)
    """
    file = Path(path)
    if k is not None and k < 1:
        raise UserError(f"k must be at least 1, got {k}")
    names = (user_column, item_column, rank_column, score_column, items_column)
    columns = read_columns(file, names)
    wide = items_column in columns and item_column not in columns
    for name in (user_column, items_column if wide else item_column):
        if name not in columns:
            raise UserError(
                f"{file}: has no column {name}, it has {', '.join(header(file))}; wanted "
                f"{user_column},{item_column},{rank_column} or {user_column},{items_column}"
            )
    users = _indices(columns[user_column], interactions, "user")
    if wide:
        return _wide(columns[items_column], users, interactions, item_separator, k)
    items = _indices(columns[item_column], interactions, "item")
    _refuse_twice(columns[item_column], users, items, interactions)
    scores = columns[score_column].numbers() if score_column in columns else None
    notes: list[str] = []
    if rank_column in columns:
        rank = columns[rank_column].numbers()
        order = np.lexsort((rank, users))
        _check_ranks(columns[rank_column], rank, users, order, interactions)
        notes += _rising_scores(scores, users, order)
    elif scores is not None:
        order = np.lexsort((-scores, users))
        notes.append(f"{file.name} has no column {rank_column}: ranked by {score_column}")
    else:
        raise UserError(
            f"{file}: has neither a column {rank_column} nor {score_column}, it has "
            f"{', '.join(header(file))}"
        )
    owner, position, lengths = _positions(users[order])
    return _assemble(users[order], items[order], owner, position, lengths, k, notes)


def evaluate_ranked(
    path: str | Path,
    interactions: Interactions,
    split: Split,
    *,
    part: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    user_column: str = "user_id",
    item_column: str = "item_id",
    rank_column: str = "rank",
    score_column: str = "score",
    items_column: str = "items",
    item_separator: str | None = None,
) -> Evaluation:
    """Evaluates a file of ranked lists, one list a user, on a part of a split.

    A user with a target and without a list counts as a miss; a user with several targets is
    judged by all of them. Nothing is filtered: listed items that the user consumed before keep
    their rank and are counted in `seen_listed` and in the notes.

    Args:
      path: as in `read_ranked`.
      interactions: the data set.
      split: what the lists are judged by.
      part: "validation" or "test".
      ks: cut-offs.
      user_column, item_column, rank_column, score_column, items_column, item_separator: as in
        `read_ranked`.

    Returns:
      `Evaluation`, a mapping of the metrics ("hr@10" and so on), with `notes` on users without
      lists, users that are not asked for, short lists, and listed items that were seen.

    Raises:
      UserError: as `read_ranked`; no user of the part has a list; no list reaches the largest
        cut-off.

    Cost: as `read_ranked` and `evaluate_lists`.

    Source: the interface of `jaxrec evaluate --ranked`.

    >>> import tempfile
    >>> from jaxrec.data.prepared import write_prepared
    >>> from jaxrec.data.splits import leave_one_out
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shop = write_prepared(
    ...         folder + "/shop", name="shop", users=np.array([0, 0, 0]),
    ...         items=np.array([0, 1, 2]), timestamps=None, ratings=None, user_ids=["ann"],
    ...         item_ids=[10, 20, 30], source={}, tie_order="as given")
    ...     _ = Path(folder, "lists.csv").write_text("user_id,items\\nann,20 30\\n")
    ...     result = evaluate_ranked(
    ...         Path(folder, "lists.csv"), shop, leave_one_out(shop), ks=(1, 2))
    >>> result["hr@1"], result["hr@2"], result.notes
    (0.0, 1.0, ('1 listed items stand in the history of their user',))
    """
    ranked = read_ranked(
        path,
        interactions,
        k=max(ks),
        user_column=user_column,
        item_column=item_column,
        rank_column=rank_column,
        score_column=score_column,
        items_column=items_column,
        item_separator=item_separator,
    )
    targets = targets_of(split, part)
    asked = one_list_per_user(interactions, targets).users
    known = np.isin(ranked.users, asked)
    if not known.any():
        raise UserError(
            f"{path}: none of its {len(ranked.users)} users has a target in the {part} part of "
            f"{interactions.name}"
        )
    longest = int(ranked.lengths[known].max())
    if longest < min(max(ks), interactions.num_items):
        raise UserError(
            f"{path}: the longest list holds {longest} items, too few for a cut-off of {max(ks)}: "
            f"give longer lists, or cut-offs up to {longest}"
        )
    lists = np.full((len(asked), max(ks)), -1, np.int32)
    rows = np.searchsorted(asked, ranked.users[known])
    lists[rows, : ranked.lists.shape[1]] = ranked.lists[known]
    result = evaluate_lists(lists, interactions, targets, ks=ks, by_user=True)

    notes = list(ranked.notes)
    missing = len(asked) - int(known.sum())
    short = int((ranked.lengths[known] < min(max(ks), interactions.num_items)).sum())
    others = len(known) - int(known.sum())
    if missing:
        notes.append(f"{missing} of {len(asked)} users have no list and count as misses")
    if short:
        notes.append(f"{short} lists hold fewer than {max(ks)} items")
    if others:
        notes.append(f"{others} users of the file have no target and are left out")
    if not result[f"hr@{max(ks)}"]:
        notes.append(
            "no list names a target: lists made from whole histories leave the targets out as seen"
        )
    if result.seen_listed:
        notes.append(f"{result.seen_listed} listed items stand in the history of their user")
    return replace(result, notes=tuple(notes))


def _indices(column: Column, interactions: Interactions, what: str) -> NDArray[np.int32]:
    ids = column.ids()
    find = interactions.user_indices if what == "user" else interactions.item_indices
    indices = find(ids)
    if (indices < 0).any():
        at = int((indices < 0).argmax())
        explain = interactions.user_index if what == "user" else interactions.item_index
        try:
            explain(ids[at].as_py())
        except UserError as error:
            raise column.error(at, str(error)) from None
    return np.asarray(indices, np.int32)


def _refuse_twice(
    column: Column,
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    interactions: Interactions,
) -> None:
    keys = users.astype(np.int64) * interactions.num_items + items
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    if not again.size:
        return
    first_found = int(order[again + 1].argmin())
    before, here = (int(order[again[first_found] + step]) for step in (0, 1))
    user = interactions.user_id(int(users[here]))
    item = interactions.item_id(int(items[here]))
    where = "" if column.row(before) == column.row(here) else f" (also in row {column.row(before)})"
    raise column.error(here, f"item {item!r} stands twice for user {user!r}{where}")


def _check_ranks(
    column: Column,
    rank: NDArray[np.float64],
    users: NDArray[np.int32],
    order: NDArray[np.int64],
    interactions: Interactions,
) -> None:
    _, position, _ = _positions(users[order])
    wrong = rank[order] != position + 1
    if not wrong.any():
        return
    place = int(wrong.argmax())
    at, wanted = int(order[place]), int(position[place]) + 1
    user = interactions.user_id(int(users[at]))
    given = rank[at]
    if given != np.floor(given) or given < 1:
        problem = f"rank is {given:g}, wanted whole numbers from 1"
    elif wanted > 1 and given == wanted - 1:
        before = column.row(int(order[place - 1]))
        problem = f"rank {given:g} stands twice for user {user!r} (also in row {before})"
    else:
        problem = f"rank {given:g} of user {user!r} has no rank {wanted} before it"
    raise column.error(at, problem)


def _rising_scores(
    scores: NDArray[np.float64] | None, users: NDArray[np.int32], order: NDArray[np.int64]
) -> list[str]:
    if scores is None:
        return []
    by_rank, owner = scores[order], users[order]
    rising = (by_rank[1:] > by_rank[:-1]) & (owner[1:] == owner[:-1])
    odd = len(np.unique(owner[1:][rising]))
    return [f"scores rise with rank for {odd} users; the rank was followed"] if odd else []


def _positions(
    users: NDArray[np.int32],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of rows sorted by user: which list each is of, its place there, and the lists' lengths."""
    starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    lengths = np.diff(np.append(starts, users.size))
    owner = np.repeat(np.arange(starts.size), lengths)
    return owner, np.arange(users.size) - starts[owner], lengths


def _assemble(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    owner: NDArray[np.int64],
    position: NDArray[np.int64],
    lengths: NDArray[np.int64],
    k: int | None,
    notes: Sequence[str],
) -> RankedFile:
    longest = int(lengths.max())
    width = longest if k is None else min(k, longest)
    lists = np.full((lengths.size, width), -1, np.int32)
    kept = position < width
    lists[owner[kept], position[kept]] = items[kept]
    starts = np.cumsum(lengths) - lengths
    return RankedFile(users[starts], lists, lengths, tuple(notes))


def _wide(
    column: Column,
    users: NDArray[np.int32],
    interactions: Interactions,
    separator: str | None,
    k: int | None,
) -> RankedFile:
    order = np.argsort(users, kind="stable")
    again = np.flatnonzero(users[order[1:]] == users[order[:-1]])
    if again.size:
        here = int(order[again + 1].min())
        user = interactions.user_id(int(users[here]))
        raise column.error(here, f"user {user!r} has a row already, wanted one row a user")
    ids, lengths_in_file = _split_items(column, interactions, separator)
    rows = np.repeat(np.arange(users.size), lengths_in_file)
    nested = Column(column.file, column.name, ids, column.first_row, rows)
    if not rows.size:
        raise UserError(f"{column.file}: every list is empty")
    items = _indices(nested, interactions, "item")
    _refuse_twice(nested, users[rows], items, interactions)
    filled = order[lengths_in_file[order] > 0]
    starts = np.cumsum(lengths_in_file) - lengths_in_file
    lengths = lengths_in_file[filled]
    owner = np.repeat(np.arange(filled.size), lengths)
    position = np.arange(owner.size) - (np.cumsum(lengths) - lengths)[owner]
    taken = starts[filled][owner] + position
    return _assemble(users[filled][owner], items[taken], owner, position, lengths, k, ())


def _split_items(
    column: Column, interactions: Interactions, separator: str | None
) -> tuple[pa.Array, NDArray[np.int64]]:
    """All ids one after the other, and how many each row has."""
    values = column.values
    if pa.types.is_string(values.type):
        if separator is None and interactions.item_ids.dtype.kind == "i":
            values = pc.replace_substring_regex(values, r"[\[\](),;|]", " ")
        values = pc.utf8_trim_whitespace(values)
        split = (
            pc.utf8_split_whitespace(values)
            if separator is None
            else pc.split_pattern(values, separator)
        )
        # Splitting an empty text gives one empty part, not none.
        split = pc.if_else(pc.equal(values, ""), pa.scalar([], split.type), split)
    elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        split = values
    else:
        raise UserError(
            f"{column.file}: the column {column.name} holds {values.type}, wanted a list of ids "
            "or text"
        )
    lengths = pc.list_value_length(split).fill_null(0)
    return plain(split.flatten()), np.asarray(lengths).astype(np.int64)
