"""The folder a run lives in.

RUN/
  config.json        the experiment, as trained (and jaxrec's version)
  data.json          data set: name, hash, counts, split
  items.parquet      item ids and titles by index: recommending needs no data set
  metrics.jsonl      the curves, one JSON object a line
  checkpoints/       best and last, by step
  results.json       the results file, when the run has ended
  tensorboard/       event files, if asked for
"""

import json
from pathlib import Path
from typing import Any

from jaxrec._json_files import read_json, write_json
from jaxrec.errors import UserError
from jaxrec.training.config import Experiment, check, from_dict, to_dict

FORMAT = 1

_DATA_FIELDS = {"name": str, "hash": str, "users": int, "items": int, "events": int}


class RunFolder:
    """Paths and JSON files of a run; creates nothing until told to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def items(self) -> Path:
        return self.path / "items.parquet"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def exists(self) -> bool:
        """Whether there is a run here; other tools, too, keep a config.json in their folders."""
        try:
            values = read_json(self.config)
        except UserError:
            # Damaged, perhaps: what else a run has tells whose it is.
            return self.config.is_file() and self.data.is_file() and self.items.is_file()
        return "format" in values and "experiment" in values

    def has_checkpoint(self) -> bool:
        """Whether there is anything to continue from."""
        return self.checkpoints.is_dir() and any(
            entry.name.isdigit() for entry in self.checkpoints.iterdir()
        )

    def require(self) -> None:
        """Raises UserError unless this is a run folder."""
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run folder")
        if not self.config.is_file():
            raise UserError(f"{self.path}: not a run folder, it has no config.json")

    def read_data(self) -> dict[str, Any]:
        """What data.json holds.

        Raises:
          UserError: no such file, or damaged.
        """
        values = read_json(self.data)
        for key, kind in _DATA_FIELDS.items():
            if not isinstance(values.get(key), kind):
                raise UserError(
                    f"{self.data}: {key} is {values.get(key)!r}, wanted {kind.__name__}; the file "
                    "is damaged"
                )
        return values

    def read_results(self) -> dict[str, Any] | None:
        """What results.json holds; None before the run has ended.

        Raises:
          UserError: the file is damaged.
        """
        if not self.results.is_file():
            return None
        values = read_json(self.results)
        metrics = values.get("metrics")
        if not isinstance(metrics, dict) or not isinstance(metrics.get("test"), dict):
            raise UserError(f"{self.results}: not a results file, it has no metrics of a test")
        return dict(values)

    def write_config(self, config: Experiment) -> None:
        import jaxrec

        values = {"format": FORMAT, "jaxrec": jaxrec.__version__, "experiment": to_dict(config)}
        write_json(self.config, values)

    def read_config(self) -> Experiment:
        """The experiment of this run.

        Raises:
          UserError: not a run folder, damaged JSON, a newer format, or a field that is wrong.
        """
        self.require()
        values = read_json(self.config)
        form = values.get("format")
        if not isinstance(form, int) or "experiment" not in values:
            raise UserError(f"{self.config}: not the config of a run")
        if form > FORMAT:
            raise UserError(
                f"{self.config}: written by a newer jaxrec ({values.get('jaxrec')}); upgrade"
            )
        return check(from_dict(values["experiment"], str(self.config)))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; an unfinished last line is left out."""
        if not self.metrics.is_file():
            return []
        lines = []
        with self.metrics.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    values = json.loads(line)
                except json.JSONDecodeError:
                    if line.endswith("\n"):
                        raise UserError(f"{self.metrics}, line {number}: not JSON") from None
                    continue
                if not _is_point(values):
                    raise UserError(f"{self.metrics}, line {number}: not a point of a curve")
                lines.append(values)
        return lines


def _is_point(values: Any) -> bool:
    return (
        isinstance(values, dict)
        and isinstance(values.get("step"), int)
        and isinstance(values.get("loss", 0.0), int | float)
        and isinstance(values.get("validation", {}), dict)
    )
