"""One run of the study: where it lies, whether it is there already, and its values by user."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from experiments.positions.arms import Arm
from jaxrec._files import replacing
from jaxrec._json_files import read_json
from jaxrec.errors import UserError
from jaxrec.serving.run import Run
from jaxrec.training.config import Experiment, from_dict
from jaxrec.training.results import results_name
from jaxrec.training.run_folder import RunFolder

# Judged on the test part: by user the first two, for all lists together the last.
BY_USER = ("hr@10", "ndcg@10")
METRICS = (*BY_USER, "coverage@10")
# What decides no number: how a run is watched, fed, judged with an interval, or called.
_FREE = {
    "data": ("name", "prefetch"),
    "training": ("log_every", "checkpoint_every", "tensorboard"),
    "evaluation": ("batch_size", "level", "resamples"),
}
# A checkpoint judged again may differ in the last bits of a tie.
_SAME = 2e-4


class Cell(NamedTuple):
    """An arm on a data set with a seed."""

    arm: Arm
    dataset: str
    data_hash: str
    config: Experiment

    @property
    def seed(self) -> int:
        return self.config.training.seed

    def __str__(self) -> str:
        return f"{self.dataset} {self.arm.name} seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """The run folder under the study's."""
        return out / self.dataset / f"{self.arm.name}-seed{self.seed}"

    def values_file(self, results: Path) -> Path:
        """Where its values by user are: with the results files, so that a study can go on, and be
        compared in pairs, where its run folders are not."""
        name = f"{self.dataset}-{self.arm.name}-seed{self.seed}.npz"
        return results / "positions" / "values" / name

    def matches(self, config: dict[str, Any], data_hash: str) -> bool:
        """Whether a run of `config` (as JSON has it) on these data is this one."""
        try:
            found = from_dict(config, "a results file")
        except UserError:
            return False
        return data_hash == self.data_hash and _deciding(found) == _deciding(self.config)


class Values(NamedTuple):
    """Test metrics of every list, and whose list it is."""

    users: NDArray[np.int32]
    by_metric: dict[str, NDArray[np.float64]]


def finished(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The results of the run in a folder, if it is this one and has ended."""
    run = RunFolder(folder)
    if not run.exists():
        return None
    results = run.read_results()
    if results is None or not cell.matches(results["config"], results["data_hash"]):
        return None
    return results


def find_run(cell: Cell, out: Path, reuse: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    """A finished run of this cell: the study's own, or one in a folder of runs to be used again."""
    others = [folder for parent in reuse for folder in sorted(parent.iterdir()) if folder.is_dir()]
    for folder in (cell.folder(out), *others):
        try:
            results = finished(cell, folder)
        except UserError:
            continue
        if results is not None:
            return folder, results
    return None


def results_folder(cell: Cell, results: Path) -> Path:
    """Where its results file belongs: with the configs' own, or with the study's other arms."""
    own_config = Path(__file__).resolve().parent.parent / f"{cell.config.name}.py"
    return results if own_config.is_file() else results / "positions"


def find_results(cell: Cell, results: Path) -> dict[str, Any] | None:
    """The results file of this cell; None where there is none of the same config and data."""
    path = results_folder(cell, results) / results_name(cell.config, cell.dataset)
    if not path.is_file():
        return None
    found = dict(read_json(path))
    try:
        same = cell.matches(found["config"], found["data_hash"])
    except KeyError:
        same = False
    return found if same else None


def judge(cell: Cell, run: Run, path: Path) -> None:
    """Writes the values by user of a finished run.

    Raises:
      UserError: they are not those of its results file.
    """
    evaluation = run.evaluate("test").model
    told = (run.folder.read_results() or {"metrics": {"test": {}}})["metrics"]["test"]
    for metric in BY_USER:
        mean = float(evaluation.per_list[metric].mean())
        if abs(mean - told.get(metric, mean)) > _SAME:
            raise UserError(
                f"{run.folder.path}: {metric} is {mean:.4f}, its results file has "
                f"{told[metric]:.4f}; it was trained by other code, train it again"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            key=np.array(_key(cell)),
            users=np.asarray(evaluation.users, np.int32),
            **{metric: evaluation.per_list[metric] for metric in BY_USER},
        )


def read_values(cell: Cell, results: Path) -> Values | None:
    """The values by user; None where they are missing, damaged or of another config."""
    try:
        with cell.values_file(results).open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if str(file["key"]) != _key(cell):
                return None
            return Values(file["users"], {metric: file[metric] for metric in BY_USER})
    except (OSError, KeyError, ValueError, BadZipFile):
        return None


def _deciding(config: Experiment) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON."""
    # Not `to_dict`: of a config read from a file it has the fields that stood there.
    values = json.loads(json.dumps(asdict(config))) | {"type": config.model.type}
    for section, names in _FREE.items():
        for name in names:
            del values[section][name]
    del values["published"], values["name"], values["mesh"]
    return values


def _key(cell: Cell) -> str:
    text = json.dumps([_deciding(cell.config), cell.data_hash], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
