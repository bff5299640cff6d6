"""Where the numbers of a run go: JSON lines always, TensorBoard if asked."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxrec.errors import UserError


class Unwritten:
    """Only counts the lines: another process writes them.

    Args:
      keep: lines of an earlier session that stay.
    """

    def __init__(self, keep: int) -> None:
        self.lines = keep

    def write(self, values: dict[str, Any]) -> None:
        """One line; it has a `step`."""
        self.lines += 1

    def sync(self) -> None:
        """Until all lines are on disk."""


class Curves(Unwritten):
    """Appends to metrics.jsonl.

    Args:
      path: the file.
      keep: lines of an earlier session that stay; what a resumed run will write again is cut off.
      tensorboard: folder for event files, or none.
      first_step: the first step of this session, from which TensorBoard hides earlier sessions.

    Attributes:
      lost: how many lines fewer than `keep` there are, after a loss of power for example.

    Raises:
      UserError: tensorboardX is missing.
    """

    def __init__(
        self, path: Path, *, keep: int, tensorboard: Path | None = None, first_step: int = 0
    ) -> None:
        kept = _truncate(path, keep)
        super().__init__(kept)
        self.lost = keep - kept
        self._writer: Any = None
        if tensorboard is not None:
            self._writer = summary_writer()(str(tensorboard), purge_step=first_step or None)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """One line; it has a `step`."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        super().write(values)
        if self._writer is not None:
            for name, value in _scalars(values, ""):
                if name != "step":
                    self._writer.add_scalar(name, value, values["step"])

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Curves":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def summary_writer() -> Any:
    """tensorboardX's writer; raises UserError where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "training.tensorboard needs tensorboardX: pip install 'jaxrec[tensorboard]'"
        ) from None
    return SummaryWriter


def _truncate(path: Path, keep: int) -> int:
    """Leaves the first `keep` whole lines, or as many as there are; how many these are."""
    if not path.exists() and not keep:
        return 0
    path.touch()
    with path.open("rb+") as file:
        whole = 0
        for kept in range(keep):
            if not file.readline().endswith(b"\n"):
                file.truncate(whole)
                return kept
            whole = file.tell()
        file.truncate(whole)
    return keep


def _scalars(values: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    result: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            result += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            result.append((prefix + key, float(value)))
    return result
