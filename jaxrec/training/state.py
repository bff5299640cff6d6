"""What changes from step to step, and the step.

The state is one pytree that lives on the device and is donated to every step. The running sums that
become a point of the training curve are part of it, so the host reads nothing while it trains; so
is the guard against non-finite values, which freezes the state at the first bad step and remembers
where it was.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrec import ops
from jaxrec.devices import BY_SEQUENCE, DATA, EVERYWHERE, MODEL, Placement

Parameters = dict[str, Array]

# Folded into the step's key for the loss; a model counts its own keys from 0.
_LOSS_KEY = 0x10557


class TrainState(NamedTuple):
    """Everything a step reads and writes."""

    step: Array
    """int32: steps done."""
    parameters: Parameters
    optimizer_state: Any
    loss_sum: Array
    """float32: sum of the batch losses since the last point of the curve."""
    gradient_norm_sum: Array
    loss_steps: Array
    """int32: how many steps are in the sums."""
    bad_step: Array
    """int32: the first step with a non-finite loss or gradient; -1 while there is none."""
    bad_parameter: Array
    """int32: index (in sorted order of names) of the first parameter with a non-finite gradient at
    that step; -1 if the gradients were finite and only the loss was not."""


def initial_state(parameters: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""

    # Distinct buffers: the state is donated, and a buffer can be given away only once.
    def count(value: int) -> Array:
        return jnp.full((), value, jnp.int32)

    def total() -> Array:
        return jnp.zeros((), jnp.float32)

    return TrainState(
        step=count(0),
        parameters=jax.tree.map(jnp.array, parameters),
        optimizer_state=optimizer.init(parameters),
        loss_sum=total(),
        gradient_norm_sum=total(),
        loss_steps=count(0),
        bad_step=count(-1),
        bad_parameter=count(-1),
    )


def reset_sums(state: TrainState) -> TrainState:
    """Starts the next point of the curve."""
    return state._replace(
        loss_sum=jnp.zeros_like(state.loss_sum),
        gradient_norm_sum=jnp.zeros_like(state.gradient_norm_sum),
        loss_steps=jnp.zeros_like(state.loss_steps),
    )


def parameter_names(parameters: Parameters) -> Sequence[str]:
    """Names in the order that `bad_parameter` counts."""
    return sorted(parameters)


# What a batch holds besides the arrays that a model reads.
_OF_THE_LOSS = ("slots", "targets", "target_valid")

LossFunction = Callable[[Any, dict[str, Array], Array], Array]


def make_train_step(
    bind: Callable[[Parameters], Any],
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    seed: int,
    placement: Placement | None = None,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Array]]:
    """Builds the jitted, donating step: (state, batch) -> (state, loss of the batch).

    Args:
      bind: parameters -> model.
      loss_function: (model, batch, dropout key) -> scalar loss.
      optimizer: applied to the gradients.
      seed: dropout keys are folded from it and the step's number, so a resumed run draws the same.
      placement: on several devices; the state and the batches must lie as it says.
    """
    loss_of = _loss_on_one(bind, loss_function)
    if placement is not None:
        loss_of = _loss_on_mesh(bind, loss_function, placement)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, gradients = jax.value_and_grad(loss_of)(state.parameters, batch, key)
        names = parameter_names(gradients)
        finite = jnp.stack([jnp.isfinite(gradients[name]).all() for name in names])
        good = finite.all() & jnp.isfinite(loss)
        frozen = state.bad_step >= 0
        keep = good & ~frozen
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer_state, state.parameters
        )
        parameters = optax.apply_updates(state.parameters, updates)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(keep, new, old)

        first_bad = jnp.where(finite.all(), -1, jnp.argmin(finite)).astype(jnp.int32)
        newly_bad = ~good & ~frozen
        after = TrainState(
            step=state.step + 1,
            parameters=jax.tree.map(choose, parameters, state.parameters),
            optimizer_state=jax.tree.map(choose, optimizer_state, state.optimizer_state),
            loss_sum=state.loss_sum + jnp.where(keep, loss, 0.0),
            gradient_norm_sum=state.gradient_norm_sum
            + jnp.where(keep, optax.tree.norm(gradients), 0.0),
            loss_steps=state.loss_steps + keep.astype(jnp.int32),
            bad_step=jnp.where(newly_bad, state.step, state.bad_step),
            bad_parameter=jnp.where(newly_bad, first_bad, state.bad_parameter),
        )
        return after, loss

    return jax.jit(step, donate_argnums=0)


def _loss_on_one(
    bind: Callable[[Parameters], Any], loss_function: LossFunction
) -> Callable[[Parameters, dict[str, Array], Array], Array]:
    return lambda parameters, batch, key: loss_function(bind(parameters), batch, key)


def _loss_on_mesh(
    bind: Callable[[Parameters], Any], loss_function: LossFunction, placement: Placement
) -> Callable[[Parameters, dict[str, Array], Array], Array]:
    """The mean over all devices' events; each device computes with what lies on it."""

    def part(parameters: Parameters, batch: dict[str, Array], key: Array) -> Array:
        model = bind(parameters)
        model.item_axis = MODEL
        # Dropout must differ between devices that hold different sequences.
        key = jax.random.fold_in(key, jax.lax.axis_index(DATA))
        events = batch["target_valid"].sum().astype(jnp.float32)
        total = jax.lax.psum(loss_function(model, batch, key) * events, DATA)
        return total / jnp.maximum(jax.lax.psum(events, DATA), 1.0)

    def whole(parameters: Parameters, batch: dict[str, Array], key: Array) -> Array:
        in_specs = (placement.specs(parameters), BY_SEQUENCE, EVERYWHERE)
        loss: Array = placement.over_devices(part, in_specs, EVERYWHERE)(parameters, batch, key)
        return loss

    return whole


