"""Training in a process of its own that sends itself a signal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from small_sets import base_dir, config_file

from jaxrec.training.config import Experiment

_SIGNAL = """
import os
from jaxrec.data.batches import TrainingBatches

original = TrainingBatches.__getitem__

def counting(self, index):
    if index == {at}:
        os.kill(os.getpid(), {number})
    return original(self, index)

TrainingBatches.__getitem__ = counting
"""


def _compiled_in(folder: Path) -> dict[str, str]:
    """A copy of what this process has compiled, for the child to read and write."""
    if (base_dir() / "compiled").is_dir():
        shutil.copytree(base_dir() / "compiled", folder, dirs_exist_ok=True)
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def train_in_child(
    config: Experiment, folder: Path, number: int, *, at: int
) -> "subprocess.CompletedProcess[str]":
    """`jaxrec train`, which gets a signal when the loader reads batch `at`."""
    then = _SIGNAL.format(at=at, number=int(number))
    path = config_file(folder.with_name("child.py"), config, then)
    return subprocess.run(
        [sys.executable, "-m", "jaxrec.cli.main", "train", str(path), "--out", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | _compiled_in(folder.with_name("compiled")),
        check=False,
    )
