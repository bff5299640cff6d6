"""Bootstrap intervals against SciPy, against theory, and by hand."""

import numpy as np
import pytest
from scipy import stats

from jaxrec.errors import UserError
from jaxrec.evaluation import bootstrap
from jaxrec.evaluation.bootstrap import (
    confidence_interval,
    confidence_intervals,
    paired_difference,
)

# A resampled mean's quantile is itself random: with 20,000 resamples its standard error is about
# 1 % of the interval's width, with 4 % asked for.
MANY = 20_000


def close(got, wanted):
    width = wanted[1] - wanted[0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.04 * width)


@pytest.mark.parametrize("kind", ["few distinct values", "all distinct"])
@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_equals_scipy(rng, kind, method):
    # Skewed, so that the two methods differ.
    values = rng.exponential(1.0, 60) ** 2
    if kind == "few distinct values":
        values = np.repeat((values[:6]).round(1), 20)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=MANY, method=method, rng=np.random.default_rng(1)
    ).confidence_interval
    got = confidence_interval(values, resamples=MANY, method=method)
    assert got.mean == pytest.approx(values.mean())
    close(got[1:], wanted)


def test_bca_differs_from_percentile_where_it_should(rng):
    values = rng.exponential(1.0, 40) ** 3
    plain = confidence_interval(values, resamples=MANY)
    corrected = confidence_interval(values, resamples=MANY, method="bca")
    # Positive skew: both ends move up.
    assert corrected.low > plain.low
    assert corrected.high > plain.high


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_width_is_that_of_the_normal_approximation(rng, level):
    values = (rng.random(4000) < 0.3).astype(float)
    got = confidence_interval(values, level=level, resamples=MANY)
    half = stats.norm.ppf((1 + level) / 2) * values.std() / np.sqrt(values.size)
    close(got[1:], (values.mean() - half, values.mean() + half))


def test_both_ways_of_drawing_agree(rng, monkeypatch):
    values = np.where(rng.random(400) < 0.4, 1 / np.log2(rng.integers(2, 5, 400)), 0.0)
    few = confidence_interval(values, resamples=MANY)
    monkeypatch.setattr(bootstrap, "_FEW_DISTINCT", 0.0)
    close(confidence_interval(values, resamples=MANY)[1:], few[1:])


def test_groups_are_drawn_whole(rng):
    # Ten lists a user, all alike: the interval is that of 50 users, not of 500 lists.
    by_user = rng.random(50)
    values, groups = np.repeat(by_user, 10), np.repeat(rng.permutation(50), 10)
    close(
        confidence_interval(values, groups=groups, resamples=MANY)[1:],
        confidence_interval(by_user, resamples=MANY, seed=5)[1:],
    )


def test_groups_of_different_size_weigh_by_lists(rng):
    sizes = rng.integers(1, 6, 80)
    groups = np.repeat(np.arange(80), sizes)
    values = rng.random(groups.size) + np.repeat(sizes, sizes) / 5
    got = confidence_interval(values, groups=groups, resamples=MANY)
    assert got.mean == pytest.approx(values.mean())
    draws = []
    for _ in range(4000):
        drawn = rng.integers(0, 80, 80)
        chosen = np.concatenate([values[groups == user] for user in drawn])
        draws.append(chosen.mean())
    wanted = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose(got[1:], wanted, rtol=0, atol=0.08 * np.ptp(wanted))
    bca = confidence_interval(values, groups=groups, resamples=MANY, method="bca")
    np.testing.assert_allclose(bca[1:], wanted, rtol=0, atol=0.15 * np.ptp(wanted))


def test_no_spread_gives_no_width():
    for method in ("percentile", "bca"):
        assert confidence_interval([0.25] * 30, method=method) == (0.25, 0.25, 0.25)
    assert confidence_interval([0.25]) == (0.25, 0.25, 0.25)


def test_same_seed_same_interval(rng):
    values = rng.random(100)
    assert confidence_interval(values, seed=3) == confidence_interval(values, seed=3)
    assert confidence_interval(values, seed=3) != confidence_interval(values, seed=4)


@pytest.mark.parametrize("distinct", [True, False])
def test_memory_is_bounded_by_blocks(rng, monkeypatch, distinct):
    values = rng.random(200) if distinct else np.repeat(rng.random(4), 50)
    whole = confidence_interval(values, resamples=100)
    monkeypatch.setattr(bootstrap, "_BLOCK_DRAWS", 700)
    np.testing.assert_allclose(confidence_interval(values, resamples=100), whole, rtol=1e-12)


def test_intervals_of_several_metrics(rng):
    values = {"hr@1": rng.random(50), "ndcg@1": rng.random(50)}
    got = confidence_intervals(values, level=0.8, resamples=200, seed=2, method="bca")
    assert list(got) == list(values)
    assert got["ndcg@1"] == confidence_interval(
        values["ndcg@1"], level=0.8, resamples=200, seed=2, method="bca"
    )


def test_paired_difference_sees_what_intervals_do_not(rng):
    hard = rng.random(300)
    first, second = hard + 0.02 + rng.normal(0, 0.02, 300), hard
    one, other = confidence_interval(first), confidence_interval(second)
    assert one.low < other.high
    got = paired_difference(first, second)
    assert 0 < got.low < got.mean < got.high
    assert got.mean == pytest.approx((first - second).mean())
    assert got.p_value == pytest.approx(2 / 1001)
    back = paired_difference(second, first)
    assert back.mean == pytest.approx(-got.mean)
    assert back.high < 0


def test_p_value_follows_the_normal_approximation(rng):
    noise = rng.normal(0.0, 1.0, 500)
    noise += 1.5 * noise.std() / np.sqrt(500) - noise.mean()
    got = paired_difference(noise, np.zeros(500), resamples=MANY)
    assert got.p_value == pytest.approx(2 * stats.norm.sf(1.5), abs=0.015)
    assert paired_difference([1.0, 0.0], [1.0, 0.0]).p_value == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confidence_interval([]), r"one value a user, got shape \(0,\)"),
        (lambda: confidence_interval([[1.0]]), r"got shape \(1, 1\)"),
        (lambda: confidence_interval([0.0, np.nan]), "value 1 is nan"),
        (lambda: confidence_interval([0.0], level=95), "level must lie between 0 and 1, got 95"),
        (lambda: confidence_interval([0.0], resamples=0), "resamples must be at least 1"),
        (lambda: confidence_interval([0.0], method="basic"), "one of percentile, bca"),
        (lambda: confidence_interval([0.0], groups=[1, 2]), r"groups has shape \(2,\)"),
        (lambda: paired_difference([0.0], [0.0, 1.0]), r"same users: got \(1,\) and \(2,\)"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_bca_quantiles_by_the_formula(rng):
    values, sizes = rng.exponential(1.0, 12) ** 3, rng.integers(1, 4, 12).astype(float)
    sums = values * sizes
    mean = sums.sum() / sizes.sum()
    means = rng.normal(mean + 0.4, 1.0, 500)
    bias = stats.norm.ppf((means < mean).mean())
    assert bias < -0.2
    jackknife = [(sums.sum() - sums[i]) / (sizes.sum() - sizes[i]) for i in range(12)]
    spread = np.mean(jackknife) - np.array(jackknife)
    skew = np.sum(spread**3) / (6 * np.sum(spread**2) ** 1.5)
    wanted = []
    for tail in (0.05, 0.95):
        shifted = bias + stats.norm.ppf(tail)
        wanted.append(stats.norm.cdf(bias + shifted / (1 - skew * shifted)))
    got = bootstrap._bca_tails(means, sums, sizes, np.array([0.05, 0.95]))
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
