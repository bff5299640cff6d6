"""What any model must beat: the most popular items, and the most recent ones.

Both need no training, only the training part of a split, and both answer the same questions as
the model: the same users, the same histories, the same items left out. Among items of equal
score the lower index comes first, everywhere.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Split
from jaxrec.errors import UserError
from jaxrec.evaluation._questions import (
    Histories,
    Questions,
    histories,
    one_list_per_target,
    one_list_per_user,
    targets_of,
)
from jaxrec.evaluation.metrics import DEFAULT_KS
from jaxrec.evaluation.results import Evaluation, evaluate_lists

NEVER = np.iinfo(np.int64).min

Lists = NDArray[np.int32]


def popularity_scores(interactions: Interactions, split: Split) -> NDArray[np.int64]:
    """How often each item occurs in the training part; validation and test are not looked at.

        score(i) = #{e in train : item(e) = i}

    Args:
      interactions: the data set.
      split: only `split.train` is read.

    Returns:
      int64[num_items]; a user who took an item twice counts twice.

    Cost: one pass over the training events, in blocks.

    Source: the "most popular" baseline of the recommender literature.

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 5}}, np.array([0, 4, 8]),
    ...     np.array([0, 1, 4, 2, 0, 4, 3, 1], np.int32),
    ...     np.array([10, 20, 30, 40, 15, 25, 35, 45]), None)
    >>> popularity_scores(shop, leave_one_out(shop)).tolist()
    [2, 1, 0, 0, 1]
    """
    scores = np.zeros(interactions.num_items, np.int64)
    for block in histories(split.train.starts, split.train.stops):
        scores += np.bincount(interactions.items[block.events], minlength=scores.size)
    return scores


def recency_scores(interactions: Interactions, split: Split) -> NDArray[np.int64]:
    """When each item was last consumed by anybody within the training part.

        score(i) = max{time(e) : e in train, item(e) = i}

    Args:
      interactions: the data set, with timestamps.
      split: only `split.train` is read.

    Returns:
      int64[num_items], `NEVER` (the smallest int64) for items that training never saw.

    Raises:
      UserError: the set has no timestamps: then no order between users exists.

    Cost: one pass over the training events, in blocks.

    Source: the "most recently consumed" baseline, taken over the whole catalogue.

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 5}}, np.array([0, 4, 8]),
    ...     np.array([0, 1, 4, 2, 0, 4, 3, 1], np.int32),
    ...     np.array([10, 20, 30, 40, 15, 25, 35, 45]), None)
    >>> recency_scores(shop, leave_one_out(shop))[[0, 1, 4]].tolist()
    [15, 20, 25]
    """
    if interactions.timestamps is None:
        raise UserError(
            f"{interactions.name} has no timestamps, so its most recent items are not defined"
        )
    scores = np.full(interactions.num_items, NEVER, np.int64)
    for block in histories(split.train.starts, split.train.stops):
        np.maximum.at(
            scores, interactions.items[block.events], interactions.timestamps[block.events]
        )
    return scores


def popularity(
    interactions: Interactions,
    split: Split,
    *,
    part: str = "test",
    k: int = 20,
    filter_seen: bool = True,
    by_user: bool = False,
) -> Lists:
    """Ranks by popularity in the training part, for each target of a part of the split.

        list = the k items with the largest popularity_scores that are not in the history

    Args:
      interactions: the data set.
      split: what is training and what is asked.
      part: "validation" or "test".
      k: length of the lists.
      filter_seen: leave out the items of each target's history (the history of a test target
        includes the validation event).
      by_user: one list for all targets of a user, given the history before the first of them.

    Returns:
      int32[m, k], -1 where fewer than `k` items remain. Row `i` answers target `i` of the part
      (with `by_user`, the i-th user with a target, by index).

    Raises:
      UserError: an unknown or empty part, or `k` below 1.

    Cost: O(n log n) for n history events, plus O(m k log n); memory is bounded by blocks of
      users, beside the result.

    Source: the "most popular" baseline of the recommender literature.

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 5}}, np.array([0, 4, 8]),
    ...     np.array([0, 1, 4, 2, 0, 4, 3, 1], np.int32),
    ...     np.array([10, 20, 30, 40, 15, 25, 35, 45]), None)
    >>> popularity(shop, leave_one_out(shop), k=3)
    array([[ 2,  3, -1],
           [ 1,  2, -1]], dtype=int32)
    """
    questions = questions_of(interactions, split, part, by_user)
    scores = popularity_scores(interactions, split)
    return _answer(interactions, questions, scores, k, filter_seen=filter_seen)


def most_recent(
    interactions: Interactions,
    split: Split,
    *,
    part: str = "test",
    k: int = 20,
    filter_seen: bool = True,
    by_user: bool = False,
) -> Lists:
    """Ranks by recency: the user's own where repeats may be recommended, else the catalogue's.

    With `filter_seen` (an item once consumed is not recommended again) the list holds the items
    that anybody consumed last within the training part, by `recency_scores`, less the history.
    Without it, the user's own distinct items come first, the latest first; then the same
    catalogue order fills the list, which falls back to popularity in a set without timestamps.

    Args:
      interactions, split, part, k, filter_seen, by_user: as in `popularity`.

    Returns:
      int32[m, k], as in `popularity`.

    Raises:
      UserError: as in `popularity`; with `filter_seen`, a set without timestamps.

    Cost: as `popularity`.

    Source: the "most recent" and "repeat the last items" baselines of next-item evaluation.

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 5}}, np.array([0, 4, 8]),
    ...     np.array([0, 1, 4, 2, 0, 4, 3, 1], np.int32),
    ...     np.array([10, 20, 30, 40, 15, 25, 35, 45]), None)
    >>> most_recent(shop, leave_one_out(shop), k=4, filter_seen=False)
    array([[4, 1, 0, 2],
           [3, 4, 0, 1]], dtype=int32)
    """
    questions = questions_of(interactions, split, part, by_user)
    if interactions.timestamps is None and not filter_seen:
        scores = popularity_scores(interactions, split)
    else:
        scores = recency_scores(interactions, split)
    first = None if filter_seen else _own_most_recent
    return _answer(interactions, questions, scores, k, filter_seen=filter_seen, first=first)


# In the order of `BASELINES`, what is shown unless others are asked for.
DEFAULT_BASELINES = ("popularity", "most_recent")
BASELINES = (*DEFAULT_BASELINES, "item_knn")


def _ranking(name: str) -> Callable[..., Lists]:
    if name == "item_knn":
        # SciPy's sparse matrices are loaded for this one alone.
        from jaxrec.evaluation.item_neighbours import item_knn

        return item_knn
    known: dict[str, Callable[..., Lists]] = {
        "popularity": popularity,
        "most_recent": most_recent,
    }
    if name not in known:
        raise UserError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    return known[name]


def evaluate_baselines(
    interactions: Interactions,
    split: Split,
    *,
    part: str = "test",
    ks: Sequence[int] = DEFAULT_KS,
    filter_seen: bool = True,
    by_user: bool = False,
    names: Sequence[str] = DEFAULT_BASELINES,
) -> dict[str, Evaluation]:
    """Evaluates baselines on the questions that a model is evaluated on.

    Args:
      interactions, split, part, filter_seen, by_user: as in `popularity`.
      ks: cut-offs.
      names: which, out of `BASELINES`.

    Returns:
      `{"popularity": Evaluation, "most_recent": Evaluation}`, or those named. `most_recent` is
      missing where it is not defined: repeats left out in a set without timestamps.

    Raises:
      UserError: as in `popularity`; an unknown name.

    Cost: that of the baselines and of the metrics.

    Source: as in `popularity` and `most_recent`.

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 5}}, np.array([0, 4, 8]),
    ...     np.array([0, 1, 4, 2, 0, 4, 3, 1], np.int32),
    ...     np.array([10, 20, 30, 40, 15, 25, 35, 45]), None)
    >>> evaluate_baselines(shop, leave_one_out(shop), ks=(1, 2))["popularity"]["hr@1"]
    1.0
    """
    undefined = interactions.timestamps is None and filter_seen
    rankings = {name: _ranking(name) for name in names}
    return {
        name: evaluate_lists(
            rank(
                interactions,
                split,
                part=part,
                k=max(ks),
                filter_seen=filter_seen,
                by_user=by_user,
            ),
            interactions,
            targets_of(split, part),
            ks=ks,
            by_user=by_user,
        )
        for name, rank in rankings.items()
        if not (name == "most_recent" and undefined)
    }


def questions_of(interactions: Interactions, split: Split, part: str, by_user: bool) -> Questions:
    ask = one_list_per_user if by_user else one_list_per_target
    return ask(interactions, targets_of(split, part))


def _answer(
    interactions: Interactions,
    questions: Questions,
    scores: NDArray[np.int64],
    k: int,
    *,
    filter_seen: bool,
    first: Callable[[Histories, NDArray[np.int32], int, int], Lists] | None = None,
) -> Lists:
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}")
    # Stable on the negated score: the lower index first among equals. NEVER has no negation.
    order = np.argsort(-np.maximum(scores, NEVER + 1), kind="stable").astype(np.int32)
    place = np.empty_like(order)
    place[order] = np.arange(order.size, dtype=np.int32)
    if not filter_seen and first is None:
        head = np.full(k, -1, np.int32)
        head[: order.size] = order[:k]
        return np.repeat(head[None], len(questions.users), axis=0)
    lists = np.empty((len(questions.users), k), np.int32)
    for block in histories(questions.starts, questions.stops):
        rows = block.rows.stop - block.rows.start
        items = interactions.items[block.events]
        if first is None:
            lists[block.rows] = first_not_in(order, place, block.owners, items, rows, k)
            continue
        own = first(block, items, order.size, k)
        owner, column = np.nonzero(own >= 0)
        rest = first_not_in(order, place, owner, own[owner, column], rows, k)
        filled = (own >= 0).sum(axis=1)
        shift = np.maximum(np.arange(k) - filled[:, None], 0)
        lists[block.rows] = np.where(own >= 0, own, np.take_along_axis(rest, shift, axis=1))
    return lists


def first_not_in(
    order: NDArray[np.int32],
    place: NDArray[np.int32],
    owners: NDArray[np.int64],
    items: NDArray[np.int32],
    rows: int,
    k: int,
) -> Lists:
    """The first `k` items of `order` that a row does not own: int32[rows, k].

    With a row's own items at places p_0 < p_1 < ... of the order, p_i - i places before p_i are
    free; so the j-th free place is j plus the number of i with p_i - i <= j.
    """
    size = order.size
    taken = np.bincount(owners, minlength=rows)
    at = place[items].astype(np.int64)
    # Farther ones have at least k free places before them.
    near = at < k + taken[owners] - 1
    pairs = np.sort(owners[near] * size + at[near])
    # A plain sort and a comparison: several times faster than np.unique on millions of integers.
    owner, at = np.divmod(pairs[np.append(True, pairs[1:] != pairs[:-1])[: pairs.size]], size)
    begin = np.searchsorted(owner, np.arange(rows))
    free_before = at - (np.arange(at.size) - begin[owner])
    wanted = np.arange(rows)[:, None] * size + np.arange(k)
    found = np.searchsorted(owner * size + free_before, wanted, side="right")
    result = np.arange(k) + found - begin[:, None]
    return np.where(result < size, order[np.minimum(result, size - 1)], np.int32(-1))


def _own_most_recent(block: Histories, items: NDArray[np.int32], size: int, k: int) -> Lists:
    """The distinct items of each history, the latest first: int32[rows, k]."""
    rows = block.rows.stop - block.rows.start
    keys = (block.owners * size + items)[::-1]
    _, latest = np.unique(keys, return_index=True)
    event = np.sort(keys.size - 1 - latest)[::-1]
    owner = block.owners[event]
    # Rows stand in falling order now, and within a row the latest event comes first.
    begin = np.searchsorted(-owner, -np.arange(rows))
    rank = np.arange(owner.size) - begin[owner]
    kept = rank < k
    lists = np.full((rows, k), -1, np.int32)
    lists[owner[kept], rank[kept]] = items[event[kept]]
    return lists
