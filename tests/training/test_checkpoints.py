"""Checkpoints: the best and the latest are kept, damage is passed over and told."""

import json
import shutil

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.checkpoints import Checkpoints, LoopState
from jaxrec.training.checksums import CHECKSUMS

VALUES = {1: 0.3, 2: None, 3: 0.5, 4: 0.4, 5: None, 6: 0.2}
LOOP = LoopState(1, 0.5, 3, 2, 1.5, 7, False)


def state(step):
    return {
        "parameters": {"a": jnp.arange(3.0) * step, "b": jnp.full((2, 2), step, jnp.int32)},
        "optimizer_state": {"m": jnp.ones(3) * step},
    }


def iterator(done=0):
    made = iter(grain.MapDataset.range(100).to_iter_dataset())
    for _ in range(done):
        next(made)
    return made


def save(folder, steps=VALUES):
    checkpoints = Checkpoints(folder, "ndcg@10", create=True)
    for step in steps:
        value = VALUES[step]
        metrics = None if value is None else {"ndcg@10": value, "hr@10": -value}
        loop = LOOP._replace(epoch=step)
        checkpoints.save(step, state(step), iterator(2 * step), loop, metrics)
    checkpoints.wait()
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder).close()
    return folder


@pytest.fixture
def spoilt(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, create=True):
    checkpoints = Checkpoints(folder, "ndcg@10", create=create)
    told, position = [], iterator()
    try:
        return checkpoints.restore_latest(state(0), position, told.append), position, told
    finally:
        checkpoints.close()


def test_the_best_and_the_latest_two_are_kept(saved):
    checkpoints = Checkpoints(saved, "ndcg@10")
    assert checkpoints.steps() == [3, 5, 6]
    checkpoints.close()


def test_everything_comes_back(saved):
    restored, position, told = restore(saved)
    assert told == []
    assert restored.step == 6
    assert restored.loop == LOOP._replace(epoch=6)
    np.testing.assert_array_equal(restored.state["parameters"]["a"], [0, 6, 12])
    assert restored.state["parameters"]["b"].dtype == jnp.int32
    np.testing.assert_array_equal(restored.state["optimizer_state"]["m"], [6, 6, 6])
    assert next(position) == 12


def test_reading_alone_changes_nothing_on_disk(saved):
    before = sorted(str(path) for path in saved.rglob("*"))
    checkpoints = Checkpoints(saved, "ndcg@10")
    step, parameters = checkpoints.read_parameters("best")
    checkpoints.close()
    assert step == 3
    assert parameters.keys() == {"a", "b"}
    assert all(type(value) is np.ndarray for value in parameters.values())
    np.testing.assert_array_equal(parameters["a"], [0, 3, 6])
    np.testing.assert_array_equal(parameters["b"], [[3, 3], [3, 3]])
    assert sorted(str(path) for path in saved.rglob("*")) == before


@pytest.mark.parametrize(("which", "step"), [("best", 3), ("last", 6), ("5", 5)])
def test_which_one(saved, which, step):
    checkpoints = Checkpoints(saved, "ndcg@10")
    assert checkpoints.read_parameters(which)[0] == step
    checkpoints.close()


def test_the_metric_decides_which_is_best(saved):
    checkpoints = Checkpoints(saved, "hr@10")
    assert checkpoints.read_parameters("best")[0] == 6
    checkpoints.close()


@pytest.mark.parametrize("which", ["4", "7", "bset", "-1", ""])
def test_one_that_is_not_there_is_told_with_those_that_are(saved, which):
    checkpoints = Checkpoints(saved, "ndcg@10")
    with pytest.raises(UserError, match=r"there are best, last and steps \[3, 5, 6\]"):
        checkpoints.read_parameters(which)
    checkpoints.close()


def test_the_latest_is_the_best_where_nothing_was_validated(tmp_path):
    checkpoints = save(tmp_path / "c", [2, 5])
    assert checkpoints.read_parameters("best")[0] == 5
    checkpoints.close()


@pytest.mark.parametrize("there", [True, False])
def test_none_yet(tmp_path, there):
    folder = tmp_path / "checkpoints"
    if there:
        folder.mkdir()
    checkpoints = Checkpoints(folder, "ndcg@10")
    with pytest.raises(UserError, match="no checkpoint there yet"):
        checkpoints.read_parameters("best")
    checkpoints.close()
    assert folder.exists() == there
    assert restore(folder)[0] is None


