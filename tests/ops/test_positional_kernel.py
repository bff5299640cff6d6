"""Positional kernel attention against its literal float64 form, and what the factors promise."""

import functools
import itertools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, draw, gradients_of, qkv, run
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from oracles import attention as attention_oracle
from oracles import positional_kernel as oracle

from jaxrec import ops
from jaxrec.ops import _attention_mix

pka = ops.positional_kernel_attention


def kernel_of(rng, structure, size, heads=None, band=None):
    lead = () if heads is None else (heads,)
    shape = {"identity": None, "toeplitz": (band or size,), "full": (size, size)}[structure]
    return None if shape is None else draw(rng, *lead, *shape)


# Identities of the method


def test_golden_vector():
    def row(values):
        return np.array(values, np.float64)[None, :, None, :]

    q, k, v = (
        row([[1, 0], [0, 1], [1, 1]]),
        row([[1, 2], [0, 1], [-1, 1]]),
        row([[1, 0], [0, 1], [2, 2]]),
    )
    u, w = np.array([1, 0.5, -0.25]), np.array([1, -0.5, 0.25])
    with jax.enable_x64(True):
        close(ops.positional_mix(u, k), row([[1, 2], [0.5, 2], [-1.25, 1]]), 1e-15)
        close(ops.positional_mix(w, v), row([[1, 0], [-0.5, 1], [2.25, 1.5]]), 1e-15)
        wanted = row([[1, 0], [0.25, 0.5], [0.48535406, 0.47311944]])
        close(pka(q, k, v, u, w), wanted, 1e-8)
        upper = np.array([[1, 0.5, -0.25], [9, 1, 0.5], [9, 9, 1]])
        lower = np.array([[1, 9, 9], [-0.5, 1, 9], [0.25, -0.5, 1]])
        close(pka(q, k, v, upper, lower, structure="full"), wanted, 1e-8)
        close(pka(q, k, v, u, lower, structure=("toeplitz", "full")), wanted, 1e-8)


def test_identity_factors_are_causal_attention(rng):
    arrays = qkv(rng, 2, 9, 2, 4, 3)
    wanted = run(ops.causal_attention, *arrays)
    for u, w, structure in [
        (None, None, None),
        (np.ones(1, np.float32), np.ones(1, np.float32), None),
        (np.eye(9, dtype=np.float32), np.eye(9, dtype=np.float32), "full"),
        (ops.init_positional_kernel("toeplitz", 9), ops.init_positional_kernel("full", 9), None),
    ]:
        got = run(pka, *arrays, logit_kernel=u, value_kernel=w, structure=structure)
        np.testing.assert_array_equal(got, wanted)


STRUCTURES = list(itertools.product(["identity", "toeplitz", "full"], repeat=2))


@pytest.mark.parametrize(
    ("structure", "pattern", "heads"),
    [(pair, "packed_holes", 2) for pair in STRUCTURES]
    + [(("toeplitz", "full"), "plain", None), (("full", "toeplitz"), "left", None)],
)
def test_folded_form_is_the_literal_form(rng, structure, pattern, heads):
    arrays = qkv(rng, 2, 11, 2, 3, 2, np.float64)
    u = kernel_of(rng, structure[0], 11, heads, band=4)
    w = kernel_of(rng, structure[1], 11, heads, band=9)
    valid, ids = cases.rows(pattern, 2, 11)
    with jax.enable_x64(True):
        got = run(
            functools.partial(pka, structure=structure, valid=valid, segment_ids=ids),
            *arrays,
            *(None if x is None else jnp.asarray(x, jnp.float64) for x in (u, w)),
        )
    wanted = oracle.positional_kernel_attention(
        *arrays, u, w, structure=structure, valid=valid, segment_ids=ids
    )
    close(got, wanted, 1e-12)


