"""The sampled losses compiled ahead of time for TPU v5e: do they compile, and what do they hold."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops
from jaxrec.ops.sampled_loss import ACCELERATOR_ELEMENTS

pytestmark = pytest.mark.slow

POSITIONS, NEGATIVES, ITEMS, WIDTH = 25_600, 256, 100_000, 64
LANES = 128  # what the compiler fills rows of 64 numbers up to


@pytest.mark.parametrize(
    ("name", "sharing", "count"),
    [
        ("sampled_softmax", "position", NEGATIVES),
        ("sampled_softmax", "batch", NEGATIVES),
        ("gbce", "position", NEGATIVES),
        ("gbce", "batch", NEGATIVES),
        ("bce", "position", 1),
    ],
)
def test_forward_and_gradient_hold_blocks_only(name, sharing, count):
    loss = getattr(ops, f"{name}_loss")
    shape = (count,) if sharing == "batch" else (POSITIONS, count)
    corrected = name == "sampled_softmax"

    def total(hidden, table, labels, negatives, log_q):
        options = {"log_q": log_q} if corrected else {}
        return loss(hidden, table, labels, negatives, **options).mean()

    one = SingleDeviceSharding(devices("v5e")[0])
    spec = functools.partial(jax.ShapeDtypeStruct, sharding=one)
    arguments = (
        spec((POSITIONS, WIDTH), jnp.bfloat16),
        spec((ITEMS, WIDTH), jnp.bfloat16),
        spec((POSITIONS,), jnp.int32),
        spec(shape, jnp.int32),
        spec(shape, jnp.float32),
    )
    program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments).compile()
    held = program.memory_analysis().temp_size_in_bytes
    if sharing == "batch":
        # Logits and slopes, 52 MB: fewer numbers than a block may have, so there is one block.
        assert held < 2 * 4 * POSITIONS * count
        return
    # Rows and slopes of a block of own negatives, and the table's gradient twice: 371 MB with 256
    # negatives. All rows at once would take 1.7 GB, and 3.4 GB as they lie in memory.
    numbers = min(ACCELERATOR_ELEMENTS, POSITIONS * count * WIDTH)
    block, table = numbers * LANES // WIDTH, ITEMS * LANES
    bound = 4 * (2 * block + 2 * table)
    assert count == 1 or bound < 4 * POSITIONS * count * WIDTH / 4
    assert held < bound
