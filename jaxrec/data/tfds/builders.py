"""TFDS builders of the public data sets, in the publishers' order and without TensorFlow.

TFDS's own MovieLens builder shuffles, and with the order of the file it loses the order of ratings
of one second, of which MovieLens has many. These keep it: shuffling is off, and `row` says where a
rating stood. A record is a chunk of 65,536 rows as columns (see `columns`).

Splits: `ratings` (`row`, `user`, `item`, `rating`, `timestamp`), and, where there is metadata,
`items` (`row`, `item`, `title` and what else the publisher tells). TFDS knows one structure for all
splits of a set, so each leaves the other's columns empty.

Importing this module imports TFDS and registers the builders as `jaxrec_movielens/1m` and
`jaxrec_amazon2014/beauty`; prepare them with `file_format="array_record"` and read them with
`as_data_source`, which need no TensorFlow.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrec.data.tfds import amazon, movielens
from jaxrec.data.tfds.archives import MovieLensArchive
from jaxrec.data.tfds.catalogue import CATALOGUE, PublicDataset
from jaxrec.data.tfds.columns import Columns, rechunk
from jaxrec.data.tfds.download import Progress

_VERSION = "1.0.0"


@dataclasses.dataclass(eq=False)
class PublicConfig(tfds.core.BuilderConfig):
    """One public data set; `titles` says whether item metadata in a file of its own is read."""

    entry: PublicDataset | None = None
    titles: bool = True


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing of these sets is in TFDS's bucket, so there is no reason to go and ask."""


def _column(dtype: Any) -> tfds.features.Tensor:
    if dtype is object:
        return tfds.features.Tensor(shape=(None,), dtype=np.str_)
    # As bytes a column is encoded and decoded in one piece; as numbers it would go one by one.
    return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes")


class _PublicBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    VERSION = tfds.core.Version(_VERSION)
    _ID: Any
    _ITEM_COLUMNS: tuple[str, ...]

    def __init__(
        self,
        *,
        entry: PublicDataset | None = None,
        archives: Mapping[str, Path] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """Takes files that are at hand (`ratings`, `metadata`), or a mirror's entry."""
        self._entry = entry
        self._archives = archives
        self._progress = progress
        super().__init__(**options)

    # TFDS prints these two on standard output; where we prepare, that belongs to our caller.
    def _log_download_bytes(self) -> None:
        if self._archives is None:
            super()._log_download_bytes()

    def _log_download_done(self) -> None:
        if self._archives is None:
            super()._log_download_done()

    @property
    def entry(self) -> PublicDataset:
        """The data set."""
        return self._entry or self.builder_config.entry

    @property
    def item_columns(self) -> tuple[str, ...]:
        """What the split `items` tells of an item, besides its id."""
        return self._ITEM_COLUMNS

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            description=f"{self.entry.title}, in the publisher's order, 65,536 rows a record.",
            features=tfds.features.FeaturesDict(
                {name: _column(dtype) for name, dtype in self._columns().items()}
            ),
            disable_shuffling=True,
            homepage=self.entry.homepage,
            citation=self.entry.citation,
            license=self.entry.licence,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Columns]]]:
        archives = self._archives
        if archives is None:
            needed = self.entry.archives(titles=self.builder_config.titles)
            archives = dl_manager.download(
                {
                    kind: f"{self.entry.base_url}/{archive.filename}"
                    for kind, archive in needed.items()
                }
            )
        paths = {kind: Path(path) for kind, path in archives.items()}
        splits = {"ratings": self._generate_examples(self._ratings(paths), "ratings")}
        if (items := self._items(paths)) is not None:
            splits["items"] = self._generate_examples(items, "items")
        return splits

    def _generate_examples(
        self, batches: Iterable[Columns], split: str
    ) -> Iterator[tuple[int, Columns]]:
        for key, chunk in enumerate(rechunk(batches)):
            if self._progress is not None:
                rows = int(chunk["row"][-1]) + 1
                share = min(1.0, rows / self.entry.events) if split == "ratings" else 1.0
                self._progress(f"reading {split}", share)
            empty = {
                name: np.empty(0, dtype)
                for name, dtype in self._columns().items()
                if name not in chunk
            }
            yield key, chunk | empty

    def _columns(self) -> dict[str, Any]:
        return {
            "row": np.int64,
            "user": self._ID,
            "item": self._ID,
            "rating": np.float32,
            "timestamp": np.int64,
            **dict.fromkeys(self._ITEM_COLUMNS, object),
        }

    def _ratings(self, paths: Mapping[str, Path]) -> Iterator[Columns]:
        raise NotImplementedError

    def _items(self, paths: Mapping[str, Path]) -> Iterable[Columns] | None:
        raise NotImplementedError


class JaxrecMovielens(_PublicBuilder):
    """MovieLens 100k, 1m, 20m and 25m from GroupLens's archives."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        PublicConfig(name=entry.config, entry=entry)
        for entry in CATALOGUE.values()
        if entry.family == "movielens"
    ]
    _ID = np.int32
    _ITEM_COLUMNS = ("title", "genres")

    def _archive(self, paths: Mapping[str, Path]) -> MovieLensArchive:
        return MovieLensArchive(paths["ratings"], f"ml-{self.entry.config}")

    def _ratings(self, paths: Mapping[str, Path]) -> Iterator[Columns]:
        return movielens.read_ratings(self._archive(paths), self.entry.config)

    def _items(self, paths: Mapping[str, Path]) -> Iterable[Columns]:
        return [movielens.read_movies(self._archive(paths), self.entry.config)]


class JaxrecAmazon2014(_PublicBuilder):
    """Amazon product data of 2014, 5-core, one configuration a category.

    `beauty` reads titles, brands and categories too; `beauty_reviews` reads the reviews alone.
    """

    BUILDER_CONFIGS = [  # noqa: RUF012
        PublicConfig(
            name=entry.config if titles else f"{entry.config}_reviews", entry=entry, titles=titles
        )
        for entry in CATALOGUE.values()
        if entry.family == "amazon-2014"
        for titles in (True, False)
    ]
    _ID = object
    _ITEM_COLUMNS = ("title", "brand", "categories")

    def _ratings(self, paths: Mapping[str, Path]) -> Iterator[Columns]:
        self._reviewed: set[str] = set()
        for batch in amazon.read_reviews(paths["ratings"]):
            self._reviewed.update(batch["item"])
            yield batch

    def _items(self, paths: Mapping[str, Path]) -> Iterable[Columns] | None:
        if "metadata" not in paths:
            return None
        return self._products(paths)

    def _products(self, paths: Mapping[str, Path]) -> Iterator[Columns]:
        # TFDS prepares the splits in their order, so the reviews have been read by now.
        yield amazon.read_metadata(paths["metadata"], frozenset(self._reviewed))


BUILDERS = {"movielens": JaxrecMovielens, "amazon-2014": JaxrecAmazon2014}


def make_builder(entry: PublicDataset, *, titles: bool = True, **options: Any) -> _PublicBuilder:
    """The TFDS builder of one public data set.

    Args:
        entry: the data set.
        titles: whether to read item metadata that is a file of its own.
        **options: `archives`, `progress`, and what TFDS builders take (`data_dir`).
    """
    config = entry.config if titles or entry.metadata is None else f"{entry.config}_reviews"
    return BUILDERS[entry.family](config=config, entry=entry, **options)
