"""`jaxrec similar`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxrec.cli.arguments import parse
from jaxrec.cli.output import print_json
from jaxrec.cli.recommend import print_list
from jaxrec.training.config import MeshConfig


@dataclass(frozen=True)
class Arguments:
    """The items whose vectors are most alike (cosine) to an item's."""

    run: tyro.conf.Positional[Path]
    """A run folder."""
    item: str
    """Original id of the item."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many items."""
    checkpoint: str = "best"
    """best, last, or a step."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices that the run is spread over, whatever it was trained on."""
    json: bool = False
    """The last line of output is one JSON object."""


def main(words: Sequence[str]) -> int:
    arguments = parse(Arguments, words, program="jaxrec similar")

    from jaxrec.serving.run import load

    run = load(arguments.run, checkpoint=arguments.checkpoint, mesh=arguments.mesh)
    found = run.similar_items(arguments.item, arguments.k)
    if arguments.json:
        print_json({"item": arguments.item, "items": [r._asdict() for r in found]})
    else:
        print_list(found, f"like {run.item_text(arguments.item)}", "cosine")
    return 0
