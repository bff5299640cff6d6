"""Checksums of a checkpoint: written with it, compared before it is read.

A checkpoint appears whole or not at all, but a bit that flips in it later, or a file that a full or
failing disk cut short, would be read as if nothing had happened. `checksums.json` in its folder
holds size and CRC-32 of every file of its items: accidents are to be seen, not forgery, and a large
item table is to be read again in seconds.
"""

import zlib
from pathlib import Path
from typing import Any

from jaxrec._json_files import read_json, write_json
from jaxrec.errors import UserError

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 20


class Damaged(Exception):
    """A checkpoint is not what was written; the message says where."""


def write_checksums(folder: Path, step: int) -> None:
    """Describes the files of a checkpoint's items; what lies beside the items is left out.

    Cost: one read of what was just written, a second for 3 GB on a CPU core.
    """
    files = {
        name: {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for name, path in _files(folder).items()
    }
    write_json(folder / CHECKSUMS, {"step": step, "files": files})


def check_checksums(folder: Path, step: int, *, item: str | None = None) -> None:
    """Compares a checkpoint with its checksums.

    Args:
      folder: of the checkpoint.
      step: that it is said to be of.
      item: compare the files of this item alone.

    Raises:
      Damaged: something is missing, was added, or is not what was written.
    """
    if not folder.is_dir():
        raise Damaged("not a folder")
    recorded = {
        name: record
        for name, record in _read(folder, step).items()
        if item is None or name.startswith(f"{item}/")
    }
    found = {
        name: path
        for name, path in _files(folder).items()
        if item is None or name.startswith(f"{item}/")
    }
    for name in sorted(recorded.keys() - found.keys()):
        raise Damaged(f"{name} is missing")
    for name in sorted(found.keys() - recorded.keys()):
        raise Damaged(f"{name} was added")
    for name, path in sorted(found.items()):
        try:
            size, checksum = recorded[name]["bytes"], recorded[name]["crc32"]
        except (KeyError, TypeError):
            raise Damaged(f"{CHECKSUMS} is damaged") from None
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size:,} bytes, not {size}")
        if _crc32(path) != checksum:
            raise Damaged(f"{name} was altered")


def has_checksums(folder: Path) -> bool:
    """Whether there is a record to compare with."""
    return (folder / CHECKSUMS).exists()


def _read(folder: Path, step: int) -> dict[str, Any]:
    try:
        values = read_json(folder / CHECKSUMS)
    except UserError:
        raise Damaged(f"{CHECKSUMS} cannot be read") from None
    if values.get("step") != step:
        raise Damaged(f"it is of step {values.get('step')}")
    files = values.get("files")
    if not isinstance(files, dict):
        raise Damaged(f"{CHECKSUMS} is damaged")
    return files


def _files(folder: Path) -> dict[str, Path]:
    """The files of the items by path in the folder."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.parent != folder
    }


def _crc32(path: Path) -> str:
    """As eight hexadecimal digits."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"
