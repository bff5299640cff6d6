"""Training on a v5e 2x2 with ten million items: compiled, and what a chip must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from tpu_topologies import devices

from jaxrec.devices import BY_SEQUENCE, EVERYWHERE, Placement
from jaxrec.losses.catalogue import full_softmax
from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import SASRecConfig
from jaxrec.registry import resolve
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.first_state import _on_mesh, state_shapes
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.state import initial_state, make_train_step, sequence_loss

pytestmark = pytest.mark.slow

ITEMS, WIDTH, LENGTH, ROWS, EVENTS = 10_000_001, 64, 50, 128, 4096
CHIP_BYTES = 16e9


def test_ten_million_items_fit_on_four_chips():
    """10,000,001 items are no multiple of 2, so rows are padded.

    The table and its two moments alone are 7.7 GB; the logits of a batch would be 164 GB.
    """
    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "model"))
    config = SASRecConfig(width=WIDTH, blocks=1, dropout=0.2, dtype="bfloat16")
    model = nnx.eval_shape(lambda: build_model(config, num_items=ITEMS, max_length=LENGTH, seed=0))
    shapes, bind = split_model(model)
    placement = Placement(mesh, type(model).by_item, ITEMS)
    optimizer = make_optimizer(OptimizerConfig(), 100)
    step = make_train_step(bind, sequence_loss(full_softmax), optimizer, 0, placement)

    def on_mesh(x, spec):
        shape = (placement.rows, *x.shape[1:]) if spec not in (BY_SEQUENCE, EVERYWHERE) else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=placement.sharding(spec))

    abstract = jax.eval_shape(lambda p: initial_state(p, optimizer), shapes)
    state = jax.tree.map(on_mesh, abstract, placement.specs(abstract))
    rows, events = (ROWS, LENGTH), (EVENTS,)
    batch = {
        name: on_mesh(jax.ShapeDtypeStruct(shape, dtype), BY_SEQUENCE)
        for name, shape, dtype in [
            ("items", rows, jnp.int32),
            ("valid", rows, jnp.bool_),
            ("segment_ids", rows, jnp.int32),
            ("positions", rows, jnp.int32),
            ("slots", events, jnp.int32),
            ("targets", events, jnp.int32),
            ("target_valid", events, jnp.bool_),
        ]
    }
    program = step.lower(state, batch).compile()
    memory = program.memory_analysis()
    held = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    table = ITEMS * WIDTH * 4 / 2
    assert 3 * table < held < CHIP_BYTES
    # The gradient and what the compiler pads to 128 lanes, never logits (82 GB on a chip).
    assert memory.temp_size_in_bytes < 10 * table
    assert "all-reduce" in program.as_text()


def test_the_first_state_of_ten_million_items_is_made_in_parts():
    """A chip makes its half of the table and of the two moments, and holds nothing beside."""
    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "model"))
    config = SASRecConfig(width=WIDTH, blocks=1)

    def initialise(key):
        return split_model(build_model(config, num_items=ITEMS, max_length=LENGTH, seed=key))[0]

    placement = Placement(mesh, resolve("model", config.type).by_item, ITEMS)
    optimizer = make_optimizer(OptimizerConfig(), 100)
    parameters = jax.eval_shape(initialise, jax.eval_shape(lambda: jax.random.key(0)))
    shapes = state_shapes(parameters, optimizer, placement)
    data = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=placement.sharding(EVERYWHERE))
    program = _on_mesh(initialise, optimizer, shapes, placement).lower(data).compile()
    memory, half = program.memory_analysis(), ITEMS * WIDTH * 4 / 2
    assert 3 * half < memory.output_size_in_bytes < 3.1 * half
    assert memory.temp_size_in_bytes < half / 10
