"""T5 buckets, ALiBi and rotary embedding against their formulas and published check values."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, run
from oracles import position_schemes as oracle

from jaxrec import ops

# T5


def test_t5_buckets_at_their_edges():
    wanted = {15: 15, 16: 16, 17: 16, 18: 16, 19: 17, 20: 17, 21: 18, 24: 19, 31: 21, 32: 21}
    wanted |= {48: 24, 64: 26, 96: 29, 112: 30, 113: 31, 128: 31, 10**9: 31, 0: 0, 1: 1, -3: 0}
    got = ops.t5_bucket(jnp.asarray(list(wanted)))
    assert dict(zip(wanted, got.tolist(), strict=True)) == wanted
    assert got.dtype == jnp.int32


@pytest.mark.parametrize(
    ("buckets", "longest"), [(32, 128), (32, 1000), (8, 20), (7, 200), (2, 2), (64, 33), (32, 4096)]
)
def test_t5_buckets_are_exact(buckets, longest):
    distance = np.arange(-2, 2 * longest)
    got = ops.t5_bucket(distance, buckets, longest)
    np.testing.assert_array_equal(
        got, [oracle.t5_bucket(int(d), buckets, longest) for d in distance]
    )


def test_t5_buckets_of_narrow_integers():
    np.testing.assert_array_equal(ops.t5_bucket(jnp.asarray([5, 127], jnp.int8)), [5, 31])


def test_t5_bias_and_its_gradient(rng):
    table, d_out = cases.draw(rng, 8, 3), cases.draw(rng, 3, 40)
    out, (gradient,) = cases.gradients_of(lambda t: ops.t5_bias(t, 40, max_distance=20))(
        [table], d_out
    )
    wanted = np.zeros(table.shape)
    for d in range(40):
        bucket = oracle.t5_bucket(d, 8, 20)
        np.testing.assert_array_equal(out[:, d], table[bucket])
        wanted[bucket] += d_out[:, d]
    close(gradient, wanted, 1e-6)
    assert ops.t5_bias(jnp.ones((32, 2), jnp.bfloat16), 5).dtype == jnp.bfloat16
    assert ops.t5_bias(jnp.ones((32, 2)), 0).shape == (2, 0)


# ALiBi


def test_alibi_slopes():
    eight = [2.0**-h for h in range(1, 9)]
    for heads, wanted in {
        1: [2.0**-8],
        2: [0.0625, 0.00390625],
        3: [0.0625, 0.00390625, 0.25],
        4: [0.25, 0.0625, 0.015625, 0.00390625],
        8: eight,
        12: [*eight, 0.707107, 0.353553, 0.176777, 0.088388],
    }.items():
        close(ops.alibi_slopes(heads), wanted, 1e-6, str(heads))


def test_alibi_bias():
    got = ops.alibi_bias(jnp.asarray([0.5, 0.25]), 4)
    np.testing.assert_array_equal(got, [[0, -0.5, -1, -1.5], [0, -0.25, -0.5, -0.75]])
    assert ops.alibi_bias(jnp.ones(2, jnp.bfloat16), 4).dtype == jnp.bfloat16


# Rotary embedding


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ("interleaved", [0.540302, 0.841471, -0.0099998, 0.99995]),
        ("half", [0.540302, -0.0099998, 0.841471, 0.99995]),
    ],
)
def test_rotary_check_values(layout, wanted):
    x = jnp.asarray([1.0, 0, 0, 1])[None, None, None]
    got = ops.rotary_embedding(x, jnp.asarray([[1]]), layout=layout)
    close(got[0, 0, 0], wanted, 1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotary_is_the_formula(rng, layout, dtype):
    x = jnp.asarray(cases.draw(rng, 2, 7, 2, 6), dtype)
    positions = rng.integers(-5, 5000, (2, 7)).astype(np.int32)
    got = run(lambda x: ops.rotary_embedding(x, positions, base=500.0, layout=layout), x)
    assert got.dtype == dtype
    wanted = oracle.rotary_embedding(x, positions, 500.0, layout)
    # A position of thousands carries its float32 rounding into the angle.
    close(got, wanted, 1e-3 if dtype == jnp.float32 else 2**-7)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_products_depend_on_differences_of_positions(rng, layout):
    q, k = (jnp.asarray(cases.draw(rng, 1, 6, 1, 8)) for _ in range(2))
    positions = np.arange(6, dtype=np.int32)[None]

    def products(q, k, positions):
        turned = [ops.rotary_embedding(x, positions, layout=layout) for x in (q, k)]
        return jnp.einsum("bihd,bjhd->bhij", *turned)

    before, after = (run(products, q, k, positions + shift) for shift in (0, 90))
    close(after, before, 1e-4)
    assert np.abs(run(products, q, k, 2 * positions) - np.asarray(before)).max() > 0.1
    turned = ops.rotary_embedding(q, jnp.asarray(positions), layout=layout)
    close(jnp.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), 1e-6)


def test_rotary_gradient_turns_back(rng):
    x, d_out = cases.draw(rng, 1, 5, 1, 4), cases.draw(rng, 1, 5, 1, 4)
    positions = np.arange(5, dtype=np.int32)[None]
    _, (gradient,) = cases.gradients_of(lambda x: ops.rotary_embedding(x, positions))([x], d_out)
    close(gradient, oracle.rotary_embedding(d_out, -positions, 10000.0, "half"), 1e-5)


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.t5_bucket(jnp.ones(3)), "distance must be integer"),
        (lambda: ops.t5_bucket(jnp.arange(3), 1), "wants buckets >= 2"),
        (lambda: ops.t5_bucket(jnp.arange(3), 32, 16), "max_distance > buckets // 2"),
        (lambda: ops.t5_bias(jnp.ones(32), 4), r"table must be \[buckets, heads\]"),
        (lambda: ops.t5_bias(jnp.ones((32, 1), int), 4), "table must be float32"),
        (lambda: ops.alibi_slopes(0), "heads must be a positive"),
        (lambda: ops.alibi_bias(jnp.ones((2, 1)), 4), r"slopes must be \[heads\]"),
        (lambda: rotary(width=3), "head_dim must be even"),
        (lambda: rotary(base=0.0), "base must be a positive"),
        (lambda: rotary(layout="quarter"), "layout must be 'half' or 'interleaved'"),
        (lambda: rotary(positions=jnp.zeros((1, 3), int)), r"positions must be \[batch, length\]"),
        (lambda: rotary(positions=jnp.zeros((1, 2))), "positions must be integer"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call)


def rotary(width=4, positions=None, **options):
    positions = jnp.zeros((1, 2), int) if positions is None else positions
    return ops.rotary_embedding(jnp.ones((1, 2, 1, width)), positions, **options)
