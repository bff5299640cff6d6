"""Training on several devices: what one device would give, and checkpoints that go between them.

The eight devices are virtual ones of the CPU.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sets import ITEMS, small_config

import jaxrec
from jaxrec.devices import Placement, make_mesh
from jaxrec.errors import UserError
from jaxrec.training.checkpoints import Checkpoints
from jaxrec.training.config import MeshConfig
from jaxrec.training.first_state import state_shapes
from jaxrec.training.loop import train
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.run_folder import RunFolder
from jaxrec.training.setup import make_placement, model_shapes


def config(data=1, model=1, **changes):
    found = small_config()
    return replace(
        found,
        model=replace(found.model, dropout=0.0),
        training=replace(found.training, epochs=2, patience=0, log_every=1),
        mesh=MeshConfig(data, model),
        **changes,
    )


def curve(folder):
    return [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]


def parameters(folder):
    return jaxrec.load(folder, checkpoint="last").parameters


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh") / "alone"
    train(config(), folder, show_progress=False)
    return folder


@pytest.mark.parametrize(("data", "model"), [(8, 1), (2, 4), (0, 4)])
def test_a_run_on_eight_devices_is_that_of_one(tmp_path, alone, data, model):
    """30 items are not a multiple of 4: the last rows of the table are padding."""
    train(config(data, model), tmp_path / "run", show_progress=False)
    lines, wanted = curve(tmp_path / "run"), curve(alone)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        for name in ("loss", "gradient_norm"):
            if name in line:
                np.testing.assert_allclose(line[name], other[name], rtol=1e-4)
        if "validation" in line:
            np.testing.assert_allclose(
                line["validation"]["ndcg@10"], other["validation"]["ndcg@10"], atol=0.02
            )
    exact = parameters(alone)
    for name, value in parameters(tmp_path / "run").items():
        np.testing.assert_allclose(value, exact[name], atol=2e-4, err_msg=name)
        assert value.shape == exact[name].shape


def test_a_run_goes_on_upon_another_mesh(tmp_path, alone):
    folder = tmp_path / "run"
    begun = config(2, 4)
    begun = replace(begun, training=replace(begun.training, epochs=1))
    train(begun, folder, show_progress=False)
    train(config(4, 2), folder, show_progress=False)
    exact = parameters(alone)
    for name, value in parameters(folder).items():
        np.testing.assert_allclose(value, exact[name], atol=2e-4, err_msg=name)
    assert curve(folder)[-1]["epoch"] == 2


def test_a_table_of_other_items_is_not_filled_up_with_padding(alone):
    """30 items and 31 are as long on eight devices; reading fills up with zeros."""
    wanted = config(1, 8)
    placement = make_placement(wanted, ITEMS + 1)
    shapes = state_shapes(
        model_shapes(wanted, ITEMS + 1)[0], make_optimizer(wanted.optimizer, 1), placement
    )
    assert shapes.parameters["item_embedding"].shape == (32, 8)
    checkpoints = Checkpoints(RunFolder(alone).checkpoints, "ndcg@10", placement=placement)
    told = []
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore_latest(shapes, None, told.append)
    checkpoints.close()
    assert "item_embedding has shape (30, 8), wanted (31, 8)" in told[0]


def test_too_few_devices_are_told(tmp_path):
    with pytest.raises(UserError, match=r"is 4 x 4, but there are 8 devices"):
        train(config(4, 4), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_one_by_one_is_no_mesh():
    assert make_mesh(1, 1) is None
    assert dict(make_mesh(0, 2).shape) == {"data": 4, "model": 2}


def test_rows_are_padded_on_the_mesh_and_cut_for_checkpoints():
    placement = Placement(make_mesh(2, 4), ("table",), ITEMS)
    state = {"parameters": {"table": jnp.ones((ITEMS, 3)), "other": jnp.ones((ITEMS, 3))}}
    held = placement.held(state)
    assert held == placement.held(held)
    padded = jax.jit(placement.pad, out_shardings=jax.tree.map(lambda x: x.sharding, held))(state)
    put = padded["parameters"]
    assert put["table"].shape == held["parameters"]["table"].shape == (32, 3)
    assert not np.asarray(put["table"])[ITEMS:].any()
    assert put["other"].shape == held["parameters"]["other"].shape == (ITEMS, 3)
    assert {s.data.shape for s in put["table"].addressable_shards} == {(8, 3)}
    taken = placement.take(padded)["parameters"]
    np.testing.assert_array_equal(taken["table"], state["parameters"]["table"])
    stored = placement.stored(padded)["parameters"]
    assert jax.tree.map(np.shape, taken) == {n: s.shape for n, s in stored.items()}
    # What need not be cut stays where it is.
    assert taken["other"] is put["other"]
    even = Placement(make_mesh(2, 4), ("table",), 32)
    assert even.take(padded)["parameters"]["table"] is put["table"]
