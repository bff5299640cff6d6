"""Orders of positions: as they are given, or the valid ones first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class AsGiven(NamedTuple):
    """No other order than before."""

    def sort(self, rows: jax.Array) -> jax.Array:
        return rows

    def restore(self, rows: jax.Array) -> jax.Array:
        return rows


class ValidFirst(NamedTuple):
    """Valid positions before the others, both in the order that they had."""

    taken: jax.Array  # int32[P]: which position comes here
    place: jax.Array  # int32[P]: where a position goes
    end: jax.Array  # int32[]: where the others begin

    def sort(self, rows: jax.Array) -> jax.Array:
        """`rows`, one for each position, in this order."""
        return rows.at[self.taken].get(mode="promise_in_bounds", unique_indices=True)

    def restore(self, rows: jax.Array) -> jax.Array:
        """Rows in this order as they were before."""
        return rows.at[self.place].get(mode="promise_in_bounds", unique_indices=True)


def valid_first(valid: jax.Array) -> ValidFirst:
    """The order for bool[P]. Two sums and a scatter: nothing is compared with another.

    >>> order = valid_first(jnp.array([False, True, False, True]))
    >>> order.sort(jnp.array([10, 11, 12, 13])).tolist(), int(order.end)
    ([11, 13, 10, 12], 2)
    """
    before = jnp.cumsum(valid, dtype=jnp.int32)
    number = jnp.arange(valid.shape[0], dtype=jnp.int32)
    end = before[-1]
    place = jnp.where(valid, before - 1, end + number - before)
    taken = (
        jnp.zeros_like(place).at[place].set(number, mode="promise_in_bounds", unique_indices=True)
    )
    return ValidFirst(taken, place, end)
