"""A kernel's question: are there better blocks for this call than those of its rule?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from jaxrec_kernels.tracing import forget_traces
from jaxrec_kernels.tuning.table import Sizes, Table, tables
from jaxrec_kernels.tuning.target import device_kind

T = TypeVar("T")


class Lookup(NamedTuple):
    """One question, with what `tuned` was given, and the answer."""

    kernel: str
    call: Sizes
    fit: Callable[..., Any]
    rule: Callable[[], Any]
    chip: str | None  # whose table answered; None where the rule did
    blocks: Any


_lookups: ContextVar[list[Lookup] | None] = ContextVar("_lookups", default=None)
_instead: ContextVar[Table | None] = ContextVar("_instead", default=None)


@contextmanager
def looked_up() -> Iterator[list[Lookup]]:
    """Collects what kernels ask while they are traced inside."""
    forget_traces()
    lookups: list[Lookup] = []
    token = _lookups.set(lookups)
    try:
        yield lookups
    finally:
        _lookups.reset(token)


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Inside, this table answers, whatever is compiled for: to try blocks out.

    `jax.jit` does not know of it: trace functions that were not traced before.
    """
    token = _instead.set(table)
    forget_traces()
    try:
        yield
    finally:
        _instead.reset(token)
        forget_traces()


def tuned(kernel: str, call: Sizes, fit: Callable[..., T | None], rule: Callable[[], T]) -> T:
    """The blocks of the table for the TPU that is compiled for, or those of the rule.

    Args:
      kernel: a name of `table.KERNELS`.
      call: what tells the kernel's calls apart, by the names there.
      fit: takes an entry's blocks by name; None where this call cannot be cut so.
      rule: what gives blocks for any call.
    """
    table = _instead.get() or table_for(device_kind())
    sizes = None if table is None else table.find(kernel, call)
    found = None if sizes is None else fit(**sizes)
    chip = table.chip if table is not None and found is not None else None
    blocks = rule() if found is None else found
    lookups = _lookups.get()
    if lookups is not None:
        lookups.append(Lookup(kernel, call, fit, rule, chip, blocks))
    return blocks


def table_for(kind: str | None) -> Table | None:
    """The table for a kind of device, if there is one.

    Where nothing says what is compiled for there is none: a rule's blocks are safe on a v5e and on
    later chips, and another chip's best are not: v5e's for the catalogue loss spill on v6e.
    """
    return next((table for table in tables().values() if kind in table.device_kinds), None)
