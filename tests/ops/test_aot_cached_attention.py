"""Attention to a cache compiled ahead of time for TPU v5e: what `extend` and `score` call."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops

pytestmark = pytest.mark.slow

BATCH, SLOTS, HEADS, WIDTH = 64, 200, 2, 32


def softmax(query, key, value, *, learned, timestamps, own_timestamps, **rest):
    return ops.cached_attention(query, key, value, distance_bias=learned, **rest)


def hstu(query, key, value, *, learned, **rest):
    tables = {"position_table": learned, "time_table": learned[:129]}
    return ops.cached_hstu_attention(query, key, value, normalizer=SLOTS, **tables, **rest)


@pytest.mark.parametrize("attention", [softmax, hstu])
@pytest.mark.parametrize(("mode", "new"), [("causal", 4), ("independent", 100)])
def test_new_events_hold_their_weights_only(attention, mode, new):
    one = SingleDeviceSharding(devices("v5e")[0])

    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    cache, own = (spec(BATCH, n, HEADS, WIDTH) for n in (SLOTS, new))
    given = {
        "own_key": own,
        "own_value": own,
        "length": spec(BATCH, dtype=jnp.int32),
        "learned": spec(2 * SLOTS - 1, dtype=jnp.float32),
        "timestamps": spec(BATCH, SLOTS, dtype=jnp.int32),
        "own_timestamps": spec(BATCH, new, dtype=jnp.int32),
    }
    program = jax.jit(lambda *x, **y: attention(*x, mode=mode, **y)).lower(
        own, cache, cache, **given
    )
    held = program.compile().memory_analysis().temp_size_in_bytes
    # Four float32 arrays of a weight for each new event, head and slot, filled up to tiles: 4.2 MB
    # for 4 events.
    assert held < 4 * 4 * BATCH * HEADS * max(new, 8) * 256
