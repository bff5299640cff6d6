"""Dropout bits of attention weights inside a kernel.

The same hash as the op's own (`jaxrec.ops`, module `_attention_dropout`), in int32 arithmetic,
which is what TPU kernels have; a test compares the two bit by bit.
"""

import jax.numpy as jnp
from jax import Array, lax

_M1, _M2, _GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9


def _word(value: int) -> Array:
    return jnp.int32(value - 2**32 if value >= 2**31 else value)


def _shift(x: Array, by: int) -> Array:
    return x ^ lax.shift_right_logical(x, jnp.full(x.shape, by, jnp.int32))


def _mix(x: Array) -> Array:
    x = _shift(x, 16) * _word(_M1)
    x = _shift(x, 15) * _word(_M2)
    return _shift(x, 16)


def seed_words(seeds: Array) -> Array:
    """int32[1, 2], the words of a key for the scalar memory, of uint32[2].

    Two axes: a vector that is batched by `vmap` is no block of a TPU's.
    """
    return lax.bitcast_convert_type(seeds, jnp.int32)[None]


def keep_bits(seed_0: Array, seed_1: Array, row: Array, column: Array, rate: float) -> Array:
    """bool: which weights stay; `row` and `column`, int32, broadcast against each other.

    Args:
      seed_0, seed_1: the two words of the key, as int32.
      row: `(batch_row * heads + head) * length + query`, modulo 2^32.
      column: index of the key.
      rate: probability to be dropped.
    """
    first = _mix(_mix(row) + seed_0)
    second = _mix(first ^ seed_1)
    y = first ^ (column * _word(_GOLDEN))
    x = _shift(y, 16) * _word(_M1) + second
    x = _shift(x, 15) * _word(_M2)
    least = min(round(rate * 2.0**32), 2**32 - 1)
    # Unsigned order is signed order with the top bit turned.
    return (x ^ _word(2**31)) >= _word(least ^ 2**31)
