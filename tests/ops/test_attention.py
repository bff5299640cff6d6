"""causal_attention against float64 loops, its promises about masks, memory and transformations."""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, pulled, qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from oracles import attention as oracle

from jaxrec.ops import _attention_blockwise, _attention_core, _attention_dropout, causal_attention


def attend(block):
    """The op with the tile size in the test's hand, so that a short row has many tiles."""

    def f(q, k, v, *, valid=None, segment_ids=None, rate=0.0, seeds=None):
        options = _attention_core.Options(q.shape[3] ** -0.5, rate, block)
        valid = None if valid is None else jnp.asarray(valid)
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        inputs = _attention_core.Inputs(q, k, v, valid, segment_ids, seeds)
        return _attention_core.attend(options, inputs)

    return f


def check(f, arrays, d_out, tolerance=2e-5, **masks):
    close(f(*map(jnp.asarray, arrays)), oracle.causal_attention(*arrays, **masks), tolerance, "out")
    wanted = oracle.causal_attention_gradients(*arrays, d_out, **masks)
    for name, got, want in zip("qkv", pulled(f, arrays, d_out), wanted, strict=True):
        close(got, want, tolerance, f"d_{name}")


@pytest.mark.parametrize("pattern", ["plain", "left", "packed_holes"])
def test_oracle_gradients_are_finite_differences(rng, pattern):
    arrays = qkv(rng, 2, 5, 1, 3, 2)
    d_out = cases.draw(rng, 2, 5, 1, 2)
    valid, ids = cases.rows(pattern, 2, 5)

    def total(q, k, v):
        return (oracle.causal_attention(q, k, v, valid=valid, segment_ids=ids) * d_out).sum()

    analytic = oracle.causal_attention_gradients(*arrays, d_out, valid=valid, segment_ids=ids)
    for got, want in zip(analytic, oracle.finite_differences(total, arrays), strict=True):
        close(got, want, 1e-8)


@pytest.mark.parametrize("pattern", cases.PATTERNS)
@pytest.mark.parametrize(
    ("length", "block"), [(1, None), (20, None), (1, 8), (8, 8), (16, 8), (29, 8), (29, 3)]
)
def test_values_and_gradients(rng, pattern, length, block):
    arrays = qkv(rng, 3, length, 2, 4, 3)
    d_out = cases.draw(rng, 3, length, 2, 3)
    valid, ids = cases.rows(pattern, 3, length)
    f = functools.partial(attend(block), valid=valid, segment_ids=ids)
    check(f, arrays, d_out, valid=valid, segment_ids=ids)


@pytest.mark.parametrize(
    ("length", "heads", "pattern"),
    [(97, 1, "left"), (200, 1, "packed_holes"), (150, 4, "packed"), (1030, 1, "packed_holes")],
)
def test_values_and_gradients_at_real_lengths(rng, length, heads, pattern):
    arrays = qkv(rng, 2, length, heads, 8, 8)
    d_out = cases.draw(rng, 2, length, heads, 8)
    valid, ids = cases.rows(pattern, 2, length)
    masks = {"valid": valid, "segment_ids": ids}
    given_masks = {k: None if m is None else jnp.asarray(m) for k, m in masks.items()}
    check(functools.partial(causal_attention, **given_masks), arrays, d_out, 5e-5, **masks)


@pytest.mark.parametrize("length", [200, 1030])
def test_float64_agrees_to_the_last_digits(rng, length):
    arrays = qkv(rng, 1, length, 1, 4, 4, np.float64)
    d_out = cases.draw(rng, 1, length, 1, 4, dtype=np.float64)
    with jax.enable_x64(True):
        check(causal_attention, arrays, d_out, 1e-12)


def test_length_1024_leaves_the_dense_form():
    assert _attention_core.block_for(1023) is None
    assert _attention_core.block_for(1024) is not None


