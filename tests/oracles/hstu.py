"""Pointwise attention with biases by position and time, in float64, pair of events by pair."""

import math

import numpy as np


def bucket(seconds, buckets):
    return min(buckets, math.floor(math.log(max(abs(int(seconds)), 1)) / 0.301))


def pairs_of_row(valid, segments, times, candidate_count):
    """`(i, j, steps from j to i, seconds from j to the query)` of every pair that is seen."""
    length = len(valid)
    events = [i for i in range(length) if valid[i]]
    candidates = events[max(len(events) - candidate_count, 0) :]
    found = []
    for i in events:
        row = candidates[0] if i in candidates else i
        later = [m for m in events if m > row]
        asked = row
        if i not in candidates and later and segments[later[0]] == segments[i]:
            asked = later[0]
        for j in events:
            if j > i or segments[j] != segments[i] or (j in candidates and j != i):
                continue
            col = candidates[0] if j in candidates else j
            seconds = None if times is None else int(times[asked]) - int(times[col])
            found.append((i, j, row - col, seconds))
    return found


def hstu_attention(
    query,
    key,
    value,
    position_table=None,
    time_table=None,
    d_out=None,
    *,
    normalizer,
    timestamps=None,
    valid=None,
    segment_ids=None,
    num_candidates=None,
    scale=1.0,
):
    """The output, or with `d_out` the gradients of `sum(out * d_out)` in the five arrays."""
    arrays = [
        None if x is None else np.asarray(x, np.float64)
        for x in (query, key, value, position_table, time_table)
    ]
    query, key, value, positions, buckets = arrays
    shape = query.shape[:2]
    valid = np.ones(shape, bool) if valid is None else np.asarray(valid)
    segment_ids = np.zeros(shape, int) if segment_ids is None else np.asarray(segment_ids)
    out = np.zeros(value.shape)
    gradients = [None if x is None else np.zeros(x.shape) for x in arrays]
    d_query, d_key, d_value, d_positions, d_buckets = gradients
    for b in range(shape[0]):
        times = None if timestamps is None else timestamps[b]
        count = 0 if num_candidates is None else int(num_candidates[b])
        for i, j, steps, seconds in pairs_of_row(valid[b], segment_ids[b], times, count):
            rab, at, slot = 0.0, None, None
            if positions is not None:
                at = (len(positions) + 1) // 2 - 1 - steps
                rab += positions[at]
            if buckets is not None:
                slot = bucket(seconds, len(buckets) - 1)
                rab += buckets[slot]
            for h in range(query.shape[2]):
                score = scale * (query[b, i, h] @ key[b, j, h]) + rab
                gate = 1 / (1 + math.exp(-score))
                out[b, i, h] += score * gate * value[b, j, h] / normalizer
                if d_out is None:
                    continue
                g = np.asarray(d_out[b, i, h], np.float64) / normalizer
                d_score = (g @ value[b, j, h]) * (gate + score * gate * (1 - gate))
                d_query[b, i, h] += scale * d_score * key[b, j, h]
                d_key[b, j, h] += scale * d_score * query[b, i, h]
                d_value[b, j, h] += score * gate * g
                if positions is not None:
                    d_positions[at] += d_score
                if buckets is not None:
                    d_buckets[slot] += d_score
    return out if d_out is None else gradients
