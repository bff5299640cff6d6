"""The state before the first step on eight devices: the numbers of one, and whole on none."""

import jax
import numpy as np
import pytest
from small_sets import ITEMS, small_config

from jaxrec.devices import BY_ITEM, EVERYWHERE
from jaxrec.models.config import ESASRecConfig, HSTUConfig, PositionalKernelConfig, SASRecConfig
from jaxrec.training.config import MeshConfig
from jaxrec.training.first_state import _on_mesh, make_state, state_shapes
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.setup import initialiser, make_model, make_placement, model_shapes
from jaxrec.training.state import initial_state

MODELS = {
    "sasrec": SASRecConfig(width=8, blocks=1),
    "kernel": SASRecConfig(
        width=8, blocks=1, position="kernel", kernel=PositionalKernelConfig(init="powerlaw")
    ),
    "untied": ESASRecConfig(width=8, blocks=1, untied=True, position="relative"),
    "hstu": HSTUConfig(width=8, blocks=1),
}


def parts_of(config, items):
    """What makes the state: initialiser, seed, optimiser, shapes, placement."""
    optimizer, placement = make_optimizer(config.optimizer, 1), make_placement(config, items)
    shapes = state_shapes(model_shapes(config, items)[0], optimizer, placement)
    return initialiser(config, items), config.training.seed, optimizer, shapes, placement


@pytest.mark.parametrize("items", [ITEMS, 1001, 9, 64])
@pytest.mark.parametrize("model", MODELS)
def test_the_numbers_are_bitwise_those_of_one_device(model, items):
    """A multiple of eight items, and numbers that are none; of 9, some devices have no row."""
    config = small_config(model=MODELS[model], mesh=MeshConfig(1, 8), training__seed=3)
    optimizer = make_optimizer(config.optimizer, 1)
    exact = initial_state(make_model(config, items)[0], optimizer)
    *arguments, shapes, placement = parts_of(config, items)
    made = make_state(*arguments, shapes, placement)
    rows = -(-items // 8) * 8
    tables = 0
    flat, wanted = jax.tree.leaves_with_path(made), jax.tree.leaves(exact)
    for (path, leaf), one, shape in zip(flat, wanted, jax.tree.leaves(shapes), strict=True):
        name = jax.tree_util.keystr(path)
        is_table = "item_embedding" in name or "output_embedding" in name
        tables += is_table
        assert (
            leaf.sharding
            == shape.sharding
            == placement.sharding(BY_ITEM if is_table else EVERYWHERE)
        ), name
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype), name
        if is_table:
            assert leaf.shape == (rows, 8)
            assert {s.data.shape for s in leaf.addressable_shards} == {(rows // 8, 8)}
            assert not np.asarray(leaf)[items:].any()
            leaf = np.asarray(leaf)[:items]
        np.testing.assert_array_equal(leaf, one, err_msg=name)
    # Each with two moments.
    assert tables == (6 if model == "untied" else 3)


@pytest.mark.parametrize("items", [40_000, 40_001])
def test_making_it_takes_parts_of_a_table_alone(items):
    config = small_config(model__width=16, mesh=MeshConfig(1, 8))
    initialise, seed, optimizer, shapes, placement = parts_of(config, items)
    data = np.asarray(jax.random.key_data(jax.random.key(seed)))
    program = _on_mesh(initialise, optimizer, shapes, placement).lower(data).compile()
    memory, table = program.memory_analysis(), items * 16 * 4
    # The table and its moments, an eighth of each; drawing takes as much again.
    assert 3 / 8 * table < memory.output_size_in_bytes < 4 / 8 * table
    assert memory.temp_size_in_bytes < 4 / 8 * table


def test_one_device_makes_what_it_always_made():
    config = small_config()
    optimizer = make_optimizer(config.optimizer, 1)
    exact = initial_state(make_model(config, ITEMS)[0], optimizer)
    *arguments, shapes, placement = parts_of(config, ITEMS)
    assert placement is None
    made = make_state(*arguments, shapes)
    for one, other, shape in zip(*map(jax.tree.leaves, (made, exact, shapes)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one.shape, one.dtype) == (shape.shape, shape.dtype)
        assert one.sharding == shape.sharding
