"""Dropout: the right share, unbiased, the same for the same key, independent across places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import dropout

SHAPE = (256, 400)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_share_and_scale(rate: float, dtype: jnp.dtype) -> None:
    y = dropout(jnp.ones(SHAPE, dtype), rate, key=jax.random.key(1))
    assert y.dtype == dtype
    values = np.asarray(y, np.float32)
    kept = values != 0
    # Six standard deviations of a binomial share.
    bound = 6 * np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < bound
    np.testing.assert_allclose(values[kept], 1 / (1 - rate), rtol=1e-2)


def test_rows_columns_and_keys_are_independent() -> None:
    kept = [
        np.asarray(dropout(jnp.ones(SHAPE), 0.5, key=jax.random.key(seed))) != 0 for seed in (0, 1)
    ]
    bits = kept[0] * 2.0 - 1.0
    bound = 6 / np.sqrt(bits.size)
    for lag in (1, 2, 7, 64):
        assert abs((bits[lag:] * bits[:-lag]).mean()) < bound
        assert abs((bits[:, lag:] * bits[:, :-lag]).mean()) < bound
    assert abs((bits * (kept[1] * 2.0 - 1.0)).mean()) < bound
    # No row or column is emptier than chance allows.
    assert np.abs(kept[0].mean(0) - 0.5).max() < 6 * 0.5 / np.sqrt(SHAPE[0])
    assert np.abs(kept[0].mean(1) - 0.5).max() < 6 * 0.5 / np.sqrt(SHAPE[1])


def test_same_key_same_bits_under_jit_and_grad() -> None:
    x = jax.random.normal(jax.random.key(2), (8, 16))
    key = jax.random.key(3)
    y = dropout(x, 0.3, key=key)
    np.testing.assert_array_equal(y, jax.jit(lambda x: dropout(x, 0.3, key=key))(x))
    gradient = jax.grad(lambda x: dropout(x, 0.3, key=key).sum())(x)
    np.testing.assert_allclose(gradient, np.where(np.asarray(y) != 0, 1 / 0.7, 0), rtol=1e-6)
    assert not np.array_equal(y, dropout(x, 0.3, key=jax.random.key(4)))


def test_rate_zero_is_the_identity_and_other_rates_are_refused() -> None:
    x = jnp.arange(4.0)
    assert dropout(x, 0.0, key=jax.random.key(0)) is x
    for rate in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            dropout(x, rate, key=jax.random.key(0))
