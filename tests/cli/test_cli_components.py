"""`jaxrec --import`: the user's own components in any command."""

import json
from pathlib import Path

import pytest
from small_sets import copy_of, data_dir, trained_run

from jaxrec import registry
from jaxrec.cli.main import main
from jaxrec.training.run_folder import RunFolder

OWN = """
from jaxrec.registry import register

register("activation", "bent", lambda x: x * (x > 0.5))
"""


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXREC_DATA_DIR", str(data_dir()))
    monkeypatch.chdir(tmp_path)
    # What one test registers is not there for the next.
    own = {kind: dict(table) for kind, table in registry._COMPONENTS.items()}
    monkeypatch.setattr(registry, "_COMPONENTS", own)


@pytest.fixture
def bent_run(tmp_path):
    """A run whose config names an activation that is not jaxrec's."""
    folder = RunFolder(copy_of(trained_run(), tmp_path / "bent"))
    config = json.loads(folder.config.read_text())
    config["experiment"]["model"]["activation"] = "bent"
    folder.config.write_text(json.dumps(config))
    return folder.path


def similar(run):
    return ["similar", str(run), "--item", "i04", "-k", "3", "--json"]


def test_a_run_that_names_them_is_refused_without(capsys, bent_run):
    assert main(similar(bent_run)) == 2
    assert "unknown model.activation 'bent'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["parts/own_parts.py", "parts.own_parts"])
def test_a_file_or_a_module_is_imported_first(capsys, bent_run, name):
    Path("parts").mkdir()
    Path("parts/own_parts.py").write_text(OWN)
    assert main(["--import", name, *similar(bent_run)]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) > 0


def test_several_are_imported_in_their_order(capsys):
    Path("one.py").write_text("print('one')\n")
    Path("two.py").write_text("print('two')\n")
    assert main(["--import", "one.py", "--import", "two.py", "--version"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["one", "two", "jaxrec"]


WRONG = {
    "no name": (["--import"], "give a module or a Python file"),
    "no such file": (["--import", "absent.py", "--version"], "absent.py: no such component file"),
    "no such module": (["--import", "absent_parts", "--version"], "no module 'absent_parts'"),
    "a file that fails": (["--import", "bad.py", "--version"], "bad.py, line 2: ZeroDivisionError"),
    "a module that fails": (["--import", "bad", "--version"], "ZeroDivisionError"),
    "an unknown kind": (["--import", "kind.py", "--version"], "unknown kind of component 'modle'"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_one_line(capsys, words, message):
    Path("bad.py").write_text("x = 0\n1 / x\n")
    Path("kind.py").write_text(OWN.replace("activation", "modle"))
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