def test_a_step_is_saved_once(tmp_path):
    checkpoints = save(tmp_path / "c", [1])
    checkpoints.save(1, state(9), iterator(), LOOP, None)
    checkpoints.wait()
    assert checkpoints.read_parameters("last")[1]["a"].tolist() == [0, 1, 2]
    checkpoints.close()


def truncate(step):
    for path in (step / "state").rglob("*"):
        if path.is_file() and "ocdbt" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_state(step):
    shutil.rmtree(step / "state")


def spoil_loop(step):
    (step / "loop" / "metadata").write_text("{")


def remove_position(step):
    shutil.rmtree(step / "data")


def spoil_position(step):
    """Past the end of the data, in a checkpoint of before there were checksums."""
    without_checksums(step)
    (step / "data" / "metadata").write_text('{"next_index": 1000}')


def other_loop(step):
    (step / "loop" / "metadata").write_text(json.dumps({"epoch": 1}))


def flip_a_bit_of_an_array(step):
    """In the last byte of the largest file, which nothing but the checksums looks at."""
    path = max(
        (p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def remove_checksums(step):
    (step / CHECKSUMS).unlink()


def become_a_file(step):
    shutil.rmtree(step)
    step.write_text("")


def take_another_step(step):
    shutil.rmtree(step)
    shutil.copytree(step.with_name("3"), step)


DAMAGE = [
    truncate,
    remove_state,
    spoil_loop,
    remove_position,
    spoil_position,
    other_loop,
    flip_a_bit_of_an_array,
    remove_checksums,
    become_a_file,
    take_another_step,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(spoilt, damage):
    damage(spoilt / "6")
    restored, position, told = restore(spoilt)
    assert restored.step == 5
    np.testing.assert_array_equal(restored.state["parameters"]["a"], [0, 5, 10])
    assert next(position) == 10
    assert len(told) == 1
    assert f"checkpoint {spoilt / '6'} cannot be read" in told[0]
    assert told[0].endswith("trying the one before")
    assert "\n" not in told[0]


@pytest.mark.parametrize("damage", [truncate, become_a_file, spoil_loop])
def test_what_was_passed_over_is_saved_anew(spoilt, damage):
    damage(spoilt / "6")
    checkpoints = Checkpoints(spoilt, "ndcg@10", create=True)
    restored = checkpoints.restore_latest(state(0), iterator(), lambda _: None)
    checkpoints.forget_after(restored.step)
    assert checkpoints.steps() == [3, 5]
    checkpoints.save(6, state(60), iterator(), LOOP, {"ndcg@10": 0.9})
    checkpoints.wait()
    step, parameters = checkpoints.read_parameters("best")
    checkpoints.close()
    assert step == 6
    np.testing.assert_array_equal(parameters["a"], [0, 60, 120])


def spoil_metrics(step):
    """Makes it the best, were it believed."""
    (step / "metrics" / "metrics").write_text(json.dumps({"ndcg@10": 0.9, "hr@10": 0.9}))


@pytest.mark.parametrize("damage", [truncate, spoil_metrics, shutil.rmtree])
def test_the_best_is_missed_when_training_goes_on(spoilt, damage):
    """It would be judged in the end; the others are as they were."""
    damage(spoilt / "3")
    checkpoints = Checkpoints(spoilt, "ndcg@10", create=True)
    told = []
    restored = checkpoints.restore_latest(state(0), iterator(), told.append)
    assert restored.step == 6
    if damage is not shutil.rmtree:
        assert f"checkpoint {spoilt / '3'} cannot be read" in told.pop(0)
    assert told == [
        "the checkpoint of the best validation, step 3, is lost; the best of those that are left "
        "and of those to come will be judged"
    ]
    checkpoints.forget_after(restored.step)
    assert checkpoints.steps() == [5, 6]
    checkpoints.save(7, state(7), iterator(), LOOP, {"ndcg@10": 0.1})
    checkpoints.wait()
    assert checkpoints.read_parameters("best")[0] == 6
    checkpoints.close()


def test_metrics_that_are_not_what_was_written_choose_nothing(spoilt):
    spoil_metrics(spoilt / "6")
    checkpoints = Checkpoints(spoilt, "ndcg@10")
    with pytest.raises(
        UserError, match=r"6: its metrics cannot be read \(metrics/metrics has"
    ) as e:
        checkpoints.read_parameters("best")
    assert str(e.value).endswith("name one: last, or of [3, 5, 6]")
    assert checkpoints.read_parameters("3")[0] == 3
    checkpoints.close()


def without_checksums(step):
    """As versions that wrote none left it."""
    (step / CHECKSUMS).unlink()
    loop = json.loads((step / "loop" / "metadata").read_text())
    assert loop.pop("checksums") is True
    (step / "loop" / "metadata").write_text(json.dumps(loop))


def test_checkpoints_of_before_there_were_checksums(spoilt):
    for step in ("3", "5", "6"):
        without_checksums(spoilt / step)
        # Then Grain wrote the position.
        data = spoilt / step / "data"
        (data / "metadata").rename(data / "process_0-of-1.json")
    restored, position, told = restore(spoilt)
    assert (restored.step, told) == (6, [])
    assert next(position) == 12
    assert restored.loop == LOOP._replace(epoch=6)
    checkpoints = Checkpoints(spoilt, "ndcg@10")
    assert checkpoints.read_parameters("best")[0] == 3
    checkpoints.close()


def test_equal_values_make_the_latest_the_best(tmp_path, monkeypatch):
    monkeypatch.setitem(VALUES, 4, 0.5)
    checkpoints = save(tmp_path / "c", [1, 3, 4])
    assert checkpoints.read_parameters("best")[0] == 4
    checkpoints.close()


def test_a_kill_while_one_is_deleted_leaves_no_half_of_it(spoilt, monkeypatch):
    truncate(spoilt / "6")
    checkpoints = Checkpoints(spoilt, "ndcg@10", create=True)
    restored = checkpoints.restore_latest(state(0), iterator(), lambda _: None)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *a, **k: None)
        checkpoints.forget_after(restored.step)
    checkpoints.close()
    assert restore(spoilt)[2] == []
    checkpoints = Checkpoints(spoilt, "ndcg@10", create=True)
    checkpoints.save(7, state(7), iterator(), LOOP, None)
    checkpoints.wait()
    checkpoints.close()
    assert sorted(entry.name for entry in spoilt.iterdir()) == ["3", "5", "7"]


def test_what_was_opened_to_be_read_is_not_written_to(saved):
    checkpoints = Checkpoints(saved, "ndcg@10")
    with pytest.raises(ValueError, match="opened to be read"):
        checkpoints.save(9, state(9), iterator(), LOOP, None)
    checkpoints.close()


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_a_disk_that_refuses_is_told_in_a_line(tmp_path, monkeypatch, call):
    checkpoints = save(tmp_path / "c", [1])

    def refuse(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: write: No space left on device\nand more")

    name = {"save": "save", "wait": "wait_until_finished", "close": "close"}[call]
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, name, refuse)
        arguments = (3, state(3), iterator(), LOOP, None) if call == "save" else ()
        with pytest.raises(UserError, match=r"cannot be written .*No space left") as caught:
            getattr(checkpoints, call)(*arguments)
    assert "\n" not in str(caught.value)
    checkpoints.close()
    assert restore(tmp_path / "c")[0].step == 1


def test_none_that_can_be_read_is_an_error(spoilt):
    for step in ("3", "5", "6"):
        truncate(spoilt / step)
    with pytest.raises(UserError, match=r"none of the checkpoints \[3, 5, 6\] can be read"):
        restore(spoilt)


def test_a_damaged_one_is_told_to_who_wants_to_read_it(spoilt):
    truncate(spoilt / "3")
    checkpoints = Checkpoints(spoilt, "ndcg@10")
    with pytest.raises(UserError, match=r"the checkpoint is damaged; others: \[5, 6\]"):
        checkpoints.read_parameters("best")
    assert checkpoints.read_parameters("last")[0] == 6
    checkpoints.close()


def test_a_folder_still_being_written_is_none(spoilt):
    shutil.copytree(spoilt / "6", spoilt / "7.orbax-checkpoint-tmp-1")
    (spoilt / "7.orbax-checkpoint-tmp-1" / "commit_success.txt").unlink(missing_ok=True)
    restored, _, told = restore(spoilt, create=True)
    assert restored.step == 6
    assert told == []
