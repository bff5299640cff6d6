"""How position enters a recommender: the same SASRec with each scheme, compared in pairs.

    python -m experiments.position_study --data amazon-2014-beauty movielens-1m --out runs/positions
    python -m experiments.position_study --arms additive none kernel --seeds 0 1 2 3 4
    python -m experiments.position_study --only-report

Every arm is `experiments/sasrec.py` with one thing changed (`experiments/positions/arms.py`), and a
run folder an arm and seed. The same command goes on after a kill; what has ended is not trained
again. After every run the data set's study file is written anew, from which
`python -m experiments.report` makes its part of RESULTS.md. See docs/studies.md.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

import jaxrec
from experiments.positions.arms import ARMS, FACTORS, SCHEMES, Arm, arm_named
from experiments.positions.cells import (
    BY_USER,
    Cell,
    find_results,
    find_run,
    judge,
    read_values,
    results_folder,
)
from experiments.positions.comparison import Outcome, summarize
from experiments.positions.section import table
from experiments.positions.taps import draw_taps, read_taps
from jaxrec._json_files import write_json
from jaxrec.cli.huge_pages import restart_with_huge_pages
from jaxrec.errors import UserError
from jaxrec.serving.run import Run
from jaxrec.training.config import Experiment, check, load_config
from jaxrec.training.interrupt import Interrupted
from jaxrec.training.results import results_name
from jaxrec.training.setup import open_data

HERE = Path(__file__).resolve().parent
# Of the schemes; other data sets have one.
SEEDS = {"amazon-2014-beauty": (0, 1, 2)}
# Results files of these are part of a study, whoever made them.
_SEEDS_LOOKED_FOR = range(10)


@dataclass(frozen=True)
class Arguments:
    """Train the arms of the position study and compare them."""

    data: tuple[str, ...] = ("amazon-2014-beauty", "movielens-1m")
    """Prepared sets."""
    out: Path = Path("runs/positions")
    """A run folder an arm and seed is made in here."""
    arms: tuple[str, ...] = ()
    """These arms on every data set; by default all schemes, and the single factors on those of
    --factor-data."""
    seeds: tuple[int, ...] = ()
    """Of the schemes; by default 0 1 2 on Beauty and 0 elsewhere."""
    factor_seeds: tuple[int, ...] = (0,)
    """Of the single factors, unless they are named by --arms."""
    factor_data: tuple[str, ...] = ("amazon-2014-beauty",)
    reuse: tuple[Path, ...] = ()
    """Folders of run folders: a run in there with the same config and data is used as it is."""
    again: bool = False
    """Train what has a results file but no values by user, so that it can be compared in pairs."""
    only_report: bool = False
    """Train nothing; compare what is there."""
    config: Path = HERE / "sasrec.py"
    """What the arms change."""
    results: Path = HERE / "results"
    """Results files go here; those of arms without a config file, and the study, in `positions`."""
    taps: bool = True
    """Draw the learned taps of the first seed of `kernel` (needs matplotlib)."""


class Data(NamedTuple):
    """A data set of the study."""

    given: str
    name: str
    hash: str


def plan(arguments: Arguments, base: Experiment, sets: Sequence[Data]) -> list[Cell]:
    """All cells in the order of training: what is compared first comes first.

    Schemes before single factors, and all arms with the first seed before any with the second.
    """
    found = [cell for data in sets for cell in _schemes(arguments, base, data)]
    if not arguments.arms:
        for data in sets:
            if data.given in arguments.factor_data:
                found += _cells(base, data, FACTORS, arguments.factor_seeds)
    for cell in found:
        check(cell.config)
    return found


def _schemes(arguments: Arguments, base: Experiment, data: Data) -> Iterator[Cell]:
    arms = [arm_named(name) for name in arguments.arms] or SCHEMES
    return _cells(base, data, arms, arguments.seeds or SEEDS.get(data.given, (0,)))


def _cells(
    base: Experiment, data: Data, arms: Sequence[Arm], seeds: Sequence[int]
) -> Iterator[Cell]:
    for seed in seeds:
        for arm in arms:
            config = arm.config(base, data=data.given, seed=seed)
            yield Cell(arm, data.name, data.hash, config)


def obtain(cell: Cell, arguments: Arguments) -> str:
    """Sees to the cell's results and values, and says how: trained, or found.

    Raises:
      UserError: the run fails.
      Interrupted: training was asked to stop; the same call goes on.
    """
    folder = results_folder(cell, arguments.results)
    there = find_run(cell, arguments.out, arguments.reuse)
    if there is not None:
        path, results = there
        said = f"has ended ({path})"
        if read_values(cell, arguments.results) is None:
            judge(cell, Run(path), cell.values_file(arguments.results))
        if find_results(cell, arguments.results) is None:
            # Under the study's name: a run that is used again may have another.
            target = folder / results_name(cell.config, cell.dataset)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(target, results | {"experiment": cell.config.name})
        return said
    if find_results(cell, arguments.results) is not None:
        if read_values(cell, arguments.results) is not None:
            return "has its results and values by user"
        if not arguments.again:
            return "has a results file alone: not paired (--again trains it)"
    run = jaxrec.fit(cell.config, cell.folder(arguments.out), results_folder=folder)
    judge(cell, run, cell.values_file(arguments.results))
    return "trained"


def known(data: Data, arguments: Arguments, base: Experiment) -> list[Outcome]:
    """What is known of a data set: every arm and seed with a results file, planned now or not."""
    seeds = sorted({*_SEEDS_LOOKED_FOR, *arguments.seeds, *arguments.factor_seeds})
    found = []
    for cell in (c for arm in ARMS.values() for c in _cells(base, data, [arm], seeds)):
        results = find_results(cell, arguments.results)
        if results is not None:
            found.append(Outcome(cell, results, read_values(cell, arguments.results)))
    return found


def write_study(data: Data, arguments: Arguments, base: Experiment) -> dict[str, Any] | None:
    """Writes the study file of one data set; None where no run of it has ended."""
    outcomes = known(data, arguments, base)
    if not outcomes:
        return None
    study = summarize(outcomes, level=base.evaluation.level, resamples=base.evaluation.resamples)
    folder = arguments.results / "positions"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"study-{data.name}.json", study)
    return study


def draw(cells: Sequence[Cell], arguments: Arguments) -> None:
    """The learned taps of `kernel`, where a run of it is at hand."""
    for cell in cells:
        there = find_run(cell, arguments.out, arguments.reuse)
        if cell.arm.name == "kernel" and there is not None:
            run = Run(there[0])
            taps = read_taps(run.parameters, cell.config.model.kernel)  # type: ignore[attr-defined]
            name = f"taps-{cell.dataset}-kernel-seed{cell.seed}.png"
            try:
                draw_taps(
                    taps, arguments.results / "positions" / name, f"{cell.config.name}: {cell}"
                )
            except ImportError:
                print("taps: not drawn, which needs matplotlib: pip install 'jaxrec[plot]'")
            print(f"{cell}:", *taps, sep="\n  ")
            return


def run_study(arguments: Arguments) -> int:
    """Trains what is missing, writes the study files, prints them; the number of failed runs.

    Raises:
      UserError: an argument, the config or a data set is wrong.
      Interrupted: training was asked to stop.
    """
    base = load_config(arguments.config)
    for folder in arguments.reuse:
        if not folder.is_dir():
            raise UserError(f"--reuse {folder}: no such folder")
    if not set(BY_USER) <= {f"{m}@{k}" for m in ("hr", "ndcg") for k in base.evaluation.ks}:
        raise UserError(f"{arguments.config}: evaluation.ks must have 10, got {base.evaluation.ks}")
    sets = []
    for given in arguments.data:
        interactions = open_data(replace(base.data, name=given))
        sets.append(Data(given, interactions.name, interactions.hash))
    cells = plan(arguments, base, sets)
    failed = 0
    for number, cell in enumerate([] if arguments.only_report else cells, 1):
        print(f"[{number}/{len(cells)}] {cell}: {cell.config.name}", flush=True)
        try:
            said = obtain(cell, arguments)
        except UserError as error:
            failed += 1
            print(f"error: {cell}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            continue
        print(f"[{number}/{len(cells)}] {cell}: {said}", flush=True)
        if said == "trained":
            # Programs of an arm are of no use to another.
            jax.clear_caches()
            gc.collect()
            write_study(next(d for d in sets if d.name == cell.dataset), arguments, base)
    for data in sets:
        study = write_study(data, arguments, base)
        if study is None:
            print(f"{data.name}: no run has ended yet")
            continue
        print(f"\n{data.name}", *table(study["arms"]), sep="\n")
        if arguments.taps:
            draw([cell for cell in cells if cell.dataset == data.name], arguments)
    return failed


def main(arguments: Arguments) -> int:
    try:
        failed = run_study(arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if failed:
        print(f"{failed} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main(tyro.cli(Arguments)))
