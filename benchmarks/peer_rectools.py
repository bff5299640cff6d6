"""SASRec with full cross-entropy: jaxrec beside RecTools, on one machine in one run.

    python -m benchmarks.peer_rectools --data movielens-1m --json FILE
    python -m benchmarks.peer_rectools --data amazon-2014-beauty --max-length 50
    python -m benchmarks.peer_rectools --data generated --users 500 --epochs 1    # a try

RecTools gets a virtual environment of its own, made by pip the first time and kept. Both sides read
the same file of leave-one-out training events and train the same model for whole epochs without
validation, on the CPU, each in a process of its own and one after the other; then each ranks the
whole catalogue for all users, seen items left out. See docs/benchmarks.md.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.peers.comparison import compare, table
from benchmarks.peers.environment import default_folder, prepare_environment
from benchmarks.peers.interactions import write_interactions
from benchmarks.peers.task import Task, describe_machine
from jaxrec.cli.huge_pages import environment_for_huge_pages
from jaxrec.errors import UserError
from jaxrec.training.config import DataConfig
from jaxrec.training.setup import open_data

ROOT = Path(__file__).resolve().parent.parent
PEER = "RecTools"
TORCH = "torch==2.13.0"
RECTOOLS = "rectools[torch]==0.19.0"
# What may differ between this run and the one that a peer's figures are taken from.
_FREE = ("interactions", "epochs", "rankings")


@dataclass(frozen=True)
class Arguments:
    """Compare an epoch, a ranking of all users, and memory with RecTools'."""

    data: str = "movielens-1m"
    """A prepared set; `generated` is made where it is missing."""
    max_length: int | None = None
    """Events of a sequence; none for 200 with MovieLens and 50 with anything else."""
    epochs: int = 2
    """Epochs that RecTools trains."""
    own_epochs: int = 4
    """Epochs that jaxrec trains, after the step that compiles."""
    rankings: int = 2
    """Rankings of all users that are timed, after a first one."""
    threads: int = 2
    """Cores that either side may use."""
    steps: int = 0
    """Only so many optimiser steps an epoch, for a try; 0 for all."""
    users: int = 0
    """Only the first so many users and their items, for a try; 0 for all."""
    environment: Path | None = None
    """Folder of RecTools' virtual environment; none for one in the cache."""
    torch_index: str | None = None
    """Package index to install PyTorch from, such as the one with CPU builds; none for pip's."""
    peer_huge_pages: bool = False
    """Give RecTools' process memory in huge pages, as `jaxrec train` gives it to itself."""
    skip_peer: Path | None = None
    """Take RecTools' figures from this results file instead of measuring them again."""
    json: Path | None = None
    """Write all figures here."""


def make_task(arguments: Arguments, interactions: Path) -> Task:
    """What both sides are asked to do."""
    length = arguments.max_length or (200 if arguments.data.startswith("movielens") else 50)
    return Task(
        interactions=str(interactions),
        max_length=length,
        epochs=arguments.epochs,
        steps=arguments.steps,
        rankings=arguments.rankings,
        threads=arguments.threads,
    )


@contextmanager
def limited_to(cores: int) -> Iterator[None]:
    """Processes started inside run on so many cores at most, where the system can say so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_side(
    python: str | Path,
    module: str,
    task: Task,
    folder: Path,
    given_environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Runs one side in a process of its own; returns its figures, the load before it among them."""
    load = os.getloadavg()
    print(f"{module.rpartition('.')[2]}: load average before {load[0]:.2f}", flush=True)
    given, result = folder / "task.json", folder / f"{module}.json"
    task.save(given)
    threads = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {
        **given_environment,
        **threads,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(python), "-m", module, str(given), str(result)]
    with limited_to(task.threads):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode != 0 or not result.is_file():
        words = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{module} ended with exit code {done.returncode}: {words[-1]}")
    figures: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return figures | {"load_average_before": load}


def kept_peer(path: Path, task: Task, data: dict[str, Any]) -> dict[str, Any]:
    """The peer's part of a results file.

    Raises:
      UserError: where it cannot be read, or was measured on another task, data set or device.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        peer, then = kept["peer"], {"data": kept["data"], "device": kept["device"], **kept["task"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no results file of this benchmark ({error})") from error
    now = {"data": data, "device": describe_machine(), **described(task)}
    for name, value in now.items():
        if name not in _FREE and then.get(name) != value:
            raise UserError(
                f"{path}: measured with {name} {then.get(name)}, this run has {value}; "
                "measure the peer again"
            )
    figures: dict[str, Any] = peer
    return figures | {"measured": "in an earlier run"}


def described(task: Task) -> dict[str, Any]:
    """The task without the path of a file that is soon gone."""
    return {name: value for name, value in asdict(task).items() if name != "interactions"}


def peer_python(arguments: Arguments) -> Path:
    """The interpreter of RecTools' environment, which is made where it is missing."""
    index = ["--index-url", arguments.torch_index] if arguments.torch_index else []
    folder = arguments.environment or default_folder("rectools-0.19.0")
    return prepare_environment(folder.absolute(), [[TORCH, *index], [RECTOOLS]])


def measure(arguments: Arguments) -> dict[str, Any]:
    """All figures of one run; what can go wrong at once comes first."""
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"{arguments.json}: there is no such folder to write the results to")
    with tempfile.TemporaryDirectory(prefix="jaxrec-peer-") as name:
        folder = Path(name)
        task = make_task(arguments, folder / "interactions.csv")
        interactions = open_data(DataConfig(name=arguments.data))
        data = write_interactions(interactions, Path(task.interactions), arguments.users)
        kept = arguments.skip_peer and kept_peer(arguments.skip_peer, task, data)
        python = None if kept else peer_python(arguments)
        own_task = replace(task, epochs=arguments.own_epochs)
        ours = run_side(sys.executable, "benchmarks.peers.jaxrec_sasrec", own_task, folder)
        huge = environment_for_huge_pages(os.environ) if arguments.peer_huge_pages else None
        peer = kept or run_side(
            python, "benchmarks.peers.rectools_sasrec", task, folder, huge or os.environ
        )
    return {
        "benchmark": "peer_rectools",
        "data": data,
        "task": described(task),
        "jaxrec": ours,
        "peer": peer,
        "comparison": compare(ours, peer),
        "device": describe_machine(),
    }


def report(figures: dict[str, Any]) -> str:
    """What is printed at the end."""
    data, ours, peer = figures["data"], figures["jaxrec"], figures["peer"]
    versions = ours["versions"], peer["versions"]
    lines = [
        f"{data['name']}: {data['users']:,} users, {data['items']:,} items, "
        f"{data['events']:,} training events, sequences of {figures['task']['max_length']}; "
        f"{figures['device']}",
        f"JAX {versions[0].get('jax')}; {PEER} {versions[1].get('rectools')}, "
        f"PyTorch {versions[1].get('torch')}"
        + (f", {peer['measured']}" if "measured" in peer else ""),
        f"load average before: jaxrec {ours['load_average_before'][0]:.2f}, "
        f"{PEER} {peer['load_average_before'][0]:.2f}",
        "",
        table(
            figures["comparison"],
            peer=PEER,
            steps=ours["training"]["steps_per_epoch"],
            users=data["users"],
        ),
        "",
        f"apart from that: jaxrec's first step, which compiles, "
        f"{ours['training']['first_step_seconds']:.1f} s; the first ranking "
        f"{ours['ranking']['first_seconds']:.1f} s (jaxrec, which compiles), "
        f"{peer['ranking']['first_seconds']:.1f} s ({PEER})",
    ]
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
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