@pytest.mark.parametrize("structure", ["toeplitz", "full"])
@pytest.mark.parametrize("pattern", ["plain", "packed_holes"])
def test_gradients_are_finite_differences_of_the_literal_form(rng, structure, pattern):
    q, k, v = qkv(rng, 2, 4, 1, 2, 2)
    u, w = (kernel_of(rng, structure, 4, band=3) for _ in range(2))
    arrays, d_out = [q, k, v, u, w], draw(rng, 2, 4, 1, 2)
    valid, ids = cases.rows(pattern, 2, 4)
    masks = {"valid": valid, "segment_ids": ids}

    def total(*arrays):
        pair = (structure, structure)
        out = oracle.positional_kernel_attention(*arrays, structure=pair, **masks)
        return (out * d_out).sum()

    _, got = gradients_of(functools.partial(pka, structure=structure, **masks))(arrays, d_out)
    for name, a, b in zip(
        ("q", "k", "v", "u", "l"),
        got,
        attention_oracle.finite_differences(total, arrays),
        strict=True,
    ):
        close(a, b, 2e-5, name)


def test_gradient_formulas_of_the_factors(rng):
    """`dU = triu(sum K dK'^T)`, `dK = U dK'`, and for taps the sums of its superdiagonals."""
    k, d_mixed = draw(rng, 3, 12, 2, 4), draw(rng, 3, 12, 2, 4)
    u, full = draw(rng, 12), draw(rng, 12, 12)
    d_full, d_taps = oracle.kernel_gradients(k, d_mixed)
    _, (got, d_key) = gradients_of(
        functools.partial(ops.positional_mix, structure="full", upper=True)
    )([full, k], d_mixed)
    close(got, d_full, 1e-5)
    close(d_key, np.einsum("kj,bjhd->bkhd", np.triu(full), d_mixed), 1e-5)
    _, (got, d_key) = gradients_of(ops.positional_mix)([u, k], d_mixed)
    close(got, d_taps, 1e-5)
    toeplitz = sum(u[t] * np.eye(12, k=t) for t in range(12))
    close(d_key, np.einsum("kj,bjhd->bkhd", toeplitz, d_mixed), 1e-5)


def test_jacobian_is_zero_for_the_future(rng):
    q, k, v = (jnp.asarray(x) for x in qkv(rng, 1, 7, 1, 2, 2))
    u, w = draw(rng, 7, 7), draw(rng, 7, 7)

    def f(k, v):
        return pka(q, k, v, u, w, structure="full")[0, :, 0]

    for jacobian in run(jax.jacrev(f, (0, 1)), k, v):
        blocks = np.abs(np.asarray(jacobian)[:, :, 0, :, 0]).max((1, 3))
        assert (blocks[np.triu_indices(7, 1)] == 0).all()
        if jacobian is not None:
            assert (blocks[np.tril_indices(7, -1)] > 0).all()


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 4), (2, 1)])
def test_padding_changes_nothing_for_taps(rng, before, after):
    arrays = qkv(rng, 2, 8, 1, 4, 4)
    u, w = draw(rng, 6), draw(rng, 12)
    wanted = run(pka, *arrays, logit_kernel=u, value_kernel=w)
    pads = ((0, 0), (before, after), (0, 0), (0, 0))
    padded = [np.where(np.pad(np.ones_like(x), pads) > 0, np.pad(x, pads), 77.0) for x in arrays]
    valid = np.pad(np.ones((2, 8), bool), pads[:2])
    got = run(
        functools.partial(pka, valid=valid),
        *(x.astype(np.float32) for x in padded),
        logit_kernel=u,
        value_kernel=w,
    )
    close(got[:, before : before + 8], wanted, 1e-6)
    assert (np.asarray(got)[~valid] == 0).all()


@pytest.mark.parametrize("width", [1, 5, 20, 33])
def test_taps_convolve(rng, width):
    x, taps = draw(rng, 2, 20, 1, 3), draw(rng, width)
    got = run(ops.positional_mix, taps, x)
    for b, c in itertools.product(range(2), range(3)):
        close(got[b, :, 0, c], np.convolve(x[b, :, 0, c], taps)[:20], 1e-5)


