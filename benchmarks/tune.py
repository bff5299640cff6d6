"""Looks for better block sizes than those of the kernels' rules, and writes the tuning tables.

    python -m benchmarks.tune --op linear_cross_entropy --shape v100k --chip v5e
    python -m benchmarks.tune --op hstu_attention --shape n50 n200 --chip v6e --json here.json
    python -m benchmarks.tune --op hstu_attention --shape n200 --chip v5e --clock device

Each op is compiled with its gradient, as a Pallas kernel, once with the blocks of the rule and then
with others, going on from the best so far. What counts is the cycles of the compiler's schedule,
which needs no TPU (see `benchmarks.tpu.schedule`), or with `--clock device` the time on the TPU at
hand. An entry is written where that is at least 2 % less than with the rule's blocks and no more
registers are spilled; where it is not, what was found is written all the same, so that nobody has
to look again. A schedule does not show what a program waits for when it begins, so by schedules no
blocks are tried that make programs smaller than the rule does. Entries for other kernels and calls
stay as they are.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table as Shown

from benchmarks.cases import Case, cases, op_names, shape_names
from benchmarks.tpu.chips import CHIPS
from benchmarks.tpu.measure import lookups
from benchmarks.tuning.measurers import Device, Measurer, MeasuringError, Schedules
from benchmarks.tuning.search import Climb, Found, program_size
from jaxrec._json_files import read_json, write_json
from jaxrec.errors import UserError
from jaxrec_kernels import tuning
from jaxrec_kernels.tuning import table
from jaxrec_kernels.tuning.lookup import Lookup

FOLDER = Path(table.__file__).parent


@dataclass(frozen=True)
class Arguments:
    """Look for better block sizes, and write them to a tuning table."""

    op: tuple[str, ...] = ()
    """Ops, by default all that have cases."""
    shape: tuple[str, ...] = ()
    """Names of shapes in jaxrec_kernels.shapes, by default all."""
    chip: str = "v5e"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    clock: Literal["schedule", "device"] = "schedule"
    """The compiler's schedule, or the time on the TPU at hand."""
    most: int = 40
    """Blocks that are tried for a kernel at most, those of its rule included."""
    json: Path | None = None
    """The table to write, by default that of the chip in `jaxrec_kernels`."""


def tune(
    case: Case, dtype: str, measurer: Measurer, most: int, device_kind: str | None = None
) -> list[dict[str, Any]]:
    """The entries of a table for the kernels of a case.

    Kernels whose parts of a program are told apart are tried in the same ones. The rules are those
    for `device_kind`, by default for the TPU that the process runs on.

    Raises:
      MeasuringError: not even the program with the rules' blocks could be measured.
    """
    with tuning.compiling_for(device_kind) if device_kind else nullcontext():
        known = {x.kernel: x for x in lookups(case, jnp.dtype(dtype))}
    climbs = {
        name: _climb(name, x, most, smaller=measurer.sees_starts) for name, x in known.items()
    }
    groups = [list(climbs)] if measurer.tells_apart else [[name] for name in climbs]
    for names in groups:
        while asked := {n: climbs[n].asks for n in names if climbs[n].asks is not None}:
            for name, figure in _answers(measurer, case, dtype, asked).items():
                climbs[name].tell(figure)
    entries = []
    for name, climb in climbs.items():
        found = climb.found()
        if found is None:
            raise MeasuringError(f"{name} with its rule's blocks: {measurer.said}")
        measured = _measured(case, dtype, measurer, found)
        entries.append(
            {
                "kernel": name,
                "call": dict(known[name].call),
                "blocks": found.blocks if found.keeps else None,
                "measured": measured,
            }
        )
    return entries


