"""What blocks cost: by the TPU compiler's schedules, or by the clock of a TPU."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, program
from benchmarks.timings.clock import calls_a_round, in_turns
from benchmarks.timings.inputs import arrays
from benchmarks.tpu.measure import cut_as
from benchmarks.tuning.search import Figure
from jaxrec_kernels.tuning.table import Sizes

Blocks = Mapping[str, Sizes]
# One program; the compiler is ended then.
_LONGEST_SECONDS = 900
_TIMED_SECONDS = 3.0


class MeasuringError(Exception):
    """There are no figures; says why."""


class Measurer(Protocol):
    """Measures a case with some of its kernels' blocks given, the others' being the rules'."""

    by: str
    unit: str
    tells_apart: bool
    """Whether the figures of several kernels come from one program."""
    sees_starts: bool
    """Whether the figures have in them what it takes to begin a program."""
    said: str
    """Why the last one failed."""

    def measure(self, case: Case, dtype: str, blocks: Blocks) -> dict[str, Figure] | None:
        """A figure for each kernel in `blocks`; None where the program failed."""


class Schedules:
    """Cycles by the compiler's schedule; it runs in a process of its own, which it may end."""

    by, unit, tells_apart, sees_starts = "schedule", "cycles", True, False

    def __init__(self, chip: str) -> None:
        self._chip, self.said = chip, ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Schedules":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def measure(self, case: Case, dtype: str, blocks: Blocks) -> dict[str, Figure] | None:
        found = self._ask(
            {
                "op": case.op,
                "shape": case.shape,
                "backward": case.backward,
                "dtype": dtype,
                "implementation": "pallas",
                "chip": self._chip,
                "blocks": blocks,
            }
        )
        if "cycles" not in found:
            self.said = found.get("error") or found["missing"]
            return None
        return {name: figure_of(name, found) for name in blocks}

    def _ask(self, spec: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.tpu.measure", "-"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(_LONGEST_SECONDS, process.kill)
        watch.start()
        try:
            print(json.dumps(spec), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if line:
            return json.loads(line)
        self._end()
        return {"error": f"the compiler ended, or took more than {_LONGEST_SECONDS} s"}

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def figure_of(kernel: str, figures: dict[str, Any]) -> Figure:
    """Of a kernel's part of a program; of all of it where no part has the kernel's name."""
    mine = [x for name, x in figures["kernels"].items() if name.partition(".")[0] == kernel]
    if not mine:
        return Figure(figures["cycles"], figures["spills"])
    return Figure(sum(x["cycles"] for x in mine), sum(x["spills"] for x in mine))


class Device:
    """Seconds of the whole program on the device at hand, taken in turns with the rules' blocks.

    A figure is the ratio of the two medians times the first one of the rules, so that a device that
    grows slower does so for all blocks alike.
    """

    by, unit, tells_apart, sees_starts = "device", "seconds", False, True

    def __init__(self) -> None:
        self.said = ""
        self._first: dict[Case, float] = {}

    def measure(self, case: Case, dtype: str, blocks: Blocks) -> dict[str, Figure] | None:
        given = arrays(case, jnp.dtype(dtype))
        try:
            ways = {
                "rule": self._way(case, dtype, {}, given),
                "these": self._way(case, dtype, blocks, given),
            }
        except jax.errors.JaxRuntimeError as error:
            self.said = str(error).splitlines()[0]
            return None
        timings = in_turns(ways, seconds=_TIMED_SECONDS, chained=True)
        rule, these = timings["rule"].median, timings["these"].median
        first = self._first.setdefault(case, rule)
        return dict.fromkeys(blocks, Figure(first * these / rule, 0))

    def _way(self, case: Case, dtype: str, blocks: Blocks, given: list[jax.Array]) -> Any:
        f, _ = program(case, jnp.dtype(dtype), "pallas")
        with cut_as(case, jnp.dtype(dtype), blocks):
            compiled = jax.jit(f).lower(*given).compile()

        def way() -> Any:
            return compiled(*given)

        return way, calls_a_round(way, chained=True)
