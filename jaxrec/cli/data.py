"""`jaxrec data import | list | stats | generate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from jaxrec.cli.arguments import parse
from jaxrec.cli.output import console, print_json, tell
from jaxrec.errors import UserError

if TYPE_CHECKING:
    from jaxrec.data.prepared import Interactions

_PUBLIC = "tfds:"


@dataclass(frozen=True)
class ImportArguments:
    """Prepares a data set: a user's own files, or a public set (tfds:movielens-1m).

    jaxrec data import ratings.csv --name shop
    jaxrec data import tfds:movielens-1m [--archive ml-1m.zip]
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """CSV (also compressed) or Parquet files, or tfds:NAME (see jaxrec data list)."""
    name: str | None = None
    """What the set is called from now on."""
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    rating_column: str | None = None
    """By default `rating`, if there is one."""
    delimiter: str | None = None
    """Found out from the first line by default."""
    columns: tuple[str, ...] = ()
    """Names of the columns, for CSV files without a header line."""
    quote_char: str | None = '"'
    """Encloses fields in CSV; None where quotes mean nothing."""
    encoding: str = "utf-8"
    time_unit: Literal["auto", "s", "ms", "us", "ns", "iso"] = "auto"
    """Unit of numbers since 1970, or iso for ISO 8601 text."""
    time_format: str | None = None
    """strptime format of another form of time, such as %d/%m/%Y."""
    no_time: bool = False
    """There is no time: the order of the rows is the order of events."""
    min_rating: float | None = None
    """Keep events rated at least that."""
    min_user_events: int = 0
    """k-core: keep users with that many events (together with min-item-events)."""
    min_item_events: int = 0
    drop_missing: bool = False
    """Leave out rows with an empty field instead of refusing them."""
    items_file: Path | None = None
    """CSV or Parquet with one row an item: id, title, anything else."""
    items_id_column: str | None = None
    title_column: str | None = None
    item_vectors_file: Path | None = None
    """.npy whose row k belongs to row k of the items file."""
    archive: Path | None = None
    """Public sets: the publisher's file, downloaded already."""
    metadata_archive: Path | None = None
    """Public sets: the publisher's metadata file, downloaded already."""
    base_url: str | None = None
    """Public sets: a mirror that has the publisher's files under their names."""
    titles: bool = True
    """Public sets: also fetch item titles where they are a file of their own."""
    overwrite: bool = False
    """Replace a set of that name."""
    json: bool = False
    """The last line of output is one JSON object."""


def import_(words: Sequence[str]) -> int:
    arguments = parse(ImportArguments, words, program="jaxrec data import")
    files = arguments.files
    if not files:
        raise UserError("data import: give a file, or tfds:NAME for a public set")
    public = [f for f in files if f.startswith(_PUBLIC)]
    if public and len(files) > 1:
        raise UserError("data import: one public set at a time")
    data = _public(public[0], arguments) if public else _own(arguments)
    return _tell(data, arguments.json)


def _own(arguments: ImportArguments) -> "Interactions":
    from jaxrec.data.tabular import import_table

    if arguments.name is None:
        raise UserError("data import: give the set a name with --name NAME")
    for option in ("archive", "metadata_archive", "base_url"):
        if getattr(arguments, option) is not None:
            flag = option.replace("_", "-")
            raise UserError(f"data import: --{flag} goes with tfds:NAME, not with files")
    with _progress() as progress:
        return import_table(
            list(arguments.files),
            arguments.name,
            user_column=arguments.user_column,
            item_column=arguments.item_column,
            time_column=arguments.time_column,
            rating_column=arguments.rating_column,
            delimiter=arguments.delimiter,
            columns=arguments.columns or None,
            quote_char=arguments.quote_char,
            encoding=arguments.encoding,
            time_unit=arguments.time_unit,
            time_format=arguments.time_format,
            no_time=arguments.no_time,
            min_rating=arguments.min_rating,
            min_user_events=arguments.min_user_events,
            min_item_events=arguments.min_item_events,
            drop_missing=arguments.drop_missing,
            items_file=arguments.items_file,
            items_id_column=arguments.items_id_column,
            title_column=arguments.title_column,
            item_vectors_file=arguments.item_vectors_file,
            overwrite=arguments.overwrite,
            progress=progress,
        )


# What a public set leaves open; its columns, ids and times are known.
_OF_PUBLIC_SETS = {
    "files",
    "name",
    "archive",
    "metadata_archive",
    "titles",
    "base_url",
    "min_rating",
    "min_user_events",
    "min_item_events",
    "overwrite",
    "json",
}


