"""A model judged on a part of a split: full catalogue, its own lists, no sampling."""

from collections.abc import Callable

import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Targets
from jaxrec.evaluation.metrics import ranking_metrics
from jaxrec.evaluation.ranker import Contexts, Ranker

Parameters = dict[str, Array]


class Evaluator:
    """Ranks for the targets of one part of a split, again and again.

    Args:
      interactions: the data set.
      targets: what to rank for.
      ranker: the model.
      ks: cut-offs.
      filter_seen: leave out the items of each target's own history.
      batch_size, max_length, packed, count_from_newest, shards, timestamps: see
        `Contexts`.
    """

    def __init__(
        self,
        interactions: Interactions,
        targets: Targets,
        ranker: Ranker,
        *,
        ks: tuple[int, ...],
        filter_seen: bool,
        batch_size: int,
        max_length: int,
        packed: bool,
        count_from_newest: bool,
        shards: int = 1,
        timestamps: NDArray[np.int64] | None = None,
    ) -> None:
        self.ks = ks
        self.num_items = interactions.num_items
        self.target_items = np.asarray(interactions.items[targets.targets])
        self._ranker = ranker
        self._filter_seen = filter_seen
        self._contexts = Contexts(
            interactions.items,
            targets.starts,
            targets.stops,
            batch_size=batch_size,
            max_length=max_length,
            packed=packed,
            count_from_newest=count_from_newest,
            shards=shards,
            timestamps=timestamps,
        )

    def lists(
        self, parameters: Parameters, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.int32]:
        """int32[targets, max(ks)]: ranked items for each target, in the targets' order."""
        _, lists = self._ranker.lists(
            parameters,
            self._contexts,
            min(max(self.ks), self.num_items),
            filter_seen=self._filter_seen,
            progress=progress,
        )
        short = max(self.ks) - lists.shape[1]
        return np.pad(lists, ((0, 0), (0, short)), constant_values=-1) if short else lists

    def metrics(self, parameters: Parameters) -> dict[str, float]:
        """Means over the targets."""
        return ranking_metrics(
            self.lists(parameters), self.target_items, self.num_items, ks=self.ks
        )


def sample_targets(targets: Targets, count: int, seed: int) -> Targets:
    """`count` of the targets, drawn once and kept in order; all of them for 0."""
    if count == 0 or count >= len(targets):
        return targets
    rng = np.random.default_rng(seed)
    return targets.take(np.sort(rng.choice(len(targets), count, replace=False)))
