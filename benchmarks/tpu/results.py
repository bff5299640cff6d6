"""The results file of `benchmarks.tpu_aot`, which several runs may fill: each takes long."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.cases import cases
from benchmarks.tpu.chips import CHIPS
from jaxrec.errors import UserError
from jaxrec.training.results import versions

NOTE = "compiler schedules, not timings: no TPU ran"
# What the figures of a row depend on.
_OP_KEY = ("op", "shape", "direction", "dtype", "chip")
_STEP_KEY = ("model", "loss", "items", "mesh", "dtype", "chip")
# Figures of different ones do not belong in one file.
_COMPILER = ("jax", "libtpu")


class Results:
    """Rows of ops and of train steps; of a row measured again the last counts.

    Ops and their shapes are written in the order of `benchmarks.cases`, whatever order they were
    measured in.

    Args:
      path: written after every row, and continued if it is there; None to write nothing.

    Raises:
      UserError: the file is there and is no such file, or was made by another compiler.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._versions = _with_libtpu(versions())
        self._rows: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            self._continue(path)

    def _continue(self, path: Path) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            made_by, self._rows = before["versions"], before["rows"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--json {path}: not a results file of tpu_aot") from None
        self._steps = before.get("train_steps", [])
        for name in _COMPILER:
            if made_by.get(name) != self._versions.get(name):
                raise UserError(
                    f"--json {path}: made by {name} {made_by.get(name)}, here is "
                    f"{self._versions.get(name)}; give another file"
                )

    def op_row(self, **of: Any) -> dict[str, Any] | None:
        """The row of this op, shape, direction, dtype and chip, where there is one."""
        return next((row for row in self._rows if _key(row, _OP_KEY) == _key(of, _OP_KEY)), None)

    def add_op(self, row: dict[str, Any]) -> None:
        _replace(self._rows, row, _OP_KEY)
        self._rows.sort(key=_place)
        self._write()

    def add_step(self, row: dict[str, Any]) -> None:
        _replace(self._steps, row, _STEP_KEY)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        report = {
            "benchmark": "tpu_aot",
            "note": NOTE,
            "versions": self._versions,
            "rows": self._rows,
            **({"train_steps": self._steps} if self._steps else {}),
        }
        self._path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _replace(rows: list[dict[str, Any]], row: dict[str, Any], names: tuple[str, ...]) -> None:
    rows[:] = [other for other in rows if _key(other, names) != _key(row, names)] + [row]


def _key(row: dict[str, Any], names: tuple[str, ...]) -> str:
    # As text: a tuple comes back from JSON as a list.
    return json.dumps([row[name] for name in names])


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    """Where a row of an op stands in the file."""
    order = [(case.op, case.shape, case.direction) for case in cases()]
    of = row["op"], row["shape"], row["direction"]
    # Of a shape that had this name once: behind all others.
    place = order.index(of) if of in order else len(order)
    return place, list(CHIPS).index(row["chip"]), row["dtype"] != "bfloat16"


def _with_libtpu(found: dict[str, str]) -> dict[str, str]:
    try:
        return found | {"libtpu": version("libtpu")}
    except PackageNotFoundError:
        return found
