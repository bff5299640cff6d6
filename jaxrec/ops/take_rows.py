"""Rows of a table that may lie on several devices."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrec.ops import _catalogue
from jaxrec.ops._dispatch import platform_switch
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

    Raises:
      ValueError: shapes or dtypes do not fit, or `axis` is no mesh axis here.

    Cost: with `axis`, one reduction of the result over that axis; the gradient stays where the rows
    are. Differentiable in reverse mode, and forward over reverse.

    Example:
      >>> import jax.numpy as jnp
      >>> take_rows(jnp.arange(6.0).reshape(3, 2), jnp.array([2, 0])).tolist()
      [[4.0, 5.0], [0.0, 1.0]]
    """
    op, (table, indices) = "take_rows", map(jnp.asarray, (table, indices))
    if table.ndim != 2:
        raise ValueError(f"{op}: table must be [rows, width], got shape {table.shape}")
    _catalogue.check_integer(op, "indices", indices)
    # Narrower ones could not be compared with the number of rows.
    indices = indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices
    if axis is not None:
        try:
            lax.axis_size(axis)
        except NameError:
            raise ValueError(
                f"{op}: axis {axis!r} is no mesh axis here; it is for use inside jax.shard_map"
            ) from None
    table = _with_a_gradient_apart(table)
    if axis is None:
        return table[indices]
    rows = table.shape[0]
    local = indices - lax.axis_index(axis) * rows
    here = (local >= 0) & (local < rows)
    # The gradient of a table that only some devices vary over must be summed over the others.
    table, local = vary_together(table, local)
    found = table[jnp.where(here, local, 0)]
    return lax.psum(jnp.where(here[..., None], found, jnp.zeros((), table.dtype)), axis)


@jax.custom_vjp
def _with_a_gradient_apart(table: Array) -> Array:
    """The table; on a TPU its gradient is computed before anything is done to it.

    A TPU scatters into rows that fill up to 128 lanes. Left to itself the compiler keeps that form
    from there on, through the sum with the loss's gradient and the optimiser, whose arrays it turns
    and turns back in every step: at a million rows of 64 seven copies of 512 MB.
    """
    return table


def _forward(table: Array) -> tuple[Array, None]:
    return table, None


def _backward(_: None, g: Array) -> tuple[Array]:
    return (platform_switch(lambda g: g, {"tpu": lax.optimization_barrier}, g),)


_with_a_gradient_apart.defvjp(_forward, _backward)