def test_without_kernels_the_order_of_the_past_is_lost(rng):
    arrays = qkv(rng, 1, 8, 1, 4, 4)
    order = np.array([3, 0, 6, 2, 1, 5, 4, 7])
    shuffled = [x[:, order] for x in arrays]
    taps = draw(rng, 8)
    close(
        run(pka, *shuffled, logit_kernel=None, value_kernel=None)[:, -1],
        run(pka, *arrays, logit_kernel=None, value_kernel=None)[:, -1],
        1e-6,
    )
    for u, w in [(taps, None), (None, taps)]:
        outs = [run(pka, *x, logit_kernel=u, value_kernel=w)[:, -1] for x in (shuffled, arrays)]
        assert np.abs(np.asarray(outs[0] - outs[1])).max() > 0.01


def test_gauge(rng):
    q, k, v = qkv(rng, 1, 9, 1, 4, 4)
    u, w = draw(rng, 9), draw(rng, 9)
    close(
        run(pka, 2 * q, k, v, u / 2, w),
        run(pka, q, k, v, u, w),
        1e-6,
    )


@pytest.mark.parametrize("structure", ["toeplitz", "full"])
def test_tie(rng, structure):
    """L = U^T."""
    arrays = qkv(rng, 2, 9, 2, 4, 3)
    u = kernel_of(rng, structure, 9)
    wanted = oracle.positional_kernel_attention(
        *arrays, u, None, structure=(structure, structure), tie=True
    )
    got = run(functools.partial(pka, structure=structure, tie=True), *arrays, u, None)
    close(got, wanted, 1e-5)
    transposed = u if structure == "toeplitz" else u.T
    close(got, run(functools.partial(pka, structure=structure), *arrays, u, transposed), 1e-6)


# The mix, in each of its forms


@functools.cache
def mix(structure, upper, block, quick=True):
    """Values and gradients of the mix, the tile size in the test's hand."""

    def f(kernel, x, valid=None, segment_ids=None, positions=None):
        options = _attention_mix.Options(structure, upper, block)
        inputs = _attention_mix.Inputs(kernel, x, valid, segment_ids, positions)
        return _attention_mix.mix(options, inputs)

    return gradients_of(f, cases.QUICK if quick else None)


# structure, kernel size, tile size
FORMS = {
    "taps": ("toeplitz", 29, None),
    "taps_band": ("toeplitz", 11, None),
    "taps_tiles": ("toeplitz", 29, 8),
    "taps_band_tiles": ("toeplitz", 11, 4),
    "full": ("full", 31, None),
    "full_tiles": ("full", 31, 8),
}


def check_mix(rng, structure, size, block, length, pattern, heads, upper=False, positions=None):
    """The mix is linear in the kernel and in the input, which pins both gradients exactly."""
    valid, ids = cases.rows(pattern, 2, length)
    if structure == "full" and positions is None and ids is not None:
        positions = np.asarray(ops.segment_positions(ids, valid=valid))
    x, d_out = draw(rng, 2, length, 2, 3), draw(rng, 2, length, 2, 3)
    kernel = kernel_of(rng, structure, size, heads)
    lead = kernel if heads else kernel[None]
    compute = mix(structure, upper, block, length < 100)
    masks = {"valid": valid, "segment_ids": ids, "positions": positions}
    out, (d_kernel, d_x) = compute([lead, x], d_out, **masks)

    def exact(kernel, x):
        return oracle.positional_mix(
            kernel,
            x,
            structure,
            is_upper=upper,
            **masks,
        )

    close(out, exact(kernel, x), 1e-5, "out")
    for _ in range(2):
        e_x, e_kernel = draw(rng, *x.shape), draw(rng, *kernel.shape)
        size = np.linalg.norm(x) * np.linalg.norm(kernel)
        along_x, along_kernel = (d_x * e_x).sum(), (d_kernel.reshape(kernel.shape) * e_kernel).sum()
        assert abs(along_x - (exact(kernel, e_x) * d_out).sum()) < 1e-5 * size, "d_x"
        assert abs(along_kernel - (exact(e_kernel, x) * d_out).sum()) < 1e-5 * size, "d_kernel"
    if valid is not None:
        assert (np.asarray(d_x)[~valid] == 0).all()
        assert (np.asarray(out)[~valid] == 0).all()


