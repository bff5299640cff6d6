"""An exported run, ready to rank: JAX, NumPy and Arrow, no model code and no Flax."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax import Array
from numpy.typing import NDArray

from jaxrec.data._ids import Id, IdIndex
from jaxrec.errors import UserError
from jaxrec.serving._answers import Recommendation, checked_history, checked_times
from jaxrec.serving.artifact import (
    ITEMS,
    MANIFEST,
    checked_file,
    function_name,
    parameter_name,
    read_manifest,
)

# Histories ranked at once where the function takes any number.
_BATCH_SIZE = 64


class ExportedRun:
    """Ranks items with an exported function. Make one with `load_exported`.

    Attributes:
      folder: where it lives.
      manifest: what the function takes and gives, and where it is from.
      platform: what JAX runs on here, and which of the functions that is.
      parameters: the function's first argument, on the device.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.manifest = read_manifest(self.folder)
        self.platform = _platform_here()
        if self.platform not in self.manifest.platforms:
            raise UserError(
                f"{self.folder}: was not exported for {self.platform}, only for "
                f"{', '.join(map(str, self.manifest.platforms))}; export it with --platforms "
                f"{self.platform}"
            )
        self.function = jax.jit(self._read_function().call)
        self._item_table = self._read_items()
        self._items = IdIndex(
            self._item_table["item_id"].combine_chunks(), "item", str(self.manifest.data["name"])
        )
        self.parameters = {
            name: jax.device_put(self._read_parameter(name, about))
            for name, about in self.manifest.parameters.items()
        }

    def __repr__(self) -> str:
        about = self.manifest
        return (
            f"ExportedRun({str(self.folder)!r}: {about.model} on {about.data['name']}, step "
            f"{about.step}, for {self.platform})"
        )

    @cached_property
    def item_titles(self) -> list[str | None] | None:
        """Titles by index; None where the data set has none."""
        table = self._item_table
        return table["title"].to_pylist() if "title" in table.column_names else None

    def recommend(
        self,
        history: Sequence[Id],
        times: Sequence[int] | None = None,
        *,
        k: int | None = None,
        filter_seen: bool | None = None,
    ) -> list[Recommendation]:
        """The `k` best items for anybody with a history, as the run itself would rank them.

        Args:
          history: original item ids, oldest first.
          times: when its events happened, in seconds since any origin; for models that read it.
          k: how many, at most what was exported; that by default.
          filter_seen: leave out items of the history; by default as the run evaluates.

        Returns:
          Best first; fewer than `k` where fewer items are left.

        Raises:
          UserError: an unknown item, an empty history, times that are missing or do not fit, a `k`
            beyond what was exported.
        """
        found = self.recommend_many(
            [history], None if times is None else [times], k=k, filter_seen=filter_seen
        )
        return found[0]

    def recommend_many(
        self,
        histories: Sequence[Sequence[Id]],
        times: Sequence[Sequence[int]] | None = None,
        *,
        k: int | None = None,
        filter_seen: bool | None = None,
    ) -> list[list[Recommendation]]:
        """`recommend` for many histories, in batches; the lists are in their order."""
        if isinstance(histories, str):
            raise UserError(f"recommend: histories is a list of lists, got the text {histories!r}")
        k = self._check_k(k)
        filter_seen = self.manifest.filter_seen if filter_seen is None else filter_seen
        events = [checked_history(history, self._items) for history in histories]
        seconds = self._seconds(times, events)
        # Distinct items are enough to be left out.
        seen = [np.unique(one) if filter_seen else one[:0] for one in events]
        found: list[list[Recommendation]] = [[] for _ in events]
        for chosen in self._batches(seen):
            scores, items = self._call(self._arrays(chosen, events, seconds, seen))
            for row, which in enumerate(chosen):
                pairs = zip(items[row, :k].tolist(), scores[row, :k].tolist(), strict=True)
                found[which] = [self._recommendation(i, score) for i, score in pairs if i >= 0]
        return found

    def _batches(self, seen: list[NDArray[np.int32]]) -> Iterator[NDArray[np.int64]]:
        """Histories that are ranked together; those with few items first, for narrow arrays."""
        order = np.argsort([len(one) for one in seen], kind="stable")
        size = self.manifest.batch_size or _BATCH_SIZE
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _arrays(
        self,
        chosen: NDArray[np.int64],
        events: list[NDArray[np.int32]],
        seconds: list[NDArray[np.int64]] | None,
        seen: list[NDArray[np.int32]],
    ) -> list[NDArray[np.int32]]:
        """The function's arguments after the parameters. Sizes are powers of two: few programs."""
        length, unit = self.manifest.max_length, self.manifest.seen_multiple
        rows = self.manifest.batch_size or _power_of_two(len(chosen))
        columns = unit * _power_of_two(-(-max(len(seen[i]) for i in chosen) // unit))
        arrays = {
            "items": np.zeros((rows, length), np.int32),
            "lengths": np.zeros(rows, np.int32),
            "timestamps": np.zeros((rows, length), np.int32),
            "seen": np.full((rows, columns), -1, np.int32),
        }
        for row, which in enumerate(chosen):
            newest = events[which][-length:]
            arrays["items"][row, : len(newest)] = newest
            arrays["lengths"][row] = len(newest)
            arrays["seen"][row, : len(seen[which])] = seen[which]
            if seconds is not None:
                since = seconds[which][-length:]
                limit = np.iinfo(np.int32).max
                arrays["timestamps"][row, : len(since)] = np.minimum(since - since[0], limit)
        return [arrays[one["name"]] for one in self.manifest.inputs]

    def _call(
        self, arrays: list[NDArray[np.int32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        try:
            scores, items = self.function(self.parameters, *arrays)
        except jax.errors.JaxRuntimeError as error:
            # An older JAX reads the frame of a newer one's function, and finds out when it compiles
            # what is inside.
            if "deserialize" not in str(error):
                raise
            raise self._unreadable(error) from None
        return np.asarray(scores), np.asarray(items)

    def _unreadable(self, error: Exception) -> UserError:
        reason = str(error).strip().partition("\n")[0]
        return UserError(
            f"{self.folder / function_name(self.platform)}: jax {jax.__version__} cannot read what "
            f"jax {self.manifest.jax} exported ({reason}); use that version or a later one"
        )

    def _seconds(
        self, times: Sequence[Sequence[int]] | None, events: list[NDArray[np.int32]]
    ) -> list[NDArray[np.int64]] | None:
        if not self.manifest.reads_timestamps:
            return None
        if times is not None and len(times) != len(events):
            raise UserError(
                f"recommend: times must be one list a history ({len(events)}), got {len(times)}"
            )
        given = [None] * len(events) if times is None else times
        return [checked_times(t, len(e)) for t, e in zip(given, events, strict=True)]

    def _check_k(self, k: int | None) -> int:
        most = self.manifest.k
        if k is None:
            return most
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        if k > most and most < len(self._items):
            raise UserError(f"k is {k}, {self.folder} ranks {most}; export it with --k {k}")
        return min(k, most)

    def _recommendation(self, index: int, score: float) -> Recommendation:
        title = None if self.item_titles is None else self.item_titles[index]
        return Recommendation(self._items.id(index), title, score)

    def _read_function(self) -> jax.export.Exported:
        path = checked_file(self.folder, function_name(self.platform), self.manifest)
        try:
            return jax.export.deserialize(bytearray(path.read_bytes()))
        except (ValueError, KeyError, AssertionError) as error:
            raise self._unreadable(error) from None

    def _read_items(self) -> pa.Table:
        path = checked_file(self.folder, ITEMS, self.manifest)
        table = pq.read_table(path)
        if table.num_rows != self.manifest.data.get("items"):
            raise UserError(
                f"{path}: {table.num_rows} items, wanted {self.manifest.data.get('items')}"
            )
        return table

    def _read_parameter(self, name: str, about: Any) -> NDArray[Any] | Array:
        path = checked_file(self.folder, parameter_name(name), self.manifest)
        array = np.load(path, allow_pickle=False)
        try:
            array = array.view(jnp.dtype(about["dtype"]))
            right = list(array.shape) == about["shape"]
        except (TypeError, KeyError):
            right = False
        if not right:
            raise UserError(
                f"{self.folder / MANIFEST}: parameters.{name} is {about!r}, the file has shape "
                f"{list(array.shape)}; the manifest is damaged"
            )
        return array


def load_exported(folder: str | Path) -> ExportedRun:
    """Opens a folder that `jaxrec export` or `Run.export` wrote.

    Args:
      folder: that folder.

    Raises:
      UserError: not such a folder, another format version, a file that is missing or damaged, or
        not exported for the platform that JAX runs on here.
    """
    return ExportedRun(folder)


def _platform_here() -> str:
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def _power_of_two(count: int) -> int:
    """The least power of two that is not below; 1 for none."""
    return 1 << max(0, count - 1).bit_length()
