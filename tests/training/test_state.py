"""The step: what it counts, what it applies, and how it freezes at a value that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrec.training.config import OptimizerConfig
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.state import (
    initial_state,
    make_train_step,
    parameter_names,
    reset_sums,
    sequence_loss,
)

PARAMETERS = {"b": jnp.array([1.0, -2.0]), "a": jnp.array(3.0), "c": jnp.array([[0.5]])}


ADAM = make_optimizer(OptimizerConfig(learning_rate=0.1), 10)


def loss_of(parameters, batch, key):
    """Quadratic; `poison` reaches the gradient of one parameter, `bump` the loss alone."""
    total = sum(jnp.sum(value**2) for value in parameters.values())
    poisoned = sum(jnp.sum(parameters[name]) * batch[name] for name in parameters)
    return total + poisoned + jax.lax.stop_gradient(batch["bump"])


def batch(bump=0.0, **poison):
    values = {"a": 0.0, "b": 0.0, "c": 0.0, "bump": bump} | poison
    return {name: np.float32(value) for name, value in values.items()}


def start(loss=loss_of, optimizer=None, seed=0):
    optimizer = optimizer or optax.sgd(0.1)
    step = make_train_step(lambda parameters: parameters, loss, optimizer, seed)
    return initial_state(PARAMETERS, optimizer), step


def numbers(state):
    return {name: np.asarray(value).copy() for name, value in state.parameters.items()}


def test_a_step_follows_the_gradient_and_counts():
    state, step = start()
    state, loss = step(state, batch())
    assert float(loss) == pytest.approx(1 + 4 + 9 + 0.25)
    np.testing.assert_allclose(state.parameters["b"], [0.8, -1.6], rtol=1e-6)
    assert int(state.step) == int(state.loss_steps) == 1
    assert float(state.loss_sum) == pytest.approx(14.25)
    assert float(state.gradient_norm_sum) == pytest.approx(2 * np.sqrt(14.25), rel=1e-5)
    state, second = step(state, batch(bump=1.0))
    assert float(state.loss_sum) == pytest.approx(14.25 + float(second), rel=1e-6)
    assert int(state.loss_steps) == 2
    assert int(state.bad_step) == int(state.bad_parameter) == -1


def test_the_sums_begin_anew_and_the_rest_stays():
    state, step = start()
    state, _ = step(state, batch())
    before = numbers(state)
    state = reset_sums(state)
    assert float(state.loss_sum) == float(state.gradient_norm_sum) == int(state.loss_steps) == 0
    assert int(state.step) == 1
    np.testing.assert_array_equal(state.parameters["b"], before["b"])


def test_the_state_is_donated_and_the_given_parameters_are_not():
    given = {name: value + 0 for name, value in PARAMETERS.items()}
    optimizer = ADAM
    step = make_train_step(lambda parameters: parameters, loss_of, optimizer, 0)
    state = initial_state(given, optimizer)
    step(state, batch())
    assert state.parameters["a"].is_deleted()
    assert state.step.is_deleted()
    assert not given["a"].is_deleted()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_freezes_at_the_first_bad_step_and_names_the_parameter(name, value):
    state, step = start(optimizer=ADAM)
    state, _ = step(state, batch())
    before = numbers(state)
    moments = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state.optimizer_state)]
    sums = float(state.loss_sum), float(state.gradient_norm_sum), int(state.loss_steps)
    state, _ = step(state, batch(**{name: value}))
    # Later steps, good or bad in another way, change nothing any more.
    state, _ = step(state, batch())
    state, _ = step(state, batch(a=np.nan, b=np.nan))
    assert int(state.bad_step) == 1
    assert parameter_names(state.parameters)[int(state.bad_parameter)] == name
    assert int(state.step) == 4
    for parameter, value_before in before.items():
        np.testing.assert_array_equal(state.parameters[parameter], value_before)
    for leaf, leaf_before in zip(jax.tree.leaves(state.optimizer_state), moments, strict=True):
        np.testing.assert_array_equal(leaf, leaf_before)
    assert (float(state.loss_sum), float(state.gradient_norm_sum), int(state.loss_steps)) == sums


def test_the_first_of_several_bad_parameters_is_named():
    state, step = start()
    state, _ = step(state, batch(c=np.nan, b=np.inf))
    assert parameter_names(state.parameters) == ["a", "b", "c"]
    assert int(state.bad_parameter) == 1


def test_a_bad_loss_with_finite_gradients_names_no_parameter():
    state, step = start()
    before = numbers(state)
    state, loss = step(state, batch(bump=np.inf))
    assert not np.isfinite(loss)
    assert int(state.bad_step) == 0
    assert int(state.bad_parameter) == -1
    np.testing.assert_array_equal(state.parameters["b"], before["b"])


def test_keys_depend_on_seed_and_step_alone():
    def noisy(parameters, batch, key):
        return jax.random.normal(key) + 0.0 * parameters["a"]

    losses = {}
    for seed in (0, 1):
        state, step = start(noisy, seed=seed)
        losses[seed] = []
        for _ in range(3):
            state, loss = step(state, batch())
            losses[seed].append(float(loss))
    assert len({*losses[0], *losses[1]}) == 6
    # A state taken up at step 2 draws what the uninterrupted one drew.
    state, step = start(noisy)
    resumed = state._replace(step=jnp.full((), 2, jnp.int32))
    assert float(step(resumed, batch())[1]) == losses[0][2]


def test_sequence_loss_runs_on_the_listed_events_only():
    class Model:
        def hidden(self, items, *, valid, segment_ids, positions, key):
            self.given = (items, valid, segment_ids, positions, key)
            return jnp.arange(12.0).reshape(2, 3, 2)

        def item_table(self):
            return "table"

    seen = {}

    def loss(states, table, targets, valid, **options):
        seen.update(states=states, table=table, targets=targets, valid=valid, options=options)
        return 0.0

    names = ("items", "valid", "segment_ids", "positions")
    given = {name: name for name in names} | {
        "slots": jnp.array([4, 0, 0]),
        "targets": "targets",
        "target_valid": "target_valid",
    }
    model = Model()
    sequence_loss(loss, label_smoothing=0.25)(model, given, "key")
    assert model.given == (*names, "key")
    np.testing.assert_array_equal(seen["states"], [[8, 9], [0, 1], [0, 1]])
    assert (seen["table"], seen["targets"], seen["valid"]) == ("table", "targets", "target_valid")
    assert seen["options"] == {"label_smoothing": 0.25}
