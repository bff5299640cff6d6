"""Where contributors keep real data sets; tests that need one skip without it."""

import os
from pathlib import Path

import pytest

_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """Folder of a real data set, or skips the test that asks."""
    folder = Path(os.environ.get("JAXREC_SHARED_DATA", _DEFAULT)) / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not at hand ({folder})")
    return folder