def test_scale(rng):
    arrays = qkv(rng, 1, 9, 1, 4, 4)
    f = functools.partial(causal_attention, scale=0.3)
    check(f, arrays, cases.draw(rng, 1, 9, 1, 4), scale=0.3)
    half = causal_attention(2 * arrays[0], arrays[1], arrays[2], scale=0.15)
    close(half, f(*arrays), 1e-6)


def test_large_logits_do_not_overflow(rng):
    q, k, v = qkv(rng, 1, 40, 1, 4, 4)
    for block in (None, 8):
        out = attend(block)(jnp.asarray(300 * q), jnp.asarray(300 * k), jnp.asarray(v))
        close(out, oracle.causal_attention(300 * q, 300 * k, v), 1e-4)


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_logits_far_from_zero(rng, block, offset):
    """A running maximum that starts at 0, or a masked 0 in place of minus infinity, is seen here."""
    q, k, v = qkv(rng, 1, 20, 1, 4, 4)
    q[..., 0], k[..., 0] = 1.0, 2 * offset
    f = attend(block)
    check(f, (q, k, v), cases.draw(rng, 1, 20, 1, 4), 2e-3)


# Masks


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("pattern", ["left", "right", "packed_holes", "empty_rows"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_invalid_slots_are_read_by_nobody(rng, block, pattern, poison):
    arrays = qkv(rng, 3, 20, 2, 4, 3)
    d_out = cases.draw(rng, 3, 20, 2, 3)
    valid, ids = cases.rows(pattern, 3, 20)
    clean = [np.where(valid[:, :, None, None], x, 0) for x in (*arrays, d_out)]
    dirty = [np.where(valid[:, :, None, None], x, np.float32(poison)) for x in (*arrays, d_out)]
    f = functools.partial(attend(block), valid=valid, segment_ids=ids)
    out = np.asarray(f(*map(jnp.asarray, dirty[:3])))
    np.testing.assert_array_equal(out, f(*map(jnp.asarray, clean[:3])))
    assert (out[~valid] == 0).all()
    for got, want in zip(
        pulled(f, dirty[:3], dirty[3]), pulled(f, clean[:3], clean[3]), strict=True
    ):
        np.testing.assert_array_equal(got, want)
        assert (np.asarray(got)[~valid] == 0).all()


def test_nothing_valid_gives_zeros_and_zero_gradients(rng):
    arrays = qkv(rng, 2, 6, 1, 4, 4)
    valid = jnp.zeros((2, 6), bool)
    f = functools.partial(causal_attention, valid=valid)
    assert (np.asarray(f(*arrays)) == 0).all()
    for g in pulled(f, arrays, np.ones((2, 6, 1, 4), np.float32)):
        assert (np.asarray(g) == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 1, 4), (2, 0, 1, 4), (2, 5, 0, 4)])
