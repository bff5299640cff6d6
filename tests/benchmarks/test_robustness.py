"""The robustness benchmark at a small count: real kills, and how its figures are judged."""

import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_sets import compiled_once, copy_of, small_config, trained_run

from benchmarks.faults import lives
from benchmarks.faults.ending import differences, ending
from benchmarks.faults.kills import Whole, aims, kill_and_compare
from benchmarks.faults.lives import Life, Trainer, after, at
from benchmarks.faults.task import write_config
from benchmarks.faults.trials import in_turn
from benchmarks.robustness import failures, report
from jaxrec._fit import fit

STEPS = 4


def test_ending_of_the_same_run_is_the_same_and_any_change_is_seen(tmp_path: Path) -> None:
    whole = ending(trained_run())
    assert differences(whole, ending(trained_run())) == []
    assert {"curves", "results", "steps", "loop", "position", "state"} == whole.keys()
    assert len(whole["state"]) > 40
    assert not any("seconds" in point for point in whole["curves"])
    other = copy_of(trained_run(), tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "12")
    curves = other / "metrics.jsonl"
    curves.write_text(curves.read_text().replace('"step": 3', '"step": 2'))
    results = other / "results.json"
    results.write_text(results.read_text().replace('"seed": 0', '"seed": 1'))
    found = differences(whole, ending(other))
    assert {"curves", "results", "steps", "loop", "position"} < set(found)
    assert sum(part.startswith("state") for part in found) > 20


def trainer(out: Path, config: Any, compiled: Path) -> Trainer:
    return Trainer(
        write_config(out.with_name("config.py"), config),
        out,
        compiled,
        steps_per_epoch=STEPS,
        epochs=config.training.epochs,
        checkpoint_every=config.training.checkpoint_every,
    )


@pytest.mark.slow
def test_killed_the_run_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kill while a checkpoint is written, one at any moment."""
    config = small_config(training__epochs=6, training__checkpoint_every=2)
    with compiled_once() as compiled:
        fit(config, tmp_path / "whole", show_progress=False)
    copy_of(compiled, tmp_path / "compiled")
    monkeypatch.setattr("benchmarks.faults.kills.aims", lambda *_: ["checkpoint", "anywhere"])
    whole = Whole(
        Life(False, "evaluation", 8.0, 4.0, 0.03, 7.0),
        ending(tmp_path / "whole"),
        validation_seconds=0.1,
        checkpoints=12,
    )
    told: list[str] = []
    found = kill_and_compare(
        lambda out: trainer(out, config, tmp_path / "compiled"),
        tmp_path,
        whole,
        kills=2,
        seed=0,
        tell=told.append,
    )
    assert found["differences"] == [], told
    assert found["kills"] == 2
    assert sum(found["by_phase"].values()) == 2
    assert found["processes"] >= 3
    assert found["by_phase"]["checkpoint"] + found["by_phase"]["steps"] >= 1


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    config = small_config(training__epochs=0)
    with pytest.raises(RuntimeError, match=r"training\.epochs must be positive"):
        trainer(tmp_path / "run", config, tmp_path / "none").live()


class Watched:
    """A trainer as the conditions see it: an event that comes and goes."""

    def __init__(self, states: str) -> None:
        self.states = states

    def begun(self, now: float) -> bool:
        return self.states[int(now)] == "x"


def first_kill(when: lives.When, watched: Watched) -> int | None:
    return next((i for i in range(len(watched.states)) if when(watched, i)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("states", "count", "delay", "wanted"),
    [("..x.x", 1, 0, 2), ("..xxx.x..", 2, 0, 6), ("x....", 1, 3, 3), ("xx..x", 3, 0, None)],
)
def test_kills_wait_for_what_they_are_aimed_at(
    states: str, count: int, delay: float, wanted: int | None
) -> None:
    watched, clock = Watched(states), itertools.count()
    when = after(lambda _: watched.begun(next(clock)), count, delay)
    assert first_kill(when, watched) == wanted
    assert first_kill(at(2.0), watched) == 2


def test_kills_are_spread_over_the_life() -> None:
    counts = Counter(aims(20, np.random.default_rng(0)))
    assert counts == {"checkpoint": 6, "validation": 3, "evaluation": 3, "anywhere": 8}
    assert sum(Counter(aims(1, np.random.default_rng(0))).values()) == 1


def test_the_first_trials_hold_every_file_and_kind() -> None:
    files, names = [f"f{i}" for i in range(8)], [f"k{i}" for i in range(5)]
    pairs = in_turn(files, names, np.random.default_rng(0))
    assert len(set(pairs)) == len(pairs) == 40
    counts = Counter(word for pair in pairs[:20] for word in pair)
    assert all(2 <= counts[file] <= 3 for file in files)
    assert all(3 <= counts[kind] <= 5 for kind in names)


def figures(**changes: Any) -> dict[str, Any]:
    trial = {"group": "data set", "file": "items.npy", "kind": "emptied", "told": "why"}
    found: dict[str, Any] = {
        "uninterrupted": {"same_twice": True},
        "kills": {
            "kills": 2,
            "by_phase": {"start-up": 1, "steps": 1},
            "runs": 1,
            "processes": 3,
            "differences": [],
        },
        "damages": {
            "count": 1,
            "by_outcome": {"data set": {"refused": 1}, "checkpoint": {}},
            "each": [trial | {"outcome": "refused"}],
        },
        "device": "cpu",
        "versions": {"jax": "0"},
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        found[part] = found[part] | {field: value}
    return found


def test_what_must_not_come_about_is_told() -> None:
    assert failures(figures()) == []
    assert report(figures()).endswith("every run ended bitwise as the uninterrupted one")
    undetected = [{**figures()["damages"]["each"][0], "outcome": "undetected"}]
    bad = figures(
        uninterrupted__same_twice=False,
        kills__differences=["curves"],
        damages__each=undetected,
    )
    assert failures(bad) == [
        "two uninterrupted runs differ",
        "killed runs differ in curves",
        "data set, items.npy, emptied: why",
    ]
    assert report(bad).splitlines()[-1] == "FAILED: data set, items.npy, emptied: why"


def test_the_line_of_results() -> None:
    from experiments.report import _robustness

    trials = {"refused": 3, "passed over": 0, "harmless": 1, "undetected": 0}
    others = {"refused": 0, "passed over": 4, "harmless": 0, "undetected": 0}
    found = figures(damages__by_outcome={"data set": trials, "checkpoint": others})
    assert _robustness(found) == (
        "`robustness`: 2 kills (1 in start-up, 1 in steps) over 1 runs, each ended bitwise as "
        "without kills; 1 damaged files of a set and of a checkpoint: 3 refused, 4 passed over for "
        "the checkpoint before, 1 without effect, 0 undetected; cpu"
    )
    found = figures(kills__differences=["curves"], damages__by_outcome={"a": trials, "b": others})
    assert "1 parts of them differ" in _robustness(found)
