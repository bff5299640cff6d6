"""The publishers' formats: exact values, the file's order, and what is said of bad files."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tfds_archives import (
    MOVIES,
    PRODUCTS,
    RATINGS,
    REVIEWS,
    many_ratings,
    members,
    movies_text,
    products_bytes,
    ratings_text,
    review,
    reviews_bytes,
    write_movielens,
)

from jaxrec.data.tfds import amazon, movielens
from jaxrec.data.tfds.archives import DamagedArchive, MovieLensArchive
from jaxrec.data.tfds.columns import Columns, rechunk
from jaxrec.errors import UserError

SIZES = ["100k", "1m", "20m", "25m"]


def _joined(batches: Any) -> Columns:
    parts = list(batches)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _archive(path: Path, config: str) -> MovieLensArchive:
    return MovieLensArchive(path, f"ml-{config}")


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    size=st.integers(1, 7),
)
@settings(deadline=None)
def test_rechunk_keeps_order_and_counts_rows(lengths: list[int], size: int) -> None:
    total = sum(lengths)
    cuts = np.split(np.arange(total), np.cumsum(lengths)[:-1])
    chunks = list(rechunk(({"a": cut, "b": cut * 2} for cut in cuts), size))
    assert [len(chunk["row"]) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert all(0 < len(chunk["row"]) <= size for chunk in chunks)
    if total:
        whole = _joined(chunks)
        np.testing.assert_array_equal(whole["row"], np.arange(total))
        np.testing.assert_array_equal(whole["a"], np.arange(total))
        np.testing.assert_array_equal(whole["b"], 2 * np.arange(total))
        assert whole["row"].dtype == np.int64
    else:
        assert not chunks


@pytest.mark.parametrize("config", SIZES)
def test_movielens_ratings_are_read_as_published(tmp_path: Path, config: str) -> None:
    archive = _archive(write_movielens(tmp_path / "a.zip", config), config)
    columns = _joined(movielens.read_ratings(archive, config))
    assert list(zip(*(columns[n].tolist() for n in columns), strict=True)) == RATINGS
    assert {name: column.dtype for name, column in columns.items()} == {
        "user": np.int32,
        "item": np.int32,
        "rating": np.float32,
        "timestamp": np.int64,
    }


def test_half_stars_survive(tmp_path: Path) -> None:
    path = write_movielens(
        tmp_path / "a.zip", "25m", ratings=ratings_text("25m", [(1, 296, 0.5, 1147880044)])
    )
    columns = _joined(movielens.read_ratings(_archive(path, "25m"), "25m"))
    assert columns["rating"].tolist() == [0.5]


def test_several_blocks_keep_the_order(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movielens, "_BLOCK", 1 << 14)
    ratings = many_ratings(5_000, rng)
    path = write_movielens(tmp_path / "a.zip", "1m", ratings=ratings_text("1m", ratings))
    batches = list(movielens.read_ratings(_archive(path, "1m"), "1m"))
    assert len(batches) > 3
    assert _joined(batches)["item"].tolist() == [item for _, item, _, _ in ratings]


@pytest.mark.parametrize("config", SIZES)
def test_movielens_films_are_read_as_published(tmp_path: Path, config: str) -> None:
    archive = _archive(write_movielens(tmp_path / "a.zip", config), config)
    columns = movielens.read_movies(archive, config)
    assert list(zip(*(columns[n].tolist() for n in columns), strict=True)) == MOVIES


def test_an_extracted_folder_serves_as_well(tmp_path: Path) -> None:
    for folder in (tmp_path / "flat", tmp_path / "deep" / "ml-1m"):
        folder.mkdir(parents=True)
        (folder / "ratings.dat").write_bytes(ratings_text("1m"))
    for given_path in (tmp_path / "flat", tmp_path / "deep"):
        columns = _joined(movielens.read_ratings(_archive(given_path, "1m"), "1m"))
        assert columns["item"].tolist() == [item for _, item, _, _ in RATINGS]


def test_a_zip_without_the_publishers_folder_serves_and_macos_litter_does_not_matter(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/ml-1m/ratings.dat", b"\0\5\x16\7")
        archive.writestr("ratings.dat", ratings_text("1m"))
    columns = _joined(movielens.read_ratings(_archive(path, "1m"), "1m"))
    assert columns["user"].tolist() == [user for user, _, _, _ in RATINGS]


def _bad_zip(tmp_path: Path, kind: str) -> Path:
    path = write_movielens(tmp_path / "ml-1m.zip", "1m")
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "html":
        path.write_bytes(b"\n<!DOCTYPE html><html><body>Please log in</body></html>")
    elif kind == "text":
        path.write_bytes(ratings_text("1m"))
    elif kind == "missing member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("ml-1m/README", "x")
    elif kind == "another set":
        write_movielens(path, "1m", folder="ml-10m")
    elif kind == "altered":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("ml-1m/ratings.dat", ratings_text("1m"))
        path.write_bytes(path.read_bytes().replace(b"1::1193::5", b"1::1193::4", 1))
    elif kind == "empty member":
        write_movielens(path, "1m", ratings=b"")
    elif kind == "blank member":
        write_movielens(path, "1m", ratings=b"\n\n")
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "truncated or damaged"),
        ("html", "web page"),
        ("text", "not a zip archive"),
        ("missing member", r"ratings.dat of ml-1m is not in it .*ml-1m/README"),
        ("another set", "this is ml-10m, and ml-1m is wanted"),
        ("altered", r"truncated or damaged \(Bad CRC-32"),
        ("empty member", "holds no ratings"),
        ("blank member", "holds no ratings"),
    ],
)
def test_wrong_archives_are_named_in_one_line(tmp_path: Path, kind: str, said: str) -> None:
    path = _bad_zip(tmp_path, kind)
    with pytest.raises(UserError, match=said) as caught:
        list(movielens.read_ratings(_archive(path, "1m"), "1m"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encrypted_zip_is_said_to_be_one(tmp_path: Path) -> None:
    path = write_movielens(tmp_path / "ml-1m.zip", "1m")
    content = bytearray(path.read_bytes())
    place = -1
    while (place := content.find(b"PK\x01\x02", place + 1)) >= 0:
        content[place + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="encrypted"):
        list(movielens.read_ratings(_archive(path, "1m"), "1m"))


@pytest.mark.parametrize("config", ["20m", "25m"])
def test_a_csv_of_a_header_alone_holds_no_ratings(tmp_path: Path, config: str) -> None:
    path = write_movielens(tmp_path / "a.zip", config, ratings=ratings_text(config, []))
    with pytest.raises(UserError, match=r"ratings.csv holds no ratings"):
        list(movielens.read_ratings(_archive(path, config), config))


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("1{0}2{0}3", "has 3 fields, and 4 are wanted"),
        ("1{0}2{0}3{0}4{0}5", "has 5 fields, and 4 are wanted"),
        ("1{0}x{0}3{0}4", "item 'x' is not a valid number"),
        ("{0}2{0}3{0}4", "user '' is not a valid number"),
        ("-1{0}2{0}3{0}4", "user '-1' is not a valid number"),
        ("1{0}2{0}nan{0}4", "rating 'nan' is not a valid number"),
        ("1{0}2{0}3{0}-4", "timestamp '-4' is not a valid number"),
        ("1{0}2{0}3{0}4.5", "timestamp '4.5' is not a valid number"),
        ("1{0}99999999999{0}3{0}4", "item '99999999999' is not a valid number"),
    ],
)
def test_malformed_ratings_name_member_and_line(
    tmp_path: Path, config: str, bad: str, said: str
) -> None:
    separator = {"100k": "\t", "1m": "::"}.get(config, ",")
    text = ratings_text(config) + bad.format(separator).encode() + b"\n"
    line = text.count(b"\n")
    path = write_movielens(tmp_path / "a.zip", config, ratings=text)
    with pytest.raises(UserError, match=said) as caught:
        list(movielens.read_ratings(_archive(path, config), config))
    assert f"{path}: {members(config)[0]} line {line}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_may_stand_between_the_two_colons(tmp_path: Path) -> None:
    text = ratings_text("1m") + b"1:x:661::3::978300760\n"
    path = write_movielens(tmp_path / "a.zip", "1m", ratings=text)
    with pytest.raises(UserError, match=r"ratings.dat line 8 has 3 fields"):
        list(movielens.read_ratings(_archive(path, "1m"), "1m"))


def test_a_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    text = ratings_text("25m").replace(b"userId,movieId", b"movieId,userId", 1)
    path = write_movielens(tmp_path / "a.zip", "25m", ratings=text)
    with pytest.raises(UserError, match=r"begins with 'movieId,userId.*is wanted"):
        list(movielens.read_ratings(_archive(path, "25m"), "25m"))


@pytest.mark.parametrize("config", SIZES)
def test_malformed_films_name_the_line(tmp_path: Path, config: str) -> None:
    bad = {"100k": "5|Film|0|1\n", "1m": "5::Film\n"}.get(config, "5,Film\r\n")
    path = write_movielens(
        tmp_path / "a.zip", config, movies=movies_text(config) + bad.encode("latin-1")
    )
    line = movies_text(config).count(b"\n") + 1
    with pytest.raises(UserError, match=f"{members(config)[1]} line {line} is not a film"):
        movielens.read_movies(_archive(path, config), config)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_reviews_are_read_as_published(tmp_path: Path, packed: bool) -> None:
    content = reviews_bytes() if packed else gzip.decompress(reviews_bytes())
    columns = _joined(amazon.read_reviews(_write(tmp_path / "reviews.json.gz", content)))
    wanted = [(r["reviewerID"], r["asin"], r["overall"], r["unixReviewTime"]) for r in REVIEWS]
    assert list(zip(*(columns[n].tolist() for n in columns), strict=True)) == wanted
    assert columns["rating"].dtype == np.float32
    assert columns["timestamp"].dtype == np.int64


def test_reviews_of_several_blocks_keep_order_and_need_no_last_newline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amazon, "_BLOCK", 1000)
    reviews = [review(f"A{k}", f"B{k * 7 % 50}", 1.0 + k % 5, 1_390_000_000) for k in range(200)]
    content = gzip.compress(gzip.decompress(reviews_bytes(reviews)).rstrip(b"\n"))
    batches = list(amazon.read_reviews(_write(tmp_path / "r.json.gz", content)))
    assert len(batches) > 10
    assert _joined(batches)["user"].tolist() == [f"A{k}" for k in range(200)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'reviewerID': 'A'}", "line 6 is not JSON"),
        ('{"reviewerID": "A"', "line 6 is not JSON"),
        ("[1, 2]", "line 6 is not a review"),
        (json.dumps({"reviewerID": "A", "overall": 1.0, "unixReviewTime": 1}), "asin is missing"),
        (json.dumps(review("", "B", 1.0, 1)), "reviewerID is ''"),
        (json.dumps(review("A", "B", 1.0, -1)), "unixReviewTime is -1"),
        (json.dumps(review("A", "B", 1.0, 1) | {"unixReviewTime": "1"}), "unixReviewTime is '1'"),
        (json.dumps(review("A", "B", 1.0, 1) | {"overall": None}), "overall is None"),
        (json.dumps(review("A", "B", 1.0, 1) | {"asin": 7}), "asin is 7"),
    ],
)
def test_malformed_reviews_name_the_line(tmp_path: Path, line: str, said: str) -> None:
    content = gzip.decompress(reviews_bytes()) + line.encode() + b"\n"
    path = _write(tmp_path / "r.json.gz", gzip.compress(content))
    with pytest.raises(UserError, match=said) as caught:
        list(amazon.read_reviews(path))
    assert f"{path} line 6" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_is_counted_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "_BLOCK", 700)
    lines = gzip.decompress(reviews_bytes(REVIEWS * 10)).splitlines(keepends=True)
    lines[33] = b"{broken\n"
    path = _write(tmp_path / "r.json.gz", gzip.compress(b"".join(lines)))
    with pytest.raises(UserError, match="line 34 is not JSON"):
        list(amazon.read_reviews(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (reviews_bytes(REVIEWS * 50)[:-200], "truncated or damaged"),
        (reviews_bytes(REVIEWS * 50)[:-4] + b"\0\0\0\0", "truncated or damaged"),
        (b"<html><head></head></html>", "web page"),
        (b"PK\x03\x04zip", "zip archive"),
        (gzip.compress(b"\n\n"), "no reviews"),
    ],
    # gzip bytes hold the time, and every worker must collect the same names.
    ids=["cut", "other length", "web page", "zip archive", "no reviews"],
)
def test_wrong_review_files_are_named_in_one_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = _write(tmp_path / "r.json.gz", content)
    with pytest.raises(UserError, match=said) as caught:
        list(amazon.read_reviews(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DamagedArchive) == ("damaged" in said)


def test_metadata_is_parsed_for_wanted_products_only(tmp_path: Path) -> None:
    content = gzip.decompress(products_bytes()) + b"{'asin': 'B99', this line is broken\n"
    path = _write(tmp_path / "meta.json.gz", gzip.compress(content))
    columns = amazon.read_metadata(path, frozenset({"7806397051", "B000FTYALG", "B0009P4PZC"}))
    assert {name: column.tolist() for name, column in columns.items()} == {
        "item": ["7806397051", "B000FTYALG"],
        "title": ["WAWO 15 Color Professionl Makeup Eyeshadow & Blush", "Rinse and Shine"],
        "brand": ["", "Acme"],
        "categories": ["Beauty > Makeup > Face | Beauty > Gifts", "Beauty"],
    }


def test_metadata_in_another_order_of_keys_is_parsed_whole(tmp_path: Path) -> None:
    product = {"title": "T", "asin": "B1"}
    path = _write(tmp_path / "meta.json", products_bytes([{"title": "U", "asin": "B0"}, product]))
    assert amazon.read_metadata(path, frozenset({"B1"}))["title"].tolist() == ["T"]


def test_a_product_listed_twice_counts_once(tmp_path: Path) -> None:
    twice = [{"asin": "B1", "title": "first"}, {"asin": "B1", "title": "second"}]
    path = _write(tmp_path / "meta.json.gz", products_bytes(twice))
    assert amazon.read_metadata(path, frozenset({"B1"}))["title"].tolist() == ["first"]


def test_metadata_is_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    line = f"{{'asin': 'B1', 'title': open({str(mark)!r}, 'w').write('x')}}\n"
    path = _write(tmp_path / "meta.json.gz", gzip.compress(line.encode()))
    with pytest.raises(UserError, match="line 1 is not a Python literal"):
        amazon.read_metadata(path, frozenset({"B1"}))
    assert not mark.exists()


def test_odd_escapes_in_metadata_raise_no_warning(tmp_path: Path) -> None:
    path = _write(tmp_path / "meta.json.gz", gzip.compress(b"{'asin': 'B1', 'title': 'a\\d'}\n"))
    assert amazon.read_metadata(path, frozenset({"B1"}))["title"].tolist() == ["a\\d"]


def test_metadata_of_another_category_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "meta_Toys.json.gz", products_bytes(PRODUCTS))
    with pytest.raises(UserError, match=r"none of the 1 reviewed products"):
        amazon.read_metadata(path, frozenset({"B0000000"}))
