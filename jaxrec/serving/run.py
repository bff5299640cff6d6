"""A trained run, ready for use: recommend, evaluate, find similar items, export vectors."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jaxrec._files import replacing
from jaxrec.data._ids import Id, IdIndex
from jaxrec.data.prepared import Interactions
from jaxrec.data.splits import Split
from jaxrec.devices import Placement
from jaxrec.errors import UserError
from jaxrec.evaluation._questions import targets_of
from jaxrec.evaluation.baselines import DEFAULT_BASELINES, evaluate_baselines
from jaxrec.evaluation.evaluator import Evaluator
from jaxrec.evaluation.ranker import Contexts, Ranker
from jaxrec.evaluation.report import Report, compare
from jaxrec.evaluation.results import describe_protocol, evaluate_lists
from jaxrec.processes import first_says, to_host
from jaxrec.serving._answers import Recommendation, checked_history, checked_times
from jaxrec.serving.artifact import PLATFORMS
from jaxrec.training.checkpoints import Checkpoints
from jaxrec.training.config import Experiment, MeshConfig, check
from jaxrec.training.run_folder import RunFolder
from jaxrec.training.setup import (
    count_from_newest,
    make_placement,
    model_shapes,
    open_trained_on,
    split_data,
    timestamps,
)


class RankedLists(NamedTuple):
    """Ranked lists of several users, as indices."""

    users: NDArray[np.int64]
    items: NDArray[np.int32]
    """int32[users, k], -1 where there are fewer candidates."""
    scores: NDArray[np.float32]


class Run:
    """A run folder, opened at one of its checkpoints.

    Make one with `jaxrec.load` or `jaxrec.fit`.

    Attributes:
      folder: where it lives.
      config: the experiment it was trained with.
      step: optimiser steps behind the parameters.
      parameters: by dotted name; on a mesh its item tables are split, and padded with zeros to a
        multiple of `mesh.model` rows.
      bind: parameters -> model.
    """

    def __init__(
        self, path: str | Path, *, checkpoint: str = "best", mesh: MeshConfig | None = None
    ) -> None:
        self.folder = RunFolder(path)
        self.config: Experiment = self.folder.read_config()
        data = self.folder.read_data()
        shapes, self.bind = model_shapes(self.config, data["items"])
        self._placement: Placement | None = None
        if mesh is not None:
            asked = check(replace(self.config, mesh=mesh))
            self._placement = make_placement(asked, data["items"])

        def place(stored: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
            _check_shapes(self.folder, shapes, stored)
            return shapes if self._placement is None else self._placement.held(shapes)

        checkpoints = Checkpoints(self.folder.checkpoints, self.config.training.metric)
        try:
            if self._placement is not None:
                # Its parts are of one checkpoint, whatever a process sees of a shared disk.
                checkpoint = first_says(lambda: str(checkpoints.find(checkpoint)))
            self.step, read = checkpoints.read_parameters(checkpoint, place)
        finally:
            checkpoints.close()
        self.parameters = {name: jax.numpy.asarray(read[name]) for name in shapes}
        self._ranker = Ranker(self.bind, self._placement)
        self._shards = 1 if self._placement is None else self._placement.data
        self._data = data
        self._reports: dict[tuple[str, tuple[int, ...], tuple[str, ...]], Report] = {}

    def __repr__(self) -> str:
        return (
            f"Run({str(self.folder.path)!r}: {self.config.model.type} on {self._data['name']}, "
            f"step {self.step})"
        )

    @cached_property
    def item_table(self) -> pa.Table:
        """Ids and titles by index, as the run folder keeps them."""
        try:
            table = pq.read_table(self.folder.items)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.folder.items}: cannot be read ({error})") from None
        if table.num_rows != self._data["items"]:
            raise UserError(
                f"{self.folder.items}: {table.num_rows} items, wanted {self._data['items']}"
            )
        return table

    @cached_property
    def _items(self) -> IdIndex:
        ids = self.item_table["item_id"].combine_chunks()
        return IdIndex(ids, "item", self._data["name"])

    @cached_property
    def item_ids(self) -> NDArray[Any]:
        """Original item ids by index."""
        return self._items.array()

    @cached_property
    def item_titles(self) -> list[str | None] | None:
        """Titles by index; None where the data set has none."""
        table = self.item_table
        return table["title"].to_pylist() if "title" in table.column_names else None

    @property
    def num_items(self) -> int:
        return int(self._data["items"])

    @cached_property
    def interactions(self) -> Interactions:
        """The data set it was trained on.

        Raises:
          UserError: it is not at hand, or is another version by its hash.
        """
        return open_trained_on(self.folder, self.config)

    @cached_property
    def split(self) -> Split:
        return split_data(self.config, self.interactions)

    def recommend(
        self,
        user: Id | None = None,
        *,
        history: Sequence[Id] | None = None,
        times: Sequence[int] | None = None,
        k: int = 10,
        filter_seen: bool | None = None,
        allow: Iterable[Id] | None = None,
        deny: Iterable[Id] | None = None,
    ) -> list[Recommendation]:
        """The `k` best items for a user of the data set, or for anybody with a history.

        Args:
          user: original id (or its text) of a user; the whole history counts.
          history: original item ids, oldest first, instead of a user.
          times: when the events of `history` happened, in seconds since any origin; for models
            that read it.
          k: how many.
          filter_seen: leave out items of the history; by default as the run evaluates.
          allow: only these items (original ids).
          deny: none of these items.

        Returns:
          Best first; fewer than `k` where fewer items are left.

        Raises:
          UserError: neither or both of user and history, an unknown id, an empty history, times
            that are missing or do not fit.
        """
        if (user is None) == (history is None):
            raise UserError("recommend: give a user or a history, one of the two")
        seconds: NDArray[np.int64] | None
        if history is not None:
            events = checked_history(history, self._items)
            reads_times = self.config.model.reads_timestamps
            seconds = checked_times(times, len(events)) if reads_times else None
        else:
            assert user is not None
            if times is not None:
                raise UserError("recommend: times go with a history, not with a user")
            data = self.interactions
            index = data.user_index(user)
            own = slice(int(data.offsets[index]), int(data.offsets[index + 1]))
            events = np.asarray(data.items[own])
            known = timestamps(self.config, data)
            seconds = None if known is None else np.asarray(known[own])
        if not len(events):
            raise UserError(
                f"recommend: the history of user {user!r} is empty; give at least one item"
            )
        contexts = self._contexts(events, seconds, np.array([0]), np.array([len(events)]), 1)
        scores, lists = self._ranker.lists(
            self.parameters,
            contexts,
            self._check_k(k),
            filter_seen=self._filter_seen(filter_seen),
            allow=self._mask(allow),
            deny=self._mask(deny),
        )
        return [
            self._recommendation(int(item), float(score))
            for item, score in zip(lists[0], scores[0], strict=True)
            if item >= 0
        ]

    def recommend_all(
        self,
        users: Sequence[Id] | None = None,
        *,
        k: int = 10,
        filter_seen: bool | None = None,
        allow: Iterable[Id] | None = None,
        deny: Iterable[Id] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> RankedLists:
        """Ranked lists for many users of the data set, from their whole histories.

        Args:
          users: original ids; everybody with an event by default.
          k, filter_seen, allow, deny: as in `recommend`.
          progress: called with the number of users done since the last call.
        """
        data = self.interactions
        if users is None:
            index = np.flatnonzero(np.diff(data.offsets) > 0)
        else:
            given = list(users)
            index = data.user_indices(given).astype(np.int64)
            for unknown in np.flatnonzero(index < 0):
                data.user_index(given[unknown])  # which tells it
        return self.rank_users(
            index, k=k, filter_seen=filter_seen, allow=allow, deny=deny, progress=progress
        )

    def rank_users(
        self,
        users: NDArray[np.int64],
        *,
        k: int = 10,
        filter_seen: bool | None = None,
        allow: Iterable[Id] | None = None,
        deny: Iterable[Id] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> RankedLists:
        """`recommend_all` for user indices instead of original ids."""
        offsets = np.asarray(self.interactions.offsets)
        empty = np.flatnonzero(offsets[users] == offsets[users + 1])
        if len(empty):
            user = self.interactions.user_id(int(users[empty[0]]))
            raise UserError(f"recommend: the history of user {user!r} is empty; leave them out")
        contexts = self._contexts(
            self.interactions.items,
            timestamps(self.config, self.interactions),
            offsets[users],
            offsets[users + 1],
            self.config.evaluation.batch_size,
        )
        scores, lists = self._ranker.lists(
            self.parameters,
            contexts,
            self._check_k(k),
            filter_seen=self._filter_seen(filter_seen),
            allow=self._mask(allow),
            deny=self._mask(deny),
            progress=progress,
        )
        return RankedLists(users, lists, scores)

    def lists(self, part: str = "test", ks: tuple[int, ...] | None = None) -> NDArray[np.int32]:
        """Ranked item indices for every target of a part of the split, in the split's order."""
        config = self.config
        cuts = tuple(ks or config.evaluation.ks)
        if any(k < 1 for k in cuts):
            raise UserError(f"cut-offs must be whole numbers from 1 on, got {cuts}")
        targets = targets_of(self.split, part)
        evaluator = Evaluator(
            self.interactions,
            targets,
            self._ranker,
            ks=cuts,
            filter_seen=config.evaluation.filter_seen,
            batch_size=config.evaluation.batch_size,
            max_length=config.data.max_length,
            packed=config.data.packed,
            count_from_newest=count_from_newest(config),
            shards=self._shards,
            timestamps=timestamps(config, self.interactions),
        )
        return evaluator.lists(self.parameters)

    def evaluate(
        self,
        part: str = "test",
        *,
        ks: tuple[int, ...] | None = None,
        baselines: tuple[str, ...] = DEFAULT_BASELINES,
    ) -> Report:
        """Full-catalogue metrics with bootstrap intervals, beside the baselines.

        Args:
          part: "test" or "validation".
          ks: cut-offs; the config's by default.
          baselines: which, out of `evaluation.baselines.BASELINES`.
        """
        settings = self.config.evaluation
        cuts = tuple(ks or settings.ks)
        if (part, cuts, baselines) in self._reports:
            return self._reports[part, cuts, baselines]
        lists = self.lists(part, cuts)
        data, split = self.interactions, self.split
        report = compare(
            evaluate_lists(lists, data, targets_of(split, part), ks=cuts),
            evaluate_baselines(
                data,
                split,
                part=part,
                ks=cuts,
                filter_seen=settings.filter_seen,
                names=baselines,
            ),
            describe_protocol(data, split, part=part, filter_seen=settings.filter_seen),
            name=self.config.name,
            level=settings.level,
            resamples=settings.resamples,
            seed=self.config.training.seed,
        )
        self._reports[part, cuts, baselines] = report
        return report

    def similar_items(self, item: Id, k: int = 10) -> list[Recommendation]:
        """The items whose vectors point most nearly the same way, with cosine similarities.

        Raises:
          UserError: an unknown item.
        """
        index = self._items.find(item)
        vectors = self.item_vectors().astype(np.float64)
        lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)
        similarity = vectors @ vectors[index] / (lengths * lengths[index])
        similarity[index] = -np.inf
        order = np.argsort(-similarity, kind="stable")[: min(self._check_k(k), self.num_items - 1)]
        return [self._recommendation(int(i), float(similarity[i])) for i in order]

    def item_vectors(self) -> NDArray[np.float32]:
        """float32[items, width]: the table that user states are scored against, by index.

        On the host, which holds all of it; no device does that has not.
        """
        table = to_host(self.bind(self.parameters).item_table())
        return np.asarray(table[: self.num_items], np.float32)

    def parameter_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of the parameters by name, on any mesh those of one device."""
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in self.parameters.items()}
        placement = self._placement
        return shapes if placement is None else dict(placement.stored(shapes))

    def host_parameter(self, name: str) -> NDArray[Any]:
        """A parameter by name, on any mesh that of one device."""
        rows = self.parameter_shapes()[name].shape[:1]
        whole = to_host(self.parameters[name])
        return whole[: rows[0]] if rows else whole

    def export_item_vectors(self, path: str | Path) -> Path:
        """Writes the item vectors: `.npy` (rows by index) or `.parquet` (with ids and titles).

        Raises:
          UserError: another ending, or a folder that cannot be written to.
        """
        path = Path(path)
        vectors = self.item_vectors()
        try:
            with replacing(path) as temporary:
                if path.suffix == ".npy":
                    with temporary.open("wb") as file:
                        np.save(file, vectors, allow_pickle=False)
                elif path.suffix == ".parquet":
                    flat = pa.array(vectors.reshape(-1))
                    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
                    pq.write_table(self.item_table.append_column("vector", column), temporary)
                else:
                    raise UserError(f"{path}: item vectors are written to .npy or .parquet")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        return path

    def export(
        self,
        folder: str | Path,
        *,
        platforms: Sequence[str] = PLATFORMS,
        k: int = 10,
        batch_size: int | None = None,
    ) -> Path:
        """Writes a folder that `jaxrec.serving.exported.load_exported` ranks from, without the
        model's code.

        Args:
          folder: a new folder, or an empty one.
          platforms: out of cpu, tpu and cuda; none of them needs to be here.
          k: length of the lists.
          batch_size: histories ranked at once; None leaves it to each call.

        Raises:
          UserError: an option that makes no sense, a folder that is in use or cannot be written.
        """
        from jaxrec.serving.export import write_artifact

        return write_artifact(self, folder, platforms=platforms, k=k, batch_size=batch_size)

    def _contexts(
        self,
        items: NDArray[np.int32],
        seconds: NDArray[np.int64] | None,
        starts: Any,
        stops: Any,
        batch_size: int,
    ) -> Contexts:
        return Contexts(
            items,
            starts,
            stops,
            batch_size=batch_size,
            max_length=self.config.data.max_length,
            packed=self.config.data.packed,
            count_from_newest=count_from_newest(self.config),
            shards=self._shards,
            timestamps=seconds,
        )

    def _filter_seen(self, asked: bool | None) -> bool:
        return self.config.evaluation.filter_seen if asked is None else asked

    def _check_k(self, k: int) -> int:
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        return min(k, self.num_items)

    def _mask(self, items: Iterable[Id] | None) -> NDArray[np.bool_] | None:
        if items is None:
            return None
        mask = np.zeros(self.num_items, bool)
        mask[self._items.find_each(items)] = True
        return mask

    def item_text(self, item: Id) -> str:
        """What to show a person for an item: its title, or its original id."""
        found = self._recommendation(self._items.find(item), 0.0)
        return found.title or str(found.item_id)

    def _recommendation(self, index: int, score: float) -> Recommendation:
        title = None if self.item_titles is None else self.item_titles[index]
        return Recommendation(self._items.id(index), title, score)


def load(path: str | Path, *, checkpoint: str = "best", mesh: MeshConfig | None = None) -> Run:
    """Opens a run folder.

    Args:
      path: the folder that `jaxrec train --out` or `jaxrec.fit` wrote.
      checkpoint: "best" by validation, "last", or a step's number.
      mesh: the devices that it is spread over, `MeshConfig(data=2, model=4)`, whatever it was
        trained on; one device by default. Each reads its own rows of the item table. Where there
        are several processes, all of them open the run, and call what ranks or gives vectors.

    Raises:
      UserError: not a run folder, no checkpoint, or one that does not fit the config; there are
        not as many devices.
    """
    return Run(path, checkpoint=checkpoint, mesh=mesh)


def _check_shapes(folder: RunFolder, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    missing = sorted(set(wanted) - set(stored))
    unknown = sorted(set(stored) - set(wanted))
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has an unknown {unknown[0]}"
        raise UserError(f"{folder.checkpoints}: a checkpoint of another model: it {what}")
    for name, value in wanted.items():
        if tuple(stored[name].shape) != tuple(value.shape):
            raise UserError(
                f"{folder.checkpoints}: a checkpoint of another model: {name} has shape "
                f"{tuple(stored[name].shape)}, the config asks for {tuple(value.shape)}"
            )
