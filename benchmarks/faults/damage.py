"""Ways to spoil a file: what disks, copies and people do to it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator
Spoil = Callable[[Path, Rng], None]


def kinds(foreign: Callable[[Path], Path | None]) -> dict[str, Spoil]:
    """Every kind of damage by name.

    Args:
      foreign: the file of another set or checkpoint that could be mistaken for one; None where
        there is none.
    """
    return {
        "emptied": lambda path, _: path.write_bytes(b""),
        "cut in half": lambda path, _: _cut(path, path.stat().st_size // 2),
        "last byte cut": lambda path, _: _cut(path, max(0, path.stat().st_size - 1)),
        "first byte's bit flipped": lambda path, rng: _flip(path, 0, rng),
        "middle byte's bit flipped": lambda path, rng: _flip(path, path.stat().st_size // 2, rng),
        "last byte's bit flipped": lambda path, rng: _flip(path, path.stat().st_size - 1, rng),
        "a random byte's bit flipped": lambda path, rng: _flip(path, None, rng),
        "bytes appended": lambda path, rng: _append(path, rng),
        "removed": lambda path, _: path.unlink(),
        "a folder in its place": lambda path, _: _folder(path),
        "another's in its place": lambda path, _: _replace(path, foreign(path)),
        "swapped with a sibling": lambda path, rng: _swap(path, rng),
        "a field removed": lambda path, rng: _edit(path, rng, _without),
        "a field of another type": lambda path, rng: _edit(path, rng, _retyped),
        "a number changed": lambda path, rng: _edit(path, rng, _changed),
    }


class Impossible(Exception):
    """This file cannot be spoilt in this way."""


def _cut(path: Path, size: int) -> None:
    content = path.read_bytes()
    if size == len(content):
        raise Impossible
    path.write_bytes(content[:size])


def _flip(path: Path, place: int | None, rng: Rng) -> None:
    content = bytearray(path.read_bytes())
    if not content:
        raise Impossible
    where = int(rng.integers(len(content))) if place is None else place
    content[where] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(content))


def _append(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(16))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace(path: Path, other: Path | None) -> None:
    if other is None or not other.is_file() or other.read_bytes() == path.read_bytes():
        raise Impossible
    shutil.copyfile(other, path)


def _swap(path: Path, rng: Rng) -> None:
    content = path.read_bytes()
    siblings = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p != path]
    siblings = [p for p in siblings if p.read_bytes() != content]
    if not siblings:
        raise Impossible
    other = siblings[int(rng.integers(len(siblings)))]
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _edit(path: Path, rng: Rng, change: Callable[[dict[str, Any], str], None]) -> None:
    """Changes one field of a JSON object, at any depth."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        raise Impossible from None
    fields = list(_fields(values))
    if change is _changed:
        fields = [(table, key) for table, key in fields if type(table[key]) in (int, float)]
    if not fields:
        raise Impossible
    change(*fields[int(rng.integers(len(fields)))])
    path.write_text(json.dumps(values), encoding="utf-8")


def _fields(values: Any) -> Any:
    if isinstance(values, dict):
        for key, value in values.items():
            yield values, key
            yield from _fields(value)
    elif isinstance(values, list):
        for value in values:
            yield from _fields(value)


def _without(table: dict[str, Any], key: str) -> None:
    del table[key]


def _retyped(table: dict[str, Any], key: str) -> None:
    table[key] = 7 if isinstance(table[key], str | dict | list) else str(table[key])


def _changed(table: dict[str, Any], key: str) -> None:
    table[key] += 1
