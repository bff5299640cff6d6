"""Item-kNN: recommends what is like the items of a user's own history. No training, one pass."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Split
from jaxrec.errors import UserError
from jaxrec.evaluation._questions import histories
from jaxrec.evaluation.baselines import Lists, first_not_in, questions_of

NEIGHBOURS = 100

# Entries of a sparse product that are sorted at once; some 200 MB of temporaries.
_BLOCK_ENTRIES = 1 << 22


def item_similarities(
    interactions: Interactions,
    split: Split,
    *,
    neighbours: int = NEIGHBOURS,
    shrinkage: float = 0.0,
) -> sparse.csr_array:
    """How alike two items are by the users of the training part who took them.

        sim(i, j) = |U_i ∩ U_j| / (sqrt(|U_i| |U_j|) + shrinkage),    sim(i, i) = 0

    with U_i the users who took item i, however often. Each row keeps its `neighbours` largest, the
    lower index first among equals.

    Args:
      interactions: the data set.
      split: only `split.train` is read.
      neighbours: kept of a row, from 1.
      shrinkage: not negative; makes items of few users less alike.

    Returns:
      float64 sparse [items, items].

    Raises:
      UserError: an impossible option.

    Cost: O(sum over users of the square of their distinct items) products; memory is bounded by
      blocks of items, beside the training pairs and the result.

    Source: Deshpande and Karypis, "Item-based top-N recommendation algorithms" (TOIS 2004),
      section 4, with cosine similarity; shrinkage as in Bell and Koren (ICDM 2007).

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 5}}, np.array([0, 4, 8]),
    ...     np.array([0, 1, 4, 2, 0, 4, 3, 1], np.int32),
    ...     np.array([10, 20, 30, 40, 15, 25, 35, 45]), None)
    >>> item_similarities(shop, leave_one_out(shop)).toarray()[0].round(3).tolist()
    [0.0, 0.707, 0.0, 0.0, 0.707]
    """
    if neighbours < 1:
        raise UserError(f"item_knn: neighbours must be at least 1, got {neighbours}")
    if not 0 <= shrinkage < np.inf:
        raise UserError(f"item_knn: shrinkage must not be negative, got {shrinkage}")
    size = interactions.num_items
    taken = _taken(interactions.items, split.train.starts, split.train.stops, size)
    by_item = taken.T.tocsr()
    users = np.diff(by_item.indptr)
    lengths = np.sqrt(users.astype(np.float64))
    # A row of the product has no more entries than this.
    entries = np.minimum(by_item @ np.diff(taken.indptr), size)
    parts = []
    for rows in _blocks(entries):
        both = (by_item[rows] @ taken).tocoo()
        row, column = both.row + rows.start, both.col
        alike = both.data / (lengths[row] * lengths[column] + shrinkage)
        alike[row == column] = 0
        shape = (rows.stop - rows.start, size)
        parts.append(_largest(sparse.csr_array((alike, (both.row, column)), shape), neighbours))
    return sparse.vstack(parts, format="csr")


def item_knn(
    interactions: Interactions,
    split: Split,
    *,
    part: str = "test",
    k: int = 20,
    filter_seen: bool = True,
    by_user: bool = False,
    neighbours: int = NEIGHBOURS,
    shrinkage: float = 0.0,
) -> Lists:
    """Ranks items by their likeness to those of the history.

        score(i) = sum over the distinct items j of the history of sim(j, i)

    with `item_similarities`, of which every j gives its nearest neighbours only. Items that are
    like none follow in order of their index.

    Args:
      interactions, split, part, k, filter_seen, by_user: as in `popularity`.
      neighbours, shrinkage: as in `item_similarities`.

    Returns:
      int32[m, k], as in `popularity`.

    Raises:
      UserError: as in `popularity` and `item_similarities`.

    Cost: that of `item_similarities`, and O(n neighbours) for n history events; seconds for a
      million events of a few thousand items. Memory is bounded by blocks of users.

    Source: as `item_similarities`.

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 5}}, np.array([0, 4, 8]),
    ...     np.array([0, 1, 4, 2, 0, 4, 3, 1], np.int32),
    ...     np.array([10, 20, 30, 40, 15, 25, 35, 45]), None)
    >>> item_knn(shop, leave_one_out(shop), k=2)
    array([[2, 3],
           [1, 2]], dtype=int32)
    """
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}")
    questions = questions_of(interactions, split, part, by_user)
    alike = item_similarities(interactions, split, neighbours=neighbours, shrinkage=shrinkage)
    size = interactions.num_items
    order = np.arange(size, dtype=np.int32)
    history = _taken(interactions.items, questions.starts, questions.stops, size)
    entries = np.minimum(history @ np.diff(alike.indptr), size) + np.diff(history.indptr) + k
    lists = np.full((len(questions.users), k), -1, np.int32)
    for rows in _blocks(entries):
        mine = history[rows]
        scores = (mine @ alike).tocsr()
        if filter_seen:
            scores = scores - scores.multiply(mine).tocsr()
        best = _largest(scores, k)
        found, owner = lists[rows], _owners(best)
        place = np.arange(owner.size) - best.indptr[owner]
        found[owner, place] = best.indices
        # The rest have no score: the lowest index first.
        own, items = owner, best.indices
        if filter_seen:
            own, items = np.append(own, _owners(mine)), np.append(items, mine.indices)
        rest = first_not_in(order, order, own.astype(np.int64), items, len(found), k)
        shift = np.maximum(np.arange(k) - np.diff(best.indptr)[:, None], 0)
        lists[rows] = np.where(found >= 0, found, np.take_along_axis(rest, shift, axis=1))
    return lists


def _taken(
    items: NDArray[np.int32], starts: NDArray[np.int64], stops: NDArray[np.int64], size: int
) -> sparse.csr_array:
    """Which items each range of events names: sparse [ranges, size] of ones."""
    parts = []
    for block in histories(starts, stops):
        pairs = np.unique(block.owners * size + items[block.events])
        owner, item = np.divmod(pairs, size)
        shape = (block.rows.stop - block.rows.start, size)
        parts.append(sparse.csr_array((np.ones(pairs.size), (owner, item)), shape))
    return sparse.vstack(parts, format="csr")


def _blocks(entries: NDArray[np.number]) -> Iterator[slice]:
    """Consecutive rows that together have about `_BLOCK_ENTRIES`."""
    ends, begin = np.cumsum(entries), 0
    while begin < len(ends):
        before = ends[begin - 1] if begin else 0
        end = max(int(np.searchsorted(ends, before + _BLOCK_ENTRIES, side="right")), begin + 1)
        yield slice(begin, end)
        begin = end


def _owners(matrix: sparse.csr_array) -> NDArray[np.int64]:
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def _largest(matrix: sparse.csr_array, count: int) -> sparse.csr_array:
    """The `count` largest positive entries of each row, the largest first, then by column."""
    matrix.eliminate_zeros()
    owner = _owners(matrix)
    order = np.lexsort((matrix.indices, -matrix.data, owner))
    kept = order[np.arange(owner.size) - matrix.indptr[owner] < count]
    sizes = np.bincount(owner[kept], minlength=matrix.shape[0])
    ends = np.append(0, np.cumsum(sizes))
    return sparse.csr_array((matrix.data[kept], matrix.indices[kept], ends), matrix.shape)
