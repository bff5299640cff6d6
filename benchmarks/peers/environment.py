"""A virtual environment for a peer: made once, kept, and used again."""

import os
import subprocess
import sys
from pathlib import Path

from jaxrec.data.paths import data_dir
from jaxrec.errors import UserError

_LOG = "pip.log"
_READY = "installed.txt"


def default_folder(name: str) -> Path:
    """Beside the prepared data sets, in the cache."""
    return data_dir().parent / "peers" / name


def prepare_environment(folder: Path, installs: list[list[str]]) -> Path:
    """Makes the environment if it is not there yet.

    Args:
      folder: of the environment; what pip said is kept in it.
      installs: arguments of `pip install`, one list a call.

    Returns:
      The environment's interpreter.

    Raises:
      UserError: one line, where the environment cannot be made or pip fails.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = "\n".join(" ".join(install) for install in installs) + "\n"
    ready = folder / _READY
    if python.exists() and ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return python
    if not python.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is neither empty nor a virtual environment; name another")
        _call([sys.executable, "-m", "venv", str(folder)], folder, "the environment was not made")
    for install in installs:
        print(f"pip install {' '.join(install)} (into {folder})", flush=True)
        _call(
            [str(python), "-m", "pip", "install", "--no-input", *install],
            folder,
            f"pip could not install {install[0]}",
        )
    ready.write_text(wanted, encoding="utf-8")
    return python


def _call(command: list[str], folder: Path, failure: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode == 0:
        return
    log = ""
    if folder.is_dir():
        (folder / _LOG).write_text(done.stdout, encoding="utf-8")
        log = f"; all it said is in {folder / _LOG}"
    raise UserError(f"{failure}: {_reason(done.stdout)}{log}")


def _reason(output: str) -> str:
    """The first line that pip marks as an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or ["no reason given"])[0]
