"""What a reader is told: metrics with intervals, the baselines beside them, and the protocol."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrec.errors import UserError
from jaxrec.evaluation.bootstrap import (
    Difference,
    Interval,
    Method,
    confidence_intervals,
    paired_difference,
)
from jaxrec.evaluation.results import Evaluation

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SAME_WITH_ONE_TARGET = ("recall", "precision", "map")
_HEADINGS = {"popularity": "popularity", "most_recent": "most recent", "item_knn": "item kNN"}


@dataclass(frozen=True, eq=False)
class Report:
    """A system beside the baselines.

    Attributes:
      name: what the system is called in the table.
      model: its evaluation.
      baselines: evaluations of the baselines on the same lists.
      protocol: how the numbers came about, ready for JSON.
      intervals: system ("model" or a baseline) to metric to `Interval`.
      differences: baseline to metric to the model's `Difference` from it.
      level: the share the intervals are meant to cover.
      resamples: bootstrap resamples behind each.
      seed: of the resamples.
      method: "percentile" or "bca".
    """

    name: str
    model: Evaluation
    baselines: Mapping[str, Evaluation]
    protocol: Mapping[str, Any]
    intervals: Mapping[str, Mapping[str, Interval]]
    differences: Mapping[str, Mapping[str, Difference]]
    level: float
    resamples: int
    seed: int
    method: str


def compare(
    model: Evaluation,
    baselines: Mapping[str, Evaluation],
    protocol: Mapping[str, Any],
    *,
    name: str = "model",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    method: Method = "percentile",
) -> Report:
    """Puts a system beside the baselines, with bootstrap intervals over users.

    Args:
      model: the system's evaluation.
      baselines: `baselines.evaluate_baselines` with the same part, `ks` and `by_user`.
      protocol: `describe_protocol`.
      name: what to call the system.
      level, resamples, seed, method: as in `bootstrap.confidence_interval`.

    Returns:
      `Report`. Coverage is a property of all lists together and has no interval.

    Raises:
      UserError: a baseline on other lists or without some of the model's metrics, or bad
        bootstrap options.

    Cost: that of the intervals, for each metric of each system.

    Source: as in `bootstrap`.

    >>> lists = {"hr@1": np.array([1.0, 1.0])}
    >>> one = Evaluation({"hr@1": 1.0}, lists, np.array([0, 1]), 2)
    >>> compare(one, {"popularity": one}, {}).intervals["popularity"]["hr@1"]
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    for baseline, evaluation in baselines.items():
        if not np.array_equal(evaluation.users, model.users):
            raise UserError(
                f"{baseline} was evaluated on {len(evaluation.users)} lists of other users than "
                f"the {len(model.users)} of {name}: evaluate both on the same part"
            )
        absent = [key for key in model if key not in evaluation]
        if absent:
            raise UserError(f"{baseline} was not evaluated for {', '.join(absent)}")
    several = model.num_users < len(model.users)
    options: dict[str, Any] = {
        "level": level,
        "resamples": resamples,
        "seed": seed,
        "method": method,
        "groups": model.users if several else None,
    }
    intervals = {
        system: confidence_intervals(evaluation.per_list, **options)
        for system, evaluation in {"model": model, **baselines}.items()
    }
    differences = {
        system: {
            key: paired_difference(values, evaluation.per_list[key], **options)
            for key, values in model.per_list.items()
        }
        for system, evaluation in baselines.items()
    }
    return Report(
        name,
        model,
        dict(baselines),
        dict(protocol),
        intervals,
        differences,
        level,
        resamples,
        seed,
        method,
    )


