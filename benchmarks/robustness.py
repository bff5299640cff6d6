"""A training that is killed, and one whose files are spoiled: does it end as if nothing had been?

    python -m benchmarks.robustness --json FILE
    python -m benchmarks.robustness --kills 2 --damages 10      # a try, in two minutes

Trains a small generated set without interruption. Then the same command again and again, ended by
kill -9 at seeded moments of the whole life of the process (some of them aimed at the writing of
checkpoints, at validation, at the evaluation in the end) and started again until it is done:
curves, parameters, optimiser state, data position and results must be those of the uninterrupted
run, bit for bit. Then damage to every file of the prepared set and of the newest checkpoint, one at
a time: it must be refused in one line, or passed over for the checkpoint before, in so many words,
with the same end. What is not noticed must be without effect, for a reason that is known. The exit
code is 1 where anything else comes about. See docs/benchmarks.md.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.faults.ending import ending
from benchmarks.faults.kills import Whole, kill_and_compare
from benchmarks.faults.lives import Trainer
from benchmarks.faults.task import experiment, make_data, shorter, write_config
from benchmarks.faults.trials import Scene, run_trials
from jaxrec._fit import fit
from jaxrec.data.prepared import open_prepared
from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError
from jaxrec.training.results import describe_device, versions
from jaxrec.training.setup import training_batches


@dataclass(frozen=True)
class Arguments:
    """Kill a training and spoil its files; every end is compared with the uninterrupted one's."""

    kills: int = 20
    """How often the training is killed."""
    damages: int = 100
    """How many files are spoiled, one at a time; 0 for every kind of damage to every file."""
    epochs: int = 5
    """Of the training that is killed."""
    seed: int = 0
    """Of the moments and of the damage."""
    json: Path | None = None
    """Write the figures here."""


def tell(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


def uninterrupted(trainer: Trainer) -> Whole:
    """Trains in one life, without what an earlier one compiled."""
    life = trainer.live()
    points = trainer.points()
    seconds = [p["validation_seconds"] for p in points if "validation" in p]
    # The first one compiles.
    later = seconds[1:] or seconds
    return Whole(
        life,
        ending(trainer.run.path),
        validation_seconds=sum(later) / len(later),
        checkpoints=max(1, points[-1]["step"] // trainer.checkpoint_every),
    )


def measure(arguments: Arguments) -> dict[str, Any]:
    """All figures of one run."""
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"{arguments.json}: there is no such folder to write the results to")
    with tempfile.TemporaryDirectory(prefix="jaxrec-robustness-") as name:
        folder = Path(name)
        data = make_data(folder / "data")
        config = experiment(data, epochs=arguments.epochs)
        interactions = open_prepared(data)
        split = leave_one_out(interactions)
        steps = training_batches(config, interactions, split).batches_per_epoch
        compiled = folder / "compiled"
        file = write_config(folder / "robustness.py", config)

        def make(out: Path, start_up: float = 0.0) -> Trainer:
            return Trainer(
                file,
                out,
                compiled,
                steps_per_epoch=steps,
                epochs=arguments.epochs,
                checkpoint_every=config.training.checkpoint_every,
                start_up=start_up,
            )

        # The first one compiles, the second one is what the lives to come are like.
        trainer = make(folder / "first")
        first = uninterrupted(trainer)
        trainer.compiled_here.rename(compiled)
        whole = uninterrupted(make(folder / "whole"))
        tell(
            f"uninterrupted: {first.life.seconds:.1f} s, with what it compiled "
            f"{whole.life.seconds:.1f} s; {steps} steps an epoch, {arguments.epochs} epochs"
        )
        start_up = whole.life.first_line_at or 0.0
        killed = kill_and_compare(
            lambda out: make(out, start_up),
            folder,
            whole,
            kills=arguments.kills,
            seed=arguments.seed,
            tell=tell,
        )
        with compiled_programs(compiled):
            damaged = spoil_and_compare(arguments, folder, data)
    return {
        "benchmark": "robustness",
        "task": {
            "users": interactions.num_users,
            "items": interactions.num_items,
            "events": interactions.num_events,
            "epochs": arguments.epochs,
            "steps_per_epoch": steps,
            "checkpoint_every": config.training.checkpoint_every,
            "model": asdict(config.model),
        },
        "seed": arguments.seed,
        "uninterrupted": {
            "seconds": whole.life.seconds,
            "first_line_seconds": start_up,
            "seconds_with_compilation": first.life.seconds,
            "checkpoint_seconds": whole.life.writing_seconds,
            "validation_seconds": whole.validation_seconds,
            "same_twice": first.end == whole.end,
        },
        "kills": killed,
        "damages": damaged,
        "load_average": os.getloadavg()[0],
        "device": describe_device(),
        "versions": versions(),
    }


def spoil_and_compare(arguments: Arguments, folder: Path, data: Path) -> dict[str, Any]:
    """The trials, on a training of two epochs that ended after one."""
    config = experiment(data, epochs=2)
    fit(config, folder / "two", show_progress=False)
    fit(shorter(config, 1), folder / "one", show_progress=False)
    whole_data = data.rename(folder / "whole-data")
    scene = Scene(
        config,
        ending(folder / "two"),
        data=(whole_data, data),
        other_data=make_data(folder / "other", seed=1),
        begun=folder / "one",
        folder=folder,
    )
    return run_trials(scene, arguments.damages, seed=arguments.seed, tell=tell)


@contextmanager
def compiled_programs(folder: Path) -> Iterator[None]:
    """Programs are taken from a folder, and what is compiled goes there."""
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def failures(figures: dict[str, Any]) -> list[str]:
    """What must not have come about, a line each."""
    found = []
    if not figures["uninterrupted"]["same_twice"]:
        found.append("two uninterrupted runs differ")
    found += [f"killed runs differ in {what}" for what in figures["kills"]["differences"]]
    found += [
        f"{trial['group']}, {trial['file']}, {trial['kind']}: {trial['told']}"
        for trial in figures["damages"]["each"]
        if trial["outcome"] == "undetected"
    ]
    return found


def report(figures: dict[str, Any]) -> str:
    """What is printed at the end."""
    kills, damages = figures["kills"], figures["damages"]
    phases = ", ".join(f"{n} in {phase}" for phase, n in kills["by_phase"].items())
    lines = [
        f"{figures['device']}; JAX {figures['versions']['jax']}",
        f"{kills['kills']} kills ({phases}), {kills['processes']} processes, {kills['runs']} runs",
        f"{damages['count']} damages:",
    ]
    for group, outcomes in damages["by_outcome"].items():
        counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
        lines.append(f"  {group}: {counts}")
    lines += [f"FAILED: {line}" for line in failures(figures)]
    if not failures(figures):
        lines.append("every run ended bitwise as the uninterrupted one")
    return "\n".join(lines)


def main(arguments: Arguments) -> int:
    try:
        figures = measure(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if failures(figures) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
