"""What a run came to, without what a clock decides: equal for two runs that did the same."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.faults.task import TIMES
from jaxrec.training.run_folder import RunFolder


def ending(folder: Path) -> dict[str, Any]:
    """Curves, the newest checkpoint and the results of a finished run.

    Returns:
      `curves`; `results`; `steps`, of the checkpoints that are kept; of the newest one `loop` and
      `position`, and the bytes of every array of the train state, hashed, in `state`.
    """
    run = RunFolder(folder)
    curves = [{k: v for k, v in p.items() if k not in TIMES} for p in run.read_metrics()]
    steps = sorted(int(e.name) for e in run.checkpoints.iterdir() if e.name.isdigit())
    newest = run.checkpoints / str(steps[-1])
    loop = json.loads((newest / "loop" / "metadata").read_text(encoding="utf-8"))
    position = json.loads((newest / "data" / "metadata").read_text(encoding="utf-8"))
    results = run.read_results() or {}
    return {
        "curves": curves,
        "results": {k: v for k, v in results.items() if k != "seconds"},
        "steps": steps,
        "loop": {k: v for k, v in loop.items() if k != "seconds"},
        "position": position,
        "state": _state(newest / "state"),
    }


def _state(path: Path) -> dict[str, str]:
    # Orbax would miss a file that belongs to a whole checkpoint, not to its state alone.
    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.PyTreeCheckpointer() as reader:
        stored = reader.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
    return {jax.tree_util.keystr(k): _digest(v) for k, v in jax.tree.leaves_with_path(tree)}


def _digest(array: Any) -> str:
    array = np.asarray(array)
    text = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    return hashlib.sha256(text).hexdigest()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts of two endings that differ."""
    found = []
    for part, value in one.items():
        if part != "state" and value != other[part]:
            found.append(part)
    states = one["state"], other["state"]
    names = sorted(states[0].keys() | states[1].keys())
    return found + [f"state{n}" for n in names if states[0].get(n) != states[1].get(n)]