def as_json(report: Report) -> dict[str, Any]:
    """The report as one JSON object.

    The model's metrics stand at the top level ("hr@10", "ndcg@10", "coverage@10", ...), those of
    each baseline under its name ("popularity", "most_recent"). Beside them: "model" (the name),
    "users", "lists", "targets", "protocol", "intervals" (metric to [low, high]),
    "baseline_intervals" (baseline to the same), "differences" (baseline to metric to mean, low,
    high, p_value of model minus baseline), "interval_method", "seen_listed" and "notes".

    Args:
      report: from `compare`.

    Returns:
      A dictionary of plain numbers, strings, lists and dictionaries.

    Source: the interface of `jaxrec evaluate --json`.

    >>> lists = {"hr@1": np.array([1.0, 0.0])}
    >>> one = Evaluation({"hr@1": 0.5}, lists, np.array([0, 1]), 2)
    >>> result = as_json(compare(one, {"popularity": one}, {}))
    >>> result["hr@1"], result["popularity"]["hr@1"], result["users"]
    (0.5, 0.5, 2)
    """
    return {
        **{key: float(value) for key, value in report.model.items()},
        **{
            system: {key: float(value) for key, value in evaluation.items()}
            for system, evaluation in report.baselines.items()
        },
        "model": report.name,
        "users": report.model.num_users,
        "lists": len(report.model.users),
        "targets": report.model.num_targets,
        "protocol": dict(report.protocol),
        "intervals": _ends(report.intervals["model"]),
        "baseline_intervals": {
            system: _ends(report.intervals[system]) for system in report.baselines
        },
        "differences": {
            system: {key: difference._asdict() for key, difference in by_metric.items()}
            for system, by_metric in report.differences.items()
        },
        "interval_method": {
            "level": report.level,
            "resamples": report.resamples,
            "seed": report.seed,
            "method": f"bootstrap over users, {report.method}",
        },
        "seen_listed": report.model.seen_listed,
        "notes": list(report.model.notes),
    }


def json_line(report: Report) -> str:
    """`as_json` as one line of text, with no NaN or Infinity in it.

    Args:
      report: from `compare`.

    Returns:
      One JSON object without a line break.

    Raises:
      ValueError: a metric is not finite.

    Source: RFC 8259.

    >>> one = Evaluation({"hr@1": 0.5}, {"hr@1": np.array([1.0, 0.0])}, np.array([0, 1]), 2)
    >>> json_line(compare(one, {}, {}))[:12]
    '{"hr@1": 0.5'
    """
    return json.dumps(as_json(report), allow_nan=False, ensure_ascii=False)


def as_table(report: Report, *, metrics: Sequence[str] | None = None) -> "Table":
    """The report as a table: the model with its interval, and each baseline beside it.

    Args:
      report: from `compare`.
      metrics: the rows, such as `["hr@10", "ndcg@10"]`; by default all but, where each list has
        one target, those that repeat others (recall is hr, map is mrr, precision is hr / k).

    Returns:
      A `rich.table.Table`, at most 80 columns wide with two baselines.

    Raises:
      UserError: a metric that was not evaluated.

    >>> one = Evaluation({"hr@1": 0.5}, {"hr@1": np.array([1.0, 0.0])}, np.array([0, 1]), 2)
    >>> as_table(compare(one, {"popularity": one}, {})).row_count
    1
    """
    # Here and not above: importing rich is most of the cost of importing this module.
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    rows = _rows(report.model) if metrics is None else list(metrics)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=_title(report), title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column(escape(report.name), justify="right", style="bold", overflow="fold")
    table.add_column(f"{100 * report.level:g} % interval", justify="center", no_wrap=True)
    for system in report.baselines:
        table.add_column(_HEADINGS.get(system, escape(system)), justify="right", no_wrap=True)
    for key, following in zip(rows, [*rows[1:], None], strict=True):
        if key not in report.model:
            raise UserError(f"{key} was not evaluated, there is {', '.join(report.model)}")
        interval = report.intervals["model"].get(key)
        table.add_row(
            key,
            f"{report.model[key]:.4f}",
            "" if interval is None else f"{interval.low:.4f} – {interval.high:.4f}",
            *(f"{evaluation[key]:.4f}" for evaluation in report.baselines.values()),
            end_section=following is not None and _cut_off(following) != _cut_off(key),
        )
    return table


