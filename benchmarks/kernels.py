"""How fast the ops are on the device at hand, against each other and against its ceilings.

    python -m benchmarks.kernels --json benchmarks/results/kernels-cpu2.jsonl --plot roofline.png
    python -m benchmarks.kernels --op hstu_attention --shape n200 n1024 --impl xla pallas
    python -m benchmarks.kernels --quick                                        # a try, in minutes

Every op of `benchmarks.cases` is timed on its named shapes, forward and with its gradient: as
XLA's form, as the Pallas kernel where there is one for this device, and as the naive form, which
forms every [n, n] or [positions, items] array. All get the same arrays and take turns. What is not
measured is a row too, with the reason. See docs/benchmarks.md for what the columns are.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from benchmarks.cases import Case, cases, kernel_missing, op_names, program, shape_names
from benchmarks.timings import rows as files
from benchmarks.timings.ceilings import Ceilings, measure_ceilings
from benchmarks.timings.clock import Timing, calls_a_round, in_turns
from benchmarks.timings.device_trace import device_seconds
from benchmarks.timings.inputs import arrays
from benchmarks.timings.naive import dense_bytes, naive
from benchmarks.timings.roofline import check_plot, draw
from jaxrec.errors import UserError
from jaxrec.training.results import describe_device, versions

Implementation = Literal["xla", "pallas", "naive"]
Direction = Literal["forward", "gradient"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "pallas", "naive")
# Of the memory that is free, what arguments, results and temporaries may take.
_SHARE = 0.8


@dataclass(frozen=True)
class Arguments:
    """Time the ops on the device at hand."""

    op: tuple[str, ...] = ()
    """Ops, by default all that have cases."""
    shape: tuple[str, ...] = ()
    """Names of shapes in jaxrec_kernels.shapes, by default all."""
    impl: tuple[Implementation, ...] = IMPLEMENTATIONS
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ()
    """By default float32 on a CPU and bfloat16 elsewhere."""
    direction: tuple[Direction, ...] = ("forward", "gradient")
    baseline: Implementation = "xla"
    """What the ratios are to."""
    rows: int | None = None
    """So many sequences (attention) or positions (losses) instead of the shape's."""
    quick: bool = False
    """A fiftieth of each shape's sequences or positions, and a tenth of the time."""
    seconds: float = 10.0
    """Time for the rounds of one case; at least five are made."""
    longest: float = 20.0
    """The batch is halved until a call could take no longer at the device's ceilings."""
    json: Path | None = None
    """Add the rows to this file, a line each, as they are measured."""
    plot: Path | None = None
    """Draw the roofline here (PNG; needs matplotlib)."""


class Bench(NamedTuple):
    """What is the same for all cases of a run."""

    arguments: Arguments
    dtype: str
    ceilings: Ceilings
    shared: dict[str, Any]


class Skip(NamedTuple):
    """Why an implementation has no time, and the same in a word or two."""

    reason: str
    briefly: str


class Ready(NamedTuple):
    """A compiled implementation."""

    compiled: Any
    trace_seconds: float
    compile_seconds: float
    temporaries: int


