"""Kernels that are traced once for all their calls of a kind.

A kernel that the compiler schedules in many regions takes a second or more to trace, on every
device; the rules of a `custom_vjp` have its forward pass traced twice, and each further function
that is compiled once more.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])

_traced: list[Any] = []


def traced_once(*static: str) -> Callable[[F], F]:
    """A function whose trace is kept for operands of the same shapes, and otherwise as it was.

    What it reads besides must be what `jax.jit` knows of, or change inside `tuning.using` alone.

    Args:
      static: the keyword arguments that are no arrays; they must be hashable.
    """

    def wrap(f: F) -> F:
        # Inlined: nothing of the call is left in a program.
        kept: Any = jax.jit(f, static_argnames=static, inline=True)
        _traced.append(kept)
        return kept

    return wrap


def forget_traces() -> None:
    """Has all of them traced anew."""
    for kept in _traced:
        kept.clear_cache()
