"""`fit`: train, judge on the test part once, leave a results file."""

import json
from pathlib import Path

from jaxrec.errors import UserError
from jaxrec.evaluation.report import Report, as_json
from jaxrec.processes import agreed, first_says, stopping_together
from jaxrec.serving.run import Run
from jaxrec.training.config import Experiment, to_dict
from jaxrec.training.loop import train
from jaxrec.training.results import results, results_name
from jaxrec.training.run_folder import RunFolder, read_json, write_json


def fit(
    config: Experiment,
    out: str | Path,
    *,
    overwrite: bool = False,
    show_progress: bool | None = None,
    results_folder: str | Path | None = None,
) -> Run:
    """Trains an experiment and evaluates its best checkpoint on the test part.

    The checkpoint is judged on the mesh that it was trained on, which its table may need. In
    several processes `fit` is called by all, as `training.loop.train` says: all of them evaluate,
    each with its devices, and the first writes the results.

    Args:
      config: the experiment, for instance `Experiment(data=DataConfig(name="shop"))`.
      out: the run folder; an unfinished run of the same config is continued.
      overwrite: begin anew whatever is there.
      show_progress: False for silence.
      results_folder: also write the results file there, as `EXPERIMENT-DATASET-seedN.json`.

    Returns:
      The run, opened at its best checkpoint; `results.json` is in its folder.

    Raises:
      UserError: bad config or data, a folder with another run, a loss that is not finite.
      Interrupted: SIGTERM or Ctrl-C; the same call continues.
    """
    agreed(lambda: _make(results_folder))
    folder = train(config, out, overwrite=overwrite, show_progress=show_progress)
    with stopping_together():
        run = Run(folder.path, mesh=config.mesh)
        if first_says(lambda: not folder.results.is_file() or not _is_of(folder, run.config)):
            report = run.evaluate("test")
            agreed(lambda: _write(run, report))
        agreed(lambda: _copy(run, results_folder))
    return run


def _make(results_folder: str | Path | None) -> None:
    if results_folder is None:
        return
    try:
        Path(results_folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{results_folder}: cannot be made ({error.strerror})") from None


def _write(run: Run, report: Report) -> None:
    """Writes the results file."""
    points = [line for line in run.folder.read_metrics() if "validation" in line]
    validation: dict[str, float] = next(
        (p["validation"] for p in points if p["step"] == run.step), {}
    )
    values = results(
        run.config,
        dataset=run.interactions.name,
        data_hash=run.interactions.hash,
        metrics={"test": as_json(report), "validation": validation},
        step=run.step,
        epochs=points[-1]["epoch"] if points else 0,
        seconds=points[-1]["seconds"] if points else 0.0,
    )
    write_json(run.folder.results, values)


def _copy(run: Run, results_folder: str | Path | None) -> None:
    """Copies the results file to where it is asked for."""
    if results_folder is None:
        return
    copy = Path(results_folder) / results_name(run.config, run.interactions.name)
    try:
        write_json(copy, read_json(run.folder.results))
    except OSError as error:
        raise UserError(f"{copy}: cannot be written ({error.strerror})") from None


def _is_of(folder: RunFolder, config: Experiment) -> bool:
    """Whether what is told is as the config asks now: this may change after training."""
    told = read_json(folder.results).get("config", {})
    # As a file gives it back: with lists for tuples.
    asked = json.loads(json.dumps(to_dict(config)))
    return all(told.get(part) == asked[part] for part in ("evaluation", "published"))
