"""Names of components, and the functions and classes they stand for.

A config holds names and numbers only; this table is where a name becomes code. Built-in components
are written as `module:attribute` and imported when first asked for, so that reading a config costs
nothing. A user adds their own with `register` before training or loading a run that uses it.

    >>> from jaxrec.registry import register, resolve
    >>> register("activation", "square", lambda x: x * x)
    >>> resolve("activation", "square")(3)
    9
"""

from importlib import import_module
from typing import Any

from jaxrec.errors import UserError

_COMPONENTS: dict[str, dict[str, Any]] = {
    # A class with a `Config` attribute; called as cls(config, num_items=, max_length=, rngs=).
    "model": {
        "sasrec": "jaxrec.models.sasrec:SASRec",
        "esasrec": "jaxrec.models.esasrec:ESASRec",
        "hstu": "jaxrec.models.hstu:HSTU",
    },
    # A training objective: see jaxrec.losses.
    "loss": {
        "bce": "jaxrec.losses.sampled:bce",
        "full_softmax": "jaxrec.losses.catalogue:full_softmax",
        "gbce": "jaxrec.losses.sampled:gbce",
        "sampled_softmax": "jaxrec.losses.sampled:sampled_softmax",
    },
    # Interactions -> Split.
    "split": {
        "leave_one_out": "jaxrec.data.splits:leave_one_out",
        "temporal": "jaxrec.data.splits:temporal",
    },
    # x -> x, elementwise.
    "activation": {
        "relu": "jax.nn:relu",
        "gelu": "jax.nn:gelu",
        "silu": "jax.nn:silu",
    },
    # Keyword arguments of OptimizerConfig -> optax transformation.
    "optimizer": {
        "adam": "optax:adamw",
        "adamw": "optax:adamw",
    },
}


def register(kind: str, name: str, component: Any) -> None:
    """Adds or replaces the component called `name`.

    Raises:
      UserError: `kind` is not one of the kinds jaxrec knows.
    """
    if kind not in _COMPONENTS:
        raise UserError(f"unknown kind of component {kind!r}; kinds: {', '.join(_COMPONENTS)}")
    _COMPONENTS[kind][name] = component


def names(kind: str) -> list[str]:
    """The names registered under `kind`."""
    return sorted(_COMPONENTS[kind])


def resolve(kind: str, name: str) -> Any:
    """The component called `name`.

    Raises:
      UserError: there is none; the message lists those that are.
    """
    table = _COMPONENTS[kind]
    if not isinstance(name, str) or name not in table:
        raise UserError(f"unknown {kind} {name!r}; known: {', '.join(sorted(table))}")
    component = table[name]
    if isinstance(component, str):
        module, attribute = component.split(":")
        component = getattr(import_module(module), attribute)
    return component
