"""Objectives as training calls them: their options, what they draw, and that they teach."""

import os
import signal
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sampled_loss as oracle
from small_sets import ITEMS, compiled_once, shop, small_config

from jaxrec import ops
from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError
from jaxrec.evaluation.baselines import popularity_scores
from jaxrec.losses import sampled
from jaxrec.losses.catalogue import full_softmax
from jaxrec.registry import names
from jaxrec.training import loop as loop_module
from jaxrec.training.config import LossConfig, MeshConfig, from_dict, load_config, to_dict
from jaxrec.training.first_state import make_state, state_shapes
from jaxrec.training.interrupt import Interrupted
from jaxrec.training.loop import train
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.run_folder import RunFolder
from jaxrec.training.setup import (
    initialiser,
    make_loss,
    make_model,
    make_placement,
    model_shapes,
    training_batches,
)
from jaxrec.training.state import initial_state, make_train_step, own_items, sequence_loss

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SAMPLED = {"bce": sampled.bce, "gbce": sampled.gbce, "sampled_softmax": sampled.sampled_softmax}


def batches():
    return training_batches(small_config(), shop(), leave_one_out(shop()))


def test_own_items_are_those_of_the_sequence():
    source = batches()
    train_part = leave_one_out(shop()).train
    sequences = [
        shop().items[max(start, stop - 11) : stop].tolist()
        for start, stop in zip(train_part.starts, train_part.stops, strict=True)
        if stop - start >= 2
    ]
    wanted = {tuple(sorted(set(one))) for one in sequences}
    found = set()
    for number in range(source.batches_per_epoch):
        batch = source[number]
        assert batch["segment_ids"].max() > 1  # packed: rows hold several
        own = np.asarray(own_items({k: jnp.asarray(v) for k, v in batch.items()}))
        assert own.shape == (len(batch["slots"]), 11)
        for row, target, valid in zip(own, batch["targets"], batch["target_valid"], strict=True):
            if valid:
                assert target in row
                found.add(tuple(sorted(set(row.tolist()) - {-1})))
    assert found == wanted


def test_a_loss_gets_what_its_signature_names():
    class Model:
        def hidden(self, items, **given):
            return jnp.zeros((*items.shape, 2))

        def item_table(self):
            return "table"

    seen = []

    def with_key(states, table, targets, valid, *, key, weight):
        seen.append((key, weight))
        return 0.0

    def with_items(states, table, targets, valid, *, own_items):
        seen.append(own_items)
        return 0.0

    batch = {name: jnp.asarray(value) for name, value in batches()[0].items()}
    key = jax.random.key(3)
    sequence_loss(with_key, weight=0.5)(Model(), batch, key)
    sequence_loss(with_items)(Model(), batch, key)
    sequence_loss(with_key, weight=0.5)(Model(), batch, jax.random.key(4))
    drawn = [jax.random.key_data(k).tolist() for k in (seen[0][0], key, seen[2][0])]
    # The loss has a key of its own, which follows the step's.
    assert len({tuple(k) for k in drawn}) == 3
    assert seen[0][1] == 0.5
    np.testing.assert_array_equal(seen[1], own_items(batch))


@pytest.mark.parametrize(
    ("name", "option", "value", "has"),
    [
        ("full_softmax", "negatives", 5, "label_smoothing, temperature"),
        ("full_softmax", "sharing", "batch", "label_smoothing, temperature"),
        ("full_softmax", "avoid", "target", "label_smoothing, temperature"),
        (
            "bce",
            "label_smoothing",
            0.1,
            "temperature, negatives, sharing, sampling, sampling_power, avoid",
        ),
        ("bce", "t", 0.5, "temperature, negatives, sharing, sampling, sampling_power, avoid"),
        (
            "gbce",
            "correction",
            True,
            "temperature, negatives, sharing, sampling, sampling_power, avoid, t",
        ),
        (
            "sampled_softmax",
            "t",
            0.5,
            "temperature, negatives, sharing, sampling, sampling_power, avoid, correction",
        ),
    ],
)
def test_an_option_of_another_loss_is_refused(tmp_path, name, option, value, has):
    message = f"config: loss.{option} does not apply to {name}; its options: {has}"
    config = small_config(loss=LossConfig(name, **{option: value}))
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run", show_progress=False)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_every_loss_takes_the_defaults_and_every_option_has_a_loss():
    for name in ("full_softmax", *SAMPLED):
        assert name in names("loss")
        make_loss(LossConfig(name))
    refused = set()
    for part in fields(LossConfig)[1:]:
        value = {"sharing": "batch", "avoid": "target"}.get(part.name, 1)
        for name in ("full_softmax", *SAMPLED):
            try:
                make_loss(replace(LossConfig(name), **{part.name: value}))
            except UserError:
                refused.add((name, part.name))
    for part in fields(LossConfig)[1:]:
        assert {(name, part.name) for name in ("full_softmax", *SAMPLED)} - refused, part.name


