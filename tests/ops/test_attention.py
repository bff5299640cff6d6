"""causal_attention against float64 loops, its promises about masks, memory and transformations."""

import functools
import itertools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, gradients_of, qkv, run
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from oracles import attention as oracle

from jaxrec.ops import _attention_blockwise, _attention_core, _attention_dropout, causal_attention


@functools.cache
def attend(block):
    """The op with the tile size in the test's hand, so that a short row has many tiles."""

    def f(q, k, v, *, valid=None, segment_ids=None, rate=0.0, seeds=None):
        options = _attention_core.Options(q.shape[3] ** -0.5, rate, block)
        return _attention_core.attend(
            options, _attention_core.Inputs(q, k, v, valid, segment_ids, seeds)
        )

    return f


@functools.cache
def compiled(block):
    return jax.jit(attend(block), compiler_options=cases.QUICK)


@functools.cache
def compiled_gradients(block):
    return gradients_of(attend(block))


def check(both, arrays, d_out, tolerance=2e-5, kept=None, **masks):
    """`both` gives values and gradients."""
    out, gradients = both(arrays, d_out, **masks)
    close(out, oracle.causal_attention(*arrays, kept=kept, **masks), tolerance, "out")
    wanted = oracle.causal_attention_gradients(*arrays, d_out, kept=kept, **masks)
    for name, got, want in zip("qkv", gradients, wanted, strict=True):
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
@pytest.mark.parametrize(("length", "block"), [(20, None), (29, 8)])
def test_values_and_gradients(rng, pattern, length, block):
    arrays = qkv(rng, 3, length, 2, 4, 3)
    valid, ids = cases.rows(pattern, 3, length)
    d_out = cases.draw(rng, 3, length, 2, 3)
    check(compiled_gradients(block), arrays, d_out, valid=valid, segment_ids=ids)


@pytest.mark.parametrize(("length", "block"), [(1, None), (1, 8), (16, 8), (29, 3)])
def test_lengths_that_fit_the_blocks_and_do_not(rng, length, block):
    arrays = qkv(rng, 2, length, 1, 4, 4)
    valid, ids = cases.rows("packed", 2, length)
    d_out = cases.draw(rng, 2, length, 1, 4)
    check(compiled_gradients(block), arrays, d_out, valid=valid, segment_ids=ids)


@pytest.mark.parametrize(
    ("length", "heads", "pattern"),
    [(97, 1, "left"), (200, 2, "packed_holes"), (1030, 1, "packed_holes")],
)
def test_values_and_gradients_at_real_lengths(rng, length, heads, pattern):
    """The public op, fully optimised."""
    arrays = qkv(rng, 2, length, heads, 8, 8)
    d_out = cases.draw(rng, 2, length, heads, 8)
    valid, ids = cases.rows(pattern, 2, length)
    both = gradients_of(causal_attention, compiler_options=None)
    check(both, arrays, d_out, 5e-5, valid=valid, segment_ids=ids)


@pytest.mark.parametrize("block", [None, 8])
def test_float64_agrees_to_the_last_digits(rng, block):
    arrays = qkv(rng, 1, 20, 1, 4, 4, np.float64)
    d_out = cases.draw(rng, 1, 20, 1, 4, dtype=np.float64)
    with jax.enable_x64(True):
        check(gradients_of(attend(block)), arrays, d_out, 1e-12)


def test_length_1024_leaves_the_dense_form():
    assert _attention_core.block_for(1023) is None
    assert _attention_core.block_for(1024) is not None


def test_scale(rng):
    arrays = qkv(rng, 1, 9, 1, 4, 4)
    f = functools.partial(causal_attention, scale=0.3)
    out, gradients = gradients_of(f)(arrays, arrays[2])
    close(out, oracle.causal_attention(*arrays, scale=0.3), 2e-5)
    wanted = oracle.causal_attention_gradients(*arrays, arrays[2], scale=0.3)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want, 2e-5)
    half = run(causal_attention, 2 * arrays[0], arrays[1], arrays[2], scale=0.15)
    close(half, out, 1e-6)


def test_large_logits_do_not_overflow(rng):
    q, k, v = qkv(rng, 1, 40, 1, 4, 4)
    for block in (None, 8):
        out = compiled(block)(300 * q, 300 * k, v)
        close(out, oracle.causal_attention(300 * q, 300 * k, v), 1e-4)


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_logits_far_from_zero(rng, block, offset):
    """Sees a running maximum that starts at 0, and a masked logit of 0."""
    q, k, v = qkv(rng, 1, 20, 1, 4, 4)
    q[..., 0], k[..., 0] = 1.0, 2 * offset
    check(compiled_gradients(block), (q, k, v), cases.draw(rng, 1, 20, 1, 4), 2e-3)


# Masks


