"""Arguments by tyro, with its errors brought down to the one line that a user needs."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from jaxrec.errors import UserError

_FRAME = re.compile(r"[│╭╮╰╯─]")


def parse(
    what: Callable[..., Any],
    arguments: Sequence[str],
    *,
    program: str,
    default: Any = None,
    allow_unknown: bool = False,
) -> Any:
    """What `tyro.cli` makes of the arguments.

    Args:
      what: a dataclass.
      arguments: the words after the command.
      program: the command, for the help text.
      default: an instance whose values stand where no argument is given.
      allow_unknown: return (value, arguments that are not its own) instead of an error.

    Raises:
      UserError: arguments that do not fit, in one line.
      SystemExit: with code 0, after `--help`.
    """
    captured = io.StringIO()
    options: dict[str, Any] = {"args": list(arguments), "prog": program}
    if default is not None:
        options["default"] = default
    if allow_unknown:
        options["return_unknown_args"] = True
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(what, **options)
    except SystemExit as stop:
        text = captured.getvalue()
        if not stop.code:
            sys.stderr.write(text)
            raise
        raise UserError(f"{_one_line(text)} (see {program} --help)") from None


def _one_line(text: str) -> str:
    """The sentences of a framed message up to its first rule, without the frame."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    body = []
    for line in lines[1:] if lines and lines[0].startswith("╭") else lines:
        content = _FRAME.sub("", line).strip()
        if not content:
            break
        body.append(content)
    suggestion = re.search(r"(?:Perhaps you meant|Similar)[^\n]*\n[^-\n]*(--[\w.-]+)", text)
    message = " ".join(body) or "the arguments do not fit"
    return message + (f"; perhaps you meant {suggestion.group(1)}" if suggestion else "")