def test_configs_stored_before_the_options_existed_still_load():
    values = to_dict(small_config())
    values["loss"] = {"name": "full_softmax", "label_smoothing": 0.0}
    del values["model"]["normalize"]
    loaded = from_dict(values, "config.json")
    assert loaded == small_config()
    assert to_dict(loaded) == to_dict(small_config())


@pytest.mark.parametrize("name", ["bce", "gbce", "sampled_softmax"])
def test_experiments(name):
    config = load_config(EXPERIMENTS / f"sasrec_{name}.py")
    base = load_config(EXPERIMENTS / "sasrec.py")
    assert config.name == f"sasrec_{name}"
    assert config.loss.name == name
    make_loss(config.loss)
    if name == "gbce":
        optimizer = replace(base.optimizer, b2=0.98)
        base = replace(base, optimizer=optimizer, training=replace(base.training, patience=50))
    assert replace(config, name=base.name, loss=base.loss, published=base.published) == base
    assert set(config.published) <= set(base.published)


def inputs(rng, positions=400, items=12, own=6):
    hidden = jnp.asarray(rng.normal(size=(positions, 3)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(items, 3)), jnp.float32)
    lists = np.sort(rng.integers(0, items, (positions, own)), 1).astype(np.int32)
    lists[:, 0] = -1
    targets = lists[:, 2].copy()
    return hidden, table, jnp.asarray(targets), jnp.asarray(lists)


def drawn(monkeypatch, loss, arrays, **options):
    """The negatives that reach the op, and the op's options."""
    calls = []

    def record(hidden, table, labels, negatives, **given):
        calls.append((np.asarray(negatives), given))
        return jnp.zeros(len(labels))

    for name in ("bce_loss", "gbce_loss", "sampled_softmax_loss"):
        monkeypatch.setattr(ops, name, record)
    hidden, table, targets, lists = arrays
    valid = jnp.ones(len(targets), bool)
    loss(hidden, table, targets, valid, key=jax.random.key(0), own_items=lists, **options)
    return calls[0]


def test_negatives_outside_of_the_sequence_are_uniform(rng, monkeypatch):
    arrays = inputs(rng)
    hidden, lists = arrays[0], np.asarray(arrays[3])
    ids, given = drawn(monkeypatch, sampled.bce, arrays, negatives=50)
    assert ids.shape == (len(hidden), 50)
    assert "exclude" not in given
    seen = (ids[:, :, None] == np.where(lists < 0, -2, lists)[:, None, :]).any(-1)
    assert not seen.any()
    # At most five of twelve are own: all four draws are, at most (5/12)^4 = 3 % of the time.
    assert (ids == -1).mean() < 0.035
    first = lists[0][lists[0] >= 0]
    same = (lists == lists[0]).all(1)
    counts = np.bincount(ids[same][ids[same] >= 0], minlength=12)
    assert not counts[first].any()
    assert (np.delete(counts, first) > 0).all()


def test_what_is_avoided_and_shared(rng, monkeypatch):
    arrays = inputs(rng)
    for loss, count in ((sampled.bce, 1), (sampled.gbce, 256), (sampled.sampled_softmax, 256)):
        ids, given = drawn(monkeypatch, loss, arrays)
        assert ids.shape == (400, count)
        assert ("mask_collisions" in given) == (loss is not sampled.bce)
        ids, given = drawn(monkeypatch, loss, arrays, avoid="target", negatives=30)
        assert given["mask_collisions"] is True
        assert np.unique(ids).tolist() == list(range(12))
        ids, given = drawn(
            monkeypatch, loss, arrays, avoid="sequence", sharing="batch", negatives=30
        )
        assert ids.shape == (30,)
        np.testing.assert_array_equal(given["exclude"], arrays[3])
        _, given = drawn(monkeypatch, loss, arrays, avoid="nothing", negatives=5)
        assert given["mask_collisions"] is False
        assert "log_q" not in given


