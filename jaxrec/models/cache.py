"""What a model keeps of a user's history, so that new events cost their own work alone."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

# Mixed keys and values of a positional kernel have a state of their own; see `jaxrec.ops`.
LayerCache = Any


class KeysAndValues(NamedTuple):
    """Of one attention layer; the oldest event is in slot 0."""

    key: Float[Array, "batch capacity heads head_dim"]
    value: Float[Array, "batch capacity heads value_dim"]

    @property
    def capacity(self) -> int:
        return self.key.shape[1]


class Newest(NamedTuple):
    """The newest event of every user, where its own state depends on the time of the next."""

    item: Int[Array, " batch"]
    timestamp: Int[Array, " batch"]


class Cache(NamedTuple):
    """The history of a batch of users: a pytree, for `jit`, `scan` and donation.

    Made by a model's `prefill`, passed on by `extend`.
    """

    layers: tuple[LayerCache, ...]
    times: Int[Array, "batch capacity"] | None
    """Seconds, of the events in the layers; for models that read them."""
    length: Int[Array, " batch"]
    """Events in the layers."""
    newest: Newest | None
    """An event that is not in the layers yet, as the next one decides what it becomes."""


def into_slots(x: Array, capacity: int) -> Array:
    """[batch, length, ...] -> [batch, capacity, ...], zeros behind the end."""
    padding = [(0, 0), (0, capacity - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding)


def append(cache: Array, new: Array, length: Array) -> Array:
    """Writes `new` behind the `length` filled slots; what does not fit is dropped."""
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
    slots = length[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None, :]
    return cache.at[rows, slots].set(new.astype(cache.dtype), mode="drop")


def nan_where_full(states: Array, events: Array, capacity: int) -> Array:
    """States with NaN for users whose history no longer fits: nothing can be raised under jit."""
    full = (events > capacity)[:, None, None]
    return jnp.where(full, jnp.asarray(jnp.nan, states.dtype), states)


def check_capacity(length: int, capacity: int | None, max_length: int) -> int:
    """The slots of a cache.

    Raises:
      ValueError: fewer than the events at hand, or more than the model knows positions of.
    """
    capacity = max_length if capacity is None else capacity
    if not length <= capacity <= max_length:
        raise ValueError(
            f"prefill: capacity must be between the length at hand ({length}) and the model's "
            f"max_length ({max_length}), got {capacity}"
        )
    return capacity
