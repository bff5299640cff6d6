"""What the documents show, runs: doctests, code blocks, the notebook, RESULTS.md."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import jaxrec

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


def test_commands_of_the_documents_exist() -> None:
    from jaxrec.cli.main import COMMANDS

    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for words in re.findall(r"^\$ jaxrec (\S+ ?\S*)", text, flags=re.MULTILINE):
            assert words in COMMANDS or words.split()[0] in COMMANDS, words


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
