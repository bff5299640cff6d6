"""Where prepared data sets live on disk, and what they may be called."""

import os
import re
from pathlib import Path

from jaxrec.errors import UserError

MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def data_dir() -> Path:
    """Folder that holds the prepared data sets, one folder a set.

    `$JAXREC_DATA_DIR` where it is set, else `jaxrec/data` in the user's cache
    (`$XDG_CACHE_HOME` or `~/.cache`). The folder need not exist yet.

    Returns:
        The folder, as an absolute path.

    >>> import os
    >>> before = os.environ.get("JAXREC_DATA_DIR")
    >>> os.environ["JAXREC_DATA_DIR"] = "/srv/sets"
    >>> str(data_dir())
    '/srv/sets'
    >>> _ = os.environ.pop("JAXREC_DATA_DIR") if before is None else (
    ...     os.environ.__setitem__("JAXREC_DATA_DIR", before))
    """
    chosen = os.environ.get("JAXREC_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path("~/.cache").expanduser()
    return (root / "jaxrec" / "data").absolute()


def check_name(name: str) -> str:
    """Returns `name` if a data set may be called that.

    Args:
        name: letters, digits, `.`, `_` and `-`, at most 100, not beginning with `.` or `-`.

    Raises:
        UserError: for any other name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a data set: use letters, digits, '.', '_' and '-' "
            "(at most 100, the first a letter, a digit or '_')"
        )
    return name


def dataset_dir(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Folder of the data set `name` under `root` (default `data_dir()`).

    Raises:
        UserError: where `name` is not a valid name.
    """
    return (data_dir() if root is None else Path(root).expanduser().absolute()) / check_name(name)


def dataset_names(root: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of the sets under `root` (default `data_dir()`), sorted.

    A folder counts as a set when it holds a manifest; hidden folders are sets in the making.
    """
    folder = data_dir() if root is None else Path(root).expanduser()
    if not folder.is_dir():
        return []
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and (entry / MANIFEST).is_file()
    )
