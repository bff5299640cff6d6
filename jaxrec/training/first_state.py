"""The state before the first step, made where it is to lie.

A table that needs the mesh fits no device: neither it nor a moment of it may be whole on one, not
even before the first step. So its shapes are known before anything is made, and a state that is
restored instead is never beside one that is made.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxrec.devices import Placement
from jaxrec.training.state import Parameters, TrainState, initial_state


def state_shapes(
    parameters: dict[str, jax.ShapeDtypeStruct],
    optimizer: optax.GradientTransformation,
    placement: Placement | None = None,
) -> TrainState:
    """Shapes, types and shardings of the train state; nothing is made.

    Args:
      parameters: shapes as one device has them, without padding.
      optimizer: of the training.
      placement: on several devices.
    """
    state = jax.eval_shape(partial(initial_state, optimizer=optimizer), parameters)
    if placement is not None:
        held: TrainState = placement.held(state)
        return held
    here = jnp.zeros(()).sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)


def make_state(
    initialise: Callable[[Array], Parameters],
    seed: int,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    placement: Placement | None = None,
) -> TrainState:
    """The state before the first step; on a mesh each device makes its own rows.

    The numbers are the same on any mesh and on one device: what is drawn for an element depends on
    its place in the whole array alone. JAX's own setting of its random numbers is what splits the
    drawing; with `jax_threefry_partitionable` off every device draws all of a table.

    Args:
      initialise: `setup.initialiser`.
      seed: of the parameters.
      optimizer: of the training.
      shapes: `state_shapes`.
      placement: on several devices.
    """
    key = jax.random.key(seed)
    if placement is None:
        return initial_state(initialise(key), optimizer)
    # An argument, not a constant: the compiler computes with constants itself, and in another way.
    data = np.asarray(jax.random.key_data(key))
    state: TrainState = _on_mesh(initialise, optimizer, shapes, placement)(data)
    return state


def _on_mesh(
    initialise: Callable[[Array], Parameters],
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    placement: Placement,
) -> Any:
    """The jitted function from the data of a key to the state."""

    def make(data: Array) -> Any:
        parameters = initialise(jax.random.wrap_key_data(data))
        return placement.pad(initial_state(parameters, optimizer))

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))
