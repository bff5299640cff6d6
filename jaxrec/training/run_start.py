"""What happens to a run folder before the first step: checks, and the files that describe it."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Split
from jaxrec.errors import UserError
from jaxrec.training.config import Experiment, to_dict
from jaxrec.training.run_folder import RunFolder, write_json

# What may differ when a run is continued: none of it changes a step that was already made. Epochs
# count only while the learning rate does not depend on how many there will be.
_MAY_CHANGE = (
    "training.epochs",
    "training.patience",
    "training.tensorboard",
    "evaluation.level",
    "evaluation.resamples",
    "published",
    "data.prefetch",
    # Changes what dropout draws and the order of sums, not what is computed.
    "mesh",
)


def check_free(
    folder: RunFolder, config: Experiment, interactions: Interactions, *, overwrite: bool
) -> None:
    """Refuses a folder that this run may not use.

    A run without any checkpoint may be replaced by another: there is nothing to lose.

    Raises:
      UserError: the folder holds something else, or a run of another config or data.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path}: is a file; give a folder for the run")
    if folder.exists():
        if not overwrite and folder.has_checkpoint():
            _check_same(folder, config, interactions)
    elif folder.path.is_dir() and any(folder.path.iterdir()) and not _mark(folder).exists():
        what = "so it is not overwritten" if overwrite else "and not empty; choose another --out"
        raise UserError(f"{folder.path}: not a run folder, {what}")


def begin(
    folder: RunFolder,
    config: Experiment,
    interactions: Interactions,
    split: Split,
    *,
    overwrite: bool,
) -> None:
    """Makes the folder of a new run; that of a run to be continued gets the config as it is now.

    A mark stands in the folder while it is made or cleared, so that a kill at any moment leaves a
    folder that the same command can use.

    Raises:
      UserError: as `check_free`; the disk refuses.
    """
    check_free(folder, config, interactions, overwrite=overwrite)
    try:
        if overwrite or not folder.exists() or not folder.has_checkpoint():
            _clear(folder)
            _describe(folder, interactions, split)
        # Last: a folder without it is not a run yet.
        folder.write_config(config)
        _mark(folder).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder.path}: cannot be written ({error.strerror})") from None


def _mark(folder: RunFolder) -> Path:
    return folder.path / ".beginning"


def _clear(folder: RunFolder) -> None:
    """Removes what a run wrote; anything else in the folder is the user's."""
    _mark(folder).touch()
    folder.config.unlink(missing_ok=True)
    for file in (folder.data, folder.items, folder.metrics, folder.results):
        file.unlink(missing_ok=True)
    for inner in (folder.checkpoints, folder.tensorboard):
        if inner.is_dir():
            shutil.rmtree(inner)


def _describe(folder: RunFolder, interactions: Interactions, split: Split) -> None:
    table = pa.table({"item_id": pa.array(interactions.item_ids.tolist())})
    if interactions.item_titles is not None:
        table = table.append_column("title", pa.array(interactions.item_titles, pa.string()))
    pq.write_table(table, folder.items)
    write_json(
        folder.data,
        {
            "name": interactions.name,
            "hash": interactions.hash,
            "users": interactions.num_users,
            "items": interactions.num_items,
            "events": interactions.num_events,
            "split": split.name,
            "split_description": split.description,
        },
    )


def _check_same(folder: RunFolder, config: Experiment, interactions: Interactions) -> None:
    before, now = _flat(to_dict(folder.read_config())), _flat(to_dict(config))
    changed = [
        name
        for name in sorted(set(before) | set(now))
        if before.get(name) != now.get(name) and not name.startswith(_MAY_CHANGE)
    ]
    if before.get("training.epochs") != now["training.epochs"] and (
        config.optimizer.schedule != "constant"
    ):
        changed.append("training.epochs")
    if changed:
        name = changed[0]
        raise UserError(
            f"{folder.path}: holds a run with {name} = {before.get(name)!r}, now it is "
            f"{now.get(name)!r}; choose another --out, or --overwrite"
        )
    data = folder.read_data()
    if data["hash"] != interactions.hash:
        raise UserError(
            f"{folder.path}: was trained on another version of {data['name']!r} (hash "
            f"{data['hash'][:12]}, now {interactions.hash[:12]}); choose another --out, "
            "or --overwrite"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