# One compilation for plain rows and shared kernels, one for masked rows and a kernel a head.
@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (form, pattern)
        for form in FORMS
        for pattern in ("plain", "packed", "packed_holes", "interleaved")
        # Positions in a full factor count along runs of equal ids.
        if not (form.startswith("full") and pattern == "interleaved")
    ],
)
def test_mix_values_and_gradients(rng, form, pattern):
    structure, size, block = FORMS[form]
    masked = pattern != "plain"
    check_mix(rng, structure, size, block, 29, pattern, 2 if masked else None, upper=masked)


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("pattern", ["plain", "packed"])
def test_mix_at_given_positions(rng, block, pattern):
    """Positions in any order, repeated, and outside the factor, where the kernel is zero."""
    positions = rng.integers(-2, 14, (2, 29)).astype(np.int32)
    upper = pattern == "plain"
    check_mix(rng, "full", 12, block, 29, pattern, None, upper=upper, positions=positions)


@pytest.mark.parametrize(
    ("structure", "size", "length"),
    [("toeplitz", 130, 130), ("toeplitz", 40, 200), ("full", 130, 130)],
)
def test_mix_in_several_row_blocks(rng, structure, size, length):
    check_mix(rng, structure, size, None, length, "packed_holes", None)


@pytest.mark.parametrize("structure", ["toeplitz", "full"])
def test_long_rows_through_the_public_op(rng, structure):
    """Length 1060, in blocks: the first events of some segments against the literal form."""
    arrays = qkv(rng, 1, 1060, 1, 2, 2)
    ids = np.repeat(np.arange(10), 106).astype(np.int32)[None]
    u, w = (0.3 * kernel_of(rng, structure, 106) for _ in range(2))
    positions = ops.segment_positions(ids)
    f = functools.partial(pka, structure=structure, segment_ids=ids, positions=positions)
    got = run(f, *arrays, u, w)
    for start in (0, 5 * 106, 9 * 106):
        own = [x[:, start : start + 30] for x in arrays]
        exact = oracle.positional_kernel_attention(*own, u, w, structure=(structure, structure))
        close(got[:, start : start + 30], exact, 1e-5)


@pytest.mark.parametrize(
    ("structure", "band"), [("toeplitz", None), ("toeplitz", 3), ("full", None)]
)
def test_long_rows_form_no_square(structure, band):
    """The largest array of forward and backward: a tile, or the full factor's own parameters."""
    x = jax.ShapeDtypeStruct((2, 4096, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    kernel = jax.eval_shape(lambda: ops.init_positional_kernel(structure, 4096, band=band))

    def gradients(q, k, v, u, w, ids):
        def total(*a):
            return pka(*a, structure=structure, segment_ids=ids, valid=ids > 0).sum()

        return jax.grad(total, (0, 1, 2, 3, 4))(q, k, v, u, w)

    largest = cases.largest_intermediate(gradients, x, x, x, kernel, kernel, ids)
    assert largest <= {"toeplitz": 2 * 4096 * 256, "full": 4096 * 4096}[structure]


def test_other_triangle_is_ignored_and_gets_zero_gradient(rng):
    arrays = qkv(rng, 2, 9, 1, 4, 4)
    u, w = draw(rng, 9, 9), draw(rng, 9, 9)
    d_out = draw(rng, 2, 9, 1, 4)
    both = gradients_of(functools.partial(pka, structure="full"))
    out, gradients = both([*arrays, u, w], d_out)
    assert (np.asarray(gradients[3])[np.tril_indices(9, -1)] == 0).all()
    assert (np.asarray(gradients[4])[np.triu_indices(9, 1)] == 0).all()
    assert (np.asarray(gradients[3])[np.triu_indices(9)] != 0).mean() > 0.9
    assert (np.asarray(gradients[4])[np.tril_indices(9)] != 0).mean() > 0.9
    u[np.tril_indices(9, -1)] = np.nan
    w[np.triu_indices(9, 1)] = np.nan
    np.testing.assert_array_equal(both([*arrays, u, w], d_out)[0], out)


# Packed and padded rows


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 19), max_size=4, unique=True).map(sorted),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    structure=st.sampled_from(["toeplitz", "full"]),
    seed=st.integers(0, 2**16),
)
def test_packed_is_separate(cuts, pad, structure, seed):
    rng = np.random.default_rng(seed)
    edges = [0, *cuts, 20]
    names = rng.permutation(100)[: len(edges) - 1] - 50
    ids = np.repeat(names, np.diff(edges)).astype(np.int32)[None]
    valid = np.ones((1, 20), bool)
    valid[:, : pad[0]] = False
    valid[:, 20 - pad[1] :] = False
    arrays = qkv(rng, 1, 20, 2, 3, 2)
    u, w = (kernel_of(rng, structure, 20) for _ in range(2))
    out = packed(structure)(*arrays, u, w, valid=valid, segment_ids=ids)
    for start, end in itertools.pairwise(edges):
        inside = slice(max(start, pad[0]), min(end, 20 - pad[1]))
        own = [x[:, inside] for x in arrays]
        wanted = oracle.positional_kernel_attention(*own, u, w, structure=(structure, structure))
        close(out[:, inside], wanted, 5e-5)


