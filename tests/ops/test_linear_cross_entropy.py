"""linear_cross_entropy and its mean against float64, and their promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue_cases import QUICK, close, double, draw, loss_module, pulled, run, tiling
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec
from oracles import linear_cross_entropy as oracle

from jaxrec import ops
from jaxrec.ops import _catalogue, _catalogue_loss
from jaxrec.ops._valid_first import valid_first

SMALL = ["small", "small_two_pass"]
CASES = [
    ((1, 1, 1), jnp.float32, "small"),
    ((1, 9, 3), jnp.float32, "small_two_pass"),
    ((9, 1, 3), jnp.float32, "small_two_pass"),
    ((13, 20, 5), jnp.float32, "small"),
    ((13, 20, 5), jnp.float32, "small_two_pass"),
    ((19, 25, 8), jnp.float32, "default"),
    ((13, 20, 5), jnp.bfloat16, "small"),
    ((13, 20, 5), jnp.bfloat16, "small_two_pass"),
]
# Errors relative to the largest element. bfloat16 gradients are rounded to 8 bits, and so are the
# probabilities in their products; losses are float32 whatever the inputs.
GRADIENT = {jnp.float32: 5e-6, jnp.bfloat16: 1.2e-2}


def options_of(rng, positions, items, dtype, *, bias=True, valid=True, label_smoothing=0.1):
    return {
        "bias": jnp.asarray(rng.normal(size=items), dtype) if bias else None,
        "valid": jnp.asarray(rng.random(positions) > 0.3) if valid else None,
        "label_smoothing": label_smoothing,
    }


def near(got, want, tolerance):
    """`close`, but a value below 1 may be off by the tolerance itself."""
    want = np.asarray(want, np.float64)
    close(got, want, tolerance * max(1.0, 1 / max(np.abs(want).max(initial=0), 1e-30)))


@pytest.mark.parametrize(("shape", "dtype", "blocks"), CASES, ids=str)
def test_values_and_gradients(rng, shape, dtype, blocks):
    hidden, table, labels = draw(rng, *shape, dtype)
    options = options_of(rng, *shape[:2], dtype)
    valid = options["valid"] = options["valid"].at[0].set(True)
    bias = options.pop("bias")
    weights = jnp.asarray(rng.random(shape[0]) + 0.1, dtype)
    g = (rng.normal(size=shape[0]).astype(np.float32), np.float32(-1.7))

    def both(arrays, g):
        def each(hidden, table, bias):
            return ops.linear_cross_entropy(hidden, table, labels, bias=bias, **options)

        def mean(hidden, table, bias, weights):
            return ops.mean_linear_cross_entropy(
                hidden, table, labels, bias=bias, weights=weights, **options
            )

        results = []
        for f, x, c in ((each, arrays[:3], g[0]), (mean, arrays, g[1])):
            out, pull = jax.vjp(f, *x)
            results += [out, pull(c)]
        return results

    with tiling(blocks):
        losses, grads, mean, mean_grads = run(both, (hidden, table, bias, weights), g)
    exact = (double(hidden), double(table), np.asarray(labels))
    options |= {"bias": double(bias), "valid": np.asarray(valid)}
    want_losses = oracle.losses(*exact, **options)
    want_mean = oracle.mean(*exact, weights=double(weights), **options)
    assert losses.dtype == mean.dtype == jnp.float32
    near(losses, want_losses, 2e-6)
    near(mean, want_mean, 2e-6)
    share = np.where(valid, double(weights), 0)
    total = share.sum()
    by_weights = np.where(valid, g[1] * (want_losses - want_mean) / total, 0)
    wants = (
        (grads, oracle.gradients(*exact, g[0], **options)),
        (mean_grads, (*oracle.gradients(*exact, g[1] * share / total, **options), by_weights)),
    )
    for got, want in wants:
        for x, w in zip(got, want, strict=True):
            assert x.dtype == dtype
            near(x, w, GRADIENT[dtype])


@pytest.mark.parametrize(
    ("bias", "valid", "label_smoothing", "blocks"),
    [
        (0, 0, 0.0, "small"),
        (0, 0, 0.0, "small_two_pass"),
        (1, 0, 0.0, "small"),
        (0, 1, 0.0, "small_two_pass"),
        (0, 0, 0.3, "small"),
        (0, 0, 0.3, "small_two_pass"),
        (1, 1, 0.0, "small_two_pass"),
        (1, 0, 1.0, "small"),
    ],
)
def test_options_alone_and_together(rng, bias, valid, label_smoothing, blocks):
    hidden, table, labels = draw(rng, 10, 15, 4)
    options = options_of(
        rng, 10, 15, jnp.float32, bias=bias, valid=valid, label_smoothing=label_smoothing
    )
    g = rng.normal(size=10).astype(np.float32)

    def both(hidden, table):
        each = functools.partial(ops.linear_cross_entropy, labels=labels, **options)
        mean = functools.partial(ops.mean_linear_cross_entropy, labels=labels, **options)
        losses, pull = jax.vjp(each, hidden, table)
        return losses, pull(g), *jax.value_and_grad(mean, (0, 1))(hidden, table)

    with tiling(blocks):
        losses, grads, mean, mean_grads = run(both, hidden, table)
    exact = (double(hidden), double(table), np.asarray(labels))
    options["bias"] = double(options["bias"])
    near(losses, oracle.losses(*exact, **options), 2e-6)
    near(mean, oracle.mean(*exact, **options), 2e-6)
    keep = np.ones(10) if options["valid"] is None else np.asarray(options["valid"], float)
    for got, c in ((grads, g), (mean_grads, keep / keep.sum())):
        want = oracle.gradients(*exact, c, **options)
        near(got[0], want[0], GRADIENT[jnp.float32])
        near(got[1], want[1], GRADIENT[jnp.float32])


def test_oracle_gradients_are_those_of_the_oracle_losses(rng):
    hidden, table, labels = (np.asarray(x, np.float64) for x in draw(rng, 5, 7, 3))
    labels = labels.astype(int)
    bias, g = rng.normal(size=7), rng.normal(size=5)
    options = {"valid": np.array([1, 1, 0, 1, 1], bool), "label_smoothing": 0.2}
    want = oracle.gradients(hidden, table, labels, g, bias=bias, **options)
    of = (
        lambda x: g @ oracle.losses(x, table, labels, bias=bias, **options),
        lambda x: g @ oracle.losses(hidden, x, labels, bias=bias, **options),
        lambda x: g @ oracle.losses(hidden, table, labels, bias=x, **options),
    )
    for f, x, w in zip(of, (hidden, table, bias), want, strict=True):
        np.testing.assert_allclose(oracle.by_differences(f, x), w, atol=1e-8)


def test_agrees_with_optax(rng):
    hidden, table, labels = draw(rng, 11, 17, 4)
    dense = optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, labels)
    close(run(ops.linear_cross_entropy, hidden, table, labels), dense, 2e-6)


@pytest.mark.parametrize("blocks", SMALL)
def test_nothing_valid(rng, blocks):
    hidden, table, labels = draw(rng, 6, 9, 3)
    valid = jnp.zeros(6, bool)

    def both(hidden, table, weights):
        mean = jax.value_and_grad(
            lambda h, t, w: ops.mean_linear_cross_entropy(h, t, labels, valid=valid, weights=w),
            (0, 1, 2),
        )
        losses = ops.linear_cross_entropy(hidden, table, labels, valid=valid)
        return *mean(hidden, table, weights), losses

    with tiling(blocks):
        mean, grads, losses = run(both, hidden * jnp.nan, table, jnp.ones(6))
    assert float(mean) == 0
    for x in (losses, *grads):
        np.testing.assert_array_equal(x, np.zeros(x.shape))


def test_weights_that_sum_to_zero_give_zero(rng):
    hidden, table, labels = draw(rng, 6, 9, 3)
    weights = jnp.zeros(6)
    mean, grads = pulled(
        lambda h, t: ops.mean_linear_cross_entropy(h, t, labels, weights=weights),
        (hidden, table),
        np.float32(1),
    )
    assert float(mean) == 0
    assert not any(np.asarray(g).any() for g in grads)


@pytest.mark.parametrize("blocks", SMALL)
def test_a_label_outside_the_catalogue_gives_nan(rng, blocks):
    hidden, table, labels = draw(rng, 6, 9, 3)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(labels):
        losses, pull = jax.vjp(lambda h, t: ops.linear_cross_entropy(h, t, labels), hidden, table)
        mean = jax.value_and_grad(ops.mean_linear_cross_entropy, (0, 1))(hidden, table, labels)
        return losses, pull(jnp.ones(6)), *mean

    for label in (-1, 9, 2**31 - 1, -(2**31)):
        labels = labels.at[2].set(label)
        with tiling(blocks):
            losses, (d_hidden, d_table), value, (m_hidden, m_table) = both(labels)
        want = oracle.losses(double(hidden), double(table), np.asarray(labels))
        assert np.isnan(want[2])
        np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-6)
        assert np.isnan(value)
        for g in (d_hidden, m_hidden):
            assert np.isnan(g[2]).all()
            assert np.isfinite(np.delete(np.asarray(g), 2, 0)).all()
        assert np.isnan(d_table).all()
        assert np.isnan(m_table).all()


@pytest.mark.parametrize("blocks", SMALL)
def test_logits_of_ten_thousand_stay_finite(rng, blocks):
    hidden, table, labels = draw(rng, 9, 14, 4, scale=70.0)
    assert np.abs(double(hidden) @ double(table).T).max() > 1e4
    exact = (double(hidden), double(table), np.asarray(labels))
    cotangent = np.full(9, 1 / 9)

    def both(hidden, table):
        each = jax.value_and_grad(
            lambda h, t: ops.linear_cross_entropy(h, t, labels).mean(), (0, 1)
        )
        mean = jax.value_and_grad(ops.mean_linear_cross_entropy, (0, 1))
        return each(hidden, table), mean(hidden, table, labels)

    want = oracle.gradients(*exact, cotangent)
    with tiling(blocks):
        results = run(both, hidden, table)
    for value, grads in results:
        np.testing.assert_allclose(value, oracle.losses(*exact).mean(), rtol=1e-5)
        close(grads[0], want[0], 2e-2)
        close(grads[1], want[1], 2e-2)


@pytest.mark.parametrize("blocks", SMALL)
def test_bias_of_minus_infinity_removes_items(rng, blocks):
    hidden, table, labels = draw(rng, 9, 14, 4)
    labels = labels % 7
    bias = jnp.asarray(np.where(np.arange(14) < 7, rng.normal(size=14), -np.inf), jnp.float32)

    g = rng.normal(size=9).astype(np.float32)

    def both(hidden, table, bias):
        losses, pull = jax.vjp(
            lambda h, t, b: ops.linear_cross_entropy(h, t, labels, bias=b), hidden, table, bias
        )
        mean = jax.grad(
            lambda h, t, b: ops.mean_linear_cross_entropy(h, t, labels, bias=b), (0, 1, 2)
        )
        return losses, pull(g), mean(hidden, table, bias)

    with tiling(blocks):
        losses, grads, mean_grads = run(both, hidden, table, bias)
    exact = (double(hidden), double(table[:7]), np.asarray(labels))
    few = {"bias": double(bias[:7])}
    near(losses, oracle.losses(*exact, **few), 2e-6)
    for got, c in ((grads, g), (mean_grads, np.full(9, 1 / 9))):
        d_hidden, d_table, d_bias = oracle.gradients(*exact, c, **few)
        near(got[0], d_hidden, 5e-6)
        near(got[1], np.concatenate([d_table, np.zeros_like(d_table)]), 5e-6)
        near(got[2], np.concatenate([d_bias, np.zeros_like(d_bias)]), 5e-6)


def test_only_item_of_the_catalogue_costs_nothing(rng):
    hidden, table, labels = draw(rng, 5, 1, 3)
    losses, grads = pulled(
        lambda h, t: ops.linear_cross_entropy(h, t, labels), (hidden, table), np.ones(5, np.float32)
    )
    np.testing.assert_allclose(losses, np.zeros(5), atol=1e-6)
    for g in grads:
        np.testing.assert_allclose(g, np.zeros(g.shape), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_no_positions(smoothing):
    hidden, table = jnp.zeros((0, 4)), jnp.ones((5, 4))
    labels = jnp.zeros((0,), jnp.int32)

    def f(table):
        losses = ops.linear_cross_entropy(hidden, table, labels, label_smoothing=smoothing)
        assert losses.shape == (0,)
        return losses.sum() + ops.mean_linear_cross_entropy(
            hidden, table, labels, label_smoothing=smoothing
        )

    value, (grad,) = pulled(f, (table,), np.float32(1))
    assert float(value) == 0
    assert not np.asarray(grad).any()


@pytest.mark.parametrize("blocks", SMALL)
def test_bfloat16_gradients_are_summed_in_float32(blocks):
    """Each position adds less than bfloat16 can add to what is there already."""
    positions, items = 1200, 2
    hidden = jnp.ones((positions, 1), jnp.bfloat16)
    table = jnp.zeros((items, 1), jnp.bfloat16)
    labels = jnp.zeros((positions,), jnp.int32)

    def both(table):
        each = jax.grad(lambda t: ops.linear_cross_entropy(hidden, t, labels).sum())
        mean = jax.grad(lambda t: ops.mean_linear_cross_entropy(hidden, t, labels) * positions)
        return each(table), mean(table)

    with tiling(blocks):
        grads = run(both, table)
    for grad in grads:
        np.testing.assert_allclose(np.asarray(grad, np.float32)[:, 0], [-600, 600], rtol=4e-3)


@pytest.mark.parametrize("kind", ["int8", "uint32", "int64"])
def test_labels_of_any_integer_type(rng, kind):
    hidden, table, labels = draw(rng, 6, 9, 3)
    got = run(ops.linear_cross_entropy, hidden, table, np.asarray(labels).astype(kind))
    want = oracle.losses(double(hidden), double(table), np.asarray(labels))
    close(got, want, 2e-6)


def loss_and_gradients(f):
    def g(hidden, table, labels):
        losses, pull = jax.vjp(lambda h, t: f(h, t, labels), hidden, table)
        return losses, *pull(jnp.cos(losses))

    return g


def in_scan(f):
    def g(hidden, table, labels):
        def step(carry, row):
            return carry, loss_and_gradients(f)(row[0][None], table, row[1][None])

        _, (losses, d_hidden, d_table) = jax.lax.scan(step, 0, (hidden, labels))
        return losses[:, 0], d_hidden[:, 0], d_table.sum(0)

    return g


def over_mesh(f, check_vma):
    """Positions over four devices, the table on each of them."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def g(hidden, table, labels):
        sharded = jax.shard_map(
            f, mesh=mesh, in_specs=(rows, whole, rows), out_specs=rows, check_vma=check_vma
        )
        return loss_and_gradients(sharded)(hidden, table, labels)

    return g


