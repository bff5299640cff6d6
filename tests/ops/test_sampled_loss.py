"""sampled_softmax_loss, bce_loss and gbce_loss against float64, and their promises."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_cases import QUICK, close, double, draw, pulled, run
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from oracles import linear_cross_entropy as full_oracle
from oracles import sampled_loss as oracle

from jaxrec import ops

module = sys.modules[ops.gbce_loss.__module__]
OPS = {
    "softmax": ops.sampled_softmax_loss,
    "bce": ops.bce_loss,
    "gbce": functools.partial(ops.gbce_loss, t=0.6),
}
# Errors relative to the largest element, gradients in bfloat16 having 8 bits.
GRADIENT = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Four or so positions a block, and a ragged one."""
    monkeypatch.setattr(module, "CPU_ELEMENTS", 100)


def choose(monkeypatch, way):
    """Own negatives through the catalogue ("dense") or by gathered rows."""
    monkeypatch.setattr(module, "GATHER_COST", 1000 if way == "dense" else 0)


def exact(kind):
    return ("softmax" if kind == "softmax" else "bce"), {"t": 0.6} if kind == "gbce" else {}


def negatives_of(rng, positions, items, count, way):
    """With padding, repetitions and ids of no item."""
    shape = (count,) if way == "shared" else (positions, count)
    ids = rng.integers(0, items, shape)
    ids = np.where(rng.random(shape) < 0.1, -1, ids)
    return np.where(rng.random(shape) > 0.95, items + 2, ids).astype(np.int32)


def all_options(rng, positions, items, negatives, kind):
    exclude = rng.integers(-1, items + 2, (positions, 2)).astype(np.int32)
    options = {
        "temperature": 0.7,
        "mask_collisions": True,
        "exclude": exclude,
        "valid": np.arange(positions) % 4 > 0,
    }
    if kind == "softmax":
        options["log_q"] = rng.normal(size=negatives.shape).astype(np.float32)
        options["log_q_labels"] = rng.normal(size=positions).astype(np.float32)
    return options


