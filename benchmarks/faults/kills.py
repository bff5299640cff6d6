"""Kills at seeded moments of a training, until as many have been made as were asked for."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.ending import differences, ending
from benchmarks.faults.lives import PHASES, Life, Trainer, When, after, at

# Shares of the kills that are aimed at what a random moment would seldom meet.
_AIMED = {"checkpoint": 0.3, "validation": 0.15, "evaluation": 0.15}


@dataclass(frozen=True)
class Whole:
    """The uninterrupted training that the others are held against.

    Attributes:
      life: of its one process.
      end: what it came to (`ending`).
      validation_seconds: of one validation.
      checkpoints: how many it wrote.
    """

    life: Life
    end: dict[str, Any]
    validation_seconds: float
    checkpoints: int


def aims(kills: int, rng: np.random.Generator) -> list[str]:
    """What each kill is aimed at: a phase, or `anywhere`."""
    aimed = [phase for phase, share in _AIMED.items() for _ in range(round(share * kills))]
    aimed = aimed[:kills] + ["anywhere"] * (kills - len(aimed))
    return [aimed[i] for i in rng.permutation(kills)]


def moment(aim: str, whole: Whole, rng: np.random.Generator) -> When:
    """When to kill."""
    life = whole.life
    if aim == "checkpoint":
        count = int(rng.integers(1, 1 + max(1, whole.checkpoints // 3)))
        delay = float(rng.uniform(0, life.writing_seconds))
        return after(lambda trainer: trainer.now_writing, count, delay)
    if aim == "validation":
        return after(Trainer.validating, 1, float(rng.uniform(0, whole.validation_seconds)))
    if aim == "evaluation":
        judging = life.seconds - (life.judged_at or 0.0)
        return after(Trainer.judging, 1, float(rng.uniform(0, judging)))
    return at(float(rng.uniform(0, life.seconds)))


def kill_and_compare(
    make: Callable[[Path], Trainer],
    folder: Path,
    whole: Whole,
    *,
    kills: int,
    seed: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Trains again and again, killing; every run is brought to its end and compared.

    Args:
      make: a trainer into a folder.
      folder: for the runs.
      whole: the uninterrupted one.
      kills: how many.
      seed: of the moments.
      tell: takes a line of progress.

    Returns:
      Numbers of kills by phase and by aim, of runs, of processes, and what differed in the end.
    """
    rng = np.random.default_rng(seed)
    waiting = aims(kills, rng)
    phases: Counter[str] = Counter()
    done: list[dict[str, Any]] = []
    runs, lives, different = 0, 0, []
    while waiting:
        trainer = make(folder / f"killed-{runs}")
        runs += 1
        ended = False
        while not ended:
            aim = waiting[0] if waiting else None
            life = trainer.live(None if aim is None else moment(aim, whole, rng))
            lives += 1
            ended = not life.killed
            if aim is not None and life.killed:
                waiting.pop(0)
                phases[life.phase] += 1
                done.append({"aim": aim, "phase": life.phase, "seconds": round(life.seconds, 3)})
                tell(
                    f"kill {len(done)} of {kills}, aimed at {aim}: after {life.seconds:.1f} s, "
                    f"in {life.phase}"
                )
            elif waiting:
                # Too late for this aim: another has its turn first in the next run.
                waiting.append(waiting.pop(0))
        found = differences(whole.end, ending(trainer.run.path))
        tell(f"run {runs} ended: " + (f"differs in {found}" if found else "bitwise the same"))
        different += found
    return {
        "kills": kills,
        "by_phase": {phase: phases[phase] for phase in PHASES},
        "runs": runs,
        "processes": lives,
        "each": done,
        "differences": different,
    }
