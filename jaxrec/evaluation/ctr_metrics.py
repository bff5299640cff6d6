"""Metrics of predicted click probabilities: AUC, AUC by user, log loss. NumPy, float64."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrec.errors import UserError

Floats = NDArray[np.float64]


class GroupedAuc(NamedTuple):
    """What `gauc` returns.

    Attributes:
      value: the weighted mean of the users' AUC.
      users: how many users it is the mean of.
      skipped_users: users left out because all their labels are equal.
      impressions: rows of the users that count.
    """

    value: float
    users: int
    skipped_users: int
    impressions: int


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve; a tie between a positive and a negative counts one half.

        AUC = (#{(p, n): s_p > s_n} + 0.5 #{(p, n): s_p = s_n}) / (#positives #negatives)

    Args:
      labels: [n], 0 or 1 (or bool).
      scores: [n], any monotone score: probabilities or logits. Infinities are allowed.

    Returns:
      A number in [0, 1]; 0.5 for scores that say nothing.

    Raises:
      UserError: labels other than 0 and 1, NaN scores, different lengths, or one class only.

    Cost: one sort of `n` scores.

    Source: the Mann-Whitney statistic with mid-ranks (Hanley & McNeil, Radiology 1982).

    >>> auc([0, 1, 1, 0], [0.1, 0.4, 0.3, 0.3])
    0.875
    """
    truth, predicted = _check_labels(labels, scores)
    one_group = np.zeros(truth.size, np.int64)
    positives = int(truth.sum())
    if positives in (0, truth.size):
        raise UserError(
            f"AUC needs both classes, got {positives} positives and "
            f"{truth.size - positives} negatives"
        )
    return float(_auc_by_group(truth, predicted, one_group, 1).auc[0])


def gauc(
    labels: ArrayLike,
    scores: ArrayLike,
    users: ArrayLike,
    *,
    weight: Literal["impressions", "positives", "uniform"] = "impressions",
) -> GroupedAuc:
    """AUC of each user by itself, averaged over users.

        GAUC = sum_u w_u AUC_u / sum_u w_u      over users u that have both classes

    Args:
      labels: [n], 0 or 1.
      scores: [n].
      users: [n], the user of each impression: any integers or strings.
      weight: `w_u`, the user's impressions (default), positives, or 1.

    Returns:
      `GroupedAuc`: the value, and how many users it covers and leaves out.

    Raises:
      UserError: as `auc`; no user with both classes.

    Cost: one sort of `n` rows.

    Source: Zhou et al., "Deep Interest Network" (KDD 2018), section 6.2.

    >>> gauc([0, 1, 1, 1, 0], [0.1, 0.4, 0.3, 0.2, 0.9], ["a", "a", "b", "c", "c"])
    GroupedAuc(value=0.5, users=2, skipped_users=1, impressions=4)
    """
    truth, predicted = _check_labels(labels, scores)
    owner = np.asarray(users)
    if owner.shape != truth.shape:
        raise UserError(f"users has shape {owner.shape}, wanted one user a label: {truth.shape}")
    names, group = np.unique(owner, return_inverse=True)
    by_user = _auc_by_group(truth, predicted, group.reshape(-1), names.size)
    weights = {
        "impressions": by_user.positives + by_user.negatives,
        "positives": by_user.positives,
        "uniform": np.ones(names.size, np.int64),
    }
    if weight not in weights:
        raise UserError(f"weight must be one of {', '.join(weights)}, got {weight!r}")
    usable = (by_user.positives > 0) & (by_user.negatives > 0)
    if not usable.any():
        raise UserError(f"GAUC needs a user with both classes; none of the {names.size} has both")
    value = np.average(by_user.auc[usable], weights=weights[weight][usable])
    return GroupedAuc(
        float(value),
        int(usable.sum()),
        int(names.size - usable.sum()),
        int(weights["impressions"][usable].sum()),
    )


def log_loss(
    labels: ArrayLike,
    predictions: ArrayLike,
    *,
    from_logits: bool = False,
    eps: float = 1e-15,
) -> float:
    """Mean negative log-likelihood of 0/1 labels, in nats.

        L = -mean( y log p + (1 - y) log(1 - p) )

    Args:
      labels: [n], 0 or 1.
      predictions: [n], probabilities of label 1, or logits with `from_logits=True`, which lose
        nothing to rounding.
      from_logits: `p = 1 / (1 + exp(-prediction))`, computed as `log(1 + exp(.))` throughout.
      eps: the least probability that a label is taken to have had; not used with logits.

    Returns:
      The loss, at least 0.

    Raises:
      UserError: labels other than 0 and 1, NaN, probabilities outside [0, 1], infinite logits.

    Cost: O(n).

    Source: the Bernoulli log-likelihood.

    >>> round(log_loss([1, 0], [0.8, 0.4]), 4)
    0.367
    >>> log_loss([1], [0.0], from_logits=True) == float(np.log(2))
    True
    """
    truth, predicted = _check_labels(labels, predictions)
    if from_logits:
        if np.isinf(predicted).any():
            raise UserError(f"logit {int(np.isinf(predicted).argmax())} is infinite")
        return float(np.logaddexp(0.0, np.where(truth, -predicted, predicted)).mean())
    outside = (predicted < 0) | (predicted > 1)
    if outside.any():
        row = int(outside.argmax())
        raise UserError(
            f"prediction {row} is {predicted[row]:g}, wanted a probability between 0 and 1 "
            "(use from_logits=True for logits)"
        )
    likelihood = np.maximum(np.where(truth, predicted, 1.0 - predicted), eps)
    return float(-np.log(likelihood).mean())


def _check_labels(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    truth = np.asarray(labels)
    predicted = np.asarray(scores, np.float64)
    if truth.ndim != 1 or truth.shape != predicted.shape:
        raise UserError(
            f"wanted one label and one prediction a row, got {truth.shape} and {predicted.shape}"
        )
    if truth.size == 0:
        raise UserError("there is no row to evaluate")
    strange = ~np.isin(truth, (0, 1))
    if strange.any():
        row = int(strange.argmax())
        raise UserError(f"label {row} is {truth[row]}, wanted 0 or 1")
    if np.isnan(predicted).any():
        raise UserError(f"prediction {int(np.isnan(predicted).argmax())} is NaN")
    return truth.astype(bool), predicted


class _GroupAucs(NamedTuple):
    auc: Floats
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]


def _auc_by_group(
    truth: NDArray[np.bool_], scores: Floats, group: NDArray[np.int64], groups: int
) -> _GroupAucs:
    """AUC within each group by mid-ranks; NaN where a group has one class only."""
    order = np.lexsort((scores, group))
    truth, scores, group = truth[order], scores[order], group[order]
    new = np.ones(truth.size, bool)
    new[1:] = (group[1:] != group[:-1]) | (scores[1:] != scores[:-1])
    tie = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    stops = np.append(starts[1:], truth.size)
    middle = 0.5 * (starts + stops - 1)[tie]
    size = np.bincount(group, minlength=groups)
    begin = np.cumsum(size) - size
    positives = np.bincount(group[truth], minlength=groups)
    negatives = size - positives
    rank_sum = np.bincount(group, weights=(middle - begin[group] + 1.0) * truth, minlength=groups)
    wins = rank_sum - 0.5 * positives * (positives + 1.0)
    pairs = positives * negatives.astype(np.float64)
    value = np.full(groups, np.nan)
    np.divide(wins, pairs, out=value, where=pairs > 0)
    return _GroupAucs(value, positives, negatives)
