"""The best k items of each row in NumPy: score everything, then sort."""

import numpy as np


def top_k_items(hidden, table, k, *, bias=None, exclude=None, allow=None, deny=None, scores=None):
    """Scores [B, k] and ids [B, k]; -inf and -1 where candidates run out.

    `scores` replaces the product, so that ties made by rounding are the ones of the op.
    """
    if scores is None:
        scores = hidden @ table.T + (0 if bias is None else bias)
    batch, items = scores.shape
    out_scores = np.full((batch, k), -np.inf)
    out_ids = np.full((batch, k), -1)
    for b in range(batch):
        candidates = set(range(items))
        if allow is not None:
            candidates &= set(np.flatnonzero(allow)) if allow.dtype == bool else set(allow[b])
        if deny is not None:
            candidates -= set(np.flatnonzero(deny)) if deny.dtype == bool else set(deny[b])
        if exclude is not None:
            candidates -= set(exclude[b])
        usable = [v for v in candidates if scores[b, v] > -np.inf]
        best = sorted(usable, key=lambda v: (-scores[b, v], v))[:k]
        out_scores[b, : len(best)] = scores[b, best]
        out_ids[b, : len(best)] = best
    return out_scores, out_ids
