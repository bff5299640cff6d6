"""One tile of causal softmax attention, keys down and queries along the lanes.

The statistics of the softmax are then rows, which reduce and broadcast over sublanes, and every
product that backward needs is a plain one or has a narrow operand transposed, never a square one.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

_F32 = jnp.float32
# Logits are in units of log 2.
LOG2E = math.log2(math.e)
MASKED = -1e30


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=_F32)


def zeroed(mask: Array, x: Array) -> Array:
    """`x` where the mask is true, zero elsewhere, of a number or not; the mask may broadcast.

    Numbers of 16 bits are cut out as bits: a selection would have them apart and together again.
    """
    if x.dtype.itemsize != 2:
        return jnp.where(mask, x, jnp.zeros((), x.dtype))
    ones = jnp.where(mask, -1, 0).astype(jnp.int16)
    bits = lax.bitcast_convert_type(x, jnp.int16)
    return lax.bitcast_convert_type(bits & ones, x.dtype)


def logits_of(key: Array, query: Array, factor: float, mask: Array | None) -> Array:
    """float32[keys, queries], in units of log 2."""
    logits = dot(key, query, (1, 1))
    if factor != 1.0:
        logits = logits * _F32(factor)
    return logits if mask is None else jnp.where(mask, logits, _F32(MASKED))


def visible(shape: tuple[int, int], *, diagonal: bool, same: Array | None = None) -> Array | None:
    """bool[keys, queries], or None where every query of the tile sees all of its keys.

    Args:
      shape: of the tile.
      diagonal: keys and queries begin at the same slot.
      same: bool[keys, queries], which are of one sequence; None for all.
    """
    if not diagonal:
        return same
    key, query = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    earlier = key <= query
    return earlier if same is None else earlier & same


class Softmax(NamedTuple):
    """What is known of some queries after some of their keys."""

    largest: Array  # float32[1, queries]: the largest logit
    total: Array  # float32[1, queries]: sum of weights, relative to it
    out: Array  # float32[head_dim, queries]: sum of weighted values

    @property
    def log_sum_exp(self) -> Array:
        """Natural, as the op has it."""
        return (self.largest + jnp.log2(self.total)) * _F32(1 / LOG2E)


def absorb(state: Softmax | None, logits: Array, value_down: Array, keep: Array | None) -> Softmax:
    """The state after some more keys, whose values are [head_dim, keys]; `keep` is of dropout."""
    top = jnp.max(logits, axis=0, keepdims=True)
    if state is not None:
        top = jnp.maximum(top, state.largest)
    weights = jnp.exp2(logits - top)
    total = jnp.sum(weights, axis=0, keepdims=True)
    if keep is not None:
        weights = weights * keep
    out = dot(value_down, weights.astype(value_down.dtype), (1, 0))
    if state is not None:
        shrink = jnp.exp2(state.largest - top)
        total, out = state.total * shrink + total, state.out * shrink + out
    return Softmax(top, total, out)


def through_softmax(
    logits: Array, lse: Array, d_weights: Array, delta: Array, keep: Array | None
) -> tuple[Array, Array]:
    """The weights that the values saw, and the gradient of the logits.

    Args:
      logits: in units of log 2, as `lse`, float32[1, queries], is.
      d_weights: products of values and gradients of the output.
      delta: float32[1, queries], the product of the output and its gradient.
      keep: the factor of dropout.
    """
    weights = jnp.exp2(logits - lse)
    dropped = weights
    if keep is not None:
        dropped, d_weights = weights * keep, d_weights * keep
    return dropped, weights * (d_weights - delta)
