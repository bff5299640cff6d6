"""`jaxrec vectors`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from jaxrec.cli.arguments import parse
from jaxrec.cli.output import console, print_json
from jaxrec.training.config import MeshConfig


@dataclass(frozen=True)
class Arguments:
    """Writes the vectors that items are scored by."""

    run: tyro.conf.Positional[Path]
    """A run folder."""
    out: Path
    """A .npy file (rows by item index) or a .parquet file (with ids and titles)."""
    checkpoint: str = "best"
    """best, last, or a step."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices that the run is spread over, whatever it was trained on."""
    json: bool = False
    """The last line of output is one JSON object."""


def main(words: Sequence[str]) -> int:
    arguments = parse(Arguments, words, program="jaxrec vectors")

    from jaxrec.serving.run import load

    run = load(arguments.run, checkpoint=arguments.checkpoint, mesh=arguments.mesh)
    path = run.export_item_vectors(arguments.out)
    items, width = run.item_vectors().shape
    if arguments.json:
        print_json({"items": items, "width": width, "out": str(path)})
    else:
        console().print(f"{items:,} vectors of {width} written to {path}", markup=False)
    return 0
