"""Python files of the user's: configs, and modules that register components."""

import runpy
from pathlib import Path
from typing import Any

from jaxrec.errors import UserError


def run_python_file(path: Path, *, what: str, doing: str) -> dict[str, Any]:
    """Runs a file; the names that it defines.

    Args:
      path: the file.
      what: it is, for messages: "config".
      doing: what it is there for, for messages: "defining `config`".

    Raises:
      UserError: no such file, not Python, an error in it (with its line), or it ends Python.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such {what} file")
    if path.suffix != ".py":
        raise UserError(f"{path}: a {what} is a Python file {doing}, got {path.name}")
    try:
        return runpy.run_path(str(path))
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}, line {error.lineno}: {error.msg}") from None
    except SystemExit as stop:
        line = _line_in(path, stop)
        raise UserError(f"{path}, line {line}: ends Python instead of {doing}") from None
    except Exception as error:
        line = _line_in(path, error)
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error


def _line_in(path: Path, error: BaseException) -> int | str:
    traceback, line = error.__traceback__, "?"
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = str(traceback.tb_lineno)
        traceback = traceback.tb_next
    return line
