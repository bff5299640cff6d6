"""Writes RESULTS.md from the results files: `python -m experiments.report`.

Nothing in RESULTS.md is typed by hand; `--check` fails if it is not what the files give.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import tyro

from benchmarks.timings.rows import read as read_rows
from experiments.positions.section import section
from jaxrec.training.config import load_config, to_dict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"
METRICS = ("hr@10", "ndcg@10", "coverage@10")

HEAD = """# Results

Written by `python -m experiments.report` from `experiments/results/*.json`; do not edit.

Leave-one-out: a user's last event is the test target, the last but one the validation target. Every
item of the catalogue is ranked, items of the user's own history are left out, the test input
includes the validation event. The checkpoint is chosen by validation and judged on the test part
once. Intervals are 95 % bootstrap intervals over users: they tell what other users would do to the
number, not what another seed would.

MovieLens-1M is without the films of fewer than five ratings (`jaxrec data import tfds:movielens-1m
--min-item-events 5`), Amazon Beauty is the 5-core set of 2014 (`tfds:amazon-2014-beauty`).
Both were imported from tables of the same events, so their hashes are not those that these commands
give.
"""


@dataclass(frozen=True)
class Arguments:
    """Write RESULTS.md from the results files."""

    check: bool = False
    """Only compare; exit code 1 if RESULTS.md differs."""


def load() -> list[dict[str, Any]]:
    """The results files, by data set, experiment and seed."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda r: (r["dataset"], r["experiment"], r["seed"]))


def render(results: list[dict[str, Any]]) -> str:
    """RESULTS.md as text."""
    parts = [HEAD]
    for dataset in dict.fromkeys(r["dataset"] for r in results):
        parts.append(_section(dataset, [r for r in results if r["dataset"] == dataset]))
    if positions := section(RESULTS / "positions", ROOT):
        parts.append(positions)
    parts.append(benchmarks())
    return "\n".join(parts)


