"""Softmax cross-entropy over a catalogue in float64 NumPy, one position at a time."""

import numpy as np


def _logits(hidden_row, table, bias):
    return table @ hidden_row + (0 if bias is None else bias)


def _log_sum_exp(logits):
    largest = logits.max()
    return largest + np.log(np.exp(logits - largest).sum())


def losses(hidden, table, labels, *, bias=None, valid=None, label_smoothing=0.0):
    """[P]: -sum_v q_v log softmax(l)_v with q = (1 - eps) onehot(label) + eps / V."""
    result = np.zeros(len(hidden))
    items = len(table)
    for p, label in enumerate(labels):
        if valid is not None and not valid[p]:
            continue
        if not 0 <= label < items:
            result[p] = np.nan
            continue
        logits = _logits(hidden[p], table, bias)
        q = np.full(items, label_smoothing / items)
        q[label] += 1 - label_smoothing
        # An item that bias removes has q log 0 in the sum; without smoothing its q is 0.
        terms = np.where(q > 0, q * (logits - _log_sum_exp(logits)), 0.0)
        result[p] = -terms.sum()
    return result


def gradients(hidden, table, labels, cotangents, *, bias=None, valid=None, label_smoothing=0.0):
    """Of sum_p cotangent_p loss_p, by hidden [P, D], table [V, D] and bias [V]."""
    d_hidden, d_table = np.zeros(hidden.shape), np.zeros(table.shape)
    d_bias = np.zeros(len(table))
    items = len(table)
    for p, label in enumerate(labels):
        if valid is not None and not valid[p]:
            continue
        logits = _logits(hidden[p], table, bias)
        d_logits = np.exp(logits - _log_sum_exp(logits)) - label_smoothing / items
        d_logits[label] -= 1 - label_smoothing
        d_logits *= cotangents[p]
        d_hidden[p] = d_logits @ table
        d_table += np.outer(d_logits, hidden[p])
        d_bias += d_logits
    return d_hidden, d_table, d_bias


def mean(hidden, table, labels, *, valid=None, weights=None, **options):
    """sum_p w_p loss_p / sum_p w_p over the valid positions, 0 if there is no weight."""
    each = losses(hidden, table, labels, valid=valid, **options)
    w = np.ones(len(hidden)) if weights is None else np.asarray(weights, np.float64)
    if valid is not None:
        w = np.where(valid, w, 0.0)
    return float(w @ each / w.sum()) if w.sum() else 0.0


def by_differences(f, x, step=1e-6):
    """Central differences of a scalar f at x."""
    result = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = (f(up) - f(down)) / (2 * step)
    return result
