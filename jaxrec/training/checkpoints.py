"""Checkpoints by Orbax: asynchronous, atomic, the best and the latest kept.

A checkpoint holds the train state, the position of the data iterator, and what the loop itself has
to remember. A folder that is still being written has another name, so a kill at any moment leaves
the checkpoints before it as they were. Checksums are written before it gets its own, and compared
before anything is read: one that is damaged is passed over for the one before, and the loop says
so. It knows neither the mesh of devices nor the number of processes that wrote it.

Several processes save together. When they go on, the first says which checkpoints there are and
whether they are whole, and each reads what its devices need. Any of them may open a run alone.
"""

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxrec.devices import Placement
from jaxrec.errors import UserError
from jaxrec.processes import agreed, first, first_says, highest
from jaxrec.training.checksums import Damaged, check_checksums, has_checksums, write_checksums

_KEPT_LATEST = 2
_SETTLE_SECONDS = 0.2
# Of an array as it lies on disk; a piece is read as a whole.
_CHUNK_BYTES = 1 << 26
_UNFINISHED = ocp.path.atomicity.TMP_DIR_SUFFIX
# Beside the loop's own values: without it a checkpoint is of a version that wrote no checksums.
_MARK = "checksums"
# The position of the data iterator as Orbax's JSON, and as Grain wrote it in earlier versions.
_POSITION_FILES = ("metadata", "process_0-of-1.json")


