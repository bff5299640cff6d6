"""Every kind of damage to the files of a set and of a checkpoint is noticed before training.

The whole of it, with the training that follows, is `python -m benchmarks.robustness`; here a set is
only opened, and a checkpoint only restored.
"""

import shutil
from collections import Counter

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from small_sets import copy_of, shop, small_config

from benchmarks.faults.damage import Impossible, kinds
from benchmarks.faults.trials import NOT_READ, files_of, in_turn, reads_the_same
from jaxrec.data.generate import generate
from jaxrec.errors import UserError
from jaxrec.training.checkpoints import Checkpoints, LoopState
from jaxrec.training.config import DataConfig
from jaxrec.training.loop import train
from jaxrec.training.setup import open_data

TRIALS = 70


def outcomes(whole, folder, foreign, look, rng):
    """Spoils a fresh copy again and again; counts what `look(copy, file)` says."""
    counts, done = Counter(), 0
    for file, kind in in_turn(files_of(whole), list(kinds(foreign)), rng):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        try:
            kinds(foreign)[kind](folder / file, rng)
        except Impossible:
            continue
        outcome = look(folder, file)
        assert outcome != "unnoticed", (file, kind)
        counts[outcome] += 1
        done += 1
        if done == TRIALS:
            break
    assert done == TRIALS
    return counts


def test_of_a_prepared_set(tmp_path, rng):
    other = generate("other", users=30, items=20, events_per_user=5, data_dir=tmp_path)

    def look(folder, file):
        told = ""
        try:
            open_data(DataConfig(name=str(folder)))
        except UserError as error:
            told = str(error)
        if told:
            assert "\n" not in told
            assert str(folder) in told
            return "refused"
        return "harmless" if reads_the_same(shop().path / file, folder / file) else "unnoticed"

    copies = tmp_path / "set"
    counts = outcomes(shop().path, copies, lambda path: other.path / path.name, look, rng)
    assert counts["harmless"] <= 3


def test_a_flipped_bit_ends_training_before_it_begins(tmp_path):
    data = copy_of(shop().path, tmp_path / "set")
    content = bytearray((data / "items.npy").read_bytes())
    content[-4] ^= 1
    (data / "items.npy").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"items\.npy: altered, its hash is not the manifest's"):
        train(small_config(data__name=str(data)), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_of_a_checkpoint(tmp_path, rng):
    def state(step):
        values = np.random.default_rng(step).normal(size=(40, 8)).astype(np.float32)
        return {"parameters": {"a": jnp.asarray(values)}, "step": jnp.int32(step)}

    def iterator():
        return iter(grain.MapDataset.range(9).to_iter_dataset())

    checkpoints = Checkpoints(tmp_path / "checkpoints", "ndcg@10", create=True)
    loop = LoopState(1, 0.3, 1, 0, 1.5, 7, False)
    for step in (1, 2):
        checkpoints.save(step, state(step), iterator(), loop, {"ndcg@10": 0.3 - 0.1 * step})
    checkpoints.wait()
    checkpoints.close()
    whole = tmp_path / "checkpoints" / "2"

    def look(folder, file):
        told = []
        reader = Checkpoints(folder.parent, "ndcg@10")
        try:
            restored = reader.restore_latest(state(0), iterator(), told.append)
        finally:
            reader.close()
        np.testing.assert_array_equal(
            restored.state["parameters"]["a"], state(restored.step)["parameters"]["a"]
        )
        if told:
            assert restored.step == 1
            assert len(told) == 1
            assert "\n" not in told[0]
            return "passed over"
        assert restored.step == 2
        known = file in NOT_READ or reads_the_same(whole / file, folder / file)
        return "harmless" if known else "unnoticed"

    (tmp_path / "spoilt").mkdir()
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "spoilt" / "1")

    def of_the_other(path):
        return tmp_path / "checkpoints" / "1" / path.relative_to(tmp_path / "spoilt" / "2")

    counts = outcomes(whole, tmp_path / "spoilt" / "2", of_the_other, look, rng)
    assert counts["passed over"] > 0.8 * TRIALS
