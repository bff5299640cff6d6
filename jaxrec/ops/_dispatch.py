"""Which implementation of an op runs, and why.

Every op names itself and asks `choose` before it traces anything. `supports` of a kernel looks at
shapes, dtypes and options only, never at the device; which platform's code is compiled is decided
at lowering, by `platform_switch`, so that one traced function can be compiled for the host, for a
TPU ahead of time, or exported. Only a TPU that is known while tracing to be too old for the kernels
has them left out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from jax import lax

from jaxrec_kernels.generations import older_than_v5

Implementation = Literal["xla", "pallas"]
IMPLEMENTATIONS: tuple[str, ...] = ("xla", "pallas")
T = TypeVar("T")


class Choice(NamedTuple):
    """What `choose` decided for one call of an op."""

    op: str
    implementation: Implementation
    reason: str


class Decision(NamedTuple):
    """A choice, the platforms that its kernel is compiled for, and how that finds its blocks."""

    choice: Choice
    platforms: tuple[str, ...]
    blocks: Callable[[], Any] | None


_decisions: ContextVar[list[Decision] | None] = ContextVar("_decisions", default=None)


@contextmanager
def recorded() -> Iterator[list[Decision]]:
    """Collects what `choose` decides while ops are traced inside."""
    decisions: list[Decision] = []
    token = _decisions.set(decisions)
    try:
        yield decisions
    finally:
        _decisions.reset(token)


def choose(
    op: str,
    implementation: str | None,
    unsupported: str | None,
    platforms: tuple[str, ...] = ("tpu",),
    *,
    slower: str | None = None,
    blocks: Callable[[], Any] | None = None,
) -> Choice:
    """Picks the implementation of `op`.

    Args:
      op: the op's name, for messages.
      implementation: what the caller asked for; `None` leaves the choice to the op.
      unsupported: why the Pallas kernel cannot take this call, or `None` if it can.
      platforms: where the kernel runs; `platform_switch` compiles XLA's form elsewhere.
      slower: why the kernel, though it can take this call, is left to those who ask for it; or
        `None`.
      blocks: looks up the blocks that the kernel would have, for `explain`; not called here.

    Raises:
      ValueError: the name is unknown, or a forced kernel cannot run; the reason is in the message.
    """
    reason = unsupported
    if implementation is None:
        reason = reason or slower or older_than_v5()
    choice = _choose(op, implementation, reason)
    decisions = _decisions.get()
    if decisions is not None:
        decisions.append(Decision(choice, platforms, blocks))
    return choice


def _choose(op: str, implementation: str | None, unsupported: str | None) -> Choice:
    if implementation is None:
        if unsupported is None:
            return Choice(op, "pallas", "the kernel supports these shapes, dtypes and options")
        return Choice(op, "xla", unsupported)
    if implementation == "xla":
        return Choice(op, "xla", "asked for by the caller")
    if implementation == "pallas":
        if unsupported is not None:
            raise ValueError(
                f"{op}: implementation='pallas' cannot run: {unsupported}; "
                "use implementation='xla' or None"
            )
        return Choice(op, "pallas", "asked for by the caller")
    raise ValueError(
        f"{op}: implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))} or None, "
        f"got {implementation!r}"
    )


def platform_switch(
    xla: Callable[..., T], kernels: dict[str, Callable[..., T]], *operands: Any
) -> T:
    """Runs the kernel of the platform that is compiled for, or `xla` where there is none."""
    return lax.platform_dependent(*operands, default=xla, **kernels)


def differentiated_as(kernel: Callable[..., T], xla: Callable[..., T]) -> Callable[..., T]:
    """`kernel`, whose forward-mode derivative is that of `xla`.

    A kernel with scratch memory has none, and forward over reverse differentiates the rules of a
    `custom_vjp`. Both must give the same results, which is what `platform_switch` asks of them.
    """
    f = jax.custom_jvp(kernel)
    f.defjvp(lambda primals, tangents: jax.jvp(xla, primals, tangents))
    return f


def differentiable_switch(
    xla: Callable[..., T], kernels: dict[str, Callable[..., T]], *operands: Any
) -> T:
    """`platform_switch`, where a kernel's derivative is that of `xla`.

    For what stands in the rules of a `custom_vjp`, which a gradient of the gradient passes through.
    """
    plain = {platform: differentiated_as(kernel, xla) for platform, kernel in kernels.items()}
    return platform_switch(xla, plain, *operands)
