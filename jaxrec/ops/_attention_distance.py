"""The bias `bias[i - j]` on logits, as one square or tile by tile, and its gradient.

Both forms read it from values for the lags `1 - n` to `n - 1`, of which a square is a Toeplitz
matrix; the gradient is sums along diagonals, without gather or scatter. The negative lags hold
zeros, which nobody sees through the causal mask.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxrec.ops._attention_mix_tables import diagonal_sums, taps_table, toeplitz


def square(bias: Float[Array, "groups length"]) -> Float[Array, "groups length length"]:
    """`out[i, j] = bias[i - j]`, zero above the diagonal."""
    return taps_table(bias, bias.shape[1])


def square_gradient(
    d_square: Float[Array, "groups length length"],
) -> Float[Array, "groups length"]:
    return diagonal_sums(d_square)[:, d_square.shape[1] - 1 :]


def lag_values(bias: Float[Array, "groups length"], side: int) -> Float[Array, "groups lags"]:
    """`bias` for the lags `1 - side` to `side - 1`; where it has none, zero."""
    return jnp.pad(bias, ((0, 0), (side - 1, side - bias.shape[1])))


def lag_values_gradient(
    d_values: Float[Array, "groups lags"], length: int
) -> Float[Array, "groups length"]:
    zero = (d_values.shape[1] - 1) // 2
    return d_values[:, zero : zero + length]


def tile(
    values: Float[Array, "groups lags"], size: int, apart: Array
) -> Float[Array, "groups size size"]:
    """The square of biases where the query block is `apart` blocks behind the key block."""
    return toeplitz(lax.dynamic_slice_in_dim(values, _start(values, size, apart), 2 * size - 1, 1))


def add_tile_gradient(
    d_values: Float[Array, "groups lags"], d_tile: Float[Array, "groups size size"], apart: Array
) -> Float[Array, "groups lags"]:
    size = d_tile.shape[1]
    start = _start(d_values, size, apart)
    before = lax.dynamic_slice_in_dim(d_values, start, 2 * size - 1, 1)
    return lax.dynamic_update_slice_in_dim(d_values, before + diagonal_sums(d_tile), start, 1)


def _start(values: Array, size: int, apart: Array) -> Array:
    """Where the values begin that a tile reads: at lag `apart * size - (size - 1)`."""
    zero = (values.shape[1] - 1) // 2
    return zero - (size - 1) + apart * size


def sum_to_groups(
    d_logits: Float[Array, "batch heads rows cols"], groups: int
) -> Float[Array, "groups rows cols"]:
    """Over the batch, and over the heads where they share one bias."""
    return d_logits.sum(0) if groups > 1 else d_logits.sum((0, 1))[None]
