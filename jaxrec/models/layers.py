"""Small Flax NNX layers that the models share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.ops import dropout


class Linear(nnx.Module):
    """y = x W + b with W ~ N(0, init_scale) and b = 0; parameters float32, output in x's dtype."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        init_scale: float,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (features_in, features_out)
        self.kernel = nnx.Param(init_scale * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(features_out)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, None]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis; statistics in float32."""

    def __init__(self, features: int, *, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return (y * self.scale[...][None, None] + self.bias[...][None, None]).astype(x.dtype)


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
