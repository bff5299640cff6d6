"""SASRec against the float64 oracle, packed against alone, and what must not leak."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sasrec as oracle

from jaxrec.data.packing import Placement, fill, place, place_alone
from jaxrec.errors import UserError
from jaxrec.losses.catalogue import full_softmax
from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import PositionalKernelConfig, SASRecConfig

ITEMS, LENGTH = 11, 7
BASE = SASRecConfig(width=8, blocks=2, heads=1, dropout=0.0)


def kernel(**options):
    return {"position": "kernel", "kernel": PositionalKernelConfig(**options)}


VARIANTS = {
    "additive": {},
    "no position": {"position": "none"},
    "two heads": {"heads": 2},
    "as in the paper": {"output_projection": False},
    "residual from the input": {"residual": "input"},
    "residual from the input, no projection": {"residual": "input", "output_projection": False},
    "positions from the newest": {"position_order": "newest"},
    "wider feed-forward": {"feed_forward": 12, "activation": "silu"},
    "no scaling": {"scale_embedding": False},
    "large epsilon": {"norm_epsilon": 0.5},
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
    "shared": kernel(shared=True),
    "additive and kernel": {**kernel(), "position": "additive+kernel"},
    "additive from the newest and full": {
        **kernel(logits="full"),
        "position": "additive+kernel",
        "position_order": "newest",
    },
}


def make(changes, seed=0):
    """A model whose every parameter matters: nothing is at a zero or one it started from."""
    config = replace(BASE, **changes)
    parameters, bind = split_model(
        build_model(config, num_items=ITEMS, max_length=LENGTH, seed=seed)
    )
    rng = np.random.default_rng(seed)
    parameters = {
        name: jnp.asarray(
            rng.normal(1.0 if name.endswith("scale") else 0.0, 0.5, value.shape)
        ).astype(jnp.float32)
        for name, value in sorted(parameters.items())
    }
    return config, parameters, bind


def sequences(seed=0, lengths=(3, 7, 1, 4, 2, 6)):
    """Items, one more than the model reads."""
    rng = np.random.default_rng(seed)
    return [rng.integers(ITEMS, size=n + 1) for n in lengths]


def rows_of(found, config, *, packed=True, spare=0, start=0):
    """Arguments of `hidden`, the slots of every event, and its target."""
    lengths = np.array([len(one) - 1 for one in found])
    placed = place(lengths, LENGTH) if packed else place_alone(len(found))
    if start:
        placed = Placement(placed.row, placed.offset + start, placed.segment, placed.rows)
    rows, slots = fill(
        placed,
        lengths,
        np.concatenate([one[:-1] for one in found]),
        rows=placed.rows + spare,
        capacity=LENGTH,
        count_from_newest=config.position_order == "newest",
    )
    return rows._asdict(), slots, np.concatenate([one[1:] for one in found])


def states_of(bind, parameters, rows, slots, key=None):
    @jax.jit
    def run(parameters, rows):
        items = rows["items"]
        masks = {name: rows[name] for name in ("valid", "segment_ids", "positions")}
        return bind(parameters).hidden(items, key=key, **masks)

    states = run(parameters, rows)
    return np.asarray(states.astype(jnp.float32)).reshape(-1, states.shape[-1])[slots]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_packed_rows_equal_the_oracle_of_each_sequence(changes):
    config, parameters, bind = make(changes)
    found = sequences()
    rows, slots, _ = rows_of(found, config, spare=1)
    assert len(rows["items"]) == 5
    wanted = np.concatenate([oracle.hidden(parameters, one[:-1], config) for one in found])
    np.testing.assert_allclose(states_of(bind, parameters, rows, slots), wanted, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["additive", "toeplitz", "full", "additive from the newest and full"]
)
def test_alone_equals_the_oracle_wherever_it_lies(name):
    config, parameters, bind = make(VARIANTS[name])
    found = sequences(lengths=(3, 2))
    wanted = np.concatenate([oracle.hidden(parameters, one[:-1], config) for one in found])
    for start in (0, 4):
        rows, slots, _ = rows_of(found, config, packed=False, start=start)
        np.testing.assert_allclose(states_of(bind, parameters, rows, slots), wanted, atol=2e-4)


def loss_of(bind, rows, slots, targets, parameters):
    model = bind(parameters)
    masks = {name: rows[name] for name in ("valid", "segment_ids", "positions")}
    states = model.hidden(rows["items"], **masks)
    states = states.reshape(-1, states.shape[-1])[slots]
    return full_softmax(
        states, model.item_table(), jnp.asarray(targets), jnp.ones(len(targets), bool)
    )


@pytest.mark.parametrize(
    "name",
    ["additive", "two heads", "toeplitz", "full", "additive from the newest and full", "shared"],
)
def test_packing_changes_neither_the_loss_nor_its_gradient(name):
    config, parameters, bind = make(VARIANTS[name])
    found = sequences()
    results = []
    for packed in (True, False):
        rows, slots, targets = rows_of(found, config, packed=packed)
        step = jax.jit(jax.value_and_grad(partial(loss_of, bind, rows, slots, targets)))
        results.append(step(parameters))
    (packed_loss, packed_gradient), (alone_loss, alone_gradient) = results
    np.testing.assert_allclose(packed_loss, alone_loss, rtol=1e-5)
    np.testing.assert_allclose(packed_loss, oracle.mean_loss(parameters, found, config), rtol=1e-4)
    assert packed_gradient.keys() == parameters.keys()
    for parameter, gradient in packed_gradient.items():
        np.testing.assert_allclose(
            gradient, alone_gradient[parameter], atol=2e-5, rtol=1e-4, err_msg=parameter
        )
        assert np.abs(gradient).max() > 1e-6 or parameter.endswith("key.bias"), parameter


@pytest.mark.parametrize("name", ["residual from the input", "toeplitz, a kernel a head"])
def test_the_gradient_is_that_of_the_oracle(name):
    config, parameters, bind = make(VARIANTS[name])
    found = sequences(lengths=(4, 2))
    rows, slots, targets = rows_of(found, config)
    gradients = jax.jit(jax.grad(partial(loss_of, bind, rows, slots, targets)))(parameters)
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


@pytest.mark.parametrize("name", ["additive", "toeplitz", "full", "additive and kernel"])
def test_nothing_flows_from_later_events_other_sequences_or_padding(name):
    config, parameters, bind = make(VARIANTS[name])
    found = sequences(lengths=(4, 3, 5))
    rows, _, _ = rows_of(found, config, spare=1)

    @jax.jit
    def run(items):
        masks = {name: rows[name] for name in ("valid", "segment_ids", "positions")}
        return bind(parameters).hidden(items, **masks)

    before = np.asarray(run(rows["items"]))
    for row, slot in np.ndindex(*rows["items"].shape):
        items = rows["items"].copy()
        items[row, slot] = (items[row, slot] + 1) % ITEMS
        after = np.asarray(run(items))
        changed = np.abs(after - before).max(-1) > 1e-6
        reached = np.zeros_like(changed)
        if rows["valid"][row, slot]:
            later = np.arange(LENGTH) >= slot
            reached[row] = later & (rows["segment_ids"][row] == rows["segment_ids"][row, slot])
        assert not (changed & ~reached & rows["valid"]).any(), (row, slot)
        assert not rows["valid"][row, slot] or changed[row, slot]


def test_what_padding_holds_never_matters():
    config, parameters, bind = make(VARIANTS["additive and kernel"])
    rows, slots, targets = rows_of(sequences(), config, spare=1)
    hole = ITEMS - 1
    used = np.unique(np.append(rows["items"][rows["valid"]], targets))
    rows["items"] = np.where(rows["valid"], rows["items"] % hole, hole).astype(np.int32)
    targets = targets % hole
    assert len(used) > 3
    table = parameters["item_embedding"]
    poisoned = parameters | {"item_embedding": table.at[hole].set(jnp.nan)}
    got = states_of(bind, poisoned, rows, slots)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, states_of(bind, parameters, rows, slots))

    def total(parameters):
        masks = {name: rows[name] for name in ("valid", "segment_ids", "positions")}
        states = bind(parameters).hidden(rows["items"], **masks)
        return states.reshape(-1, 8)[slots].sum()

    gradients = jax.jit(jax.grad(total))(poisoned)
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert not np.asarray(gradients["item_embedding"][hole]).any()


def test_position_order_moves_the_position_vectors():
    found = [np.array([1, 2, 3, 4])]
    got = {}
    for order in ("oldest", "newest"):
        config, parameters, bind = make({"position_order": order})
        rows, slots, _ = rows_of(found, config)
        gradient = jax.grad(
            lambda parameters, rows=rows, slots=slots, bind=bind: jnp.sum(
                loss_of(bind, rows, slots, [2, 3, 4], parameters)
            )
        )(parameters)["position_embedding"]
        got[order] = np.abs(np.asarray(gradient)).sum(1) > 0
    assert got["oldest"].tolist() == got["newest"].tolist() == [True] * 3 + [False] * 4
    config, parameters, bind = make({"position_order": "newest"})
    moved = parameters | {"position_embedding": parameters["position_embedding"].at[0].add(1.0)}
    rows, slots, _ = rows_of(found, config)
    change = states_of(bind, moved, rows, slots) - states_of(bind, parameters, rows, slots)
    # Position 0 is the newest event's, which only the last state sees.
    assert not change[:2].any()
    assert np.abs(change[2]).max() > 1e-3


@pytest.mark.parametrize("name", ["additive", "toeplitz"])
def test_bfloat16_is_close_to_float32(name):
    config, parameters, bind = make(VARIANTS[name])
    half_config, _, half_bind = make(VARIANTS[name] | {"dtype": "bfloat16"})
    parameters = {k: v * (1.0 if k.endswith("scale") else 0.5) for k, v in parameters.items()}
    rows, slots, targets = rows_of(sequences(), config)
    masks = {name: rows[name] for name in ("valid", "segment_ids", "positions")}
    half = jax.jit(lambda p: half_bind(p).hidden(rows["items"], **masks))(parameters)
    assert half.dtype == jnp.bfloat16
    assert half_bind(parameters).item_table().dtype == jnp.bfloat16
    exact = states_of(bind, parameters, rows, slots)
    error = np.abs(states_of(half_bind, parameters, rows, slots) - exact)
    assert error.max() < 0.15
    assert error.mean() < 0.02
    losses = [
        jax.jit(jax.value_and_grad(partial(loss_of, one, rows, slots, targets)))(parameters)
        for one in (bind, half_bind)
    ]
    np.testing.assert_allclose(losses[1][0], losses[0][0], rtol=0.02)
    assert all(g.dtype == jnp.float32 for g in losses[1][1].values())
    assert half_config.dtype == "bfloat16"


def test_dropout_is_decided_by_the_key():
    config, parameters, bind = make({"dropout": 0.5})
    rows, slots, _ = rows_of(sequences(), config)
    without = states_of(bind, parameters, rows, slots)
    one, again, other = (
        states_of(bind, parameters, rows, slots, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - without).max() > 0.1
    wanted = np.concatenate([oracle.hidden(parameters, each[:-1], config) for each in sequences()])
    np.testing.assert_allclose(without, wanted, atol=2e-4)


def test_no_dropout_at_rate_zero_even_with_a_key():
    config, parameters, bind = make({})
    rows, slots, _ = rows_of(sequences(), config)
    np.testing.assert_array_equal(
        states_of(bind, parameters, rows, slots, key=jax.random.key(0)),
        states_of(bind, parameters, rows, slots),
    )


def test_every_place_of_dropout_has_its_own_key():
    """Input, attention and both feed-forward layers: with the rate of one, the rest is zero."""
    config, parameters, bind = make({"dropout": 0.5, "blocks": 2})
    rows, slots, _ = rows_of(sequences(), config)
    masks = {name: rows[name] for name in ("valid", "segment_ids", "positions")}

    def count(text):
        jaxpr = jax.make_jaxpr(
            lambda p: bind(p).hidden(rows["items"], key=jax.random.key(0), **masks)
        )(parameters)
        return str(jaxpr).count(text)

    # One for the input, three a block.
    assert count("random_fold_in") == 1 + 3 * config.blocks


def test_scores_are_products_with_the_item_table():
    _, parameters, bind = make({})
    model = bind(parameters)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    table = np.asarray(parameters["item_embedding"], np.float64)
    wanted = np.asarray(states, np.float64) @ table.T
    np.testing.assert_allclose(model.score(states), wanted, atol=1e-5)
    np.testing.assert_allclose(model.score(states, jnp.array([4, 0])), wanted[:, [4, 0]], atol=1e-5)
    np.testing.assert_array_equal(model.item_table(), parameters["item_embedding"])


def test_a_kernel_begins_as_attention_without_position():
    found = sequences()
    states = []
    for changes in (kernel(), {"position": "none"}):
        config = replace(BASE, **changes)
        model = build_model(config, num_items=ITEMS, max_length=LENGTH, seed=3)
        parameters, bind = split_model(model)
        rows, slots, _ = rows_of(found, config)
        states.append(states_of(bind, parameters, rows, slots))
    np.testing.assert_allclose(states[0], states[1], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {"position_embedding"}),
        (kernel(), {"blocks.0.kernel.logits", "blocks.0.kernel.values"}),
        (kernel(tie=True), {"blocks.0.kernel.logits"}),
        (kernel(logits="identity"), {"blocks.0.kernel.values"}),
        ({"position": "none"}, set()),
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
        name for name in parameters if "position" in name or name.endswith(("logits", "values"))
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
