"""One case compiled for a TPU in a process of its own: `benchmarks.tpu_aot` starts it.

    python -m benchmarks.tpu.measure '{"op": "linear_cross_entropy", "shape": "v3k",
        "backward": true, "dtype": "bfloat16", "implementation": "xla", "chip": "v5e"}'

`"blocks": {"linear_cross_entropy_forward": {"positions": 512, ...}}` has kernels cut their calls
so, instead of as their tuning table or their rule says.

With `-` instead, such objects are read from the standard input, one a line, and answered in turn.

The last line printed is a JSON object: the figures; or `missing`, why there is no kernel for it; or
`error`, why there are no figures.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, kernel_missing, program
from benchmarks.tpu.chips import chip_named
from benchmarks.tpu.schedule import NoScheduleError, Schedule, compile_and_measure
from jaxrec_kernels import tuning
from jaxrec_kernels.tuning.lookup import Lookup
from jaxrec_kernels.tuning.table import Sizes, Table


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Compiles one case in this process and says what was found."""
    case = Case(spec["op"], spec["shape"], spec["backward"])
    dtype = jnp.dtype(spec["dtype"])
    if spec["implementation"] == "pallas" and (reason := kernel_missing(case, dtype)):
        return {"missing": reason}
    f, specs = program(case, dtype, spec["implementation"])
    try:
        kind = chip_named(spec["chip"]).device_kinds[0]
        with tuning.compiling_for(kind), cut_as(case, dtype, spec.get("blocks")):
            found = compile_and_measure(
                f,
                specs,
                spec["chip"],
                free_layouts=case.layouts_are_free,
                open_rounds=case.block_rounds if spec["implementation"] == "xla" else None,
            )
    except NoScheduleError as error:
        return {"error": str(error)}
    return figures(found)


def lookups(case: Case, dtype: Any) -> list[Lookup]:
    """What the kernels of a case look up, each once; their answers are those of their rules."""
    f, specs = program(case, dtype, "pallas")
    with tuning.using(Table("none", (), {})), tuning.looked_up() as found:
        jax.eval_shape(f, *specs)
    # What was traced with these blocks holds for no others.
    jax.clear_caches()
    return list({lookup.kernel: lookup for lookup in found}.values())


def cut_as(
    case: Case, dtype: Any, blocks: Mapping[str, Sizes] | None
) -> AbstractContextManager[None]:
    """Inside, the case's kernels have these blocks, by their names; the others those of the rule.

    None: those of the table, where it has some.
    """
    if blocks is None:
        return nullcontext()
    entries = {
        (lookup.kernel, frozenset(lookup.call.items())): blocks[lookup.kernel]
        for lookup in lookups(case, dtype)
        if lookup.kernel in blocks
    }
    return tuning.using(Table("these", (), entries))


def figures(found: Schedule) -> dict[str, Any]:
    """A schedule as JSON."""
    return {
        "cycles": round(found.cycles),
        "lower_limit": found.is_lower_limit,
        "estimated_cycles": found.estimated_cycles,
        "bytes": found.bytes,
        "temporaries": found.temporaries,
        "vmem_bytes": found.vmem_bytes,
        "spills": found.spills,
        "kernels": {
            p.name: {
                "cycles": round(p.cycles(found.chip)),
                "bundles": round(p.times * p.bundles.cycles),
                "conditional": round(p.times * p.bundles.conditional),
                "conditions_known": p.bundles.conditions_known,
                "bytes": round(p.times * p.bytes),
                "vmem_bytes": p.vmem_bytes,
                "spills": p.bundles.spills + p.bundles.fills,
                "busy": {unit: round(share, 3) for unit, share in p.bundles.busy.items()},
            }
            for p in found.kernels
        },
    }


def serve() -> None:
    """A line of figures for each line of `sys.stdin`; whatever a case fails with is its `error`."""
    for line in sys.stdin:
        try:
            found = measure(json.loads(line))
        except Exception as error:
            said = str(error).strip().splitlines()
            found = {"error": f"{type(error).__name__}: {said[0] if said else ''}"[:300]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "-":
        serve()
    else:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
