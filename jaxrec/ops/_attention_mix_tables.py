"""The matrices that mix along the sequence, built from their parameters.

They are built by ordinary differentiable code, once a call and without the batch, so that the
gradient of taps (sums along diagonals) and of a triangle (the other half zero) follow from the
gradient of the matrix by transposition.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.ops._dispatch import platform_switch


def toeplitz(values: Float[Array, "*lead both"]) -> Float[Array, "*lead size size"]:
    """`out[r, c] = values[size - 1 + r - c]`, for `2 * size - 1` values."""
    return platform_switch(_by_strides, {"cpu": _by_gather}, values)


def _by_strides(values: Array) -> Array:
    """A row is the row above moved by one, so a repeated vector of length `2 * size`, read with a
    row stride one shorter, is the whole matrix: no gather, and no scatter in its transpose.
    """
    size = (values.shape[-1] + 1) // 2
    lead = values.shape[:-1]
    row = jnp.concatenate([values[..., ::-1], jnp.zeros((*lead, 1), values.dtype)], axis=-1)
    flat = jnp.broadcast_to(row[..., None, :], (*lead, size, 2 * size)).reshape(*lead, -1)
    stop = size - 1 + size * (2 * size - 1)
    return flat[..., size - 1 : stop].reshape(*lead, size, -1)[..., :size]


def _by_gather(values: Array) -> Array:
    """On a CPU XLA would do the changes of shape anew for every batch row that is masked; what a
    gather gives is written down once."""
    size = (values.shape[-1] + 1) // 2
    index = size - 1 + jnp.arange(size)[:, None] - jnp.arange(size)[None]
    return values.at[..., index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _causal_values(taps: Float[Array, "groups width"], length: int) -> Array:
    """Taps for lags `1 - length` to `length - 1`, zero before 0 and beyond the band."""
    taps = taps[:, :length]
    return jnp.pad(taps, ((0, 0), (length - 1, length - taps.shape[1])))


def taps_table(
    taps: Float[Array, "groups width"], length: int
) -> Float[Array, "groups length length"]:
    """`T[j, k] = taps[j - k]` for `0 <= j - k < width`."""
    return toeplitz(_causal_values(taps, length))


def taps_tiles(
    taps: Float[Array, "groups width"], size: int, count: int
) -> Float[Array, "count groups size size"]:
    """Tile `d` holds `T[d * size + r, c]`: all that a matrix of `count` blocks a side repeats."""
    values = _causal_values(taps, count * size)
    first = count * size - size  # of the values that tile 0 reads
    return jnp.stack(
        [
            toeplitz(values[:, first + d * size : first + d * size + 2 * size - 1])
            for d in range(count)
        ]
    )


def triangle_table(
    factor: Float[Array, "groups size size"], *, upper: bool
) -> Float[Array, "groups size size"]:
    """The lower-triangular operator of a full factor: `L`, or `U` transposed."""
    return jnp.tril(jnp.swapaxes(factor, 1, 2) if upper else factor)
