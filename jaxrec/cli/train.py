"""`jaxrec train`."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from jaxrec.cli.arguments import parse
from jaxrec.cli.output import console, print_json
from jaxrec.cli.processes import connect
from jaxrec.errors import UserError
from jaxrec.training.config import Experiment, check, load_config


@dataclass(frozen=True)
class Arguments:
    """Train an experiment, then judge its best checkpoint on the test part.

    Every field of the config can be set by its name: --training.epochs 3, --model.dropout 0.5.
    The same command continues a run that was interrupted.
    """

    config: tyro.conf.Positional[Path]
    """The config, a Python file that defines `config`."""
    out: Path
    """The run folder."""
    data: str | None = None
    """Train on this prepared set instead of the config's."""
    overwrite: bool = False
    """Delete the run that is in the folder and begin anew."""
    results: Path | None = None
    """Also write the results file into this folder."""
    quiet: bool = False
    """No progress."""
    json: bool = False
    """The last line of output is one JSON object: the results."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes that train together, the same in all of them."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is; the first, 0, writes the run folder."""
    distributed: bool = False
    """Several processes that a cluster has started (TPU, Slurm, Open MPI, Kubernetes) and that find
    each other."""
    connect_timeout: int = 300
    """Seconds within which all processes must have come."""


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        return _help(words)
    arguments, rest = parse(
        Arguments, _config_first(words), program="jaxrec train", allow_unknown=True
    )
    config = load_config(arguments.config)
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, name=arguments.data))
    config = check(parse(Experiment, rest, program="jaxrec train CONFIG.py", default=config))

    connect(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        distributed=arguments.distributed,
        timeout=arguments.connect_timeout,
    )

    from jaxrec._fit import fit
    from jaxrec.processes import first

    run = fit(
        config,
        arguments.out,
        overwrite=arguments.overwrite,
        show_progress=False if arguments.quiet else None,
        results_folder=arguments.results,
    )
    if not first():
        return 0
    values = run.folder.read_results()
    assert values is not None
    if arguments.json:
        print_json(values)
        return 0
    from jaxrec.cli.show import print_results

    print_results(values, console())
    console().print(f"run folder: {run.folder.path}", markup=False)
    return 0


def _config_first(words: Sequence[str]) -> list[str]:
    """An option of the experiment may stand before the config that says what it is."""
    return sorted(words, key=lambda word: not word.endswith(".py"))


def _help(words: Sequence[str]) -> int:
    """The command's own options; with a config, its fields too."""
    config = next((w for w in words if w.endswith(".py")), None)
    # Printing its help ends a parser.
    with suppress(SystemExit) if config else nullcontext():
        parse(Arguments, ["--help"], program="jaxrec train")
    try:
        default = load_config(config or "")
    except UserError:
        default = Experiment()
    parse(Experiment, ["--help"], program="jaxrec train CONFIG.py --out RUN", default=default)
    return 0
