"""The comparison with RecTools, all but RecTools: its figures come from a made-up file."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_sets

from benchmarks import peer_rectools
from benchmarks.peak_memory import peak_bytes
from benchmarks.peer_rectools import Arguments, described, limited_to, main, make_task
from benchmarks.peers import environment
from benchmarks.peers.comparison import compare, table
from benchmarks.peers.interactions import read_interactions, write_interactions
from benchmarks.peers.task import Task, describe_machine, load_task
from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError


def side(epochs: list[float], rankings: list[float], peak: int, **versions: str) -> dict[str, Any]:
    return {
        "training": {"epoch_seconds": epochs, "steps_per_epoch": 4, "peak_bytes": peak},
        "ranking": {"first_seconds": 9.0, "seconds": rankings},
        "versions": versions,
        "load_average_before": [0.5, 0.5, 0.5],
    }


def arguments(**changes: Any) -> Arguments:
    given = {"data": str(small_sets.shop().path), "max_length": 10, "own_epochs": 2, "rankings": 1}
    return Arguments(**{**given, **changes})


@pytest.fixture
def peer_file(tmp_path: Path) -> Path:
    """A results file as an earlier run on this machine would have written it."""
    data = write_interactions(small_sets.shop(), tmp_path / "events.csv")
    figures = {
        "data": data,
        "task": described(make_task(arguments(), Path())),
        "device": describe_machine(),
        "peer": side([40.0, 60.0], [1.0, 3.0], 1 << 40, rectools="0.19.0", torch="2.13.0"),
    }
    path = tmp_path / "peer.json"
    path.write_text(json.dumps(figures))
    return path


def test_ratios_are_the_peers_medians_over_ours() -> None:
    found = compare(side([3.0, 1.0, 2.0], [0.5], 1 << 30), side([8.0, 12.0], [2.0], 3 << 30))
    assert found["epoch_seconds"] == {"jaxrec": 2.0, "peer": 10.0, "ratio": 5.0}
    assert found["ranking_seconds"]["ratio"] == 4.0
    assert found["training_peak_bytes"]["ratio"] == 3.0
    lines = table(found, peer="Peer", steps=48, users=1234).splitlines()
    assert lines[2] == "| an epoch (48 steps), s | 2.00 | 10.00 | 5.00 |"
    assert lines[4] == "| peak memory of training, GiB | 1.00 | 3.00 | 3.00 |"


def test_both_sides_read_the_training_part_in_order(tmp_path: Path) -> None:
    shop = small_sets.shop()
    counts = write_interactions(shop, tmp_path / "events.csv", users=7)
    items, starts, stops, num_items = read_interactions(str(tmp_path / "events.csv"))
    train = leave_one_out(shop).train
    assert counts == {
        "name": "shop",
        "hash": shop.hash,
        "users": 7,
        "items": num_items,
        "events": len(items),
    }
    ranges = [slice(train.starts[user], train.stops[user]) for user in range(7)]
    known = np.unique(np.concatenate([shop.items[events] for events in ranges]))
    assert stops[-1] == len(items)
    for start, stop, events in zip(starts, stops, ranges, strict=True):
        np.testing.assert_array_equal(known[items[start:stop]], shop.items[events])


def test_a_task_survives_its_file(tmp_path: Path) -> None:
    task = Task("events.csv", steps=3, dropout=0.1)
    task.save(tmp_path / "task.json")
    assert load_task(str(tmp_path / "task.json")) == task


def test_a_run_beside_kept_figures(
    peer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "results.json"
    assert main(arguments(skip_peer=peer_file, json=target)) == 0
    out = capsys.readouterr().out
    figures = json.loads(target.read_text())
    ours = figures["jaxrec"]
    assert len(ours["training"]["epoch_seconds"]) == 2
    assert len(ours["ranking"]["seconds"]) == 1
    # Ten items a user, fewer where fewer are unseen.
    train = leave_one_out(small_sets.shop()).train
    assert ours["ranking"]["recommendations"] == sum(
        min(10, figures["data"]["items"] - len(np.unique(small_sets.shop().items[a:b])))
        for a, b in zip(train.starts, train.stops, strict=True)
    )
    assert ours["training"]["first_step_seconds"] > max(ours["training"]["epoch_seconds"])
    assert np.isfinite(ours["training"]["loss"])
    assert ours["training"]["peak_bytes"] > 1 << 26
    epoch = figures["comparison"]["epoch_seconds"]
    assert epoch["peer"] == 50.0
    assert epoch["ratio"] == pytest.approx(50.0 / np.median(ours["training"]["epoch_seconds"]))
    assert figures["peer"]["measured"] == "in an earlier run"
    assert str(tmp_path) not in target.read_text()
    assert "| RecTools / jaxrec |" in out
    assert "load average before" in out


@pytest.mark.parametrize(
    ("changes", "name"), [({"max_length": 9}, "max_length"), ({"users": 7}, "data")]
)
def test_figures_of_another_task_are_refused(
    peer_file: Path, changes: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(skip_peer=peer_file, **changes)) == 2
    error = capsys.readouterr().err
    assert f"measured with {name}" in error
    assert error.count("\n") == 1


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("[]")
    assert main(arguments(skip_peer=tmp_path / "other.json")) == 2
    assert "no results file of this benchmark" in capsys.readouterr().err


def test_results_without_a_folder_are_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(json=tmp_path / "none" / "results.json")) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exit code 1: FileNotFoundError"):
        peer_rectools.run_side(
            sys.executable, "benchmarks.peers.jaxrec_sasrec", Task(str(tmp_path / "no")), tmp_path
        )


def fake_environment(folder: Path, pip: str) -> None:
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{pip}\n")
    python.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="the made-up interpreter is a shell script")
def test_what_pip_says_becomes_one_line(tmp_path: Path) -> None:
    fake_environment(tmp_path, "echo Collecting; echo ERROR: No match for torch; exit 1")
    with pytest.raises(UserError, match=r"could not install torch==0: No match for torch; .*log$"):
        environment.prepare_environment(tmp_path, [["torch==0"]])
    assert "Collecting" in (tmp_path / "pip.log").read_text()


@pytest.mark.skipif(os.name == "nt", reason="the made-up interpreter is a shell script")
def test_an_environment_is_made_once(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    fake_environment(tmp_path / "env", f'echo "$@" >> {calls}')
    for wanted in ("a==1", "a==1", "a==2"):
        environment.prepare_environment(tmp_path / "env", [[wanted], ["b"]])
    lines = [
        line.removeprefix("-m pip install --no-input ") for line in calls.read_text().splitlines()
    ]
    assert lines == ["a==1", "b", "a==2", "b"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="neither empty nor a virtual environment"):
        environment.prepare_environment(tmp_path, [["a"]])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no such call")
def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    with limited_to(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_bytes()
    held = np.ones(max(1 << 27, before) // 8 + (1 << 24))
    assert peak_bytes() >= held.nbytes
