"""`jaxrec export`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxrec.cli.arguments import parse
from jaxrec.cli.output import console, print_json
from jaxrec.errors import UserError

_ANY = "symbolic"


@dataclass(frozen=True)
class Arguments:
    """Writes functions that rank without the model's code, one a platform."""

    run: tyro.conf.Positional[Path]
    """A run folder."""
    out: Path
    """A new folder; `jaxrec.serving.exported.load_exported` opens it."""
    platforms: str = "cpu,tpu,cuda"
    """What to export for, separated by commas; none of them needs to be here."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Length of the lists."""
    batch_size: str = _ANY
    """Histories ranked at once: a number, or symbolic to leave it to each call."""
    checkpoint: str = "best"
    """best, last, or a step."""
    json: bool = False
    """The last line of output is one JSON object."""


def main(words: Sequence[str]) -> int:
    arguments = parse(Arguments, words, program="jaxrec export")
    platforms = tuple(part.strip() for part in arguments.platforms.split(","))
    batch_size = _batch_size(arguments.batch_size)

    from jaxrec.serving.artifact import read_manifest
    from jaxrec.serving.run import load

    run = load(arguments.run, checkpoint=arguments.checkpoint)
    folder = run.export(arguments.out, platforms=platforms, k=arguments.k, batch_size=batch_size)
    sizes = {name: about["bytes"] for name, about in read_manifest(folder).files.items()}
    if arguments.json:
        print_json({"out": str(folder), "step": run.step, "files": sizes})
        return 0
    parameters = [size for name, size in sizes.items() if name.startswith("parameters/")]
    for name, size in sizes.items():
        if not name.startswith("parameters/"):
            console().print(f"{name}: {_size(size)}", markup=False)
    console().print(f"parameters: {len(parameters)} arrays, {_size(sum(parameters))}", markup=False)
    console().print(f"step {run.step} exported to {folder}", markup=False)
    return 0


def _batch_size(text: str) -> int | None:
    if text == _ANY:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"export: --batch-size takes a whole number or {_ANY}, got {text!r}"
        ) from None


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
