"""The loop: what it leaves, and that nothing but time differs after an interruption.

`trained_run()` is an uninterrupted run of `small_config()`: 4 steps an epoch, 3 epochs, a
checkpoint every 3 steps besides those after the epochs.
"""

import itertools
import os
import pickle
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from child_process import train_in_child
from small_sets import compiled_once, copy_of, shop, small_config, trained_run

import jaxrec
from jaxrec.data.pipeline import training_iterator
from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError
from jaxrec.evaluation.evaluator import sample_targets
from jaxrec.training import loop as loop_module
from jaxrec.training.checkpoints import Checkpoints
from jaxrec.training.interrupt import Interrupted
from jaxrec.training.loop import train
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.run_folder import RunFolder, write_json
from jaxrec.training.setup import make_model, training_batches
from jaxrec.training.state import initial_state

STEPS = 4
TIMES = ("events_per_second", "epoch_seconds", "validation_seconds", "seconds")


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with compiled_once():
        yield


def curve(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = RunFolder(folder).read_metrics()
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def last_state(config, folder):
    """The whole state of the newest checkpoint, flat, and the loop's own."""
    parameters, _ = make_model(config, 30)
    template = initial_state(parameters, make_optimizer(config.optimizer, 1))

    batches = training_batches(config, shop(), leave_one_out(shop()))
    position = training_iterator(batches, 1)
    checkpoints = Checkpoints(RunFolder(folder).checkpoints, config.training.metric)
    restored = checkpoints.restore_latest(template, position, pytest.fail)
    checkpoints.close()
    leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(restored.state)}
    return restored.step, leaves, restored.loop._replace(seconds=0.0), position.get_state()


def assert_same_run(config, one, other):
    assert curve(one) == curve(other)
    (step, leaves, loop, position), wanted = last_state(config, one), last_state(config, other)
    assert (step, loop, position) == (wanted[0], wanted[2], wanted[3])
    assert leaves.keys() == wanted[1].keys()
    assert len(leaves) > 40
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, wanted[1][name], err_msg=name)


def steps_on_disk(folder):
    return sorted(int(p.name) for p in RunFolder(folder).checkpoints.iterdir() if p.name.isdigit())


def call_at(monkeypatch, step_number, action):
    """Calls `action()` while the given step of this session is being sent."""
    calls = []

    def made(*arguments):
        step = make_train_step(*arguments)

        def counted(state, batch):
            calls.append(None)
            if len(calls) == step_number:
                action()
            return step(state, batch)

        return counted

    make_train_step = loop_module.make_train_step
    monkeypatch.setattr(loop_module, "make_train_step", made)
    return calls


def test_the_folder_holds_what_it_says():
    folder = trained_run()
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "data.json",
        "items.parquet",
        "metrics.jsonl",
        "results.json",
    ]


def test_the_curve_has_a_point_every_so_often_and_one_an_epoch():
    lines = curve(trained_run())
    assert [line["step"] for line in lines if "loss" in line] == [3, 4, 6, 8, 9, 12]
    points = [line for line in lines if "validation" in line]
    assert [(p["step"], p["epoch"]) for p in points] == [(4, 1), (8, 2), (12, 3)]
    first = lines[0]
    assert first["epoch"] == 1
    assert first["learning_rate"] == pytest.approx(0.01)
    # Untrained, every item is about as likely as any other.
    assert first["loss"] == pytest.approx(np.log(30), abs=0.2)
    assert lines[-2]["loss"] < first["loss"] - 0.05
    assert 0 < first["gradient_norm"] < 10
    wanted = {f"{m}@{k}" for m in ("hr", "ndcg", "mrr", "coverage") for k in (1, 5, 10)}
    assert wanted <= points[0]["validation"].keys()


