"""Square matrices along the sequence, built from their parameters.

They are built by ordinary differentiable code, once a call and without the batch, so that the
gradient of taps (sums along diagonals) and of a triangle (the other half zero) follow from the
gradient of the matrix by transposition.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.ops._dispatch import platform_switch

# Rows and columns of what a TPU moves in one piece.
_TILE = 128
# Where `_by_moves` overtakes `_by_strides` on a TPU.
_STRIDED_UP_TO = 256


def toeplitz(values: Float[Array, "*lead both"]) -> Float[Array, "*lead size size"]:
    """`out[r, c] = values[size - 1 + r - c]`, for `2 * size - 1` values."""
    forms = {"cpu": _by_gather}
    if values.shape[-1] > 2 * _STRIDED_UP_TO:
        forms["tpu"] = _by_moves
    return platform_switch(_by_strides, forms, values)


def diagonal_sums(d_square: Float[Array, "*lead size size"]) -> Float[Array, "*lead both"]:
    """Sums of the entries with `r - c = lag` at `size - 1 + lag`: the transpose of `toeplitz`."""
    forms = {"tpu": _sums_by_moves} if d_square.shape[-1] > _STRIDED_UP_TO else {}
    return platform_switch(_sums_by_strides, forms, d_square)


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


def _by_moves(values: Array) -> Array:
    """Tiles as a TPU has them, a row of each moved by its number: by the powers of two in it.

    Rows of `_by_strides` begin anywhere in a tile. At size 1,024 that takes a v5e eight times as
    long, a quarter of the attention's own time.
    """
    size = (values.shape[-1] + 1) // 2
    side = min(size, _TILE)
    count = -(-size // side)
    lead, spare = values.shape[:-1], side * count - size
    # From the largest lag to the smallest, `side` of them a piece; tile m begins in piece m.
    behind = (spare, spare + 1)
    lags = jnp.pad(values[..., ::-1], (*[(0, 0)] * len(lead), behind))
    pieces = lags.reshape(*lead, 2 * count, side)
    pairs = jnp.concatenate([pieces[..., :-1, :], pieces[..., 1:, :]], axis=-1)
    tiles = _moved_rows(pairs, side)
    if count == 1:
        return tiles[..., 0, :, :]
    # The blocks of a row of blocks follow each other among the tiles.
    at = [slice(count - 1 - i, 2 * count - 1 - i) for i in range(count)]
    blocks = jnp.stack([tiles[..., these, :, :] for these in at], axis=-4)
    square = jnp.swapaxes(blocks, -3, -2).reshape(*lead, side * count, side * count)
    return square[..., :size, :size]


def _sums_by_strides(d_square: Array) -> Array:
    """A row's end padded to a stride of one less than `2 * size` moves row r by r columns against a
    stride of `2 * size`, so that diagonals come to stand in columns.
    """
    *lead, size, _ = d_square.shape
    unmoved = [(0, 0)] * len(lead)
    rows = jnp.pad(d_square, (*unmoved, (0, 0), (0, size - 1))).reshape(*lead, -1)
    rows = jnp.pad(rows, (*unmoved, (size - 1, 1))).reshape(*lead, size, 2 * size)
    return rows.sum(-2)[..., :-1][..., ::-1]


def _sums_by_moves(d_square: Array) -> Array:
    *lead, size, _ = d_square.shape
    values = jax.ShapeDtypeStruct((*lead, 2 * size - 1), d_square.dtype)
    return jax.linear_transpose(_by_moves, values)(d_square)[0]


def _moved_rows(x: Array, size: int) -> Array:
    """`out[..., r, c] = x[..., size - 1 - r + c]` for r and c below `size`; x has twice as many."""
    x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], size, 2 * size))
    by = (size - 1 - jnp.arange(size))[:, None]
    step = 1
    while step < size:
        ahead = jnp.pad(x[..., step:], (*[(0, 0)] * (x.ndim - 1), (0, step)))
        x = jnp.where(by & step != 0, ahead, x)
        step *= 2
    return x[..., :size]


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
