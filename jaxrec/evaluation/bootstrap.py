"""Bootstrap intervals of a mean over users, and of the difference of two systems."""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrec.errors import UserError

Method = Literal["percentile", "bca"]
METHODS: tuple[str, ...] = ("percentile", "bca")

# Numbers drawn at once; a draw of 1,000 resamples of 140,000 users would take 1.1 GB.
_BLOCK_DRAWS = 1 << 22
# Below this share of distinct values, drawing how often each occurs beats drawing users.
_FEW_DISTINCT = 1 / 16


class Interval(NamedTuple):
    """A mean and its bootstrap interval.

    Attributes:
      mean: mean of the values as given.
      low: lower end.
      high: upper end.
    """

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Difference of two systems on the same users.

    Attributes:
      mean: mean of first minus second.
      low: lower end of its interval.
      high: upper end.
      p_value: two-sided share of resamples beyond zero, `2 min(P(d <= 0), P(d >= 0))`, counting
        the observed sample as one resample on either side; at most 1.
    """

    mean: float
    low: float
    high: float
    p_value: float


def confidence_interval(
    values: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    method: Method = "percentile",
    groups: ArrayLike | None = None,
) -> Interval:
    """Bootstrap interval of the mean of per-user values.

    Users are drawn with replacement, as many as there are, `resamples` times; the interval
    leaves `(1 - level) / 2` of the resampled means on either side (percentile), with the
    quantiles corrected for bias and skewness under `method="bca"`. Where several lists belong to
    one user, pass `groups`: users are drawn with all their lists, and the mean is over lists.

    Args:
      values: [m], one value a list, as from `metrics.per_list`.
      level: share of the resampled means inside, between 0 and 1.
      resamples: how many.
      seed: the same seed gives the same interval.
      method: "percentile" or "bca".
      groups: [m], the user of each list; by default each list is a user of its own.

    Returns:
      `Interval(mean, low, high)`. All values equal (a single user among them): no width.

    Raises:
      UserError: no values, NaN or infinite values, an option out of range.

    Cost: O(resamples d) with d distinct values where they are few (a metric at k of one target
      takes at most k + 1 values), else O(resamples m); memory is bounded.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 14.

    >>> interval = confidence_interval([0.0, 1.0] * 200, seed=1)
    >>> interval.mean, 0.44 < interval.low < 0.5 < interval.high < 0.56
    (0.5, True)
    """
    _check_options(level, resamples, method)
    sums, sizes = _totals(values, groups)
    mean = float(sums.sum() / sizes.sum())
    means = _resampled_means(sums, sizes, resamples, seed)
    low, high = _ends(means, sums, sizes, level, method)
    return Interval(mean, low, high)


def confidence_intervals(
    per_list: Mapping[str, ArrayLike],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    method: Method = "percentile",
    groups: ArrayLike | None = None,
) -> dict[str, Interval]:
    """`confidence_interval` of each metric by itself.

    Args:
      per_list: name to [m] values, as from `metrics.per_list`.
      level, resamples, seed, method, groups: as in `confidence_interval`.

    Returns:
      Name to `Interval`. The intervals hold one at a time, not all at once.

    Raises:
      UserError: as in `confidence_interval`.

    Cost and source: as in `confidence_interval`, a metric.

    >>> confidence_intervals({"hr@1": [1.0, 1.0]})
    {'hr@1': Interval(mean=1.0, low=1.0, high=1.0)}
    """
    return {
        name: confidence_interval(
            values, level=level, resamples=resamples, seed=seed, method=method, groups=groups
        )
        for name, values in per_list.items()
    }


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    method: Method = "percentile",
    groups: ArrayLike | None = None,
) -> Difference:
    """Bootstrap interval of the mean difference of two systems on the same users.

    Each resample draws users, and both systems are judged on the users drawn. What makes both
    systems good or bad for the same users cancels, so that this can tell systems apart whose own
    intervals overlap.

    Args:
      first: [m], values of one system.
      second: [m], values of the other for the same lists in the same order.
      level, resamples, seed, method, groups: as in `confidence_interval`.

    Returns:
      `Difference(mean, low, high, p_value)`, first minus second.

    Raises:
      UserError: different lengths, and as in `confidence_interval`.

    Cost and source: as in `confidence_interval`; the p-value as in Davison & Hinkley, Bootstrap
      Methods and their Application (1997), section 4.

    >>> difference = paired_difference([1.0, 1.0, 0.0, 1.0] * 50, [1.0, 0.0, 0.0, 1.0] * 50)
    >>> difference.mean, difference.low > 0, difference.p_value < 0.01
    (0.25, True, True)
    """
    _check_options(level, resamples, method)
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.shape != other.shape:
        raise UserError(
            f"a paired comparison needs the same users: got {one.shape} and {other.shape} values"
        )
    sums, sizes = _totals(one - other, groups)
    means = _resampled_means(sums, sizes, resamples, seed)
    low, high = _ends(means, sums, sizes, level, method)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value = min(1.0, 2.0 * (tail + 1) / (resamples + 1))
    return Difference(float(sums.sum() / sizes.sum()), low, high, p_value)


def _totals(
    values: ArrayLike, groups: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of the values, and their number, of each unit that is drawn."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise UserError(f"wanted one value a user, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).argmax())
        raise UserError(f"value {bad} is {array[bad]}: an interval needs finite values")
    if groups is None:
        return array, np.ones(array.size)
    owner = np.asarray(groups)
    if owner.shape != array.shape:
        raise UserError(f"groups has shape {owner.shape}, wanted {array.shape}")
    _, unit = np.unique(owner, return_inverse=True)
    sums = np.bincount(unit, weights=array).astype(np.float64)
    return sums, np.bincount(unit).astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    units = sums.size
    same_size = bool((sizes == sizes[0]).all())
    distinct, counts = _distinct(sums, sizes)
    means = np.empty(resamples)
    if len(distinct) <= max(1, units * _FEW_DISTINCT):
        for rows in _blocks(resamples, len(distinct)):
            drawn = rng.multinomial(units, counts / units, size=rows.stop - rows.start)
            total = drawn @ distinct
            means[rows] = total[:, 0] / total[:, 1]
    else:
        for rows in _blocks(resamples, units):
            drawn = rng.integers(0, units, size=(rows.stop - rows.start, units), dtype=np.int32)
            weight = units * sizes[0] if same_size else sizes.take(drawn).sum(axis=1)
            means[rows] = sums.take(drawn).sum(axis=1) / weight
    return means


def _distinct(
    sums: NDArray[np.float64], sizes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    order = np.lexsort((sums, sizes))
    pairs = np.stack([sums[order], sizes[order]], axis=1)
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    return pairs[starts], np.diff(np.append(starts, len(pairs)))


def _ends(
    means: NDArray[np.float64],
    sums: NDArray[np.float64],
    sizes: NDArray[np.float64],
    level: float,
    method: str,
) -> tuple[float, float]:
    tails = np.array([(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    if method == "bca" and np.ptp(means) > 0:
        tails = _bca_tails(means, sums, sizes, tails)
    low, high = np.quantile(means, tails)
    return float(low), float(high)


def _bca_tails(
    means: NDArray[np.float64],
    sums: NDArray[np.float64],
    sizes: NDArray[np.float64],
    tails: NDArray[np.float64],
) -> NDArray[np.float64]:
    # SciPy's statistics are slow to import, and only this option needs the normal quantiles.
    from scipy.special import ndtr, ndtri

    observed = sums.sum() / sizes.sum()
    below = ((means < observed).sum() + 0.5 * (means == observed).sum()) / means.size
    # A sample whose resamples all lie on one side has no finite correction.
    bias = ndtri(np.clip(below, 0.5 / means.size, 1 - 0.5 / means.size))
    left_out = (sums.sum() - sums) / np.maximum(sizes.sum() - sizes, 1.0)
    spread = left_out.mean() - left_out
    scale = (spread**2).sum() ** 1.5
    acceleration = (spread**3).sum() / (6.0 * scale) if scale > 0 else 0.0
    shifted = bias + ndtri(tails)
    return np.asarray(ndtr(bias + shifted / (1.0 - acceleration * shifted)))


def _blocks(resamples: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_DRAWS // max(1, width))
    for start in range(0, resamples, step):
        yield slice(start, min(resamples, start + step))


def _check_options(level: float, resamples: int, method: str) -> None:
    if not 0.0 < level < 1.0:
        raise UserError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
