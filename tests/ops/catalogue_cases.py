"""Inputs that the tests of catalogue ops share."""

import contextlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec import ops

# The package's attribute of this name is the function.
loss_module = sys.modules[ops.linear_cross_entropy.__module__]
# These tests compile far more than they compute.
QUICK = {"xla_backend_optimization_level": 0}

# The default; blocks so small that every axis has several and a ragged one; and without one pass.
# Where a call says which positions are valid, blocks of these are sorted.
TILINGS = {
    "default": loss_module.CPU_TILING,
    "small": loss_module.Tiling(4, 6, 1 << 24, 4),
    "small_two_pass": loss_module.Tiling(4, 6, 0, 3),
}


@contextlib.contextmanager
def tiling(name):
    """Sets the size of blocks for what is traced inside."""
    names = ("CPU_TILING", "ACCELERATOR_TILING", "ONE_PASS_POSITIONS")
    before = [getattr(loss_module, n) for n in names]
    shortest = before[2] if name == "default" else 1
    try:
        for n, value in zip(names, (TILINGS[name], TILINGS[name], shortest), strict=True):
            setattr(loss_module, n, value)
        yield
    finally:
        for n, value in zip(names, before, strict=True):
            setattr(loss_module, n, value)


def draw(rng, positions, items, width, dtype=np.float32, scale=1.0):
    """hidden, item_table and labels; every label is given once where there is room."""
    hidden = rng.normal(size=(positions, width)) * scale
    table = rng.normal(size=(items, width)) * scale
    labels = rng.permutation(np.arange(positions) % items).astype(np.int32)
    return jnp.asarray(hidden, dtype), jnp.asarray(table, dtype), jnp.asarray(labels)


def double(x):
    return None if x is None else np.asarray(x).astype(np.float64)


def run(f, *arguments):
    return jax.jit(lambda *a: f(*a), compiler_options=QUICK)(*arguments)


def pulled(f, arguments, cotangent):
    """f(*arguments), and the gradients of sum(f * cotangent)."""

    def both(arguments, cotangent):
        out, pull = jax.vjp(f, *arguments)
        return out, pull(cotangent)

    return jax.jit(both, compiler_options=QUICK)(arguments, jnp.asarray(cotangent))


def close(got, want, tolerance, what=""):
    """Every element within `tolerance` of the largest wanted one."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape} against {want.shape}"
    assert np.isfinite(got).all(), f"{what}: not finite"
    error = np.abs(got - want).max(initial=0.0)
    assert error <= tolerance * np.abs(want).max(initial=1e-30), f"{what}: error {error:.3g}"
