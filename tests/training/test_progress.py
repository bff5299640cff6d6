"""What is told while training: a bar on a terminal, lines elsewhere, nothing if asked."""

import io

import pytest
from rich.console import Console

from jaxrec.training import progress


def tell(reporter):
    reporter.line("first [line] of 10")
    reporter.epoch(1, 3, 4, 1)
    for _ in range(3):
        reporter.step()
    reporter.note("loss 0.5000")
    reporter.epoch(2, 3, 4, 0)
    reporter.note("loss 0.2500")


def test_lines_where_there_is_no_terminal(capsys):
    with progress.reporter(None) as reporter:
        tell(reporter)
    captured = capsys.readouterr()
    assert captured.err == "first [line] of 10\n"
    assert captured.out == ""


def test_silence_if_asked(capsys):
    with progress.reporter(False) as reporter:
        tell(reporter)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


@pytest.mark.parametrize("show", [None, True])
def test_a_bar_on_a_terminal(monkeypatch, show):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda stderr: terminal)
    with progress.reporter(show) as reporter:
        tell(reporter)
        assert [task.completed for task in reporter._progress.tasks] == [0]
    text = out.getvalue()
    assert "first [line] of 10" in text
    assert "epoch 2/3" in text
    assert "loss 0.2500" in text
