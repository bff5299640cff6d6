"""What happens to a run folder before the first step: checks, and the files that describe it."""

import shutil
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Split
from jaxrec.errors import UserError
from jaxrec.training.config import Experiment, to_dict
from jaxrec.training.run_folder import RunFolder, read_json, write_json

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
)


def begin(
    folder: RunFolder,
    config: Experiment,
    interactions: Interactions,
    split: Split,
    *,
    overwrite: bool,
) -> RunFolder:
    """Makes the folder of a new run, or checks that it holds this one.

    Raises:
      UserError: the folder holds something else, or a run of another config or data.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path}: is a file; give a folder for the run")
    if overwrite and folder.path.exists():
        if any(folder.path.iterdir()) and not folder.exists():
            raise UserError(f"{folder.path}: not a run folder, so it is not overwritten")
        shutil.rmtree(folder.path)
    if folder.exists():
        _check_same(folder, config, interactions)
        folder.write_config(config)
        return folder
    if folder.path.is_dir() and any(folder.path.iterdir()):
        raise UserError(f"{folder.path}: not empty and not a run folder; choose another --out")
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder.path}: cannot be made ({error.strerror})") from None
    _write_items(folder, interactions)
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
    # Last: a folder without it is not a run yet.
    folder.write_config(config)
    return folder


def _write_items(folder: RunFolder, interactions: Interactions) -> None:
    table = pa.table({"item_id": pa.array(interactions.item_ids.tolist())})
    if interactions.item_titles is not None:
        table = table.append_column("title", pa.array(interactions.item_titles, pa.string()))
    pq.write_table(table, folder.items)


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
    data = read_json(folder.data)
    if data.get("hash") != interactions.hash:
        raise UserError(
            f"{folder.path}: was trained on another version of {data.get('name')!r} (hash "
            f"{str(data.get('hash'))[:12]}, now {interactions.hash[:12]}); choose another --out, "
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
