"""Small Flax NNX layers that the models share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.ops import dropout


class Linear(nnx.Module):
    """y = x W + b with W ~ N(0, init_scale) and b = 0; parameters float32, output in x's dtype.

    With `uniform`, W is uniform with the same standard deviation instead.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        init_scale: float,
        use_bias: bool = True,
        uniform: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (features_in, features_out)
        if uniform:
            bound = init_scale * 3**0.5
            kernel = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        else:
            kernel = init_scale * jax.random.normal(rngs.params(), shape)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(features_out)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + _last(self.bias[...].astype(x.dtype), y)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, with a learned scale and bias if `affine`.

    Statistics are in float32.
    """

    def __init__(self, features: int, *, epsilon: float, affine: bool = True) -> None:
        self.scale = nnx.Param(jnp.ones(features)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features)) if affine else None
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.epsilon)
        if self.scale is not None and self.bias is not None:
            y = y * _last(self.scale[...], y) + _last(self.bias[...], y)
        return y.astype(x.dtype)


def _last(vector: Array, like: Array) -> Array:
    """A vector over the last axis with the rank of `like`: some users forbid rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


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
