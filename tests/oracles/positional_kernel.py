"""Positional kernel attention in float64, in its literal form: logits times U, values by L.

`Z[i, j] = sum_{k <= j} S[i, k] U[k, j]`, `out[i] = sum_j softmax_j(Z[i]) (L V)[j]`, with the sums
over the slots of one segment that are valid. Nothing is folded, and the sums are written out.
"""

import numpy as np
from oracles.attention import row_masks, visible_keys, weights_of


def entry(kernel, structure, head, early, late):
    """The number that the factor has for the slots at positions `early` and `late >= early`."""
    if kernel is None:
        return 1.0 if early == late else 0.0
    kernel = np.asarray(kernel, np.float64)
    if structure == "toeplitz":
        taps = kernel if kernel.ndim == 1 else kernel[head]
        return taps[late - early] if late - early < len(taps) else 0.0
    full = kernel if kernel.ndim == 2 else kernel[head]
    if not (0 <= early <= late < len(full)):
        return 0.0
    return full[early, late]


def upper(kernel, structure):
    """U[early, late]."""
    return lambda head, early, late: entry(kernel, structure, head, early, late)


def lower(kernel, structure):
    """L[late, early], told by (early, late) as U is."""
    flipped = kernel
    if kernel is not None and structure == "full":
        flipped = np.swapaxes(np.asarray(kernel, np.float64), -1, -2)
    return lambda head, early, late: entry(flipped, structure, head, early, late)


def positions_of(valid, segment_ids, packed):
    """Index in the row, or with segments the distance from the segment's first valid slot."""
    length = len(valid)
    if not packed:
        return np.arange(length)
    positions = np.zeros(length, int)
    for j in range(length):
        start = j
        while start > 0 and segment_ids[start - 1] == segment_ids[j]:
            start -= 1
        stop = j
        while stop + 1 < length and segment_ids[stop + 1] == segment_ids[j]:
            stop += 1
        first = [k for k in range(start, stop + 1) if valid[k]]
        positions[j] = j - (first[0] if first else start)
    return positions


def mixed(x, factor, structure, valid, segment_ids, positions):
    """`out[j] = sum_k F(k, j) x[k]`, for a factor that is told by (early, late)."""
    batch, length, heads, _ = x.shape
    out = np.zeros(x.shape)
    for b in range(batch):
        for h in range(heads):
            for j in range(length):
                for k in visible_keys(j, valid[b], segment_ids[b]):
                    p, q = (k, j) if structure != "full" else (positions[b][k], positions[b][j])
                    out[b, j, h] += factor(h, p, q) * x[b, k, h]
    return out


def positional_mix(
    kernel, x, structure, *, is_upper=False, valid=None, segment_ids=None, positions=None
):
    x = np.asarray(x, np.float64)
    packed = segment_ids is not None
    valid, segment_ids = row_masks(x.shape[:2], valid, segment_ids)
    if positions is None:
        positions = [positions_of(v, s, packed) for v, s in zip(valid, segment_ids, strict=True)]
    x = np.where(valid[:, :, None, None], x, 0.0)
    factor = (upper if is_upper else lower)(kernel, structure)
    return mixed(x, factor, structure, valid, segment_ids, positions)


def positional_kernel_attention(
    query,
    key,
    value,
    logit_kernel,
    value_kernel,
    *,
    structure,
    tie=False,
    valid=None,
    segment_ids=None,
    positions=None,
    scale=None,
):
    """`structure` is a pair (logits, values)."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, width = query.shape
    scale = width**-0.5 if scale is None else scale
    packed = segment_ids is not None
    valid, segment_ids = row_masks((batch, length), valid, segment_ids)
    if positions is None:
        positions = [positions_of(v, s, packed) for v, s in zip(valid, segment_ids, strict=True)]
    for_logits = upper(logit_kernel, structure[0])
    for_values = lower(value_kernel, structure[1])
    if tie:
        structure = (structure[0], structure[0])
        for_values = for_logits
    value = np.where(valid[:, :, None, None], value, 0.0)
    mixed_values = mixed(value, for_values, structure[1], valid, segment_ids, positions)
    out = np.zeros(value.shape)
    for b in range(batch):
        p = np.arange(length) if structure[0] != "full" else positions[b]
        for h in range(heads):
            for i in range(length):
                seen = visible_keys(i, valid[b], segment_ids[b])
                if not seen:
                    continue
                logits = {k: scale * query[b, i, h] @ key[b, k, h] for k in seen}
                kernelized = [
                    sum(logits[k] * for_logits(h, p[k], p[j]) for k in seen if k <= j) for j in seen
                ]
                out[b, i, h] = weights_of(np.array(kernelized)) @ mixed_values[b, seen, h]
    return out


def kernel_gradients(key, d_mixed_key):
    """`dU = triu(sum_{B, h} K dK'^T)`; its superdiagonal sums are the gradient of the taps."""
    both = np.einsum("bkhd,bjhd->kj", np.asarray(key, np.float64), np.asarray(d_mixed_key))
    d_full = np.triu(both)
    d_taps = np.array([np.diagonal(both, t).sum() for t in range(both.shape[0])])
    return d_full, d_taps
