"""`jaxrec quickstart`: the whole path on generated data."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxrec.cli.arguments import parse
from jaxrec.cli.output import console, print_json, tell


@dataclass(frozen=True)
class Arguments:
    """From nothing to a trained model: makes a data set, trains SASRec on it, judges it beside the
    popularity baseline, and recommends items for a user."""

    out: Path | None = None
    """Keep the run in this folder; a temporary one by default."""
    epochs: int = 10
    seed: int = 0
    json: bool = False
    """The last line of output is one JSON object: the metrics and the recommendations."""


def main(words: Sequence[str]) -> int:
    arguments = parse(Arguments, words, program="jaxrec quickstart")
    with tempfile.TemporaryDirectory(prefix="jaxrec-quickstart-") as scratch:
        return _run(arguments, arguments.out or Path(scratch) / "run")


def _run(arguments: Arguments, out: Path) -> int:
    from dataclasses import replace

    from jaxrec._fit import fit
    from jaxrec.cli.recommend import print_list
    from jaxrec.evaluation.report import as_json, print_report
    from jaxrec.models.config import SASRecConfig
    from jaxrec.training.config import DataConfig, Experiment, TrainingConfig, check
    from jaxrec.training.interrupt import Interrupted

    start = time.perf_counter()
    config = Experiment(
        name="sasrec",
        data=DataConfig(name="generated", max_length=50),
        model=SASRecConfig(width=64, blocks=2, heads=1, dropout=0.2),
        training=TrainingConfig(
            batch_size=64, epochs=arguments.epochs, patience=3, seed=arguments.seed
        ),
    )
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=3e-3))
    config = check(config)
    tell("a generated set, SASRec with full cross-entropy, leave-one-out, full ranking")
    try:
        run = fit(config, out)
    except Interrupted as stop:
        if arguments.out is not None:
            raise
        raise Interrupted(stop.signal, "stopped; without --out nothing is kept") from None
    report = run.evaluate()
    data = run.interactions
    user = data.user_ids[0].item() if hasattr(data.user_ids[0], "item") else data.user_ids[0]
    history = [data.item_text(int(i)) for i in data.history(0)[-5:]]
    found = run.recommend(user, k=5)
    seconds = time.perf_counter() - start
    if arguments.json:
        values = as_json(report)
        values["user"] = user
        values["recommendations"] = [r._asdict() for r in found]
        values["seconds"] = round(seconds, 1)
        print_json(values)
        return 0
    print_report(report, console(), metrics=["hr@10", "ndcg@10", "coverage@10"])
    console().print(f"\nuser {user} watched last: {'; '.join(history)}", markup=False)
    print_list(found, f"recommended for user {user}", "score")
    console().print(f"{seconds:.0f} s in all", markup=False)
    if arguments.out is None:
        console().print(
            "next: jaxrec quickstart --out RUN keeps the run; "
            "jaxrec data import FILE --name NAME takes your own data",
            markup=False,
            soft_wrap=True,
        )
    return 0
