"""The study's part of RESULTS.md, from the files that the study wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

HEAD = """## Positions

By `python -m experiments.position_study`; see docs/studies.md. SASRec with full cross-entropy, and
nothing changed but how the order of events enters. Means over seeds, with 95 % bootstrap intervals
over users and, where there are several seeds, ± the standard deviation over them. A difference is
that of pairs: same seed, so same batches in the same order, and same users. Its interval is over
users; the differences of the single seeds tell what else chance does. One interval in twenty
misses zero by chance alone.
"""


def section(folder: Path, root: Path) -> str:
    """Markdown, a part for each data set that was studied; empty where none was."""
    studies = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("study-*.json"))
    ]
    parts = []
    for study in studies:
        parts.append(f"### {study['dataset']}\n")
        for part, title in (("schemes", ""), ("factors", "One factor at a time:")):
            arms = [arm for arm in study["arms"] if arm["part"] == part]
            if arms:
                parts.append("\n".join(([title, ""] if title else []) + table(arms)) + "\n")
        parts.append(_conditions(study) + "\n")
        for path in sorted(folder.glob(f"taps-{study['dataset']}-*.png")):
            parts.append(f"![Learned taps by lag]({path.relative_to(root).as_posix()})\n")
    return "\n".join([HEAD, *parts]) if parts else ""


def table(arms: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table, a row an arm."""
    head = ["", "seeds", "HR@10", "NDCG@10", "coverage@10", "NDCG@10 minus", "by seed"]
    lines = [_row(head), _row(["---"] * len(head))]
    for arm in arms:
        metrics = [_mean(arm, name) for name in ("hr@10", "ndcg@10", "coverage@10")]
        lines.append(_row([arm["says"], str(len(arm["seeds"])), *metrics, *_difference(arm)]))
    return lines


def _mean(arm: dict[str, Any], metric: str) -> str:
    text = f"{arm['means'][metric]:.4f}"
    if metric in arm["intervals"]:
        text += " [{:.4f}, {:.4f}]".format(*arm["intervals"][metric])
    values = [seed[metric] for seed in arm["seeds"]]
    return text if len(values) < 2 else f"{text} ± {stdev(values):.4f}"


def _difference(arm: dict[str, Any]) -> list[str]:
    if arm["reference"] is None:
        return ["", ""]
    if arm["paired"] is None:
        return [f"{arm['reference']}: not paired", ""]
    found = arm["paired"]["ndcg@10"]
    interval = f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
    by_seed = ", ".join(f"{value:+.4f}" for value in found["by_seed"])
    return [f"{arm['reference']}: {interval}", by_seed]


def _conditions(study: dict[str, Any]) -> str:
    seeds = [seed for arm in study["arms"] for seed in arm["seeds"]]
    devices = ", ".join(dict.fromkeys(seed["device"] for seed in seeds))
    versions = ", ".join(dict.fromkeys(seed["jax"] for seed in seeds))
    hours = sum(seed["seconds"] for seed in seeds) / 3600
    return (
        f"{len(seeds)} runs, {hours:.1f} hours of training; {devices}, JAX {versions}, data "
        f"{study['data_hash'][:12]}"
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
