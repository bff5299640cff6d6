"""Attention to a cache compiled ahead of time for TPU v5e: what `extend` calls."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops

pytestmark = pytest.mark.slow

BATCH, SLOTS, HEADS, WIDTH, NEW = 64, 200, 2, 32, 4


def softmax(query, key, value, own, length, learned, seconds, own_seconds):
    return ops.cached_attention(
        query,
        key,
        value,
        own_key=own,
        own_value=own,
        length=length,
        distance_bias=learned,
    )


def hstu(query, key, value, own, length, learned, seconds, own_seconds):
    return ops.cached_hstu_attention(
        query,
        key,
        value,
        own_key=own,
        own_value=own,
        length=length,
        normalizer=SLOTS,
        position_table=learned,
        time_table=learned[:129],
        timestamps=seconds,
        own_timestamps=own_seconds,
    )


@pytest.mark.parametrize("attention", [softmax, hstu])
def test_new_events_hold_their_weights_only(attention):
    one = SingleDeviceSharding(devices("v5e")[0])

    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    seconds = (spec(BATCH, n, dtype=jnp.int32) for n in (SLOTS, NEW))
    cache, own = spec(BATCH, SLOTS, HEADS, WIDTH), spec(BATCH, NEW, HEADS, WIDTH)
    learned = spec(2 * SLOTS - 1, dtype=jnp.float32)
    length = spec(BATCH, dtype=jnp.int32)
    arguments = (own, cache, cache, own, length, learned, *seconds)
    held = jax.jit(attention).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    # Four float32 arrays of a weight for each new event, head and slot, filled up to tiles: 4.2 MB.
    assert held < 4 * 4 * BATCH * HEADS * max(NEW, 8) * 256