@pytest.mark.parametrize("way", ["shared", "gathered", "dense"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(rng, monkeypatch, way, dtype):
    """Each loss plain, and with all of its options, in one program."""
    choose(monkeypatch, way)
    hidden, table, labels = draw(rng, 11, 9, 5, dtype)
    negatives = negatives_of(rng, 11, 9, 6, way)
    negatives[..., 1] = 3
    labels = labels.at[2].set(3)
    g = rng.normal(size=11).astype(np.float32)
    cases = {}
    for kind in OPS:
        cases[kind, "plain"] = {}
        cases[kind, "all"] = all_options(rng, 11, 9, negatives, kind)

    def everything(hidden, table):
        results = {}
        for (kind, name), options in cases.items():
            loss = functools.partial(OPS[kind], labels=labels, negatives=negatives, **options)
            out, pull = jax.vjp(loss, hidden, table)
            results[kind, name] = out, pull(jnp.asarray(g))
        return results

    arrays = double(hidden), double(table), np.asarray(labels), negatives
    for case, (losses, grads) in run(everything, hidden, table).items():
        kind, calibration = exact(case[0])
        options = cases[case] | calibration
        assert losses.dtype == jnp.float32
        close(losses, oracle.losses(kind, *arrays, **options), 3e-6, case)
        want = oracle.gradients(kind, *arrays, g, **options)
        for got, w in zip(grads, want, strict=True):
            assert got.dtype == dtype
            close(got, w, GRADIENT[dtype], case)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_oracle_gradients_are_those_of_the_oracle_losses(rng, kind):
    hidden, table, labels = (np.asarray(x) for x in draw(rng, 4, 6, 3))
    hidden, table = double(hidden), double(table)
    negatives, g = rng.integers(0, 6, (4, 5)), rng.normal(size=4)
    options = {"temperature": 0.5, "mask_collisions": True, "t": 0.3}
    want = oracle.gradients(kind, hidden, table, labels, negatives, g, **options)
    of = (
        lambda x: g @ oracle.losses(kind, x, table, labels, negatives, **options),
        lambda x: g @ oracle.losses(kind, hidden, x, labels, negatives, **options),
    )
    for f, x, w in zip(of, (hidden, table), want, strict=True):
        np.testing.assert_allclose(full_oracle.by_differences(f, x), w, atol=1e-8)


def test_calibration():
    """Check values of the card, and the identities it gives."""
    assert module.gbce_power(256, 3416, 0.75) == pytest.approx(0.306223, abs=1e-6)
    assert module.gbce_power(256, 12101, 0.75) == pytest.approx(0.265868, abs=1e-6)
    assert module.gbce_power(1, 77, 0.0) == 1
    assert module.gbce_power(256, 3416, 1.0) == pytest.approx(256 / 3415)
    # More negatives than items calibrate as all items do; one item alone has no negatives.
    assert module.gbce_power(500, 3, 1.0) == module.gbce_power(1, 1, 0.7) == 1
    assert module.gbce_power(256, 3416, 0.75) == pytest.approx(oracle.beta(256, 3416, 0.75))


def test_without_calibration_it_is_bce(rng):
    hidden, table, labels = draw(rng, 5, 7, 3)
    negatives = rng.integers(0, 7, (5, 2))
    plain = ops.bce_loss(hidden, table, labels, negatives)
    np.testing.assert_array_equal(ops.gbce_loss(hidden, table, labels, negatives, t=0.0), plain)
    s = np.einsum("pd,pkd->pk", hidden, np.asarray(table)[np.c_[labels, negatives]])
    by_hand = -np.log(1 / (1 + np.exp(-s[:, 0]))) - np.log(1 - 1 / (1 + np.exp(-s[:, 1:]))).sum(1)
    np.testing.assert_allclose(plain, by_hand / 3, rtol=1e-5)


@pytest.mark.parametrize("way", ["shared", "gathered", "dense"])
def test_all_items_as_negatives_give_the_full_cross_entropy(rng, monkeypatch, way):
    choose(monkeypatch, way)
    hidden, table, labels = draw(rng, 10, 13, 4)
    negatives = np.arange(13) if way == "shared" else np.tile(np.arange(13), (10, 1))
    cotangent = rng.normal(size=10).astype(np.float32)
    got = pulled(
        lambda h, t: ops.sampled_softmax_loss(h, t, labels, negatives, mask_collisions=True),
        (hidden, table),
        cotangent,
    )
    want = pulled(lambda h, t: ops.linear_cross_entropy(h, t, labels), (hidden, table), cotangent)
    jax.tree.map(lambda a, b: close(a, b, 3e-6), got, want)


def test_corrected_negatives_estimate_the_full_sum(rng):
    """Weighted draws without correction are far off, corrected ones near."""
    hidden, table, labels = draw(rng, 4, 50, 3, scale=0.7)
    weights = jnp.asarray(rng.random(50) ** 3 + 0.01, jnp.float32)
    count = 20_000
    ids = ops.sample_items(jax.random.key(0), 50, (count,), weights=weights)
    log_q = jnp.log(count * weights / weights.sum())[ids]
    ids, log_q = np.asarray(ids), np.asarray(log_q)
    logits = double(hidden) @ double(table).T
    # The label stands beside its negatives: the sum is that over all items, and it once more.
    own = logits[np.arange(4), np.asarray(labels)]
    want = np.log(np.exp(logits).sum(1) + np.exp(own)) - own
    got = run(lambda h, t: ops.sampled_softmax_loss(h, t, labels, ids, log_q=log_q), hidden, table)
    np.testing.assert_allclose(got, want, atol=0.03)


@functools.cache
def claims(way):
    """Compiled: value and gradients with some positions invalid, and of the valid ones alone."""

    def f(kept, hidden, table, labels, negatives, valid):
        results = {}
        for kind, op in OPS.items():

            def loss(hidden, table, keep=False, op=op):
                # "Alone": what is invalid becomes a copy of a valid position with weight 0.
                rows = jnp.where(valid, jnp.arange(valid.size), kept) if keep else slice(None)
                own = negatives[rows] if negatives.ndim == 2 else negatives
                mask = None if keep else valid
                out = op(hidden[rows], table, labels[rows], own, valid=mask)
                return jnp.where(valid, out, 0.0).sum()

            results[kind] = [
                jax.value_and_grad(functools.partial(loss, keep=keep), (0, 1))(hidden, table)
                for keep in (False, True)
            ]
        return results

    return jax.jit(f, compiler_options=QUICK)


@settings(max_examples=15, deadline=None)
@given(
    shared=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    keep=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_invalid_positions_change_nothing(shared, scale, keep, seed):
    rng = np.random.default_rng(seed)
    hidden, table, labels = draw(rng, 7, 9, 3, scale=scale)
    negatives = jnp.asarray(negatives_of(rng, 7, 9, 4, "shared" if shared else "own"))
    valid = rng.random(7) < keep
    kept = int(valid.argmax())
    valid[kept] = True
    results = claims(shared)(kept, hidden, table, labels, negatives, jnp.asarray(valid))
    for masked, alone in results.values():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale),
            masked,
            alone,
        )


@pytest.mark.parametrize("way", ["shared", "gathered", "dense"])
def test_a_label_outside_the_catalogue_gives_nan(rng, monkeypatch, way):
    choose(monkeypatch, way)
    hidden, table, labels = draw(rng, 6, 9, 3)
    negatives = negatives_of(rng, 6, 9, 4, way)
    f = jax.jit(
        lambda labels: jax.vjp(
            lambda h: ops.sampled_softmax_loss(h, table, labels, negatives), hidden
        )[0],
        compiler_options=QUICK,
    )
    for label in (-1, 9, 2**31 - 1, -(2**31)):
        losses = np.asarray(f(labels.at[2].set(label)))
        assert np.isnan(losses[2])
        assert np.isfinite(np.delete(losses, 2)).all()


def test_everything_left_out_costs_nothing(rng):
    hidden, table, labels = draw(rng, 3, 5, 3)
    losses, grads = pulled(
        lambda h, t: ops.sampled_softmax_loss(
            h, t, labels, labels[:, None].repeat(4, 1), mask_collisions=True
        ),
        (hidden, table),
        np.ones(3, np.float32),
    )
    for x in (losses, *grads):
        np.testing.assert_allclose(x, np.zeros(x.shape), atol=1e-6)


def test_large_logits_stay_finite(rng):
    hidden, table, labels = draw(rng, 6, 9, 4, scale=70.0)
    negatives = rng.integers(0, 9, (6, 4))

    def everything(hidden, table):
        return [
            jax.value_and_grad(lambda h, t, op=op: op(h, t, labels, negatives).sum(), (0, 1))(
                hidden, table
            )
            for op in OPS.values()
        ]

    for value, grads in run(everything, hidden, table):
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_no_positions(op):
    table = jnp.ones((5, 4))
    for shape in ((0, 3), (3,)):
        negatives = jnp.zeros(shape, jnp.int32)
        f = functools.partial(op, labels=jnp.zeros(0, jnp.int32), negatives=negatives)
        losses, (d_table,) = pulled(
            lambda t, f=f: f(jnp.zeros((0, 4)), t), (table,), np.zeros(0, np.float32)
        )
        assert losses.shape == (0,)
        assert not np.asarray(d_table).any()


def test_bfloat16_gradients_are_summed_in_float32():
    """Each position adds less than bfloat16 can add to what is there already."""
    hidden, table = jnp.ones((1200, 1), jnp.bfloat16), jnp.zeros((2, 1), jnp.bfloat16)
    labels = jnp.zeros(1200, jnp.int32)

    def both(table):
        return [
            jax.grad(lambda t, n=n: ops.sampled_softmax_loss(hidden, t, labels, n).sum())(table)
            for n in (jnp.ones(1, jnp.int32), jnp.ones((1200, 1), jnp.int32))
        ]

    for grad in run(both, table):
        np.testing.assert_allclose(np.asarray(grad, np.float32)[:, 0], [-600, 600], rtol=4e-3)


def over_mesh(f, mesh_negatives):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = (rows, whole, rows, rows if mesh_negatives else whole)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=rows)


