"""Ranked lists judged: the metrics of one system, and the protocol behind them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Split, Targets
from jaxrec.errors import UserError
from jaxrec.evaluation._questions import (
    count_repeats,
    count_seen,
    one_list_per_target,
    one_list_per_user,
    targets_of,
)
from jaxrec.evaluation.metrics import DEFAULT_KS, coverage, per_list


@dataclass(frozen=True, eq=False)
class Evaluation(Mapping[str, float]):
    """Metrics of one system; reads like the dictionary of its metrics.

    Attributes:
      metrics: `{"hr@10": ..., ...}` as `metrics.ranking_metrics` gives them.
      per_list: `{"hr@10": float64[m], ...}`, the values behind each mean.
      users: int[m], the user index of each list; a user with several targets has several lists.
      num_targets: relevant items in all; as many as lists where each has one.
      seen_listed: how many listed items stand in the history of their list.
      notes: what a reader of the numbers must know, one line each.
    """

    metrics: Mapping[str, float]
    per_list: Mapping[str, NDArray[np.float64]]
    users: NDArray[np.integer]
    num_targets: int
    seen_listed: int = 0
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> float:
        return self.metrics[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    @property
    def num_users(self) -> int:
        """Number of distinct users."""
        return len(np.unique(self.users))


def evaluate_lists(
    lists: ArrayLike,
    interactions: Interactions,
    targets: Targets,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    by_user: bool = False,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Evaluates ranked lists that answer targets.

    Args:
      lists: int[m, K], item indices, best first, -1 for none. Row `i` answers target `i`; with
        `by_user`, the i-th user that has a target, in order of index.
      interactions: the data set.
      targets: a part of a split.
      ks: cut-offs, none above K.
      by_user: judge one list by all targets of its user.
      notes: lines to keep with the result.

    Returns:
      `Evaluation`; `seen_listed` counts listed items of the list's own history.

    Raises:
      UserError: as `metrics.ranking_metrics`; a number of lists that is not the number asked for.

    Cost: O(m K log(mK)) and one pass over the histories, in blocks.

    Source: the definitions in `metrics.ranking_metrics`.

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 5}}, np.array([0, 4, 8]),
    ...     np.array([0, 1, 4, 2, 0, 4, 3, 1], np.int32), None, None)
    >>> result = evaluate_lists([[2, 3], [0, 2]], shop, leave_one_out(shop).test, ks=(2,))
    >>> result["hr@2"], result.seen_listed
    (0.5, 1)
    """
    ask = one_list_per_user if by_user else one_list_per_target
    questions = ask(interactions, targets)
    ranked = np.asarray(lists)
    if len(ranked) != len(questions.users):
        raise UserError(f"wanted {len(questions.users)} lists, one a question, got {len(ranked)}")
    values = per_list(ranked, questions.relevant, ks)
    metrics: dict[str, float] = {}
    for k in ks:
        metrics |= {key: float(v.mean()) for key, v in values.items() if key.endswith(f"@{k}")}
        metrics[f"coverage@{k}"] = coverage(ranked, interactions.num_items, k)
    seen = count_seen(ranked[:, : max(ks)], questions, interactions.items)
    asked = len(questions.relevant_sets.values)
    return Evaluation(metrics, values, questions.users, asked, seen, tuple(notes))


def describe_protocol(
    interactions: Interactions,
    split: Split,
    *,
    part: str = "test",
    filter_seen: bool | None = True,
    by_user: bool = False,
) -> dict[str, Any]:
    """Says how numbers come about: data, split, candidates, what is left out, ties.

    Args:
      interactions: the data set.
      split: the split.
      part: "validation" or "test".
      filter_seen: whether items of the history are left out of the lists; `None` where the lists
        come from elsewhere.
      by_user: one list for all targets of a user.

    Returns:
      A dictionary ready for JSON. `repeat_targets` counts relevant items that the user consumed
      before: where seen items are filtered, nothing can find them.

    Raises:
      UserError: an unknown or empty part.

    Cost: one pass over the histories, in blocks.

    Source: what readers of published numbers most often miss: data version, split, filtering.

    >>> from pathlib import Path
    >>> from jaxrec.data.splits import leave_one_out
    >>> shop = Interactions(
    ...     "shop", Path(), {"counts": {"items": 3}, "hash": "0"}, np.array([0, 3]),
    ...     np.array([0, 1, 2], np.int32), None, None)
    >>> describe_protocol(shop, leave_one_out(shop))["candidates"]
    'all 3 items'
    """
    ask = one_list_per_user if by_user else one_list_per_target
    questions = ask(interactions, targets_of(split, part))
    seen = {True: "left out", False: "may be listed", None: "as the lists have them"}
    return {
        "data": interactions.name,
        "data_hash": interactions.hash,
        "split": split.name,
        "part": part,
        "split_description": dict(split.description),
        "candidates": f"all {interactions.num_items} items",
        "seen_items": seen[filter_seen],
        "judged": "one list a user, by all its targets" if by_user else "one list a target",
        "ties": "equal scores: lower item index first",
        "lists": len(questions.users),
        "users": len(np.unique(questions.users)),
        "repeat_targets": count_repeats(questions, interactions.items),
    }
