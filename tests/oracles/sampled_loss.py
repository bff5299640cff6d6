"""Losses over a label and sampled negatives in float64 NumPy, one position at a time."""

import numpy as np


def _softplus(x):
    return np.logaddexp(0, x)


def _terms(p, hidden, table, labels, negatives, options):
    """The label's logit; ids, logits and places of the negatives that are not left out."""
    temperature, log_q = options.get("temperature", 1.0), options.get("log_q")
    own = negatives.ndim == 2
    label = hidden[p] @ table[labels[p]] / temperature
    if options.get("log_q_labels") is not None:
        label -= options["log_q_labels"][p]
    ids, logits = [], []
    for k, item in enumerate(negatives[p] if own else negatives):
        if not 0 <= item < len(table):
            continue
        if options.get("mask_collisions") and item == labels[p]:
            continue
        if options.get("exclude") is not None and item in options["exclude"][p]:
            continue
        logit = hidden[p] @ table[item] / temperature
        if log_q is not None:
            logit -= log_q[p, k] if own else log_q[k]
        ids.append(item)
        logits.append(logit)
    return label, ids, np.array(logits)


def beta(negatives, items, t):
    """The form with alpha that the paper gives: alpha (t (1 - 1/alpha) + 1/alpha)."""
    alpha = negatives / (items - 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def losses(kind, hidden, table, labels, negatives, *, valid=None, t=0.0, **options):
    """[P]; kind is softmax or bce, and t that of the generalised BCE."""
    result, count = np.zeros(len(hidden)), negatives.shape[-1]
    for p in range(len(hidden)):
        if valid is not None and not valid[p]:
            continue
        if not 0 <= labels[p] < len(table):
            result[p] = np.nan
            continue
        label, _, logits = _terms(p, hidden, table, labels, negatives, options)
        if kind == "softmax":
            result[p] = np.logaddexp.reduce([label, *logits]) - label
        else:
            power = beta(count, len(table), t)
            result[p] = (power * _softplus(-label) + _softplus(logits).sum()) / (1 + count)
    return result


def gradients(kind, hidden, table, labels, negatives, g, *, valid=None, t=0.0, **options):
    """Of sum_p g_p loss_p, by hidden [P, D] and table [V, D]."""
    d_hidden, d_table = np.zeros(hidden.shape), np.zeros(table.shape)
    count, scale = negatives.shape[-1], 1 / options.get("temperature", 1.0)
    for p in range(len(hidden)):
        if valid is not None and not valid[p]:
            continue
        label, ids, logits = _terms(p, hidden, table, labels, negatives, options)
        if kind == "softmax":
            total = np.logaddexp.reduce([label, *logits])
            slopes = [np.exp(label - total) - 1, *np.exp(logits - total)]
        else:
            power = beta(count, len(table), t)
            slopes = np.array([-power / (1 + np.exp(label)), *(1 / (1 + np.exp(-logits)))])
            slopes = slopes / (1 + count)
        for item, slope in zip([labels[p], *ids], slopes, strict=True):
            d_hidden[p] += g[p] * slope * scale * table[item]
            d_table[item] += g[p] * slope * scale * hidden[p]
    return d_hidden, d_table