def run(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """The rows, case by case."""
    cpu = jax.default_backend() == "cpu"
    for dtype in arguments.dtype or ("float32" if cpu else "bfloat16",):
        bench = Bench(arguments, dtype, measure_ceilings(dtype), _conditions())
        for case in _chosen(arguments):
            yield from measure(case, bench)


def measure(case: Case, bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of one case, a row an implementation."""
    arguments = bench.arguments
    case, reduced = fitted(case, bench)
    made = {name: prepared(case, name, bench.dtype) for name in arguments.impl}
    if any(isinstance(found, Ready) for found in made.values()):
        given = arrays(case, bench.dtype)
        timings = timed(made, given, arguments)
    else:
        given, timings = [], {}
    baseline = timings.get(arguments.baseline)
    for name, found in made.items():
        row = {
            **bench.shared,
            "op": case.op,
            "shape": case.shape,
            "size": case.size._asdict(),
            "reduced": reduced,
            "direction": _direction(case),
            "dtype": bench.dtype,
            "implementation": name,
        }
        if isinstance(found, Skip):
            yield row | {"skipped": found.reason, "skipped_briefly": found.briefly}
            continue
        on_device = device_seconds(_caller(found, given))
        yield row | figures(case, found, timings[name], baseline, bench, on_device)


def fitted(case: Case, bench: Bench) -> tuple[Case, str | None]:
    """The case with as many sequences or positions as memory and time allow, and why so few."""
    named = case.size[0]
    what = {"batch": "sequences"}.get(case.size._fields[0], case.size._fields[0])
    rows, why = named, ""
    if bench.arguments.rows is not None:
        rows, why = bench.arguments.rows, "asked for by --rows"
    elif bench.arguments.quick:
        rows, why = max(1, named // 50), "asked for by --quick"
    itemsize, free = jnp.dtype(bench.dtype).itemsize, _SHARE * free_bytes()
    while rows > 1:
        smaller = case._replace(rows=rows)
        cost = smaller.cost(itemsize)
        floor = bench.ceilings.roofline_seconds(cost.flops, cost.bytes)
        if floor > bench.arguments.longest:
            why = f"a call would take at least {floor:,.0f} s with {rows:,}"
        elif cost.bytes > free:
            why = f"arguments and results take some {cost.bytes / 1e9:,.1f} GB with {rows:,}"
        else:
            break
        rows //= 2
    if rows == named:
        return case, None
    return case._replace(rows=rows), f"{rows:,} of {named:,} {what}: {why}"


def prepared(case: Case, implementation: Implementation, dtype: str) -> Ready | Skip:
    """The compiled program, or why there is none."""
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    free = free_bytes()
    if implementation == "pallas" and (missing := kernel_missing(case, dtype, platform)):
        return Skip(missing, "no kernel here")
    if implementation == "naive" and dense_bytes(case) > _SHARE * free:
        return _too_large(dense_bytes(case), free, "its dense array alone takes")
    instead = naive(case) if implementation == "naive" else None
    f, specs = program(case, dtype, None if instead else implementation, instead)
    try:
        start = time.perf_counter()
        lowered = jax.jit(f).lower(*specs)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
    except Exception as error:
        return Skip(f"does not compile: {_first_line(error)}", "does not compile")
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes if memory else 0
    needed = temporaries
    if memory:
        needed += memory.argument_size_in_bytes + memory.output_size_in_bytes
    if needed > _SHARE * free:
        return _too_large(needed, free, "arguments, results and temporaries take")
    return Ready(compiled, traced - start, done - traced, temporaries)


def timed(
    made: dict[Implementation, Ready | Skip], given: list[Any], arguments: Arguments
) -> dict[str, Timing]:
    """Times what is ready; what fails on its first call becomes a `Skip` in `made`."""
    chained = jax.default_backend() != "cpu"
    ways = {}
    for name, found in made.items():
        if isinstance(found, Ready):
            call = _caller(found, given)
            try:
                ways[name] = call, calls_a_round(call, chained=chained)
            except Exception as error:
                made[name] = Skip(f"fails when run: {_first_line(error)}", "fails when run")
    seconds = arguments.seconds / (10 if arguments.quick else 1)
    return dict(in_turns(ways, seconds=seconds, chained=chained)) if ways else {}


def figures(
    case: Case,
    found: Ready,
    timing: Timing,
    baseline: Timing | None,
    bench: Bench,
    on_device: float | None,
) -> dict[str, Any]:
    """What one implementation reached."""
    cost = case.cost(jnp.dtype(bench.dtype).itemsize)
    roofline = bench.ceilings.roofline_seconds(cost.flops, cost.bytes)
    low, high = timing.quartiles
    chained = jax.default_backend() != "cpu"
    return {
        "median_ms": 1e3 * timing.median,
        "spread_ms": [1e3 * low, 1e3 * high],
        "best_ms": 1e3 * min(timing.seconds),
        "rounds": len(timing.seconds),
        "calls_a_round": timing.calls,
        "clock": "host, calls sent one after the other" if chained else "host, each call awaited",
        "device_ms": None if on_device is None else 1e3 * on_device,
        "baseline": bench.arguments.baseline,
        "ratio": timing.median / baseline.median if baseline else None,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "flops_per_second": cost.flops / timing.median,
        "bytes_per_second": cost.bytes / timing.median,
        "ceilings": bench.ceilings._asdict(),
        "roofline_ms": 1e3 * roofline,
        "of_roofline": roofline / timing.median,
        "temporaries_bytes": found.temporaries,
        "trace_seconds": found.trace_seconds,
        "compile_seconds": found.compile_seconds,
        "load_average": os.getloadavg()[0],
    }


def free_bytes() -> int:
    """Memory of the device that nothing holds."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def check(arguments: Arguments) -> None:
    """Raises UserError for what could only fail later."""
    for what, given, known in (
        ("op", arguments.op, op_names()),
        ("shape", arguments.shape, shape_names()),
    ):
        for name in given:
            if name not in known:
                raise UserError(f"--{what} {name}: no such {what}; there are {', '.join(known)}")
    for name in ("rows", "seconds", "longest"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be positive, got {value}")
    if not any(_chosen(arguments)):
        raise UserError("none of these ops has any of these shapes; see jaxrec_kernels/shapes.py")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"{arguments.json}: there is no such folder to write the rows to")
    if arguments.plot is not None:
        check_plot(arguments.plot)


def main(arguments: Arguments) -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    found: list[dict[str, Any]] = []
    try:
        check(arguments)
        for row in run(arguments):
            if arguments.json is not None:
                files.append(arguments.json, row)
            found.append(row)
            console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was measured stays", file=sys.stderr)
    if found:
        console.print(files.table(found, _title(found), arguments.baseline))
        if arguments.plot is not None:
            draw(found, arguments.plot)
    return 0


def _chosen(arguments: Arguments) -> Iterator[Case]:
    for case in cases(arguments.op, arguments.shape):
        if _direction(case) in arguments.direction:
            yield case


def _direction(case: Case) -> Direction:
    return "gradient" if case.backward else "forward"


def _caller(found: Ready, given: list[Any]) -> Callable[[], Any]:
    return lambda: found.compiled(*given)


def _too_large(needed: int, free: int, what: str) -> Skip:
    text = f"does not fit: {what} {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
    return Skip(text, "does not fit")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _conditions() -> dict[str, Any]:
    return {
        "benchmark": "kernels",
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": describe_device(),
        "versions": versions(),
    }


def _line(row: dict[str, Any]) -> str:
    what = f"{row['op']} {row['shape']} {row['direction']} {row['dtype']} {row['implementation']}: "
    if "skipped" in row:
        return what + row["skipped"]
    ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} of {row['baseline']}"
    smaller = f" ({row['reduced']})" if row["reduced"] else ""
    return f"{what}{row['median_ms']:,.2f} ms{ratio}{smaller}"


def _title(found: list[dict[str, Any]]) -> str:
    told = {row["dtype"]: row["ceilings"] for row in found if "skipped" not in row}
    roofs = "; ".join(
        f"{dtype}: {c['flops_per_second'] / 1e9:,.0f} GFLOP/s, {c['bytes_per_second'] / 1e9:,.0f} "
        "GB/s measured"
        for dtype, c in told.items()
    )
    return f"{found[0]['device']}, JAX {found[0]['versions']['jax']}; {roofs or 'nothing measured'}"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
