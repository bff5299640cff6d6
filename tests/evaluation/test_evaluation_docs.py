"""The examples of the docstrings, the public names, and what importing them costs."""

import doctest
import importlib
import subprocess
import sys

import pytest

import jaxrec.evaluation

MODULES = [
    "baselines",
    "bootstrap",
    "ctr_metrics",
    "metrics",
    "ranked_lists",
    "ranked_writer",
    "report",
    "results",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"jaxrec.evaluation.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("name", jaxrec.evaluation.__all__)
def test_public_names_have_an_example(name):
    thing = getattr(jaxrec.evaluation, name)
    assert thing.__doc__
    if callable(thing) and not isinstance(thing, type):
        assert ">>>" in thing.__doc__


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'ndgc'"):
        jaxrec.evaluation.ndgc  # noqa: B018


def test_import_is_light():
    code = (
        "import sys, jaxrec.evaluation.report, jaxrec.evaluation.ranked_lists\n"
        "heavy = {'flax', 'optax', 'orbax', 'grain', 'tensorflow_datasets', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
