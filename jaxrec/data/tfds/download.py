"""Fetching publishers' files with TFDS's download manager, made to fail fast and leave no litter.

Left to itself, the manager retries for minutes where there is no network, waits forever for a
server that falls silent, and downloads on after Ctrl-C.
"""

import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrec.data._store import remove_leftovers, sha256_file
from jaxrec.data.tfds.archives import looks_like_html, start_of
from jaxrec.data.tfds.catalogue import Archive, PublicDataset
from jaxrec.errors import UserError

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
PROBE_SECONDS = 12.0
_RETRIES = 2

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

# The manager's settings are swapped while it works, and they belong to the whole process.
_lock = threading.Lock()


@contextmanager
def scratch_folder(parent: Path, label: str) -> Iterator[Path]:
    """A hidden folder below `parent` that is gone afterwards, whatever happens.

    What a killed process left under the same label goes too.

    Raises:
        UserError: where the folder cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent / label)
        mark = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        folder = parent / f".{label}.new-{mark}"
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{parent}: cannot write there ({error.strerror})") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cached(archive: Archive, download_dir: Path) -> Path | None:
    """The file of an earlier download, if it is there and the publisher's."""
    path = download_dir / archive.filename
    if not path.is_file() or path.stat().st_size == 0:
        return None
    if archive.sha256 is not None and sha256_file(path) != archive.sha256:
        return None
    return path


