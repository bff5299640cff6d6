"""One case compiled for a TPU in a process of its own: `benchmarks.tpu_aot` starts it.

    python -m benchmarks.tpu_measure '{"op": "linear_cross_entropy", "shape": "v3k",
        "backward": true, "dtype": "bfloat16", "implementation": "xla", "chip": "v5e"}'

The last line printed is a JSON object: the figures; or `missing`, why there is no kernel for it; or
`error`, why there are no figures.
"""

import json
import sys
from typing import Any

import jax.numpy as jnp

from benchmarks.schedule import NoScheduleError, Schedule, compile_and_measure
from benchmarks.tpu_cases import Case, kernel_missing, program


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Compiles one case in this process and says what was found."""
    case = Case(spec["op"], spec["shape"], spec["backward"])
    dtype = jnp.dtype(spec["dtype"])
    if spec["implementation"] == "pallas" and (reason := kernel_missing(case, dtype)):
        return {"missing": reason}
    f, specs = program(case, dtype, spec["implementation"])
    try:
        found = compile_and_measure(f, specs, spec["chip"])
    except NoScheduleError as error:
        return {"error": str(error)}
    return figures(found)


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
                "bundles": p.times * p.bundles.cycles,
                "conditional": p.times * p.bundles.conditional,
                "conditions_known": p.bundles.conditions_known,
                "bytes": p.times * p.bytes,
                "vmem_bytes": p.vmem_bytes,
                "spills": p.bundles.spills + p.bundles.fills,
                "busy": {unit: round(share, 3) for unit, share in p.bundles.busy.items()},
            }
            for p in found.kernels
        },
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
