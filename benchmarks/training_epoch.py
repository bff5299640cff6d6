"""An epoch of SASRec with full cross-entropy beside its arithmetic floor.

    python -m benchmarks.training_epoch --data movielens-1m [--json FILE]

Without --data it makes events with MovieLens-1M's numbers of users, items and events. The floor
counts the matrix products of forward and backward pass by hand, at the rate that this machine
reaches on a large square product in the same run, plus one exponential for each pair of event and
item at the rate it reaches on an array that fits in the cache. Nothing else is in the floor: no
normalisation, no dropout, no optimiser, no memory traffic.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrec.cli.huge_pages import restart_with_huge_pages
from jaxrec.data.batches import TrainingBatches
from jaxrec.data.prepared import open_prepared
from jaxrec.data.splits import leave_one_out
from jaxrec.losses.catalogue import full_softmax
from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import SASRecConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.results import describe_device, versions
from jaxrec.training.state import initial_state, make_train_step, sequence_loss


@dataclass(frozen=True)
class Arguments:
    """Time steps of training and compare an epoch with its arithmetic floor."""

    data: str | None = None
    """A prepared set; events like MovieLens-1M's are made up by default."""
    model: SASRecConfig = field(default_factory=SASRecConfig)
    max_length: int = 200
    batch_size: int = 128
    steps: int = 8
    """Steps a measurement."""
    repeats: int = 5
    json: Path | None = None
    """Write the figures here."""


def made_up_events(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Items and ranges like MovieLens-1M's: 6,040 users, 3,416 items, a million events."""
    rng = np.random.default_rng(seed)
    # Median 96, mean about 165, at least 18 events a user.
    lengths = np.clip(rng.lognormal(np.log(96), 1.04, 6040).astype(np.int64), 18, 2277)
    stops = np.cumsum(lengths)
    items = rng.zipf(1.3, int(stops[-1])) % 3416
    return items.astype(np.int32), stops - lengths, stops - 2, 3416


def floor_flops(batches: TrainingBatches, model: SASRecConfig, items: int) -> dict[str, float]:
    """FLOPs of an epoch's matrix products; backward counts twice the forward."""
    d, length = model.width, batches.max_length
    inner = model.feed_forward or d
    slots = batches.rows * length * batches.batches_per_epoch
    events = batches.events
    projections = 4 if model.output_projection else 3
    return {
        "loss": 3 * 2.0 * events * items * d,
        "projections and feed-forward": 3
        * 2.0
        * slots
        * model.blocks
        * (projections * d * d + 2 * d * inner),
        # Half of each product is above the diagonal and need not be computed.
        "attention": 3 * 2.0 * slots * length * d * model.blocks * 2 / 2,
    }


def best_rate(work: float, run: Callable[[], Any], repeats: int = 7) -> float:
    """Work a second, the best of several runs: a ceiling."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return work / min(times)


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large matrix product and exponentials/s, float32."""
    n = 2048
    a = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(lambda x: x @ x)
    x = jax.random.normal(jax.random.key(1), (512, 1024))
    # Several passes in one call, so that the call itself does not count.
    exponential = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: jnp.exp(-y), x))
    return best_rate(2.0 * n**3, lambda: product(a)), best_rate(
        20.0 * x.size, lambda: exponential(x)
    )


def measure(arguments: Arguments) -> dict[str, Any]:
    """All figures of one run."""
    if arguments.data is None:
        items, starts, stops, num_items = made_up_events()
        name = "made up, like MovieLens-1M"
    else:
        interactions = open_prepared(arguments.data)
        train = leave_one_out(interactions).train
        items, starts, stops = interactions.items, train.starts, train.stops
        num_items, name = interactions.num_items, interactions.name
    batches = TrainingBatches(
        items,
        starts,
        stops,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        epochs=1000,
        seed=0,
    )
    model = build_model(
        arguments.model, num_items=num_items, max_length=arguments.max_length, seed=0
    )
    parameters, bind = split_model(model)
    optimizer = make_optimizer(OptimizerConfig(), len(batches))
    step = make_train_step(bind, sequence_loss(full_softmax), optimizer, 0)
    state = initial_state(parameters, optimizer)
    start = time.perf_counter()
    state, loss = step(state, batches[0])
    jax.block_until_ready(loss)
    compile_seconds = time.perf_counter() - start
    steps = []
    number = 1
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        for _ in range(arguments.steps):
            state, loss = step(state, batches[number])
            number += 1
        jax.block_until_ready(loss)
        steps.append((time.perf_counter() - start) / arguments.steps)
    flops = floor_flops(batches, arguments.model, num_items)
    flop_rate, exp_rate = ceilings()
    floor = sum(flops.values()) / flop_rate + batches.events * num_items / exp_rate
    epoch = median(steps) * batches.batches_per_epoch
    return {
        "benchmark": "training_epoch",
        "data": name,
        "model": asdict(arguments.model),
        "max_length": arguments.max_length,
        "batch_size": arguments.batch_size,
        "rows": batches.rows,
        "occupancy": batches.occupancy,
        "steps_per_epoch": batches.batches_per_epoch,
        "events_per_epoch": batches.events,
        "flops": flops,
        "ceiling_flops_per_second": flop_rate,
        "ceiling_exponentials_per_second": exp_rate,
        "floor_seconds": floor,
        "epoch_seconds": epoch,
        "epoch_seconds_spread": [
            min(steps) * batches.batches_per_epoch,
            max(steps) * batches.batches_per_epoch,
        ],
        "ratio_to_floor": epoch / floor,
        "compile_seconds": compile_seconds,
        "device": describe_device(),
        "versions": versions(),
    }


def main(arguments: Arguments) -> int:
    figures = measure(arguments)
    total = sum(figures["flops"].values())
    print(f"{figures['data']}; {figures['device']}; JAX {figures['versions']['jax']}")
    print(
        f"an epoch: {figures['epoch_seconds']:.1f} s "
        f"({figures['epoch_seconds_spread'][0]:.1f} to {figures['epoch_seconds_spread'][1]:.1f}), "
        f"{figures['steps_per_epoch']} steps, {figures['occupancy']:.1%} of the slots filled; "
        f"compiled in {figures['compile_seconds']:.1f} s"
    )
    print(
        f"floor: {figures['floor_seconds']:.1f} s = {total / 1e12:.2f} TFLOP at "
        f"{figures['ceiling_flops_per_second'] / 1e9:.0f} GFLOP/s and "
        f"{figures['events_per_epoch'] / 1e6:.2f} M events x items exponentials at "
        f"{figures['ceiling_exponentials_per_second'] / 1e9:.2f} G/s"
    )
    print(f"ratio to the floor: {figures['ratio_to_floor']:.2f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    # As `jaxrec train` does.
    restart_with_huge_pages()
    sys.exit(main(tyro.cli(Arguments)))
