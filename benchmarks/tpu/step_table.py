"""Whole train steps for TPUs, one row a program, and the rows as a table."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from benchmarks.tpu.child import in_a_process
from benchmarks.tpu.chips import CHIPS
from benchmarks.tpu.train_step import BLOCKS, LENGTH, SEQUENCES, WIDTH
from jaxrec.errors import UserError

# Chips of the topologies that are compiled for.
_CHIPS = 4
NOTE = "what the compiler sets aside on each chip, not measured: no TPU ran"


def mesh_of(text: str) -> tuple[int, int]:
    """Devices along `data` and along `model`.

    Raises:
      UserError: it is none, or there are not as many chips.

    >>> mesh_of("2x2")
    (2, 2)
    """
    found = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if found is None:
        raise UserError(f"--mesh {text}: give DATAxMODEL, for instance 2x2")
    mesh = int(found[1]), int(found[2])
    if mesh[0] * mesh[1] > _CHIPS:
        raise UserError(f"--mesh {text}: there are {_CHIPS} chips")
    return mesh


def step_rows(
    models: Sequence[str],
    *,
    items: Sequence[int],
    meshes: Sequence[str],
    losses: Sequence[str],
    dtypes: Sequence[str],
    chips: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """A row for every combination."""
    for model in models:
        for chip in chips:
            for loss in losses:
                for count in items:
                    for mesh in meshes:
                        for dtype in dtypes:
                            spec = {
                                "model": model,
                                "loss": loss,
                                "items": count,
                                "mesh": mesh_of(mesh),
                                "dtype": dtype,
                                "chip": chip,
                            }
                            yield spec | {
                                "width": WIDTH,
                                "blocks": BLOCKS,
                                "length": LENGTH,
                                "sequences": SEQUENCES,
                                "chip_bytes": CHIPS[chip].hbm_bytes,
                                **in_a_process("benchmarks.tpu.train_step", spec),
                            }


def step_table(found: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table; a cell says what is missing rather than staying empty."""
    shown = Table(
        title=f"train steps: {NOTE}",
        caption="MB on each chip; collectives: how often a step runs them, MB that they make",
    )
    for name in ("model", "loss", "chip", "mesh", "dtype"):
        shown.add_column(name)
    for name in ("items", "arguments", "temporaries", "in all", "of chip", "compiler s"):
        shown.add_column(name, justify="right")
    shown.add_column("kernels")
    shown.add_column("collectives")
    for row in found:
        shown.add_row(
            row["model"],
            row["loss"],
            row["chip"],
            "x".join(map(str, row["mesh"])),
            row["dtype"],
            f"{row['items']:,}",
            *_memory(row),
            f"{row['compile_cpu_seconds']:.0f}" if "compile_cpu_seconds" in row else "",
            ", ".join(f"{n} {name}" for name, n in row.get("kernels", {}).items()),
            ", ".join(
                f"{of['count']} {kind} {of['bytes'] / 1e6:,.0f}"
                for kind, of in row.get("collectives", {}).items()
            ),
        )
    return shown


def _memory(row: dict[str, Any]) -> tuple[str, str, str, str]:
    if "error" in row:
        return "", "", "error", ""
    held = row["hbm_bytes"]
    parts = [f"{held[n] / 1e6:,.0f}" if n in held else "" for n in ("arguments", "temporaries")]
    if "total" not in held:
        return *parts, "too much", ""
    share = f"{held['total'] / row['chip_bytes']:.0%}"
    return *parts, f"{held['total'] / 1e6:,.0f}", share if row["fits"] else f"{share}, too much"