def test_nothing_valid_gives_zeros_and_zero_gradients(rng):
    arrays = qkv(rng, 2, 6, 1, 4, 4)
    valid = jnp.zeros((2, 6), bool)
    f = functools.partial(causal_attention, valid=valid)
    results = gradients_of(f)(arrays, np.ones((2, 6, 1, 4), np.float32))
    for x in jax.tree.leaves(results):
        assert (np.asarray(x) == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 1, 4), (2, 0, 1, 4), (2, 5, 0, 4)])
def test_empty(shape):
    x = jnp.zeros(shape)
    out, pull = jax.vjp(lambda q: causal_attention(q, q, q), x)
    assert out.shape == shape
    assert pull(out)[0].shape == shape


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 23), max_size=4, unique=True).map(sorted),
    pad=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    block=st.sampled_from([None, 5]),
    seed=st.integers(0, 2**16),
)
def test_packed_is_separate(cuts, pad, block, seed):
    """Each segment, less the padding at both ends of the row, as if it were alone."""
    rng = np.random.default_rng(seed)
    edges = [0, *cuts, 24]
    names = rng.permutation(100)[: len(edges) - 1] - 50
    ids = np.repeat(names, np.diff(edges)).astype(np.int32)[None]
    valid = np.ones((1, 24), bool)
    valid[:, : pad[0]] = False
    valid[:, 24 - pad[1] :] = False
    arrays = qkv(rng, 1, 24, 2, 4, 3)
    out = compiled(block)(*arrays, valid=valid, segment_ids=ids)
    for start, end in itertools.pairwise(edges):
        inside = slice(max(start, pad[0]), min(end, 24 - pad[1]))
        own = [x[:, inside] for x in arrays]
        close(out[:, inside], oracle.causal_attention(*own), 2e-5)


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
    out, gradients = compiled_gradients(block)(arrays, d_out)
    assert out.dtype == jnp.bfloat16
    exact = [np.asarray(x, np.float64) for x in (*arrays, d_out)]
    close(out, oracle.causal_attention(*exact[:3]), 2**-7)
    wanted = oracle.causal_attention_gradients(*exact)
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        close(got, want, 2**-6)


@pytest.mark.parametrize("block", [None, 64])
def test_bfloat16_statistics_are_float32(block):
    """A sum of 513 equal weights in bfloat16 would stop growing at 256."""
    x = jnp.zeros((1, 513, 1, 1), jnp.bfloat16)
    out = compiled(block)(x, x, jnp.ones((1, 513, 1, 1), jnp.float32))
    close(out, np.ones(out.shape), 1e-6)


def test_output_takes_the_dtype_of_value(rng):
    q, k, v = qkv(rng, 1, 5, 1, 4, 4)
    low = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    for block in (None, 8):
        assert jax.eval_shape(attend(block), q, k, low(v)).dtype == jnp.bfloat16
        assert jax.eval_shape(attend(block), low(q), low(k), v).dtype == jnp.float32
    exact = oracle.causal_attention(low(q), low(k), v)
    close(run(causal_attention, low(q), low(k), v), exact, 2**-10)


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
def test_dropout_is_the_documented_hash(rng, block):
    arrays = qkv(rng, 2, 21, 2, 4, 3)
    valid, ids = cases.rows("packed_holes", 2, 21)
    seeds = _attention_dropout.dropout_seeds(jax.random.key(3))
    kept = oracle.dropout_factors(np.asarray(seeds), 0.3, 2, 2, 21)
    both = gradients_of(functools.partial(attend(block), rate=0.3, seeds=seeds))
    d_out = cases.draw(rng, 2, 21, 2, 3)
    check(both, arrays, d_out, kept=kept, valid=valid, segment_ids=ids)


