"""`jaxrec evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from jaxrec.cli.arguments import parse
from jaxrec.cli.output import console, print_json
from jaxrec.errors import UserError
from jaxrec.training.config import MeshConfig

if TYPE_CHECKING:
    from jaxrec.evaluation.report import Report


_SPLIT, _CHECKPOINT = "leave_one_out", "best"


@dataclass(frozen=True)
class Arguments:
    """Metrics over the full catalogue, with bootstrap intervals, beside the baselines.

    Judges a run: jaxrec evaluate RUN. Or anybody's ranked lists, on the same users and by the same
    rules: jaxrec evaluate --ranked FILE --data NAME.
    """

    run: tyro.conf.Positional[Path | None] = None
    """A run folder; may be left out with --ranked."""
    part: Literal["test", "validation"] = "test"
    """Which part of the split."""
    ks: tuple[int, ...] = ()
    """Cut-offs; by default the run's own, and 10 of ranked lists."""
    checkpoint: str = _CHECKPOINT
    """best, last, or a step."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices that the run is spread over, whatever it was trained on."""
    baselines: tuple[Literal["popularity", "most_recent", "item_knn"], ...] = (
        "popularity",
        "most_recent",
    )
    """What the numbers stand beside."""
    ranked: Path | None = None
    """A CSV or Parquet file of ranked lists (user_id, item_id, rank) to judge instead."""
    data: str | None = None
    """With --ranked and no run: the prepared set."""
    split: str | None = None
    """With --ranked and no run: the split, by default leave_one_out."""
    json: bool = False
    """The last line of output is one JSON object."""


def main(words: Sequence[str]) -> int:
    arguments = parse(Arguments, words, program="jaxrec evaluate")
    if arguments.run is None and arguments.ranked is None:
        raise UserError("evaluate: give a run folder, or --ranked FILE with --data NAME")
    if arguments.run is not None and (arguments.data or arguments.split):
        raise UserError(
            f"evaluate: --data and --split go with --ranked and no run; {arguments.run} has its own"
        )
    if arguments.ranked is not None and arguments.checkpoint != _CHECKPOINT:
        raise UserError(
            "evaluate: --checkpoint is of a run's own lists; leave it out with --ranked"
        )
    if arguments.ranked is not None and arguments.mesh != MeshConfig():
        raise UserError(
            "evaluate: --mesh.data and --mesh.model spread a run's own parameters over devices; "
            "leave them out with --ranked"
        )
    report = _ranked(arguments) if arguments.ranked is not None else _run(arguments)

    from jaxrec.evaluation.report import as_json, print_report

    if arguments.json:
        print_json(as_json(report))
    else:
        print_report(report, console())
    return 0


def _run(arguments: Arguments) -> "Report":
    from jaxrec.serving.run import load

    assert arguments.run is not None
    run = load(arguments.run, checkpoint=arguments.checkpoint, mesh=arguments.mesh)
    return run.evaluate(arguments.part, ks=arguments.ks or None, baselines=arguments.baselines)


def _ranked(arguments: Arguments) -> "Report":
    from jaxrec.data.prepared import open_prepared
    from jaxrec.data.splits import make_split
    from jaxrec.evaluation.baselines import evaluate_baselines
    from jaxrec.evaluation.ranked_lists import evaluate_ranked
    from jaxrec.evaluation.report import compare
    from jaxrec.evaluation.results import describe_protocol
    from jaxrec.training.config import Experiment
    from jaxrec.training.run_folder import RunFolder
    from jaxrec.training.setup import open_trained_on, split_data

    assert arguments.ranked is not None
    config = Experiment()
    if arguments.run is not None:
        folder = RunFolder(arguments.run)
        config = folder.read_config()
        data = open_trained_on(folder, config)
        split = split_data(config, data)
    elif arguments.data is not None:
        data = open_prepared(arguments.data, verify=True)
        split = make_split(data, arguments.split or _SPLIT)
    else:
        raise UserError("evaluate --ranked: give --data NAME, or the run folder to judge beside")
    ks, settings = arguments.ks or (10,), config.evaluation
    part, by_user = arguments.part, True
    return compare(
        evaluate_ranked(arguments.ranked, data, split, part=part, ks=ks),
        evaluate_baselines(
            data,
            split,
            part=part,
            ks=ks,
            filter_seen=settings.filter_seen,
            by_user=by_user,
            names=arguments.baselines,
        ),
        describe_protocol(data, split, part=part, filter_seen=None, by_user=by_user),
        name=arguments.ranked.name,
        level=settings.level,
        resamples=settings.resamples,
        seed=config.training.seed,
    )