def by_pmap(f, hidden, table, labels):
    def split(x):
        return x.reshape(4, -1, *x.shape[1:])

    losses, d_hidden, d_table = jax.pmap(loss_and_gradients(f), in_axes=(0, None, 0))(
        split(hidden), table, split(labels)
    )
    return losses.reshape(-1), d_hidden.reshape(hidden.shape), d_table.sum(0)


def by_vmap(f):
    def g(hidden, table, labels):
        rows = jax.vmap(f, in_axes=(0, None, 0))
        losses, d_hidden, d_table = loss_and_gradients(rows)(
            hidden.reshape(4, -1, hidden.shape[1]), table, labels.reshape(4, -1)
        )
        return losses.reshape(-1), d_hidden.reshape(hidden.shape), d_table

    return g


TRANSFORMATIONS = {
    "eager": lambda f, *x: loss_and_gradients(f)(*x),
    "jit": lambda f, *x: run(loss_and_gradients(f), *x),
    "remat": lambda f, *x: run(loss_and_gradients(jax.checkpoint(f)), *x),
    "vmap": lambda f, *x: run(by_vmap(f), *x),
    "scan": lambda f, *x: run(in_scan(f), *x),
    "shard_map": lambda f, *x: run(over_mesh(f, True), *x),
    "shard_map unchecked": lambda f, *x: run(over_mesh(f, False), *x),
    "pmap": by_pmap,
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformations(rng, transformation):
    hidden, table, labels = draw(rng, 20, 13, 4)
    bias = jnp.asarray(rng.normal(size=13), jnp.float32)
    f = functools.partial(ops.linear_cross_entropy, bias=bias, label_smoothing=0.1)
    exact = (double(hidden), double(table), np.asarray(labels))
    options = {"bias": double(bias), "label_smoothing": 0.1}
    want = oracle.losses(*exact, **options)
    with tiling("small"):
        losses, *grads = TRANSFORMATIONS[transformation](f, hidden, table, labels)
    close(losses, want, 2e-6)
    for got, w in zip(grads, oracle.gradients(*exact, np.cos(want), **options)[:2], strict=True):
        close(got, w, 5e-6)


@pytest.mark.parametrize(
    ("way", "blocks"),
    [
        *((w, "small") for w in ("jit", "remat", "vmap", "scan", "shard_map")),
        ("shard_map", SMALL[1]),
    ],
)
def test_transformations_of_the_mean(rng, way, blocks):
    """The mean of four parts with their own weights, each way of taking it."""
    hidden, table, labels = draw(rng, 24, 13, 4)
    valid = jnp.asarray(rng.random(24) > 0.4)
    weights = jnp.asarray(rng.random(24) + 0.1, jnp.float32)
    parts = [x.reshape(4, 6, *x.shape[1:]) for x in (hidden, labels, valid, weights)]

    def one(hidden, labels, valid, weights, table):
        return ops.mean_linear_cross_entropy(hidden, table, labels, valid=valid, weights=weights)

    def part(hidden, labels, valid, weights, table):
        mean = one(hidden, labels, valid, weights, table)
        share = jnp.where(valid, weights, 0.0).sum()
        return mean * share, share

    def total(hidden, table):
        rows = (hidden.reshape(parts[0].shape), *parts[1:])
        if way in ("jit", "remat"):
            f = jax.checkpoint(one) if way == "remat" else one
            return f(hidden, labels, valid, weights, table)
        if way == "vmap":
            sums, shares = jax.vmap(part, in_axes=(0, 0, 0, 0, None))(*rows, table)
        elif way == "scan":

            def step(carry, x):
                return carry, part(*x, table)

            sums, shares = jax.lax.scan(step, 0, rows)[1]
        else:
            mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
            split, whole = PartitionSpec("data"), PartitionSpec()

            def summed(*x):
                return jax.lax.psum(part(*x), "data")

            sums, shares = jax.shard_map(
                summed, mesh=mesh, in_specs=(split,) * 4 + (whole,), out_specs=whole
            )(hidden, labels, valid, weights, table)
        return sums.sum() / shares.sum()

    with tiling(blocks):
        value, grads = pulled(total, (hidden, table), np.float32(1))
    exact = (double(hidden), double(table), np.asarray(labels))
    w = np.where(valid, double(weights), 0)
    np.testing.assert_allclose(value, w @ oracle.losses(*exact) / w.sum(), rtol=2e-6)
    for got, want in zip(grads, oracle.gradients(*exact, w / w.sum())[:2], strict=True):
        close(got, want, 5e-6)


@pytest.mark.parametrize("f", [ops.linear_cross_entropy, ops.mean_linear_cross_entropy])
def test_second_derivatives(rng, f):
    """Forward over reverse, as curvature products need it."""
    hidden, table, labels = draw(rng, 6, 9, 3)
    direction = jnp.asarray(rng.normal(size=table.shape), jnp.float32)

    def gradient(table):
        return jax.grad(lambda t: f(hidden, t, labels).mean())(table)

    _, product = run(lambda t: jax.jvp(gradient, (t,), (direction,)), table)
    cotangent = np.full(6, 1 / 6)
    step = 1e-5
    up, down = (
        oracle.gradients(
            double(hidden), double(table) + s * double(direction), np.asarray(labels), cotangent
        )[1]
        for s in (step, -step)
    )
    close(product, (up - down) / (2 * step), 1e-4)


@pytest.mark.parametrize("blocks", SMALL)
def test_second_derivatives_of_the_valid_positions_alone(rng, blocks):
    """A loop that ends early has forward mode, too."""
    hidden, table, labels = draw(rng, 20, 9, 3)
    valid = jnp.asarray(rng.random(20) > 0.6)
    direction = jnp.asarray(rng.normal(size=table.shape), jnp.float32)

    def product(hidden, labels, **options):
        def gradient(table):
            return jax.grad(ops.mean_linear_cross_entropy, 1)(hidden, table, labels, **options)

        return run(lambda t: jax.jvp(gradient, (t,), (direction,)), table)[1]

    with tiling(blocks):
        close(product(hidden, labels, valid=valid), product(hidden[valid], labels[valid]), 5e-6)


@functools.cache
def claims(positions, items, smoothing, blocks):
    """Compiled: results that the properties relate to each other."""

    def f(hidden, table, labels, bias, valid, order, place):
        options = {"label_smoothing": smoothing}
        each = functools.partial(ops.linear_cross_entropy, **options)
        mean = functools.partial(ops.mean_linear_cross_entropy, valid=valid, **options)
        return {
            "losses": each(hidden, table, labels, bias=bias),
            "bias shifted": each(hidden, table, labels, bias=bias + 3),
            "items permuted": each(hidden, table[order], place[labels], bias=bias[order]),
            "masked": each(hidden, table, labels, bias=bias, valid=valid),
            "mean": mean(hidden, table, labels, bias=bias),
            "d_bias": jax.grad(lambda b: mean(hidden, table, labels, bias=b))(bias),
        }

    with tiling(blocks):
        specs = (
            *(jax.ShapeDtypeStruct((n, 3), jnp.float32) for n in (positions, items)),
            jax.ShapeDtypeStruct((positions,), jnp.int32),
            jax.ShapeDtypeStruct((items,), jnp.float32),
            jax.ShapeDtypeStruct((positions,), jnp.bool_),
            *[jax.ShapeDtypeStruct((items,), jnp.int32)] * 2,
        )
        return jax.jit(f, compiler_options=QUICK).lower(*specs).compile()


@settings(max_examples=30, deadline=None)
@given(
    case=st.sampled_from([(7, 16, 0.0, "small"), (9, 11, 0.25, "small_two_pass")]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    kept=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_properties(case, scale, kept, seed):
    positions, items, *_ = case
    rng = np.random.default_rng(seed)
    hidden, table, labels = draw(rng, positions, items, 3, scale=scale)
    bias = jnp.asarray(rng.normal(size=items), jnp.float32)
    valid = jnp.asarray(rng.random(positions) < kept)
    order = rng.permutation(items).astype(np.int32)
    place = np.argsort(order).astype(np.int32)
    got = claims(*case)(hidden, table, labels, bias, valid, jnp.asarray(order), jnp.asarray(place))
    losses = np.asarray(got["losses"])
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * scale**2 + 1e-5}
    if case[2] == 0:
        assert (losses >= -1e-6).all()
    np.testing.assert_allclose(got["bias shifted"], losses, **tolerance)
    np.testing.assert_allclose(got["items permuted"], losses, **tolerance)
    np.testing.assert_allclose(got["masked"], np.where(valid, losses, 0), **tolerance)
    want = losses[np.asarray(valid)].mean() if valid.any() else 0.0
    np.testing.assert_allclose(got["mean"], want, **tolerance)
    # The shares of the items sum to one whatever the position, and so do its targets.
    np.testing.assert_allclose(got["d_bias"].sum(), 0, atol=1e-5)


def test_statistics_of_disjoint_sets_of_items_combine(rng):
    """The seam for a catalogue that is spread over devices."""
    hidden, table, labels = draw(rng, 7, 12, 3)

    def both(hidden, table, labels):
        problem = _catalogue_loss.clean(hidden, table, None, labels, jnp.ones(7, bool))
        whole = _catalogue_loss.statistics(problem, _catalogue_loss.Blocks(7, 12))
        logits = hidden @ table.T
        parts = [
            _catalogue_loss.block_statistics(logits[:, begin:end], labels - begin)
            for begin, end in ((0, 5), (5, 6), (6, 12))
        ]
        together = functools.reduce(_catalogue_loss.combine, parts)
        lse = map(_catalogue_loss.log_sum_exp, (whole, together))
        return *lse, whole.target, together.target, logits

    whole, together, target, together_target, logits = run(both, hidden, table, labels)
    close(together, whole, 1e-6)
    close(together_target, target, 1e-6)
    close(target, double(logits)[np.arange(7), np.asarray(labels)], 1e-6)


@pytest.mark.parametrize("blocks", ["small", "small_two_pass"])
def test_only_blocks_with_a_valid_position_are_computed(rng, monkeypatch, blocks):
    """Of 40 positions 9 are valid: three blocks of four in every loop over them."""
    computed = []

    def counted(hidden, table, bias, logits=_catalogue_loss._logits):
        jax.debug.callback(lambda: computed.append(hidden.shape[0]))
        return logits(hidden, table, bias)

    monkeypatch.setattr(_catalogue_loss, "_logits", counted)
    hidden, table, labels = draw(rng, 40, 5, 3)
    valid = jnp.zeros(40, bool).at[jnp.arange(0, 36, 4)].set(True)
    with tiling(blocks):
        both = jax.value_and_grad(ops.mean_linear_cross_entropy, argnums=(0, 1))
        jax.block_until_ready(
            run(functools.partial(both, labels=labels, valid=valid), hidden, table)
        )
        jax.effects_barrier()
    # One pass, or two.
    assert computed == [4] * (3 if blocks == "small" else 6)


@given(valid=st.lists(st.booleans(), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_valid_positions_come_first_in_their_order(valid):
    order = valid_first(jnp.array(valid))
    rows = jnp.arange(len(valid))
    moved = order.sort(rows)
    want = sorted(range(len(valid)), key=lambda p: not valid[p])
    assert moved.tolist() == want
    assert order.restore(moved).tolist() == rows.tolist()
    assert int(order.end) == sum(valid)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 511, 513, 1000, 12_800])
@pytest.mark.parametrize("largest", [1, 3, 8, 512])
def test_balanced_blocks_cover_the_rows_and_repeat_few(count, largest):
    size = _catalogue.balanced(count, largest)
    blocks = -(-count // size)
    assert 1 <= size <= largest
    assert blocks == -(-count // largest)
    assert blocks * size - count < 8 * blocks


@pytest.mark.parametrize("op", [ops.linear_cross_entropy, ops.mean_linear_cross_entropy])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.ones((2, 3, 4))}, r"hidden must have rank 2.*\(2, 3, 4\).*flatten"),
        ({"hidden": jnp.ones(4)}, r"hidden must have rank 2, got shape \(4,\)"),
        ({"hidden": jnp.ones((6, 4), int)}, "hidden must be float32 or bfloat16, got int32"),
        ({"hidden": jnp.ones((6, 4), jnp.float16)}, "hidden must be float32 or bfloat16"),
        ({"hidden": jnp.ones((6, 4), jnp.bfloat16)}, "one dtype, got bfloat16 and float32; cast"),
        ({"item_table": jnp.ones((9, 5))}, "one width, got 4 and 5"),
        ({"item_table": jnp.ones((0, 4))}, "at least one item"),
        ({"item_table": jnp.ones(9)}, "item_table must have rank 2"),
        ({"labels": jnp.ones(6)}, "labels must hold integers, got float32"),
        ({"labels": jnp.ones((6, 1), int)}, r"labels must have shape \(6,\), got \(6, 1\)"),
        ({"bias": jnp.ones(6)}, r"bias must have shape \(9,\), got \(6,\)"),
        ({"bias": jnp.ones(9, int)}, "bias must be float32"),
        ({"valid": jnp.ones(5, bool)}, r"valid must have shape \(6,\), got \(5,\)"),
        ({"valid": jnp.ones(6)}, "valid must be bool, got float32"),
        ({"label_smoothing": -0.1}, "from 0 to 1, got -0.1"),
        ({"label_smoothing": 1.5}, "from 0 to 1, got 1.5"),
        ({"label_smoothing": jnp.float32(0.1)}, "must be a Python number"),
        (
            {
                "implementation": "pallas",
                "hidden": jnp.ones((6, 300)),
                "item_table": jnp.ones((9, 300)),
            },
            "'pallas' cannot run: the kernel takes a width of at most 256, got 300",
        ),
        ({"implementation": "cuda"}, "'xla', 'pallas' or None|got 'cuda'"),
    ],
)
def test_what_does_not_fit_raises_while_tracing(op, change, message):
    call = {
        "hidden": jnp.ones((6, 4)),
        "item_table": jnp.ones((9, 4)),
        "labels": jnp.zeros(6, int),
        **change,
    }
    arrays = [call.pop(name) for name in ("hidden", "item_table", "labels")]
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda *a: op(*a, **call), *arrays)
    assert str(error.value).startswith(op.__name__)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (jnp.ones(5), r"weights must have shape \(6,\), got \(5,\)"),
        (jnp.ones(6, int), "weights must be float32 or bfloat16, got int32"),
    ],
)
def test_weights_that_do_not_fit(weights, message):
    with pytest.raises(ValueError, match=message):
        ops.mean_linear_cross_entropy(
            jnp.ones((6, 4)), jnp.ones((9, 4)), jnp.zeros(6, int), weights=weights
        )


