"""causal_attention with a bias by distance: against float64 loops, and what it promises."""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, draw, gradients_of, qkv, run
from jax.sharding import Mesh, PartitionSpec
from oracles import attention as oracle

from jaxrec import ops
from jaxrec.ops import _attention_core, causal_attention
from jaxrec.ops import _attention_mix_tables as tables


def attend(block):
    """The op with the tile size in the test's hand; the bias is [heads, length] or [1, length]."""

    def f(q, k, v, bias, *, valid=None, segment_ids=None):
        options = _attention_core.Options(q.shape[3] ** -0.5, 0.0, block)
        inputs = _attention_core.Inputs(q, k, v, valid, segment_ids, None, bias)
        return _attention_core.attend(options, inputs)

    return f


@functools.cache
def compiled(block):
    return gradients_of(attend(block))


def shared(bias):
    return bias[0] if len(bias) == 1 else bias


def check(both, arrays, bias, d_out, tolerance=2e-5, **masks):
    out, gradients = both([*arrays, bias], d_out, **masks)
    options = {"distance_bias": shared(bias), **masks}
    close(out, oracle.causal_attention(*arrays, **options), tolerance, "out")
    wanted = list(oracle.causal_attention_gradients(*arrays, d_out, **options))
    wanted[3] = wanted[3].reshape(bias.shape)
    for name, got, want in zip(("q", "k", "v", "bias"), gradients, wanted, strict=True):
        close(got, want, tolerance, f"d_{name}")


@pytest.mark.parametrize("heads", [None, 2])
def test_oracle_gradient_is_finite_differences(rng, heads):
    arrays = qkv(rng, 2, 5, 2, 3, 2)
    bias, d_out = draw(rng, *((heads,) if heads else ()), 5), draw(rng, 2, 5, 2, 2)
    valid, ids = cases.rows("packed_holes", 2, 5)
    masks = {"valid": valid, "segment_ids": ids}

    def total(bias):
        return (oracle.causal_attention(*arrays, distance_bias=bias, **masks) * d_out).sum()

    got = oracle.causal_attention_gradients(*arrays, d_out, distance_bias=bias, **masks)[3]
    close(got, oracle.finite_differences(total, [bias])[0], 1e-8)


# One compilation a form for plain rows and a shared bias, one for masked rows and a bias a head.
@pytest.mark.parametrize(
    ("pattern", "groups"),
    [("plain", 1), ("packed_holes", 2), ("interleaved", 2), ("packed", 2)],
)
@pytest.mark.parametrize("block", [None, 8])
def test_values_and_gradients(rng, pattern, block, groups):
    """Length 29: behind the end of the last tile there are rows that no one asked for."""
    arrays = qkv(rng, 3, 29, 2, 4, 3)
    valid, ids = cases.rows(pattern, 3, 29)
    bias, d_out = 3 * draw(rng, groups, 29), draw(rng, 3, 29, 2, 3)
    check(compiled(block), arrays, bias, d_out, valid=valid, segment_ids=ids)


@pytest.mark.parametrize(("length", "rank"), [(200, 1), (1030, 2)])
def test_values_and_gradients_at_real_lengths(rng, length, rank):
    """The public op, fully optimised: several row blocks of the dense form, and tiles."""
    arrays = qkv(rng, 1, length, 1, 8, 8)
    d_out = draw(rng, 1, length, 1, 8)
    valid, ids = cases.rows("packed_holes", 1, length)
    bias = draw(rng, *((1,) if rank == 2 else ()), length)

    def f(q, k, v, bias, **masks):
        return causal_attention(q, k, v, distance_bias=bias, **masks)

    both = gradients_of(f, compiler_options=None)
    options = {"valid": valid, "segment_ids": ids}
    out, gradients = both([*arrays, bias], d_out, **options)
    options["distance_bias"] = bias
    close(out, oracle.causal_attention(*arrays, **options), 5e-5)
    wanted = oracle.causal_attention_gradients(*arrays, d_out, **options)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want, 5e-5)


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_a_constant_changes_nothing(rng, block, offset):
    """Sees rows behind the end that meet a large bias, and a maximum taken without the bias."""
    arrays = qkv(rng, 1, 29, 2, 4, 3)
    d_out = draw(rng, 1, 29, 2, 3)
    want = compiled(block)([*arrays, np.zeros((2, 29), np.float32)], d_out)
    got = compiled(block)([*arrays, np.full((2, 29), offset, np.float32)], d_out)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, 1e-3)