def sequence_loss(
    loss: Callable[..., Array], *, item_counts: Any = None, **options: Any
) -> LossFunction:
    """A loss over [positions, width] states, applied to the real events of a batch of rows.

    The loss is called as `loss(states, item_table, targets, valid, **options)`, and gets besides
    what its signature names:
      key: a random key of this step's own.
      own_items: int32[positions, E], as `own_items` of this module.
      item_counts: [items], how often each item is a training event, if it was given here.

    Where the item table is split over devices, a loss that takes `item_axis` and `num_items` is
    told so and gets its own rows; another gets the whole table.
    """
    wanted = inspect.signature(loss).parameters

    def function(model: Any, batch: dict[str, Array], key: Array) -> Array:
        inputs = {name: array for name, array in batch.items() if name not in _OF_THE_LOSS}
        hidden = model.hidden(**inputs, key=key)
        states = hidden.reshape(-1, hidden.shape[-1])[batch["slots"]]
        table, given = model.item_table(), dict(options)
        axis = getattr(model, "item_axis", None)
        if axis is not None and "item_axis" in wanted:
            given |= {"item_axis": axis, "num_items": model.num_items}
        elif axis is not None:
            # Not an all_gather, after which every device's loss would count as its own.
            every = jnp.arange(model.num_items, dtype=jnp.int32)
            table = ops.take_rows(table, every, axis=axis)
        if "key" in wanted:
            given["key"] = jax.random.fold_in(key, _LOSS_KEY)
        if "item_counts" in wanted and item_counts is not None:
            given["item_counts"] = jnp.asarray(item_counts, jnp.float32)
        if "own_items" in wanted:
            given["own_items"] = own_items(batch)
        return loss(states, table, batch["targets"], batch["target_valid"], **given)

    return function


def own_items(batch: dict[str, Array]) -> Array:
    """int32[positions, length + 1]: for every position, the items of its sequence; -1 is padding.

    These are all events of the training range that the batch holds, the last target included,
    before the position and after it. Meaningless where no target is valid.
    """
    items, segment_ids = batch["items"], batch["segment_ids"]
    length = items.shape[1]
    row = batch["slots"] // length
    mine = segment_ids[row] == segment_ids.reshape(-1)[batch["slots"]][:, None]
    # All targets but a sequence's last one are its items too.
    slot = jnp.where(batch["target_valid"], batch["slots"], items.size)
    following = jnp.zeros_like(items).reshape(-1).at[slot].set(batch["targets"], mode="drop")
    last = jnp.where(mine, jnp.arange(length, dtype=jnp.int32)[None, :], 0).max(1)
    final = following[row * length + last]
    return jnp.concatenate([jnp.where(mine, items[row], -1), final[:, None]], 1)
