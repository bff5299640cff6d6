"""Ranking metrics over ranked lists.

Everything is NumPy on the host in float64. A ranked list is a row of item indices, best first,
`-1` where there is no item. What a list is judged by is either one target item, or a set of
relevant items (`RelevantSets`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrec.errors import UserError

DEFAULT_KS = (1, 5, 10, 20)
LIST_METRICS = ("hr", "ndcg", "mrr", "recall", "precision", "map")
METRICS = (*LIST_METRICS, "coverage")

# Cells of a block of lists: bounds the temporaries to some 100 MB whatever the number of users.
_BLOCK_CELLS = 1 << 21

Floats = NDArray[np.float64]


class RelevantSets(NamedTuple):
    """Ragged sets: list `i` is judged by `values[offsets[i]:offsets[i + 1]]`.

    Attributes:
      offsets: int64[m + 1], starts at 0, never decreases, ends at `len(values)`.
      values: int[n], item indices. An item named twice in one set counts once.
    """

    offsets: NDArray[np.int64]
    values: NDArray[np.integer[Any]]

    @classmethod
    def from_lists(cls, sets: Sequence[Sequence[int]]) -> "RelevantSets":
        """Builds the ragged form from one sequence of items a list.

        >>> RelevantSets.from_lists([[3, 5], [1]]).offsets.tolist()
        [0, 2, 3]
        """
        offsets = np.zeros(len(sets) + 1, np.int64)
        np.cumsum([len(items) for items in sets], out=offsets[1:])
        values = np.array([item for items in sets for item in items], np.int64)
        return cls(offsets, values)


def ranking_metrics(
    lists: ArrayLike,
    targets: ArrayLike | RelevantSets,
    num_items: int,
    ks: Sequence[int] = DEFAULT_KS,
    *,
    names: Sequence[str] = METRICS,
) -> dict[str, float]:
    """Means of the ranking metrics over all lists, and the coverage of the catalogue.

    With `h_i = 1` if the item at rank `i` (from 1) is relevant and was not listed before, and `n`
    distinct relevant items:

        hr@k        = [h_1 + ... + h_k > 0]
        recall@k    = (h_1 + ... + h_k) / n
        precision@k = (h_1 + ... + h_k) / k
        ndcg@k      = sum_{i<=k} h_i / log2(i + 1)  /  sum_{i<=min(n, k)} 1 / log2(i + 1)
        mrr@k       = 1 / (smallest i <= k with h_i = 1), or 0
        map@k       = sum_{i<=k} h_i (h_1 + ... + h_i) / i  /  min(n, k)
        coverage@k  = distinct items at ranks 1 to k of any list / num_items

    With one target a list, recall equals hr, map equals mrr, and ndcg is `1 / log2(rank + 1)`.

    Args:
      lists: int[m, K], item indices, best first; -1 is an empty slot (which keeps its rank).
        Needs at least `max(ks)` columns: pad with -1 where fewer items can be listed.
      targets: int[m], the one relevant item of each list, or `RelevantSets`.
      num_items: size of the catalogue, the denominator of coverage.
      ks: cut-offs.
      names: which metrics to compute, out of `METRICS`.

    Returns:
      `{"hr@1": ..., "ndcg@1": ..., ...}`: for each cut-off, each metric in the order of `names`.

    Raises:
      UserError: shapes, dtypes, item indices or cut-offs that make no sense; a list without any
        relevant item; lists shorter than the largest cut-off.

    Cost: O(m max(ks)) time; temporaries are bounded by working on blocks of lists.

    Source: the definitions of full-ranking next-item evaluation (Klenitskiy & Vasilev, RecSys
    2023), extended to several targets in the standard way with the ideal truncated at `k`.

    >>> result = ranking_metrics([[4, 2, 0], [1, 3, 2]], [2, 0], num_items=5, ks=(3,))
    >>> result["hr@3"], round(result["ndcg@3"], 4), result["coverage@3"]
    (0.5, 0.3155, 1.0)
    """
    _check_names(names, METRICS)
    ranked, sets = _check(lists, targets, ks, num_items)
    means = {
        key: float(values.mean())
        for key, values in _per_list(ranked, sets, ks, _without_coverage(names)).items()
    }
    covered = dict.fromkeys(ks, 0.0)
    if "coverage" in names:
        covered = {k: coverage(ranked, num_items, k) for k in ks}
    return {
        f"{name}@{k}": covered[k] if name == "coverage" else means[f"{name}@{k}"]
        for k in ks
        for name in names
    }


def per_list(
    lists: ArrayLike,
    targets: ArrayLike | RelevantSets,
    ks: Sequence[int] = DEFAULT_KS,
    *,
    names: Sequence[str] = LIST_METRICS,
) -> dict[str, Floats]:
    """The metrics of `ranking_metrics` for each list by itself, for intervals and comparisons.

    Args:
      lists: int[m, K], as in `ranking_metrics`.
      targets: int[m] or `RelevantSets`, as in `ranking_metrics`.
      ks: cut-offs.
      names: which metrics, out of `LIST_METRICS` (coverage has no value of one list).

    Returns:
      `{"hr@1": float64[m], ...}`; the mean of each array is the value of `ranking_metrics`.

    Raises:
      UserError: as in `ranking_metrics`.

    Cost and source: as in `ranking_metrics`.

    >>> per_list([[4, 2, 0], [1, 3, 2]], [2, 0], ks=(3,), names=("mrr",))
    {'mrr@3': array([0.5, 0. ])}
    """
    _check_names(names, LIST_METRICS)
    ranked, sets = _check(lists, targets, ks, None)
    return _per_list(ranked, sets, ks, names)


def coverage(lists: ArrayLike, num_items: int, k: int) -> float:
    """Share of the catalogue that stands at ranks 1 to `k` of at least one list.

        coverage@k = |union over lists of the items at ranks 1..k| / num_items

    Args:
      lists: int[m, K], item indices, -1 an empty slot.
      num_items: size of the catalogue.
      k: cut-off, at most K.

    Returns:
      A number in [0, 1].

    Raises:
      UserError: an item index outside the catalogue, or lists shorter than `k`.

    Cost: O(m k) time, O(num_items) memory.

    Source: COV@K as in the evaluation code of the SCE work (Mezentsev et al., RecSys 2024).

    >>> coverage([[0, 1], [1, 2]], num_items=4, k=1)
    0.5
    """
    ranked = _check_lists(lists, (k,))
    _check_range(ranked, num_items, "the lists", lowest=-1)
    found = np.zeros(num_items + 1, bool)
    # Index -1 marks the extra last place, which is not counted.
    found[ranked[:, :k]] = True
    return float(found[:num_items].sum() / num_items)


def _per_list(
    lists: NDArray[np.integer[Any]],
    sets: RelevantSets,
    ks: Sequence[int],
    names: Sequence[str],
) -> dict[str, Floats]:
    depth = max(ks)
    ranks = np.arange(1, depth + 1, dtype=np.float64)
    discounts = 1.0 / np.log2(ranks + 1.0)
    ideal = np.cumsum(discounts)
    relevant = np.diff(sets.offsets)
    result = {f"{name}@{k}": np.empty(len(lists)) for k in ks for name in names}
    for rows in _row_blocks(len(lists), depth):
        hits = _first_hits(lists[rows, :depth], sets, rows)
        found = np.cumsum(hits, axis=1)
        first = np.where(found[:, -1] > 0, hits.argmax(axis=1) + 1.0, np.inf)
        gain = np.cumsum(hits * discounts, axis=1) if "ndcg" in names else None
        average = np.cumsum(hits * found / ranks, axis=1) if "map" in names else None
        for k in ks:
            best = np.minimum(relevant[rows], k)
            values: dict[str, Any] = {
                "hr": first <= k,
                "recall": found[:, k - 1] / relevant[rows],
                "precision": found[:, k - 1] / k,
                "mrr": np.where(first <= k, 1.0 / first, 0.0),
            }
            if gain is not None:
                values["ndcg"] = gain[:, k - 1] / ideal[best - 1]
            if average is not None:
                values["map"] = average[:, k - 1] / best
            for name in names:
                result[f"{name}@{k}"][rows] = values[name]
    return result


def _first_hits(
    block: NDArray[np.integer[Any]], sets: RelevantSets, rows: slice
) -> NDArray[np.bool_]:
    """Where a list names a relevant item for the first time: bool[rows, depth]."""
    bounds = sets.offsets[rows.start : rows.stop + 1]
    values = sets.values[bounds[0] : bounds[-1]]
    if (np.diff(bounds) == 1).all():
        hits = block == values[:, None]
        owner, place = np.nonzero(hits)
        repeated = np.flatnonzero(owner[1:] == owner[:-1]) + 1
    else:
        width = max(int(block.max(initial=0)), int(values.max(initial=0))) + 1
        owners = np.repeat(np.arange(len(block)), np.diff(bounds))
        wanted = np.sort(owners * width + values)
        keys = np.arange(len(block))[:, None] * width + block
        at = np.minimum(np.searchsorted(wanted, keys), wanted.size - 1)
        hits = (wanted[at] == keys) & (block >= 0)
        owner, place = np.nonzero(hits)
        _, first = np.unique(keys[owner, place], return_index=True)
        repeated = np.setdiff1d(np.arange(owner.size), first)
    hits[owner[repeated], place[repeated]] = False
    return hits


def _row_blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_CELLS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _check(
    lists: ArrayLike,
    targets: ArrayLike | RelevantSets,
    ks: Sequence[int],
    num_items: int | None,
) -> tuple[NDArray[np.integer[Any]], RelevantSets]:
    ranked = _check_lists(lists, ks)
    sets = _check_targets(targets, len(ranked))
    _check_range(ranked, num_items, "the lists", lowest=-1)
    _check_range(sets.values, num_items, "the targets", lowest=0)
    return ranked, sets


def _check_lists(lists: ArrayLike, ks: Sequence[int]) -> NDArray[np.integer[Any]]:
    ranked = np.asarray(lists)
    if ranked.ndim != 2 or not np.issubdtype(ranked.dtype, np.integer):
        raise UserError(
            f"lists must be integer item indices [lists, K], got {ranked.dtype} {ranked.shape}"
        )
    if len(ranked) == 0:
        raise UserError("there is no list to evaluate")
    if not len(ks) or any(not isinstance(k, int | np.integer) or k < 1 for k in ks):
        raise UserError(f"cut-offs must be whole numbers from 1 on, got {tuple(ks)}")
    if max(ks) > ranked.shape[1]:
        raise UserError(
            f"the lists hold {ranked.shape[1]} items each, too few for a cut-off of {max(ks)}: "
            "ask for longer lists or a smaller cut-off"
        )
    return ranked


def _check_targets(targets: ArrayLike | RelevantSets, rows: int) -> RelevantSets:
    if isinstance(targets, RelevantSets):
        offsets, values = np.asarray(targets.offsets), np.asarray(targets.values)
        sizes = np.diff(offsets)
        if offsets.shape != (rows + 1,) or offsets[0] != 0 or offsets[-1] != values.size:
            raise UserError(
                f"offsets must be [{rows + 1}] numbers from 0 to {values.size} for {rows} lists "
                f"and {values.size} relevant items, got {offsets.shape}"
            )
        if (sizes < 1).any():
            raise UserError(
                f"list {int((sizes < 1).argmax())} has no relevant item: leave such lists out"
            )
    else:
        values = np.asarray(targets)
        if values.shape != (rows,):
            raise UserError(f"wanted {rows} targets, one a list, got shape {values.shape}")
        offsets = np.arange(rows + 1, dtype=np.int64)
        sizes = np.ones(rows, np.int64)
    if not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"targets must be integer item indices, got {values.dtype}")
    if (sizes == 1).all():
        return RelevantSets(offsets, values)
    owners = np.repeat(np.arange(rows), sizes)
    order = np.lexsort((values, owners))
    owners, values = owners[order], values[order]
    new = np.ones(values.size, bool)
    new[1:] = (owners[1:] != owners[:-1]) | (values[1:] != values[:-1])
    distinct = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(owners[new], minlength=rows), out=distinct[1:])
    return RelevantSets(distinct, values[new])


def _check_range(
    items: NDArray[np.integer[Any]], num_items: int | None, what: str, *, lowest: int
) -> None:
    if num_items is not None and num_items < 1:
        raise UserError(f"num_items must be at least 1, got {num_items}")
    low, high = int(items.min()), int(items.max())
    if low < lowest or (num_items is not None and high >= num_items):
        last = "" if num_items is None else f" to {num_items - 1}"
        raise UserError(
            f"{what} name item {low if low < lowest else high}, wanted indices from 0{last}"
            + (" (or -1 for none)" if lowest < 0 else "")
        )


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"unknown metric {name!r}, wanted one of {', '.join(known)}")


def _without_coverage(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name != "coverage")
