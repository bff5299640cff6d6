"""The run folder: its files read back, damage told by file and line, and how a run begins."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_sets import shop, small_config

from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError
from jaxrec.training import run_start
from jaxrec.training.run_folder import RunFolder, read_json, write_json
from jaxrec.training.run_lock import alone_in
from jaxrec.training.run_start import begin, check_free


def started(tmp_path, config=None, **options):
    folder = RunFolder(tmp_path / "run")
    options = {"overwrite": False} | options
    check_free(folder, config or small_config(), shop(), **options)
    with alone_in(folder.path):
        begin(folder, config or small_config(), shop(), leave_one_out(shop()), **options)
    return folder


def with_checkpoint(tmp_path, config=None):
    """One that has something to lose."""
    folder = started(tmp_path, config)
    (folder.checkpoints / "3").mkdir(parents=True)
    return folder


def names(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


def test_nothing_is_made_before_it_begins(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.exists()
    check_free(folder, small_config(), shop(), overwrite=False)
    assert names(tmp_path) == []


def test_a_run_says_what_it_is(tmp_path):
    folder = started(tmp_path)
    assert names(folder.path) == ["config.json", "data.json", "items.parquet"]
    assert folder.read_config() == small_config()
    data = folder.read_data()
    assert (data["name"], data["hash"]) == ("shop", shop().hash)
    assert (data["users"], data["items"], data["events"]) == (60, 30, shop().num_events)
    assert data["split"] == "leave_one_out"
    assert data["split_description"]["train_users"] == 60
    items = pq.read_table(folder.items)
    assert items["item_id"].to_pylist() == list(shop().item_ids)
    assert items["title"].to_pylist() == shop().item_titles
    assert folder.read_metrics() == []
    assert folder.read_results() is None


def test_parents_are_made(tmp_path):
    assert started(tmp_path / "a" / "b").exists()


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "run").mkdir()
    assert started(tmp_path).exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, overwrite):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("important")
    with pytest.raises(UserError, match="not a run folder"):
        started(tmp_path, overwrite=overwrite)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "important"
    assert names(tmp_path / "run") == ["thesis.txt"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_left_alone(tmp_path, overwrite):
    (tmp_path / "run").write_text("important")
    with pytest.raises(UserError, match="is a file"):
        started(tmp_path, overwrite=overwrite)
    assert (tmp_path / "run").read_text() == "important"


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        started(tmp_path / "file")


def test_overwriting_clears_the_run_away_and_nothing_else(tmp_path):
    folder = with_checkpoint(tmp_path)
    (folder.path / "tensorboard").mkdir()
    for name in ("metrics.jsonl", "results.json", "notes.txt", "tensorboard/events"):
        (folder.path / name).write_text("{}")
    started(tmp_path, small_config(training__seed=9), overwrite=True)
    assert names(folder.path) == ["config.json", "data.json", "items.parquet", "notes.txt"]
    assert folder.read_config().training.seed == 9


def test_a_run_without_a_checkpoint_has_nothing_to_lose(tmp_path):
    folder = started(tmp_path)
    folder.metrics.write_text('{"step": 1}\n')
    folder.checkpoints.mkdir()
    (folder.checkpoints / "3.orbax-checkpoint-tmp-0").mkdir()
    started(tmp_path, small_config(training__seed=9))
    assert names(folder.path) == ["config.json", "data.json", "items.parquet"]
    assert folder.read_config().training.seed == 9


@pytest.mark.parametrize("overwrite", [True, False])
def test_the_config_of_another_tool_is_left_alone(tmp_path, overwrite):
    (tmp_path / "run").mkdir()
    for text in ('{"model_type": "bert"}', "[]", "model: bert"):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(UserError, match="not a run folder"):
            started(tmp_path, overwrite=overwrite)
        assert (tmp_path / "run" / "config.json").read_text() == text


def test_a_run_with_a_damaged_config_can_be_overwritten(tmp_path):
    folder = with_checkpoint(tmp_path)
    folder.config.write_text('{"format":')
    with pytest.raises(UserError, match=r"config.json: not JSON"):
        started(tmp_path)
    assert started(tmp_path, overwrite=True).read_config() == small_config()


def test_one_training_a_folder(tmp_path):
    folder = started(tmp_path)
    before = folder.config.read_bytes()
    with alone_in(folder.path):
        for overwrite in (True, False):
            with pytest.raises(UserError, match="another process is training into it"):
                started(tmp_path, small_config(training__seed=1), overwrite=overwrite)
        assert folder.config.read_bytes() == before
    started(tmp_path)


def test_a_child_process_holds_nothing_after_its_death(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from jaxrec.training.run_lock import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"), alone_in(tmp_path):
            pass
        child.kill()
        child.wait()
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("moment", ["_clear", "_describe", "write_json", "write_config"])
def test_a_kill_while_it_begins_leaves_a_folder_that_can_be_used(
    tmp_path, monkeypatch, old, moment
):
    """Whether it was new or overwrote a run."""
    if old:
        with_checkpoint(tmp_path)

    class Killed(BaseException):
        pass

    def kill(*arguments, **options):
        raise Killed

    owner = RunFolder if moment == "write_config" else run_start
    with monkeypatch.context() as patched:
        patched.setattr(owner, moment, kill)
        with pytest.raises(Killed):
            started(tmp_path, overwrite=old)
    for overwrite in (False, True):
        config = small_config()
        check_free(RunFolder(tmp_path / "run"), config, shop(), overwrite=overwrite)
    folder = started(tmp_path, overwrite=old)
    assert names(folder.path) == ["config.json", "data.json", "items.parquet"]


@pytest.mark.parametrize(
    "changes",
    [
        {"training__epochs": 9},
        {"training__patience": 4},
        {"training__tensorboard": True},
        {"evaluation__level": 0.9},
        {"evaluation__resamples": 7},
        {"data__prefetch": 1},
        {"published": {}},
    ],
    ids=str,
)
def test_what_changes_no_step_may_change(tmp_path, changes):
    with_checkpoint(tmp_path)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    folder = started(tmp_path, small_config(**changes))
    assert folder.read_config() == small_config(**changes)
    assert folder.metrics.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "other"}, "name = 'small', now it is 'other'"),
        ({"model__width": 16}, "model.width = 8, now it is 16"),
        ({"training__seed": 1}, "training.seed = 0, now it is 1"),
        ({"training__batch_size": 8}, "training.batch_size = 16, now it is 8"),
        ({"training__metric": "hr@5"}, "training.metric = 'ndcg@10', now it is 'hr@5'"),
        ({"training__log_every": 5}, "training.log_every = 3, now it is 5"),
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate = 0.01, now it is 0.5"),
        ({"optimizer__clip_norm": 2.0}, "optimizer.clip_norm = None, now it is 2.0"),
        ({"evaluation__ks": (1, 10)}, r"evaluation.ks = \(1, 5, 10\), now it is \(1, 10\)"),
        ({"data__split": "temporal"}, "data.split = 'leave_one_out', now it is 'temporal'"),
        ({"loss__label_smoothing": 0.5}, "loss.label_smoothing = 0.0, now it is 0.5"),
    ],
    ids=str,
)
def test_a_run_of_another_config_is_refused_by_field(tmp_path, changes, named):
    folder = with_checkpoint(tmp_path)
    before = folder.config.read_bytes()
    with pytest.raises(UserError, match=named):
        started(tmp_path, small_config(**changes))
    assert folder.config.read_bytes() == before


def test_epochs_count_where_the_schedule_depends_on_them(tmp_path):
    cosine = small_config(optimizer__schedule="cosine")
    with_checkpoint(tmp_path, cosine)
    with pytest.raises(UserError, match=r"training.epochs = 3, now it is 4"):
        started(tmp_path, small_config(optimizer__schedule="cosine", training__epochs=4))


def test_another_version_of_the_data_is_refused(tmp_path):
    folder = with_checkpoint(tmp_path)
    write_json(folder.data, folder.read_data() | {"hash": "0123456789abcdef"})
    with pytest.raises(UserError, match=f"hash 0123456789ab, now {shop().hash[:12]}"):
        started(tmp_path)


def test_json_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b'{"format": 1, "exper', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "wanted a JSON object, got list"),
        (b"{}", "not the config of a run"),
        (b'{"format": "1", "experiment": {}}', "not the config of a run"),
        (b'{"format": 1}', "not the config of a run"),
        (b'{"format": 2, "jaxrec": "9.9", "experiment": {}}', r"newer jaxrec \(9.9\); upgrade"),
        (b'{"format": 1, "experiment": {"data": {"nam": 1}}}', "unknown field data.nam"),
        (b'{"format": 1, "experiment": []}', "an experiment is a table"),
        (b'{"format": 1, "experiment": {"training": {"epochs": 0}}}', "training.epochs"),
    ],
)
def test_a_damaged_config_is_told(tmp_path, text, message):
    folder = started(tmp_path)
    folder.config.write_bytes(text)
    with pytest.raises(UserError, match=message) as caught:
        folder.read_config()
    assert "config" in str(caught.value)


@pytest.mark.parametrize("spoilt", ["name", "hash", "users", "items", "events"])
def test_damaged_data_is_told_by_field(tmp_path, spoilt):
    folder = started(tmp_path)
    values = folder.read_data()
    for broken in (None, [1], 1.5):
        write_json(folder.data, values | {spoilt: broken})
        with pytest.raises(UserError, match=f"data.json: {spoilt} is "):
            folder.read_data()
    folder.data.unlink()
    with pytest.raises(UserError, match=r"data.json: no such file"):
        folder.read_data()
    folder.data.mkdir()
    with pytest.raises(UserError, match=r"data.json: cannot be read"):
        folder.read_data()


def test_metrics_leave_out_a_line_that_is_still_being_written(tmp_path):
    folder = started(tmp_path)
    folder.metrics.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert folder.read_metrics() == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize(
    "line", ["x", "3", '{"loss": 1}', '{"step": 1, "loss": "x"}', '{"step": 1, "validation": 3}']
)
def test_a_damaged_curve_is_told_by_line(tmp_path, line):
    folder = started(tmp_path)
    folder.metrics.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not "):
        folder.read_metrics()


@pytest.mark.parametrize("values", [{}, {"metrics": {}}, {"metrics": {"test": 3}}])
def test_damaged_results_are_told(tmp_path, values):
    folder = started(tmp_path)
    folder.results.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"results.json: not a results file"):
        folder.read_results()


def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder(tmp_path / "absent").require()
    with pytest.raises(UserError, match=r"not a run folder, it has no config.json"):
        RunFolder(tmp_path).require()


def test_paths_are_absolute_from_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("run")
    monkeypatch.chdir("/")
    assert folder.path == tmp_path / "run"
    assert replace(small_config()).name == "small"
