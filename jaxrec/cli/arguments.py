"""Arguments by tyro, with its errors brought down to the one line that a user needs."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import tyro

from jaxrec.errors import UserError

_FRAME = " │╭╮╰╯"
_RULE = re.compile(r"[─-]+")
_SUGGESTION = re.compile(r"(?:Perhaps you meant|similar to)[^\n]*:[^\n]*\n[^-\n]*(--[\w.-]+)")


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
    """The first part of a framed message: what stands below its title, up to the next rule.

    Frames are drawn with box characters where the output takes them, with hyphens elsewhere.
    """
    lines = [line.strip(_FRAME) for line in text.splitlines()]
    lines = [line if _RULE.fullmatch(line) else line.strip("─ ") for line in lines if line]
    title, rest = (lines[0], lines[1:]) if lines else ("the arguments do not fit", [])
    if rest and _RULE.fullmatch(rest[0]):
        rest = rest[1:]
    body = list(takewhile(lambda line: not _RULE.fullmatch(line), rest))
    suggestion = _SUGGESTION.search(text)
    message = " ".join(body) or title
    return message + (f"; perhaps you meant {suggestion.group(1)}" if suggestion else "")
