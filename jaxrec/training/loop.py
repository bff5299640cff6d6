"""The training loop: a config in, a run folder out."""

import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.data.pipeline import training_iterator
from jaxrec.errors import UserError
from jaxrec.evaluation.evaluator import Evaluator, sample_targets
from jaxrec.evaluation.ranker import Ranker
from jaxrec.registry import resolve
from jaxrec.training.checkpoints import Checkpoints, LoopState
from jaxrec.training.config import Experiment, check
from jaxrec.training.curves import Curves
from jaxrec.training.interrupt import Interrupted, SignalFlag
from jaxrec.training.optimizer import learning_rate, make_optimizer
from jaxrec.training.progress import Reporter, reporter
from jaxrec.training.run_folder import RunFolder
from jaxrec.training.run_start import begin
from jaxrec.training.setup import (
    count_from_newest,
    make_model,
    open_data,
    split_data,
    training_batches,
)
from jaxrec.training.state import (
    TrainState,
    initial_state,
    make_train_step,
    parameter_names,
    reset_sums,
    sequence_loss,
)

# Steps sent to the device before the oldest must have ended: keeps it busy, bounds the memory.
_IN_FLIGHT = 2


def train(
    config: Experiment,
    out: str | Path,
    *,
    overwrite: bool = False,
    show_progress: bool | None = None,
) -> RunFolder:
    """Trains until validation stops improving, leaving checkpoints and curves in `out`.

    A folder that holds an unfinished run of the same config is continued where its newest
    checkpoint stands, bitwise as if it had never stopped; a finished one is left as it is.

    Args:
      config: the experiment.
      out: the run folder.
      overwrite: delete what is in `out` and begin anew.
      show_progress: True or None for a bar on a terminal and lines elsewhere; False for silence.

    Raises:
      UserError: bad config or data, a folder that holds another run, a loss that is not finite.
      Interrupted: SIGTERM or Ctrl-C; a checkpoint has been saved.
    """
    config = check(config)
    interactions = open_data(config.data)
    split = split_data(config, interactions)
    batches = training_batches(config, interactions, split)
    folder = begin(RunFolder(out), config, interactions, split, overwrite=overwrite)

    parameters, bind = make_model(config, interactions.num_items)
    total_steps = len(batches)
    optimizer = make_optimizer(config.optimizer, total_steps)
    loss = sequence_loss(
        resolve("loss", config.loss.name), label_smoothing=config.loss.label_smoothing
    )
    step = make_train_step(bind, loss, optimizer, config.training.seed)
    state = initial_state(parameters, optimizer)
    iterator = training_iterator(batches, config.data.prefetch)
    validation = Evaluator(
        interactions,
        sample_targets(split.validation, config.evaluation.validation_users, config.training.seed),
        Ranker(bind),
        ks=config.evaluation.ks,
        filter_seen=config.evaluation.filter_seen,
        batch_size=config.evaluation.batch_size,
        max_length=config.data.max_length,
        packed=config.data.packed,
        count_from_newest=count_from_newest(config),
    )
    checkpoints = Checkpoints(folder.checkpoints, config.training.metric, create=True)
    try:
        with reporter(show_progress) as report, SignalFlag() as signals:
            loop = LoopState(0, None, 0, 0, 0.0, 0, False)
            restored = checkpoints.restore_latest(state, iterator, report.line)
            if restored is not None:
                state, loop = restored.state, restored.loop
                checkpoints.forget_after(restored.step)
                if not loop.finished:
                    report.line(f"continuing at step {restored.step}, epoch {loop.epoch + 1}")
            else:
                report.line(
                    f"{config.name} on {interactions.name}: {batches.sequences:,} sequences, "
                    f"{batches.events:,} events an epoch in {batches.batches_per_epoch:,} steps "
                    f"of {batches.rows} rows ({batches.occupancy:.1%} filled)"
                )
            with Curves(
                folder.metrics,
                keep=loop.lines,
                tensorboard=folder.tensorboard if config.training.tensorboard else None,
            ) as curves:
                _Loop(
                    config=config,
                    steps_per_epoch=batches.batches_per_epoch,
                    events_per_step=batches.events / batches.batches_per_epoch,
                    total_steps=total_steps,
                    step=step,
                    iterator=iterator,
                    validation=validation,
                    checkpoints=checkpoints,
                    curves=curves,
                    report=report,
                    signals=signals,
                ).run(state, loop)
    finally:
        checkpoints.close()
    return folder


