"""Dropout bits of attention weights, as a function of where the weight stands.

`keep(b, h, i, j)` depends on the key and on the four indices alone, so that any blocking, and a
fused kernel that never stores the weights, draws the same bits in the forward and backward pass.
Threefry over [batch, heads, length, length] would cost more than the attention itself on a CPU.

One 32-bit state per row `(b, h, i)` is mixed thoroughly; the column then goes through one
multiply-xorshift round. With `mix` the 32-bit finaliser "lowbias32":

    row_1 = mix(seed_0 + mix((b * heads + h) * n + i)),  row_2 = mix(row_1 ^ seed_1)
    bits(j) = ((x ^ x >> 15) * 0x846CA68B),  x = (y ^ y >> 16) * 0x7FEB352D + row_2,
    y = row_1 ^ (j * 0x9E3779B9),            all modulo 2^32
    keep = bits >= rate * 2^32
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, UInt32

_M1, _M2, _GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9


def _u32(x: int) -> Array:
    return jnp.uint32(x)


def _shift(x: Array, by: int) -> Array:
    return x ^ lax.shift_right_logical(x, jnp.full(x.shape, by, jnp.uint32))


def mix(x: Array) -> Array:
    x = _shift(x, 16) * _u32(_M1)
    x = _shift(x, 15) * _u32(_M2)
    return _shift(x, 16)


def dropout_seeds(key: Any) -> UInt32[Array, "2"]:
    """The two words that stand for the key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def row_states(
    seeds: UInt32[Array, "2"], row: UInt32[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """State of each row, `row` being its flat index `(b * heads + h) * length + i`."""
    first = mix(mix(row) + seeds[0])
    return first, mix(first ^ seeds[1])


def keep_mask(
    seeds: UInt32[Array, "2"],
    rate: float,
    *,
    batch: int,
    heads: int,
    length: int,
    rows: Any,
    cols: Any,
) -> Bool[Array, "batch heads rows cols"]:
    """Which weights stay, for query indices `rows` and key indices `cols`."""
    b = jnp.arange(batch, dtype=jnp.uint32)[:, None, None]
    h = jnp.arange(heads, dtype=jnp.uint32)[None, :, None]
    i = jnp.asarray(rows).astype(jnp.uint32)[None, None, :]
    first, second = row_states(seeds, (b * _u32(heads) + h) * _u32(length) + i)
    j = (jnp.asarray(cols).astype(jnp.uint32) * _u32(_GOLDEN))[None, None, None, :]
    y = first[..., None] ^ j
    x = _shift(y, 16) * _u32(_M1) + second[..., None]
    x = _shift(x, 15) * _u32(_M2)
    return x >= _u32(min(round(rate * 2.0**32), 2**32 - 1))
