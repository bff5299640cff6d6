"""Two processes with two virtual CPU devices each, connected by `jax.distributed`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from quick_compiler import QUICKEST, as_flags
from small_sets import base_dir

_SECONDS = 240


class Ended(NamedTuple):
    code: int
    output: str
    errors: str


class Pair:
    """Two running processes; what they print goes to files, so that neither waits for a reader."""

    def __init__(self, folder: Path, words: Callable[[int, str], list[str]]) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        self._folder = folder
        folder.mkdir()
        self.children = []
        for number in (0, 1):
            with (
                open(folder / f"output{number}", "wb") as output,
                open(folder / f"errors{number}", "wb") as errors,
            ):
                self.children.append(
                    subprocess.Popen(
                        [sys.executable, *words(number, coordinator)],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=errors,
                        env=os.environ | _environment(),
                    )
                )

    def wait(self) -> list[Ended]:
        """How both ended, within four minutes."""
        until = time.monotonic() + _SECONDS
        for child in self.children:
            child.wait(max(0.1, until - time.monotonic()))
        return [self.ended(number) for number in (0, 1)]

    def ended(self, number: int) -> Ended:
        code = self.children[number].poll()
        assert code is not None
        return Ended(code, self.read("output", number), self.read("errors", number))

    def read(self, what: str, number: int) -> str:
        return (self._folder / f"{what}{number}").read_text()


def _environment() -> dict[str, str]:
    return {
        # Compiling takes most of the time: as quickly as can be, and kept for the next pair.
        "XLA_FLAGS": " ".join(["--xla_force_host_platform_device_count=2", *as_flags(QUICKEST)]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(base_dir() / "compiled-by-pairs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@contextmanager
def pair(folder: Path, words: Callable[[int, str], list[str]]) -> Iterator[Pair]:
    """Starts both.

    Args:
      folder: made, for what they print.
      words: (number, coordinator's address) -> arguments of Python.
    """
    started = Pair(folder, words)
    try:
        yield started
    finally:
        for child in started.children:
            if child.poll() is None:
                child.kill()
            child.wait()