def test_by_popularity(rng):
    """Drawn as often as counted, to a power; with the correction that belongs to it."""
    seen = []

    def catch(hidden, table, targets, ids, *, log_q=None, **options):
        seen.append((np.asarray(ids), None if log_q is None else np.asarray(log_q)))
        return jnp.zeros(targets.shape)

    counts = jnp.array([0.0, 1.0, 4.0, 16.0, 0.0, 25.0])
    arrays = (jnp.zeros((50, 2)), jnp.zeros((6, 2)), jnp.zeros(50, jnp.int32), jnp.ones(50, bool))
    given = {"key": jax.random.key(1), "own_items": jnp.full((50, 1), -1), "item_counts": counts}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled.ops, "sampled_softmax_loss", catch)
        for power in (1.0, 0.5, 0.0):
            sampled.sampled_softmax(
                *arrays,
                **given,
                negatives=200,
                sampling="popularity",
                sampling_power=power,
                correction=True,
            )
    for (ids, log_q), power in zip(seen, (1.0, 0.5, 0.0), strict=True):
        weights = np.where(counts > 0, np.asarray(counts) ** power, 0)
        share = weights / weights.sum()
        found = np.bincount(ids.reshape(-1), minlength=6) / ids.size
        np.testing.assert_allclose(found, share, atol=0.02)
        np.testing.assert_allclose(log_q, np.log(200 * share[ids]), rtol=1e-5)
    with pytest.raises(ValueError, match="'popularity' needs item_counts"):
        sampled.bce(*arrays, **(given | {"item_counts": None}), sampling="popularity")


def test_training_counts_its_own_events(tmp_path):
    split = leave_one_out(shop())
    counts = popularity_scores(shop(), split)
    wanted = np.zeros(ITEMS, int)
    for start, stop in zip(split.train.starts, split.train.stops, strict=True):
        for item in shop().items[start:stop]:
            wanted[item] += 1
    np.testing.assert_array_equal(counts, wanted)
    loss = LossConfig("bce", sampling="popularity", sampling_power=0.75)
    train(small_config(loss=loss, training__epochs=1), tmp_path / "run", show_progress=False)
    assert np.isfinite(RunFolder(tmp_path / "run").read_metrics()[-2]["loss"])


@pytest.mark.parametrize("name", SAMPLED)
def test_the_mean_over_valid_positions(rng, monkeypatch, name):
    """Against the oracle, on the negatives that were drawn."""
    hidden, table, targets, lists = inputs(rng, positions=9)
    valid = jnp.asarray(np.arange(9) % 3 > 0)
    options = {"negatives": 4, "temperature": 0.5, "avoid": "target"}
    own = {"gbce": {"t": 0.5}, "sampled_softmax": {"correction": True}}.get(name, {})
    key = jax.random.key(7)

    @jax.jit
    def mean(valid):
        return SAMPLED[name](
            hidden, table, targets, valid, key=key, own_items=lists, **options, **own
        )

    value = mean(valid)
    ids = np.asarray(ops.sample_items(jax.random.split(key, 4)[0], 12, (9, 4)))
    if name == "sampled_softmax":
        own = {"log_q": np.full(ids.shape, np.log(4 / 12))}
    kind = "softmax" if name == "sampled_softmax" else "bce"
    exact = [np.asarray(x).astype(np.float64) for x in (hidden, table)]
    losses = oracle.losses(
        kind, *exact, np.asarray(targets), ids, temperature=0.5, mask_collisions=True, **own
    )
    assert float(value) == pytest.approx(losses[np.asarray(valid)].mean(), rel=1e-5)
    assert float(mean(valid & False)) == 0


def test_temperature_of_the_full_softmax(rng):
    hidden, table, targets, _ = inputs(rng, positions=9)
    valid = jnp.ones(9, bool)
    got = full_softmax(hidden, table, targets, valid, temperature=0.5)
    assert float(got) == pytest.approx(float(full_softmax(2 * hidden, table, targets, valid)))


