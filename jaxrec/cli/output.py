"""What commands print."""

import json
import sys
from typing import Any

from rich.console import Console


def console() -> Console:
    """Standard output, for tables."""
    return Console(highlight=False)


def print_json(values: Any) -> None:
    """One JSON object on one line, the last that a command with --json prints."""
    print(json.dumps(values, ensure_ascii=False, allow_nan=False), flush=True)


def tell(text: str) -> None:
    """A line for the person, on standard error, so that --json stays clean."""
    print(text, file=sys.stderr, flush=True)