# See `Checkpoints.read_parameters`.
Place = Callable[[dict[str, Any]], dict[str, jax.ShapeDtypeStruct]]


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
      placement: what lies where while training on several devices.
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
        if create and first():
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._metric = metric
        self._create = create
        self._placement = placement
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=_each_by_itself()
        )
        # Made when the first one is saved: it reads what is there, which must be whole by then.
        self._manager: ocp.CheckpointManager | None = None
        self._saving = -1
        self._damaged: list[int] = []

    def steps(self) -> list[int]:
        """Of the checkpoints on disk, damaged ones too."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit())

    def save(
        self,
        step: int,
        state: Any,
        iterator: Any,
        loop: LoopState,
        metrics: dict[str, float] | None,
    ) -> None:
        """Saves in the background; a step that is saved already is left alone.

        Args:
          step: steps done.
          state: the train state.
          iterator: the training iterator, whose position is saved.
          loop: what the loop remembers.
          metrics: of the validation after this step, if there was one.
        """
        if self._manager is None:
            self._manager = self._open()
        with self._writing():
            self._manager.wait_until_finished()
            if first_says(lambda: step in self.steps()):
                return
            if self._placement is not None:
                state = self._placement.take(state)
            self._saving = step
            save_args = jax.tree.map(_in_pieces, state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state, save_args=save_args),
                    # Not Grain's own handler, which writes a file a process: all read the same.
                    data=ocp.args.JsonSave(deepcopy(iterator.get_state())),
                    loop=ocp.args.JsonSave(loop._asdict() | {_MARK: True}),
                ),
                metrics=metrics,
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells in one line what the disk refuses, which Orbax tells as whatever it met."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # The writes that fail with it report from threads, each with a traceback.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({_why(error)}); the same command "
                "continues from the one before once it can"
            ) from error

    def _open(self) -> ocp.CheckpointManager:
        if not self._create:
            raise ValueError("these checkpoints were opened to be read")
        metric = self._metric
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
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                best_fn=lambda metrics: metrics[metric],
                best_mode="max",
                preservation_policy=policy,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
            item_names=("state", "data", "loop"),
        )

    def _seal(self) -> None:
        """Called when all items are on disk, before their folder gets its name."""
        if first():
            (folder,) = self.folder.glob(f"{self._saving}{_UNFINISHED}*")
            write_checksums(folder, self._saving)

    def restore_latest(
        self, state: Any, iterator: Any, warn: Callable[[str], None]
    ) -> Restored | None:
        """The newest checkpoint that every process can read; `iterator` is moved to its position.

        All checkpoints are compared with their checksums: a damaged older one could otherwise be
        taken for the best, or be found damaged only when training has ended.

        Args:
          state: a state of the same structure, or its shapes and shardings: nothing else of it is
            read, and it need not be beside the one that is restored.
          iterator: the training iterator.
          warn: told about each checkpoint that was passed over.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        steps: list[int] = first_says(self.steps)
        restored: Restored | None = None
        self._damaged = []
        for step in reversed(steps):
            why = first_says(partial(self._damage, step))
            if why is None and restored is None:
                restored, why = self._try_to_restore(step, state, iterator)
            if why is not None:
                self._damaged.append(step)
                then = "trying the one before" if restored is None else "going on without it"
                warn(f"checkpoint {self.folder / str(step)} cannot be read ({why}); {then}")
        if restored is None:
            if not steps:
                return None
            raise UserError(
                f"{self.folder}: none of the checkpoints {steps} can be read with this config; "
                "was it changed? Train into a new folder, or add --overwrite"
            )
        best, kept = restored.loop.best_step, set(steps) - set(self._damaged)
        if restored.loop.best is not None and best not in kept:
            warn(
                f"the checkpoint of the best validation, step {best}, is lost; the best of those "
                "that are left and of those to come will be judged"
            )
        return restored

    def _damage(self, step: int) -> str | None:
        """Why the checkpoint is not what was written; None if it is."""
        try:
            self._check(step)
        except Exception as error:
            return _why(error)
        return None

    def _check(self, step: int, item: str | None = None) -> None:
        """Raises Damaged unless the checkpoint is what was written."""
        folder = self.folder / str(step)
        if has_checksums(folder) or not _of_an_older_version(folder):
            check_checksums(folder, step, item=item)

    def _try_to_restore(
        self, step: int, state: Any, iterator: Any
    ) -> tuple[Restored | None, str | None]:
        """What was restored, or why not; one process that cannot is enough."""
        restored, why = None, None
        try:
            restored = self._restore(step, state, iterator)
        except Exception as error:
            why = _why(error)
        if highest(int(restored is None)):
            return None, why or "not by another process"
        return restored, None

    def _restore(self, step: int, state: Any, iterator: Any) -> Restored:
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        if self._placement is None:
            stored = wanted
        else:
            stored = self._placement.stored(wanted)
            self._check_stored(step, stored)
        with _quiet_when_it_fails():
            restored = self._reader.restore(
                self.folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        item=wanted, restore_args=jax.tree.map(_as_it_lies, wanted, stored)
                    ),
                    loop=ocp.args.JsonRestore(),
                ),
            )
        iterator.set_state(self._position(step))
        loop = {name: value for name, value in restored["loop"].items() if name != _MARK}
        return Restored(step, restored["state"], LoopState(**loop))

    def _check_stored(self, step: int, state: Any) -> None:
        """Raises unless the item tables are as long as `state` has them: reading pads or cuts."""
        with _tree_reader() as reader:
            metadata = reader.metadata(self.folder / str(step) / "state").item_metadata
        for name, wanted in state.parameters.items():
            shape = tuple(metadata.tree["parameters"][name].shape)
            if shape != wanted.shape:
                raise ValueError(f"{name} has shape {shape}, wanted {wanted.shape}")

    def _position(self, step: int) -> Any:
        folder = self.folder / str(step) / "data"
        for name in _POSITION_FILES:
            if (folder / name).is_file():
                return json.loads((folder / name).read_text(encoding="utf-8"))
        raise FileNotFoundError(f"{folder}: no position of the data")

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`, so that their steps can be saved again.

        Those that `restore_latest` found damaged are deleted too. Called by all processes.
        """
        agreed(lambda: self._forget_after(step))

    def _forget_after(self, step: int) -> None:
        for one in self.steps():
            if one > step or one in self._damaged:
                _delete(self.folder / str(one))

    def find(self, which: str) -> int:
        """The step of a checkpoint.

        Args:
          which: "best" (the latest where nothing was validated), "last", or a step's number.

        Raises:
          UserError: there is no such checkpoint, or the best cannot be told.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder}: no checkpoint there yet; train first")
        if which == "last":
            return steps[-1]
        if which == "best":
            return self._best_step(steps)
        if which.isdigit() and int(which) in steps:
            return int(which)
        raise UserError(
            f"{self.folder}: no checkpoint {which!r}; there are best, last and steps {steps}"
        )

    def read_parameters(self, which: str, place: Place | None = None) -> tuple[int, dict[str, Any]]:
        """The step and the parameters alone, without the optimiser's state, twice as large.

        Args:
          which: as in `find`.
          place: what there is by name (`shape`, `dtype`) -> shapes that are wanted. With a sharding
            each device reads its own rows, and a table that is wanted longer ends in zeros; without
            one, and without `place`, host arrays are read: such a run opens on the devices at hand.

        Raises:
          UserError: as `find`; it cannot be read; whatever `place` raises.
        """
        step = self.find(which)
        try:
            self._check(step)
            with _quiet_when_it_fails():
                return step, self._read_parameters(self.folder / str(step) / "state", place)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.folder / str(step)}: cannot be read ({_why(error)}); the "
                f"checkpoint is damaged; others: {[s for s in self.steps() if s != step]}"
            ) from error

    def _best_step(self, steps: list[int]) -> int:
        """The step with the best metric, of equals the latest; the latest where none has any."""
        values: dict[int, float] = {}
        for step in steps:
            try:
                self._check(step, item="metrics")
                value = self._read_metric(step)
            except Exception as error:
                raise UserError(
                    f"{self.folder / str(step)}: its metrics cannot be read ({_why(error)}), so "
                    f"which checkpoint is the best is not known; name one: last, or of {steps}"
                ) from error
            if value is not None:
                values[step] = value
        return max(values, key=lambda step: (values[step], step)) if values else steps[-1]

    def _read_metric(self, step: int) -> float | None:
        """None for a checkpoint that was not validated."""
        folder = self.folder / str(step) / "metrics"
        if not folder.exists():
            return None
        value = float(json.loads((folder / "metrics").read_text())[self._metric])
        if not math.isfinite(value):
            raise ValueError(f"{self._metric} is {value}")
        return value

    @staticmethod
    def _read_parameters(path: Path, place: Place | None) -> dict[str, Any]:
        with _tree_reader() as reader:
            stored = reader.metadata(path).item_metadata.tree["parameters"]
            wanted = dict.fromkeys(stored) if place is None else place(stored)
            arguments = {name: _as_it_lies(x, stored[name]) for name, x in wanted.items()}
            tree = reader.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item={"parameters": dict.fromkeys(arguments, 0)},
                    restore_args={"parameters": arguments},
                    partial_restore=True,
                ),
            )
        parameters: dict[str, Any] = tree["parameters"]
        return parameters

    def wait(self) -> None:
        """Until everything saved is on disk."""
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        if self._manager is not None:
            with self._writing():
                self._manager.close()
        self._reader.close()


def _each_by_itself() -> ocp.options.MultiprocessingOptions:
    """Reading waits for nobody."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


def _tree_reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(), multiprocessing_options=_each_by_itself()
    )


def _as_it_lies(wanted: jax.ShapeDtypeStruct | None, stored: Any) -> ocp.RestoreArgs:
    """Each device reads its own part; zeros where `wanted` is longer than what is `stored`."""
    if wanted is None or wanted.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        sharding=wanted.sharding,
        global_shape=wanted.shape,
        dtype=wanted.dtype,
        strict=wanted.shape == tuple(stored.shape),
    )


def _in_pieces(array: Any) -> ocp.SaveArgs:
    """A host array would be one piece, which every device that wants a few rows reads whole."""
    pieces = _CHUNK_BYTES if isinstance(array, np.ndarray) else None
    return ocp.SaveArgs(chunk_byte_size=pieces)


def _of_an_older_version(folder: Path) -> bool:
    """Whether the checkpoint was written without checksums, and not robbed of them."""
    try:
        loop = json.loads((folder / "loop" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(loop, dict) and _MARK not in loop


def _why(error: Exception) -> str:
    """What went wrong, on one line."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0] if isinstance(error, Damaged) else f"{type(error).__name__}: {lines[0][:200]}"


def _delete(path: Path) -> None:
    if not path.is_dir():
        path.unlink()
        return
    # Under the name of one that was never finished: a kill meanwhile leaves no half checkpoint.
    aside = path.with_name(path.name + _UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


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