def test_a_forced_implementation_runs(rng):
    hidden, table, labels = draw(rng, 6, 9, 3)
    f = functools.partial(ops.linear_cross_entropy, implementation="xla")
    want = oracle.losses(double(hidden), double(table), np.asarray(labels))
    close(run(f, hidden, table, labels), want, 2e-6)


def temporaries(f, *specs):
    return jax.jit(f).lower(*specs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("op", [ops.linear_cross_entropy, ops.mean_linear_cross_entropy])
def test_a_million_items_need_little_memory(op):
    """The issue's bar, on this host: temporaries of the gradient below 0.5 GB."""
    hidden = jax.ShapeDtypeStruct((25_600, 64), jnp.float32)
    table = jax.ShapeDtypeStruct((1_000_000, 64), jnp.float32)
    labels = jax.ShapeDtypeStruct((25_600,), jnp.int32)
    f = jax.grad(lambda *x: op(*x).mean(), (0, 1))
    assert temporaries(f, hidden, table, labels) < 0.1e9


def test_one_pass_holds_one_block_of_logits():
    hidden = jax.ShapeDtypeStruct((12_800, 64), jnp.float32)
    table = jax.ShapeDtypeStruct((3_416, 64), jnp.float32)
    labels = jax.ShapeDtypeStruct((12_800,), jnp.int32)
    f = jax.grad(ops.mean_linear_cross_entropy, (0, 1))
    block = 4 * 512 * 3_416
    assert temporaries(f, hidden, table, labels) < 1.2 * block + 3 * 4 * 64 * (12_800 + 3_416)


def primitives(f, items):
    """Products and exponentials per logit in a gradient's program; a loop's body counts once."""
    counts = {}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name == "dot_general" or (
                name == "exp" and len(equation.outvars[0].aval.shape) == 2
            ):
                counts[name] = counts.get(name, 0) + 1
            if name == "cond":  # one branch a platform, alike but for the size of blocks
                visit(equation.params["branches"][0].jaxpr)
                continue
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    specs = (
        jax.ShapeDtypeStruct((1_024, 8), jnp.float32),
        jax.ShapeDtypeStruct((items, 8), jnp.float32),
        jax.ShapeDtypeStruct((1_024,), jnp.int32),
    )
    visit(jax.make_jaxpr(jax.grad(lambda *x: f(*x), (0, 1)))(*specs).jaxpr)
    return counts


def test_the_mean_uses_three_products_and_one_exponential():
    mean = ops.mean_linear_cross_entropy
    largest = loss_module.CPU_TILING.one_pass_logits // loss_module.ONE_PASS_POSITIONS
    assert primitives(mean, 3_416) == {"dot_general": 3, "exp": 1}
    assert primitives(mean, largest) == {"dot_general": 3, "exp": 1}
    assert primitives(mean, largest + 1) == {"dot_general": 4, "exp": 2}
    # These tests mean to run both ways.
    with tiling("small"):
        assert primitives(mean, 20) == {"dot_general": 3, "exp": 1}
    with tiling("small_two_pass"):
        assert primitives(mean, 20) == {"dot_general": 4, "exp": 2}
