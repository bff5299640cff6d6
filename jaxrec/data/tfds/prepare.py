"""From a public data set's name to its prepared form."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.data._store import check_free, sha256_file
from jaxrec.data.filters import compact, k_core
from jaxrec.data.paths import data_dir as default_data_dir
from jaxrec.data.paths import dataset_dir
from jaxrec.data.prepared import Interactions, write_prepared
from jaxrec.data.tfds.archives import DamagedArchive, check_readable
from jaxrec.data.tfds.catalogue import Notice, PublicDataset, at, find
from jaxrec.data.tfds.columns import CHUNK, Columns
from jaxrec.data.tfds.download import Progress, cached, fetch, scratch_folder
from jaxrec.errors import UserError

TIE_ORDER = "events of one user at the same time stand in the order of the publisher's file"
_DOWNLOADS = ".downloads"


def prepare(
    dataset: str,
    name: str | None = None,
    *,
    archive: Path | str | None = None,
    metadata_archive: Path | str | None = None,
    titles: bool = True,
    notice: Notice | None = None,
    accept_licence: Callable[[PublicDataset], bool] | None = None,
    data_dir: Path | str | None = None,
    download_dir: Path | str | None = None,
    base_url: str | None = None,
    min_rating: float | None = None,
    min_user_events: int = 0,
    min_item_events: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Interactions:
    """Prepares a public data set: MovieLens, or the Amazon product data of 2014 (5-core).

    The publisher's file is downloaded (once, and kept), read in its order by a TFDS builder, and
    written in the prepared form. Users and items are numbered by ascending original id; an item
    that is listed and never rated is left out. Events of one user at the same time keep the order
    of the publisher's file.

    Args:
        dataset: `movielens-1m`, `amazon-2014-beauty`, ...; see `available`.
        name: what to call the prepared set; default its own name.
        archive: a file that is at hand, in place of a download: `ml-1m.zip` or the folder that it
            was extracted to; for Amazon `reviews_Beauty_5.json.gz`, packed or not. Nothing is
            downloaded then.
        metadata_archive: for Amazon, `meta_Beauty.json.gz`, which holds the titles.
        titles: for Amazon, whether to download the metadata as well, a much larger file than the
            reviews.
        notice: told the terms before a download, and what is worth knowing; default prints to
            standard error.
        accept_licence: asked before a download; a false answer ends the matter.
        data_dir: folder of the prepared sets; default `jaxrec.data.data_dir()`.
        download_dir: where downloads are kept; default `.downloads` in `data_dir`.
        base_url: a mirror, with the same file names as the publisher.
        min_rating: keep ratings of at least that.
        min_user_events, min_item_events: keep the largest set in which each user and each item
            has that many events (k-core); `min_item_events=5` makes of MovieLens 1M the 999,611
            ratings of 3,416 films that sequential recommenders are compared on.
        overwrite: replace a prepared set of that name.
        progress: called with what is being done and the share of it that is done.

    Returns:
        The prepared set, opened.

    Raises:
        UserError: for an unknown set, a name that is taken, no network, a refused or altered
            download, an archive that is damaged, of another set or malformed, filters that leave
            nothing. Nothing half-written is left.

    Cost: 25 million ratings were seen to take half a minute after the download, and 1.8 GB.

    >>> import tempfile, zipfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with zipfile.ZipFile(folder + "/ml-1m.zip", "w") as archive:
    ...         archive.writestr("ml-1m/ratings.dat", "1::7::5::20\\n1::8::4::10\\n")
    ...         archive.writestr("ml-1m/movies.dat", "7::Heat (1995)::Crime\\n8::Jaws::Horror\\n")
    ...     made = prepare("movielens-1m", archive=folder + "/ml-1m.zip", data_dir=folder,
    ...                    notice=lambda text: None)
    ...     print(made, [made.item_text(item) for item in made.history(0)])
    Interactions('movielens-1m': 1 users, 2 items, 2 events) ['Jaws', 'Heat (1995)']
    """
    entry = at(find(dataset), base_url)
    keep = _Filter(min_rating, min_user_events, min_item_events)
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser().absolute()
    target = dataset_dir(name or entry.name, root)
    check_free(target, overwrite=overwrite)
    tell = _print_notice if notice is None else notice
    downloads = root / _DOWNLOADS if download_dir is None else Path(download_dir).expanduser()

    if archive is not None or metadata_archive is not None:
        paths = _given(entry, archive, metadata_archive, tell)
        downloaded = False
    else:
        paths = _downloaded(entry, titles, downloads, tell, accept_licence, progress)
        downloaded = True
    try:
        with scratch_folder(root, target.name) as scratch:
            ratings, items = _through_tfds(entry, paths, scratch, progress)
    except DamagedArchive:
        if downloaded:  # a download without a known hash that proved to be cut off
            for path in paths.values():
                path.unlink(missing_ok=True)
        raise
    if len(ratings["item"]) != entry.events:
        tell(
            f"{entry.title}: read {len(ratings['item']):,} ratings, and its publisher states "
            f"{entry.events:,}"
        )
    if progress is not None:
        progress("writing", 0.0)
    source = _source(entry, paths, downloaded=downloaded)
    return _write(target, ratings, items, keep, source, overwrite=overwrite)


@dataclasses.dataclass(frozen=True)
class _Filter:
    min_rating: float | None
    min_user_events: int
    min_item_events: int

    def __post_init__(self) -> None:
        for option in ("min_user_events", "min_item_events"):
            if getattr(self, option) < 0:
                raise UserError(f"{option} is {getattr(self, option)}; wanted 0 or more")

    def kept(self, users: np.ndarray, items: np.ndarray, ratings: np.ndarray) -> np.ndarray | None:
        """Places of the events that stay; None where all do because nothing was asked."""
        asked = {name: value for name, value in dataclasses.asdict(self).items() if value}
        if not asked:
            return None
        places = np.arange(len(ratings))
        if self.min_rating is not None:
            places = places[ratings >= np.float32(self.min_rating)]
        if self.min_user_events > 1 or self.min_item_events > 1:
            places = places[
                k_core(users[places], items[places], self.min_user_events, self.min_item_events)
            ]
        if len(places) == 0:
            told = ", ".join(f"{name}={value:g}" for name, value in asked.items())
            raise UserError(
                f"no event is left with {told}; the highest rating is "
                f"{float(ratings.max()):g}; ask for less"
            )
        return places


def _print_notice(text: str) -> None:
    print(text, file=sys.stderr)


def _given(
    entry: PublicDataset,
    archive: Path | str | None,
    metadata_archive: Path | str | None,
    tell: Notice,
) -> dict[str, Path]:
    if archive is None:
        raise UserError(f"the metadata alone is no data set: pass {entry.ratings.filename} as well")
    if metadata_archive is not None and entry.metadata is None:
        raise UserError(f"{entry.name} has no metadata file of its own; its archive holds titles")
    paths = {"ratings": Path(archive).expanduser()}
    if metadata_archive is not None:
        paths["metadata"] = Path(metadata_archive).expanduser()
    elif entry.metadata is not None:
        tell(f"no titles: they are in {entry.metadata.filename} (--metadata-archive FILE)")
    for path in paths.values():
        check_readable(path)
    wanted, given = entry.ratings, paths["ratings"]
    if wanted.sha256 and given.is_file() and sha256_file(given) != wanted.sha256:
        tell(
            f"{given}: not byte for byte the {wanted.filename} that its publisher offers "
            "(SHA-256 differs); the counts may differ too"
        )
    return paths


def _downloaded(
    entry: PublicDataset,
    titles: bool,
    downloads: Path,
    tell: Notice,
    accept_licence: Callable[[PublicDataset], bool] | None,
    progress: Progress | None,
) -> dict[str, Path]:
    needed = entry.archives(titles=titles)
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for kind, archive in needed.items():
        found = cached(archive, downloads)
        if found is None:
            missing.append(kind)
        else:
            paths[kind] = found
    if missing:
        tell(entry.notice)
        if accept_licence is not None and not accept_licence(entry):
            raise UserError(f"{entry.name} was not downloaded: its terms were not accepted")
        paths |= fetch(entry, missing, downloads, progress=progress)
    return {kind: paths[kind] for kind in needed}


def _through_tfds(
    entry: PublicDataset, paths: Mapping[str, Path], scratch: Path, progress: Progress | None
) -> tuple[Columns, Columns | None]:
    """Prepares the set with TFDS in a folder of its own and reads it back whole."""
    import tensorflow_datasets
    from tensorflow_datasets.core.utils import tqdm_utils

    from jaxrec.data.tfds.builders import make_builder

    builder = make_builder(
        entry,
        titles="metadata" in paths,
        archives=paths,
        progress=progress,
        data_dir=scratch,
    )
    bars = tqdm_utils._active
    tensorflow_datasets.display_progress_bar(False)
    try:
        builder.download_and_prepare(
            download_dir=scratch / "downloads",
            download_config=tensorflow_datasets.download.DownloadConfig(try_download_gcs=False),
            file_format="array_record",
        )
    finally:
        tensorflow_datasets.display_progress_bar(bars)
    sources = builder.as_data_source()
    ratings = read_split(sources["ratings"], ("user", "item", "rating", "timestamp"))
    if "items" not in sources:
        return ratings, None
    return ratings, read_split(sources["items"], ("item", *builder.item_columns))


def read_split(source: Any, names: tuple[str, ...], chunk_rows: int = CHUNK) -> Columns:
    """The named columns of a split, each row in the place that `row` gives it.

    Args:
        source: what `as_data_source` returns for a split of these builders.
        names: the columns that are wanted.
        chunk_rows: rows of every record but the last.

    Raises:
        UserError: where rows are missing or stand twice.
    """
    chunks = len(source)
    total = (chunks - 1) * chunk_rows + len(source[chunks - 1]["row"])
    columns: Columns = {}
    seen = np.zeros(total, bool)
    for index in range(chunks):
        chunk = source[index]
        row = chunk["row"]
        if int(row.max(initial=-1)) >= total:
            raise UserError(f"row {int(row.max()):,} of {total:,}: the records do not fit together")
        seen[row] = True
        for name in names:
            if name not in columns:
                columns[name] = np.empty(total, chunk[name].dtype)
            columns[name][row] = chunk[name]
    if not seen.all():
        raise UserError(f"{int((~seen).sum()):,} of {total:,} rows were lost on the way; try again")
    return columns


def number(ids: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """Numbers ids in ascending order.

    Args:
        ids: int32[E] not negative, or an object array of UTF-8 bytes.

    Returns:
        int32[E] codes, and the distinct ids by code.

    >>> codes, distinct = number(np.array([7, 3, 7], np.int32))
    >>> codes.tolist(), distinct.to_pylist()
    ([1, 0, 1], [3, 7])
    """
    if ids.dtype == object:
        encoded = pa.array(ids, pa.binary()).dictionary_encode()
        order = np.argsort(np.array(encoded.dictionary.to_pylist(), object))
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        distinct = encoded.dictionary.take(pa.array(order)).cast(pa.string())
        return rank[encoded.indices.to_numpy()], distinct
    present = np.zeros(int(ids.max()) + 1, bool)
    present[ids] = True
    return (np.cumsum(present, dtype=np.int32) - 1)[ids], pa.array(np.flatnonzero(present))


def _write(
    target: Path,
    ratings: Columns,
    metadata: Columns | None,
    keep: _Filter,
    source: dict[str, Any],
    *,
    overwrite: bool,
) -> Interactions:
    users, user_ids = number(ratings.pop("user"))
    items, item_ids = number(ratings.pop("item"))
    kept = keep.kept(users, items, ratings["rating"])
    if kept is not None:
        source["dropped"] = len(users) - len(kept)
        users, user_ids = compact(users[kept], user_ids)
        items, item_ids = compact(items[kept], item_ids)
        ratings = {name: column[kept] for name, column in ratings.items()}
    return write_prepared(
        target,
        name=target.name,
        users=users,
        items=items,
        timestamps=ratings["timestamp"],
        ratings=ratings["rating"],
        user_ids=user_ids,
        item_ids=item_ids,
        item_table=None if metadata is None else _item_table(metadata, item_ids),
        source=source,
        tie_order=TIE_ORDER,
        overwrite=overwrite,
        options=dataclasses.asdict(keep),
    )


def _item_table(items: Columns, item_ids: pa.Array) -> pa.Table:
    """What is told of each item, by item index; null where nothing is."""
    listed = items.pop("item")
    listed_ids = (
        pa.array(listed, pa.binary()).cast(pa.string())
        if listed.dtype == object
        else pa.array(listed, item_ids.type)
    )
    place = pc.index_in(item_ids, value_set=listed_ids)
    columns = {}
    for name, texts in items.items():
        column = pa.array(texts, pa.binary()).cast(pa.string()).take(place)
        columns[name] = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    return pa.table(columns)


def _source(entry: PublicDataset, paths: Mapping[str, Path], *, downloaded: bool) -> dict[str, Any]:
    files = []
    needed = entry.archives()
    for kind, path in paths.items():
        record: dict[str, Any] = {"name": path.name, "holds": kind}
        if downloaded:
            record["url"] = f"{entry.base_url}/{needed[kind].filename}"
        if path.is_file():
            record |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            if needed[kind].sha256 is not None:
                record["as_published"] = record["sha256"] == needed[kind].sha256
        files.append(record)
    return {
        "kind": "tfds",
        "dataset": entry.name,
        "title": entry.title,
        "files": files,
        "licence": entry.licence,
        "citation": entry.citation,
        "homepage": entry.homepage,
    }
