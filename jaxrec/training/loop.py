"""The training loop: a config in, a run folder out."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from jaxrec.data.pipeline import training_iterator
from jaxrec.devices import Placement
from jaxrec.errors import UserError
from jaxrec.evaluation.baselines import popularity_scores
from jaxrec.evaluation.evaluator import Evaluator, sample_targets
from jaxrec.evaluation.ranker import Ranker
from jaxrec.processes import agreed, count, first, highest, in_turn, stopping_together
from jaxrec.training.checkpoints import Checkpoints, LoopState
from jaxrec.training.config import Experiment, TrainingConfig, check, refuse_unread
from jaxrec.training.curves import Curves, Unwritten, summary_writer
from jaxrec.training.first_state import make_state, state_shapes
from jaxrec.training.interrupt import Interrupted, SignalFlag
from jaxrec.training.optimizer import learning_rate, make_optimizer
from jaxrec.training.progress import Reporter, reporter
from jaxrec.training.run_folder import RunFolder
from jaxrec.training.run_lock import alone_in
from jaxrec.training.run_start import begin, check_free
from jaxrec.training.setup import (
    count_from_newest,
    initialiser,
    located,
    make_loss,
    make_placement,
    model_shapes,
    open_data,
    split_data,
    timestamps,
    training_batches,
)
from jaxrec.training.state import TrainState, make_train_step, parameter_names, reset_sums

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
    checkpoint stands, bitwise as if it had never stopped; a finished one is left as it is. One
    without any checkpoint is begun anew, whatever its config.

    In several processes (`jax.distributed.initialize()` before anything else) all call this with
    the same arguments, on the same file system: the mesh takes the devices of all, the first
    writes and reports. One that fails ends the others.

    Args:
      config: the experiment.
      out: the run folder.
      overwrite: delete the run that is in `out` and begin anew.
      show_progress: True or None for a bar on a terminal and lines elsewhere; False for silence.

    Raises:
      UserError: bad config or data, a folder that holds another run or is being trained into, a
        loss that is not finite; the first process has failed.
      Interrupted: SIGTERM or Ctrl-C, in any of the processes; a checkpoint has been saved.
    """
    with stopping_together(Interrupted):
        return _train(config, RunFolder(out), overwrite, show_progress)


