"""The list of public data sets."""

import subprocess
import sys

import pytest

from jaxrec.data.tfds import available, find
from jaxrec.data.tfds.catalogue import at
from jaxrec.errors import UserError


def test_all_promised_sets_are_there_with_terms_and_address() -> None:
    entries = {entry.name: entry for entry in available()}
    assert {f"movielens-{size}" for size in ("100k", "1m", "20m", "25m")} <= set(entries)
    assert len([name for name in entries if name.startswith("amazon-2014-")]) == 24
    for entry in entries.values():
        assert "\n" not in entry.licence
        assert entry.licence
        assert entry.url.startswith("https://")
        assert entry.events > 10_000
        assert entry.citation


@pytest.mark.parametrize("size", ["100k", "1m", "20m", "25m"])
def test_movielens_is_known_to_the_byte(size: str) -> None:
    entry = find(f"movielens-{size}")
    assert entry.url == f"https://files.grouplens.org/datasets/movielens/ml-{size}.zip"
    assert len(entry.ratings.sha256 or "") == 64
    assert (entry.size or 0) > 4_000_000


def test_hashes_are_those_that_tfds_registers() -> None:
    from tensorflow_datasets.core.download import checksums

    known = checksums.get_all_url_infos()
    for size in ("100k", "1m", "20m", "25m"):
        entry = find(f"movielens-{size}")
        assert known[entry.url].checksum == entry.ratings.sha256
        assert known[entry.url].size == entry.ratings.size


def test_amazon_sizes_are_not_invented() -> None:
    entry = find("amazon-2014-beauty")
    assert entry.size is None
    assert entry.ratings.sha256 is None
    assert entry.url.endswith("/reviews_Beauty_5.json.gz")
    assert entry.archives()["metadata"].filename == "meta_Beauty.json.gz"
    assert set(entry.archives(titles=False)) == {"ratings"}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("movielens-1m", "movielens-1m"),
        ("tfds:movielens-1m", "movielens-1m"),
        ("MovieLens_1M", "movielens-1m"),
        ("ml-20m", "movielens-20m"),
        ("amazon-2014-toys", "amazon-2014-toys-and-games"),
        ("amazon-2014-sports", "amazon-2014-sports-and-outdoors"),
    ],
)
def test_names_are_found_as_people_write_them(given: str, name: str) -> None:
    assert find(given).name == name


def test_unknown_name_gets_a_hint() -> None:
    with pytest.raises(UserError, match=r"'amazon-2014-beuty'.*did you mean 'amazon-2014-beauty'"):
        find("amazon-2014-beuty")
    with pytest.raises(UserError, match="jaxrec data list"):
        find("netflix")


def test_a_mirror_keeps_the_file_names() -> None:
    entry = at(find("movielens-1m"), "https://mirror.example/ml/")
    assert entry.url == "https://mirror.example/ml/ml-1m.zip"
    with pytest.raises(UserError, match="mirror"):
        at(find("movielens-1m"), "ftp://mirror.example")


def test_notice_states_terms_and_citation() -> None:
    entry = find("movielens-1m")
    assert entry.licence in entry.notice
    assert "Harper" in entry.notice
    assert "redistribution" in entry.notice


def test_importing_and_listing_imports_neither_tfds_nor_tensorflow() -> None:
    code = (
        "import sys, jaxrec.data.tfds as t; t.available(); t.find('movielens-1m')\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in"
        " ('tensorflow_datasets', 'tensorflow', 'grain', 'flax', 'orbax', 'requests')]\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
