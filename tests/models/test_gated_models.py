"""eSASRec and HSTU against their float64 oracles, packed, and what must not leak."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import esasrec, hstu_model

from jaxrec.data.packing import fill, place
from jaxrec.errors import UserError
from jaxrec.losses.catalogue import full_softmax
from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import ESASRecConfig, HSTUConfig

ITEMS, LENGTH, ROWS = 11, 7, 5
ESASREC = ESASRecConfig(width=8, blocks=2, heads=2, dropout=0.0, expansion=2)
HSTU = HSTUConfig(width=8, blocks=2, heads=2, dropout=0.0)
SERVING = {
    "silu": "u", "scale": "rsqrt", "bias": "none", "projection_bias": True, "norm_affine": True,
    "concat": True,
}  # fmt: skip
VARIANTS = {
    "esasrec": ESASREC,
    "esasrec, oldest first, scaled": replace(
        ESASREC, position_order="oldest", scale_embedding=True
    ),
    "esasrec, rope": replace(ESASREC, position="rope"),
    "esasrec, a bias a distance": replace(ESASREC, position="relative"),
    "esasrec, untied": replace(ESASREC, untied=True),
    "hstu": HSTU,
    "hstu, widths of its own": replace(HSTU, query_width=3, value_width=5, normalizer=4),
    "hstu, position alone": replace(HSTU, bias="position", position="none"),
    "hstu, time alone, few buckets": replace(HSTU, bias="time", time_buckets=20),
    "hstu, untied": replace(HSTU, untied=True),
    "hstu, serving": replace(HSTU, **SERVING, normalize=False),
    "hstu, serving, a norm a head": replace(HSTU, **SERVING, group_norm=True),
    "hstu, dropout": replace(HSTU, dropout=0.4),
    "esasrec, dropout": replace(ESASREC, dropout=0.4),
    "hstu, bfloat16": replace(HSTU, dtype="bfloat16"),
}


@functools.cache
def make(name):
    """A model none of whose parameters is at the zero or one that it started from."""
    config = VARIANTS[name]
    model = build_model(config, num_items=ITEMS, max_length=LENGTH, seed=0)
    parameters, bind = split_model(model)
    rng = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(
            rng.normal(1.0 if name.endswith("scale") else 0.0, 0.5, value.shape), jnp.float32
        )
        for name, value in sorted(parameters.items())
    }

    def states(parameters, rows, key=None):
        return bind(parameters).hidden(**rows, key=key)

    def loss(parameters, rows, slots, targets):
        hidden = states(parameters, rows)
        found = hidden.reshape(-1, hidden.shape[-1])[slots]
        table = bind(parameters).item_table()
        return full_softmax(found, table, targets, jnp.ones(len(targets), bool))

    return config, parameters, jax.jit(states), jax.jit(jax.value_and_grad(loss))


def sequences(seed=0, lengths=(3, 6, 1, 4, 2)):
    """(items, times), one event more than the model reads; gaps from seconds to years."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(ITEMS, size=n + 1), 5 + np.cumsum(np.exp(rng.uniform(0, 18, n + 1)) // 1))
        for n in lengths
    ]


def rows_of(found, config):
    lengths = np.array([len(items) - 1 for items, _ in found])
    placed = place(lengths, LENGTH)
    assert placed.rows < ROWS
    rows, slots = fill(
        placed,
        lengths,
        np.concatenate([items[:-1] for items, _ in found]),
        rows=ROWS,
        capacity=LENGTH,
        count_from_newest=getattr(config, "position_order", "oldest") == "newest",
        timestamps=(
            np.concatenate([times[:-1] for _, times in found]).astype(np.int64)
            if config.reads_timestamps
            else None
        ),
    )
    arrays = {name: column for name, column in rows._asdict().items() if column is not None}
    return arrays, slots, np.concatenate([items[1:] for items, _ in found]).astype(np.int32)


