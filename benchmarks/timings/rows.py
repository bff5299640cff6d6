"""The rows of `benchmarks.kernels`: JSON lines on disk, a table on the screen."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxrec.errors import UserError

Row = dict[str, Any]
_KEY = ("op", "shape", "direction", "dtype", "implementation", "device")


def append(path: Path, row: Row) -> None:
    """Adds a line at once: what was measured before a crash stays."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a file; of those measured several times, the last. An unfinished line is none.

    Raises:
      UserError: a line that is no row.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            key = tuple(row[name] for name in _KEY)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: no row of benchmarks.kernels") from None
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def table(rows: Iterable[Row], title: str, baseline: str) -> Table:
    """The rows as a table; what was not measured says why."""
    shown = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("op", "shape", "", "dtype", "by"):
        shown.add_column(name, no_wrap=name != "shape")
    for name in ("ms", "middle half", f"/ {baseline}", "GFLOP/s", "GB/s", "of roofline", "temp MB"):
        shown.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in rows:
        case = tuple(row[name] for name in _KEY[:4])
        if before not in (None, case):
            shown.add_section()
        before = case
        size = row["shape"] + (" *" if row["reduced"] else "")
        cells = [row["op"], size, row["direction"], row["dtype"], row["implementation"]]
        shown.add_row(*cells, *(_skipped(row) if "skipped" in row else _measured(row)))
    shown.caption = "* a smaller batch than the shape's; see the row's `reduced`"
    shown.caption_justify = "left"
    return shown


def _skipped(row: Row) -> list[str]:
    return ["-", row["skipped_briefly"]]


def _measured(row: Row) -> list[str]:
    low, high = row["spread_ms"]
    ceilings = row["ceilings"]
    return [
        f"{row['median_ms']:,.2f}",
        f"{low:,.2f} to {high:,.2f}",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        _rate(row["flops_per_second"], ceilings["flops_per_second"]),
        _rate(row["bytes_per_second"], ceilings["bytes_per_second"]),
        f"{row['of_roofline']:.0%}",
        f"{row['temporaries_bytes'] / 1e6:,.1f}",
    ]


def _rate(rate: float, ceiling: float) -> str:
    return f"{rate / 1e9:,.1f} ({rate / ceiling:.0%})"