@pytest.mark.parametrize("block", [None, 8])
def test_what_nobody_meets_is_not_read(rng, block):
    """NaN in invalid slots and at distances beyond the longest segment."""
    arrays = qkv(rng, 1, 29, 2, 4, 3)
    d_out = draw(rng, 1, 29, 2, 3)
    ids = np.repeat([0, 1, 2], [12, 9, 8]).astype(np.int32)[None]
    valid = np.ones((1, 29), bool)
    valid[:, [0, 1, 11, 28]] = False  # the first segment's events are at most 8 apart
    bias = draw(rng, 2, 29)
    slots = valid[:, :, None, None]

    def poisoned(poison):
        far = np.where(np.arange(29)[None] <= 8, bias, np.float32(poison))
        own = [np.where(slots, x, np.float32(poison)) for x in (*arrays, d_out)]
        return compiled(block)([*own[:3], far], own[3], valid=valid, segment_ids=ids)

    got, want = (jax.tree.leaves(poisoned(x)) for x in (np.nan, 0))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(got[-1])[:, 9:] == 0).all()
    assert (np.asarray(got[-1])[:, :9] != 0).all()


@pytest.mark.parametrize("block", [None, 8])
def test_minus_infinity_shuts_a_distance_out(rng, block):
    arrays = qkv(rng, 1, 29, 2, 4, 3)
    d_out = draw(rng, 1, 29, 2, 3)
    got, want = (
        compiled(block)(
            [*arrays, np.where(np.arange(29) < 4, 0, far).astype(np.float32)[None]], d_out
        )
        for far in (-np.inf, -1e9)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("block", [None, 8])
def test_bfloat16(rng, block):
    low = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    arrays = [low(x) for x in qkv(rng, 2, 29, 2, 16, 8)]
    bias, d_out = low(draw(rng, 2, 29)), low(draw(rng, 2, 29, 2, 8))
    out, gradients = compiled(block)([*arrays, bias], d_out)
    exact = [np.asarray(x, np.float64) for x in (*arrays, d_out)]
    options = {"distance_bias": np.asarray(bias, np.float64)}
    close(out, oracle.causal_attention(*exact[:3], **options), 2**-7)
    wanted = oracle.causal_attention_gradients(*exact, **options)
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        close(got, want, 2**-6)


@pytest.mark.parametrize("block", [None, 64])
def test_gradient_in_float32_of_bfloat16_rows(block):
    """A sum of 512 ones in bfloat16 would stop growing at 256."""
    x = jnp.zeros((512, 2, 1, 1), jnp.bfloat16)
    v = jnp.broadcast_to(jnp.asarray([2.0, -2.0], jnp.bfloat16)[None, :, None, None], x.shape)
    d_out = jnp.ones_like(v)
    _, (*_, gradient) = compiled(block)([x, x, v, jnp.zeros((1, 2))], d_out)
    close(gradient, [[-512.0, 512.0]], 1e-6)


def test_long_rows_form_no_square():
    x = jax.ShapeDtypeStruct((1, 8192, 2, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((2, 8192), jnp.float32)

    def gradients(*arrays):
        return jax.grad(lambda *a: causal_attention(*a[:3], distance_bias=a[3]).sum(), range(4))(
            *arrays
        )

    assert cases.largest_intermediate(gradients, x, x, x, bias) <= 2 * 2 * 256 * 256


@pytest.mark.parametrize(
    "form",
    [tables.diagonal_sums, tables._sums_by_strides, tables._sums_by_moves],
    ids=["here", "by_strides", "by_moves"],
)
@pytest.mark.parametrize("size", [1, 5, 130])
def test_the_sums_along_diagonals_are_the_transpose(rng, size, form):
    x, values = draw(rng, 2, size, size), draw(rng, 2, 2 * size - 1)
    sums = np.asarray(form(jnp.asarray(x)))
    wanted = [[np.trace(m, offset=-lag) for lag in range(1 - size, size)] for m in x]
    close(sums, wanted, 1e-5)
    square = np.asarray(tables.toeplitz(jnp.asarray(values)))
    assert (square * x).sum() == pytest.approx((values * sums).sum(), rel=1e-5)


def test_published_biases_are_taken(rng):
    arrays = qkv(rng, 1, 9, 2, 4, 4)
    table = draw(rng, 32, 2)
    for bias in (ops.t5_bias(table, 9), ops.alibi_bias(ops.alibi_slopes(2), 9)):
        got = run(causal_attention, *arrays, distance_bias=bias)
        close(got, oracle.causal_attention(*arrays, distance_bias=bias), 2e-5)


@pytest.mark.parametrize("shape", [(0, 5, 1, 4), (2, 0, 1, 4), (2, 5, 0, 4)])
def test_empty(shape):
    x, bias = jnp.zeros(shape), jnp.zeros(shape[1])
    out, pull = jax.vjp(lambda q, bias: causal_attention(q, q, q, distance_bias=bias), x, bias)
    assert out.shape == shape
    assert [g.shape for g in pull(out)] == [shape, bias.shape]


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.zeros(4, np.float32), r"distance_bias must be \[length\] = \[5\] or \[heads, length\]"),
        (np.zeros((3, 5), np.float32), r"= \[2, 5\], got shape \(3, 5\)"),
        (np.zeros(5, np.int32), "distance_bias must be float32"),
    ],
)
def test_errors(bias, message):
    x = np.zeros((2, 5, 2, 4), np.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: causal_attention(x, x, x, distance_bias=bias))


