"""RecTools' side: `python -m benchmarks.peers.rectools_sasrec TASK RESULT`.

Runs in the peer's environment, where nothing of jaxrec's dependencies is installed. An epoch is
timed by a Lightning callback, from its start to its end, batches included. A ranking is one call of
`recommend`, from the data set to a table of recommendations. What the task does not say stays as
RecTools has it.
"""

import sys
import time
import warnings
from typing import Any

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

from benchmarks.peak_memory import peak_bytes
from benchmarks.peers.task import (
    Task,
    describe_machine,
    load_task,
    versions_of,
    write_result,
)


class EpochClock(Callback):
    """Wall clock, steps and last loss of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.steps = 0
        self.loss = float("nan")
        self._begin = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.steps = 0
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        self.loss = float(outputs["loss"])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def read_dataset(path: str) -> tuple[Dataset, Any]:
    """The interactions as RecTools wants them, and the users."""
    table = pd.read_csv(path)
    table = table.rename(columns={"user_id": Columns.User, "item_id": Columns.Item})
    # Seconds that stand for the order; the time itself is not used by the model.
    table[Columns.Datetime] = pd.to_datetime(table.pop("order"), unit="s")
    table[Columns.Weight] = 1.0
    return Dataset.construct(table), table[Columns.User].unique()


def make_model(task: Task) -> SASRecModel:
    """SASRec with softmax over the whole catalogue, without validation or checkpoints."""
    model = SASRecModel(
        n_factors=task.width,
        n_blocks=task.blocks,
        n_heads=task.heads,
        dropout_rate=task.dropout,
        session_max_len=task.max_length,
        batch_size=task.batch_size,
        loss="softmax",
        lr=task.learning_rate,
        epochs=task.epochs,
        recommend_torch_device="cpu",
    )
    # RecTools' documented way to another trainer.
    model._trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=task.epochs,
        min_epochs=task.epochs,
        limit_train_batches=task.steps or None,
        callbacks=[EpochClock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return model


def measure(task: Task) -> dict[str, Any]:
    """Trains, then recommends for every user."""
    torch.set_num_threads(task.threads)
    seed_everything(task.seed)
    dataset, users = read_dataset(task.interactions)
    model = make_model(task)
    begin = time.perf_counter()
    model.fit(dataset)
    fit_seconds = time.perf_counter() - begin
    training_peak = peak_bytes()
    # RecTools trains with a copy of the trainer.
    clock = next(c for c in model.fit_trainer.callbacks if isinstance(c, EpochClock))
    return {
        "training": {
            "epoch_seconds": clock.seconds,
            "steps_per_epoch": clock.steps,
            "loss": clock.loss,
            "fit_seconds": fit_seconds,
            "peak_bytes": training_peak,
        },
        "ranking": _rank(task, model, dataset, users),
        "parameters": sum(p.numel() for p in model.torch_model.parameters()),
        "items": len(model.data_preparator.get_known_item_ids()),
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "device": describe_machine(),
        "versions": versions_of("rectools", "torch", "pytorch-lightning", "numpy", "pandas"),
    }


def _rank(task: Task, model: SASRecModel, dataset: Dataset, users: Any) -> dict[str, Any]:
    taken = []
    for _ in range(1 + task.rankings):
        begin = time.perf_counter()
        lists = model.recommend(users=users, dataset=dataset, k=task.k, filter_viewed=True)
        taken.append(time.perf_counter() - begin)
    return {
        "first_seconds": taken[0],
        "seconds": taken[1:],
        "batch_size": model.recommend_batch_size,
        "recommendations": len(lists),
        "users": len(users),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    write_result(sys.argv[2], measure(load_task(sys.argv[1])))
