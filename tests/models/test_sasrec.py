"""SASRec against the float64 oracle, packed against alone, and what must not leak."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sasrec as oracle

from jaxrec.data.packing import Places, fill, place, place_alone
from jaxrec.errors import UserError
from jaxrec.losses.catalogue import full_softmax
from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import PositionalKernelConfig, SASRecConfig

ITEMS, LENGTH, ROWS = 11, 7, 6
BASE = SASRecConfig(width=8, blocks=1, heads=1, dropout=0.0)
MASKS = ("valid", "segment_ids", "positions")


def kernel(**options):
    return {"position": "kernel", "kernel": PositionalKernelConfig(**options)}


VARIANTS = {
    "additive": {},
    "no position": {"position": "none"},
    "two blocks, two heads": {"blocks": 2, "heads": 2},
    "as in the paper": {"output_projection": False},
    "residual from the input": {"residual": "input"},
    "residual from the input, no projection": {"residual": "input", "output_projection": False},
    "positions from the newest": {"position_order": "newest"},
    "wider feed-forward": {"feed_forward": 12, "activation": "silu"},
    "no scaling": {"scale_embedding": False},
    "large epsilon": {"norm_epsilon": 0.5},
    "t5": {"position": "t5", "heads": 2, "blocks": 2},
    "alibi": {"position": "alibi", "heads": 2},
    "alibi, its own slope": {"position": "alibi", "alibi_slope": 0.5},
    "a bias a distance": {"position": "relative", "heads": 2, "blocks": 2},
    "rope": {"position": "rope", "heads": 2, "rope_base": 30.0},
    "rope, from the newest": {"position": "rope", "position_order": "newest"},
    "normalized": {"normalize": True},
    "untied": {"untied": True},
    "toeplitz": kernel(),
    "toeplitz, band": kernel(band=3),
    "toeplitz, two heads": {"heads": 2, **kernel()},
    "toeplitz, a kernel a head": {"heads": 2, **kernel(per_head=True)},
    "toeplitz on logits": kernel(values="identity"),
    "toeplitz on values": kernel(logits="identity"),
    "toeplitz and full": kernel(values="full"),
    "full": kernel(logits="full", values="full"),
    "full, from the newest": {
        "position_order": "newest",
        **kernel(logits="full", values="full"),
    },
    "full, a kernel a head": {"heads": 2, **kernel(logits="full", values="full", per_head=True)},
    "tied": kernel(tie=True),
    "tied full": kernel(logits="full", values="full", tie=True),
    "shared": {"blocks": 2, **kernel(shared=True)},
    "a kernel a block": {"blocks": 2, **kernel()},
    "bfloat16": {"dtype": "bfloat16", **kernel(), "position": "additive+kernel"},
    "dropout": {"dropout": 0.5, "blocks": 2},
    "additive and kernel": {**kernel(), "position": "additive+kernel"},
    "newest, additive and full": {
        **kernel(logits="full"),
        "position": "additive+kernel",
        "position_order": "newest",
    },
}


@functools.cache
def make(name):
    """A model whose every parameter matters: nothing is at a zero or one it started from.

    Returns:
      Its config, parameters and `bind`; and, compiled once, `states(parameters, rows, key)` and
      `losses(parameters, rows, slots, targets) -> ((loss, states), gradients)`.
    """
    config = replace(BASE, **VARIANTS[name])
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
        masks = {mask: rows[mask] for mask in MASKS}
        return bind(parameters).hidden(rows["items"], key=key, **masks)

    def loss(parameters, rows, slots, targets):
        hidden = states(parameters, rows)
        found = hidden.reshape(-1, hidden.shape[-1])[slots]
        table = bind(parameters).item_table()
        return full_softmax(found, table, targets, jnp.ones(len(targets), bool)), hidden

    return (
        config,
        parameters,
        bind,
        jax.jit(states),
        jax.jit(jax.value_and_grad(loss, has_aux=True)),
    )


def sequences(seed=0, lengths=(3, 7, 1, 4, 2, 6)):
    """Items, one more than the model reads."""
    rng = np.random.default_rng(seed)
    return [rng.integers(ITEMS, size=n + 1) for n in lengths]


def rows_of(found, config, *, packed=True, start=0):
    """Arguments of `hidden` (always of one shape), the slots of every event, and its target."""
    lengths = np.array([len(one) - 1 for one in found])
    placed = place(lengths, LENGTH) if packed else place_alone(len(found))
    if start:
        placed = Places(placed.row, placed.offset + start, placed.segment, placed.rows)
    rows, slots = fill(
        placed,
        lengths,
        np.concatenate([one[:-1] for one in found]),
        rows=ROWS,
        capacity=LENGTH,
        count_from_newest=config.position_order == "newest",
    )
    assert placed.rows < ROWS or not packed
    return rows._asdict(), slots, np.concatenate([one[1:] for one in found]).astype(np.int32)


def at(states, slots):
    """float32[events, width]: what a batch of rows gave for every event."""
    return np.asarray(states.astype(jnp.float32)).reshape(-1, states.shape[-1])[slots]


def exact_states(parameters, found, config):
    return np.concatenate([oracle.hidden(parameters, one[:-1], config) for one in found])


FLOAT32 = [name for name in VARIANTS if name != "bfloat16"]


@pytest.mark.parametrize("name", FLOAT32)
def test_packed_rows_equal_the_oracle_of_each_sequence(name):
    config, parameters, _, states, _ = make(name)
    found = sequences()
    rows, slots, _ = rows_of(found, config)
    np.testing.assert_allclose(
        at(states(parameters, rows), slots), exact_states(parameters, found, config), atol=2e-4
    )


@pytest.mark.parametrize("name", ["additive", "toeplitz", "full", "newest, additive and full"])
def test_alone_equals_the_oracle_wherever_it_lies(name):
    config, parameters, _, states, _ = make(name)
    found = sequences(lengths=(3, 2))
    wanted = exact_states(parameters, found, config)
    for start in (0, 4):
        rows, slots, _ = rows_of(found, config, packed=False, start=start)
        np.testing.assert_allclose(at(states(parameters, rows), slots), wanted, atol=2e-4)


DIFFERENTIATED = [
    "a bias a distance",
    "as in the paper",
    "normalized",
    "toeplitz, a kernel a head",
    "newest, additive and full",
]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_packing_changes_neither_the_loss_nor_its_gradient(name):
    config, parameters, _, _, losses = make(name)
    found = sequences()
    results = [losses(parameters, *rows_of(found, config, packed=p)) for p in (True, False)]
    ((packed_loss, _), packed_gradient), ((alone_loss, _), alone_gradient) = results
    np.testing.assert_allclose(packed_loss, alone_loss, rtol=1e-5)
    np.testing.assert_allclose(packed_loss, oracle.mean_loss(parameters, found, config), rtol=1e-4)
    assert packed_gradient.keys() == parameters.keys()
    for parameter, gradient in packed_gradient.items():
        np.testing.assert_allclose(
            gradient, alone_gradient[parameter], atol=2e-5, rtol=1e-4, err_msg=parameter
        )
        # Softmax does not see what is the same for all keys, which a mix of keys can undo.
        silent = parameter.endswith("key.bias") and "kernel" not in config.position
        assert silent or np.abs(gradient).max() > 1e-5, parameter


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_gradient_is_that_of_the_oracle(name):
    config, parameters, _, _, losses = make(name)
    found = sequences(1)
    _, gradients = losses(parameters, *rows_of(found, config))
    exact = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    rng = np.random.default_rng(1)
    for parameter, gradient in gradients.items():
        # Along one random direction of every parameter.
        direction = rng.normal(size=gradient.shape)
        up, down = (
            oracle.mean_loss(exact | {parameter: exact[parameter] + by * direction}, found, config)
            for by in (1e-5, -1e-5)
        )
        np.testing.assert_allclose(
            np.sum(np.asarray(gradient, np.float64) * direction),
            (up - down) / 2e-5,
            atol=2e-4,
            rtol=2e-3,
            err_msg=parameter,
        )


def test_position_zero_is_the_newest_event_where_counted_from_there():
    config, parameters, _, states, _ = make("positions from the newest")
    vectors = parameters["position_embedding"]
    rows, slots, _ = rows_of([np.array([1, 2, 3, 4])], config)
    moved = parameters | {"position_embedding": vectors.at[0].add(1.0)}
    change = at(states(moved, rows), slots) - at(states(parameters, rows), slots)
    assert not change[:2].any()
    assert np.abs(change[2]).max() > 1e-3
    moved = parameters | {"position_embedding": vectors.at[2].add(1.0)}
    change = at(states(moved, rows), slots) - at(states(parameters, rows), slots)
    assert (np.abs(change).max(1) > 1e-3).all()


def test_bfloat16_is_close_to_float32():
    config, parameters, _, _, losses = make("additive and kernel")
    _, _, half_bind, _, half_losses = make("bfloat16")
    parameters = {k: v * (1.0 if k.endswith("scale") else 0.5) for k, v in parameters.items()}
    rows, slots, targets = rows_of(sequences(), config)
    (loss, states), gradients = losses(parameters, rows, slots, targets)
    (half_loss, half_states), half_gradients = half_losses(parameters, rows, slots, targets)
    assert half_states.dtype == jnp.bfloat16
    assert half_bind(parameters).item_table().dtype == jnp.bfloat16
    assert all(g.dtype == jnp.float32 for g in half_gradients.values())
    error = np.abs(at(half_states, slots) - at(states, slots))
    assert 0 < error.max() < 0.15
    assert error.mean() < 0.02
    np.testing.assert_allclose(half_loss, loss, rtol=0.02)
    table, half_table = gradients["item_embedding"], half_gradients["item_embedding"]
    assert np.linalg.norm(half_table - table) < 0.05 * np.linalg.norm(table)


def test_dropout_is_decided_by_the_key_and_off_without_one():
    config, parameters, _, states, _ = make("dropout")
    rows, slots, _ = rows_of(sequences(), config)
    without = at(states(parameters, rows), slots)
    np.testing.assert_allclose(without, exact_states(parameters, sequences(), config), atol=2e-4)
    one, again, other = (
        at(states(parameters, rows, jax.random.key(seed)), slots) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - without).max() > 0.1


def test_every_place_of_dropout_has_its_own_key():
    config, parameters, _, states, _ = make("dropout")
    rows, _, _ = rows_of(sequences(), config)
    traced = str(jax.make_jaxpr(states)(parameters, rows, jax.random.key(0)))
    # One for the input, three a block.
    assert traced.count("random_fold_in") == 1 + 3 * config.blocks


def test_no_dropout_at_rate_zero_even_with_a_key():
    config, parameters, _, states, _ = make("additive")
    rows, slots, _ = rows_of(sequences(), config)
    np.testing.assert_array_equal(
        at(states(parameters, rows, jax.random.key(0)), slots), at(states(parameters, rows), slots)
    )


def test_scores_are_products_with_the_item_table():
    _, parameters, bind, _, _ = make("additive")
    model = bind(parameters)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    table = np.asarray(parameters["item_embedding"], np.float64)
    wanted = np.asarray(states, np.float64) @ table.T
    np.testing.assert_allclose(model.score(states), wanted, atol=1e-5)
    np.testing.assert_allclose(model.score(states, jnp.array([4, 0])), wanted[:, [4, 0]], atol=1e-5)
    np.testing.assert_array_equal(model.item_table(), parameters["item_embedding"])


def test_a_kernel_begins_as_attention_without_position():
    config, parameters, _, states, _ = make("toeplitz")
    _, _, _, plain, _ = make("no position")
    taps = jnp.zeros(LENGTH).at[0].set(1.0)
    kernels = {f"blocks.0.kernel.{name}": taps for name in ("logits", "values")}
    fresh, _ = split_model(build_model(config, num_items=ITEMS, max_length=LENGTH, seed=3))
    for name, value in kernels.items():
        np.testing.assert_array_equal(fresh[name], value)
    rows, slots, _ = rows_of(sequences(), config)
    without = {name: value for name, value in parameters.items() if name not in kernels}
    np.testing.assert_allclose(
        at(states(parameters | kernels, rows), slots), at(plain(without, rows), slots), atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {"position_embedding"}),
        (kernel(), {"blocks.0.kernel.logits", "blocks.0.kernel.values"}),
        (kernel(tie=True), {"blocks.0.kernel.logits"}),
        (kernel(logits="identity"), {"blocks.0.kernel.values"}),
        ({"position": "none"}, set()),
        ({"position": "t5", "blocks": 2}, {"blocks.0.bias.table"}),
        ({"position": "relative", "blocks": 2}, {"blocks.0.bias.table", "blocks.1.bias.table"}),
        ({"position": "alibi"}, set()),
        ({"position": "rope"}, set()),
        (
            {**kernel(shared=True), "blocks": 2},
            {"blocks.0.kernel.logits", "blocks.0.kernel.values"},
        ),
        (
            {**kernel(values="identity"), "blocks": 2},
            {"blocks.0.kernel.logits", "blocks.1.kernel.logits"},
        ),
    ],
)
def test_only_the_position_parameters_that_are_asked_for(changes, wanted):
    config = replace(BASE, blocks=1)
    config = replace(config, **changes)
    model = build_model(config, num_items=ITEMS, max_length=LENGTH, seed=0)
    parameters, _ = split_model(model)
    found = {
        name
        for name in parameters
        if "position" in name or name.endswith(("logits", "values", "table"))
    }
    assert found == wanted


def test_initial_parameters():
    config = replace(BASE, width=32, blocks=1, init_scale=0.1, **kernel(per_head=True), heads=2)
    model = build_model(config, num_items=400, max_length=LENGTH, seed=0)
    parameters, _ = split_model(model)
    assert parameters["item_embedding"].shape == (400, 32)
    for name in ("item_embedding", "blocks.0.query.kernel", "blocks.0.contract.kernel"):
        assert abs(float(jnp.std(parameters[name])) - 0.1) < 0.01, name
        assert abs(float(jnp.mean(parameters[name]))) < 0.01, name
    assert not np.asarray(parameters["blocks.0.query.bias"]).any()
    assert (np.asarray(parameters["norm.scale"]) == 1).all()
    identity = np.zeros((2, LENGTH))
    identity[:, 0] = 1
    np.testing.assert_array_equal(parameters["blocks.0.kernel.logits"], identity)
    assert all(value.dtype == jnp.float32 for value in parameters.values())
    again, _ = split_model(build_model(config, num_items=400, max_length=LENGTH, seed=0))
    other, _ = split_model(build_model(config, num_items=400, max_length=LENGTH, seed=1))
    np.testing.assert_array_equal(again["item_embedding"], parameters["item_embedding"])
    assert np.abs(other["item_embedding"] - parameters["item_embedding"]).max() > 0.1
    two = parameters["blocks.0.query.kernel"], parameters["blocks.0.key.kernel"]
    assert np.abs(two[0] - two[1]).max() > 0.1


def test_without_a_scale_each_matrix_has_xaviers():
    config = replace(BASE, width=64, blocks=1, init_scale=None, position="additive")
    config = replace(config, feed_forward=256)
    model = build_model(config, num_items=1000, max_length=100, seed=0)
    parameters, _ = split_model(model)
    for name, shape in {
        "item_embedding": (1000, 64),
        "position_embedding": (100, 64),
        "blocks.0.query.kernel": (64, 64),
        "blocks.0.expand.kernel": (64, 256),
        "blocks.0.contract.kernel": (256, 64),
    }.items():
        assert parameters[name].shape == shape
        wanted = (2 / sum(shape)) ** 0.5
        assert abs(float(jnp.std(parameters[name])) / wanted - 1) < 0.05, name
    vectors = replace(config, position="relative", init_scale=None)
    parameters, _ = split_model(build_model(vectors, num_items=20, max_length=999, seed=0))
    table = next(value for name, value in parameters.items() if name.endswith("table"))
    assert table.shape == (999,)
    assert abs(float(jnp.std(table)) / (2 / 1000) ** 0.5 - 1) < 0.1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 0}, "model.width"),
        ({"blocks": 0}, "model.blocks"),
        ({"heads": 3}, "model.heads"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"dropout": -0.1}, "model.dropout"),
        ({"feed_forward": 0}, "model.feed_forward"),
        ({"activation": "relou"}, "model.activation"),
        ({"norm_epsilon": 0.0}, "model.norm_epsilon"),
        ({"init_scale": -1.0}, "model.init_scale"),
        ({"position": "rope", "heads": 8}, "model.position 'rope' needs an even width"),
        ({"alibi_slope": 0.0}, "model.alibi_slope"),
        ({"rope_base": -1.0}, "model.rope_base"),
        (kernel(band=0), "model.kernel.band"),
        (kernel(band=LENGTH + 1), "model.kernel.band"),
        (kernel(tie=True, values="full"), "model.kernel.tie"),
    ],
)
def test_impossible_configs_are_refused_by_field(changes, named):
    with pytest.raises(UserError, match=named):
        replace(BASE, **changes).check(max_length=LENGTH)


def test_possible_configs_pass():
    for changes in VARIANTS.values():
        replace(BASE, **changes).check(max_length=LENGTH)
    # Without a kernel its band is not read.
    replace(BASE, kernel=PositionalKernelConfig(band=99)).check(max_length=LENGTH)