def test_seconds_add_up():
    points = [x for x in RunFolder(trained_run()).read_metrics() if "validation" in x]
    spent = [p["epoch_seconds"] + p["validation_seconds"] for p in points]
    np.testing.assert_allclose([p["seconds"] for p in points], np.cumsum(spent), atol=0.5)
    results = RunFolder(trained_run()).read_results()
    assert results["seconds"] == round(points[-1]["seconds"], 1)


def test_best_and_latest_checkpoints_are_kept():
    points = [line for line in curve(trained_run()) if "validation" in line]
    best = max(points, key=lambda p: p["validation"]["ndcg@10"])
    assert set(steps_on_disk(trained_run())) == {best["step"], 9, 12}
    run = jaxrec.load(trained_run())
    assert run.step == best["step"]
    again = run.evaluate("validation")
    for name, value in best["validation"].items():
        assert again.model[name] == pytest.approx(value, abs=1e-12), name


def test_the_last_loss_is_that_of_the_parameters():
    """Without dropout, on the whole epoch at once, against NumPy."""
    from oracles import sasrec as oracle

    config = small_config()
    run = jaxrec.load(trained_run(), checkpoint="last")
    train_part = leave_one_out(shop()).train
    sequences = [
        shop().items[max(start, stop - 11) : stop]
        for start, stop in zip(train_part.starts, train_part.stops, strict=True)
        if stop - start >= 2
    ]
    exact = oracle.mean_loss(run.parameters, sequences, config.model)
    last = [line["loss"] for line in curve(trained_run()) if "loss" in line][-1]
    assert exact == pytest.approx(last, abs=0.12)


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    folder = copy_of(trained_run(), tmp_path / "run")

    def contents():
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = contents()
    run = jaxrec.fit(small_config(), folder)
    assert run.step == jaxrec.load(trained_run()).step
    assert contents() == before
    assert capsys.readouterr().err == ""


def test_a_finished_run_is_judged_again_as_it_is_asked_to(tmp_path):
    folder = copy_of(trained_run(), tmp_path / "run")
    before = RunFolder(folder).read_results()
    jaxrec.fit(small_config(evaluation__level=0.5), folder)
    after = RunFolder(folder).read_results()
    assert after["config"]["evaluation"]["level"] == 0.5
    wide, narrow = (x["metrics"]["test"]["intervals"]["hr@10"] for x in (before, after))
    assert narrow != wide
    assert after["metrics"]["test"]["hr@10"] == before["metrics"]["test"]["hr@10"]


def test_equal_validations_leave_the_latest_and_do_not_reset_patience(tmp_path, monkeypatch):
    config = small_config(training__epochs=9, training__patience=2, training__checkpoint_every=0)
    with monkeypatch.context() as patched:
        patched.setattr(loop_module.Evaluator, "metrics", lambda *_: {"ndcg@10": 0.5})
        train(config, tmp_path / "run")
    points = [line for line in curve(tmp_path / "run") if "validation" in line]
    assert len(points) == 3
    _, _, loop, _ = last_state(config, tmp_path / "run")  # which fails at any warning
    assert loop.best_step == points[-1]["step"] == jaxrec.load(tmp_path / "run").step


def test_a_curve_that_lost_lines_does_not_stop_a_run(tmp_path, capsys):
    folder = copy_of(trained_run(), tmp_path / "run")
    log = RunFolder(folder).metrics
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    jaxrec.fit(small_config(training__epochs=3), folder)
    assert "1 lines of the curve are lost" in capsys.readouterr().err
    assert curve(folder)[-1]["epoch"] == 3