@functools.cache
def packed(structure):
    return jax.jit(functools.partial(pka, structure=structure), compiler_options=cases.QUICK)


def test_mix_zeroes_what_is_invalid(rng):
    x = draw(rng, 2, 6, 1, 2)
    valid = np.array([[1, 1, 0, 1, 1, 0], [0] * 6], bool)
    x[~valid] = np.nan
    for kernel in (None, np.ones(3, np.float32), np.ones(6, np.float32)):
        out = np.asarray(run(functools.partial(ops.positional_mix, valid=valid), kernel, x))
        assert (out[~valid] == 0).all()
        assert np.isfinite(out).all()


def test_full_factor_aligned_to_the_end(rng):
    """A shorter sequence sees the end of the factor, as padded on the left to full length."""
    arrays = qkv(rng, 2, 6, 1, 3, 3)
    u, w = draw(rng, 10, 10), draw(rng, 10, 10)
    f = functools.partial(pka, structure="full")
    ids = np.zeros((2, 6), np.int32)
    newest = ops.segment_positions(ids, origin="newest", size=10)
    got = run(functools.partial(f, positions=newest), *arrays, u, w)
    left = [np.pad(x, ((0, 0), (4, 0), (0, 0), (0, 0))) for x in arrays]
    valid = np.arange(10)[None].repeat(2, 0) >= 4
    close(got, run(functools.partial(f, valid=valid), *left, u, w)[:, 4:], 1e-6)
    oldest = run(f, *arrays, u, w)
    assert np.abs(np.asarray(got - oldest)).max() > 0.01
    close(oldest, run(f, *arrays, u[:6, :6], w[:6, :6]), 1e-6)


def test_longer_than_the_taps(rng):
    arrays = qkv(rng, 1, 15, 1, 3, 3)
    u, w = draw(rng, 4), draw(rng, 10)
    wide = [np.pad(x, (0, 15 - len(x))) for x in (u, w)]
    close(run(pka, *arrays, u, w), run(pka, *arrays, *wide), 1e-6)


# Options


def test_dropout_is_that_of_causal_attention(rng):
    q, k, v = qkv(rng, 2, 12, 1, 4, 4)
    u, w = draw(rng, 12), draw(rng, 12)
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(5)}
    got = run(functools.partial(pka, **options), q, k, v, u, w)
    mixed = [run(ops.positional_mix, kernel, x) for kernel, x in ((u, k), (w, v))]
    close(got, run(functools.partial(ops.causal_attention, **options), q, *mixed), 1e-6)


def test_scale(rng):
    q, k, v = qkv(rng, 1, 7, 1, 4, 4)
    u, w = draw(rng, 7), draw(rng, 7)
    got = run(functools.partial(pka, scale=0.7), q, k, v, u, w)
    wanted = oracle.positional_kernel_attention(
        q, k, v, u, w, structure=("toeplitz", "toeplitz"), scale=0.7
    )
    close(got, wanted, 1e-5)


