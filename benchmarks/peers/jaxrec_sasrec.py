"""jaxrec's side: `python -m benchmarks.peers.jaxrec_sasrec TASK RESULT`.

An epoch is timed from the first batch asked for to the end of the last step, with the batches made
and memory taken as in `jaxrec train`; the first step, which compiles, is timed apart. A ranking is
timed from event ranges on the host to lists on the host, making the batches included.
"""

import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.peak_memory import peak_bytes
from benchmarks.peers.interactions import read_interactions
from benchmarks.peers.task import (
    Task,
    describe_machine,
    load_task,
    versions_of,
    write_result,
)
from jaxrec.cli.huge_pages import restart_with_huge_pages
from jaxrec.data.batches import TrainingBatches
from jaxrec.data.pipeline import training_iterator
from jaxrec.evaluation.ranker import Contexts, Ranker
from jaxrec.losses.catalogue import full_softmax
from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import SASRecConfig
from jaxrec.training.config import DataConfig, EvaluationConfig, OptimizerConfig
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.state import initial_state, make_train_step, sequence_loss


def measure(task: Task) -> dict[str, Any]:
    """Trains, then ranks for every user."""
    items, starts, stops, num_items = read_interactions(task.interactions)
    batches = TrainingBatches(
        items,
        starts,
        stops,
        batch_size=task.batch_size,
        max_length=task.max_length,
        # One more, from which the first step and what is made ahead are taken.
        epochs=task.epochs + 1,
        seed=task.seed,
        count_from_newest=True,
    )
    config = SASRecConfig(
        width=task.width,
        blocks=task.blocks,
        heads=task.heads,
        dropout=task.dropout,
        # As the peer counts.
        position_order="newest",
    )
    model = build_model(config, num_items=num_items, max_length=task.max_length, seed=task.seed)
    initial, bind = split_model(model)
    trained, training = _train(task, batches, initial, bind)
    training["peak_bytes"] = peak_bytes()
    contexts = (items, starts, stops)
    ranking = _rank(task, contexts, trained, Ranker(bind))
    return {
        "training": training,
        "ranking": ranking | {"users": len(starts)},
        "parameters": sum(array.size for array in trained.values()),
        "items": num_items,
        "peak_bytes": peak_bytes(),
        "device": describe_machine(),
        "versions": versions_of("jaxrec", "jax", "jaxlib", "flax", "optax", "grain", "numpy"),
    }


def _train(
    task: Task, batches: TrainingBatches, initial: dict[str, jax.Array], bind: Any
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    steps = min(task.steps or batches.batches_per_epoch, batches.batches_per_epoch)
    adam = OptimizerConfig(learning_rate=task.learning_rate, b2=task.b2)
    optimizer = make_optimizer(adam, len(batches))
    step = make_train_step(bind, sequence_loss(full_softmax), optimizer, task.seed)
    state = initial_state(initial, optimizer)
    iterator = training_iterator(batches, DataConfig().prefetch)
    begin = time.perf_counter()
    state, loss = step(state, next(iterator))
    jax.block_until_ready(loss)
    first_step = time.perf_counter() - begin
    epochs = []
    for _ in range(task.epochs):
        begin = time.perf_counter()
        for _ in range(steps):
            state, loss = step(state, next(iterator))
            jax.block_until_ready(loss)
        epochs.append(time.perf_counter() - begin)
    return state.parameters, {
        "epoch_seconds": epochs,
        "steps_per_epoch": steps,
        "first_step_seconds": first_step,
        "loss": float(loss),
    }


def _rank(
    task: Task,
    ranges: tuple[np.ndarray, np.ndarray, np.ndarray],
    parameters: dict[str, jax.Array],
    ranker: Ranker,
) -> dict[str, Any]:
    batch_size = EvaluationConfig().batch_size
    taken = []
    for _ in range(1 + task.rankings):
        begin = time.perf_counter()
        contexts = Contexts(
            *ranges, batch_size=batch_size, max_length=task.max_length, count_from_newest=True
        )
        _, lists = ranker.lists(parameters, contexts, task.k, filter_seen=True)
        taken.append(time.perf_counter() - begin)
    return {
        "first_seconds": taken[0],
        "seconds": taken[1:],
        "batch_size": batch_size,
        "recommendations": int((lists >= 0).sum()),
    }


if __name__ == "__main__":
    restart_with_huge_pages()
    write_result(sys.argv[2], measure(load_task(sys.argv[1])))
