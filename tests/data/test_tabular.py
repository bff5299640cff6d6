"""Import of tables: every form that is promised, and every mistake that users really make."""

import bz2
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.prepared import open_prepared
from jaxrec.data.tabular import import_table
from jaxrec.errors import UserError

HEADER = "user_id,item_id,timestamp\n"
ROWS = "ann,7,20\nbob,7,10\nann,8,15\n"


@pytest.fixture
def sets(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    return folder


@pytest.fixture
def bring(tmp_path, sets):
    """Writes a table, imports it, and gives the set back."""

    def run(content, file="shop.csv", **options):
        path = tmp_path / file
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8", newline="")
        return import_table(path, "shop", data_dir=sets, **options)

    return run


def events(shop) -> list[tuple]:
    """(user id, item id, time, rating) of all events in order."""
    return [
        (
            shop.user_id(user),
            shop.item_id(int(shop.items[event])),
            None if shop.timestamps is None else int(shop.timestamps[event]),
            None if shop.ratings is None else float(shop.ratings[event]),
        )
        for user in range(shop.num_users)
        for event in range(int(shop.offsets[user]), int(shop.offsets[user + 1]))
    ]


PLAIN = [("ann", 8, 15, None), ("ann", 7, 20, None), ("bob", 7, 10, None)]


# -- forms of tables


def test_plain_csv(bring):
    shop = bring(HEADER + ROWS)
    assert events(shop) == PLAIN
    assert shop.time_unit == "s"
    assert shop.name == "shop"
    source = shop.manifest["source"]
    assert source["rows"] == 3
    assert source["files"][0]["name"] == "shop.csv"
    assert source["files"][0]["bytes"] == len(HEADER + ROWS)
    assert "/" not in json.dumps(source)


@pytest.mark.parametrize(
    ("content", "file"),
    [
        ("﻿" + HEADER + ROWS, "bom.csv"),
        ((HEADER + ROWS).replace("\n", "\r\n"), "crlf.csv"),
        ("\n" + HEADER + "\n" + ROWS.replace("\n", "\n\n") + "\n\n", "blank-lines.csv"),
        ((HEADER + ROWS).rstrip("\n"), "no-last-newline.csv"),
        ((HEADER + ROWS).replace(",", "\t"), "shop.tsv"),
        ((HEADER + ROWS).replace(",", "\t"), "tabs-in.csv"),
        ((HEADER + ROWS).replace(",", ";"), "semicolons.csv"),
        ((HEADER + ROWS).replace(",", "|"), "bars.txt"),
        ((HEADER + ROWS).replace(",", "::"), "shop.dat"),
        (" user_id , item_id , timestamp\n" + ROWS, "spaced-header.csv"),
        ('"user_id","item_id","timestamp"\n"ann","7","20"\n"bob","7","10"\n"ann",8,15\n', "q.csv"),
        (gzip.compress((HEADER + ROWS).encode()), "shop.csv.gz"),
        (gzip.compress(HEADER.encode()) + gzip.compress(ROWS.encode()), "two-members.gz"),
        (gzip.compress((HEADER + ROWS).encode()), "gzip-by-content.csv"),
        (bz2.compress((HEADER + ROWS).encode()), "shop.csv.bz2"),
        (pa.Codec("zstd").compress((HEADER + ROWS).encode(), asbytes=True), "shop.csv.zst"),
        (
            "x,user_id,x,item_id,timestamp\n1,ann,2,7,20\n1,bob,2,7,10\n1,ann,2,8,15\n",
            "other-columns-twice.csv",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_forms_of_one_table(bring, content, file):
    assert events(bring(content, file)) == PLAIN


def test_quoted_fields_with_delimiters_quotes_and_line_breaks(bring):
    text = (
        'user_id,review,item_id,timestamp\n"o\'neil, ann","a\nb",7,3\n'
        '"say ""hi""","c, d",7,2\nplain,"",8,1\n'
    )
    shop = bring(text)
    assert shop.user_ids.tolist() == ["o'neil, ann", "plain", 'say "hi"']


def test_quoted_line_breaks_wherever_blocks_end(bring, monkeypatch):
    monkeypatch.setattr("jaxrec.data._csv_source._BLOCK", 128)
    rows = "".join(f'u{k},"{"line" * (k % 5)}\nof,\ntext",i{k % 3},{k}\n' for k in range(150))
    shop = bring("user_id,review,item_id,timestamp\n" + rows)
    assert shop.num_events == 150
    assert sorted(shop.user_ids) == sorted(f"u{k}" for k in range(150))
    assert [int(shop.timestamps[shop.offsets[shop.user_index(f"u{k}")]]) for k in (0, 77)] == [
        0,
        77,
    ]


def test_a_file_without_quoting(bring):
    text = 'user_id\titem_id\ttimestamp\nann\t"Cats\t1\nbob\t7" disc\t2\n'
    shop = bring(text, "shop.tsv", quote_char=None)
    assert shop.item_ids.tolist() == ['"Cats', '7" disc']


def test_two_characters_between_fields_wherever_blocks_end(bring, monkeypatch):
    monkeypatch.setattr("jaxrec.data._csv_source._BLOCK", 64)
    rows = "".join(f"u:{k}::i{k % 7}:::{k}\n".replace(":::", "::") for k in range(200))
    shop = bring(rows, "ratings.dat", columns=["user_id", "item_id", "timestamp"])
    assert shop.num_users == 200
    assert shop.user_index("u:17") >= 0
    assert sorted(shop.item_ids) == [f"i{k}" for k in range(7)]


def test_movielens_as_published(bring):
    text = "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n"
    names = ["user_id", "item_id", "rating", "timestamp"]
    shop = bring(text, "ratings.dat", columns=names)
    assert events(shop)[0] == (1, 1193, 978300760, 5.0)


def test_a_header_with_a_line_break_keeps_rows_and_numbers(bring):
    text = '"the\nuser",item_id,timestamp\nann,7,1\nann,8,oops\n'
    with pytest.raises(UserError, match=r"row 4 \(the header is row 1\)"):
        bring(text, user_column="the\nuser")


def test_names_instead_of_a_header(bring):
    shop = bring(ROWS, columns=["user_id", "item_id", "timestamp"])
    assert events(shop) == PLAIN
    with_bom = bring("﻿" + ROWS, columns=["user_id", "item_id", "timestamp"], overwrite=True)
    assert events(with_bom) == PLAIN


def test_renamed_columns(bring):
    text = "who,what,when,stars,user_id\nann,7,20,4.5,x\nbob,7,10,2,y\n"
    shop = bring(
        text, user_column="who", item_column="what", time_column="when", rating_column="stars"
    )
    assert events(shop) == [("ann", 7, 20, 4.5), ("bob", 7, 10, 2.0)]


def test_ratings_are_read_where_they_are(bring):
    shop = bring("user_id,item_id,rating,timestamp\nann,7, 4 ,1\nann,8,3.5,2\n")
    assert shop.ratings.tolist() == [4, 3.5]


def test_several_files_are_one_table(tmp_path, sets):
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\nann,7,5\nbob,x,1\n")
    (tmp_path / "b.tsv").write_text("timestamp\tuser_id\titem_id\n5\tann\t9\n2\tann\t7\n")
    pq.write_table(
        pa.table({"user_id": ["cat"], "item_id": ["7"], "timestamp": [8]}), tmp_path / "c.parquet"
    )
    files = [tmp_path / name for name in ("a.csv", "b.tsv", "c.parquet")]
    shop = import_table(files, "shop", data_dir=sets)
    # at time 5 the row of the first file comes first
    assert events(shop) == [
        ("ann", "7", 2, None),
        ("ann", "7", 5, None),
        ("ann", "9", 5, None),
        ("bob", "x", 1, None),
        ("cat", "7", 8, None),
    ]
    assert [file["name"] for file in shop.manifest["source"]["files"]] == [f.name for f in files]


def test_latin_1(bring):
    text = "user_id,item_id,timestamp\nJosé,7,1\nZoë,7,2\n".encode("latin-1")
    shop = bring(text, encoding="latin-1")
    assert shop.user_ids.tolist() == ["José", "Zoë"]


def test_columns_that_are_not_read_may_hold_anything(bring):
    text = b"user_id,item_id,timestamp,note\nann,7,20,caf\xe9\nbob,7,10,\nann,8,15,x\n"
    assert events(bring(text)) == PLAIN


def test_utf_16(bring):
    shop = bring((HEADER + ROWS).encode("utf-16"), encoding="utf-16")
    assert events(shop) == PLAIN


# -- ids


def test_whole_numbers_stay_numbers_and_sort_by_size(bring):
    shop = bring(HEADER + "10,100,1\n9,-5,1\n0,20,1\n")
    assert shop.user_ids.tolist() == [0, 9, 10]
    assert shop.item_ids.tolist() == [-5, 20, 100]


@pytest.mark.parametrize("odd", ["007", "1.0", "+1", "-0", "1e3", " 1", "9" * 19, "NA", "1 "])
def test_one_id_that_is_no_plain_number_makes_all_text(bring, odd):
    shop = bring(HEADER + f"7,1,1\n{odd},1,1\n")
    assert sorted(shop.user_ids) == sorted(["7", odd])


def test_ids_of_nineteen_digits(bring):
    shop = bring(HEADER + "9223372036854775807,1,1\n1234567890123456789,1,2\n")
    assert shop.user_ids.tolist() == [1234567890123456789, 9223372036854775807]
    assert shop.user_index("9223372036854775807") == 1


def test_text_sorts_by_bytes_and_keeps_its_case(bring):
    shop = bring(HEADER + "é,1,1\nb,1,1\nB,1,1\n日本,1,1\n")
    assert shop.user_ids.tolist() == ["B", "b", "é", "日本"]


def test_the_order_of_rows_does_not_number_ids(bring):
    one = bring(HEADER + "c,3,1\na,1,2\nb,2,3\n")
    other = bring(HEADER + "b,2,3\nc,3,1\na,1,2\n", overwrite=True)
    assert one.hash == other.hash


def test_text_of_parquet_stays_text(bring):
    table = pa.table({"user_id": ["1", "2"], "item_id": [3, 4], "timestamp": [1, 2]})
    shop = bring(table, "shop.parquet")
    assert shop.user_ids.tolist() == ["1", "2"]
    assert shop.item_ids.tolist() == [3, 4]


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.int64(), pa.uint32(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_types_of_parquet_ids(bring, kind):
    column = pa.array(["5", "6", "5"]).cast(
        kind if not pa.types.is_dictionary(kind) else pa.string()
    )
    if pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    shop = bring(
        pa.table({"user_id": column, "item_id": [1, 2, 3], "timestamp": [3, 2, 1]}), "shop.parquet"
    )
    expected = [5, 6] if pa.types.is_integer(kind) else ["5", "6"]
    assert shop.user_ids.tolist() == expected
    assert [len(shop.history(user)) for user in (0, 1)] == [2, 1]


def test_many_blocks_agree_on_ids(bring, monkeypatch, rng):
    monkeypatch.setattr("jaxrec.data._csv_source._BLOCK", 200)
    users, items = rng.integers(0, 40, 500), rng.integers(0, 30, 500)
    pairs = list(zip(users, items, strict=True))
    text = HEADER + "".join(f"u{u},i{i},{k % 50}\n" for k, (u, i) in enumerate(pairs))
    shares = []
    shop = bring(text, progress=lambda what, share: shares.append((what, share)))
    expected = sorted((f"u{u}", k % 50, k, f"i{i}") for k, (u, i) in enumerate(pairs))
    assert [(user, time, item) for user, item, time, _ in events(shop)] == [
        (user, time, item) for user, time, _, item in expected
    ]
    reading = [share for what, share in shares if what == "reading shop.csv"]
    assert len(reading) > 10
    assert reading == sorted(reading)
    assert reading[-1] == 1.0
    assert shares[-1] == ("written", 1.0)


# -- time


@pytest.mark.parametrize(
    ("times", "unit", "stored"),
    [
        (["0", "5"], "s", [0, 5]),
        (["978300760", "978300761"], "s", [978300760, 978300761]),
        ([" 5 ", "6"], "s", [5, 6]),
        (["978300760.0", "978300761"], "s", [978300760, 978300761]),
        (["1318896000.25", "1318896001"], "us", [1318896000250000, 1318896001000000]),
        (["1.3e9", "1.4e9"], "s", [1300000000, 1400000000]),
        (["1650812741436", "1650812934945"], "ms", [1650812741436, 1650812934945]),
        (["1650812741436.5", "1650812934945"], "us", [1650812741436500, 1650812934945000]),
        (["1650812741436000", "1650812934945000"], "us", [1650812741436000, 1650812934945000]),
        (["1650812741436000123", "1650812934945000000"], "ns", None),
        (["2019-11-24", "2019-11-25"], "s", [1574553600, 1574640000]),
        (["2019-11-24 00:00:17", "2019-11-24T00:00:18"], "s", [1574553617, 1574553618]),
        (["2019-11-24T00:00:17Z", "2019-11-24T02:00:18+02:00"], "s", [1574553617, 1574553618]),
        (["2019-11-24 00:00:17.5", "2019-11-24"], "us", [1574553617500000, 1574553600000000]),
        (
            ["2019-11-24 00:00:17.004101+00:00", "2019-11-24 00:00:18+00:00"],
            "us",
            [1574553617004101, 1574553618000000],
        ),
        (["2019-11-24 00:00:17.123456789", "2019-11-24"], "ns", None),
    ],
)
def test_forms_of_time(bring, times, unit, stored):
    shop = bring(HEADER + "".join(f"ann,{k},{time}\n" for k, time in enumerate(times)))
    assert shop.time_unit == unit
    if stored is not None:
        by_item = dict(zip(shop.items.tolist(), shop.timestamps.tolist(), strict=True))
        assert [by_item[k] for k in range(len(times))] == stored


def test_nanoseconds_stay_exact(bring):
    shop = bring(HEADER + "ann,1,1650812741436000123\nann,2,1650812741436000122\n")
    assert shop.timestamps.tolist() == [1650812741436000122, 1650812741436000123]


def test_the_unit_can_be_told(bring):
    shop = bring(HEADER + "ann,1,0\nann,2,1650812741436\n", time_unit="ms")
    assert shop.time_unit == "ms"
    assert shop.timestamps.tolist() == [0, 1650812741436]


def test_a_format_of_time(bring):
    shop = bring(HEADER + "ann,1,24/11/2019\nann,2,23/11/2019\n", time_format="%d/%m/%Y")
    assert shop.timestamps.tolist() == [1574467200, 1574553600]
    assert shop.history(0).tolist() == [1, 0]
    with pytest.raises(UserError, match="'2019' is not a time of '%d/%m/%Y'"):
        bring(HEADER + "ann,1,24/11/2019\nann,2,2019\n", time_format="%d/%m/%Y", overwrite=True)


def test_dates_as_numbers_with_their_format(bring):
    shop = bring(HEADER + "ann,1,20191124\nann,2,20191123\n", time_format="%Y%m%d")
    assert shop.timestamps.tolist() == [1574467200, 1574553600]


@pytest.mark.parametrize(
    ("column", "unit", "stored"),
    [
        (pa.array([2, 1], pa.int32()), "s", [1, 2]),
        (pa.array([2.0, 1.0]), "s", [1, 2]),
        (pa.array([2000, 1500], pa.timestamp("ms")), "ms", [1500, 2000]),
        (pa.array([2000, 1000], pa.timestamp("ms", "Europe/Berlin")), "s", [1, 2]),
        (pa.array([2, 1], pa.date32()), "s", [86400, 172800]),
        (pa.array(["1970-01-02", "1970-01-01"]), "s", [0, 86400]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_types_of_parquet_time(bring, column, unit, stored):
    table = pa.table({"user_id": [1, 1], "item_id": [5, 6], "timestamp": column})
    shop = bring(table, "shop.parquet")
    assert shop.time_unit == unit
    assert shop.timestamps.tolist() == stored


def test_blocks_of_whole_and_of_decimal_numbers_go_together(bring, monkeypatch):
    monkeypatch.setattr("jaxrec.data._csv_source._BLOCK", 64)
    rows = "".join(f"ann,{k},{100 - k}{'.5' if k > 50 else ''}\n" for k in range(90))
    shop = bring(HEADER + rows)
    assert shop.time_unit == "us"
    assert shop.timestamps[0] == 11_500_000
    assert shop.timestamps[-1] == 100_000_000
    assert [shop.item_id(int(item)) for item in shop.items] == list(range(89, -1, -1))


def test_without_time_the_order_of_rows_is_the_order(bring):
    shop = bring("user_id,item_id,timestamp\nann,9,3\nbob,7,2\nann,8,1\n", no_time=True)
    assert events(shop) == [("ann", 9, None, None), ("ann", 8, None, None), ("bob", 7, None, None)]
    assert "no time" in shop.manifest["tie_order"]


def test_ties_keep_the_order_of_rows(bring):
    shop = bring(HEADER + "b,9,5\na,3,5\na,1,5\nb,2,5\na,2,4\na,0,5\n")
    assert [item for user, item, _, _ in events(shop) if user == "a"] == [2, 3, 1, 0]
    assert [item for user, item, _, _ in events(shop) if user == "b"] == [9, 2]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 5), st.integers(0, 3)),
        min_size=1,
        max_size=30,
    )
)
def test_any_table_is_sorted_stably(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("sets")
    table = folder / "t.csv"
    table.write_text(HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    shop = import_table(table, "shop", data_dir=folder)
    expected = sorted(enumerate(rows), key=lambda row: (row[1][0], row[1][2], row[0]))
    assert [(u, i, t) for u, i, t, _ in events(shop)] == [row for _, row in expected]


# -- filters


RATED = (
    "user_id,item_id,rating,timestamp\n"
    "a,1,5,1\na,2,4,2\na,3,1,3\nb,1,4,1\nb,2,5,2\nc,1,5,1\nd,9,2,1\n"
)


def test_min_rating(bring):
    shop = bring(RATED, min_rating=4)
    assert shop.num_events == 5
    assert shop.user_ids.tolist() == ["a", "b", "c"]
    assert shop.item_ids.tolist() == [1, 2]
    assert shop.manifest["source"]["dropped"] == {"missing": 0, "below_min_rating": 2}
    assert shop.manifest["options"]["min_rating"] == 4


def test_k_core_after_min_rating(bring):
    shop = bring(RATED, min_rating=4, min_user_events=2, min_item_events=2)
    assert [(u, i) for u, i, _, _ in events(shop)] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert shop.manifest["source"]["dropped"]["outside_k_core"] == 1


def test_drop_missing(bring):
    text = "user_id,item_id,rating,timestamp\n1,1,5,1\n,1,5,1\n2,  ,5,1\n3,1,,1\n4,1,5,\n5,2,5,2\n"
    shop = bring(text, drop_missing=True)
    assert events(shop) == [(1, 1, 1, 5.0), (5, 2, 2, 5.0)]
    assert shop.manifest["source"]["dropped"]["missing"] == 4
    assert shop.manifest["source"]["rows"] == 6


def test_drop_missing_of_parquet(bring):
    table = pa.table(
        {
            "user_id": [1, None, 3, 4, 5],
            "item_id": ["a", "b", None, "d", "e"],
            "rating": [1.0, 1.0, 1.0, float("nan"), 1.0],
            "timestamp": [1, 2, 3, 4, None],
        }
    )
    assert events(bring(table, "shop.parquet", drop_missing=True)) == [(1, "a", 1, 1.0)]


def test_rows_are_still_named_after_drops(bring):
    text = HEADER + "a,1,1\n,1,1\na,2,-4\n"
    with pytest.raises(UserError, match=r"row 4 \(the header is row 1\).*-4 lies before 1970"):
        bring(text, drop_missing=True)


# -- items


ITEMS = 'item_id,title,year\n8,"Eight, the",1999\n5,Five,0001\n7,,2001\n'


def _items(tmp_path, text, name="items.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_items_file_and_vectors(bring, tmp_path):
    vectors = tmp_path / "vectors.npy"
    np.save(vectors, np.array([[8, 8], [5, 5], [7, 7]], np.float16))
    shop = bring(
        HEADER + ROWS + "ann,6,30\n",
        items_file=_items(tmp_path, ITEMS),
        item_vectors_file=vectors,
    )
    assert shop.item_ids.tolist() == [6, 7, 8]
    assert shop.item_titles == [None, None, "Eight, the"]
    assert shop.item_table["year"].to_pylist() == [None, "2001", "1999"]
    assert shop.item_vectors.tolist() == [[0, 0], [7, 7], [8, 8]]
    assert shop.item_vectors.dtype == np.float16
    assert shop.manifest["source"]["items_file"] == {
        "rows": 3,
        "rows_without_events": 1,
        "items_without_a_row": 1,
    }
    names = [file["name"] for file in shop.manifest["source"]["files"]]
    assert names == ["shop.csv", "items.csv", "vectors.npy"]


def test_items_of_parquet_with_other_names(bring, tmp_path):
    path = tmp_path / "items.parquet"
    table = pa.table(
        {"asin": [7, 8], "name": ["Seven", " "], "title": ["x", "y"], "price": [1.5, None]}
    )
    pq.write_table(table, path)
    shop = bring(HEADER + ROWS, items_file=path, items_id_column="asin", title_column="name")
    assert shop.item_titles == ["Seven", None]
    assert shop.item_table["original_title"].to_pylist() == ["x", "y"]
    assert shop.item_table["price"].to_pylist() == [1.5, None]


def test_items_without_titles(bring, tmp_path):
    shop = bring(HEADER + ROWS, items_file=_items(tmp_path, "item_id,brand\n7,A\n8,B\n"))
    assert shop.item_titles is None
    assert shop.item_text(0) == "7"
    assert shop.item_table["brand"].to_pylist() == ["A", "B"]


def test_items_file_uses_its_own_delimiter(bring, tmp_path):
    items = _items(tmp_path, ITEMS)
    shop = bring((HEADER + ROWS).replace(",", ";"), delimiter=";", items_file=items)
    assert shop.item_titles == [None, "Eight, the"]


# -- mistakes: the file and its form

GOOD = HEADER + "a,1,1\n"
LATIN = b"user_id,item_id,timestamp\na,1,1\nJos\xe9,2,2\n"
GZIPPED = gzip.compress((HEADER + "".join(f"u{k},{k},{k}\n" for k in range(20000))).encode())
PARQUET = io.BytesIO()
pq.write_table(pa.table({"user_id": [1], "item_id": [1], "timestamp": [1]}), PARQUET)
_HEAD = r"shop\.csv: "

MISTAKES = {
    "empty file": ("", {}, r"shop\.csv: the file is empty"),
    "blank lines only": ("\n\n", {}, r"shop\.csv: the file is empty"),
    "header only": (HEADER, {}, _HEAD + "a header and no rows after it"),
    "header only, no newline": (HEADER[:-1], {}, _HEAD + "a header and no rows after it"),
    "no user column": (
        "uid,item_id,timestamp\na,1,1\n",
        {},
        _HEAD + r"no column 'user_id'; did you mean 'uid'\? \(its columns: uid, item_id, "
        r"timestamp\); name the column of users with --user-column",
    ),
    "no item column": (
        "user_id,movie,timestamp\na,1,1\n",
        {},
        r"no column 'item_id' .*--item-column \(item_column\)",
    ),
    "no time column": (
        "user_id,item_id,when\na,1,1\n",
        {},
        r"no column 'timestamp' .*--time-column \(time_column\), or pass --no-time",
    ),
    "no header line": (
        "1,1193,978300760\n2,661,978302109\n",
        {},
        r"no column 'user_id' .*if the first line is no header, name the columns with --columns",
    ),
    "another delimiter than told": (GOOD, {"delimiter": ";"}, r"no column 'user_id'"),
    "rating column misspelt": (
        "user_id,item_id,timestamp,stars\na,1,1,5\n",
        {"rating_column": "star"},
        r"no column 'star'; did you mean 'stars'\?.*--rating-column",
    ),
    "column twice": (
        "user_id,item_id,timestamp,user_id\na,1,1,b\n",
        {},
        _HEAD + "column 'user_id' stands 2 times in the header",
    ),
    "row too short": (
        HEADER + "a,1,1\nb,2\n",
        {},
        _HEAD + r"row 3 \(the header is row 1\): 2 fields where the header has 3",
    ),
    "row too long": (
        HEADER + "a,1,1\n\nb,2,3,4\n",
        {},
        _HEAD + r"row 4 \(the header is row 1\): 4 fields where the header has 3",
    ),
    "wrong number of names": (
        "a,1,1\n",
        {"columns": ["user_id", "item_id"]},
        r"no column 'timestamp'|columns names 2 columns",
    ),
    "not UTF-8": (
        LATIN,
        {},
        _HEAD + r"row 3 \(the header is row 1\) is not utf-8 text \(byte 0xe9 in column 4\); pass "
        "--encoding",
    ),
    "UTF-16": (GOOD.encode("utf-16"), {}, _HEAD + "UTF-16 text; pass --encoding utf-16"),
    "unknown encoding": (GOOD, {"encoding": "utf-9"}, "encoding 'utf-9' is not known"),
    "gzip cut off": (GZIPPED[:-3000], {}, _HEAD + "the gzip file is truncated"),
    "gzip cut off in its first block": (GZIPPED[:40], {}, _HEAD + "the gzip file is truncated"),
    "gzip damaged": (
        GZIPPED[:9000] + b"\0" * 9 + GZIPPED[9009:],
        {},
        _HEAD + "the gzip file is (damaged|truncated)",
    ),
    "zip or Excel": (b"PK\x03\x04" + b"x" * 40, {}, _HEAD + "not a table but a zip archive"),
    "quote never closed": (
        HEADER + 'a,1,1\n"b,2,2\nc,3,3\n',
        {},
        _HEAD + r"row 3 \(the header is row 1\)",
    ),
    "quote never closed in the last column": (
        'user_id,item_id,timestamp,note\na,1,1,x\nb,2,2,"y\nc,3,3,z\n',
        {},
        _HEAD + r"row 3 \(the header is row 1\): a quoted field opens here and never closes",
    ),
    "quote closed by one far below": (
        HEADER + 'a,1,1\n"b,2,2\nc",3,3\n',
        {},
        _HEAD + r"row 3 \(the header is row 1\), column 'user_id': the user id holds a line break",
    ),
    "bad delimiter": (GOOD, {"delimiter": "abc"}, "delimiter 'abc': wanted one or two characters"),
    "Latin-1 in the header": (
        b"user_id,item_id,timestamp,\xe9t\xe9\na,x\xe9,1,1\n",
        {},
        r"row 1 \(the header is row 1\) is not utf-8 text \(byte 0xe9 in column 27\)",
    ),
    # -- times
    "time is a word": (
        HEADER + "a,1,1\nb,2,soon\n",
        {},
        _HEAD + r"row 3 \(the header is row 1\), column 'timestamp': 'soon' is not a time",
    ),
    "first time is a word": (HEADER + "a,1,now\n", {}, r"row 2 .*'now' is not a time; wanted"),
    "time is missing": (
        HEADER + "a,1,1\nb,2,\n",
        {},
        r"row 3 .*column 'timestamp': no time; .*--drop-missing",
    ),
    "time is negative": (HEADER + "a,1,1\nb,2,-5\n", {}, r"row 3 .*-5 lies before 1970"),
    "time before 1970": (HEADER + "a,1,1969-12-31\n", {}, r"row 2 .*lies before 1970"),
    "time is NaN": (HEADER + "a,1,1\nb,2,nan\n", {}, r"row 3 .*nan is not a time"),
    "time is infinite": (HEADER + "a,1,inf\n", {}, r"row 2 .*inf is not a time"),
    "time too large": (HEADER + "a,1,1e30\n", {}, r"row 2 .*1e30 is too large for a time"),
    "units mixed": (
        HEADER + "a,1,1318896000\nb,2,1318896000000\n",
        {},
        r"row 3 .*1318896000000 looks like ms since 1970 where the first row has s; pass "
        "--time-unit",
    ),
    "zones mixed": (
        HEADER + "a,1,2019-11-24 10:00:00Z\nb,2,2019-11-24 10:00:00\n",
        {},
        r"row 3 .*is not a time like those before it",
    ),
    "dates as numbers": (
        HEADER + "a,1,20191124\nb,2,20191125\n",
        {},
        r"row 2 .*20191124 looks like a date; pass --time-format %Y%m%d",
    ),
    "numbers where ISO is told": (
        GOOD,
        {"time_unit": "iso"},
        r"row 2 .*the times are whole numbers, not ISO 8601",
    ),
    "ISO where seconds are told": (
        HEADER + "a,1,2019-11-24\n",
        {"time_unit": "s"},
        r"row 2 .*the times are ISO 8601 times, not numbers of s",
    ),
    "unknown unit": (GOOD, {"time_unit": "hours"}, "time_unit is 'hours'; wanted one of auto, s"),
    # -- ids and ratings
    "empty user": (
        HEADER + "a,1,1\n,2,2\n",
        {},
        _HEAD + r"row 3 \(the header is row 1\), column 'user_id': no user id",
    ),
    "blank item": (HEADER + "a,1,1\nb,   ,2\n", {}, r"row 3 .*column 'item_id': no item id"),
    "rating is a word": (
        "user_id,item_id,rating,timestamp\na,1,5,1\nb,2,good,2\n",
        {},
        r"row 3 .*column 'rating': 'good' is not a number",
    ),
    "rating is missing": (
        "user_id,item_id,rating,timestamp\na,1,5,1\nb,2,,2\n",
        {},
        r"row 3 .*column 'rating': no rating; .*--drop-missing",
    ),
    "rating is NaN": (
        "user_id,item_id,rating,timestamp\na,1,NaN,1\n",
        {},
        r"row 2 .*column 'rating': the rating is NaN; wanted a finite number",
    ),
    "rating is infinite": (
        "user_id,item_id,rating,timestamp\na,1,4,1\na,2,-inf,1\n",
        {},
        r"row 3 .*the rating is -inf",
    ),
    # -- filters and options
    "min_rating without ratings": (
        GOOD,
        {"min_rating": 4},
        _HEAD + "min_rating needs a rating, and there is no column 'rating'",
    ),
    "min_rating above all": (
        "user_id,item_id,rating,timestamp\na,1,3,1\n",
        {"min_rating": 4},
        r"no event has a rating of 4 or more \(the highest is 3\)",
    ),
    "k-core leaves nothing": (
        GOOD,
        {"min_user_events": 5},
        "nothing is left where every user has 5 events",
    ),
    "negative filter": (GOOD, {"min_item_events": -1}, "min_item_events is -1; wanted 0 or more"),
    "all rows incomplete": (
        HEADER + ",1,1\na,,1\n",
        {"drop_missing": True},
        "no row is complete, so there are no events",
    ),
    "one column for two things": (
        "user_id,timestamp\na,1\n",
        {"item_column": "user_id"},
        "the columns user_id, user_id, timestamp must differ",
    ),
    "names twice": (
        "a,b,1\n",
        {"columns": ["user_id", "user_id", "timestamp"]},
        "columns names a column twice",
    ),
    "vectors without items": (
        GOOD,
        {"item_vectors_file": "v.npy"},
        "item vectors need the items file",
    ),
    "no items file there": (GOOD, {"items_file": "gone.csv"}, r"gone\.csv: no such file"),
}


def assert_refused(sets, message, run):
    with pytest.raises(UserError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert list(sets.iterdir()) == []


@pytest.mark.parametrize(("content", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_csv(bring, sets, content, options, message):
    assert_refused(sets, message, lambda: bring(content, **options))


def test_a_mistake_keeps_the_set_that_was_to_be_replaced(bring, sets):
    shop = bring(GOOD)
    with pytest.raises(UserError, match="is not a time"):
        bring(HEADER + "a,1,soon\n", overwrite=True)
    assert open_prepared(shop.path, verify=True).hash == shop.hash
    assert [entry.name for entry in sets.iterdir()] == ["shop"]


def test_a_taken_or_bad_name_is_told_before_reading(bring, sets):
    bring(GOOD)
    with pytest.raises(UserError, match=r"shop: a data set of that name exists .*--overwrite"):
        bring("")
    with pytest.raises(UserError, match="cannot name a data set"):
        import_table("x.csv", "a/b", data_dir=sets)


def test_no_such_file(sets, tmp_path):
    (tmp_path / "ratings.csv").write_text(GOOD)
    path = tmp_path / "rating.csv"
    message = r"rating\.csv: no such file; did you mean .*ratings\.csv\?"
    assert_refused(sets, message, lambda: import_table(path, "shop", data_dir=sets))
    assert_refused(
        sets, "no such file", lambda: import_table(tmp_path / "no" / "x", "s", data_dir=sets)
    )
    assert_refused(sets, "no file is given", lambda: import_table([], "shop", data_dir=sets))


def test_a_folder_is_no_file(sets, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.csv").write_text(GOOD)
    message = r"logs: a folder; name the files in it \(it holds a\.csv\)"
    assert_refused(sets, message, lambda: import_table(tmp_path / "logs", "s", data_dir=sets))


def test_the_second_file_is_named(sets, tmp_path):
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "b.csv").write_text(HEADER + "a,1,1\nb,2,x\n")
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    assert_refused(sets, r"b\.csv: row 3 ", lambda: import_table(files, "s", data_dir=sets))
    (tmp_path / "b.csv").write_text(HEADER + "a,1,1318896000000\n")
    assert_refused(
        sets, r"b\.csv: row 2 .*looks like ms", lambda: import_table(files, "s", data_dir=sets)
    )
    (tmp_path / "b.csv").write_text(HEADER + "a,1,2019-11-24\n")
    message = r"b\.csv: row 2 .*turns from whole numbers to ISO 8601 times"
    assert_refused(sets, message, lambda: import_table(files, "s", data_dir=sets))
    (tmp_path / "b.csv").write_text("user_id,item_id,timestamp,rating\na,1,1,5\n")
    message = r"a\.csv: no column 'rating', which the other files have"
    assert_refused(sets, message, lambda: import_table(files, "s", data_dir=sets))


def test_a_bad_row_is_found_in_a_later_block(bring, sets, monkeypatch):
    monkeypatch.setattr("jaxrec.data._csv_source._BLOCK", 256)
    rows = [f"u{k},i{k},{k}\n" for k in range(300)]
    for line, bad, message in (
        (250, "u,i,late\n", r"row 250 .*'late' is not a time"),
        (199, ",i,5\n", r"row 199 .*no user id"),
        (288, "u,i\n", r"row 288 .*2 fields"),
    ):
        text = HEADER + "".join([*rows[: line - 2], bad, *rows[line - 2 :]])
        assert_refused(sets, message, lambda text=text: bring(text))


@pytest.mark.parametrize("bad", [0, 1, 7, 8, 4095, 4096, 4097, 9000])
def test_the_first_bad_time_of_a_long_block_is_named(bring, sets, bad):
    rows = [f"u,i,{1_000_000 + k}\n" for k in range(9001)]
    rows[bad] = "u,i,2019-11-24\n"
    if bad:
        message = rf"row {bad + 2} .*'2019-11-24' is not a time like those before it"
    else:
        message = r"row 3 .*'1000001' is not a time like those before it"
    assert_refused(sets, message, lambda: bring(HEADER + "".join(rows)))


def test_rows_are_lines_of_the_file_where_fields_hold_line_breaks(bring, sets):
    text = 'user_id,note,item_id,timestamp\na,"1\n2\n3",1,1\n\nb,x,2,soon\n'
    assert_refused(sets, r"row 6 \(the header is row 1\)", lambda: bring(text))
    no_header = r"row 2 \(the first line is row 1\)"
    names = ["user_id", "item_id", "timestamp"]
    assert_refused(sets, no_header, lambda: bring("a,1,1\nb,2,x\n", columns=names))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"user_id": [1], "item_id": [1]}, r"shop\.parquet: no column 'timestamp'"),
        ({"user_id": [1.5], "item_id": [1], "timestamp": [1]}, "'user_id' is of type double; ids"),
        ({"user_id": [1], "item_id": [[1]], "timestamp": [1]}, "'item_id' is of type list"),
        ({"user_id": [1], "item_id": [1], "timestamp": [[1]]}, "list<.* are not times"),
        ({"user_id": [1], "item_id": [1], "timestamp": [True]}, "type bool are not times"),
        (
            {"user_id": [1, None], "item_id": [1, 2], "timestamp": [1, 2]},
            r"shop\.parquet: row 2 \(the first is row 1\), column 'user_id': no user id",
        ),
        (
            {"user_id": [1, 2], "item_id": ["x", " "], "timestamp": [1, 2]},
            r"row 2 .*column 'item_id': no item id",
        ),
        (
            {"user_id": [1, 2], "item_id": [1, 2], "timestamp": [1, None]},
            r"row 2 .*column 'timestamp': no time",
        ),
        (
            {"user_id": [1], "item_id": [1], "timestamp": [1], "rating": [[1]]},
            "are not ratings",
        ),
        (
            {"user_id": [1], "item_id": [1], "timestamp": [1], "rating": ["x"]},
            "'x' is not a number",
        ),
        (
            {"user_id": [1], "item_id": [1], "timestamp": pa.array([2**63], pa.uint64())},
            "too large for a time",
        ),
        ({"user_id": pa.array([], pa.int64()), "item_id": [], "timestamp": []}, "without rows"),
    ],
)
def test_mistakes_in_parquet(bring, sets, table, message):
    assert_refused(sets, message, lambda: bring(pa.table(table), "shop.parquet"))


def test_parquet_that_is_none(bring, sets):
    assert_refused(sets, "not a Parquet file, though its name", lambda: bring(GOOD, "shop.parquet"))
    cut = PARQUET.getvalue()[:-20]
    assert_refused(sets, "not a whole Parquet file", lambda: bring(cut, "shop.parquet"))
    data = bytearray(PARQUET.getvalue())
    data[4:40] = bytes(36)
    assert_refused(sets, "Parquet file is damaged", lambda: bring(bytes(data), "shop.parquet"))


# -- mistakes: items and vectors


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"items\.csv: the file is empty"),
        ("asin,title\n7,x\n", {}, r"items\.csv: no column 'item_id' .*--items-id-column"),
        (ITEMS, {"title_column": "name"}, r"items\.csv: no column 'name' .*--title-column"),
        (
            "item_id,title\n7,x\n8,y\n7,z\n",
            {},
            r"items\.csv: row 4 \(the header is row 1\), column 'item_id': the id '7' stands twice",
        ),
        ("item_id,title\n7,x\n,y\n", {}, r"items\.csv: row 3 .*: no id"),
        ("item_id,title\nx,x\n", {}, r"items\.csv: none of its 1 ids .*such as 'x'.*such as 7"),
        ("item_id,title\n7,x\n8\n", {}, r"items\.csv: row 3 .*1 fields where the header has 2"),
    ],
)
def test_mistakes_in_items(bring, sets, tmp_path, text, options, message):
    items = _items(tmp_path, text)
    assert_refused(sets, message, lambda: bring(HEADER + ROWS, items_file=items, **options))


def _save_archive(path):
    with path.open("wb") as stream:
        np.savez(stream, a=np.ones(3))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"v\.npy: no such file of item vectors"),
        (lambda path: np.save(path, np.ones((2, 4))), r"v\.npy: 2 rows where items\.csv has 3"),
        (lambda path: np.save(path, np.ones(3)), r"v\.npy: holds float64\[3\]; wanted floats"),
        (lambda path: np.save(path, np.ones((3, 2), int)), r"holds int64\[3, 2\]"),
        (lambda path: np.save(path, np.array([[1, 2], [3, np.nan], [1, 1]])), "row 1 .*holds NaN"),
        (lambda path: path.write_text("1,2"), r"v\.npy: not an array of item vectors"),
        (
            lambda path: np.save(path, np.array([[print]] * 3, object)),
            "not an array of item vectors .it holds Python objects",
        ),
        (lambda path: _save_archive(path), "an archive of arrays"),
        (
            lambda path: (np.save(path, np.ones((3, 9))), path.write_bytes(path.read_bytes()[:-8])),
            "not an array of item vectors",
        ),
    ],
)
def test_mistakes_in_vectors(bring, sets, tmp_path, write, message):
    path = tmp_path / "v.npy"
    write(path)
    items = _items(tmp_path, ITEMS)
    assert_refused(
        sets, message, lambda: bring(HEADER + ROWS, items_file=items, item_vectors_file=path)
    )


def test_vectors_may_hold_double_precision(bring, tmp_path):
    np.save(tmp_path / "v.npy", np.arange(6, dtype=np.float64).reshape(3, 2))
    shop = bring(
        HEADER + ROWS, items_file=_items(tmp_path, ITEMS), item_vectors_file=tmp_path / "v.npy"
    )
    assert shop.item_vectors.dtype == np.float32
    assert shop.item_vectors.tolist() == [[4, 5], [0, 1]]


def test_paths_may_be_text_and_home_is_known(monkeypatch, tmp_path, sets):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(tmp_path, "t.csv").write_text(GOOD)
    assert import_table("~/t.csv", "shop", data_dir=str(sets)).num_events == 1
