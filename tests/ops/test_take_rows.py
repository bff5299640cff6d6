"""Rows of a table: values, gradients, and what a TPU's compiler makes of the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import draw
from jax.sharding import SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops


def test_rows_and_the_gradient_of_rows_asked_for_twice(rng):
    table, indices = draw(rng, 7, 3), np.array([[4, 0, 4], [6, 4, 1]])
    d_out = draw(rng, 2, 3, 3)
    out, pull = jax.vjp(lambda t: ops.take_rows(t, indices), jnp.asarray(table))
    np.testing.assert_array_equal(out, table[indices])
    wanted = np.zeros(table.shape)
    np.add.at(wanted, indices, np.float64(d_out))
    np.testing.assert_allclose(pull(jnp.asarray(d_out))[0], wanted, rtol=1e-6)


def test_under_jit_vmap_and_twice_differentiated(rng):
    tables, indices = jnp.asarray(draw(rng, 2, 5, 3)), jnp.array([3, 3, 0])

    def f(table):
        return (ops.take_rows(table, indices) ** 3).sum()

    def plain(table):
        return (table[indices] ** 3).sum()

    for of in (jax.grad, lambda f: jax.jit(jax.hessian(f))):
        got, wanted = (jax.vmap(of(g))(tables) for g in (f, plain))
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.slow
def test_an_optimiser_keeps_its_arrays_as_they_lie():
    """A TPU's compiler would turn a table and the optimiser's averages there and back."""
    one = SingleDeviceSharding(devices("v5e")[0])

    def spec(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    def held(take):
        def step(table, mean, square, indices, target):
            def loss(table):
                apart = ((take(table, indices) - target) ** 2).sum()
                return apart + ops.mean_linear_cross_entropy(target, table, indices)

            gradient = jax.grad(loss)(table)
            mean, square = 0.9 * mean + gradient, 0.9 * square + gradient**2
            return table - mean / (1e-8 + jnp.sqrt(square)), mean, square

        table, indices = spec(1_000_000, 64), spec(4096, dtype=jnp.int32)
        program = jax.jit(step, donate_argnums=(0, 1, 2))
        lowered = program.lower(table, table, table, indices, spec(4096, 64))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert held(ops.take_rows) < 1.1e9
    assert held(lambda table, indices: table[indices]) > 1.4e9
