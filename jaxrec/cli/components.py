"""The user's own components for a command: `jaxrec --import MODULE ...`.

A run names its components and stores none of their code, so whoever opens it says where they are.
"""

import sys
from importlib import import_module
from pathlib import Path

from jaxrec._python_files import run_python_file
from jaxrec.errors import UserError


def import_components(name: str) -> None:
    """Imports a module, or runs a Python file, that calls `jaxrec.registry.register`.

    Args:
      name: a module's dotted name, looked for in the working folder too, or the path of a `.py`
        file.

    Raises:
      UserError: there is none, or it fails.
    """
    if name.endswith(".py"):
        run_python_file(Path(name), what="component", doing="registering components")
        return
    # A console script, unlike `python -m`, does not look in the working folder.
    sys.path.insert(0, str(Path.cwd()))
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"--import {name}: no module {error.name!r}") from None
    except Exception as error:
        raise UserError(f"--import {name}: {type(error).__name__}: {error}") from error
    finally:
        del sys.path[0]