def test_dropout_through_the_public_op(rng):
    arrays = qkv(rng, 2, 21, 2, 4, 3)
    key = jax.random.key(3)
    seeds = np.asarray(_attention_dropout.dropout_seeds(key))
    kept = oracle.dropout_factors(seeds, 0.3, 2, 2, 21)
    f = functools.partial(causal_attention, dropout_rate=0.3, dropout_key=key)
    close(run(f, *arrays), oracle.causal_attention(*arrays, kept=kept), 2e-5)
    legacy = run(causal_attention, *arrays, dropout_rate=0.3, dropout_key=jax.random.PRNGKey(3))
    np.testing.assert_array_equal(legacy, run(f, *arrays))


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
    for axis, lags in ((0, (1, 2)), (1, (1,)), (2, (1, 2, 16)), (3, (1, 2, 16))):
        for lag in lags:
            last = x.shape[axis] - lag
            pairs.append((x.take(range(lag, lag + last), axis), x.take(range(last), axis)))
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
    dropped = jax.jit(lambda key: f(dropout_key=key), compiler_options=cases.QUICK)
    first = dropped(jax.random.key(0))
    np.testing.assert_array_equal(first, dropped(jax.random.key(0)))
    assert np.abs(np.asarray(first) - dropped(jax.random.key(1))).max() > 0.01
    undropped = run(causal_attention, *arrays)
    np.testing.assert_array_equal(run(causal_attention, *arrays, dropout_rate=0.0), undropped)
    mean = np.mean([dropped(jax.random.key(i)) for i in range(200)], axis=0)
    # Unbiased: 200 draws leave a fourteenth of one draw's error.
    error = np.abs(mean - np.asarray(undropped)).mean()
    assert error < 2 / 14 * np.abs(np.asarray(first) - np.asarray(undropped)).mean()


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((2, 5, 4), np.float32)}, r"query must be \[batch, length, heads"),
        ({"key": np.zeros((2, 5, 1, 3), np.float32)}, "query and key must have the same shape"),
        ({"value": np.zeros((2, 6, 1, 4), np.float32)}, "value must agree with key"),
        (
            {"query": np.zeros((2, 5, 1, 4), np.int32)},
            "query must be float32 or bfloat16",
        ),
        ({"key": jnp.zeros((2, 5, 1, 4), jnp.bfloat16)}, "must have the same dtype"),
        ({"valid": np.ones((2, 4), bool)}, r"valid must be \[batch, length\] = \[2, 5\]"),
        ({"valid": np.ones((2, 5), np.float32)}, "valid must be bool"),
        ({"segment_ids": np.ones((2, 5), np.float32)}, "segment_ids must be integer"),
        ({"segment_ids": np.ones((5,), np.int32)}, r"segment_ids must be \[batch, length\]"),
        ({"scale": float("nan")}, "scale must be a finite"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be a Python number in \[0, 1\)"),
        ({"dropout_rate": -0.1}, "dropout_rate must be"),
        ({"dropout_rate": 0.1}, "needs a dropout_key"),
        (
            {"implementation": "pallas", "distance_bias": np.zeros(5, np.float32)},
            "cannot run: the kernel has no bias by distance",
        ),
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
        run(causal_attention, *arrays), run(causal_attention, *arrays, implementation="xla")
    )


# Transformations


@functools.cache
def sliced_values_and_gradients(block):
    """Eight slices [1, 10, 2, 4], and what they give one by one."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(cases.draw(rng, 8, 1, 10, 2, 4)) for _ in range(3)]
    ids = jnp.asarray(np.tile(np.repeat([1, 2], 5).astype(np.int32), (8, 1, 1)))
    f = jax.jit(functools.partial(one_slice, block, False), compiler_options=cases.QUICK)
    wanted = [f(*(x[i] for x in (*arrays, ids))) for i in range(8)]
    return (*arrays, ids), jax.tree.map(lambda *x: np.stack(x), *wanted)


def one_slice(block, remat, q, k, v, ids):
    seeds = _attention_dropout.dropout_seeds(jax.random.key(0))

    def total(q, k, v):
        f = functools.partial(attend(block), segment_ids=ids, valid=ids > 0, rate=0.2, seeds=seeds)
        out = jax.checkpoint(f)(q, k, v) if remat else f(q, k, v)
        return (out**2).sum(), out

    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)


def eager(f, arguments):
    return jax.tree.map(lambda x: np.asarray(x)[None], f(*(x[0] for x in arguments)))


def sharded(f, arguments):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    spec = PartitionSpec("data")

    def local(*arguments):
        return jax.tree.map(lambda x: x[None], f(*(x[0] for x in arguments)))

    return run(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec), *arguments)


TRANSFORMS = {
    "eager": eager,
    "vmap": lambda f, arguments: run(jax.vmap(f), *arguments),
    "scan": lambda f, arguments: run(
        lambda *a: jax.lax.scan(lambda _, x: (None, f(*x)), None, a)[1], *arguments
    ),
    "remat": lambda f, arguments: run(jax.vmap(f), *arguments),
    "shard_map": sharded,
    "pmap": lambda f, arguments: jax.pmap(f)(*arguments),
}


@pytest.mark.parametrize(
    ("block", "transform"),
    [(None, name) for name in TRANSFORMS] + [(4, n) for n in ("vmap", "remat", "shard_map")],
)
def test_transformations(block, transform):
    """Values and gradients are those of the plain function, compiled."""
    arguments, wanted = sliced_values_and_gradients(block)
    got = TRANSFORMS[transform](
        functools.partial(one_slice, block, transform == "remat"), arguments
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        close(a, b[: len(a)], 1e-5, transform)


def test_second_order_reverse(rng):
    q, k, v = (jnp.asarray(x) for x in qkv(rng, 1, 6, 1, 3, 3))

    def norm_of_gradient(q):
        g = jax.grad(lambda q: (causal_attention(q, k, v) ** 2).sum())(q)
        return (g**2).sum()

    gradient = run(jax.grad(norm_of_gradient), q)
    direction = jnp.asarray(cases.draw(rng, *q.shape))
    step = 1e-2
    ends = [run(norm_of_gradient, q + sign * step * direction) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.02)
