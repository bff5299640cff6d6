"""Manual mesh axes inside `jax.shard_map`, for ops with a hand-written gradient or kernel."""

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


def not_manual() -> str | None:
    """Why a kernel cannot run under the mesh that is set here, or None if it can.

    The compiler does not partition a kernel; inside `jax.shard_map` over all axes it need not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != jax.sharding.AxisType.Manual and mesh.shape[name] > 1
    ]
    if not free:
        return None
    return f"the kernel runs inside jax.shard_map over all mesh axes; {', '.join(free)} is not"
