"""The form of a table, and what is in the files."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple


class Fields(NamedTuple):
    """What an entry of a kernel names: the calls that it is for, and the sizes of its blocks."""

    calls: tuple[str, ...]
    blocks: tuple[str, ...]


_CATALOGUE = Fields(
    ("positions", "items", "width", "itemsize", "biased"), ("positions", "items", "chunk")
)
_HSTU = Fields(
    ("length", "heads", "head_dim", "value_dim", "itemsize", "times"),
    ("block", "sequences", "together", "group"),
)
_WHOLE_ROWS = Fields(("length", "heads", "head_dim", "itemsize", "mixes"), ("rows", "packed"))

KERNELS: dict[str, Fields] = {
    "linear_cross_entropy_forward": _CATALOGUE,
    "linear_cross_entropy_backward": _CATALOGUE,
    "hstu_attention_forward": _HSTU,
    "hstu_attention_backward": _HSTU,
    "positional_kernel_attention_forward": _WHOLE_ROWS,
    "positional_kernel_attention_backward": _WHOLE_ROWS,
    "long_attention": Fields(("length", "heads", "head_dim", "itemsize"), ("block",)),
}

Sizes = Mapping[str, int]


class Table(NamedTuple):
    """The entries for one chip."""

    chip: str
    device_kinds: tuple[str, ...]
    entries: dict[tuple[str, frozenset[tuple[str, int]]], Sizes]

    def find(self, kernel: str, call: Sizes) -> Sizes | None:
        """The blocks of the entry for such a call, or None."""
        return self.entries.get((kernel, frozenset(call.items())))


@cache
def tables() -> dict[str, Table]:
    """All tables of this package, by the name of the chip: read once.

    Raises:
      ValueError: a file is not of the form that `parse` wants.
    """
    folder = resources.files(__package__)
    files = (x for x in folder.iterdir() if x.name.endswith(".json"))
    found = [parse(_json(x.read_text("utf-8"), x.name), x.name) for x in files]
    return {table.chip: table for table in found}


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: not JSON ({error}); the file is damaged") from None


def parse(values: Any, name: str) -> Table:
    """A table from what its file holds.

    Args:
      values: `{"chip", "device_kinds", "entries"}`; an entry is `{"kernel", "call", "blocks",
        "measured"}`, with the fields of `KERNELS` as positive integers (0 for "none of them" in a
        call); without a gain its `blocks` are null, and the kernel's rule is used.
      name: of the file, for messages.

    Raises:
      ValueError: something is missing, unknown, or there twice; says where and what is wanted.
    """
    try:
        chip, kinds, listed = values["chip"], values["device_kinds"], values["entries"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{name}: wanted chip, device_kinds and entries; {error!r}") from None
    if not (isinstance(chip, str) and isinstance(kinds, list) and isinstance(listed, list)):
        raise ValueError(f"{name}: wanted a name of a chip, a list of kinds, a list of entries")
    if not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"{name}: device_kinds must be names of devices, got {kinds!r}")
    entries = {}
    seen = set()
    for number, entry in enumerate(listed):
        where = f"{name}, entry {number}"
        if not isinstance(entry, dict) or set(entry) != {"kernel", "call", "blocks", "measured"}:
            raise ValueError(f"{where}: wanted kernel, call, blocks and measured")
        fields = KERNELS.get(entry["kernel"])
        if fields is None:
            raise ValueError(
                f"{where}: no kernel {entry['kernel']!r}; there are {', '.join(KERNELS)}"
            )
        key = entry["kernel"], frozenset(_sizes(entry["call"], fields.calls, 0, where).items())
        if key in seen:
            raise ValueError(f"{where}: there is one for such calls already")
        seen.add(key)
        if entry["blocks"] is not None:
            entries[key] = _sizes(entry["blocks"], fields.blocks, 1, where)
    return Table(chip, tuple(kinds), entries)


def _sizes(given: Any, names: tuple[str, ...], least: int, where: str) -> Sizes:
    if not isinstance(given, dict) or set(given) != set(names):
        raise ValueError(f"{where}: wanted {', '.join(names)}, got {given!r}")
    for name, value in given.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{where}: {name} must be an integer from {least} on, got {value!r}")
    return given