def fetch(
    entry: PublicDataset,
    kinds: Sequence[str],
    download_dir: Path,
    *,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Downloads files of a public data set; each appears whole or not at all.

    Args:
        entry: the data set, for the addresses and the names.
        kinds: which of its files: `ratings`, `metadata`.
        download_dir: the folder to keep them in, under the publisher's file names.
        progress: told the share of a file that has come (0 where its size is unknown).

    Returns:
        The path of each file.

    Raises:
        UserError: where there is no network, the server refuses or falls silent, a web page comes
            in place of the file, or the file is not the one that was published.
    """
    archives = entry.archives()
    urls = {kind: f"{entry.base_url}/{archives[kind].filename}" for kind in kinds}
    for kind in kinds:  # all of them before the first download, which may take long
        probe(urls[kind], _way_out(kind, archives[kind]))
    return {kind: _fetch_one(urls[kind], kind, entry, download_dir, progress) for kind in kinds}


def _fetch_one(
    url: str, kind: str, entry: PublicDataset, download_dir: Path, progress: Progress | None
) -> Path:
    archive = entry.archives()[kind]
    way_out = _way_out(kind, archive)
    with scratch_folder(download_dir, archive.filename) as scratch:
        fetched = _download(url, entry.name, archive, scratch, progress, way_out)
        start = start_of(fetched)
        if looks_like_html(start):
            raise _web_page(url, way_out)
        if archive.filename.endswith(".zip") and not start.startswith(b"PK"):
            raise UserError(
                f"{url} answered with something that is not a zip archive (it begins with "
                f"{start[:8]!r}); {way_out}"
            )
        path = download_dir / archive.filename
        os.replace(fetched, path)
    return path


def _way_out(kind: str, archive: Archive) -> str:
    if kind == "metadata":
        return "or go without titles (--no-titles)"
    return f"or download {archive.filename} by other means and pass it (--archive FILE)"


def _web_page(url: str, way_out: str) -> UserError:
    return UserError(
        f"{url} answered with a web page (HTML), not the file: a login, a proxy or a moved "
        f"address; check the network, {way_out}"
    )


@dataclass
class _Answer:
    status: int = 0
    content_type: str = ""
    error: BaseException | None = None


def probe(url: str, way_out: str) -> None:
    """Asks for the head of a file, and gives up within seconds.

    Raises:
        UserError: one line that names the address, the reason and the way out.
    """
    import requests

    answer = _Answer()

    def ask() -> None:
        try:
            with requests.Session() as session:
                response = session.head(
                    url, allow_redirects=True, timeout=(CONNECT_SECONDS, READ_SECONDS)
                )
                answer.status = response.status_code
                answer.content_type = response.headers.get("Content-Type", "")
        except Exception as error:
            answer.error = error

    # A thread of its own, because looking up a host's name has no timeout that could be set.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    if asking.is_alive():
        reason = f"no answer within {PROBE_SECONDS:g} s"
    elif answer.error is not None:
        reason = _reason(answer.error)
    elif answer.status >= 400 and answer.status not in (405, 501):  # these two: HEAD is not offered
        raise UserError(f"{url} answered HTTP {answer.status}; try again later, {way_out}")
    elif answer.content_type.startswith("text/html"):
        raise _web_page(url, way_out)
    else:
        return
    raise UserError(f"{url} cannot be reached ({reason}); check the network, {way_out}")


def _reason(error: BaseException) -> str:
    """A few words for what `requests` raised."""
    import requests

    if isinstance(error, requests.ConnectTimeout):
        return f"no answer within {CONNECT_SECONDS:g} s"
    if isinstance(error, requests.Timeout):
        return f"the server fell silent for {READ_SECONDS:g} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate was refused"
    if isinstance(error, requests.exceptions.RetryError):
        return "the server keeps answering with an error"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy refused"
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror.lower()
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__


def _download(
    url: str,
    dataset: str,
    archive: Archive,
    scratch: Path,
    progress: Progress | None,
    way_out: str,
) -> Path:
    import requests
    from tensorflow_datasets.core.download import checksums, download_manager, util

    known = {}
    if archive.sha256 is not None:
        known[url] = checksums.UrlInfo(
            size=archive.size, checksum=archive.sha256, filename=archive.filename
        )
    manager = download_manager.DownloadManager(
        download_dir=scratch, url_infos=known, dataset_name=dataset
    )
    try:
        with _bounded(archive.filename, progress):
            return Path(manager.download(url))
    except download_manager.NonMatchingChecksumError:
        raise UserError(
            f"{url} is not the file that was published (its size or SHA-256 differs): the "
            f"download was altered or cut off; try again later, {way_out}"
        ) from None
    except util.DownloadError as error:
        refusal = str(error).rstrip(".")
        raise UserError(f"{url}: {refusal}; try again later, {way_out}") from None
    except requests.RequestException as error:
        raise UserError(
            f"{url}: the download broke off ({_reason(error)}); try again later, {way_out}"
        ) from None
    except OSError as error:
        raise UserError(f"{scratch.parent}: cannot write there ({error.strerror})") from None


@contextmanager
def _bounded(label: str, progress: Progress | None) -> Iterator[None]:
    """Gives the manager's requests timeouts, few retries, our progress, and an end."""
    import tensorflow_datasets
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.utils import tqdm_utils

    stop = threading.Event()

    def watched(blocks: Iterable[bytes], total: int | None) -> Iterator[bytes]:
        done = 0
        for block in blocks:
            if stop.is_set():
                raise InterruptedError("the download was called off")
            done += len(block)
            if progress is not None:
                progress(f"downloading {label}", min(1.0, done / total) if total else 0.0)
            yield block

    with _lock:
        open_url, retries = downloader._open_url, downloader.MAX_RETRIES

        @contextmanager
        def open_bounded(url: str, **options: Any) -> Iterator[tuple[Any, Iterable[bytes]]]:
            limits = (CONNECT_SECONDS, READ_SECONDS)
            with open_url(url, timeout=limits, **options) as (response, blocks):
                length = response.headers.get("Content-Length")
                yield response, watched(blocks, int(length) if length else None)

        bars = tqdm_utils._active
        downloader._open_url, downloader.MAX_RETRIES = open_bounded, _RETRIES
        tensorflow_datasets.display_progress_bar(False)
        try:
            yield
        finally:
            stop.set()
            downloader._open_url, downloader.MAX_RETRIES = open_url, retries
            tensorflow_datasets.display_progress_bar(bars)
