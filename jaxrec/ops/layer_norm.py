"""Layer normalisation with a gradient written out."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.ops._checks import as_arrays, check_float, statistics_dtype
from jaxrec.ops._manual_axes import vary_together

_OP = "layer_norm"


def layer_norm(
    x: Float[Array, "*rows width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "*rows width"]:
    """y = (x - mean x) / sqrt(var x + epsilon) * scale + bias, along the last axis.

    The variance is the mean of squared deviations, without Bessel's correction. With
    ``n = (x - mean x) / s`` and ``s`` the root, the gradient for cotangents g is::

        dx = (u - mean u - n mean(u n)) / s,  u = g scale
        dscale = sum g n,  dbias = sum g

    Args:
      x: float32 or bfloat16, at least one axis.
      scale, bias: learned vectors, or None for 1 and 0.
      epsilon: added to the variance.

    Returns:
      The shape and dtype of x; statistics are float32.

    Raises:
      ValueError: dtypes or shapes do not fit, or `epsilon` is no Python number from 0.

    Cost: one read and one write of x; two reads and one write for the gradient. Kept for it: x and
    two numbers a row. Automatic differentiation of the formula takes twice as long on a CPU.
    Reverse mode only.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (arXiv 1607.06450).

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(v), 3) for v in layer_norm(jnp.array([1.0, 2.0, 3.0]))]
      [-1.225, 0.0, 1.225]
    """
    x, scale, bias = as_arrays(x, scale, bias)
    check_float(_OP, "x", x)
    if not isinstance(epsilon, int | float) or not epsilon >= 0:
        raise ValueError(f"{_OP}: epsilon must be a Python number from 0, got {epsilon!r}")
    if x.ndim == 0:
        raise ValueError(f"{_OP}: x must have at least one axis, got shape {x.shape}")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None:
            check_float(_OP, name, vector)
            if vector.shape != x.shape[-1:]:
                raise ValueError(
                    f"{_OP}: {name} must have shape {x.shape[-1:]}, got {vector.shape}"
                )
    return _normalize(float(epsilon), *vary_together(x, scale, bias))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(epsilon: float, x: Array, scale: Any, bias: Any) -> Array:
    return _forward(epsilon, x, scale, bias)[0]


def _wide(vector: Array, like: Array) -> Array:
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


def _forward(epsilon: float, x: Array, scale: Any, bias: Any) -> tuple[Array, Any]:
    y = x.astype(statistics_dtype(x.dtype))
    mean = y.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + epsilon)
    out = (y - mean) * inverse
    if scale is not None:
        out = out * _wide(scale, out)
    if bias is not None:
        out = out + _wide(bias, out)
    return out.astype(x.dtype), (x, scale, bias, mean, inverse)


def _backward(epsilon: float, kept: Any, g: Array) -> tuple[Any, Any, Any]:
    x, scale, bias, mean, inverse = kept
    normal = (x.astype(mean.dtype) - mean) * inverse
    g = g.astype(mean.dtype)
    rows = tuple(range(x.ndim - 1))
    u = g if scale is None else g * _wide(scale, g)
    d_x = inverse * (u - u.mean(-1, keepdims=True) - normal * (u * normal).mean(-1, keepdims=True))
    d_scale = None if scale is None else (g * normal).sum(rows).astype(scale.dtype)
    d_bias = None if bias is None else g.sum(rows).astype(bias.dtype)
    return d_x.astype(x.dtype), d_scale, d_bias


_normalize.defvjp(_forward, _backward)
