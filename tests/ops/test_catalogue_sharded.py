"""Catalogue ops on a table whose rows lie on several devices: what one device would give.

Mutations that these tests were seen to fail for: labels not moved into the shard's own rows, no
reduction of the largest logit, of the total, of the label's logit, or of the hidden gradient, the
cotangent not collected from all shards, padding rows counted in the sum, in the mean of label
smoothing or given a gradient, ids of the selection not moved back, shards merged in another order.
"""

from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxrec import ops

# The function of that name hides the module.
loss_module = import_module("jaxrec.ops.linear_cross_entropy")

POSITIONS, WIDTH, ITEMS, ROWS = 24, 8, 13, 14
BOTH, DATA, MODEL = PartitionSpec(), PartitionSpec("data"), PartitionSpec("model")


def on_devices(f, shape, in_specs, out_specs):
    return jax.jit(jax.shard_map(f, mesh=mesh(*shape), in_specs=in_specs, out_specs=out_specs))


def mesh(data=2, model=2):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    table, bias = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=ROWS)
    return (
        jnp.asarray(rng.normal(size=(POSITIONS, WIDTH)), jnp.float32),
        jnp.asarray(table, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        jnp.asarray(rng.integers(ITEMS, size=POSITIONS), jnp.int32),
        jnp.asarray(rng.random(POSITIONS) > 0.2),
    )


def weighted_sum(hidden, table, bias, labels, valid, weights, **options):
    losses = ops.linear_cross_entropy(hidden, table, labels, bias=bias, valid=valid, **options)
    return (losses * weights).sum()


def share_of_mean(hidden, table, bias, labels, valid, weights, **options):
    """The mean times its weight: adds up over the devices to `POSITIONS` times a mean."""
    mean = ops.mean_linear_cross_entropy(
        hidden, table, labels, bias=bias, valid=valid, weights=weights, **options
    )
    return mean * jnp.where(valid, weights, 0).sum()


@pytest.mark.parametrize(
    ("items", "smoothing", "biased"),
    [(ROWS, 0.0, False), (ITEMS, 0.0, False), (ITEMS, 0.1, True)],
    ids=["all rows", "padded", "padded, smoothed, biased"],
)
@pytest.mark.parametrize(
    ("form", "blocks"),
    [(weighted_sum, None), (weighted_sum, 4), (share_of_mean, None)],
    ids=["two passes", "two passes in blocks", "one pass"],
)
def test_loss_and_gradients_are_those_of_the_whole_table(
    monkeypatch, items, smoothing, biased, form, blocks
):
    if blocks is not None:
        tiling = loss_module.Tiling(blocks, blocks, 1 << 20, blocks)
        monkeypatch.setattr(loss_module, "CPU_TILING", tiling)
    hidden, table, bias, labels, valid = arrays()
    weights = jnp.linspace(0.5, 2.0, POSITIONS)
    bias = bias if biased else None

    def whole(hidden, table, bias):
        table, bias = table[:items], None if bias is None else bias[:items]
        return form(hidden, table, bias, labels, valid, weights, label_smoothing=smoothing)

    def part(hidden, table, bias, labels, valid, weights):
        value = form(
            hidden, table, bias, labels, valid, weights,
            item_axis="model", num_items=items, label_smoothing=smoothing,
        )  # fmt: skip
        return jax.lax.psum(value, "data")

    specs = (DATA, MODEL, None if bias is None else MODEL, DATA, DATA, DATA)
    sharded = on_devices(part, (2, 2), in_specs=specs, out_specs=BOTH)
    inputs = (hidden, table, bias)
    which = (0, 1) if bias is None else (0, 1, 2)
    wanted, exact = jax.value_and_grad(whole, which)(*inputs)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda *x: sharded(*x, labels, valid, weights), which)
    )(*inputs)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for gradient, exact_one in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(gradient, exact_one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("negatives", ["shared", "own", "own, all scored"])
@pytest.mark.parametrize("op", ["sampled_softmax_loss", "gbce_loss"])
def test_sampled_losses_are_those_of_the_whole_table(monkeypatch, op, negatives):
    """13 items over two shards of 7 rows; blocks of positions that do not divide them.

    Mutations seen to fail: ids not moved into the shard's rows, negatives of other shards counted
    twice or not at all, logits not summed over the shards, gradients of other shards' rows kept.
    """
    sampled = import_module("jaxrec.ops.sampled_loss")
    monkeypatch.setattr(sampled, "CPU_ELEMENTS", 5 * 8 * 5)
    monkeypatch.setattr(sampled, "GATHER_COST", 24 if "scored" in negatives else 0)
    hidden, table, _, labels, valid = arrays()
    rng = np.random.default_rng(3)
    shape = (5,) if negatives == "shared" else (POSITIONS, 5)
    ids = jnp.asarray(rng.integers(-1, ITEMS + 1, shape), jnp.int32)
    exclude = jnp.asarray(rng.integers(-1, ITEMS, (POSITIONS, 2)), jnp.int32)
    weights = jnp.linspace(0.5, 2.0, POSITIONS)
    by_position = PartitionSpec() if negatives == "shared" else DATA

    def total(hidden, table, labels, ids, exclude, valid, weights, **options):
        losses = getattr(ops, op)(
            hidden,
            table,
            labels,
            ids,
            exclude=exclude,
            mask_collisions=True,
            valid=valid,
            **options,
        )
        return (losses * weights).sum()

    def part(*inputs):
        return jax.lax.psum(total(*inputs, item_axis="model", num_items=ITEMS), "data")

    specs = (DATA, MODEL, DATA, by_position, DATA, DATA, DATA)
    sharded = on_devices(part, (2, 2), in_specs=specs, out_specs=BOTH)
    rest = (labels, ids, exclude, valid, weights)
    wanted, exact = jax.value_and_grad(lambda h, e: total(h, e[:ITEMS], *rest), (0, 1))(
        hidden, table
    )
    value, gradients = jax.value_and_grad(lambda h, e: sharded(h, e, *rest), (0, 1))(hidden, table)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for gradient, exact_one in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(gradient, exact_one, atol=2e-5, rtol=1e-4)


def test_a_label_outside_of_the_catalogue_is_nan_on_every_shard():
    hidden, table, _, labels, _ = arrays()
    labels = labels.at[3].set(ITEMS)

    def part(hidden, table, labels):
        return ops.linear_cross_entropy(hidden, table, labels, item_axis="model", num_items=ITEMS)

    losses = on_devices(part, (2, 2), in_specs=(DATA, MODEL, DATA), out_specs=DATA)(
        hidden, table, labels
    )
    assert np.flatnonzero(np.isnan(losses)).tolist() == [3]


@pytest.mark.parametrize("shards", [2, 7])
def test_the_selection_is_that_of_the_whole_table(shards):
    hidden, table, bias, labels, _ = arrays(1)
    # Ties across shards: the lower id first.
    table = jnp.round(table)
    table = table.at[ITEMS - 1].set(table[0])
    hidden = jnp.round(hidden)
    exclude = jnp.stack([labels, jnp.full_like(labels, -1)], 1)
    deny = jnp.arange(ROWS) == 5

    def part(hidden, table, bias, exclude, deny):
        return ops.top_k_items(
            hidden, table, 6, bias=bias, exclude=exclude, deny=deny,
            item_axis="model", num_items=ITEMS,
        )  # fmt: skip

    found = on_devices(
        part,
        (1, shards),
        in_specs=(DATA, MODEL, MODEL, DATA, MODEL),
        out_specs=(DATA, DATA),
    )(hidden, table, jnp.round(bias), exclude, deny)
    wanted = ops.top_k_items(
        hidden, table[:ITEMS], 6, bias=jnp.round(bias)[:ITEMS], exclude=exclude, deny=deny[:ITEMS]
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_lists_of_allowed_items_name_items_of_any_shard():
    hidden, table, _, _, _ = arrays(2)
    allow = jnp.tile(jnp.array([[1, 8, 12, -1]]), (POSITIONS, 1))

    def part(hidden, table, allow):
        return ops.top_k_items(hidden, table, 4, allow=allow, item_axis="model")

    scores, ids = on_devices(part, (1, 2), in_specs=(DATA, MODEL, DATA), out_specs=(DATA, DATA))(
        hidden, table, allow
    )
    wanted = ops.top_k_items(hidden, table, 4, allow=allow)
    np.testing.assert_array_equal(ids, wanted[1])
    np.testing.assert_allclose(scores, wanted[0], rtol=1e-5)


def test_the_axis_must_be_there_and_hold_the_items():
    hidden, table, _, labels, _ = arrays()
    with pytest.raises(ValueError, match="no mesh axis here"):
        ops.linear_cross_entropy(hidden, table, labels, item_axis="model")
    with pytest.raises(ValueError, match="num_items goes with item_axis"):
        ops.top_k_items(hidden, table, 3, num_items=4)
    with pytest.raises(ValueError, match="from 1 to the 14 rows of all 2 shards, got 15"):
        jax.shard_map(
            lambda h, t: ops.top_k_items(h, t, 3, item_axis="model", num_items=15),
            mesh=mesh(),
            in_specs=(DATA, MODEL),
            out_specs=(DATA, DATA),
        )(hidden, table)
