"""Manual mesh axes inside `jax.shard_map`, for ops with a hand-written gradient."""

from typing import Any

import jax
from jax import lax


def _varying(array: jax.Array) -> frozenset[Any]:
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def vary_together(*arrays: jax.Array | None) -> tuple[Any, ...]:
    """Marks all arrays as varying over every mesh axis that any of them varies over.

    Inside `jax.shard_map` a `custom_vjp` rule must return cotangents that vary as its inputs do;
    a replicated table beside sharded rows breaks that. Casting first makes the inputs alike, and
    the transpose of the cast sums the table's cotangent over the mesh. Elsewhere it does nothing.
    """
    axes = frozenset[Any]().union(*(_varying(a) for a in arrays if a is not None))
    return tuple(
        a if a is None or not (axes - _varying(a)) else _vary(a, tuple(axes - _varying(a)))
        for a in arrays
    )


def _vary(array: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    return lax.pcast(array, axes, to="varying")
