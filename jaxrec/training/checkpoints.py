"""Checkpoints by Orbax: asynchronous, atomic, the best and the latest kept.

A checkpoint holds the train state, the position of the data iterator, and what the loop itself has
to remember. A folder that is still being written has another name, so a kill at any moment leaves
the checkpoints before it as they were; one that is damaged all the same is passed over for the one
before, and the loop says so.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxrec.devices import Placement
from jaxrec.errors import UserError

_KEPT_LATEST = 2
_SETTLE_SECONDS = 0.2


class LoopState(NamedTuple):
    """What the training loop remembers between steps."""

    epoch: int
    """Epochs completed."""
    best: float | None
    """Best value of the validation metric."""
    best_step: int
    stale: int
    """Validations since the best."""
    seconds: float
    """Spent in training, all sessions together."""
    lines: int
    """Lines of metrics.jsonl."""
    finished: bool


class Restored(NamedTuple):
    step: int
    state: Any
    loop: LoopState


class Checkpoints:
    """The checkpoints of a run.

    Args:
      folder: where they are.
      metric: name of the validation metric that decides which is best.
      create: make the folder; False opens what is there to read.
      placement: what lies where while training on several devices. A checkpoint itself knows
        nothing of it, so another number of devices may continue.
    """

    def __init__(
        self,
        folder: Path,
        metric: str,
        *,
        create: bool = False,
        placement: Placement | None = None,
    ) -> None:
        # Orbax tells every save and restore at this level; the loop has its own lines.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = folder
        self._placement = placement
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(_KEPT_LATEST),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                create=create,
                read_only=not create,
                best_fn=lambda metrics: metrics[metric],
                best_mode="max",
                preservation_policy=policy,
                cleanup_tmp_directories=create,
            ),
            item_names=("state", "data", "loop"),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        iterator: Iterator[Any],
        loop: LoopState,
        metrics: dict[str, float] | None,
    ) -> None:
        """Saves in the background; a step that is saved already is left alone."""
        if step in self._manager.all_steps():
            return
        if self._placement is not None:
            state = self._placement.take(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(iterator),
                loop=ocp.args.JsonSave(loop._asdict()),
            ),
            metrics=metrics,
        )

    def restore_latest(
        self, state: Any, iterator: Iterator[Any], warn: Callable[[str], None]
    ) -> Restored | None:
        """The newest checkpoint that can be read; `iterator` is moved to its position.

        Args:
          state: a state of the same structure, for shapes and placement.
          iterator: the training iterator.
          warn: told about each checkpoint that was passed over.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._restore(step, state, iterator)
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
                warn(
                    f"checkpoint {self.folder / str(step)} cannot be read "
                    f"({type(error).__name__}: {reason[:200]}); trying the one before"
                )
        if steps:
            raise UserError(
                f"{self.folder}: none of the checkpoints {steps} can be read with this config; "
                "was it changed? Train into a new folder, or add --overwrite"
            )
        return None

    def _restore(self, step: int, state: Any, iterator: Iterator[Any]) -> Restored:
        placement = self._placement
        if placement is None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        else:
            abstract = placement.stored(state)
        with _quiet_when_it_fails():
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    data=grain.checkpoint.CheckpointRestore(iterator),
                    loop=ocp.args.JsonRestore(),
                ),
            )
        state = restored["state"] if placement is None else placement.put(restored["state"])
        return Restored(step, state, LoopState(**restored["loop"]))

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`, so that their steps can be saved again."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def read_parameters(self, which: str) -> tuple[int, dict[str, Any]]:
        """The parameters alone, as host arrays.

        Args:
          which: "best" (the latest where nothing was validated), "last", or a step's number.

        Raises:
          UserError: there is no such checkpoint, or it cannot be read.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder}: no checkpoint there yet; train first")
        if which == "last":
            step = steps[-1]
        elif which == "best":
            best = self._manager.best_step()
            step = steps[-1] if best is None else best
        elif which.isdigit() and int(which) in steps:
            step = int(which)
        else:
            raise UserError(
                f"{self.folder}: no checkpoint {which!r}; there are best, last and steps {steps}"
            )
        try:
            with _quiet_when_it_fails():
                return step, self._read_parameters(self.folder / str(step) / "state")
        except Exception as error:
            raise UserError(
                f"{self.folder / str(step)}: cannot be read ({type(error).__name__}); the "
                f"checkpoint is damaged; others: {[s for s in steps if s != step]}"
            ) from error

    @staticmethod
    def _read_parameters(path: Path) -> dict[str, Any]:
        # As NumPy arrays, so that a run trained elsewhere opens on the devices at hand; and
        # without the optimiser's state, which is twice as large.
        with ocp.PyTreeCheckpointer() as reader:
            stored = reader.metadata(path).item_metadata.tree["parameters"]
            wanted = {"parameters": dict.fromkeys(stored, 0)}
            arguments = {
                "parameters": dict.fromkeys(stored, ocp.RestoreArgs(restore_type=np.ndarray))
            }
            tree = reader.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=wanted, restore_args=arguments, partial_restore=True
                ),
            )
        parameters: dict[str, Any] = tree["parameters"]
        return parameters

    def wait(self) -> None:
        """Until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


@contextmanager
def _quiet_when_it_fails() -> Iterator[None]:
    """Keeps the reads that go on when one has failed from being heard.

    They report from threads to an event loop that is closed by then, which Python would print as an
    exception that it ignored.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        time.sleep(_SETTLE_SECONDS)
        raise
    finally:
        sys.unraisablehook = before