def _section(dataset: str, results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        test = result["metrics"]["test"]
        cells = [_with_interval(test, metric) for metric in METRICS]
        rows.append([f"{result['experiment']}, seed {result['seed']}", *cells])
    rows += _means(results)
    baselines = results[0]["metrics"]["test"]
    for name, title in (("popularity", "popularity"), ("most_recent", "most recent")):
        if name in baselines:
            rows.append([title, *(_number(baselines[name].get(m)) for m in METRICS)])
    seen = set()
    for result in results:
        for published in result["published"]:
            if published["source"] in seen:
                continue
            seen.add(published["source"])
            note = f" ({published['note']})" if published["note"] else ""
            rows.append(
                [
                    f"*published:* {published['source']}{note}",
                    *(_number(published["metrics"].get(m)) for m in METRICS),
                ]
            )
    head = ["", *(m if m.startswith("coverage") else m.upper() for m in METRICS)]
    lines = [f"## {dataset}", "", _row(head), _row(["---"] * len(head))]
    lines += [_row(r) for r in rows]
    lines += ["", "Commands and conditions:", ""]
    for result in results:
        versions = result["versions"]
        lines.append(
            f"- `jaxrec train experiments/{result['experiment']}.py --data {dataset} --out RUN"
            f"{_overrides(result)}`: {result['epochs']} epochs, best at step {result['step']}, "
            f"{result['device']}, JAX {versions['jax']}, data {result['data_hash'][:12]}"
        )
    return "\n".join(lines) + "\n"


def _means(results: list[dict[str, Any]]) -> list[list[str]]:
    """A row for every experiment with several seeds: mean and spread over them."""
    rows = []
    for name in dict.fromkeys(r["experiment"] for r in results):
        tests = [r["metrics"]["test"] for r in results if r["experiment"] == name]
        if len(tests) < 2:
            continue
        cells = []
        for metric in METRICS:
            values = [test[metric] for test in tests]
            cells.append(f"{fmean(values):.4f} ± {stdev(values):.4f}")
        rows.append([f"**{name}, mean of {len(tests)} seeds** ± standard deviation", *cells])
    return rows


def _with_interval(test: dict[str, Any], metric: str) -> str:
    interval = test.get("intervals", {}).get(metric)
    number = _number(test.get(metric))
    return f"{number} [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else number


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _overrides(result: dict[str, Any]) -> str:
    """The options that turn the config file into what was trained."""
    config = load_config(ROOT / "experiments" / f"{result['experiment']}.py")
    # As JSON, which the results file is: a tuple is a list there.
    base = dict(_leaves(json.loads(json.dumps(to_dict(config)))))
    changes = []
    for name, value in _leaves(result["config"]):
        same = value == base.get(name, value)
        if not same and name not in ("data.name", "model.type") and "published" not in name:
            words = value if isinstance(value, list) else [value]
            changes.append(f" --{name} {' '.join(map(str, words))}")
    return "".join(changes)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def benchmarks() -> str:
    """A line for every results file of a benchmark that is told here."""
    told = {
        "training_epoch": _training_epoch,
        "data_import": _data_import,
        "catalogue_loss": _catalogue_loss,
        "peer_rectools": _peer_rectools,
        "tpu_aot": _tpu_aot,
        "robustness": _robustness,
    }
    lines = []
    for path in sorted(BENCHMARKS.glob("*.json*")):
        if path.suffix == ".jsonl":
            words = _kernels(read_rows(path))
        else:
            result = json.loads(path.read_text(encoding="utf-8"))
            words = told[result["benchmark"]](result) if result["benchmark"] in told else ""
        if words:
            lines.append(f"- {words} ([file]({path.relative_to(ROOT)}))")
    head = "## Benchmarks\n\nEach by `python -m benchmarks.NAME`; see docs/benchmarks.md.\n\n"
    return head + "\n".join(lines) + "\n" if lines else ""


def _training_epoch(result: dict[str, Any]) -> str:
    model = result["model"]
    return (
        f"`training_epoch`: an epoch of SASRec on {result['data']} (width {model['width']}, "
        f"{model['blocks']} blocks, length {result['max_length']}, {result['batch_size']} "
        f"sequences a batch, full softmax) takes {result['epoch_seconds']:.1f} s, "
        f"{result['ratio_to_floor']:.1f} times its arithmetic floor of "
        f"{result['floor_seconds']:.1f} s; {result['device']}"
    )


def _data_import(result: dict[str, Any]) -> str:
    return (
        f"`data_import`: {result['rows']:,} unsorted rows with text ids in "
        f"{result['seconds']:.0f} s and {result['peak_rss_bytes'] / 1e9:.1f} GB; "
        f"{result['cores']} cores"
    )


def _catalogue_loss(result: dict[str, Any]) -> str:
    shape, device = result["shape"], result["device"]
    where = (
        f"{shape['positions']:,} positions over {shape['items']:,} items, width {shape['width']}"
    )
    told = f"{device['name']}, {device['cores']} cores"
    if "memory" in result:
        held = result["memory"]["temporaries_mb"]
        return (
            f"`catalogue_loss --memory`: the gradient of each position's loss for {where} "
            f"holds {held:.0f} MB besides its inputs and results; {told}"
        )
    rows = {row["name"]: row for row in result["rows"]}
    if "mean gradient, padded" in rows:
        padded, whole = (
            rows[name]["median_ms"] for name in ("mean gradient, padded", "mean gradient")
        )
        return (
            f"`catalogue_loss --valid {result['valid']}`: the gradient of the mean for {where} "
            f"takes {padded / whole:.2f} of the time that it takes where all are valid; {told}"
        )
    return (
        f"`catalogue_loss`: the gradient of the mean for {where} takes "
        f"{rows['mean gradient']['of_dense']:.2f} of the dense form's time; {told}"
    )


def _peer_rectools(result: dict[str, Any]) -> str:
    epoch, ranking, memory = (
        result["comparison"][name]
        for name in ("epoch_seconds", "ranking_seconds", "training_peak_bytes")
    )
    versions = result["peer"]["versions"]
    when = f", RecTools {result['peer']['measured']}" if "measured" in result["peer"] else ""
    name, length = result["data"]["name"], result["task"]["max_length"]
    return (
        f"`peer_rectools` on {name} (sequences of {length}): "
        f"an epoch in {epoch['jaxrec']:.1f} s, RecTools {versions['rectools']} with PyTorch "
        f"{versions['torch']} {epoch['peer']:.1f} s ({epoch['ratio']:.1f} times); a ranking of all "
        f"users {ranking['jaxrec']:.1f} s, {ranking['peer']:.1f} s ({ranking['ratio']:.1f} times); "
        f"peak memory of training {memory['jaxrec'] / 2**30:.2f} GiB, {memory['peer'] / 2**30:.2f} "
        f"GiB ({memory['ratio']:.1f} times){when}; {result['device']}"
    )


def _tpu_aot(result: dict[str, Any]) -> str:
    """The gradients' ratios and the train steps' memory; the rest is in the file."""
    if not result["rows"] and result.get("train_steps"):
        return _train_steps(result)
    told = []
    compared = [r for r in result["rows"] if r["ratio"] and "backward" in r["direction"]]
    for op, chip in dict.fromkeys((r["op"], r["chip"]) for r in compared):
        rows = [r for r in compared if (r["op"], r["chip"]) == (op, chip)]
        ratios = ", ".join(f"{r['shape']} {r['ratio']:.2f}" for r in rows)
        told.append(f"{op} on {chip}: {ratios}")
    return (
        f"`tpu_aot` ({result['note']}): cycles of forward and gradient, Pallas kernel over XLA's "
        f"form; {'; '.join(told) or 'no kernel yet'}; libtpu {result['versions'].get('libtpu')}"
    )


def _train_steps(result: dict[str, Any]) -> str:
    rows = [r for r in result["train_steps"] if "fits" in r]
    first = rows[0]
    told = []
    for model, loss, chip, dtype in dict.fromkeys(
        (r["model"], r["loss"], r["chip"], r["dtype"]) for r in rows
    ):
        mine = [
            r
            for r in rows
            if (r["model"], r["loss"], r["chip"], r["dtype"]) == (model, loss, chip, dtype)
        ]
        held = ", ".join(
            f"{r['items'] / 1e6:g}M items on {'x'.join(map(str, r['mesh']))} "
            f"{r['hbm_bytes']['total'] / 1e9:.1f} GB{'' if r['fits'] else ' (does not fit)'}"
            for r in mine
        )
        told.append(f"{model} by {loss} on {chip}, {dtype}: {held}")
    return (
        f"`tpu_aot --train-step` (memory that the compiler sets aside on each chip, not measured: "
        f"no TPU ran): width {first['width']}, {first['blocks']} blocks, {first['sequences']} "
        f"sequences of {first['length']} in a batch, Adam; {'; '.join(told)}; "
        f"libtpu {result['versions'].get('libtpu')}"
    )


def _kernels(rows: list[dict[str, Any]]) -> str:
    """The gradients' ratios to the baseline of their run; the rest is in the file."""
    compared = [
        r
        for r in rows
        if r["direction"] == "gradient" and r.get("ratio") and r["implementation"] != r["baseline"]
    ]
    if not compared:
        return ""
    groups: dict[tuple[str, ...], list[str]] = {}
    for r in compared:
        key = (r["device"], r["dtype"], r["op"], r["implementation"], r["baseline"])
        star = "\\*" if r["reduced"] else ""
        groups.setdefault(key, []).append(f"{r['shape']}{star} {r['ratio']:.2f}")
    told = "; ".join(
        f"{op}, {name} over {baseline} ({dtype}): {', '.join(ratios)}"
        for (_, dtype, op, name, baseline), ratios in groups.items()
    )
    devices = ", ".join(dict.fromkeys(r["device"] for r in compared))
    small = " (\\*: a smaller batch)" if any(r["reduced"] for r in compared) else ""
    return f"`kernels` on {devices}: median time of forward and gradient; {told}{small}"


def _robustness(result: dict[str, Any]) -> str:
    kills, damages = result["kills"], result["damages"]
    phases = ", ".join(f"{n} in {phase}" for phase, n in kills["by_phase"].items())
    outcomes = [of_group.values() for of_group in damages["by_outcome"].values()]
    refused, passed_over, harmless, undetected = map(sum, zip(*outcomes, strict=True))
    differ = len(kills["differences"])
    ended = f"{differ} parts of them differ" if differ else "each ended bitwise as without kills"
    return (
        f"`robustness`: {kills['kills']} kills ({phases}) over {kills['runs']} runs, {ended}; "
        f"{damages['count']} damaged files of a set and of a checkpoint: {refused} refused, "
        f"{passed_over} passed over for the checkpoint before, {harmless} without effect, "
        f"{undetected} undetected; {result['device']}"
    )


def main(arguments: Arguments) -> int:
    target = ROOT / "RESULTS.md"
    text = render(load())
    if arguments.check:
        same = target.is_file() and target.read_text(encoding="utf-8") == text
        if not same:
            print("RESULTS.md is not what the results files give: run python -m experiments.report")
        return 0 if same else 1
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
