"""Items drawn at random on the device: the negatives of sampled losses."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrec.ops import _catalogue, _manual_axes

_OP = "sample_items"


def sample_items(
    key: Array,
    num_items: int,
    shape: Sequence[int] | int,
    *,
    weights: Float[Array, " items"] | None = None,
) -> Int[Array, "..."]:
    """Item ids drawn independently, with replacement.

        P(id = v) = weights_v / sum_u weights_u,    1 / num_items without weights

    Weighted draws invert the cumulative distribution in two steps, a group of about sqrt(V) items
    and then an item in it, each by a binary search: float32 then resolves the shares of a
    catalogue of millions, which one cumulative sum in float32 cannot.

    Args:
      key: a JAX random key.
      num_items: V, a Python integer from 1.
      shape: of the result.
      weights: [V], float32 or bfloat16, not negative, with a finite positive sum: counts for
        popularity, or a power of them. An item of weight 0 is never drawn. What is drawn with other
        weights is some item.

    Returns:
      int32 `shape`, ids from 0 to V - 1. The log-probabilities that a correction needs are
      ``jnp.log(weights / weights.sum())[ids]``.

    Raises:
      ValueError: `num_items` is no positive integer, or `weights` does not fit.

    Cost: uniform, one random number a draw; weighted, two random numbers and log2(V) reads a draw,
    and O(V) once a call.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxrec import ops
      >>> weights = jnp.array([1.0, 0.0, 3.0])
      >>> ids = ops.sample_items(jax.random.key(0), 3, (1000,), weights=weights)
      >>> [bool(share > 0.2) for share in jnp.bincount(ids, length=3) / 1000]
      [True, False, True]
    """
    if isinstance(num_items, bool) or not hasattr(num_items, "__index__") or int(num_items) < 1:
        raise ValueError(f"{_OP}: num_items must be a positive Python integer, got {num_items!r}")
    items = int(num_items)
    shape = (int(shape),) if hasattr(shape, "__index__") else tuple(shape)
    if weights is None:
        return jax.random.randint(key, shape, 0, items, jnp.int32)
    weights = jnp.asarray(weights)
    _catalogue.check_float(_OP, "weights", weights)
    _catalogue.check_shape(_OP, "weights", weights, (items,))
    size = math.isqrt(items - 1) + 1
    groups = -(-items // size)
    grouped = jnp.pad(weights.astype(jnp.float32), (0, groups * size - items)).reshape(groups, size)
    group_key, item_key = jax.random.split(key)
    group = _invert(_cumulative(grouped.sum(1)), jnp.zeros(shape, jnp.int32), groups, group_key)
    ids = _invert(_cumulative(grouped).reshape(-1), group * size, size, item_key)
    # Weights without a finite positive sum lead beyond the last item.
    return jnp.minimum(ids, jnp.int32(items - 1))


def _cumulative(weights: jax.Array) -> jax.Array:
    """Running sums along the last axis that never fall and do not rise where a weight is 0."""
    total = jnp.cumsum(weights, -1)
    # Summed in parallel, two of them may differ by rounding alone.
    return lax.cummax(jnp.where(weights > 0, total, jnp.float32(0)), weights.ndim - 1)


def _invert(cumulative: jax.Array, start: jax.Array, size: int, key: Any) -> jax.Array:
    """The first index in [start, start + size) whose sum is above a uniform part of the last."""
    last = start + jnp.int32(size - 1)
    # Below 1, and so is the product below the last sum.
    goal = jax.random.uniform(key, start.shape) * cumulative[last]
    start, last, goal, cumulative = _manual_axes.vary_together(start, last, goal, cumulative)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        above = cumulative[middle] > goal
        return jnp.where(above, low, middle + 1), jnp.where(above, middle, high)

    steps = max(1, size - 1).bit_length()
    return lax.fori_loop(0, steps, halve, (start, last))[1]