@pytest.mark.parametrize("structure", ["toeplitz", "full"])
def test_bfloat16(rng, structure):
    low = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    arrays = [low(x) for x in qkv(rng, 2, 24, 2, 8, 8)]
    u, w = (0.3 * kernel_of(rng, structure, 24) for _ in range(2))
    d_out = low(draw(rng, 2, 24, 2, 8))
    out, gradients = gradients_of(functools.partial(pka, structure=structure))(
        [*arrays, u, w], d_out
    )
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 3 + [jnp.float32] * 2
    exact = [np.asarray(x, np.float64) for x in arrays]
    close(
        out,
        oracle.positional_kernel_attention(*exact, u, w, structure=(structure, structure)),
        2**-6,
    )
    _, wanted = gradients_of(functools.partial(pka, structure=structure))(
        [*(x.astype(np.float32) for x in exact), u, w], np.asarray(d_out, np.float32)
    )
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want, 2**-5)


def test_mix_accumulates_in_float32():
    """513 ones in bfloat16 would stop growing at 256."""
    x = jnp.ones((1, 513, 1, 1), jnp.bfloat16)
    out = run(ops.positional_mix, jnp.ones(513), x)
    close(out[0, -1], [[512]], 0.01)  # 513 to the nearest bfloat16


@pytest.mark.parametrize("shape", [(0, 5, 1, 4), (2, 0, 1, 4)])
def test_empty(shape):
    x, taps = jnp.zeros(shape), jnp.ones(3)
    gradient = jax.grad(lambda u: pka(x, x, x, u, u).sum())(taps)
    assert pka(x, x, x, taps, taps).shape == shape
    np.testing.assert_array_equal(gradient, [0, 0, 0])


def test_structure_is_told_from_the_shape(rng):
    arrays = qkv(rng, 1, 6, 3, 2, 2)
    wide, full, per_head = draw(rng, 3, 5), draw(rng, 6, 6), draw(rng, 3, 6, 6)
    for u, w, structure in [
        (wide, full, ("toeplitz", "full")),
        (per_head, wide, ("full", "toeplitz")),
        (draw(rng, 4), None, ("toeplitz", "identity")),
    ]:
        np.testing.assert_array_equal(
            run(pka, *arrays, u, w), run(functools.partial(pka, structure=structure), *arrays, u, w)
        )
    square = draw(rng, 3, 3)
    short = [x[:, :3] for x in arrays]
    for structure in ("toeplitz", "full"):
        got = run(functools.partial(pka, structure=structure), *short, square, square)
        close(
            got,
            oracle.positional_kernel_attention(
                *short, square, square, structure=(structure, structure)
            ),
            1e-5,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_kernel": np.ones((2, 2))}, r"can be taps \[heads, width\] or a full factor"),
        ({"logit_kernel": np.ones((3, 5))}, r"got shape \(3, 5\)"),
        ({"logit_kernel": np.ones((3, 6, 6))}, "heads=2; got shape"),
        ({"logit_kernel": np.ones((2, 6, 5))}, "heads=2; got shape"),
        ({"logit_kernel": np.ones(())}, "got shape"),
        ({"logit_kernel": np.ones(0)}, "got shape"),
        ({"logit_kernel": np.ones(6), "structure": "full"}, r"must be \[size, size\]"),
        ({"value_kernel": np.ones((6, 6)), "structure": "toeplitz"}, "value_kernel must be"),
        ({"value_kernel": np.ones((2, 6, 6)), "structure": "toeplitz"}, "value_kernel must be"),
        ({"logit_kernel": np.ones(6), "structure": "identity"}, "takes no kernel"),
        ({"structure": "hankel"}, "structure must be one of"),
        ({"structure": ("full", "full", "full")}, "a pair"),
        ({"logit_kernel": np.ones((5, 5))}, "size 5, shorter than the sequence of length 6"),
        ({"value_kernel": np.ones((2, 5, 5))}, "value_kernel is a full factor of size 5"),
        ({"logit_kernel": np.ones(6), "value_kernel": np.ones(6), "tie": True}, "tie=True"),
        ({"logit_kernel": np.ones(6, np.int32)}, "logit_kernel must be float32"),
        ({"positions": np.zeros((6,), np.int32)}, r"positions must be \[batch, length\]"),
        ({"positions": np.zeros((1, 6), np.float32)}, "positions must be integer"),
        ({"dropout_rate": 0.5}, "needs a dropout_key"),
        ({"implementation": "pallas"}, "cannot run: 2 heads of 4 do not fill"),
        ({"key": np.zeros((1, 6, 1, 4), np.float32)}, "must have the same shape"),
    ],
)
def test_errors(change, message):
    x = np.zeros((1, 6, 2, 4), np.float32)
    arguments = {"query": x, "key": x, "value": x, "logit_kernel": None, "value_kernel": None}
    change = {
        k: v.astype(np.float32) if k.endswith("kernel") and v.dtype == np.float64 else v
        for k, v in change.items()
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: pka(**(arguments | change)))


