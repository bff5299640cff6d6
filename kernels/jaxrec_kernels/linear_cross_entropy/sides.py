"""Terms of the logits that the matrix units add: rows beside those of the width.

A matrix unit sums over 128 or 256 numbers at once whatever the width. With rows of its own in both
operands it adds to a logit what else belongs to it, and the vector units, which have the most to
do, need not::

    [E | b0 b1 b2 | 1 1 1] [h | 1 1 1 | m0 m1 m2]' = E h + b + m

for an item's bias b and a position's m, each in three parts that are exact in bfloat16. Likewise
[g h | g0 g1 g2]' d gives the gradient of the bias beside that of the table.

A width that is a multiple of 128 leaves no room for it in the units of a v5e: the sum would take
one more pass. There the vector units add bias and m.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_F32 = jnp.float32
# Rows beside the width: a tile of bfloat16.
SIDE = 16
_PARTS = 3
# Of an item that is none, or is removed by a bias of -inf: products with infinity may be NaN. Exact
# in bfloat16, and far below any logit.
LOWEST = -(2.0**100)


def rows_of(width: int) -> int:
    """How many rows the width takes, in whole tiles, and what is beside it."""
    return -(-width // SIDE) * SIDE + SIDE


def of_items(count: int, bias: Any) -> jax.Array:
    """[SIDE, count] beside the items; `bias` is [1, count], or a number."""
    lines = parts(jnp.maximum(jnp.broadcast_to(bias, (1, count)), _F32(LOWEST)))
    return _below([*lines, *[_F32(1)] * _PARTS], count)


def of_positions(count: int, minus: Any = None) -> jax.Array:
    """[SIDE, count] beside the positions; `minus` is [1, count], taken off their logits.

    At most -LOWEST is taken off, which leaves a logit that no exponential is left of.
    """
    lines = [] if minus is None else parts(jnp.maximum(-minus, _F32(LOWEST)))
    return _below([*[_F32(1)] * _PARTS, *lines], count)


def of_gains(gain: jax.Array) -> jax.Array:
    """[SIDE, count] beside positions that are multiplied by their gain, [1, count]."""
    return _below(parts(gain), gain.shape[1])


def summed(side: jax.Array) -> jax.Array:
    """[1, count]: what a product gave in the rows of `of_gains`."""
    return side[:_PARTS].sum(0, keepdims=True)


def fill(ref: Any, rows: jax.Array, side: jax.Array) -> None:
    """Writes rows of the width [width, count], and below them what is beside them."""
    ref[: rows.shape[0], :] = rows
    fill_side(ref, rows.shape[0], side)


def fill_side(ref: Any, width: int, side: jax.Array) -> None:
    """Writes what is beside rows of this width."""
    below = ref.shape[0] - SIDE
    if width < below:
        ref[width:below, :] = jnp.zeros((below - width, ref.shape[1]), ref.dtype)
    ref[below:, :] = side.astype(ref.dtype)


def parts(line: jax.Array) -> list[jax.Array]:
    """Three float32 that sum up to it, each exact in bfloat16; the first has what is not finite."""
    found = []
    for _ in range(_PARTS):
        bits = lax.bitcast_convert_type(line, jnp.int32) & jnp.int32(-(1 << 16))
        part = lax.bitcast_convert_type(bits, _F32)
        found.append(part)
        line = jnp.where(jnp.abs(part) == jnp.inf, _F32(0), line - part)
    return found


def _below(lines: list[Any], count: int) -> jax.Array:
    """[SIDE, count] float32 with these lines at its top, zeros below."""
    row = lax.broadcasted_iota(jnp.int32, (SIDE, count), 0)
    found = jnp.zeros((SIDE, count), _F32)
    for place, line in enumerate(lines):
        found = jnp.where(row == place, line, found)
    return found
