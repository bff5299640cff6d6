"""Schedules, weight decay, clipping, against the definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.training.config import OptimizerConfig
from jaxrec.training.optimizer import decayed, learning_rate, make_optimizer


def rates(steps, total, **options):
    rate = learning_rate(OptimizerConfig(learning_rate=0.5, **options), total)
    return [float(rate(step)) for step in steps]


def test_constant():
    assert rates((0, 7, 99), 10) == [0.5] * 3


def test_linear_falls_to_zero_at_the_last_step():
    np.testing.assert_allclose(
        rates((0, 5, 10, 11), 10, schedule="linear"), [0.5, 0.25, 0.0, 0.0], atol=1e-7
    )


def test_cosine_falls_to_zero_at_the_last_step():
    wanted = [0.25 * (1 + np.cos(np.pi * step / 8)) for step in (0, 2, 4, 8)]
    np.testing.assert_allclose(rates((0, 2, 4, 8), 8, schedule="cosine"), wanted, atol=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_from_zero(schedule):
    options = {"warmup_steps": 4, "schedule": schedule}
    np.testing.assert_allclose(
        rates((0, 1, 2, 3, 4), 12, **options), [0, 0.125, 0.25, 0.375, 0.5], atol=1e-7
    )
    after = rates((8, 12), 12, **options)
    assert after[1] == pytest.approx(0.5 if schedule == "constant" else 0.0, abs=1e-7)
    assert after[0] == pytest.approx(0.5 if schedule == "constant" else 0.25, abs=1e-7)


def test_a_warm_up_longer_than_the_run():
    assert rates((0, 2), 2, warmup_steps=4, schedule="cosine") == [0.0, 0.25]


PARAMETERS = {
    "item_embedding": jnp.full((3, 2), 2.0),
    "blocks.0.query.kernel": jnp.full((2, 2), 2.0),
    "blocks.0.query.bias": jnp.full((2,), 2.0),
    "norm.scale": jnp.full((2,), 2.0),
    "blocks.0.kernel.logits": jnp.full((2, 2), 2.0),
    "blocks.0.kernel.values": jnp.full((2, 3, 3), 2.0),
    "blocks.0.bias.table": jnp.full((32, 2), 2.0),
}
DECAYED = {"item_embedding", "blocks.0.query.kernel"}


def test_only_matrices_decay_and_nothing_of_positions():
    assert {name for name, value in decayed(PARAMETERS).items() if value} == DECAYED
    assert decayed(PARAMETERS).keys() == PARAMETERS.keys()


def updates(gradients, config, steps=1):
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(PARAMETERS)
    for _ in range(steps):
        change, state = optimizer.update(gradients, state, PARAMETERS)
    return change


def test_decay_is_decoupled_from_the_gradient():
    zeros = {name: value * 0 for name, value in PARAMETERS.items()}
    change = updates(zeros, OptimizerConfig(learning_rate=0.1, weight_decay=0.3))
    for name, value in change.items():
        wanted = -0.1 * 0.3 * 2.0 if name in DECAYED else 0.0
        np.testing.assert_allclose(value, wanted, atol=1e-7, err_msg=name)


def test_adam_takes_the_betas_and_epsilon_it_is_given():
    gradients = {name: value * 0.25 for name, value in PARAMETERS.items()}
    config = OptimizerConfig(learning_rate=0.1, b1=0.8, b2=0.5, eps=0.2)
    change = updates(gradients, config, steps=2)
    g = 0.5
    first, second = (0.8 + 1) * 0.2 * g, (0.5 + 1) * 0.5 * g**2
    mean, square = first / (1 - 0.8**2), second / (1 - 0.5**2)
    np.testing.assert_allclose(
        change["norm.scale"], -0.1 * mean / (np.sqrt(square) + 0.2), rtol=1e-5
    )


def test_clipping_bounds_the_norm_of_all_gradients_together():
    # eps so large that Adam's step is the gradient over eps: clipping shows in the update.
    gradients = {name: value * 0 for name, value in PARAMETERS.items()}
    gradients["norm.scale"] = jnp.array([3.0, 0.0])
    gradients["blocks.0.query.bias"] = jnp.array([0.0, 4.0])
    config = OptimizerConfig(learning_rate=1.0, b1=0.0, b2=0.0, eps=1e6)
    free = updates(gradients, config)
    clipped = updates(gradients, OptimizerConfig(**{**vars(config), "clip_norm": 1.0}))
    above = updates(gradients, OptimizerConfig(**{**vars(config), "clip_norm": 6.0}))
    np.testing.assert_allclose(free["norm.scale"][0], -3e-6, rtol=1e-4)
    np.testing.assert_allclose(clipped["norm.scale"][0], -0.6e-6, rtol=1e-4)
    np.testing.assert_allclose(clipped["blocks.0.query.bias"][1], -0.8e-6, rtol=1e-4)
    np.testing.assert_array_equal(above["norm.scale"], free["norm.scale"])


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_both_names_stand_for_the_same(name):
    gradients = {name: value * 0.25 for name, value in PARAMETERS.items()}
    change = updates(gradients, OptimizerConfig(name=name, learning_rate=0.1))
    np.testing.assert_allclose(change["norm.scale"], -0.1, rtol=1e-5)