def test_errors_of_the_mix():
    x = np.zeros((1, 6, 2, 4), np.float32)
    for kernel, arguments, message in [
        (None, {"x": x[0]}, r"x must be \[batch, length, heads, width\]"),
        (np.ones((5, 5), np.float32), {"x": x}, "shorter than the sequence"),
        (np.ones((2, 2), np.float32), {"x": x}, "say which"),
        (None, {"x": x, "implementation": "pallas"}, "mixes within an attention only"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.positional_mix(kernel, **arguments)


# Initial values


def test_init():
    init = ops.init_positional_kernel
    assert init("identity", 5) is None
    np.testing.assert_array_equal(init("toeplitz", 4, band=2, heads=3), [[1, 0]] * 3)
    np.testing.assert_array_equal(init("full", 3, heads=2), [np.eye(3)] * 2)
    lags = np.arange(1.0, 5)
    close(init("toeplitz", 4, init="powerlaw", power=1.2), lags**-1.2, 1e-6)
    np.testing.assert_array_equal(init("toeplitz", 4, init="powerlaw", power=0.0), np.ones(4))
    # 1e-6 is reached at lag 9 with power 6
    steep = np.asarray(init("toeplitz", 12, init="powerlaw", power=6.0))
    assert (steep > 0).tolist() == [True] * 9 + [False] * 3 or (steep > 0).sum() == 10
    full = np.asarray(init("full", 4, init="powerlaw", band=3))
    lower = sum(lags[t] ** -1.0 * np.eye(4, k=-t) for t in range(3))
    close(np.tril(full), lower, 1e-6)
    close(np.triu(full), lower.T, 1e-6)
    assert init("toeplitz", 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("init", ["identity", "powerlaw"])
def test_taps_and_full_start_alike(rng, init):
    arrays = qkv(rng, 1, 7, 1, 3, 3)
    taps = ops.init_positional_kernel("toeplitz", 7, init=init)
    full = ops.init_positional_kernel("full", 7, init=init)
    close(
        run(functools.partial(pka, structure="full"), *arrays, full, full),
        run(pka, *arrays, taps, taps),
        1e-6,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "hankel"}, "structure must be one of"),
        ({"init": "zeros"}, "init must be"),
        ({"length": 0}, "length >= 1"),
        ({"band": 6}, "band <= length"),
        ({"band": 0}, "1 <= band"),
        ({"heads": 0}, "heads >= 1"),
    ],
)
def test_init_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.init_positional_kernel(**({"structure": "toeplitz", "length": 5} | arguments))


# Positions


def test_segment_positions():
    ids = jnp.asarray([[4, 4, 4, 4, 2, 2, 2, 9]])
    assert ops.segment_positions(ids).tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    valid = jnp.asarray([[0, 1, 0, 1, 1, 1, 0, 0]], bool)
    assert ops.segment_positions(ids, valid=valid).tolist() == [[-1, 0, 1, 2, 0, 1, 2, 0]]
    newest = ops.segment_positions(ids, valid=valid, origin="newest", size=10)
    assert newest.tolist() == [[6, 7, 8, 9, 8, 9, 10, 9]]
    assert ops.segment_positions(valid=valid).tolist() == [[-1, 0, 1, 2, 3, 4, 5, 6]]
    assert ops.segment_positions(valid=valid, origin="newest").tolist() == [
        [2, 3, 4, 5, 6, 7, 8, 9]
    ]
    assert ops.segment_positions(jnp.zeros((2, 0), jnp.int32)).shape == (2, 0)


