"""Memory in huge pages for a command that computes on a CPU.

A compiled step asks for its working memory, tens to hundreds of megabytes, and gives it back. The C
library takes it anew from the system each time, and every page of 4 KiB is then zeroed on first
use: 47,000 of them a step of SASRec on MovieLens-1M, some 15 % of its time. In pages of 2 MiB it is
600. glibc reads this setting only as a process starts, so the process starts once more.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

_SETTING = "GLIBC_TUNABLES"
_HUGE = "glibc.malloc.hugetlb=1"
# Whether Linux gives huge pages to nobody, to who asks, or to everybody.
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Older ones do not know the setting.
_GLIBC = (2, 35)


def environment_for_huge_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment in which malloc asks for huge pages, or None to leave things as they are.

    That is where another C library runs, where the system gives them to nobody or to everybody
    anyway, and where GLIBC_TUNABLES is set already, to an empty word for instance.
    """
    if _SETTING in environment or not sys.platform.startswith("linux") or not _new_enough():
        return None
    try:
        on_request = "[madvise]" in _SWITCH.read_text(encoding="ascii")
    except (OSError, UnicodeError):
        return None
    return {**environment, _SETTING: _HUGE} if on_request else None


def restart_with_huge_pages() -> None:
    """Starts this process once more, as it was started, where that gives it huge pages.

    For the first lines of a program: nothing that was done before survives.
    """
    environment = environment_for_huge_pages(os.environ)
    if environment is None or not sys.executable:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        # It runs as well without.
        return


def _new_enough() -> bool:
    name, version = platform.libc_ver()
    numbers = [int(part) for part in version.split(".") if part.isdigit()]
    return name == "glibc" and tuple(numbers[:2]) >= _GLIBC
