"""Rows of a table that may lie on several devices."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrec.ops._manual_axes import vary_together


def take_rows(
    table: Float[Array, "rows width"], indices: Int[Array, "..."], *, axis: str | None = None
) -> Float[Array, "... width"]:
    """`table[indices]`, also where each device holds some of the rows.

    Args:
      table: `[rows, width]`.
      indices: integers of any shape, rows of the whole table; outside of it the result is some row
        or, with `axis`, zero.
      axis: inside `jax.shard_map`, the mesh axis that the rows are split over, in order. Every
        device along it gets all that it asks for, and must ask for the same.

    Returns:
      `[..., width]` in the table's dtype.

    Cost: with `axis`, one reduction of the result over that axis; the gradient stays where the rows
    are.

    Example:
      >>> import jax.numpy as jnp
      >>> take_rows(jnp.arange(6.0).reshape(3, 2), jnp.array([2, 0])).tolist()
      [[4.0, 5.0], [0.0, 1.0]]
    """
    if axis is None:
        return table[indices]
    rows = table.shape[0]
    local = indices - lax.axis_index(axis) * rows
    here = (local >= 0) & (local < rows)
    # The gradient of a table that only some devices vary over must be summed over the others.
    table, local = vary_together(table, local)
    found = table[jnp.where(here, local, 0)]
    return lax.psum(jnp.where(here[..., None], found, jnp.zeros((), table.dtype)), axis)