def test_empty(shape):
    x = jnp.zeros(shape)
    out, pull = jax.vjp(lambda q: causal_attention(q, q, q), x)
    assert out.shape == shape
    assert pull(out)[0].shape == shape


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(2, 24),
    block=st.sampled_from([None, 5, 8]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_the_future_changes_nothing(length, block, seed, data):
    rng = np.random.default_rng(seed)
    now = data.draw(st.integers(0, length - 2))
    arrays = qkv(rng, 1, length, 1, 4, 4)
    f = attend(block)
    before = np.asarray(f(*map(jnp.asarray, arrays)))
    for x in arrays:
        x[:, now + 1 :] = rng.normal(size=x[:, now + 1 :].shape) * 10
    after = np.asarray(f(*map(jnp.asarray, arrays)))
    np.testing.assert_array_equal(before[:, : now + 1], after[:, : now + 1])
    assert not np.array_equal(before[:, now + 1 :], after[:, now + 1 :])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    block=st.sampled_from([None, 4]),
    seed=st.integers(0, 2**16),
    pad=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_packed_is_separate(lengths, block, seed, pad):
    rng = np.random.default_rng(seed)
    ids = np.repeat(rng.permutation(100)[: len(lengths)] - 50, lengths).astype(np.int32)
    before, after = pad
    valid = np.pad(np.ones(len(ids), bool), pad)[None]
    ids = np.pad(ids, pad, mode="edge")[None]
    arrays = qkv(rng, 1, ids.shape[1], 2, 4, 3)
    out = attend(block)(*map(jnp.asarray, arrays), valid=valid, segment_ids=ids)
    start = before
    for n in lengths:
        own = [x[:, start : start + n] for x in arrays]
        close(out[:, start : start + n], oracle.causal_attention(*own), 2e-5)
        start += n
    assert start + after == ids.shape[1]


def test_blocks_that_share_no_segment_are_skipped():
    ids = jnp.asarray(np.repeat([0, 1, 2, 3], 8)[None].astype(np.int32))
    tiling = _attention_blockwise.tile(32, None, ids, 4)
    np.testing.assert_array_equal(tiling.first, [0, 0, 2, 2, 4, 4, 6, 6])
    np.testing.assert_array_equal(tiling.last, [1, 1, 3, 3, 5, 5, 7, 7])
    plain = _attention_blockwise.tile(32, None, None, 4)
    np.testing.assert_array_equal(plain.first, [0] * 8)
    np.testing.assert_array_equal(plain.last, [7] * 8)


# Precision and memory


@pytest.mark.parametrize("block", [None, 8])
def test_bfloat16(rng, block):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in qkv(rng, 2, 40, 2, 16, 8)]
    d_out = jnp.asarray(cases.draw(rng, 2, 40, 2, 8), jnp.bfloat16)
    f = attend(block)
    out = f(*arrays)
    assert out.dtype == jnp.bfloat16
    exact = [np.asarray(x, np.float64) for x in (*arrays, d_out)]
    close(out, oracle.causal_attention(*exact[:3]), 2**-7)
    wanted = oracle.causal_attention_gradients(*exact)
    for got, want in zip(pulled(f, arrays, d_out), wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        close(got, want, 2**-6)


def test_bfloat16_statistics_are_float32():
    """A sum of 513 equal weights in bfloat16 would stop growing at 256."""
    x = jnp.zeros((1, 513, 1, 4), jnp.bfloat16)
    value = jnp.ones((1, 513, 1, 4), jnp.float32)
    for length in (513, 300):
        out = causal_attention(x[:, :length], x[:, :length], value[:, :length])
        close(out, np.ones(out.shape), 1e-6)


def test_output_takes_the_dtype_of_value(rng):
    q, k, v = qkv(rng, 1, 5, 1, 4, 4)
    assert causal_attention(q, k, jnp.asarray(v, jnp.bfloat16)).dtype == jnp.bfloat16
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k)]
    assert causal_attention(*half, v).dtype == jnp.float32


