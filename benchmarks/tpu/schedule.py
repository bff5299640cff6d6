"""How long a function would take on a TPU, by the schedule that the compiler made for it.

    from benchmarks.tpu.schedule import compile_and_measure
    found = compile_and_measure(f, specs, "v5e")
    print(found.cycles, found.kernels)

Needs the TPU compiler (`pip install "jax[tpu]"`) and no TPU. These are the compiler's schedules,
not timings: what a chip waits for memory beyond its bandwidth, and what its units stall on each
other, is not in them. They tell which of two programs does less.

The cycles of a program are the sum over its parts (kernels, fusions, copies) of the larger of
bundles and bytes over bandwidth, and no less than all its bytes over bandwidth. A kernel and its
baseline are counted alike.
"""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Format, Layout

from benchmarks.tpu.bundles import Bundles, NoScheduleError, read_bundles
from benchmarks.tpu.chips import CHIPS, Chip, chip_named
from benchmarks.tpu.hlo_text import Instruction, Program, Step
from benchmarks.tpu.pallas_traffic import KernelTraffic, kernel_traffic

__all__ = ["CHIPS", "NoScheduleError", "Part", "Schedule", "compile_and_measure", "read_schedule"]

# What the compiler is asked to write down.
_PASSES = ".*(final.*bundle|deduplication).*"
_FLAGS = "LIBTPU_INIT_ARGS"
# Instructions whose work is in the program around them.
_NO_WORK = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "copy-done"}


class Part(NamedTuple):
    """One instruction of the program that is a program of its own.

    `bytes` are those between main memory and chip of one run, `estimated_cycles` is the compiler's
    estimate of one run, where it made one. `kernel` is the name given to `pl.pallas_call`.
    """

    name: str
    times: float
    bundles: Bundles
    bytes: int
    estimated_cycles: int | None
    vmem_bytes: int
    kernel: str | None

    def cycles(self, chip: Chip) -> float:
        """Of all its runs: the larger of bundles and bytes over bandwidth."""
        return self.times * max(self.bundles.cycles, self.bytes / chip.bytes_per_cycle)


class Schedule(NamedTuple):
    """What the compiler planned for a function on a chip."""

    chip: Chip
    parts: tuple[Part, ...]
    background_bytes: int  # copied while something else runs
    temporaries: int  # bytes in main memory besides arguments and results

    @property
    def kernels(self) -> tuple[Part, ...]:
        return tuple(p for p in self.parts if p.kernel is not None)

    @property
    def bytes(self) -> int:
        return round(sum(p.times * p.bytes for p in self.parts)) + self.background_bytes

    @property
    def cycles(self) -> float:
        parts = sum(p.cycles(self.chip) for p in self.parts)
        return max(parts, self.bytes / self.chip.bytes_per_cycle)

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's own estimates, summed; None where a part that takes long has none."""
        without = sum(p.cycles(self.chip) for p in self.parts if p.estimated_cycles is None)
        if without > 0.05 * self.cycles:
            return None
        return round(sum(p.times * p.estimated_cycles for p in self.parts if p.estimated_cycles))

    @property
    def seconds(self) -> float:
        return self.cycles / self.chip.hertz

    @property
    def spills(self) -> int:
        """Stores and loads of registers that did not fit, in the code of the kernels."""
        return sum(p.bundles.spills + p.bundles.fills for p in self.kernels)

    @property
    def vmem_bytes(self) -> int:
        """The most that one part takes for itself."""
        return max((p.vmem_bytes for p in self.parts), default=0)

    @property
    def is_lower_limit(self) -> bool:
        """Whether a loop without a constant number of rounds was counted once where it matters."""
        open_parts = [p for p in self.parts if p.bundles.open_loops]
        few = sum(p.cycles(self.chip) for p in open_parts) < 0.02 * self.cycles
        return not few or any(p.kernel for p in open_parts)

    def of(self, kernel: str) -> Part:
        """The part of the one kernel of this name."""
        found = [p for p in self.kernels if p.kernel == kernel]
        if len(found) != 1:
            raise NoScheduleError(f"no schedule found: {len(found)} kernels are named {kernel!r}")
        return found[0]


def compile_and_measure(
    f: Callable[..., Any],
    specs: Sequence[Any],
    chip: str = "v5e",
    *,
    free_layouts: bool = False,
    open_rounds: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Schedule:
    """Compiles a function for a TPU, here, and reads the schedule.

    Args:
      f: a function of arrays; jitted here.
      specs: its arguments as `jax.ShapeDtypeStruct`, or anything with a shape and a dtype; those
        that name a sharding keep it, the others lie on one chip.
      chip: a name of `CHIPS`.
      free_layouts: arguments and results lie in memory as the compiler likes best, as those of a
        part of a program do. Else as the runtime puts arrays: narrow ones turned so that they fill
        the lanes, and copied by a program that wants them otherwise.
      open_rounds: how often on average a loop of the program runs whose rounds are no constant; a
        program with such a loop is refused without.
      options: compiler options.

    Raises:
      NoScheduleError: the compiler left nothing that can be read. The compiler is asked for its
        schedules when it starts, so it must not have been used in this process before.
    """
    found = chip_named(chip)
    folder = _dump_folder()
    one_chip = jax.sharding.SingleDeviceSharding(_device(found.topology))
    placed = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=getattr(s, "sharding", None) or one_chip)
        for s in specs
    ]
    formats = {}
    if free_layouts:
        formats = dict.fromkeys(("in_shardings", "out_shardings"), Format(Layout.AUTO))
    with _emptied(folder):
        lowered = jax.jit(f, **formats).lower(*placed)
        compiled = lowered.compile(compiler_options=dict(options or {}))
        files = {p.name: p.read_text("utf-8", "replace") for p in sorted(folder.glob("*.txt"))}
    if not files:
        raise NoScheduleError(
            "no schedule found: the compiler wrote none; it was already in use in this process"
        )
    return read_schedule(
        compiled.as_text(),
        files,
        found,
        traffic=kernel_traffic(f, *placed),
        open_rounds=open_rounds,
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
    )


