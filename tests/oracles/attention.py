"""Causal attention in float64, one query at a time, straight from the formula."""

import numpy as np


def visible_keys(i, valid, segment_ids):
    """Indices that query `i` of one row may attend to, oldest first."""
    if not valid[i]:
        return []
    return [j for j in range(i + 1) if valid[j] and segment_ids[j] == segment_ids[i]]


def row_masks(shape, valid, segment_ids):
    valid = np.ones(shape, bool) if valid is None else np.asarray(valid)
    segment_ids = np.zeros(shape, int) if segment_ids is None else np.asarray(segment_ids)
    return valid, segment_ids


def weights_of(logits):
    w = np.exp(logits - logits.max())
    return w / w.sum()


def bias_at(distance_bias, head, distances):
    """`distance_bias`: None, [length] or [heads, length]."""
    if distance_bias is None:
        return np.zeros(len(distances))
    distance_bias = np.asarray(distance_bias, np.float64)
    row = distance_bias if distance_bias.ndim == 1 else distance_bias[head]
    return np.array([row[d] for d in distances])


def causal_attention(
    query,
    key,
    value,
    *,
    valid=None,
    segment_ids=None,
    scale=None,
    kept=None,
    distance_bias=None,
):
    """`kept[b, h, i, j]`: by what dropout multiplies each weight, 0 or 1 / (1 - rate)."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, width = query.shape
    scale = width**-0.5 if scale is None else scale
    valid, segment_ids = row_masks((batch, length), valid, segment_ids)
    out = np.zeros(value.shape)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = visible_keys(i, valid[b], segment_ids[b])
                if not seen:
                    continue
                bias = bias_at(distance_bias, h, [i - j for j in seen])
                w = weights_of(scale * key[b, seen, h] @ query[b, i, h] + bias)
                if kept is not None:
                    w = w * kept[b, h, i, seen]
                out[b, i, h] = w @ value[b, seen, h]
    return out


def causal_attention_gradients(
    query,
    key,
    value,
    d_out,
    *,
    valid=None,
    segment_ids=None,
    scale=None,
    kept=None,
    distance_bias=None,
):
    """Gradients of `sum(out * d_out)`: `d logit_j = w_j (k_j <d_out, v_j> - <d_out, out>)`.

    Of query, key and value, and of `distance_bias` where it is given.
    """
    query, key, value, d_out = (np.asarray(x, np.float64) for x in (query, key, value, d_out))
    batch, length, heads, width = query.shape
    scale = width**-0.5 if scale is None else scale
    valid, segment_ids = row_masks((batch, length), valid, segment_ids)
    d_query, d_key, d_value = (np.zeros(x.shape) for x in (query, key, value))
    d_bias = np.zeros((heads, length))
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = visible_keys(i, valid[b], segment_ids[b])
                if not seen:
                    continue
                bias = bias_at(distance_bias, h, [i - j for j in seen])
                w = weights_of(scale * key[b, seen, h] @ query[b, i, h] + bias)
                k = np.ones(len(seen)) if kept is None else kept[b, h, i, seen]
                g = d_out[b, i, h]
                d_weight = k * (value[b, seen, h] @ g)
                d_logit = w * (d_weight - w @ d_weight)
                d_query[b, i, h] = scale * d_logit @ key[b, seen, h]
                d_key[b, seen, h] += scale * np.outer(d_logit, query[b, i, h])
                d_value[b, seen, h] += np.outer(w * k, g)
                for j, d in zip(seen, d_logit, strict=True):
                    d_bias[h, i - j] += d
    if distance_bias is None:
        return d_query, d_key, d_value
    return d_query, d_key, d_value, d_bias if np.ndim(distance_bias) == 2 else d_bias.sum(0)


def finite_differences(f, arrays, step=1e-6):
    """Gradient of the number `f(*arrays)` in every entry of every array, by central differences."""
    arrays = [np.array(a, np.float64) for a in arrays]
    gradients = []
    for a in arrays:
        gradient = np.zeros(a.shape)
        for at in np.ndindex(*a.shape):
            before = a[at]
            a[at] = before + step
            up = f(*arrays)
            a[at] = before - step
            down = f(*arrays)
            a[at] = before
            gradient[at] = (up - down) / (2 * step)
        gradients.append(gradient)
    return gradients


def dropout_factors(seeds, rate, batch, heads, length):
    """The documented hash of (row, head, query, key), in Python integers."""
    word = 2**32

    def shift(x, by):
        return x ^ (x >> by)

    def mix(x):
        x = shift(x, 16) * 0x7FEB352D % word
        x = shift(x, 15) * 0x846CA68B % word
        return shift(x, 16)

    kept = np.zeros((batch, heads, length, length))
    for b, h, i in np.ndindex(batch, heads, length):
        first = mix((int(seeds[0]) + mix(((b * heads + h) * length + i) % word)) % word)
        second = mix(first ^ int(seeds[1]))
        for j in range(length):
            y = first ^ (j * 0x9E3779B9 % word)
            x = (shift(y, 16) * 0x7FEB352D + second) % word
            bits = shift(x, 15) * 0x846CA68B % word
            kept[b, h, i, j] = 1 / (1 - rate) if bits >= rate * word else 0.0
    return kept
