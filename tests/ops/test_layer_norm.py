"""Layer normalisation against its formula in float64, and its gradient against differences.

Mutations seen to fail: variance with Bessel's correction, either mean left out of dx, dscale from x
instead of the normalised x, epsilon outside of the root.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, draw
from jax.sharding import AxisType, PartitionSpec
from oracles.attention import finite_differences

from jaxrec import ops

EPSILON = 1e-2


def formula(x, scale=None, bias=None):
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index]
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        out[index] = (row - mean) / np.sqrt(variance + EPSILON)
    out = out if scale is None else out * np.asarray(scale, np.float64)
    return out if bias is None else out + np.asarray(bias, np.float64)


@pytest.mark.parametrize("affine", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 7)])
def test_values_and_gradients(rng, shape, affine):
    arrays = [draw(rng, *shape) * 2 + 1]
    names = [name for name, there in zip(("scale", "bias"), affine, strict=True) if there]
    arrays += [draw(rng, shape[-1]) for _ in names]
    d_out = draw(rng, *shape)

    def given(x, *vectors):
        return x, dict(zip(names, vectors, strict=True))

    def op(*arrays):
        x, vectors = given(*arrays)
        return ops.layer_norm(x, **vectors, epsilon=EPSILON)

    def total(*arrays):
        x, vectors = given(*arrays)
        return (formula(x, **vectors) * d_out).sum()

    out, pull = jax.vjp(jax.jit(op), *map(jnp.asarray, arrays))
    x, vectors = given(*arrays)
    close(out, formula(x, **vectors), 1e-6)
    wanted = finite_differences(total, arrays)
    for got, want in zip(pull(jnp.asarray(d_out)), wanted, strict=True):
        close(got, want, 2e-5)


def test_bfloat16_keeps_its_statistics_in_float32(rng):
    x = jnp.asarray(draw(rng, 4, 256) + 100, jnp.bfloat16)
    scale = jnp.asarray(draw(rng, 256))
    out = ops.layer_norm(x, scale, epsilon=EPSILON)
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), formula(x.astype(jnp.float32), scale), 1e-2)
    d_x, d_scale = jax.grad(lambda *a: ops.layer_norm(*a).astype(jnp.float32).sum(), (0, 1))(
        x, scale
    )
    assert d_x.dtype == jnp.bfloat16
    assert d_scale.dtype == jnp.float32


def test_batched_and_on_devices(rng):
    x, scale = jnp.asarray(draw(rng, 8, 3, 4)), jnp.asarray(draw(rng, 4))

    def total(x, scale):
        return (ops.layer_norm(x, scale) ** 3).sum()

    wanted = jax.grad(total, (0, 1))(x, scale)
    by_row = jax.vmap(jax.grad(total, (0, 1)), (0, None))(x, scale)
    close(by_row[0], wanted[0], 1e-6)
    close(by_row[1].sum(0), wanted[1], 1e-5)
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    parts = jax.shard_map(
        lambda x, scale: jax.lax.psum(total(x, scale), "data"),
        mesh=mesh,
        in_specs=(rows, everywhere),
        out_specs=everywhere,
    )
    for got, want in zip(jax.jit(jax.grad(parts, (0, 1)))(x, scale), wanted, strict=True):
        close(got, want, 1e-5)


def test_a_constant_row_is_the_bias():
    out = ops.layer_norm(jnp.full((2, 4), 3.0), jnp.ones(4), jnp.arange(4.0), epsilon=1e-8)
    np.testing.assert_array_equal(out, np.tile(np.arange(4.0), (2, 1)))


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match=r"layer_norm: scale must have shape \(4,\), got \(3,\)"):
        ops.layer_norm(jnp.ones((2, 4)), jnp.ones(3))
    with pytest.raises(ValueError, match="at least one axis"):
        ops.layer_norm(jnp.float32(1))
    with pytest.raises(ValueError, match="float32 or bfloat16, got int32"):
        ops.layer_norm(jnp.arange(4))