def read_schedule(
    program: str,
    files: Mapping[str, str],
    chip: Chip,
    *,
    traffic: Sequence[KernelTraffic] = (),
    open_rounds: float | None = None,
    temporaries: int = 0,
) -> Schedule:
    """The schedule in what the compiler wrote.

    Args:
      program: the optimised program, `compiled.as_text()`.
      files: name -> text of the files that it wrote down.
      chip: what was compiled for.
      traffic: what the Pallas kernels of the program move.
      open_rounds: as in `compile_and_measure`.
      temporaries: bytes, from `memory_analysis`.

    Raises:
      NoScheduleError: something is missing or not of the expected form.
    """
    parsed = Program(program, open_rounds)
    dumps = _Dumps(files)
    waiting = list(traffic)
    parts, background = [], 0.0
    for step in parsed.steps():
        instruction = step.instruction
        if instruction.opcode in _NO_WORK:
            continue
        if instruction.opcode.endswith("-start"):
            background += step.times * parsed.moved(instruction)
            continue
        kernel = instruction.kernel_name if instruction.is_kernel else None
        texts = dumps.of(instruction.name)
        if texts is None:
            if kernel is not None or instruction.opcode == "fusion":
                raise NoScheduleError(f"no schedule found for %{instruction.name}")
            continue  # done by the program around it
        moved, shares, copied = parsed.moved(instruction), (), None
        if kernel is not None:
            mine = _traffic_of(kernel, waiting)
            moved, copied = _kernel_bytes(parsed, step, mine)
            shares = mine.conditions or ()
        bundles = read_bundles(*texts, shares, copied)
        parts.append(
            Part(
                instruction.name,
                step.times,
                bundles,
                moved,
                instruction.estimated_cycles,
                instruction.vmem_bytes,
                kernel,
            )
        )
    if not parts:
        raise NoScheduleError("no schedule found: the program has no parts of its own")
    return Schedule(chip, tuple(parts), round(background), temporaries)


class _Dumps:
    """The compiler's files by instruction; identical instructions share one program."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._listings, self._usage, self._keys = {}, {}, {}
        for name, text in files.items():
            stem = name.partition("-")[2].removesuffix(".txt")
            for ending, store in (
                ("-final_bundles", self._listings),
                ("-final_hlo-static-per-bundle-utilization", self._usage),
            ):
                # The number of the pass stands before its name.
                if stem.endswith(ending) and not stem.endswith("analysis_final_bundles"):
                    store[stem.removesuffix(ending).rpartition("-")[0]] = text
            if stem.endswith("-deduplication-map"):
                self._keys |= _equivalents(text)

    def of(self, name: str) -> tuple[str, str] | None:
        key = name if name in self._listings else self._keys.get(name, name)
        if key not in self._listings or key not in self._usage:
            return None
        return self._listings[key], self._usage[key]


def _equivalents(text: str) -> dict[str, str]:
    found, key = {}, ""
    for line in text.splitlines():
        if line.startswith("key:"):
            key = line[4:]
        elif line.startswith("  "):
            found[line.strip()] = key
    return found


def _traffic_of(kernel: str, waiting: list[KernelTraffic]) -> KernelTraffic:
    """The first of this name that is still waiting."""
    found = next((t for t in waiting if t.name == kernel), None)
    if found is None:
        raise NoScheduleError(f"no schedule found: what kernel {kernel!r} moves is not known")
    waiting.remove(found)
    return found


def _kernel_bytes(program: Program, step: Step, mine: KernelTraffic) -> tuple[int, int | None]:
    """What one run of a kernel moves of main memory, and of its arrays that lie in VMEM."""
    instruction = step.instruction
    arrays = [*_operand_arrays(program, instruction), *instruction.arrays]
    if mine.bytes is not None and len(mine.bytes) == len(arrays):
        outside = sum(b for b, array in zip(mine.bytes, arrays, strict=True) if array.hbm)
        return outside, sum(mine.bytes) - outside
    said = _said_bytes(instruction)
    if said is None:
        raise NoScheduleError(
            f"no schedule found: the index maps of kernel {mine.name!r} do not tell what it "
            "moves; give pl.pallas_call a cost_estimate"
        )
    return said, None


def _operand_arrays(program: Program, instruction: Instruction) -> Iterator[Any]:
    around = program.around(instruction)
    for name in instruction.operands:
        yield around[name].arrays[0]


def _said_bytes(instruction: Instruction) -> int | None:
    """`bytes_accessed` of the kernel's own cost estimate."""
    found = re.search(r'"bytes_accessed":"?(\d+)', instruction.rest)
    return int(found.group(1)) if found else None


@cache
def _dump_folder() -> Path:
    """Where the compiler writes; its flags are read once, when it starts."""
    folder = tempfile.mkdtemp(prefix="schedule-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = (
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex={_PASSES}",
    )
    os.environ[_FLAGS] = " ".join((os.environ.get(_FLAGS, ""), *flags)).strip()
    # Without these a compile looks for a TPU on the network, and two processes exclude each other.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return Path(folder)


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    def empty() -> None:
        for path in folder.iterdir():
            path.unlink(missing_ok=True)

    empty()
    try:
        yield
    finally:
        empty()


@cache
def _device(topology: str) -> Any:
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        # JAX raises its runtime's own kinds.
        raise NoScheduleError(
            f"no schedule found: no TPU compiler for {topology}: {str(error).splitlines()[0]}"
        ) from None
    return found.devices[0]
