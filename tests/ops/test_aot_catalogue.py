"""Catalogue ops compiled ahead of time for TPU v5e: do they compile, and what do they hold."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops

pytestmark = pytest.mark.slow

POSITIONS, WIDTH = 25_600, 64


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices("v5e")[0]))


def temporaries(f, *specs):
    return jax.jit(f).lower(*specs).compile().memory_analysis().temp_size_in_bytes


def gradient_temporaries(f, items):
    return temporaries(
        jax.grad(lambda *x: f(*x).mean(), (0, 1)),
        spec(POSITIONS, WIDTH),
        spec(items, WIDTH),
        spec(POSITIONS, dtype=jnp.int32),
    )


def dense(hidden, table, labels):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, labels)


def test_a_million_items():
    """The issue's bar: 0.5 GB, where the logits alone would take 102 GB."""
    assert gradient_temporaries(ops.linear_cross_entropy, 1_000_000) < 0.5e9


def test_a_hundred_thousand_items_against_the_dense_form():
    ours = gradient_temporaries(ops.mean_linear_cross_entropy, 100_000)
    assert ours < 0.2e9
    assert gradient_temporaries(dense, 100_000) > 25 * ours


def test_selection_from_a_million_items():
    def f(hidden, table):
        return ops.top_k_items(hidden, table, 10)

    # The table is rounded for the matrix unit once (128 MB); the scores would take 16 GB.
    assert temporaries(f, spec(4_096, WIDTH), spec(1_000_000, WIDTH)) < 0.2e9
