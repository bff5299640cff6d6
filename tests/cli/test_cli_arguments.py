"""Errors of the argument parser as one line, whatever frame it draws."""

import io
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from jaxrec.cli.arguments import parse
from jaxrec.errors import UserError


@dataclass(frozen=True)
class Options:
    """What it does."""

    out: str
    """Where to."""
    epochs: int = 3
    """How long."""
    position: Literal["first", "last"] = "first"


@pytest.fixture(params=["utf-8", "ascii"])
def _encoding(request, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=request.param)
    monkeypatch.setattr(sys, "stdout", stream)


@pytest.mark.usefixtures("_encoding")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "Missing from jaxrec x: --out STR Where to. (required)"),
        (["--out"], "Missing value for argument '--out'. Expected 1 values."),
        (
            ["--out", "a", "--epoch", "4"],
            "Unrecognized options: --epoch, 4; perhaps you meant --epochs",
        ),
        (
            ["--out", "a", "--epochs", "many"],
            "Error parsing --epochs: invalid literal for int() with base 10: 'many'",
        ),
        (
            ["--out", "a", "--position", "middle"],
            "invalid choice 'middle' for argument '--position'. Expected one of ('first', 'last').",
        ),
        (["--out", "a", "b"], "Unrecognized options: b"),
    ],
)
def test_one_line(words, line):
    with pytest.raises(UserError) as caught:
        parse(Options, words, program="jaxrec x")
    assert str(caught.value) == f"{line} (see jaxrec x --help)"


def test_values():
    assert parse(Options, ["--out", "a"], program="jaxrec x") == Options("a")
    default = Options("b", 5, "last")
    assert parse(Options, ["--epochs", "7"], program="jaxrec x", default=default) == Options(
        "b", 7, "last"
    )


def test_what_is_not_its_own_is_handed_back():
    words = ["--out", "a", "--more.of", "3", "--epochs", "1"]
    value, rest = parse(Options, words, program="jaxrec x", allow_unknown=True)
    assert value == Options("a", 1)
    assert rest == ["--more.of", "3"]


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], program="jaxrec x")
    assert not stop.value.code
    assert "Where to." in capsys.readouterr().out