def by_vmap(f, own):
    def g(hidden, table, labels, negatives):
        def split(x):
            return x.reshape(2, -1, *x.shape[1:])

        rows = jax.vmap(f, in_axes=(0, None, 0, 0 if own else None))
        given = split(negatives) if own else negatives
        return rows(split(hidden), table, split(labels), given).reshape(-1)

    return g


@pytest.mark.parametrize("way", ["shared", "gathered", "dense"])
@pytest.mark.parametrize("transformation", ["vmap", "remat", "shard_map"])
def test_transformations(rng, monkeypatch, way, transformation):
    choose(monkeypatch, way)
    hidden, table, labels = draw(rng, 12, 9, 4)
    negatives = negatives_of(rng, 12, 9, 5, way)
    f, own = ops.sampled_softmax_loss, way != "shared"
    changed = {
        "vmap": by_vmap(f, own),
        "remat": jax.checkpoint(f),
        "shard_map": over_mesh(f, own),
    }[transformation]
    g = rng.normal(size=12).astype(np.float32)
    arrays = double(hidden), double(table), np.asarray(labels), negatives
    losses, grads = pulled(
        lambda h, t: changed(h, t, labels, jnp.asarray(negatives)), (hidden, table), g
    )
    close(losses, oracle.losses("softmax", *arrays), 3e-6)
    for got, want in zip(grads, oracle.gradients("softmax", *arrays, g), strict=True):
        close(got, want, 5e-6)


