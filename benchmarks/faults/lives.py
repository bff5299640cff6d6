"""Processes that train and are killed: `jaxrec train` again and again until it is done."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.training.run_folder import RunFolder

PHASES = ("start-up", "steps", "checkpoint", "validation", "evaluation")
_UNFINISHED = ".orbax-checkpoint-tmp"
_LOOK_SECONDS = 0.005
_LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Life:
    """One process.

    Attributes:
      killed: by us; False where it ended first.
      phase: what it was doing when it was killed.
      seconds: from start to end.
      first_line_at: seconds to its first line of progress; None where none came.
      writing_seconds: how long checkpoints were being written, a median.
      judged_at: seconds to the end of the last validation; None where that was not reached.
    """

    killed: bool
    phase: str
    seconds: float
    first_line_at: float | None
    writing_seconds: float
    judged_at: float | None


class Trainer:
    """`jaxrec train` of one config into one folder.

    Args:
      config: the config file.
      out: the run folder.
      compiled: what an earlier life compiled, so that a life is short. Every life gets a copy: it
        may be killed while it writes there.
      steps_per_epoch, epochs: of the training, to tell its phases apart.
      checkpoint_every: steps between checkpoints.
      start_up: seconds that a process needs before it trains.

    Attributes:
      run: the run folder.
      log: what the latest process told.
      compiled_here: what it compiled and was given.
      now_writing: whether it was writing a checkpoint when it was last looked at.
    """

    def __init__(
        self,
        config: Path,
        out: Path,
        compiled: Path,
        *,
        steps_per_epoch: int,
        epochs: int,
        checkpoint_every: int,
        start_up: float = 0.0,
    ) -> None:
        self.run = RunFolder(out)
        self.log = out.with_name(f"{out.name}.log")
        self.compiled_here = out.with_name(f"{out.name}.compiled")
        self.checkpoint_every = checkpoint_every
        self.now_writing = False
        self._command = [sys.executable, "-m", "jaxrec.cli.main", "train", str(config)]
        self._command += ["--out", str(out)]
        self._compiled = compiled
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._start_up = start_up
        self._points: list[dict[str, Any]] = []
        self._read_at: tuple[int, int] | None = None

    def live(self, when: "Callable[[Trainer, float], bool] | None" = None) -> Life:
        """Runs the command; kills it as soon as `when(self, seconds)` says so.

        Raises:
          RuntimeError: the command failed by itself, or does not end.
        """
        shutil.rmtree(self.compiled_here, ignore_errors=True)
        if self._compiled.is_dir():
            shutil.copytree(self._compiled, self.compiled_here)
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled_here),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        # Those of an earlier life that was killed meanwhile are still there.
        before = self.unfinished()
        writing = _Stopwatch()
        first_line_at = judged_at = None
        finished_before = self._judged()
        with self.log.open("wb") as log:
            start = time.perf_counter()
            child = subprocess.Popen(
                self._command, stdout=subprocess.DEVNULL, stderr=log, env=environment
            )
            killed = False
            try:
                while child.poll() is None:
                    now = time.perf_counter() - start
                    if now > _LIMIT_SECONDS:
                        raise RuntimeError(f"{self.run.path}: no end after {now:.0f} s")
                    self.now_writing = bool(self.unfinished() - before)
                    writing.look(self.now_writing, now)
                    if first_line_at is None and self.log.stat().st_size:
                        first_line_at = now
                    if judged_at is None and self._judged():
                        judged_at = now
                    if when is not None and when(self, now):
                        child.send_signal(signal.SIGKILL)
                        killed = child.wait() == -signal.SIGKILL
                        break
                    time.sleep(_LOOK_SECONDS)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
            seconds = time.perf_counter() - start
        if not killed and child.returncode != 0:
            told = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.run.path}: {told[-1] if told else child.returncode}")
        # A run that has been trained already says nothing before it is judged.
        begun = seconds > self._start_up if finished_before else bool(self.log.stat().st_size)
        phase = self._phase(before, begun)
        return Life(killed, phase, seconds, first_line_at, writing.median(), judged_at)

    def unfinished(self) -> set[tuple[str, int]]:
        """Checkpoints that are being written, or were when a process was killed.

        By name and number on disk: the same step is written again when training goes on.
        """
        try:
            entries = list(os.scandir(self.run.checkpoints))
        except FileNotFoundError:
            return set()
        return {(e.name, e.inode()) for e in entries if _UNFINISHED in e.name}

    def points(self) -> list[dict[str, Any]]:
        """The curve as far as it is written."""
        try:
            status = self.run.metrics.stat()
        except FileNotFoundError:
            return []
        if (read_at := (status.st_size, status.st_mtime_ns)) != self._read_at:
            self._points, self._read_at = self.run.read_metrics(), read_at
        return self._points

    def validating(self) -> bool:
        """Whether an epoch's last step is done, and its validation is not."""
        points = self.points()
        return (
            bool(points)
            and "loss" in points[-1]
            and points[-1]["step"] % self._steps_per_epoch == 0
        )

    def judging(self) -> bool:
        """Whether training has ended, and its results are not there."""
        return self._judged() and not self.now_writing and not self.run.results.is_file()

    def _judged(self) -> bool:
        points = self.points()
        return bool(points) and "validation" in points[-1] and points[-1]["epoch"] == self._epochs

    def _phase(self, before: set[tuple[str, int]], begun: bool) -> str:
        """From what is on disk when the process is dead."""
        if self.unfinished() - before:
            return "checkpoint"
        if not begun:
            return "start-up"
        if self._judged():
            return "evaluation"
        return "validation" if self.validating() else "steps"


class _Stopwatch:
    """How long something lasts that is looked at again and again."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._lasted: list[float] = []

    def look(self, active: bool, now: float) -> None:
        if active and self._since is None:
            self._since = now
        elif not active and self._since is not None:
            self._lasted.append(now - self._since)
            self._since = None

    def median(self) -> float:
        return float(np.median(self._lasted)) if self._lasted else 0.0


When = Callable[[Trainer, float], bool]


def at(moment: float) -> When:
    """So many seconds after the start."""
    return lambda _, now: now >= moment


def after(begins: Callable[[Trainer], bool], count: int, delay: float) -> When:
    """`delay` seconds after the `count`-th time that something begins."""
    seen, active, since = 0, False, 0.0

    def when(trainer: Trainer, now: float) -> bool:
        nonlocal seen, active, since
        begun = begins(trainer)
        if begun and not active and seen < count:
            seen, since = seen + 1, now
        active = begun
        return seen >= count and now - since >= delay

    return when