def _train(
    config: Experiment, folder: RunFolder, overwrite: bool, show_progress: bool | None
) -> RunFolder:
    config = located(check(config))
    refuse_unread(config)
    if config.training.tensorboard:
        summary_writer()
    # What is wrong in the config is told before the data are read.
    make_loss(config.loss)
    interactions = in_turn(lambda: open_data(config.data))
    split = split_data(config, interactions)
    loss = make_loss(config.loss, lambda: popularity_scores(interactions, split))
    placement = make_placement(config, interactions.num_items)
    shards = 1 if placement is None else placement.data
    batches = training_batches(config, interactions, split, shards=shards)
    agreed(lambda: check_free(folder, config, interactions, overwrite=overwrite))

    parameters, bind = model_shapes(config, interactions.num_items)
    total_steps = len(batches)
    optimizer = make_optimizer(config.optimizer, total_steps)
    shapes = state_shapes(parameters, optimizer, placement)
    step = make_train_step(bind, loss, optimizer, config.training.seed, placement)
    iterator = training_iterator(batches, config.data.prefetch)
    validation = Evaluator(
        interactions,
        sample_targets(split.validation, config.evaluation.validation_users, config.training.seed),
        Ranker(bind, placement),
        ks=config.evaluation.ks,
        filter_seen=config.evaluation.filter_seen,
        batch_size=config.evaluation.batch_size,
        max_length=config.data.max_length,
        packed=config.data.packed,
        count_from_newest=count_from_newest(config),
        shards=shards,
        timestamps=timestamps(config, interactions),
    )
    with ExitStack() as stack:

        def begin_alone() -> None:
            stack.enter_context(alone_in(folder.path))
            begin(folder, config, interactions, split, overwrite=overwrite)

        # Not before everything else is made: where that fails, no folder is left behind.
        agreed(begin_alone)
        checkpoints = Checkpoints(
            folder.checkpoints, config.training.metric, create=True, placement=placement
        )
        stack.callback(checkpoints.close)
        report = stack.enter_context(reporter(show_progress if first() else False))
        signals = stack.enter_context(SignalFlag())
        loop = LoopState(0, None, 0, 0, 0.0, 0, False)
        restored = checkpoints.restore_latest(shapes, iterator, report.line)
        if restored is not None:
            state, loop = restored.state, restored.loop
            checkpoints.forget_after(restored.step)
            # Epochs and patience may be others now.
            loop = loop._replace(finished=_is_finished(config.training, loop))
            if not loop.finished:
                agreed(lambda: folder.results.unlink(missing_ok=True))
                report.line(f"continuing at step {restored.step}, epoch {loop.epoch + 1}")
        else:
            initialise = initialiser(config, interactions.num_items)
            state = make_state(initialise, config.training.seed, optimizer, shapes, placement)
            report.line(
                f"{config.name} on {interactions.name}: {batches.sequences:,} sequences, "
                f"{batches.events:,} events an epoch in {batches.batches_per_epoch:,} steps "
                f"of {batches.rows} rows ({batches.occupancy:.1%} filled)"
            )
        curves = agreed(
            lambda: stack.enter_context(
                Curves(
                    folder.metrics,
                    keep=loop.lines,
                    tensorboard=folder.tensorboard if config.training.tensorboard else None,
                    first_step=0 if restored is None else restored.step + 1,
                )
            )
        )
        if curves is not None and curves.lost:
            report.line(f"{folder.metrics}: {curves.lost} lines of the curve are lost; going on")
        _Loop(
            config=config,
            steps_per_epoch=batches.batches_per_epoch,
            events_per_step=batches.events / batches.batches_per_epoch,
            total_steps=total_steps,
            step=step,
            placement=placement,
            iterator=iterator,
            validation=validation,
            checkpoints=checkpoints,
            curves=Unwritten(loop.lines) if curves is None else curves,
            report=report,
            signals=signals,
        ).run(state, loop)
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
        placement: Placement | None,
        iterator: Iterator[dict[str, Any]],
        validation: Evaluator,
        checkpoints: Checkpoints,
        curves: Unwritten,
        report: Reporter,
        signals: SignalFlag,
    ) -> None:
        self.config = config.training
        self.steps_per_epoch = steps_per_epoch
        self.events_per_step = events_per_step
        self.rate = learning_rate(config.optimizer, total_steps)
        self.step = step
        self.to_device = (lambda batch: batch) if placement is None else placement.batch
        self.iterator = iterator
        self.validation = validation
        self.checkpoints = checkpoints
        self.curves = curves
        self.report = report
        self.signals = signals

    def run(self, state: TrainState, loop: LoopState) -> None:
        while not loop.finished:
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
            state, loss = self.step(state, self.to_device(next(self.iterator)))
            done += 1
            in_flight.append(loss)
            if len(in_flight) > _IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            self.report.step()
            if done % config.log_every == 0 or done == end:
                state = self._log(state, loop.epoch, done, done - point_step, point)
                point, point_step = time.perf_counter(), done
            loop = loop._replace(seconds=before + time.perf_counter() - start)
            # At the end of an epoch the one checkpoint of that step is the one after validation.
            if done < end:
                signal = self._signal(done)
                if signal is not None:
                    self._save(done, state, loop, None)
                    self._stop(done, signal)
                if config.checkpoint_every and done % config.checkpoint_every == 0:
                    self._save(done, state, loop, None)
        loop = loop._replace(epoch=loop.epoch + 1)
        return self._validate(state, loop, done, before, start)

    def _log(
        self, state: TrainState, epoch: int, done: int, steps: int, since: float
    ) -> TrainState:
        self._check_finite(state)
        loss_sum, norm_sum, count = jax.device_get(
            (state.loss_sum, state.gradient_norm_sum, state.loss_steps)
        )
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

    def _check_finite(self, state: TrainState) -> None:
        bad_step, bad_parameter = map(int, jax.device_get((state.bad_step, state.bad_parameter)))
        if bad_step < 0:
            return
        epoch, batch = divmod(bad_step, self.steps_per_epoch)
        what = (
            f"the gradient of {parameter_names(state.parameters)[bad_parameter]}"
            if bad_parameter >= 0
            else "the loss (but every gradient is finite)"
        )
        raise UserError(
            f"not finite at step {bad_step} (epoch {epoch + 1}, batch {batch}): {what}; try a "
            "lower --optimizer.learning_rate or --optimizer.clip_norm 1, in another --out or with "
            "--overwrite; the checkpoints before it are kept"
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
            # Of equals the latest is kept (as by the checkpoints), but patience runs on.
            improved = loop.best is None or value > loop.best
            if improved or value == loop.best:
                loop = loop._replace(best=value, best_step=done)
            loop = loop._replace(stale=0 if improved else loop.stale + 1)
            seconds = time.perf_counter() - start
            self.curves.write(
                {
                    "step": done,
                    "epoch": loop.epoch,
                    "validation": metrics,
                    "epoch_seconds": round(trained, 3),
                    "validation_seconds": round(seconds - trained, 3),
                    "seconds": round(before + seconds, 3),
                }
            )
            mark = " (best)" if loop.best_step == done else ""
            self.report.line(
                f"epoch {loop.epoch}: {trained:.1f} s, validation "
                f"{config.metric} {value:.4f}{mark}, {seconds - trained:.1f} s"
            )
        loop = loop._replace(
            seconds=before + time.perf_counter() - start,
            finished=_is_finished(config, loop),
        )
        self._save(done, state, loop, metrics)
        signal = self._signal(done, end_of_epoch=True)
        if signal is not None:
            self._stop(done, signal)
        if loop.finished and not last:
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
        # A checkpoint of a frozen state would push out the good ones.
        self._check_finite(state)
        self.curves.sync()
        self.checkpoints.save(
            done, state, self.iterator, loop._replace(lines=self.curves.lines), metrics
        )

    def _signal(self, done: int, *, end_of_epoch: bool = False) -> int | None:
        """The signal that asks training to stop here, whichever process it has reached.

        Several processes ask each other at points of the curve alone, where they wait anyway.
        """
        if count() == 1:
            return self.signals.received
        if not end_of_epoch and done % self.config.log_every:
            return None
        return highest(self.signals.received or 0) or None

    def _stop(self, done: int, signal: int) -> None:
        self.checkpoints.wait()
        raise Interrupted(
            signal, f"stopped at step {done} by a signal; the same command continues from there"
        )


def _is_finished(config: TrainingConfig, loop: LoopState) -> bool:
    stopped = bool(config.patience) and loop.stale >= config.patience
    return stopped or loop.epoch >= config.epochs
