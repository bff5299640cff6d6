"""From an archive at hand to the prepared form, through TFDS and without TensorFlow."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shared_data import shared_data
from tfds_archives import (
    MOVIES,
    PRODUCTS,
    RATINGS,
    REVIEWS,
    everything_below,
    many_ratings,
    products_bytes,
    ratings_text,
    reviews_bytes,
    write_movielens,
)

from jaxrec.data.prepared import open_prepared
from jaxrec.data.tabular import import_table
from jaxrec.data.tfds import builder, prepare
from jaxrec.data.tfds.prepare import number, read_split
from jaxrec.errors import UserError

SIZES = ["100k", "1m", "20m", "25m"]


def _quiet(_: str) -> None:
    pass


def _expected_histories(ratings: list[tuple[int, int, float, int]]) -> dict[int, list[int]]:
    """By user: items by time, then by place in the file; Python's sort is stable."""
    histories: dict[int, list[int]] = {}
    for user, item, _, _ in sorted(ratings, key=lambda rating: (rating[0], rating[3])):
        histories.setdefault(user, []).append(item)
    return histories


@pytest.mark.parametrize("config", SIZES)
def test_movielens_from_an_archive_at_hand(tmp_path: Path, config: str) -> None:
    archive = write_movielens(tmp_path / f"ml-{config}.zip", config)
    told: list[str] = []
    made = prepare(
        f"movielens-{config}", archive=archive, data_dir=tmp_path / "data", notice=told.append
    )
    assert (made.num_users, made.num_items, made.num_events) == (3, 4, len(RATINGS))
    assert made.user_ids.tolist() == [1, 2, 7]
    assert made.item_ids.tolist() == [1, 50, 661, 1193]
    histories = {int(made.user_ids[u]): made.item_ids[made.history(u)].tolist() for u in range(3)}
    assert histories == _expected_histories(RATINGS)
    assert histories[1] == [50, 661, 1193, 1]  # three in one second, as the file has them
    assert made.timestamps is not None
    assert made.timestamps[:4].tolist() == [978300700] + [978300760] * 3
    assert made.ratings is not None
    assert made.ratings[:4].tolist() == [2, 3, 5, 4]
    titles = {item: title for item, title, _ in MOVIES}
    assert made.item_titles == [titles[int(item)] for item in made.item_ids]
    assert made.item_text(made.item_index(661)) == "Misérables, Les (1995)"
    assert made.item_table["genres"].to_pylist()[2] == "Drama|Musical"
    assert any("SHA-256 differs" in line for line in told)
    assert any(f"read {len(RATINGS)} ratings" in line for line in told)
    assert open_prepared(made.path, verify=True).hash == made.hash
    assert not [name for name in everything_below(tmp_path / "data") if "/." in f"/{name}"]


def test_manifest_says_where_it_came_from(tmp_path: Path) -> None:
    archive = write_movielens(tmp_path / "mine.zip", "1m")
    made = prepare("ml-1m", "films", archive=archive, data_dir=tmp_path / "data", notice=_quiet)
    assert made.name == "films"
    source = made.manifest["source"]
    assert source["dataset"] == "movielens-1m"
    assert "redistribution" in source["licence"]
    (file,) = source["files"]
    assert file["name"] == "mine.zip"
    assert file["bytes"] == archive.stat().st_size
    assert len(file["sha256"]) == 64
    assert file["as_published"] is False
    assert "url" not in file
    assert "publisher's file" in made.manifest["tie_order"]


