"""`jaxrec show`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from jaxrec._files import replacing
from jaxrec.cli.arguments import parse
from jaxrec.cli.output import console, print_json
from jaxrec.errors import UserError
from jaxrec.training.config import Experiment
from jaxrec.training.run_folder import RunFolder

_HEIGHT = 14


@dataclass(frozen=True)
class Arguments:
    """What a run is, how it went, and what it reached."""

    run: tyro.conf.Positional[Path]
    """A run folder, finished or not."""
    png: Path | None = None
    """Also draw the curves into this PNG file (needs the plot extra)."""
    json: bool = False
    """The last line of output is one JSON object: config, curves, results."""


def main(words: Sequence[str]) -> int:
    arguments = parse(Arguments, words, program="jaxrec show")
    folder = RunFolder(arguments.run)
    config = folder.read_config()
    lines = folder.read_metrics()
    results = folder.read_results()
    if arguments.png is not None:
        _draw(arguments.png, config, lines)
    if arguments.json:
        from jaxrec.training.config import to_dict

        print_json({"config": to_dict(config), "curves": lines, "results": results})
        return 0
    out = console()
    data = folder.read_data()
    out.print(
        f"{config.name}: {config.model.type} on {data['name']} "
        f"({data['users']:,} users, {data['items']:,} items, "
        f"{data['events']:,} events), seed {config.training.seed}",
        markup=False,
    )
    if not lines:
        out.print("nothing is trained yet")
    else:
        _curves(config, lines, out.width)
        _state(config, lines, out, finished=results is not None)
    if results is not None:
        print_results(results, out)
    return 0


def print_results(values: dict[str, Any], out: Console) -> None:
    """The test metrics of a results file beside the baselines and published numbers."""
    from rich import box
    from rich.table import Table

    test = values["metrics"]["test"]
    title = f"{values['dataset']}, test part, {test.get('users', 0):,} users"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in ("metric", values["experiment"], "interval", "popularity", "most recent"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    shown = [m for m in test if m.split("@")[0] in ("hr", "ndcg", "mrr", "coverage")]
    shown.sort(key=lambda m: (int(m.split("@")[1]), m))
    for metric in shown:
        low_high = test.get("intervals", {}).get(metric)
        table.add_row(
            metric,
            f"{test[metric]:.4f}",
            f"{low_high[0]:.4f} - {low_high[1]:.4f}" if low_high else "",
            *(_number(test.get(name, {}).get(metric)) for name in ("popularity", "most_recent")),
        )
    out.print(table)
    for published in values.get("published", []):
        numbers = ", ".join(f"{k} {v:.4f}" for k, v in published["metrics"].items())
        note = f" ({published['note']})" if published.get("note") else ""
        out.print(f"published: {published['source']}: {numbers}{note}", markup=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _split(
    config: Experiment, lines: list[dict[str, Any]]
) -> tuple[list[int], list[float], list[int], list[float]]:
    losses = [line for line in lines if "loss" in line]
    points = [line for line in lines if config.training.metric in line.get("validation", {})]
    return (
        [line["step"] for line in losses],
        [line["loss"] for line in losses],
        [line["step"] for line in points],
        [line["validation"][config.training.metric] for line in points],
    )


def _curves(config: Experiment, lines: list[dict[str, Any]], width: int) -> None:
    import plotext

    steps, losses, points, values = _split(config, lines)
    for name, x, y in (
        ("training loss", steps, losses),
        (f"validation {config.training.metric}", points, values),
    ):
        if not x:
            continue
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plot_size(min(width, 90), _HEIGHT)
        plotext.title(name)
        plotext.xlabel("step")
        plotext.plot(x, y, marker="braille")
        print(plotext.build())


def _state(
    config: Experiment, lines: list[dict[str, Any]], out: Console, *, finished: bool
) -> None:
    _, losses, steps, values = _split(config, lines)
    if values and losses:
        best = max(range(len(values)), key=values.__getitem__)
        out.print(
            f"{len(values)} validations, best {config.training.metric} {values[best]:.4f} at step "
            f"{steps[best]}; last loss {losses[-1]:.4f}",
            markup=False,
        )
    if not finished:
        out.print("not finished: the same train command continues it")


def _draw(path: Path, config: Experiment, lines: list[dict[str, Any]]) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("show --png needs matplotlib: pip install 'jaxrec[plot]'") from None
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: the curves are drawn to a .png file")
    steps, losses, points, values = _split(config, lines)
    if not steps:
        raise UserError("show --png: nothing is trained yet, so there is no curve")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(steps, losses)
    left.set(title="training loss", xlabel="step")
    right.plot(points, values, marker=".")
    right.set(title=f"validation {config.training.metric}", xlabel="step")
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