def test_long_rows_form_no_square():
    x = jax.ShapeDtypeStruct((2, 4096, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def gradients(q, k, v, ids, key):
        def total(q, k, v):
            out = causal_attention(
                q, k, v, segment_ids=ids, valid=ids > 0, dropout_rate=0.1, dropout_key=key
            )
            return out.sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    largest = cases.largest_intermediate(gradients, x, x, x, ids, key)
    assert largest <= 2 * 2 * 256 * 256
    assert largest < 4096 * 4096 / 32


# Dropout


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("pattern", ["plain", "packed_holes"])
def test_dropout_is_the_documented_hash(rng, block, pattern):
    arrays = qkv(rng, 2, 21, 2, 4, 3)
    valid, ids = cases.rows(pattern, 2, 21)
    seeds = _attention_dropout.dropout_seeds(jax.random.key(3))
    kept = oracle.dropout_factors(np.asarray(seeds), 0.3, 2, 2, 21)
    f = functools.partial(attend(block), valid=valid, segment_ids=ids, rate=0.3, seeds=seeds)
    check(f, arrays, cases.draw(rng, 2, 21, 2, 3), valid=valid, segment_ids=ids, kept=kept)


def test_dropout_through_the_public_op(rng):
    arrays = qkv(rng, 2, 21, 2, 4, 3)
    key = jax.random.key(3)
    seeds = np.asarray(_attention_dropout.dropout_seeds(key))
    kept = oracle.dropout_factors(seeds, 0.3, 2, 2, 21)
    f = functools.partial(causal_attention, dropout_rate=0.3, dropout_key=key)
    check(f, arrays, cases.draw(rng, 2, 21, 2, 3), kept=kept)
    legacy = causal_attention(*arrays, dropout_rate=0.3, dropout_key=jax.random.PRNGKey(3))
    np.testing.assert_array_equal(legacy, f(*arrays))


def _keep(seed, rate, batch=4, heads=2, length=128):
    seeds = _attention_dropout.dropout_seeds(jax.random.key(seed))
    index = jnp.arange(length)
    return np.asarray(
        _attention_dropout.keep_mask(
            seeds, rate, batch=batch, heads=heads, length=length, rows=index, cols=index
        )
    )


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_dropout_rate(rate):
    kept = _keep(0, rate).astype(np.float64)
    sigma = (rate * (1 - rate) / kept.size) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4.5 * sigma
    # and in no row, column, head or batch row another one
    for axes in [(0, 1, 3), (0, 1, 2), (0, 2, 3), (1, 2, 3)]:
        part = kept.mean(axes)
        spread = (rate * (1 - rate) / (kept.size / part.size)) ** 0.5
        assert np.abs(part - (1 - rate)).max() < 5 * spread


def test_dropout_bits_are_independent():
    """No correlation between neighbours along any axis, nor along diagonals, nor between keys."""
    x = _keep(0, 0.5).astype(np.float64) - 0.5
    other = _keep(1, 0.5).astype(np.float64) - 0.5
    pairs = [(x, other)]
    for axis in range(4):
        for lag in (1, 2, 16):
            if lag < x.shape[axis]:
                pairs.append((x.take(range(lag, x.shape[axis]), axis), np.roll(x, -lag, axis)))
                pairs[-1] = (
                    x.take(range(lag, x.shape[axis]), axis),
                    x.take(range(x.shape[axis] - lag), axis),
                )
    pairs.append((x[:, :, 1:, 1:], x[:, :, :-1, :-1]))
    pairs.append((x[:, :, 1:, :-1], x[:, :, :-1, 1:]))
    pairs.append((x, np.swapaxes(x, 2, 3) * ~np.eye(128, dtype=bool)))
    for a, b in pairs:
        correlation = (a * b).mean() / 0.25
        assert abs(correlation) < 5 / a.size**0.5


def test_dropout_rows_look_binomial():
    """Counts of kept weights a row scatter as coins do, neither more nor less."""
    kept = _keep(5, 0.3, batch=8, heads=2).sum(-1)
    assert kept.var() == pytest.approx(128 * 0.3 * 0.7, rel=0.1)


def test_dropout_is_a_function_of_the_key(rng):
    arrays = qkv(rng, 2, 30, 1, 4, 4)
    f = functools.partial(causal_attention, *arrays, dropout_rate=0.4)
    first = f(dropout_key=jax.random.key(0))
    np.testing.assert_array_equal(first, f(dropout_key=jax.random.key(0)))
    assert np.abs(np.asarray(first) - f(dropout_key=jax.random.key(1))).max() > 0.01
    mean = np.mean([f(dropout_key=jax.random.key(i)) for i in range(200)], axis=0)
    error = np.abs(mean - np.asarray(causal_attention(*arrays)))
    assert error.mean() < 0.06
    np.testing.assert_array_equal(
        causal_attention(*arrays, dropout_rate=0.0, dropout_key=jax.random.key(0)),
        causal_attention(*arrays),
    )


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((2, 5, 4), np.float32)}, r"query must be \[batch, length, heads"),
        ({"key": np.zeros((2, 5, 1, 3), np.float32)}, "query and key must have the same shape"),
        ({"value": np.zeros((2, 6, 1, 4), np.float32)}, "value must agree with key"),
        ({"query": np.zeros((2, 5, 1, 4), np.int32)}, "query must be float32 or bfloat16"),
        ({"key": jnp.zeros((2, 5, 1, 4), jnp.bfloat16)}, "must have the same dtype"),
        ({"valid": np.ones((2, 4), bool)}, r"valid must be \[batch, length\] = \[2, 5\]"),
        ({"valid": np.ones((2, 5), np.float32)}, "valid must be bool"),
        ({"segment_ids": np.ones((2, 5), np.float32)}, "segment_ids must be integer"),
        ({"segment_ids": np.ones((5,), np.int32)}, r"segment_ids must be \[batch, length\]"),
        ({"scale": float("nan")}, "scale must be a finite"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be a Python number in \[0, 1\)"),
        ({"dropout_rate": -0.1}, "dropout_rate must be"),
        ({"dropout_rate": 0.1}, "needs a dropout_key"),
        ({"implementation": "pallas"}, "cannot run: there is no Pallas kernel of this op yet"),
        ({"implementation": "cudnn"}, "implementation must be one of"),
    ],
)
def test_errors(change, message):
    x = np.zeros((2, 5, 1, 4), np.float32)
    arguments = {"query": x, "key": x, "value": x} | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: causal_attention(**arguments))


