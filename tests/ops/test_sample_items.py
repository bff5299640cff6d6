"""sample_items: how often which item, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrec import ops

DRAWS = 40_000


def misfit(ids, shares):
    """p-value of chi-square against the wanted shares of the items that can be drawn."""
    counts = np.bincount(np.asarray(ids).reshape(-1), minlength=len(shares))
    assert counts.size == len(shares)
    assert not counts[shares == 0].any()
    drawn = shares > 0
    return stats.chisquare(counts[drawn], counts.sum() * shares[drawn] / shares.sum()).pvalue


def test_uniform():
    ids = ops.sample_items(jax.random.key(0), 17, (DRAWS // 4, 4))
    assert (ids.shape, ids.dtype) == ((DRAWS // 4, 4), jnp.int32)
    assert misfit(ids, np.ones(17)) > 1e-3
    # Each draw by itself: pairs are uniform too.
    assert misfit(ids[:, 0] * 17 + ids[:, 1], np.ones(17 * 17)) > 1e-3


@pytest.mark.parametrize("items", [1, 2, 3, 16, 17, 50])
def test_weighted(rng, items):
    """Group sizes that divide the items and that do not; weights from 0 to large."""
    weights = rng.random(items) ** 4
    weights[::3] *= 40
    weights[2::5] = 0
    ids = ops.sample_items(
        jax.random.key(1), items, (DRAWS // 2, 2), weights=jnp.asarray(weights, jnp.float32)
    )
    assert (ids.shape, ids.dtype) == ((DRAWS // 2, 2), jnp.int32)
    assert misfit(ids, weights) > 1e-3 or items == 1
    if items == 16:
        # The group and the item in it are drawn apart: pairs of draws are independent.
        shares = np.outer(weights, weights).reshape(-1)
        few = shares * DRAWS / 2 / shares.sum() > 5
        pairs = np.asarray(ids[:, 0] * 16 + ids[:, 1])
        assert misfit(pairs[few[pairs]], np.where(few, shares, 0)) > 1e-3


def test_shares_too_small_for_a_sum_in_float32():
    """A million items of which one has half: a float32 sum near 1 cannot tell the others apart."""
    items = 1_000_000
    weights = jnp.ones(items).at[0].set(float(items))
    ids = np.asarray(ops.sample_items(jax.random.key(2), items, (200_000,), weights=weights))
    rest = ids[ids > 0]
    assert abs((ids == 0).mean() - 0.5) < 0.01
    assert len(np.unique(rest)) > 0.9 * len(rest)
    assert stats.kstest(rest / items, "uniform").pvalue > 1e-3


def test_only_one_item_has_weight():
    for item in (0, 5, 9):
        weights = jnp.zeros(10).at[item].set(1e-30)
        ids = ops.sample_items(jax.random.key(3), 10, (100,), weights=weights)
        assert (np.asarray(ids) == item).all()


def test_the_key_decides(rng):
    weights = jnp.asarray(rng.random(9), jnp.bfloat16)
    f = jax.jit(lambda key, w: (ops.sample_items(key, 9, (50,), weights=w),))
    first, again = f(jax.random.key(4), weights), f(jax.random.key(4), weights)
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(f(jax.random.key(5), weights))).any()
    rows = jax.vmap(lambda key: ops.sample_items(key, 9, (50,), weights=weights))
    np.testing.assert_array_equal(rows(jax.random.key(4)[None])[0], first[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 0}, "num_items must be a positive Python integer, got 0"),
        ({"num_items": True}, "num_items must be a positive"),
        ({"num_items": 2.5}, "num_items must be a positive"),
        ({"weights": jnp.ones(4)}, r"weights must have shape \(5,\), got \(4,\)"),
        ({"weights": jnp.ones(5, int)}, "weights must be float32 or bfloat16, got int32"),
    ],
)
def test_what_does_not_fit(change, message):
    call = {"num_items": 5, "shape": (2,), **change}
    with pytest.raises(ValueError, match=message):
        ops.sample_items(jax.random.key(0), **call)
