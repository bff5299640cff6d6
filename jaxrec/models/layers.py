"""Small Flax NNX layers that the models share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.ops import dropout, layer_norm


def initial(
    shape: tuple[int, ...], *, scale: float | None, uniform: bool = False, rngs: nnx.Rngs
) -> nnx.Param:
    """A parameter of random numbers with mean 0.

    Args:
      shape: [rows, columns] of a matrix or a table, or [rows].
      scale: standard deviation; None for Xavier's (Glorot and Bengio 2010),
        sqrt(2 / (rows + columns)), with one column for a vector.
      uniform: uniform numbers of that standard deviation instead of normal ones.
      rngs: the source.
    """
    if scale is None:
        rows, columns = (*shape, 1)[:2]
        scale = (2.0 / (rows + columns)) ** 0.5
    if uniform:
        bound = scale * 3**0.5
        return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
    # Under jit the compiler would make one factor of this one and of the last one in `normal`: a
    # table that is made on a mesh would differ in its last bits from one that is made outside.
    return nnx.Param(scale * jax.lax.optimization_barrier(jax.random.normal(rngs.params(), shape)))


class Linear(nnx.Module):
    """y = x W + b; W random (`initial`), b = 0; parameters float32, output in x's dtype."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        init_scale: float | None,
        use_bias: bool = True,
        uniform: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (features_in, features_out)
        self.kernel = initial(shape, scale=init_scale, uniform=uniform, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(features_out)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        # As one matrix: the gradient of W is then one plain product, twice as fast on a CPU.
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None, :]
        return y.reshape(*x.shape[:-1], y.shape[-1])


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, with a learned scale and bias if `affine`.

    Statistics are in float32.
    """

    def __init__(self, features: int, *, epsilon: float, affine: bool = True) -> None:
        self.scale = nnx.Param(jnp.ones(features)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features)) if affine else None
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        return layer_norm(x, scale, bias, epsilon=self.epsilon)


def unit_rows(x: Array) -> Array:
    """x / |x| along the last axis, in x's dtype; a zero row stays zero, and so does its gradient.

    Example:
      >>> [round(float(v), 4) for v in unit_rows(jnp.array([3.0, 4.0]))]
      [0.6, 0.8]
    """
    y = x.astype(jnp.float32)
    squared = jnp.square(y).sum(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))).astype(x.dtype)


class Keys:
    """Hands out one dropout key after the other; `None` throughout when there is no dropout."""

    def __init__(self, key: Array | None) -> None:
        self._key = key
        self._count = 0

    def next(self) -> Array | None:
        if self._key is None:
            return None
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def maybe_dropout(x: Array, rate: float, keys: Keys) -> Array:
    """Dropout where there is a key, the identity where there is none."""
    key = keys.next()
    return x if key is None or rate == 0.0 else dropout(x, rate, key=key)


def activation_dtype(name: str) -> Any:
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