def _public(name: str, arguments: ImportArguments) -> "Interactions":
    from jaxrec.data.tfds import prepare

    for part in fields(arguments):
        if part.name not in _OF_PUBLIC_SETS and getattr(arguments, part.name) != part.default:
            flag = part.name.replace("_", "-")
            raise UserError(f"data import: --{flag} is for your own files, not for {name}")

    with _progress() as progress:
        return prepare(
            name.removeprefix(_PUBLIC),
            arguments.name,
            archive=arguments.archive,
            metadata_archive=arguments.metadata_archive,
            base_url=arguments.base_url,
            titles=arguments.titles,
            min_rating=arguments.min_rating,
            min_user_events=arguments.min_user_events,
            min_item_events=arguments.min_item_events,
            overwrite=arguments.overwrite,
            notice=tell,
            progress=progress,
        )


class _progress:
    """A bar on a terminal, nothing elsewhere."""

    def __enter__(self) -> Callable[[str, float], None] | None:
        from rich.console import Console
        from rich.progress import Progress

        target = Console(stderr=True)
        self._bar = Progress(console=target, transient=True) if target.is_terminal else None
        if self._bar is None:
            return None
        self._bar.start()
        task = self._bar.add_task("", total=1.0)
        bar = self._bar

        def show(what: str, share: float) -> None:
            bar.update(task, description=what, completed=share)

        return show

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _tell(data: "Interactions", as_json: bool) -> int:
    if as_json:
        print_json(
            {
                "name": data.name,
                "path": str(data.path),
                "users": data.num_users,
                "items": data.num_items,
                "events": data.num_events,
                "hash": data.hash,
            }
        )
    else:
        console().print(
            f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, "
            f"{data.num_events:,} events in {data.path}",
            markup=False,
            soft_wrap=True,
        )
    return 0


@dataclass(frozen=True)
class ListArguments:
    """Prepared sets on this machine, and public sets that can be fetched."""

    json: bool = False
    """The last line of output is one JSON object."""


def list_(words: Sequence[str]) -> int:
    arguments = parse(ListArguments, words, program="jaxrec data list")

    from rich import box
    from rich.table import Table

    from jaxrec.data.paths import data_dir
    from jaxrec.data.statistics import list_prepared
    from jaxrec.data.tfds import available

    prepared = list_prepared()
    public = list(available())
    if arguments.json:
        print_json(
            {
                "folder": str(data_dir()),
                "prepared": prepared,
                "public": [
                    {
                        "name": p.name,
                        "events": p.events,
                        "bytes": p.size,
                        "url": p.url,
                        "terms": p.licence,
                    }
                    for p in public
                ],
            }
        )
        return 0
    out = console()
    if prepared:
        table = Table(
            "name", "users", "items", "events", "from", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for one in prepared:
            if "error" in one:
                table.add_row(one["name"], "", "", "", f"cannot be opened: {one['error']}")
                continue
            counts = (f"{one[c]:,}" for c in ("users", "items", "events"))
            table.add_row(one["name"], *counts, str(one.get("source", "")))
        out.print(f"prepared, in {data_dir()}:", markup=False, soft_wrap=True)
        out.print(table)
    else:
        out.print(f"no prepared set in {data_dir()} yet", markup=False, soft_wrap=True)
    table = Table("name", "events", "MB", "terms", box=box.SIMPLE_HEAD, pad_edge=False)
    for entry in public:
        size = "" if entry.size is None else f"{entry.size / 1e6:,.0f}"
        table.add_row(f"{_PUBLIC}{entry.name}", f"{entry.events:,}", size, entry.licence)
    out.print("public sets, by `jaxrec data import tfds:NAME`:", markup=False)
    out.print(table)
    return 0


@dataclass(frozen=True)
class StatsArguments:
    """Figures of a prepared set."""

    name: tyro.conf.Positional[str]
    """A prepared set, or its folder."""
    verify: bool = False
    """Also compare every file with its hash."""
    json: bool = False
    """The last line of output is one JSON object."""


def stats(words: Sequence[str]) -> int:
    arguments = parse(StatsArguments, words, program="jaxrec data stats")

    from jaxrec.data.prepared import open_prepared
    from jaxrec.data.statistics import describe

    figures = describe(open_prepared(arguments.name, verify=arguments.verify))
    if arguments.json:
        print_json(figures)
        return 0

    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for key, value in figures.items():
        table.add_row(key.replace("_", " "), _text(value))
    console().print(table)
    return 0


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class GenerateArguments:
    """Makes a set with planted structure: no network, the same for the same seed."""

    name: str = "generated"
    users: int = 2000
    items: int = 500
    events_per_user: float = 25.0
    """Mean length of a history."""
    seed: int = 0
    overwrite: bool = False
    """Replace a set of that name."""
    json: bool = False
    """The last line of output is one JSON object."""


def generate(words: Sequence[str]) -> int:
    arguments = parse(GenerateArguments, words, program="jaxrec data generate")

    from jaxrec.data.generate import generate as make

    data = make(
        arguments.name,
        users=arguments.users,
        items=arguments.items,
        events_per_user=arguments.events_per_user,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    return _tell(data, arguments.json)