def test_no_array_of_positions_negatives_and_width():
    """The gradient's temporaries: about one block, and the table's gradient."""
    shape = {"P": 4_000, "K": 200, "D": 64, "V": 20_000}
    f = jax.grad(lambda h, t, y, n: ops.sampled_softmax_loss(h, t, y, n).sum(), (0, 1))
    specs = (
        jax.ShapeDtypeStruct((shape["P"], shape["D"]), jnp.float32),
        jax.ShapeDtypeStruct((shape["V"], shape["D"]), jnp.float32),
        jax.ShapeDtypeStruct((shape["P"],), jnp.int32),
        jax.ShapeDtypeStruct((shape["P"], shape["K"]), jnp.int32),
    )
    compiled = jax.jit(f, compiler_options=QUICK).lower(*specs).compile()
    whole = 4 * shape["P"] * shape["K"] * shape["D"]
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 8


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("bce", {"hidden": jnp.ones((2, 3, 4))}, "hidden must have rank 2"),
        ("bce", {"item_table": jnp.ones((9, 5))}, "one width, got 4 and 5"),
        ("bce", {"labels": jnp.ones(6)}, "labels must hold integers, got float32"),
        ("bce", {"labels": jnp.ones(5, int)}, r"labels must have shape \(6,\), got \(5,\)"),
        ("bce", {"negatives": jnp.ones((6, 2))}, "negatives must hold integers, got float32"),
        ("bce", {"negatives": jnp.ones((5, 2), int)}, r"\(6, K\) .* or \(K,\) .* got \(5, 2\)"),
        ("bce", {"negatives": jnp.ones((6, 2, 1), int)}, r"got \(6, 2, 1\)"),
        ("bce", {"negatives": jnp.ones((6, 0), int)}, "at least one negative"),
        ("softmax", {"log_q": jnp.ones(2)}, r"log_q must have shape \(6, 2\), got \(2,\)"),
        ("softmax", {"log_q_labels": jnp.ones(2)}, r"log_q_labels must have shape \(6,\)"),
        ("softmax", {"log_q": jnp.ones((6, 2), int)}, "log_q must be float32 or bfloat16"),
        ("bce", {"exclude": jnp.ones(6, int)}, r"\(6, ids per position\), got \(6,\)"),
        ("bce", {"exclude": jnp.ones((6, 1))}, "exclude must hold integers"),
        ("bce", {"valid": jnp.ones(6)}, "valid must be bool, got float32"),
        ("bce", {"temperature": 0.0}, "temperature must be a positive Python number, got 0.0"),
        ("bce", {"temperature": float("inf")}, "temperature must be a positive"),
        ("bce", {"mask_collisions": 1}, "mask_collisions must be True or False, got 1"),
        ("gbce", {"t": 1.5}, "t must be a Python number from 0 to 1, got 1.5"),
        ("gbce", {"t": jnp.float32(0.5)}, "t must be a Python number"),
        ("bce", {"implementation": "pallas"}, "there is no Pallas kernel"),
    ],
)
def test_what_does_not_fit_raises_while_tracing(op, change, message):
    op = {"softmax": ops.sampled_softmax_loss, "bce": ops.bce_loss, "gbce": ops.gbce_loss}[op]
    call = {
        "hidden": jnp.ones((6, 4)),
        "item_table": jnp.ones((9, 4)),
        "labels": jnp.zeros(6, int),
        "negatives": jnp.zeros((6, 2), int),
        **change,
    }
    arrays = [call.pop(name) for name in ("hidden", "item_table", "labels", "negatives")]
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda *a: op(*a, **call), *arrays)
    assert str(error.value).startswith(op.__name__)
