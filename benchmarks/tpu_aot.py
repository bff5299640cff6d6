"""What the TPU compiler makes of the ops: kernels beside the XLA form, without a TPU.

    python -m benchmarks.tpu_aot                                       # everything; takes an hour
    python -m benchmarks.tpu_aot --op linear_cross_entropy --shape v100k --chips v5e
    python -m benchmarks.tpu_aot --op hstu_attention --json benchmarks/results/tpu_aot-hstu.json

Every op is compiled ahead of time for every chip on its named shapes, forward and with its
gradient, once as XLA's form and once as the Pallas kernel where there is one, each in a process of
its own. Printed are the cycles of the compiler's schedules (see `benchmarks.schedule` for what they
are and are not), the ratio of kernel to XLA, memory, registers spilled, and the roofline from FLOPs
and bytes counted by hand. They are no timings: no TPU ran.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.chips import CHIPS
from benchmarks.tpu_cases import cases, op_names, shape_names
from jaxrec.errors import UserError

NOTE = "compiler schedules, not timings: no TPU ran"
_CHILD_SECONDS = 1800


@dataclass(frozen=True)
class Arguments:
    """Compile the ops for TPUs and compare the schedules."""

    op: tuple[str, ...] = ()
    """Ops, by default all that have cases."""
    shape: tuple[str, ...] = ()
    """Names of shapes in jaxrec_kernels.shapes, by default all."""
    direction: tuple[Literal["forward", "forward+backward"], ...] = ()
    chips: tuple[str, ...] = ("v5e", "v6e")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    json: Path | None = None
    """Write the figures here, one JSON object with a list of rows."""


def in_a_process(spec: dict[str, Any]) -> dict[str, Any]:
    """What `benchmarks.tpu_measure` says of one case, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tpu_measure", json.dumps(spec)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_CHILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {_CHILD_SECONDS} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": said[-1] if said else f"ended with code {done.returncode}"}
    return json.loads(lines[-1])


def rows(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """A row for every chip and case, XLA beside the kernel."""
    itemsize = 2 if arguments.dtype == "bfloat16" else 4
    for case in cases(arguments.op, arguments.shape, arguments.direction):
        cost = case.cost(itemsize)
        for chip in arguments.chips:
            row: dict[str, Any] = {
                "op": case.op,
                "shape": case.shape,
                "size": case.size._asdict(),
                "direction": case.direction,
                "dtype": arguments.dtype,
                "chip": chip,
                "flops": cost.flops,
                "least_bytes": cost.bytes,
                "roofline_cycles": round(
                    CHIPS[chip].roofline_seconds(cost.flops, cost.bytes) * CHIPS[chip].hertz
                ),
            }
            for implementation in ("xla", "pallas"):
                spec = {
                    "op": case.op,
                    "shape": case.shape,
                    "backward": case.backward,
                    "dtype": arguments.dtype,
                    "implementation": implementation,
                    "chip": chip,
                }
                row[implementation] = in_a_process(spec)
            both = [row[i].get("cycles") for i in ("pallas", "xla")]
            row["ratio"] = both[0] / both[1] if all(both) else None
            yield row


def table(found: list[dict[str, Any]]) -> Table:
    """The rows as a table; a cell says what is missing rather than staying empty."""
    shown = Table(title=NOTE, caption="cycles in thousands; ≥: a loop of unknown length inside")
    for name in ("op", "shape", "", "chip"):
        shown.add_column(name)
    for name in ("roofline", "XLA", "kernel", "kernel/XLA", "HBM temp MB", "VMEM MB", "spills"):
        shown.add_column(name, justify="right")
    for row in found:
        kernel = row["pallas"]
        held = [_megabytes(row[i].get("temporaries")) for i in ("xla", "pallas")]
        shown.add_row(
            row["op"],
            row["shape"],
            "fwd+bwd" if "backward" in row["direction"] else "fwd",
            row["chip"],
            f"{row['roofline_cycles'] / 1e3:,.0f}",
            _cycles(row["xla"]),
            _cycles(kernel),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            " / ".join(held) if "cycles" in kernel else held[0],
            _megabytes(kernel.get("vmem_bytes")),
            str(kernel.get("spills", "")),
        )
    return shown


def _cycles(side: dict[str, Any]) -> str:
    if "missing" in side:
        return "no kernel yet" if "yet" in side["missing"] else "unsupported"
    if "error" in side:
        return side["error"].partition(":")[0]
    return f"{'≥ ' if side['lower_limit'] else ''}{side['cycles'] / 1e3:,.0f}"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f}"


def check(arguments: Arguments) -> None:
    """Raises UserError for a name that does not exist."""
    for what, given, known in (
        ("op", arguments.op, op_names()),
        ("shape", arguments.shape, shape_names()),
        ("chip", arguments.chips, tuple(CHIPS)),
    ):
        for name in given:
            if name not in known:
                raise UserError(f"--{what} {name}: no such {what}; there are {', '.join(known)}")
    if not any(cases(arguments.op, arguments.shape, arguments.direction)):
        raise UserError("none of these ops has any of these shapes; see jaxrec_kernels/shapes.py")


def main(arguments: Arguments) -> int:
    try:
        check(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    found = []
    for row in rows(arguments):
        found.append(row)
        for name in ("xla", "pallas"):
            if "error" in row[name]:
                console.print(f"{row['op']} {row['shape']} {name}: {row[name]['error']}")
        if console.is_terminal:
            console.print(f"{row['op']} {row['shape']} {row['direction']} {row['chip']}")
        if arguments.json is not None:
            # After every row: a run takes long.
            arguments.json.write_text(json.dumps(_report(found), indent=1) + "\n", encoding="utf-8")
    console.print(table(found))
    return 0


def _report(found: list[dict[str, Any]]) -> dict[str, Any]:
    from jaxrec.training.results import versions

    return {
        "benchmark": "tpu_aot",
        "note": NOTE,
        "versions": _with_libtpu(versions()),
        "rows": found,
    }


def _with_libtpu(found: dict[str, str]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return found | {"libtpu": version("libtpu")}
    except PackageNotFoundError:
        return found


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
