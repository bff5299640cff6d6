"""The results file: what a run reached, beside what was published, and under which conditions."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxrec.training.config import Experiment, to_dict

_PACKAGES = ("jaxrec", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe_device() -> str:
    """The device in words, such as `cpu: x86_64, 2 cores`."""
    device = jax.devices()[0]
    count = jax.device_count()
    if device.platform == "cpu":
        import os

        return f"cpu: {platform.machine()}, {os.cpu_count()} cores"
    return f"{device.platform}: {count} x {device.device_kind}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def results(
    config: Experiment,
    *,
    dataset: str,
    data_hash: str,
    metrics: dict[str, Any],
    step: int,
    epochs: int,
    seconds: float,
) -> dict[str, Any]:
    """One JSON object.

    Args:
      config: the experiment.
      dataset: name of the data set.
      data_hash: of its content.
      metrics: part of the split to report (`report.as_json`).
      step: of the checkpoint that was evaluated.
      epochs: how many were trained in all.
      seconds: of training, validation included.
    """
    return {
        "experiment": config.name,
        "dataset": dataset,
        "model": config.model.type,
        "seed": config.training.seed,
        "metrics": metrics,
        "published": [
            {"source": p.source, "metrics": p.metrics, "note": p.note}
            for p in config.published.get(dataset, ())
        ],
        "device": describe_device(),
        "versions": versions(),
        "data_hash": data_hash,
        "seconds": round(seconds, 1),
        "step": step,
        "epochs": epochs,
        "config": to_dict(config),
    }


def results_name(config: Experiment, dataset: str) -> str:
    """File name under `experiments/results`."""
    return f"{config.name}-{Path(dataset).name}-seed{config.training.seed}.json"
