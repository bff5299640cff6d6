"""What the documents show, runs: doctests, code blocks, the notebook, RESULTS.md."""

import dataclasses
import doctest
import functools
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import jaxrec
from jaxrec.cli.main import COMMANDS, main, split_imports

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(jaxrec.__path__, "jaxrec.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXREC_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_blocks(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a document, in order, as one program."""
    monkeypatch.setenv("JAXREC_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    exec(compile("\n".join(blocks), document, "exec"), {"__name__": "document"})


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


def _commands(document: str) -> list[list[str]]:
    """The words of each command line that a document shows."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:\w+)?\$ (.*)", text, flags=re.MULTILINE)
    return [shlex.split(line.split(" # ")[0]) for line in lines]


def _options(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("-")]


@functools.cache
def _help_of(command: str) -> str:
    """What a command of `jaxrec` prints with `--help`; of `train`, with a config."""
    config = ["experiments/sasrec.py"] if command == "train" else []
    with redirect_stdout(StringIO()) as out, suppress(SystemExit):
        main([*command.split(), *config, "--help"])
    return out.getvalue()


def _fields(module: str) -> set[str]:
    """The options of a program that is run as `python -m module`."""
    fields = dataclasses.fields(importlib.import_module(module).Arguments)
    return {"--" + field.name.replace("_", "-") for field in fields}


def _has(text: str, option: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(option)}(?![\w.-])", text) is not None


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)


def _is_own_program(words: list[str]) -> bool:
    return words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks.", "experiments."))


@pytest.mark.usefixtures("wide_terminal")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_the_documents_exist(document: str) -> None:
    for words in _commands(document):
        if words[0] == "jaxrec":
            _, words = split_imports(words[1:])
            command = next(c for c in (" ".join(words[:2]), words[0]) if c in COMMANDS)
            for option in {*_options(words)} - {"--help"}:
                assert _has(_help_of(command), option), f"{command} {option}"
        elif _is_own_program(words):
            assert set(_options(words)) - {"-m"} <= _fields(words[2]), words


@pytest.mark.usefixtures("wide_terminal")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_in_the_text_of_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    shown = [words for each in DOCUMENTS for words in _commands(each)]
    programs = {words[2] for words in shown if _is_own_program(words)}
    known = "".join(map(_help_of, COMMANDS)) + " ".join({"--import"}.union(*map(_fields, programs)))
    for option in re.findall(r"`(?:[^`\n]* )?(--[\w.-]+)", text):
        assert _has(known, option), option


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXREC_DATA_DIR", str(tmp_path))
    # The notebook's own process: not the eight virtual devices of the tests.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(ROOT / "experiments" / "colab_quickstart.ipynb", as_version=4)
    # As long as it takes to see that everything works.
    (training,) = (cell for cell in notebook.cells if "EPOCHS = 10" in cell.source)
    training.source = training.source.replace("EPOCHS = 10", "EPOCHS = 2")
    NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    # Printed text, and what the tables show in a notebook.
    output = "\n".join(
        o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs
    )
    assert "hr@10" in output
    assert "part" in output


def test_results_page_is_what_the_files_give() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