# Transformations


def total(block, q, k, v, bias):
    out = attend(block)(q, k, v, bias)
    return (out**2).sum(), out


@functools.cache
def values_and_gradients(block):
    return jax.value_and_grad(functools.partial(total, block), (0, 1, 2, 3), has_aux=True)


@pytest.mark.parametrize("block", [None, 4])
def test_transformations(rng, block):
    """vmap over rows, each with a bias of its own; rows sharded beside a replicated bias."""
    q, k, v = (jnp.asarray(x) for x in qkv(rng, 2, 10, 2, 4, 4))
    bias = jnp.asarray(draw(rng, 2, 10))
    f = values_and_gradients(block)
    (loss, out), (*gradients, d_bias) = run(f, q, k, v, bias)

    rows = [x[:, None] for x in (q, k, v)]
    (losses, outs), (*row_gradients, d_biases) = run(jax.vmap(f), *rows, jnp.stack([bias] * 2))
    close(losses.sum(), loss, 1e-5)
    close(d_biases.sum(0), d_bias, 1e-5)
    for got, want in zip((outs, *row_gradients), (out, *gradients), strict=True):
        close(got[:, 0], want, 1e-5)

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    own, all_ = PartitionSpec("data"), PartitionSpec()

    def local(q, k, v, bias):
        (loss, out), gradients = f(q, k, v, bias)
        return (jax.lax.psum(loss, "data"), out), gradients

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(own, own, own, all_),
        out_specs=((all_, own), (own, own, own, all_)),
    )
    got, want = run(sharded, q, k, v, bias), ((loss, out), (*gradients, d_bias))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(x, y, 1e-5)
