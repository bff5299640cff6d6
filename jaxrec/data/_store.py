"""Folders that appear whole or not at all, and the hashes of what is in them."""

import glob
import hashlib
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from jaxrec.data.paths import MANIFEST
from jaxrec.errors import UserError

_BLOCK = 1 << 22


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty sibling of `path` that takes its place when the block ends well.

    Whatever ends the block otherwise, an interrupt included, removes the sibling and leaves what
    was at `path` as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot create the folder ({error.strerror})") from None
    remove_leftovers(path)
    mark = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    fresh = path.parent / f".{path.name}.new-{mark}"
    try:
        fresh.mkdir()
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write there ({error.strerror})") from None
    try:
        yield fresh
        _put_in_place(fresh, path, path.parent / f".{path.name}.old-{mark}", overwrite=overwrite)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}); nothing was kept"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put_in_place(fresh: Path, path: Path, aside: Path, *, overwrite: bool) -> None:
    if path.exists():
        check_free(path, overwrite=overwrite)
        path.rename(aside)
        try:
            fresh.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        fresh.rename(path)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises UserError unless a data set may be written at `path`."""
    if not path.exists():
        return
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: exists and is not a data set, so it is left alone; remove it")
    if not overwrite:
        raise UserError(
            f"{path.name}: a data set of that name exists ({path}); choose another name, or "
            "replace it with overwrite=True (--overwrite)"
        )


def remove_leftovers(path: Path) -> None:
    """Removes siblings that a killed process of this machine left behind."""
    host = socket.gethostname()
    for kind in ("new", "old"):
        for entry in path.parent.glob(glob.escape(f".{path.name}.{kind}-{host}-") + "*"):
            pid = entry.name.removeprefix(f".{path.name}.{kind}-{host}-").split("-")[0]
            if not pid.isdigit() or _is_alive(int(pid)):
                continue
            if kind == "old" and not path.exists():
                entry.rename(path)  # killed between the two renames: the old set is the good one
            else:
                shutil.rmtree(entry, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sha256_file(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file, as hexadecimal; an unfinished one where `stop` is set meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            if stop is not None and stop.is_set():
                break
    return digest.hexdigest()


@contextmanager
def hashing_beside(paths: Sequence[Path]) -> Iterator[list["Future[str]"]]:
    """Hashes files in a thread while the block runs; given up where the block fails."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, "hashing") as pool:
        try:
            yield [pool.submit(sha256_file, path, stop) for path in paths]
        except BaseException:
            stop.set()
            raise
