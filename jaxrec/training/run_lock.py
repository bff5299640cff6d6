"""One process a run folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxrec.errors import UserError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder for this training; the system lets go of it however the process ends.

    Where the system or the file system has no such locks, nobody is kept out.

    Args:
      folder: made if it is not there.

    Raises:
      UserError: another training holds the folder; it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training into it; wait for it, or choose another "
                "--out"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
