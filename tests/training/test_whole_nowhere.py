"""A table that is split over devices is whole on none: not at the start, nor later.

Looked at wherever arrays of a run are handed on: when it starts, resumes, saves, ranks, judges,
recommends. A device that was given the whole table by then, or a moment of it, still holds it.
"""

import gc
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_sets import compiled_once, small_config

import jaxrec
from jaxrec.data.prepared import write_prepared
from jaxrec.evaluation.ranker import Ranker
from jaxrec.training import loop as loop_module
from jaxrec.training.checkpoints import Checkpoints
from jaxrec.training.config import MeshConfig
from jaxrec.training.loop import train

USERS, WIDTH = 40, 16
PADDED, EVEN = 2001, 2000


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with compiled_once():
        yield


@pytest.fixture(params=[PADDED, pytest.param(EVEN, marks=pytest.mark.slow)])
def items(request):
    return request.param


@pytest.fixture
def config(tmp_path, items):
    """A catalogue that is large beside the batches, the users and the rest of the model."""
    rng = np.random.default_rng(0)
    data = write_prepared(
        tmp_path / "data",
        name="wide",
        users=np.repeat(np.arange(USERS), 6),
        items=rng.integers(items, size=6 * USERS),
        timestamps=None,
        ratings=None,
        user_ids=np.arange(USERS),
        item_ids=np.arange(items),
        source={},
        tie_order="as given",
    )
    config = small_config(mesh=MeshConfig(2, 4), model__width=WIDTH, training__epochs=2)
    config = replace(config, data=replace(config.data, name=str(data.path)))
    return replace(config, training=replace(config.training, checkpoint_every=2))


def come_since(before):
    """Arrays that were not alive then."""
    known = {id(array) for array in before}
    return [a for a in jax.live_arrays() if id(a) not in known and not a.is_deleted()]


def alive():
    gc.collect()
    return jax.live_arrays()


class Watch:
    """Looks at the arrays that have come since whenever one of the watched calls begins or ends.

    Attributes:
      seen: in which of them.
    """

    def __init__(self, monkeypatch, table_bytes):
        self.seen = set()
        self._table_bytes = table_bytes
        self._before = alive()
        for owner, name in (
            (Checkpoints, "__init__"),
            (Checkpoints, "restore_latest"),
            (Checkpoints, "read_parameters"),
            (ocp.CheckpointManager, "save"),
            (Ranker, "lists"),
            (loop_module._Loop, "_log"),
        ):
            monkeypatch.setattr(owner, name, self._watching(name, getattr(owner, name)))

    def _watching(self, name, function):
        def watched(*arguments, **options):
            self.look(name)
            result = function(*arguments, **options)
            self.look(name)
            return result

        return watched

    def look(self, name):
        self.seen.add(name)
        for array in come_since(self._before):
            for shard in array.addressable_shards:
                # A quarter of a table is what a device holds.
                assert shard.data.nbytes < self._table_bytes / 2, (name, array.shape)


def test_nowhere_from_the_start_to_the_judging(tmp_path, monkeypatch, config, items):
    table = items * WIDTH * 4
    watch = Watch(monkeypatch, table)
    run = jaxrec.fit(config, tmp_path / "run", show_progress=False)
    wanted = {"__init__", "restore_latest", "read_parameters", "save", "lists", "_log"}
    assert watch.seen == wanted
    run.recommend(0, k=5)
    run.recommend_all(k=5)
    run.evaluate("validation")
    run.similar_items(0)
    run.export_item_vectors(tmp_path / "vectors.npy")
    watch.look("the run")
    assert run.parameters["item_embedding"].addressable_shards[0].data.nbytes < table / 3


@pytest.mark.parametrize("mesh", [MeshConfig(1, 8), MeshConfig()], ids=["eight", "one"])
def test_what_is_restored_is_never_beside_a_fresh_state(tmp_path, monkeypatch, config, items, mesh):
    folder, table, found = tmp_path / "run", items * WIDTH * 4, []
    shorter = replace(config, training=replace(config.training, epochs=1))
    train(shorter, folder, show_progress=False)
    if mesh.model > 1:
        Watch(monkeypatch, table)
    before, restore = alive(), Checkpoints._restore

    def tables():
        return sum(array.nbytes >= table for array in come_since(before))

    def counting(self, *arguments):
        found.append(tables())
        result = restore(self, *arguments)
        found.append(tables())
        return result

    monkeypatch.setattr(Checkpoints, "_restore", counting)
    train(replace(config, mesh=mesh), folder, show_progress=False)
    # None, and then the table with its two moments.
    assert found == [0, 3]
