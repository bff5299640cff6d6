"""Which implementation of an op would run, and why."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from inspect import isfunction
from typing import Any

import jax
import numpy as np

from jaxrec.ops._dispatch import Choice, recorded
from jaxrec_kernels import tuning


def explain(
    op: str | Callable[..., Any], *specs: Any, target: Any = None, **options: Any
) -> Choice:
    """Says which implementation of an op would run for a call, without running it.

    The op is traced on shapes and dtypes alone, so a call that the op refuses is refused here too,
    with the op's own message, and nothing is computed or compiled.

    Args:
      op: a function of `jaxrec.ops`, or its name.
      *specs: its positional arguments; arrays may be given as `jax.ShapeDtypeStruct`.
      target: the platform that is asked about: "cpu", "gpu", "tpu", a device (abstract ones too),
        or None for the one that JAX would use. Of a TPU device the kind counts: its blocks, and
        whether it is too old for kernels.
      **options: its keyword arguments, `implementation` included.

    Returns:
      (op, implementation, reason). Of a kernel the reason also tells whether its blocks are those
      of a tuning table, and of which chip, or those of the kernel's own rule.

    Raises:
      ValueError: `op` is none of `jaxrec.ops`, the target is no platform, or the op refuses the
        call.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxrec import ops
      >>> rows = jax.ShapeDtypeStruct((8, 16), jnp.float32)
      >>> labels = jax.ShapeDtypeStruct((8,), jnp.int32)
      >>> ops.explain("linear_cross_entropy", rows, rows, labels, target="cpu").implementation
      'xla'
    """
    name, function = _resolve(op)
    platform = _platform(target)
    kind = _kind_of(target) if platform == "tpu" else nullcontext()
    with kind, recorded() as decisions:
        _trace(function, specs, options)
    mine = [d for d in decisions if d.choice.op == name]
    if not mine:
        return Choice(name, "xla", "the op has one implementation, plain JAX")
    choice, platforms, blocks = mine[0]
    if choice.implementation == "pallas" and platform not in map(_platform, platforms):
        return Choice(
            name, "xla", f"the kernel is for {', '.join(platforms)}, the target is {platform}"
        )
    if choice.implementation == "pallas" and blocks is not None:
        with _kind_of(target), tuning.looked_up() as lookups:
            blocks()
        return choice._replace(reason=f"{choice.reason}; {_origin(lookups[0].chip)}")
    return choice


def _kind_of(target: Any) -> AbstractContextManager[None]:
    kind = getattr(target, "device_kind", None)
    return nullcontext() if kind is None else tuning.compiling_for(kind)


def _origin(chip: str | None) -> str:
    if chip is None:
        return "its blocks are those of its own rule"
    return f"its blocks are those of the tuning table for {chip}"


def _resolve(op: str | Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    ops = import_module("jaxrec.ops")
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    known = [n for n in ops.__all__ if n != "explain" and isfunction(getattr(ops, n))]
    function = getattr(ops, name) if name in known else None
    if function is None or (callable(op) and op is not function):
        raise ValueError(f"explain: no op {name!r} in jaxrec.ops; there are {', '.join(known)}")
    return name, function


def _platform(target: Any) -> str:
    if target is None:
        target = jax.default_backend()
    name = target if isinstance(target, str) else getattr(target, "platform", None)
    platforms = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
    if name not in platforms:
        raise ValueError(
            f"explain: target must be 'cpu', 'gpu', 'tpu', a device or None, got {target!r}"
        )
    return platforms[name]


def _trace(function: Callable[..., Any], specs: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Runs the op on abstract values; what is no array stays a Python value."""
    leaves, structure = jax.tree.flatten((specs, options))
    places = [
        i
        for i, leaf in enumerate(leaves)
        # A number of NumPy's is a Python number here: ops take them as static options.
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, np.generic)
    ]

    def call(arrays: list[Any]) -> Any:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        args, kwargs = jax.tree.unflatten(structure, filled)
        return function(*args, **kwargs)

    jax.eval_shape(call, [leaves[i] for i in places])
