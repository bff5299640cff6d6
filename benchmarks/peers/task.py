"""What both sides of a comparison are asked to do, and how a process reports on itself.

The standard library only: the peer's environment has nothing of jaxrec's.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """One training of SASRec and one ranking of all users."""

    interactions: str
    """CSV file with the columns user_id, item_id, order; by user, each in order."""
    width: int = 64
    blocks: int = 2
    heads: int = 1
    dropout: float = 0.2
    max_length: int = 200
    batch_size: int = 128
    learning_rate: float = 1e-3
    b2: float = 0.98
    """Adam's second moment; the peer's cannot be set."""
    epochs: int = 2
    steps: int = 0
    """Optimiser steps that count as an epoch; 0 for all."""
    k: int = 10
    rankings: int = 2
    """Rankings that are timed, after a first one."""
    threads: int = 2
    seed: int = 0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load_task(path: str) -> Task:
    """The task that `Task.save` wrote."""
    return Task(**json.loads(Path(path).read_text(encoding="utf-8")))


def describe_machine() -> str:
    """The device in words, as jaxrec's results files do for a CPU."""
    return f"cpu: {platform.machine()}, {os.cpu_count()} cores"


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_result(path: str, result: dict[str, Any]) -> None:
    """Writes a side's figures, and how its C library was told to take memory."""
    figures = result | {"malloc": os.environ.get("GLIBC_TUNABLES", "")}
    Path(path).write_text(json.dumps(figures) + "\n", encoding="utf-8")