@pytest.mark.parametrize("pattern", ["packed", "packed_holes"])
def test_segment_positions_against_loops(pattern):
    valid, ids = cases.rows(pattern, 4, 40)
    got = np.asarray(ops.segment_positions(ids, valid=valid))
    loops = [
        oracle.positions_of(np.ones(40, bool) if valid is None else valid[b], ids[b], True)
        for b in range(4)
    ]
    np.testing.assert_array_equal(got, loops)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give segment_ids or valid"),
        ({"segment_ids": jnp.zeros((3,), jnp.int32)}, r"wants \[batch, length\]"),
        ({"segment_ids": jnp.zeros((1, 3))}, "must be integer"),
        ({"valid": jnp.zeros((1, 3))}, "must be bool"),
        ({"valid": jnp.zeros((1, 3), bool), "origin": "middle"}, "origin must be"),
    ],
)
def test_segment_positions_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.segment_positions(**arguments)


# Transformations


def one_slice(remat, q, k, v, ids, u, w):
    def total(*arrays):
        def f(q, k, v, u, w):
            return pka(
                q,
                k,
                v,
                u,
                w,
                structure=("toeplitz", "full"),
                segment_ids=ids,
                valid=ids > 0,
                dropout_rate=0.2,
                dropout_key=jax.random.key(0),
            )

        out = (jax.checkpoint(f) if remat else f)(*arrays)
        return (out**2).sum(), out

    (_, out), gradients = jax.value_and_grad(total, range(5), has_aux=True)(q, k, v, u, w)
    return out, gradients


@functools.cache
def sliced():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(draw(rng, 8, 1, 12, 2, 4)) for _ in range(3)]
    ids = jnp.asarray(np.tile(np.repeat([1, 2], 6).astype(np.int32), (8, 1, 1)))
    u, w = jnp.asarray(draw(rng, 12)), jnp.asarray(draw(rng, 12, 12))
    f = jax.jit(functools.partial(one_slice, False), compiler_options=cases.QUICK)
    wanted = [f(*(x[i] for x in (*arrays, ids)), u, w) for i in range(8)]
    return (*arrays, ids), (u, w), jax.tree.map(lambda *x: np.stack(x), *wanted)


@pytest.mark.parametrize("transform", ["vmap", "scan", "remat", "pmap"])
def test_transformations(transform):
    arguments, kernels, wanted = sliced()
    f = functools.partial(one_slice, transform == "remat")

    def bound(*x):
        return f(*x, *kernels)

    if transform == "scan":
        got = run(lambda *a: jax.lax.scan(lambda _, x: (None, bound(*x)), None, a)[1], *arguments)
    elif transform == "pmap":
        got = jax.pmap(bound)(*arguments)
    else:
        got = run(jax.vmap(bound), *arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        close(a, b, 1e-5)


def test_shard_map_sums_the_kernels_gradient():
    """Rows over eight devices, kernels on all: the kernels' gradient is summed over the mesh."""
    arguments, kernels, wanted = sliced()
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    rows, all_of_it = PartitionSpec("data"), PartitionSpec()

    def local(q, k, v, ids, u, w):
        out, gradients = one_slice(False, q[0], k[0], v[0], ids[0], u, w)
        return out[None], [g[None] for g in gradients[:3]], gradients[3:]

    got = run(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows,) * 4 + (all_of_it,) * 2,
            out_specs=(rows, [rows] * 3, (all_of_it,) * 2),
        ),
        *arguments,
        *kernels,
    )
    out, gradients = wanted
    exact = (out, list(gradients[:3]), tuple(g.sum(0) for g in gradients[3:]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        close(a, b, 1e-5)


def test_sharded_by_jit(rng):
    """Without shard_map, the compiler splits the batch: no loop over it, same result."""
    arrays = qkv(rng, 8, 12, 2, 4, 4)
    u, w = draw(rng, 12), draw(rng, 12)
    wanted = run(pka, *arrays, u, w)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    got = run(pka, *(jax.device_put(x, sharding) for x in arrays), u, w)
    close(got, wanted, 1e-6)
