"""Grain around the batches: prefetching, and an iterator whose position is part of a checkpoint."""

from collections.abc import Iterator
from typing import Any

import grain

from jaxrec.data.batches import TrainingBatches


def training_iterator(batches: TrainingBatches, prefetch: int) -> Iterator[dict[str, Any]]:
    """Iterates over all epochs; `get_state` and `set_state` move it.

    Args:
      batches: what to read.
      prefetch: batches made ahead by a background thread.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))
