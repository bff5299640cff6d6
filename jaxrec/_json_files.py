"""JSON objects on disk."""

import json
from pathlib import Path
from typing import Any

from jaxrec._files import replacing
from jaxrec.errors import UserError


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file whole or not at all."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON object.

    Raises:
      UserError: no such file, or what is in it is not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); the file is damaged") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: wanted a JSON object, got {type(values).__name__}")
    return values
