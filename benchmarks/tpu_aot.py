"""What the TPU compiler makes of the ops: kernels beside the XLA form, without a TPU.

    python -m benchmarks.tpu_aot                                       # everything; takes an hour
    python -m benchmarks.tpu_aot --op linear_cross_entropy --shape v100k --chips v5e
    python -m benchmarks.tpu_aot --op hstu_attention --chips v5e --json FILE.json
    python -m benchmarks.tpu_aot --op hstu_attention --json FILE.json --impl pallas  # XLA's stay

Every op is compiled ahead of time for every chip on its named shapes, forward and with its
gradient, once as XLA's form and once as the Pallas kernel where there is one, each in a process of
its own. Printed are the cycles of the compiler's schedules (see `benchmarks.tpu.schedule` for what
they are and are not), the ratio of kernel to XLA, memory, registers spilled, and the roofline from
FLOPs and bytes counted by hand. They are no timings: no TPU ran. Arrays of attention lie as each
side likes them best, as layers around it would hand them over; those of a catalogue as the runtime
puts them.

    python -m benchmarks.tpu_aot --train-step sasrec hstu --items 1000000 --mesh 1x1 2x2

compiles whole train steps instead and prints what each chip must hold, see
`benchmarks.tpu.train_step`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case, cases, op_names, shape_names
from benchmarks.tpu.child import in_a_process
from benchmarks.tpu.chips import CHIPS
from benchmarks.tpu.results import NOTE, Results
from benchmarks.tpu.step_table import mesh_of, step_rows, step_table
from benchmarks.tpu.train_step import MODELS
from jaxrec.errors import UserError

Implementation = Literal["xla", "pallas"]


@dataclass(frozen=True)
class Arguments:
    """Compile the ops for TPUs and compare the schedules."""

    op: tuple[str, ...] = ()
    """Ops, by default all that have cases; none where only --train-step is given."""
    shape: tuple[str, ...] = ()
    """Names of shapes in jaxrec_kernels.shapes, by default all."""
    direction: tuple[Literal["forward", "forward+backward"], ...] = ()
    impl: tuple[Implementation, ...] = get_args(Implementation)
    """Sides of the ops to compile; the figures of the other stay as --json has them."""
    train_step: tuple[Literal["sasrec", "hstu"], ...] = ()
    """Models whose train step is compiled: SASRec with the positional kernel, HSTU. By default
    both; none where ops or shapes are given."""
    items: tuple[int, ...] = (1_000_000, 10_000_000)
    """Train steps: items of the catalogue."""
    mesh: tuple[str, ...] = ("1x1", "2x2")
    """Train steps: chips along `data` and along `model`; 1x1 is one chip."""
    loss: tuple[Literal["full_softmax", "own"], ...] = ("full_softmax",)
    """Train steps: over the whole catalogue, or the loss of the experiment's config."""
    chips: tuple[str, ...] = ("v5e", "v6e")
    dtype: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16",)
    """Of the ops' float arguments; of a train step's activations."""
    json: Path | None = None
    """Write the figures here, after every row; a file that is there is continued."""


def rows(arguments: Arguments, results: Results) -> Iterator[dict[str, Any]]:
    """A row for every chip and case, XLA beside the kernel.

    Raises:
      UserError: a side that is not compiled has no figures in `results` either.
    """
    wanted = [
        (case, chip, dtype)
        for case in cases(arguments.op, arguments.shape, arguments.direction)
        for chip in arguments.chips
        for dtype in arguments.dtype
    ]
    kept = [_kept(arguments, results, *one) for one in wanted]
    for one, sides in zip(wanted, kept, strict=True):
        yield _row(*one, sides)


def _kept(
    arguments: Arguments, results: Results, case: Case, chip: str, dtype: str
) -> dict[str, Any]:
    """The sides of a row that are not compiled again."""
    others = [name for name in get_args(Implementation) if name not in arguments.impl]
    if not others:
        return {}
    row = results.op_row(
        op=case.op, shape=case.shape, direction=case.direction, dtype=dtype, chip=chip
    )
    if row is None:
        raise UserError(
            f"--impl {' '.join(arguments.impl)}: no row of {case.op} {case.shape} "
            f"{case.direction} {dtype} for {chip} to take {others[0]} from in --json "
            f"{arguments.json}; compile both once"
        )
    return {name: row[name] for name in others}


def _row(case: Case, chip: str, dtype: str, kept: dict[str, Any]) -> dict[str, Any]:
    """`kept`: the figures of sides that are not compiled."""
    cost = case.cost(2 if dtype == "bfloat16" else 4)
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "size": case.size._asdict(),
        "direction": case.direction,
        "dtype": dtype,
        "chip": chip,
        "flops": cost.flops,
        "least_bytes": cost.bytes,
        "roofline_cycles": round(
            CHIPS[chip].roofline_seconds(cost.flops, cost.bytes) * CHIPS[chip].hertz
        ),
    }
    for implementation in get_args(Implementation):
        if implementation in kept:
            row[implementation] = kept[implementation]
            continue
        spec = {
            "op": case.op,
            "shape": case.shape,
            "backward": case.backward,
            "dtype": dtype,
            "implementation": implementation,
            "chip": chip,
        }
        row[implementation] = in_a_process("benchmarks.tpu.measure", spec)
    both = [row[i].get("cycles") for i in ("pallas", "xla")]
    row["ratio"] = both[0] / both[1] if all(both) else None
    return row


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
    for count in arguments.items:
        if count < 1:
            raise UserError(f"--items {count}: must be positive")
    for mesh in arguments.mesh:
        mesh_of(mesh)


def main(arguments: Arguments) -> int:
    try:
        check(arguments)
        results = Results(arguments.json)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    of_ops = bool(arguments.op or arguments.shape or arguments.direction)
    ops, steps = [], []
    if of_ops or not arguments.train_step:
        try:
            for row in rows(arguments, results):
                ops.append(row)
                results.add_op(row)
                for name in get_args(Implementation):
                    if "error" in row[name]:
                        console.print(f"{row['op']} {row['shape']} {name}: {row[name]['error']}")
                _progress(console, row["op"], row["shape"], row["direction"], row["chip"])
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    if arguments.train_step or not of_ops:
        for row in step_rows(
            arguments.train_step or tuple(MODELS),
            items=arguments.items,
            meshes=arguments.mesh,
            losses=arguments.loss,
            dtypes=arguments.dtype,
            chips=arguments.chips,
        ):
            steps.append(row)
            results.add_step(row)
            if "error" in row:
                console.print(f"{row['model']} {row['items']:,} items: {row['error']}")
            _progress(console, row["model"], f"{row['items']:,} items", row["mesh"], row["chip"])
    if ops:
        console.print(table(ops))
    if steps:
        console.print(step_table(steps))
    return 0


def _progress(console: Console, *words: Any) -> None:
    if console.is_terminal:
        console.print(*words)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
