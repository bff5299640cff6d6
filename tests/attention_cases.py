"""Inputs that the attention tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

PATTERNS = ("plain", "left", "right", "packed", "packed_holes", "interleaved", "empty_rows")


def rows(pattern, batch, length):
    """`valid` and `segment_ids` of a batch, a different split in every row; `None` where plain."""
    valid = np.ones((batch, length), bool)
    ids = np.zeros((batch, length), np.int32)
    index = np.arange(length)
    rng = np.random.default_rng(length)
    for b in range(batch):
        pad = (b * 3 + 2) % max(length, 1)
        if pattern == "left":
            valid[b, :pad] = False
        elif pattern == "right":
            valid[b, length - pad :] = False
        elif pattern == "empty_rows":
            valid[b] = b % 2 == 1
        elif pattern in ("packed", "packed_holes"):
            # Ids neither start at 0 nor count up by 1, and their runs do not fit any block.
            cuts = np.sort(rng.integers(0, length + 1, 3))
            ids[b] = 7 * np.searchsorted(cuts, index, side="right") - 5
        elif pattern == "interleaved":
            ids[b] = rng.integers(0, 3, length)
    if pattern == "packed_holes":
        valid = rng.random((batch, length)) > 0.3
    if pattern == "plain":
        return None, None
    return valid, ids if "packed" in pattern or pattern == "interleaved" else None


def draw(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def qkv(rng, batch, length, heads, head_dim, value_dim, dtype=np.float32):
    shape = (batch, length, heads)
    return (
        draw(rng, *shape, head_dim, dtype=dtype),
        draw(rng, *shape, head_dim, dtype=dtype),
        draw(rng, *shape, value_dim, dtype=dtype),
    )


# These tests compile far more than they compute.
QUICK = {"xla_backend_optimization_level": 0}


def run(f, *args, **kwargs):
    """`f(*args, **kwargs)`, compiled at once instead of one operation at a time."""
    return jax.jit(lambda *a: f(*a, **kwargs), compiler_options=QUICK)(*args)


def gradients_of(f, compiler_options=QUICK):
    """Compiled `(arrays, d_out, **rest) -> out, gradients of sum(out * d_out)` in the arrays."""

    def both(arrays, d_out, rest):
        out, pull = jax.vjp(lambda *a: f(*a, **rest), *arrays)
        return out, pull(d_out)

    compiled = jax.jit(both, compiler_options=compiler_options)

    def call(arrays, d_out, **rest):
        # Always the same kind of argument, so that one compilation serves all patterns of masks.
        return compiled([jnp.asarray(a) for a in arrays], jnp.asarray(d_out), rest)

    return call


def close(got, want, tolerance, what=""):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: {got.shape} against {want.shape}"
    assert np.isfinite(got).all(), f"{what}: not finite"
    error = np.abs(got - want).max(initial=0.0)
    largest = max(1.0, np.abs(want).max(initial=0.0))
    assert error <= tolerance * largest, f"{what}: error {error:.3g} at size {largest:.3g}"


def largest_intermediate(f, *args):
    """Elements of the largest array that `f` computes, its inputs and loops included."""
    largest = 0

    def visit(jaxpr):
        nonlocal largest
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                largest = max(largest, int(np.prod(variable.aval.shape)))
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return largest
