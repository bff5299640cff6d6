"""metrics.jsonl: appended line by line, cut back where a run is taken up."""

import json

import pytest

from jaxrec.errors import UserError
from jaxrec.training.curves import Curves


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Curves(path, keep=0) as curves:
        curves.write({"step": 1, "loss": 0.5})
        assert lines(path) == [{"step": 1, "loss": 0.5}]
        curves.write({"step": 2, "loss": 0.25})
        assert curves.lines == 2
    assert [line["step"] for line in lines(path)] == [1, 2]


@pytest.mark.parametrize("rest", ["", '{"step": 3}\n{"st', '{"step": 3}\n'])
def test_what_a_resumed_run_writes_again_is_cut_off(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + rest)
    with Curves(path, keep=2) as curves:
        assert curves.lines == 2
        curves.write({"step": 30})
        assert curves.lines == 3
    assert [line["step"] for line in lines(path)] == [1, 2, 30]


def test_nothing_is_kept_of_a_run_without_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with Curves(path, keep=0):
        pass
    assert path.read_text() == ""


@pytest.mark.parametrize("text", [None, "", '{"step": 1}\n', '{"step": 1}\n{"step": 2}'])
def test_lines_that_were_lost_are_counted_and_gone_without(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    whole = (text or "").count("\n")
    with Curves(path, keep=2) as curves:
        assert (curves.lost, curves.lines) == (2 - whole, whole)
        curves.write({"step": 3})
        curves.sync()
    assert path.read_text() == '{"step": 1}\n' * whole + '{"step": 3}\n'


def test_numbers_that_json_does_not_have_are_never_written(tmp_path):
    with Curves(tmp_path / "metrics.jsonl", keep=0) as curves:
        with pytest.raises(ValueError):
            curves.write({"step": 1, "loss": float("nan")})
        assert curves.lines == 0


def test_tensorboard_gets_every_number_by_step(tmp_path, monkeypatch):
    tensorboardX = pytest.importorskip("tensorboardX")
    got = []

    class Writer:
        def __init__(self, folder, purge_step):
            got.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            got.append((name, value, step))

        def close(self):
            got.append("closed")

    monkeypatch.setattr(tensorboardX, "SummaryWriter", Writer)
    with Curves(tmp_path / "m.jsonl", keep=0, tensorboard=tmp_path / "tb", first_step=7) as curves:
        curves.write({"step": 8, "loss": 0.5, "validation": {"hr@10": 0.25, "text": "x"}})
    assert got == [
        (str(tmp_path / "tb"), 7),
        ("loss", 0.5, 8),
        ("validation/hr@10", 0.25, 8),
        "closed",
    ]


def test_tensorboard_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'jaxrec\[tensorboard\]'"):
        Curves(tmp_path / "m.jsonl", keep=0, tensorboard=tmp_path / "tb")
