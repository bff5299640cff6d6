"""Inverted dropout whose bits are a hash of the element's place."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxrec.ops._attention_dropout import dropout_seeds, mix
from jaxrec.ops._checks import check_float


def dropout(x: Float[Array, "..."], rate: float, *, key: Array) -> Float[Array, "..."]:
    """y_i = x_i / (1 - rate) with probability 1 - rate, else 0.

    The bit of element i is a hash of (key, i), about a dozen integer operations, so that it costs
    no pass over memory of its own and does not depend on how the array is laid out or blocked.

    Args:
      x: any float array, below 2^32 elements.
      rate: in [0, 1), static.
      key: a JAX random key.

    Raises:
      ValueError: `x` is no float array, or `rate` no Python number in [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> y = dropout(jnp.ones((1000,)), 0.25, key=jax.random.key(0))
      >>> sorted({round(float(v), 4) for v in y})
      [0.0, 1.3333]
    """
    x = jnp.asarray(x)
    check_float("dropout", "x", x)
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"dropout: rate must be a Python number in [0, 1), got {rate!r}")
    if rate == 0:
        return x
    index = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    seeds = dropout_seeds(key)
    bits = mix(index ^ seeds[0]) + seeds[1]
    keep = mix(bits) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))