def _answers(measurer: Measurer, case: Case, dtype: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What each kernel's blocks cost; where they fail together, each by itself."""
    found = measurer.measure(case, dtype, asked)
    if found is None and len(asked) > 1:
        alone = (measurer.measure(case, dtype, {name: asked[name]}) for name in asked)
        return {
            name: None if figures is None else figures[name]
            for name, figures in zip(asked, alone, strict=True)
        }
    return dict.fromkeys(asked) if found is None else found


def _as_sizes(kernel: str, blocks: Any) -> dict[str, int]:
    names = table.KERNELS[kernel].blocks
    if isinstance(blocks, int):
        return dict(zip(names, (blocks,), strict=True))
    return {name: getattr(blocks, name) for name in names}


def _climb(kernel: str, lookup: Lookup, most: int, *, smaller: bool) -> Climb:
    """`smaller`: programs may do less than the rule's."""
    rule = _as_sizes(kernel, lookup.blocks)

    def fits(blocks: table.Sizes) -> bool:
        enough = smaller or program_size(blocks) >= program_size(rule)
        return enough and lookup.fit(**blocks) is not None

    return Climb(kernel, rule, fits, most)


def _measured(case: Case, dtype: str, measurer: Measurer, found: Found) -> dict[str, Any]:
    """What stands beside an entry, for its readers."""

    def side(blocks: Any, figure: Any) -> dict[str, Any]:
        return {"blocks": blocks, measurer.unit: figure.cost, "spills": figure.spills}

    return {
        "shape": case.shape,
        "dtype": dtype,
        "by": measurer.by,
        "compiler": _compiler(),
        "tried": found.tried,
        "rule": side(found.rule, found.of_rule),
        "best": side(found.blocks, found.figure),
        "gain": round(found.gain, 4),
    }


def _compiler() -> str:
    try:
        return f"libtpu {version('libtpu')}, jax {jax.__version__}"
    except PackageNotFoundError:
        return f"jax {jax.__version__}"


def merged(old: dict[str, Any] | None, chip: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A table with these entries in place of older ones for the same kernels and calls."""

    def key(entry: dict[str, Any]) -> tuple[str, str]:
        return entry["kernel"], json.dumps(entry["call"], sort_keys=True)

    known = {key(entry): entry for entry in (old or {"entries": []})["entries"]}
    known |= {key(entry): entry for entry in entries}
    return {
        "chip": chip,
        "device_kinds": list(CHIPS[chip].device_kinds),
        "entries": [known[k] for k in sorted(known)],
    }


def check(arguments: Arguments) -> None:
    """Raises UserError for a name that does not exist, or a table that cannot be written to."""
    for what, given, known in (
        ("op", arguments.op, op_names()),
        ("shape", arguments.shape, shape_names()),
        ("chip", (arguments.chip,), tuple(CHIPS)),
    ):
        for name in given:
            if name not in known:
                raise UserError(f"--{what} {name}: no such {what}; there are {', '.join(known)}")
    if arguments.most < 1:
        raise UserError(f"--most {arguments.most}: must be at least 1")
    if arguments.clock == "device":
        kind, wanted = jax.devices()[0].device_kind, CHIPS[arguments.chip].device_kinds
        if kind not in wanted:
            raise UserError(
                f"--clock device: the device at hand is {kind!r}, not one of {', '.join(wanted)}; "
                "use --clock schedule"
            )


def read_table(path: Path, chip: str) -> dict[str, Any] | None:
    """What is in a table, or None if there is no file.

    Raises:
      UserError: it is no table, or another chip's.
    """
    if not path.exists():
        return None
    values = read_json(path)
    try:
        found = table.parse(values, str(path))
    except ValueError as error:
        raise UserError(str(error)) from None
    if found.chip != chip:
        raise UserError(f"{path}: a table for {found.chip}, not for {chip}; give another --json")
    return values


def run(arguments: Arguments, measurer: Measurer, console: Console) -> int:
    """Tunes all cases; the table is written after each, for a run takes long."""
    path = arguments.json or FOLDER / f"tpu_{arguments.chip}.json"
    read_table(path, arguments.chip)
    kind = CHIPS[arguments.chip].device_kinds[0] if arguments.clock == "schedule" else None
    failed, entries = False, []
    for case in cases(arguments.op, arguments.shape, ("forward+backward",)):
        try:
            found = tune(case, arguments.dtype, measurer, arguments.most, kind)
        except MeasuringError as error:
            console.print(f"{case.op} {case.shape}: {error}")
            failed = True
            continue
        entries += found
        write_json(path, merged(read_table(path, arguments.chip), arguments.chip, found))
        console.print(*(_line(entry) for entry in found), sep="\n")
    console.print(shown(entries, arguments.chip))
    return int(failed)


def _line(entry: dict[str, Any]) -> str:
    measured = entry["measured"]
    kept = "kept" if entry["blocks"] else "the rule stays"
    return f"{entry['kernel']} {measured['shape']}: {measured['gain']:.1%} less, {kept}"


def shown(entries: list[dict[str, Any]], chip: str) -> Shown:
    """The entries as a table on the terminal."""
    found = Shown(title=f"block sizes for {chip}")
    for name in ("kernel", "shape", "rule", "best", "less", "tried", "entry"):
        found.add_column(name)
    for entry in entries:
        measured = entry["measured"]
        sides = [" ".join(map(str, measured[x]["blocks"].values())) for x in ("rule", "best")]
        found.add_row(
            entry["kernel"],
            measured["shape"],
            *sides,
            f"{measured['gain']:.1%}",
            str(measured["tried"]),
            "yes" if entry["blocks"] else "no",
        )
    return found


def main(arguments: Arguments) -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    try:
        check(arguments)
        if arguments.clock == "device":
            return run(arguments, Device(), console)
        with Schedules(arguments.chip) as measurer:
            return run(arguments, measurer, console)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
