"""Opening what publishers offer, and saying plainly what is wrong with a file that is not it."""

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from jaxrec.errors import UserError

_GZIP = b"\x1f\x8b"
_ZIP = b"PK"
_ENCRYPTED = 1  # bit of a zip member's flags


def check_readable(path: Path) -> None:
    """Raises UserError unless `path` is a file or a folder that can be read."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        try:
            with path.open("rb") as stream:
                empty = not stream.read(1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if empty:
            raise UserError(f"{path}: the file is empty; download it again")


def looks_like_html(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a web page."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml"))


def start_of(path: Path, length: int = 512) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as stream:
        return stream.read(length)


def web_page(path: Path) -> UserError:
    """The error for a web page in place of a file."""
    return UserError(
        f"{path}: a web page (HTML), not the data: a login, a proxy or a moved address answered; "
        "download the file in a browser and pass it (--archive FILE)"
    )


class DamagedArchive(UserError):
    """A file that is cut off or altered: kept from an earlier download, it is of no use."""

    def __init__(self, path: Path, detail: object) -> None:
        reason = str(detail) or "it ends too early"
        super().__init__(f"{path}: truncated or damaged ({reason}); download it again")


class MovieLensArchive:
    """Members of a MovieLens zip, or of the folder that it was extracted to."""

    def __init__(self, path: Path, folder: str) -> None:
        """Opens nothing yet.

        Args:
            path: `ml-1m.zip`, or the folder with `ratings.dat` in it.
            folder: the folder inside the publisher's archive, as `ml-1m`.
        """
        self.path = path
        self.folder = folder

    @contextmanager
    def open(self, member: str) -> Iterator[IO[bytes]]:
        """Opens one member, as `ratings.dat`.

        Raises:
            UserError: where the archive is not a zip, is cut off, is of another MovieLens set, or
                lacks the member.
        """
        if self.path.is_dir():
            with self._in_folder(member).open("rb") as stream:
                yield stream
            return
        _check_zip(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(self._find(archive.namelist(), member))
                if info.flag_bits & _ENCRYPTED:
                    raise UserError(f"{self.path}: {info.filename} is encrypted")
                with archive.open(info) as stream:
                    yield stream
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DamagedArchive(self.path, error) from None

    def _in_folder(self, member: str) -> Path:
        for folder in (self.path, self.path / self.folder):
            if (folder / member).is_file():
                return folder / member
        there = sorted(entry.name for entry in self.path.iterdir())
        raise self._lacks(member, there)

    def _find(self, names: list[str], member: str) -> str:
        if (expected := f"{self.folder}/{member}") in names:
            return expected
        named = [
            name
            for name in names
            if PurePosixPath(name).name == member and not name.startswith("__MACOSX/")
        ]
        others = [name for name in named if _movielens_folder(name) not in (None, self.folder)]
        if others:
            raise UserError(
                f"{self.path}: this is {_movielens_folder(others[0])}, and {self.folder} is "
                "wanted; pass the archive of the set that you name"
            )
        if not named:
            raise self._lacks(member, names)
        return named[0]

    def _lacks(self, member: str, there: list[str]) -> UserError:
        shown = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "")
        return UserError(
            f"{self.path}: {member} of {self.folder} is not in it (it holds: "
            f"{shown or 'nothing'}); pass {self.folder}.zip as its publisher offers it"
        )


def _movielens_folder(member: str) -> str | None:
    """`ml-20m` of `ml-20m/ratings.csv`; None outside such a folder."""
    for part in PurePosixPath(member).parts[:-1]:
        if part.startswith("ml-"):
            return part
    return None


def _check_zip(path: Path) -> None:
    """Raises UserError unless a file is a zip archive, whatever it is called."""
    start = start_of(path)
    if looks_like_html(start):
        raise web_page(path)
    if not start.startswith(_ZIP):
        raise UserError(
            f"{path}: not a zip archive (it begins with {start[:8]!r}); pass the archive as its "
            "publisher offers it, or the folder that it was extracted to"
        )


@contextmanager
def open_lines(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file of lines, plain or gzip by its content.

    Raises:
        UserError: for a folder, a web page, a zip, or gzip that is cut off or damaged.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder, and a file of lines (.json.gz) is wanted")
    start = start_of(path)
    if looks_like_html(start):
        raise web_page(path)
    if start.startswith(_ZIP):
        raise UserError(f"{path}: a zip archive, and the .json.gz file is wanted")
    if not start.startswith(_GZIP):
        with path.open("rb") as plain:
            yield plain
        return
    try:
        with gzip.open(path, "rb") as stream:
            yield cast(IO[bytes], stream)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DamagedArchive(path, error) from None
