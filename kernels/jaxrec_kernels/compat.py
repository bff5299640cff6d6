"""What differs between the supported versions of JAX."""

from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


def compiler_params(**options: Any) -> Any:
    return pltpu.CompilerParams(**options)


def like(operands: Iterable[Any], result: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, varying over the mesh axes that any operand varies over."""
    axes = frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    kind = type(jax.typeof(next(iter(operands))).manual_axis_type)
    return jax.ShapeDtypeStruct(result.shape, result.dtype, manual_axis_type=kind(varying=axes))