@pytest.mark.parametrize("step", [2, 6, 4], ids=["first epoch", "second epoch", "end of epoch"])
def test_a_signal_stops_with_a_checkpoint_and_the_same_call_continues(
    tmp_path, monkeypatch, capsys, step
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        call_at(patched, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match=f"stopped at step {step} by a signal") as caught:
            train(small_config(), folder)
    assert caught.value.signal == signal.SIGTERM
    assert steps_on_disk(folder)[-1] == step
    told = capsys.readouterr().err
    assert "small on shop: 57 sequences, " in told
    assert ("epoch 1: " in told) == (step >= STEPS)
    train(small_config(), folder)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"continuing at step {step}, epoch {step // STEPS + 1}"
    assert len(told) == 1 + 3 - step // STEPS
    assert_same_run(small_config(), folder, trained_run())
    assert steps_on_disk(folder) == steps_on_disk(trained_run())


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    call_at(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train(small_config(), tmp_path / "run", show_progress=False)


@pytest.mark.slow
def test_sigterm_of_a_child_process_and_its_continuation(tmp_path):
    folder = tmp_path / "run"
    # The loader reads ahead, so step 12 is not reached when it is asked for.
    child = train_in_child(small_config(), folder, signal.SIGTERM, at=7)
    assert child.returncode == 128 + signal.SIGTERM, child.stderr
    assert child.stderr.splitlines()[-1].startswith("jaxrec: stopped at step ")
    stopped = steps_on_disk(folder)[-1]
    assert 2 <= stopped <= 8
    train(small_config(), folder, show_progress=False)
    assert_same_run(small_config(), folder, trained_run())


def test_a_damaged_checkpoint_costs_only_time(tmp_path, capsys):
    folder = copy_of(trained_run(), tmp_path / "run")
    newest = folder / "checkpoints" / "12" / "state"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    train(small_config(), folder)
    told = capsys.readouterr().err.splitlines()
    assert f"checkpoint {newest.parent} cannot be read" in told[0]
    assert told[1] == "continuing at step 9, epoch 3"
    assert_same_run(small_config(), folder, trained_run())


def test_more_epochs_continue_a_finished_run(tmp_path):
    folder = tmp_path / "run"
    short = small_config(training__epochs=2)
    jaxrec.fit(short, folder, show_progress=False)
    assert RunFolder(folder).read_results()["epochs"] == 2
    run = jaxrec.fit(small_config(), folder, show_progress=False)
    assert_same_run(small_config(), folder, trained_run())
    results, wanted = (RunFolder(f).read_results() for f in (folder, trained_run()))
    assert results["epochs"] == 3
    assert results["metrics"] == wanted["metrics"]
    assert results["step"] == wanted["step"] == run.step


def test_training_stops_early_and_the_best_is_the_best_of_the_curve(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    config = small_config(
        optimizer__learning_rate=0.2,
        training__epochs=40,
        training__patience=2,
        training__checkpoint_every=0,
        training__tensorboard=True,
    )
    train(config, tmp_path / "run")
    points = [line for line in curve(tmp_path / "run") if "validation" in line]
    values = [p["validation"]["ndcg@10"] for p in points]
    best = int(np.argmax(values))
    assert len(values) == best + 3 < 40
    # Two stale ones, and never two before.
    tops = [i for i, value in enumerate(values) if value > max(values[:i], default=-1)]
    assert all(later - earlier <= 2 for earlier, later in itertools.pairwise(tops))
    run = jaxrec.load(tmp_path / "run")
    assert run.step == points[best]["step"] == STEPS * (best + 1)
    assert jaxrec.load(tmp_path / "run", checkpoint="last").step == points[-1]["step"]
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == (
        f"stopped: ndcg@10 has not improved for 2 validations; best {values[best]:.4f} "
        f"at step {run.step}"
    )
    assert f"validation ndcg@10 {values[best]:.4f} (best)" in told[best + 1]
    assert "(best)" not in told[-2]
    events = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(events) == 1
    assert b"validation/ndcg_10" in events[0].read_bytes()


@pytest.mark.parametrize("checkpoint_every", [1, 0])
def test_a_loss_that_is_not_finite_names_where_and_keeps_what_was_good(tmp_path, checkpoint_every):
    config = small_config(
        optimizer__learning_rate=1e38,
        training__checkpoint_every=checkpoint_every,
        training__log_every=4,
    )
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run", show_progress=False)
    message = str(caught.value)
    assert message.startswith("not finite at step 1 (epoch 1, batch 1): the gradient of ")
    names = make_model(config, 30)[0]
    assert message.split("the gradient of ")[1].split(";")[0] in names
    assert "--optimizer.learning_rate" in message
    assert steps_on_disk(tmp_path / "run") == ([1] if checkpoint_every else [])
    assert curve(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__epochs": 0}, "training.epochs"),
        ({"data__name": "nothing-of-that-name"}, "no data set 'nothing-of-that-name'"),
        ({"data__name": "/nowhere/at/all"}, "not a prepared data set"),
        ({"model__position": "kernel", "data__max_length": 10**7}, None),
    ],
    ids=["config", "name", "path", "memory"],
)
def test_nothing_is_left_of_a_run_that_could_not_begin(tmp_path, changes, message):
    if message is None:
        changes, message = {"data__split": "temporal", "data__quantile": 1e-6}, "quantile"
    with pytest.raises(UserError, match=message):
        train(small_config(**changes), tmp_path / "run", show_progress=False)
    assert not list(tmp_path.iterdir())


def test_another_config_or_set_is_refused_before_anything_is_touched(tmp_path):
    folder = copy_of(trained_run(), tmp_path / "run")
    with pytest.raises(UserError, match=r"model.width = 8, now it is 16"):
        train(small_config(model__width=16), folder, show_progress=False)
    data = RunFolder(folder)
    write_json(data.data, data.read_data() | {"hash": "0" * 64})
    with pytest.raises(UserError, match="another version of 'shop'"):
        train(small_config(), folder, show_progress=False)
    assert_same_run(small_config(), folder, trained_run())
    assert data.read_config() == small_config()


def test_overwriting_begins_anew(tmp_path):
    folder = copy_of(trained_run(), tmp_path / "run")
    config = small_config(training__epochs=1, name="another")
    train(config, folder, overwrite=True, show_progress=False)
    assert steps_on_disk(folder) == [3, 4]
    assert not RunFolder(folder).results.exists()
    assert [line["step"] for line in curve(folder)] == [3, 4, 4]


def test_the_path_of_a_set_is_remembered_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(shop().path.parent.parent)
    folder = copy_of(trained_run(), tmp_path / "run")
    train(small_config(data__name="data/shop"), folder, show_progress=False)
    assert RunFolder(folder).read_config().data.name == str(shop().path)


def test_nothing_that_is_stored_is_pickled(monkeypatch):
    files = [path for path in trained_run().rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert path.suffix not in (".pkl", ".pickle", ".p", ".pt", ".joblib")
        start = path.read_bytes()[:2]
        assert not (start[:1] == b"\x80" and start[1:] in b"\x02\x03\x04\x05"), path

    def refuse(*arguments, **options):
        raise AssertionError("pickle is used on something that is loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    run = jaxrec.load(trained_run())
    assert len(run.recommend(101)) == 10


def test_a_sample_of_targets_is_drawn_once_and_kept_in_order():
    targets = leave_one_out(shop()).validation
    sample = sample_targets(targets, 10, 3)
    assert len(sample) == 10
    assert (np.diff(sample.targets) > 0).all()
    np.testing.assert_array_equal(sample.targets, sample_targets(targets, 10, 3).targets)
    assert sample.targets.tolist() != sample_targets(targets, 10, 4).targets.tolist()
    for everybody in (0, len(targets), 10**6):
        assert len(sample_targets(targets, everybody, 3)) == len(targets)


def test_both_checkouts_of_the_fixture_stay_as_they_were():
    """A test above that wrote into the shared run would spoil all the others."""
    assert RunFolder(trained_run()).read_config() == small_config()
    assert shutil.disk_usage(trained_run()).total
    assert Path(trained_run() / "results.json").is_file()