def print_report(
    report: Report, console: "Console | None" = None, *, metrics: Sequence[str] | None = None
) -> None:
    """Prints the table, what the model gains over each baseline, the protocol and the notes.

    Args:
      report: from `compare`.
      console: where to; standard output by default.
      metrics: rows of the table, as in `as_table`.

    Raises:
      UserError: as `as_table`.

    >>> one = Evaluation({"ndcg@1": 0.5}, {"ndcg@1": np.array([1.0, 0.0])}, np.array([0, 1]), 2)
    >>> import io
    >>> from rich.console import Console
    >>> out = Console(file=io.StringIO(), width=80)
    >>> print_report(compare(one, {"popularity": one}, {}), out)
    >>> out.file.getvalue().splitlines()[0].rstrip()
    '2 users'
    """
    from rich.console import Console

    out = console or Console()
    out.print(as_table(report, metrics=metrics))
    for line in summary(report):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def summary(report: Report) -> list[str]:
    """The lines below the table: gain over the baselines, protocol, notes.

    Args:
      report: from `compare`.

    Returns:
      Lines of plain text.

    >>> one = Evaluation({"ndcg@1": 0.5}, {"ndcg@1": np.array([1.0, 0.0])}, np.array([0, 1]), 2)
    >>> summary(compare(one, {"popularity": one}, {}))[0]
    'ndcg@1, model minus popularity: +0.0000 [+0.0000, +0.0000], which does not tell them apart'
    """
    lines = []
    key = _headline(report.model)
    for system, by_metric in report.differences.items():
        if key is not None and key in by_metric:
            gain = by_metric[key]
            verdict = ""
            if gain.high < 0:
                verdict = ": the baseline is better"
            elif gain.low <= 0:
                verdict = ", which does not tell them apart"
            lines.append(
                f"{key}, {report.name} minus {_HEADINGS.get(system, system)}: {gain.mean:+.4f} "
                f"[{gain.low:+.4f}, {gain.high:+.4f}]{verdict}"
            )
    protocol = report.protocol
    if protocol:
        lines.append(
            f"protocol: {protocol['split']} split, {protocol['part']} part, full ranking of "
            f"{protocol['candidates']}, seen items {protocol['seen_items']}, "
            f"{protocol['judged']}"
        )
        if protocol["repeat_targets"]:
            lines.append(
                f"{protocol['repeat_targets']} targets stand in their user's history already"
                + (
                    " and cannot be found with seen items left out"
                    if protocol["seen_items"] == "left out"
                    else ""
                )
            )
    lines += [f"note: {note}" for note in report.model.notes]
    return lines


def _rows(evaluation: Evaluation) -> list[str]:
    if evaluation.num_targets != len(evaluation.users):
        return list(evaluation)
    return [key for key in evaluation if key.split("@")[0] not in _SAME_WITH_ONE_TARGET]


def _cut_off(key: str) -> str:
    return key.split("@")[-1]


def _title(report: Report) -> str:
    lists, users = len(report.model.users), report.model.num_users
    counted = f"{users:,} users" + ("" if lists == users else f", {lists:,} lists")
    data = report.protocol.get("data")
    return counted if data is None else f"{data}: {counted}"


def _headline(evaluation: Evaluation) -> str | None:
    """ndcg at the cut-off nearest to the customary 10."""
    cuts = [int(_cut_off(key)) for key in evaluation.per_list if key.startswith("ndcg@")]
    return f"ndcg@{min(cuts, key=lambda k: (abs(k - 10), k))}" if cuts else None


def _ends(intervals: Mapping[str, Interval]) -> dict[str, list[float]]:
    return {key: [interval.low, interval.high] for key, interval in intervals.items()}