def test_ties_keep_the_files_order_over_many_records(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    ratings = many_ratings(150_000, rng)  # three records of 65,536
    archive = write_movielens(tmp_path / "a.zip", "1m", ratings=ratings_text("1m", ratings))
    made = prepare("movielens-1m", archive=archive, data_dir=tmp_path / "data", notice=_quiet)
    assert made.num_events == 150_000
    expected = _expected_histories(ratings)
    for index, user in enumerate(made.user_ids.tolist()):
        assert made.item_ids[made.history(index)].tolist() == expected[user]


def test_amazon_with_metadata(tmp_path: Path) -> None:
    reviews, meta = tmp_path / "reviews_Beauty_5.json.gz", tmp_path / "meta_Beauty.json.gz"
    reviews.write_bytes(reviews_bytes())
    meta.write_bytes(products_bytes())
    made = prepare(
        "amazon-2014-beauty",
        archive=reviews,
        metadata_archive=meta,
        data_dir=tmp_path / "data",
        notice=_quiet,
    )
    assert made.user_ids.tolist() == ["A1YJEY40YUW4SE", "A2SUAM1J3GNN3B"]
    assert made.item_ids.tolist() == ["7806397051", "B0009P4PZC", "B000FTYALG"]
    assert [made.item_ids[made.history(u)].tolist() for u in (0, 1)] == [
        ["7806397051", "B000FTYALG"],
        ["B000FTYALG", "7806397051", "B0009P4PZC"],
    ]
    assert made.item_titles == [
        "WAWO 15 Color Professionl Makeup Eyeshadow & Blush",
        None,
        "Rinse and Shine",
    ]
    assert made.item_table["brand"].to_pylist() == [None, None, "Acme"]
    assert made.ratings is not None
    assert made.ratings.tolist() == [3, 1, 5, 2, 4]
    assert [file["holds"] for file in made.manifest["source"]["files"]] == ["ratings", "metadata"]


def test_amazon_without_metadata_has_no_titles_and_says_so(tmp_path: Path) -> None:
    reviews = tmp_path / "reviews_Toys_and_Games_5.json.gz"
    reviews.write_bytes(reviews_bytes())
    told: list[str] = []
    made = prepare(
        "amazon-2014-toys", archive=reviews, data_dir=tmp_path / "data", notice=told.append
    )
    assert made.name == "amazon-2014-toys-and-games"
    assert made.num_events == len(REVIEWS)
    assert made.item_titles is None
    assert any("meta_Toys_and_Games.json.gz" in line for line in told)


def test_nothing_is_printed_on_standard_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive = write_movielens(tmp_path / "a.zip", "1m")
    prepare("movielens-1m", archive=archive, data_dir=tmp_path / "data")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "SHA-256 differs" in captured.err
    assert "it/s" not in captured.err


def test_tfdss_bucket_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorflow_datasets.core.utils import gcs_utils

    def asked(*_: object) -> None:
        raise AssertionError("the network was asked, and the archive is at hand")

    for function in ("gcs_dataset_info_files", "is_dataset_on_gcs", "exists"):
        monkeypatch.setattr(gcs_utils, function, asked)
    archive = write_movielens(tmp_path / "a.zip", "1m")
    prepare("movielens-1m", archive=archive, data_dir=tmp_path / "data", notice=_quiet)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    prepare(
        "movielens-1m",
        archive=write_movielens(tmp_path / "a.zip", "1m"),
        data_dir=tmp_path / "data",
        notice=_quiet,
        progress=lambda what, share: told.append((what, share)),
    )
    assert told == [("reading ratings", 7 / 1_000_209), ("reading items", 1.0), ("writing", 0.0)]


def test_a_taken_name_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    archive = write_movielens(tmp_path / "a.zip", "1m")
    data = tmp_path / "data"
    first = prepare("movielens-1m", archive=archive, data_dir=data, notice=_quiet)
    with pytest.raises(UserError, match="--overwrite"):
        prepare("movielens-1m", archive=tmp_path / "absent.zip", data_dir=data)
    archive = write_movielens(
        tmp_path / "b.zip", "1m", ratings=ratings_text("1m", [(1, 1, 5, 7), (1, 50, 5, 8)])
    )
    second = prepare("movielens-1m", archive=archive, data_dir=data, notice=_quiet, overwrite=True)
    assert second.num_events == 2
    assert second.hash != first.hash


@pytest.mark.parametrize(
    ("dataset", "options", "said"),
    [
        ("movielens-1m", {"archive": "absent.zip"}, "no such file"),
        ("movielens-1m", {"archive": "empty.zip"}, "the file is empty"),
        ("movielens-1m", {"archive": "."}, r"ratings.dat|movies.dat"),
        ("movielens-1m", {"archive": "ml-1m.zip", "metadata_archive": "x"}, "no metadata file"),
        ("amazon-2014-beauty", {"metadata_archive": "x"}, "pass reviews_Beauty_5.json.gz as well"),
        ("amazon-2014-beauty", {"archive": "ml-1m.zip"}, "zip archive"),
        ("amazon-2014-beauty", {"archive": "."}, "a folder"),
        ("movielens-25m", {"archive": "ml-1m.zip"}, "movies.csv of ml-25m is not in it"),
        ("movielens-20m", {"archive": "ml-25m.zip"}, "this is ml-25m"),
        ("movielens-1m", {"archive": "cut.zip"}, "truncated"),
        ("movielens-1m", {"archive": "bad.zip"}, "ratings.dat line 8"),
        ("movielens-1m", {"archive": "ml-1m.zip", "name": "a/b"}, "cannot name a data set"),
        ("movielens-3m", {}, "not a public data set"),
        ("movielens-1m", {"archive": "ml-1m.zip", "min_rating": 6}, "no event is left.*rating=6"),
        ("movielens-1m", {"archive": "ml-1m.zip", "min_item_events": 9}, "min_item_events=9"),
        ("movielens-1m", {"archive": "ml-1m.zip", "min_user_events": -1}, "wanted 0 or more"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, options: dict, said: str
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    whole = write_movielens(Path("ml-1m.zip"), "1m").read_bytes()
    write_movielens(Path("ml-25m.zip"), "25m")
    write_movielens(Path("bad.zip"), "1m", ratings=ratings_text("1m") + b"1::2::3\n")
    Path("cut.zip").write_bytes(whole[:-30])
    Path("empty.zip").touch()
    before = everything_below(Path())
    with pytest.raises(UserError, match=said) as caught:
        prepare(dataset, data_dir=tmp_path / "data", notice=_quiet, **options)
    assert "\n" not in str(caught.value)
    assert everything_below(Path()) == before
    assert not (tmp_path / "data").exists() or everything_below(tmp_path / "data") == set()


def test_a_failed_replacement_keeps_the_old_set(tmp_path: Path) -> None:
    data = tmp_path / "data"
    good = write_movielens(tmp_path / "good.zip", "1m")
    bad = write_movielens(tmp_path / "bad.zip", "1m", ratings=ratings_text("1m") + b"x\n")
    first = prepare("movielens-1m", archive=good, data_dir=data, notice=_quiet)
    with pytest.raises(UserError, match="line 8"):
        prepare("movielens-1m", archive=bad, data_dir=data, notice=_quiet, overwrite=True)
    assert open_prepared(first.path, verify=True).hash == first.hash
    assert {path.name for path in data.iterdir()} == {"movielens-1m"}


def test_filters_apply_ratings_first_then_the_core(tmp_path: Path) -> None:
    archive = write_movielens(tmp_path / "a.zip", "1m")
    made = prepare(
        "movielens-1m",
        archive=archive,
        data_dir=tmp_path / "data",
        notice=_quiet,
        min_rating=4,
        min_item_events=2,
    )
    # Of rating 4 or more: films 1193 and 1, twice each.
    assert made.item_ids.tolist() == [1, 1193]
    assert made.user_ids.tolist() == [1, 2, 7]
    assert made.item_ids[made.history(0)].tolist() == [1193, 1]
    assert made.item_titles == [MOVIES[0][1], MOVIES[4][1]]
    assert made.ratings is not None
    assert made.ratings.tolist() == [5, 4, 5, 4]
    assert made.manifest["source"]["dropped"] == 3
    assert made.manifest["options"]["min_rating"] == 4


def test_the_same_ratings_as_a_table_make_the_same_set(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    ratings = many_ratings(5_000, rng)
    archive = write_movielens(tmp_path / "a.zip", "20m", ratings=ratings_text("20m", ratings))
    made = prepare("movielens-20m", archive=archive, data_dir=tmp_path / "data", notice=_quiet)
    table = tmp_path / "ratings.csv"
    table.write_bytes(ratings_text("20m", ratings))
    imported = import_table(
        table, "t", user_column="userId", item_column="movieId", data_dir=tmp_path / "data"
    )
    assert made.hash == imported.hash


def test_movielens_1m_through_tfds_equals_its_table(tmp_path: Path) -> None:
    """All of MovieLens 1M, put back into the publisher's form from its table."""
    table = shared_data("movielens-1m") / "interactions.csv.gz"
    with gzip.open(table, "rt") as stream:
        next(stream)
        text = "".join("::".join(line.split(",")) for line in stream)
    archive = write_movielens(tmp_path / "ml-1m.zip", "1m", ratings=text.encode())
    made = prepare(
        "movielens-1m",
        archive=archive,
        data_dir=tmp_path / "data",
        notice=_quiet,
        min_item_events=5,
    )
    assert (made.num_users, made.num_items, made.num_events) == (6_040, 3_416, 999_611)
    imported = import_table(table, "t", data_dir=tmp_path / "data")
    assert made.hash == imported.hash


def test_number_is_by_ascending_id() -> None:
    codes, ids = number(np.array([30, 5, 30, 0], np.int32))
    assert codes.tolist() == [2, 1, 2, 0]
    assert ids.to_pylist() == [0, 5, 30]
    codes, ids = number(np.array([b"b", b"a10", b"b", b"a9"], object))
    assert codes.tolist() == [2, 0, 2, 1]
    assert ids.to_pylist() == ["a10", "a9", "b"]
    assert codes.dtype == np.int32


def test_rows_go_where_row_says_and_lost_ones_are_noticed() -> None:
    chunks = [
        {"row": np.array([3, 1], np.int64), "item": np.array([13, 11], np.int32)},
        {"row": np.array([0, 2], np.int64), "item": np.array([10, 12], np.int32)},
    ]
    total = read_split(chunks, ("item",), chunk_rows=2)
    assert total["item"].tolist() == [10, 11, 12, 13]
    chunks[1]["row"] = np.array([0, 1], np.int64)
    with pytest.raises(UserError, match="1 of 4 rows"):
        read_split(chunks, ("item",), chunk_rows=2)


def test_the_builder_itself_is_a_tfds_builder(tmp_path: Path) -> None:
    archive = write_movielens(tmp_path / "ml-1m.zip", "1m")
    made = builder("movielens-1m", archives={"ratings": archive}, data_dir=tmp_path / "tfds")
    assert made.info.full_name == "jaxrec_movielens/1m/1.0.0"
    assert made.info.disable_shuffling
    made.download_and_prepare(
        download_dir=tmp_path / "tfds" / "downloads", file_format="array_record"
    )
    sources = made.as_data_source()
    (record,) = list(sources["ratings"])
    assert record["row"].tolist() == list(range(7))
    assert record["row"].dtype == np.int64
    assert record["item"].tolist() == [item for _, item, _, _ in RATINGS]
    assert sources["items"][0]["title"].tolist() == [title.encode() for _, title, _ in MOVIES]


def test_tfds_finds_the_registered_builders(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    import jaxrec.data.tfds.builders  # noqa: F401

    assert tfds.builder("jaxrec_movielens/25m", data_dir=tmp_path).name == "jaxrec_movielens"
    found = tfds.builder("jaxrec_amazon2014/beauty_reviews", data_dir=tmp_path)
    assert found.entry.name == "amazon-2014-beauty"
    assert len(found.builder_configs) == 48


def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    archive = write_movielens(tmp_path / "ml-1m.zip", "1m")
    code = (
        "import sys\n"
        "from jaxrec.data.tfds import prepare\n"
        f"prepare('movielens-1m', archive={str(archive)!r}, data_dir={str(tmp_path / 'data')!r})\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "bad = [m for m in sys.modules if m.split('.')[0] == 'tensorflow']\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, timeout=120
    )
    assert (tmp_path / "data" / "movielens-1m" / "manifest.json").is_file()


def test_products_listed_but_never_reviewed_are_left_out(tmp_path: Path) -> None:
    reviews, meta = tmp_path / "r.json.gz", tmp_path / "m.json.gz"
    reviews.write_bytes(reviews_bytes())
    meta.write_bytes(products_bytes([*PRODUCTS, {"asin": "B0009P4PZC", "title": "Third"}]))
    made = prepare(
        "amazon-2014-beauty",
        archive=reviews,
        metadata_archive=meta,
        data_dir=tmp_path / "data",
        notice=_quiet,
    )
    assert made.num_items == 3
    assert made.item_titles is not None
    assert made.item_titles[1] == "Third"
    assert "never reviewed" not in made.item_titles