LEARNS = {
    "bce": LossConfig("bce"),
    # More negatives find the level of all scores first, and the sequence long after.
    "gbce": LossConfig("gbce", negatives=1),
    "sampled_softmax": LossConfig(
        "sampled_softmax", negatives=8, sharing="batch", correction=True, avoid="sequence"
    ),
}


@pytest.mark.parametrize("name", LEARNS)
def test_it_learns(name):
    """The item after next is what comes most often: after 60 steps it is known."""
    config = small_config(model__dropout=0.0, training__epochs=20)
    parameters, bind = make_model(config, ITEMS)
    optimizer = make_optimizer(config.optimizer, 60)
    step = make_train_step(bind, make_loss(LEARNS[name]), optimizer, 0)
    state, source, losses = initial_state(parameters, optimizer), batches(), []
    for number in range(60):
        batch = source[number % source.batches_per_epoch]
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.02
    model = bind(state.parameters)
    masks = {name: batch[name] for name in ("valid", "segment_ids", "positions")}
    states = model.hidden(batch["items"], **masks)
    states = states.reshape(-1, states.shape[-1])[batch["slots"]]
    ranked = np.argsort(-np.asarray(states @ model.item_table().T), 1)
    top = (ranked[:, :5] == batch["targets"][:, None]).any(1)[batch["target_valid"]]
    assert top.mean() > 0.35  # by chance: 0.17


@pytest.mark.parametrize("mesh", [MeshConfig(2, 1), MeshConfig(2, 4)], ids=["2x1", "2x4"])
def test_on_a_mesh_it_is_what_one_device_gives(mesh):
    """With the same negatives everywhere; the item table is split where the mesh says so."""

    def fixed(states, table, targets, valid, *, key, own_items, item_axis=None, num_items=None):
        # A table that is split stays split: nobody gathers it.
        assert table.shape[0] == (ITEMS if item_axis is None else -(-ITEMS // mesh.model))
        return sampled.sampled_softmax(
            states,
            table,
            targets,
            valid,
            key=jax.random.key(5) if key is not None else key,
            own_items=own_items,
            negatives=6,
            sharing="batch",
            avoid="sequence",
            item_axis=item_axis,
            num_items=num_items,
        )

    results = []
    for config in (small_config(model__dropout=0.0), small_config(model__dropout=0.0, mesh=mesh)):
        placement = make_placement(config, ITEMS)
        shards = 1 if placement is None else placement.data
        batch = training_batches(config, shop(), leave_one_out(shop()), shards=shards)[0]
        parameters, bind = model_shapes(config, ITEMS)
        optimizer = make_optimizer(replace(config.optimizer, learning_rate=0.1), 1)
        shapes = state_shapes(parameters, optimizer, placement)
        seed = config.training.seed
        state = make_state(initialiser(config, ITEMS), seed, optimizer, shapes, placement)
        if placement is not None:
            batch = placement.batch(batch)
        step = make_train_step(bind, sequence_loss(fixed), optimizer, 0, placement)
        state, loss = step(state, batch)
        results.append((float(loss), float(state.gradient_norm_sum)))
    np.testing.assert_allclose(*results, rtol=1e-4)


def test_an_interrupted_run_draws_the_same_negatives(tmp_path, monkeypatch):
    config = small_config(loss=LEARNS["sampled_softmax"], training__epochs=2)
    calls = []

    def made(*arguments):
        step = make_train_step(*arguments)

        def counted(state, batch):
            calls.append(None)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, batch)

        return counted

    with compiled_once():
        with monkeypatch.context() as patched:
            patched.setattr(loop_module, "make_train_step", made)
            with pytest.raises(Interrupted):
                train(config, tmp_path / "stopped", show_progress=False)
        train(config, tmp_path / "stopped", show_progress=False)
        train(config, tmp_path / "whole", show_progress=False)
    runs = [RunFolder(tmp_path / name).read_metrics() for name in ("stopped", "whole")]
    assert len(runs[0]) == len(runs[1])
    for one, other in zip(*runs, strict=True):
        for name in ("step", "loss", "gradient_norm", "validation"):
            assert one.get(name) == other.get(name)
