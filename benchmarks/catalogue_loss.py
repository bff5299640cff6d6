"""How fast the full-catalogue loss trains, beside the dense form and the machine's floor.

    python -m benchmarks.catalogue_loss                        # MovieLens-1M's shape
    python -m benchmarks.catalogue_loss --positions 1200 --items 12101 --valid 0.626
    python -m benchmarks.catalogue_loss --positions 25600 --items 1000000 --memory

The first form times the value and gradient of `mean_linear_cross_entropy`, of
`linear_cross_entropy`, and of the dense form (all logits, then optax), one after the other in every
round, so that a busy machine slows all of them alike. The floor is arithmetic with rates measured
in the same run: matrix products at the speed of a large square one, exponentials at the speed of
one block that stays in cache. FLOPs are 2 P V D a product. With `--valid` the gradient of the mean
is taken once more with so many of the positions valid, each the start of a row of 200 slots, as
packed histories fill them.

With `--memory` nothing is timed: a child process takes the gradient once, and the growth of its
peak resident memory is set against the gradients that it must return.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peak_memory import peak_bytes
from jaxrec import ops

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# The dense form holds its logits two or three times over; above this it is left out.
LARGEST_DENSE = 2 << 30


def dense(hidden: jax.Array, item_table: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jnp.matmul(hidden, item_table.T, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean(hidden: jax.Array, item_table: jax.Array, labels: jax.Array) -> jax.Array:
    return ops.mean_linear_cross_entropy(hidden, item_table, labels)


def per_position(hidden: jax.Array, item_table: jax.Array, labels: jax.Array) -> jax.Array:
    return ops.linear_cross_entropy(hidden, item_table, labels).mean()


def padded(share: float) -> Loss:
    """The mean over the first slots of each row of 200."""

    def loss(hidden: jax.Array, item_table: jax.Array, labels: jax.Array) -> jax.Array:
        valid = jnp.arange(labels.shape[0]) % 200 < round(200 * share)
        return ops.mean_linear_cross_entropy(hidden, item_table, labels, valid=valid)

    return loss


def gradient(loss: Loss) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


class Way(NamedTuple):
    """A loss or its gradient, and what it cannot do without for each logit of its positions."""

    function: Callable[..., Any]
    products: int
    exponentials: int
    positions: float = 1.0  # the share that it needs


WAYS: dict[str, Way] = {
    "dense gradient": Way(gradient(dense), 3, 1),
    "mean gradient": Way(gradient(mean), 3, 1),
    "per-position gradient": Way(gradient(per_position), 4, 2),
    "per-position loss": Way(jax.jit(per_position), 1, 1),
}


def inputs(positions: int, items: int, width: int, dtype: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((positions, width), np.float32)
    item_table = rng.standard_normal((items, width), np.float32) * np.float32(0.2)
    labels = rng.integers(0, items, positions)
    return jnp.asarray(hidden, dtype), jnp.asarray(item_table, dtype), jnp.asarray(labels, "int32")


def seconds(f: Callable[..., Any], *arguments: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(f(*arguments))
    return time.perf_counter() - begin


def measure(args: argparse.Namespace) -> dict[str, Any]:
    shape = (args.positions, args.items, args.width)
    arrays = inputs(*shape, args.dtype)
    ways = dict(WAYS)
    if 4 * args.positions * args.items > LARGEST_DENSE:
        del ways["dense gradient"]
    if args.valid < 1:
        ways["mean gradient, padded"] = Way(gradient(padded(args.valid)), 3, 1, args.valid)

    side = 2048
    square = jnp.ones((side, side), args.dtype)
    block = jnp.ones((min(512, args.positions), min(3416, args.items)), jnp.float32)
    times = 20
    rates = {
        "product": jax.jit(lambda x: x @ x),
        # exp(-x) keeps its values in range, so that every round does the same work.
        "exponential": jax.jit(
            lambda x: jax.lax.fori_loop(0, times, lambda _, y: jnp.exp(-y), x),
        ),
    }
    operands: dict[str, tuple[Any, ...]] = {"product": (square,), "exponential": (block,)}
    everything = {name: (way.function, arrays) for name, way in ways.items()}
    everything |= {name: (f, operands[name]) for name, f in rates.items()}

    taken: dict[str, list[float]] = {name: [] for name in everything}
    for f, given in everything.values():
        seconds(f, *given)
    for _ in range(args.repeats):
        for name, (f, given) in everything.items():
            taken[name].append(seconds(f, *given))

    flops_per_second = 2 * side**3 / min(taken["product"])
    exps_per_second = times * block.size / min(taken["exponential"])
    logits = args.positions * args.items
    rows = []
    for name, way in ways.items():
        needed = logits * way.positions
        flops = 2 * way.products * needed * args.width
        floor = flops / flops_per_second + way.exponentials * needed / exps_per_second
        median = statistics.median(taken[name])
        against = taken.get("dense gradient")
        compiled = way.function.lower(*arrays).compile()
        rows.append(
            {
                "name": name,
                "median_ms": 1e3 * median,
                "best_ms": 1e3 * min(taken[name]),
                "of_dense": median / statistics.median(against) if against else None,
                "gflop_per_s": flops / min(taken[name]) / 1e9,
                "floor_ms": 1e3 * floor,
                "floor_share": floor / min(taken[name]),
                "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
            }
        )
    return {
        "rows": rows,
        "product_gflop_per_s": flops_per_second / 1e9,
        "exponentials_per_ns": exps_per_second / 1e9,
    }


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Runs `child` in a process of its own, since peak memory never goes down."""
    command = [sys.executable, "-m", "benchmarks.catalogue_loss", "--child"]
    for name in ("positions", "items", "width", "dtype"):
        command += [f"--{name}", str(getattr(args, name))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def child(args: argparse.Namespace) -> dict[str, Any]:
    arrays = inputs(args.positions, args.items, args.width, args.dtype)
    jax.block_until_ready(arrays)
    f = WAYS["per-position gradient"].function.lower(*arrays).compile()
    before = resident_bytes()
    begin = time.perf_counter()
    _, grads = jax.block_until_ready(f(*arrays))
    taken = time.perf_counter() - begin
    peak = peak_bytes()
    returned = sum(g.nbytes for g in grads)
    return {
        "seconds_once": taken,
        "resident_before_mb": before / 1e6,
        "peak_mb": peak / 1e6,
        "growth_mb": (peak - before) / 1e6,
        "gradients_mb": returned / 1e6,
        "temporaries_mb": (peak - before - returned) / 1e6,
        "compiler_says_mb": f.memory_analysis().temp_size_in_bytes / 1e6,
    }


def resident_bytes() -> int:
    """Resident memory now; on systems without /proc the peak until now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()


def show(report: dict[str, Any]) -> None:
    shape, device = report["shape"], report["device"]
    print(f"P {shape['positions']}, V {shape['items']}, D {shape['width']}, {shape['dtype']}")
    print(f"{device['name']}, {device['cores']} cores, jax {device['jax']}")
    if "memory" in report:
        for name, value in report["memory"].items():
            print(f"  {name:20} {value:10.1f}")
        return
    print(
        f"products {report['product_gflop_per_s']:.0f} GFLOP/s, "
        f"exponentials {report['exponentials_per_ns']:.2f} a ns"
    )
    print(
        f"{'':22} {'median ms':>9} {'best ms':>9} {'of dense':>9} {'GFLOP/s':>9} "
        f"{'floor ms':>9} {'floor/best':>10} {'temp MB':>9}"
    )
    for row in report["rows"]:
        of_dense = "-" if row["of_dense"] is None else f"{row['of_dense']:.2f}"
        print(
            f"{row['name']:22} {row['median_ms']:9.1f} {row['best_ms']:9.1f} {of_dense:>9} "
            f"{row['gflop_per_s']:9.0f} {row['floor_ms']:9.1f} {row['floor_share']:10.2f} "
            f"{row['temporaries_mb']:9.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=12_800)
    parser.add_argument("--items", type=int, default=3_416)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--valid", type=float, default=1.0, help="share of positions, up to 1")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("positions", "items", "width", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if not 0 < args.valid <= 1:
        parser.error(f"--valid must be above 0 and at most 1, got {args.valid}")
    if args.child:
        print(json.dumps(child(args)))
        return
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "benchmark": "catalogue_loss",
        "shape": {n: getattr(args, n) for n in ("positions", "items", "width", "dtype")},
        "device": {
            "platform": device.platform,
            "name": f"{device.device_kind} ({platform.machine()})",
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "valid": args.valid,
        "load_average": os.getloadavg()[0],
        "repeats": args.repeats,
    }
    report |= {"memory": measure_memory(args)} if args.memory else measure(args)
    show(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