def test_implementation_xla_is_the_default(rng):
    arrays = qkv(rng, 1, 5, 1, 4, 4)
    np.testing.assert_array_equal(
        causal_attention(*arrays), causal_attention(*arrays, implementation="xla")
    )


# Transformations


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize(
    "transform", ["jit", "vmap", "scan", "remat", "shard_map", "jit_shard_map", "pmap"]
)
def test_transformations(rng, block, transform):
    """Values and gradients under each transformation, eight slices at once."""
    arrays = [jnp.asarray(cases.draw(rng, 8, 1, 10, 2, 4)) for _ in range(3)]
    ids = jnp.asarray(np.repeat([[[1, 2]]], 5, axis=2).reshape(1, 1, 10).repeat(8, 0))
    seeds = _attention_dropout.dropout_seeds(jax.random.key(0))

    def one(q, k, v, ids):
        def total(q, k, v):
            f = attend(block)
            if transform == "remat":
                f = jax.checkpoint(f)
            out = f(q, k, v, segment_ids=ids, valid=ids > 0, rate=0.2, seeds=seeds)
            return (out**2).sum(), out

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)

    wanted = [one(*(x[i] for x in arrays), ids[i]) for i in range(8)]
    wanted = jax.tree.map(lambda *x: np.stack(x), *wanted)
    if transform in ("jit", "remat"):
        got = [jax.jit(one)(*(x[i] for x in arrays), ids[i]) for i in range(8)]
        got = jax.tree.map(lambda *x: np.stack(x), *got)
    elif transform == "vmap":
        got = jax.jit(jax.vmap(one))(*arrays, ids)
    elif transform == "scan":
        got = jax.lax.scan(lambda _, x: (None, one(*x)), None, (*arrays, ids))[1]
    elif transform == "pmap":
        got = jax.pmap(one)(*arrays, ids)
    else:
        mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
        spec = PartitionSpec("data")

        def local(q, k, v, ids):
            (_, out), gradients = one(q[0], k[0], v[0], ids[0])
            return jax.tree.map(lambda x: x[None], ((out**2).sum()[None], out, gradients))

        f = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
        total, out, gradients = (jax.jit(f) if transform.startswith("jit") else f)(*arrays, ids)
        got = ((total[:, 0], out), gradients)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        close(a, b, 1e-5, transform)


def test_second_order_reverse(rng):
    q, k, v = (jnp.asarray(x) for x in qkv(rng, 1, 6, 1, 3, 3))

    def norm_of_gradient(q):
        g = jax.grad(lambda q: (causal_attention(q, k, v) ** 2).sum())(q)
        return (g**2).sum()

    gradient = jax.grad(norm_of_gradient)(q)
    direction = jnp.asarray(cases.draw(rng, *q.shape))
    step = 1e-2
    slope = (norm_of_gradient(q + step * direction) - norm_of_gradient(q - step * direction)) / (
        2 * step
    )
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.02)
