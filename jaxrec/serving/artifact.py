"""The folder of an exported run: what is in it, and how damage is told. Needs no model code.

FOLDER/
  manifest.json            what the function takes and gives, where it is from, checksums
  recommend.PLATFORM.bin   a serialized `jax.export` function, one a platform
  parameters/NAME.npy      its parameters, passed as arguments
  items.parquet            item ids and titles by index
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxrec._json_files import read_json
from jaxrec.errors import UserError

FORMAT = 1
PLATFORMS = ("cpu", "tpu", "cuda")
MANIFEST = "manifest.json"
ITEMS = "items.parquet"

# A name must not lead out of the folder.
_PARAMETER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds.

    Attributes:
      format: version of the folder's form.
      model: type of the model.
      data: name and hash of the data set, and the number of its items.
      step: optimiser steps behind the parameters.
      max_length: events that the model reads; the newest count.
      k: length of the lists.
      batch_size: histories a call; None where the function takes any number.
      seen_multiple: the columns of `seen` are a multiple of this.
      filter_seen: whether the run leaves out items of the history when it is judged.
      parameters: shape and dtype by name; the function's first argument.
      inputs: name, shape and dtype of its other arguments, in order; a text in a shape is a size
        that each call chooses.
      outputs: name, shape and dtype of its results.
      platforms: what there is a function for.
      jax, jaxrec: versions that exported.
      files: checksum (SHA-256) and size by path.
    """

    format: int
    model: str
    data: dict[str, Any]
    step: int
    max_length: int
    k: int
    batch_size: int | None
    seen_multiple: int
    filter_seen: bool
    parameters: dict[str, dict[str, Any]]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    platforms: list[str]
    jax: str
    jaxrec: str
    files: dict[str, dict[str, Any]]

    @property
    def reads_timestamps(self) -> bool:
        return any(one.get("name") == "timestamps" for one in self.inputs)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "data": dict,
    "step": int,
    "max_length": int,
    "k": int,
    "batch_size": (int, type(None)),
    "seen_multiple": int,
    "filter_seen": bool,
    "parameters": dict,
    "inputs": list,
    "outputs": list,
    "platforms": list,
    "jax": str,
    "jaxrec": str,
    "files": dict,
}


def function_name(platform: str) -> str:
    return f"recommend.{platform}.bin"


def parameter_name(name: str) -> str:
    """The path of a parameter's file in the folder.

    Raises:
      UserError: a name that is no dotted name.
    """
    if not _PARAMETER.fullmatch(name):
        raise UserError(f"parameter {name!r}: wanted a dotted name")
    return f"parameters/{name}.npy"


def describe_file(path: Path) -> dict[str, Any]:
    """Checksum and size, as the manifest keeps them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported run.

    Raises:
      UserError: no such folder or file, another format version, or a field that is damaged.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not path.is_file():
        raise UserError(f"{folder}: not an exported run, it has no {MANIFEST}")
    values = read_json(path)
    if not _is(values.get("format"), int) or "files" not in values:
        raise UserError(f"{path}: not the manifest of an exported run")
    if values["format"] != FORMAT:
        raise UserError(
            f"{path}: format {values['format']}, this jaxrec reads format {FORMAT}; export the run "
            "again, or use the jaxrec that it was exported with"
        )
    for field, kind in _FIELDS.items():
        if not _is(values.get(field), kind):
            raise UserError(f"{path}: {field} is {values.get(field)!r}; the file is damaged")
    return Manifest(format=FORMAT, **{field: values[field] for field in _FIELDS})


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    # A bool is an int to Python.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def checked_file(folder: Path, name: str, manifest: Manifest) -> Path:
    """The path of a file of the folder, whose content is what was exported.

    Raises:
      UserError: the file is missing, cannot be read, or another.
    """
    path = folder / name
    wanted = manifest.files.get(name)
    if not isinstance(wanted, dict):
        raise UserError(f"{folder / MANIFEST}: files lacks {name}; the file is damaged")
    try:
        found = describe_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; export the run again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if found["sha256"] != wanted.get("sha256"):
        raise UserError(
            f"{path}: the checksum is not that of the manifest (it has {found['bytes']:,} bytes, "
            f"was exported with {wanted.get('bytes')}); export the run again"
        )
    return path
