"""prefill and extend against the full forward pass of every model that can be extended."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import (
    ESASRecConfig,
    HSTUConfig,
    PositionalKernelConfig,
    SASRecConfig,
)

ITEMS, LENGTH = 11, 9
SASREC = SASRecConfig(width=8, blocks=2, heads=2, dropout=0.3)
HSTU = HSTUConfig(width=8, blocks=2, heads=2, dropout=0.3)
VARIANTS = {
    "additive": SASREC,
    "additive, cosine": replace(SASREC, normalize=True, residual="input"),
    "t5": replace(SASREC, position="t5"),
    "alibi": replace(SASREC, position="alibi", alibi_slope=0.3),
    "rope": replace(SASREC, position="rope", rope_base=30.0),
    "rope, counted from the newest": replace(SASREC, position="rope", position_order="newest"),
    "a bias a distance": replace(SASREC, position="relative"),
    "none": replace(SASREC, position="none"),
    "kernel": replace(SASREC, position="kernel"),
    "kernel, band": replace(
        SASREC, position="additive+kernel", kernel=PositionalKernelConfig(band=3)
    ),
    "esasrec": ESASRecConfig(width=8, blocks=2, heads=2, expansion=2, position_order="oldest"),
    "hstu": HSTU,
    "hstu, position": replace(HSTU, bias="position"),
    "hstu, time": replace(HSTU, bias="time", position="none"),
    "hstu, serving": replace(
        HSTU, bias="none", silu="u", scale="rsqrt", norm_affine=True, concat=True
    ),
}


@functools.cache
def make(name):
    config = VARIANTS[name]
    parameters, bind = split_model(build_model(config, num_items=ITEMS, max_length=LENGTH, seed=0))
    rng = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(
            rng.normal(1.0 if name.endswith("scale") else 0.0, 0.5, value.shape), jnp.float32
        )
        for name, value in sorted(parameters.items())
    }
    model = bind(parameters)

    @jax.jit
    def whole(items, events, **times):
        place = jnp.broadcast_to(jnp.arange(items.shape[1], dtype=jnp.int32), items.shape)
        return model.hidden(
            items,
            valid=place < events,
            segment_ids=jnp.ones_like(items),
            positions=place,
            **times,
        )

    prefill = jax.jit(model.prefill, static_argnames="capacity")
    return config, whole, prefill, jax.jit(model.extend), model


def histories(config, seed=0):
    """Items and times of three users with LENGTH events each."""
    rng = np.random.default_rng(seed)
    items = jnp.asarray(rng.integers(ITEMS, size=(3, LENGTH)), jnp.int32)
    gaps = np.exp(rng.uniform(0, 16, (3, LENGTH)))
    times = jnp.asarray(np.cumsum(gaps, 1), jnp.int32)
    return items, ({"timestamps": times} if config.reads_timestamps else {})


def part(times, *where):
    return {name: array[where] for name, array in times.items()}


def exact(name, items, times, n):
    """States after the first `n` events, of every user."""
    _, whole, *_ = make(name)
    # The newest event asks at its own time, which a longer sequence would change.
    return whole(items, n, **times)[:, :n]


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_extend_are_the_full_forward(name):
    config, _, prefill, extend, _ = make(name)
    items, times = histories(config)
    length = np.array([5, 3, 4])
    # What stands behind a history must not matter.
    begun = items[:, :5].at[1, 3:].set(7)
    states, cache = prefill(begun, jnp.asarray(length), **part(times, slice(None), slice(5)))
    for user, n in enumerate(length):
        wanted = exact(name, items, times, n)[user, -1]
        np.testing.assert_allclose(states[user], wanted, atol=2e-5, rtol=1e-4)
    for new in (1, 3):
        where = length[:, None] + np.arange(new)[None]
        rows = np.arange(3)[:, None]
        states, cache = extend(cache, items[rows, where], **part(times, rows, where))
        length = length + new
        for user, n in enumerate(length):
            wanted = exact(name, items, times, n)[user, n - new :]
            np.testing.assert_allclose(states[user], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["additive", "kernel", "hstu"])
def test_a_history_that_outgrows_the_cache_is_nan_and_no_other(name):
    config, _, prefill, extend, _ = make(name)
    items, times = histories(config)
    length = jnp.array([4, 6, 4])
    _, cache = prefill(items[:, :6], length, capacity=6, **part(times, slice(None), slice(6)))
    where = length[:, None] + jnp.arange(2)[None]
    rows = jnp.arange(3)[:, None]
    states, _ = extend(cache, items[rows, where], **part(times, rows, where))
    assert np.isnan(states[1]).all()
    wanted = exact(name, items, times, 6)[0, 4:]
    np.testing.assert_allclose(states[0], wanted, atol=2e-5, rtol=1e-4)


def test_the_state_before_is_what_the_scores_are_for():
    _, whole, prefill, _, model = make("additive")
    items, _ = histories(SASREC)
    states, _ = prefill(items, jnp.array([LENGTH] * 3))
    wanted = model.score(whole(items, LENGTH)[:, -1])
    np.testing.assert_allclose(model.score(states), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        replace(SASREC, position_order="newest"),
        replace(SASREC, position="kernel", kernel=PositionalKernelConfig(logits="full")),
    ],
)
def test_positions_from_the_newest_cannot_be_extended(config):
    model = build_model(config, num_items=ITEMS, max_length=LENGTH, seed=0)
    with pytest.raises(ValueError, match="counts positions from the newest event"):
        model.prefill(jnp.zeros((1, 2), jnp.int32), jnp.array([2]))


def test_a_capacity_out_of_range_is_refused():
    *_, model = make("additive")
    items = jnp.zeros((1, 4), jnp.int32)
    for capacity in (3, LENGTH + 1):
        with pytest.raises(ValueError, match="capacity must be between"):
            model.prefill(items, jnp.array([4]), capacity=capacity)


def test_times_must_be_given_again():
    config, _, prefill, extend, _ = make("hstu")
    items, times = histories(config)
    _, cache = prefill(items[:, :3], jnp.array([3, 3, 3]), **part(times, slice(None), slice(3)))
    with pytest.raises(ValueError, match="needs timestamps"):
        extend(cache, items[:, 3:4])


FULL = PositionalKernelConfig(logits="full", values="toeplitz", per_head=True)
PACKED = VARIANTS | {
    "kernel, full": replace(SASREC, position="kernel", kernel=FULL),
    "kernel, full, from the newest": replace(
        SASREC, position="kernel", kernel=FULL, position_order="newest"
    ),
    "kernel, tied": replace(SASREC, position="kernel", kernel=PositionalKernelConfig(tie=True)),
    "kernel, one factor": replace(
        SASREC, position="kernel", kernel=PositionalKernelConfig(logits="identity")
    ),
    "esasrec, from the newest": ESASRecConfig(width=8, blocks=1, heads=2, expansion=2),
}


@pytest.mark.parametrize("name", PACKED)
def test_newest_is_hidden_at_those_slots(name):
    """In packed rows with padding before, between and behind the sequences.

    Mutations seen to fail: a sequence's first slot one off, keys of other sequences seen, the mix
    of another sequence's events, a bias counted from the row's first slot.
    """
    config = PACKED[name]
    parameters, bind = split_model(build_model(config, num_items=ITEMS, max_length=LENGTH, seed=1))
    rng = np.random.default_rng(1)
    parameters = {
        key: jnp.asarray(rng.normal(0.2, 0.5, value.shape), jnp.float32)
        for key, value in sorted(parameters.items())
    }
    model = bind(parameters)
    ids = np.array(
        [[0, 1, 1, 1, 1, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0, 0, 0, 0]]
    )
    valid = ids > 0
    newest = config.position_order == "newest" if hasattr(config, "position_order") else False
    positions = np.zeros_like(ids)
    last = []
    for row, one in np.argwhere(valid):
        mine = np.flatnonzero((ids[row] == ids[row, one]) & valid[row])
        positions[row, one] = mine[-1] - one if newest else one - mine[0]
        if one == mine[-1]:
            last.append(row * LENGTH + one)
    columns = {
        "valid": jnp.asarray(valid),
        "segment_ids": jnp.asarray(ids),
        "positions": jnp.asarray(positions),
    }
    if config.reads_timestamps:
        columns["timestamps"] = jnp.asarray(np.cumsum(rng.integers(0, 9999, ids.shape), 1))
    items = jnp.asarray(rng.integers(0, ITEMS, ids.shape))
    # A slot too many, as batches have: what it gives is not read.
    slots = jnp.asarray([*last, 0])
    hidden = jax.jit(model.hidden)(items, **columns)
    found = jax.jit(model.newest)(items, last=slots, **columns)
    wanted = hidden.reshape(-1, hidden.shape[-1])[slots]
    np.testing.assert_allclose(found[:-1], wanted[:-1], atol=2e-5)
    assert np.isfinite(found).all()