def oracle_states(parameters, one, config):
    items, times = one
    if config.type == "esasrec":
        return esasrec.hidden(parameters, items[:-1], config)
    return hstu_model.hidden(parameters, items[:-1], list(times[:-1]), config, LENGTH)


def oracle_loss(parameters, found, config):
    module = esasrec if config.type == "esasrec" else hstu_model
    table = module.item_table(parameters, config)
    losses = []
    for one in found:
        logits = oracle_states(parameters, one, config) @ table.T
        for row, target in zip(logits, one[0][1:], strict=True):
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
    return np.mean(losses)


def at(states, slots):
    return np.asarray(states.astype(jnp.float32)).reshape(-1, states.shape[-1])[slots]


EXACT = [name for name in VARIANTS if "bfloat16" not in name]


@pytest.mark.parametrize("name", EXACT)
def test_packed_rows_equal_the_oracle_of_each_sequence(name):
    config, parameters, states, _ = make(name)
    found = sequences()
    rows, slots, _ = rows_of(found, config)
    exact = np.concatenate([oracle_states(parameters, one, config) for one in found])
    np.testing.assert_allclose(at(states(parameters, rows), slots), exact, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["esasrec", "hstu", "hstu, serving"])
def test_the_gradient_is_that_of_the_oracle(name):
    config, parameters, _, losses = make(name)
    found = sequences(1)
    loss, gradients = losses(parameters, *rows_of(found, config))
    exact = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    np.testing.assert_allclose(loss, oracle_loss(exact, found, config), rtol=1e-4)
    rng = np.random.default_rng(1)
    for parameter, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        up, down = (
            oracle_loss(exact | {parameter: exact[parameter] + by * direction}, found, config)
            for by in (1e-5, -1e-5)
        )
        np.testing.assert_allclose(
            np.sum(np.asarray(gradient, np.float64) * direction),
            (up - down) / 2e-5,
            atol=3e-4,
            rtol=3e-3,
            err_msg=parameter,
        )


def test_states_and_item_vectors_of_hstu_have_length_one():
    config, parameters, states, _ = make("hstu")
    rows, slots, _ = rows_of(sequences(), config)
    np.testing.assert_allclose(
        np.linalg.norm(at(states(parameters, rows), slots), axis=1), 1, rtol=1e-5
    )


def test_bfloat16_is_close():
    config, parameters, half_states, _ = make("hstu, bfloat16")
    _, _, states, _ = make("hstu")
    rows, slots, _ = rows_of(sequences(), config)
    half = half_states(parameters, rows)
    assert half.dtype == jnp.bfloat16
    error = np.abs(at(half, slots) - at(states(parameters, rows), slots))
    assert 0 < error.max() < 0.1


@pytest.mark.parametrize("name", ["hstu, dropout", "esasrec, dropout"])
def test_dropout_is_decided_by_the_key(name):
    config, parameters, states, _ = make(name)
    rows, slots, _ = rows_of(sequences(), config)
    one, again, other = (
        at(states(parameters, rows, jax.random.key(seed)), slots) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01


def test_hstu_without_times_says_so():
    config, parameters, states, _ = make("hstu")
    rows, _, _ = rows_of(sequences(), config)
    with pytest.raises(ValueError, match="needs timestamps"):
        states(parameters, {k: v for k, v in rows.items() if k != "timestamps"})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(ESASREC, expansion=0), "model.expansion"),
        (replace(ESASREC, activation="relou"), "model.activation"),
        (replace(ESASREC, heads=3), "model.heads"),
        (replace(HSTU, heads=3), "model.heads"),
        (replace(HSTU, query_width=0), "model.query_width"),
        (replace(HSTU, dropout=1.0), "model.dropout"),
        (replace(HSTU, norm_epsilon=0.0), "model.norm_epsilon"),
        (replace(HSTU, normalizer=-3), "model.normalizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_configs_are_refused_by_field(config, named):
    with pytest.raises(UserError, match=named):
        config.check(max_length=LENGTH)
