"""`jaxrec recommend`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxrec.cli.arguments import parse
from jaxrec.cli.output import console, print_json, tell
from jaxrec.errors import UserError
from jaxrec.training.config import MeshConfig

if TYPE_CHECKING:
    from jaxrec.serving.run import Recommendation, Run

_USERS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Arguments:
    """Ranks items for a user (--user), for anybody (--history a,b,c), or for everyone (--all)."""

    run: tyro.conf.Positional[Path]
    """A run folder."""
    user: str | None = None
    """Original id of a user of the data set."""
    history: str | None = None
    """Original item ids separated by commas, oldest first: for someone new."""
    times: str | None = None
    """With --history, for models that read time: seconds of its events, separated by commas."""
    all: bool = False
    """Every user of the data set, written to --out."""
    out: Path | None = None
    """With --all: a .parquet or .csv file of user_id, item_id, rank, score."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many items."""
    allow: str | None = None
    """Only these items (original ids separated by commas)."""
    deny: str | None = None
    """None of these items."""
    repeat: bool = False
    """Items of the user's own history may be recommended again."""
    checkpoint: str = "best"
    """best, last, or a step."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices that the run is spread over, whatever it was trained on."""
    json: bool = False
    """The last line of output is one JSON object."""


def main(words: Sequence[str]) -> int:
    arguments = parse(Arguments, words, program="jaxrec recommend")
    asked = [arguments.user is not None, arguments.history is not None, arguments.all]
    if sum(asked) != 1:
        raise UserError("recommend: give one of --user ID, --history a,b,c, or --all --out FILE")
    if arguments.all and arguments.out is None:
        raise UserError("recommend --all: say where to with --out FILE.parquet")
    if arguments.out is not None and not arguments.all:
        raise UserError("recommend: --out goes with --all")
    if arguments.times is not None and arguments.history is None:
        raise UserError("recommend: --times goes with --history")

    from jaxrec.serving.run import load

    run = load(arguments.run, checkpoint=arguments.checkpoint, mesh=arguments.mesh)
    return _everyone(run, arguments) if arguments.all else _one(run, arguments)


def _one(run: "Run", arguments: Arguments) -> int:
    history = None if arguments.history is None else _ids(arguments.history)
    found = run.recommend(
        arguments.user,
        history=history,
        times=None if arguments.times is None else _numbers(arguments.times),
        k=arguments.k,
        filter_seen=False if arguments.repeat else None,
        allow=None if arguments.allow is None else _ids(arguments.allow),
        deny=None if arguments.deny is None else _ids(arguments.deny),
    )
    if arguments.json:
        who = {"user": arguments.user} if history is None else {"history": history}
        print_json({**who, "items": [r._asdict() for r in found]})
        return 0
    whom = f"user {arguments.user}" if history is None else "this history"
    print_list(found, f"for {whom}", "score")
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"recommend: --times takes whole numbers separated by commas, got {text!r}"
        ) from None


def print_list(found: "Sequence[Recommendation]", title: str, measure: str) -> None:
    """A table of ranked items."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left", pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("item", no_wrap=True)
    titled = any(r.title for r in found)
    if titled:
        table.add_column("title")
    table.add_column(measure, justify="right")
    for rank, item in enumerate(found, 1):
        title_cell = [escape(item.title or "")] if titled else []
        table.add_row(str(rank), escape(str(item.item_id)), *title_cell, f"{item.score:.3f}")
    console().print(table)


def _everyone(run: "Run", arguments: Arguments) -> int:
    import numpy as np

    from jaxrec.evaluation.ranked_writer import RankedWriter

    assert arguments.out is not None
    data = run.interactions
    users = np.flatnonzero(np.diff(data.offsets) > 0)
    allow = None if arguments.allow is None else _ids(arguments.allow)
    deny = None if arguments.deny is None else _ids(arguments.deny)
    with RankedWriter(arguments.out, data, scores=True) as writer:
        for start in range(0, len(users), _USERS_AT_ONCE):
            block = users[start : start + _USERS_AT_ONCE]
            lists = run.rank_users(
                block,
                k=arguments.k,
                filter_seen=False if arguments.repeat else None,
                allow=allow,
                deny=deny,
            )
            writer.write(lists.users, lists.items, lists.scores)
            if len(users) > _USERS_AT_ONCE:
                tell(f"{min(start + _USERS_AT_ONCE, len(users)):,} of {len(users):,} users")
    if arguments.json:
        print_json({"users": len(users), "k": arguments.k, "out": str(arguments.out)})
    else:
        console().print(f"{len(users):,} users written to {arguments.out}", markup=False)
    return 0


def _ids(text: str) -> list[str]:
    ids = [part.strip() for part in text.split(",")]
    if not all(ids):
        raise UserError(f"wanted item ids separated by commas, got {text!r}")
    return ids