class _Loop:
    """The parts of one run, and the loop over them."""

    def __init__(
        self,
        *,
        config: Experiment,
        steps_per_epoch: int,
        events_per_step: float,
        total_steps: int,
        step: Any,
        iterator: Iterator[dict[str, Any]],
        validation: Evaluator,
        checkpoints: Checkpoints,
        curves: Curves,
        report: Reporter,
        signals: SignalFlag,
    ) -> None:
        self.config = config.training
        self.steps_per_epoch = steps_per_epoch
        self.events_per_step = events_per_step
        self.rate = learning_rate(config.optimizer, total_steps)
        self.step = step
        self.iterator = iterator
        self.validation = validation
        self.checkpoints = checkpoints
        self.curves = curves
        self.report = report
        self.signals = signals

    def run(self, state: TrainState, loop: LoopState) -> None:
        while not loop.finished and loop.epoch < self.config.epochs:
            state, loop = self._epoch(state, loop)
        self.checkpoints.wait()

    def _epoch(self, state: TrainState, loop: LoopState) -> tuple[TrainState, LoopState]:
        config = self.config
        before = loop.seconds
        start = time.perf_counter()
        done = int(state.step)
        end = (loop.epoch + 1) * self.steps_per_epoch
        self.report.epoch(
            loop.epoch + 1,
            config.epochs,
            self.steps_per_epoch,
            done - loop.epoch * self.steps_per_epoch,
        )
        in_flight: deque[Any] = deque()
        point, point_step = start, done
        while done < end:
            state, loss = self.step(state, next(self.iterator))
            done += 1
            in_flight.append(loss)
            if len(in_flight) > _IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            self.report.step()
            if done % config.log_every == 0 or done == end:
                state = self._log(state, loop.epoch, done, done - point_step, point)
                point, point_step = time.perf_counter(), done
            loop = loop._replace(seconds=before + time.perf_counter() - start)
            if self.signals.received is not None:
                self._stop(done, state, loop)
            if config.checkpoint_every and done % config.checkpoint_every == 0 and done < end:
                self._save(done, state, loop, None)
        loop = loop._replace(epoch=loop.epoch + 1)
        return self._validate(state, loop, done, before, start)

    def _log(
        self, state: TrainState, epoch: int, done: int, steps: int, since: float
    ) -> TrainState:
        loss_sum, norm_sum, count, bad_step, bad_parameter = jax.device_get(
            (
                state.loss_sum,
                state.gradient_norm_sum,
                state.loss_steps,
                state.bad_step,
                state.bad_parameter,
            )
        )
        if bad_step >= 0:
            self._not_finite(state, int(bad_step), int(bad_parameter))
        seconds = time.perf_counter() - since
        loss = float(loss_sum) / max(1, int(count))
        self.curves.write(
            {
                "step": done,
                "epoch": epoch + 1,
                "loss": loss,
                "gradient_norm": float(norm_sum) / max(1, int(count)),
                "learning_rate": float(self.rate(done - 1)),
                "events_per_second": round(self.events_per_step * steps / max(seconds, 1e-9), 1),
            }
        )
        self.report.note(f"loss {loss:.4f}")
        return reset_sums(state)

    def _not_finite(self, state: TrainState, bad_step: int, bad_parameter: int) -> None:
        names = parameter_names(state.parameters)
        epoch, batch = divmod(bad_step, self.steps_per_epoch)
        what = (
            f"the gradient of {names[bad_parameter]} is"
            if bad_parameter >= 0
            else "the loss is (and every gradient is finite)"
        )
        raise UserError(
            f"not finite at step {bad_step} (epoch {epoch + 1}, batch {batch}): {what} not finite; "
            "try a lower --optimizer.learning_rate or --optimizer.clip_norm 1; the checkpoints "
            "before it are kept"
        )

    def _validate(
        self, state: TrainState, loop: LoopState, done: int, before: float, start: float
    ) -> tuple[TrainState, LoopState]:
        config = self.config
        last = loop.epoch >= config.epochs
        metrics: dict[str, float] | None = None
        trained = time.perf_counter() - start
        if loop.epoch % config.validate_every == 0 or last:
            metrics = self.validation.metrics(state.parameters)
            value = metrics[config.metric]
            if not math.isfinite(value):
                raise UserError(f"validation {config.metric} is {value} at step {done}")
            if loop.best is None or value > loop.best:
                loop = loop._replace(best=value, best_step=done, stale=0)
            else:
                loop = loop._replace(stale=loop.stale + 1)
            seconds = time.perf_counter() - start
            self.curves.write(
                {
                    "step": done,
                    "epoch": loop.epoch,
                    "validation": metrics,
                    "epoch_seconds": round(trained, 3),
                    "validation_seconds": round(seconds - trained, 3),
                }
            )
            mark = " (best)" if loop.best_step == done else ""
            self.report.line(
                f"epoch {loop.epoch}: {trained:.1f} s, validation "
                f"{config.metric} {value:.4f}{mark}, {seconds - trained:.1f} s"
            )
        stopped = bool(config.patience) and loop.stale >= config.patience
        loop = loop._replace(
            seconds=before + time.perf_counter() - start,
            lines=self.curves.lines,
            finished=stopped or last,
        )
        self._save(done, state, loop, metrics)
        if stopped:
            self.report.line(
                f"stopped: {config.metric} has not improved for {loop.stale} validations; "
                f"best {loop.best:.4f} at step {loop.best_step}"
            )
        return state, loop

    def _save(
        self,
        done: int,
        state: TrainState,
        loop: LoopState,
        metrics: dict[str, float] | None,
    ) -> None:
        self.checkpoints.save(
            done, state, self.iterator, loop._replace(lines=self.curves.lines), metrics
        )

    def _stop(self, done: int, state: TrainState, loop: LoopState) -> None:
        number = self.signals.received
        assert number is not None
        self._save(done, state, loop, None)
        self.checkpoints.wait()
        raise Interrupted(
            number, f"stopped at step {done} by a signal; the same command continues from there"
        )


def host_parameters(parameters: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters as NumPy arrays."""
    return {name: np.asarray(value) for name, value in parameters.items()}
