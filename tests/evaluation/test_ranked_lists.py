"""Ranked-lists files: round trips, every form, every mistake, and their evaluation."""

import gzip
import signal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from toy_sets import on_disk

from jaxrec.data.prepared import write_prepared
from jaxrec.data.splits import leave_one_out, temporal
from jaxrec.errors import UserError
from jaxrec.evaluation import ranked_writer
from jaxrec.evaluation.baselines import popularity
from jaxrec.evaluation.metrics import ranking_metrics
from jaxrec.evaluation.ranked_lists import evaluate_ranked, read_ranked
from jaxrec.evaluation.ranked_writer import RankedWriter, write_ranked
from jaxrec.evaluation.results import evaluate_lists

SUFFIXES = [".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".pq"]
HISTORIES = [[0, 1, 2, 3], [2, 3, 4, 0], [4, 5, 0, 1]]


@pytest.fixture
def shop(tmp_path):
    """Users ann, bob, cy; items 10, 20, ..., 60; test targets 40, 10, 20."""
    return on_disk(tmp_path, HISTORIES, ["ann", "bob", "cy"], [10, 20, 30, 40, 50, 60])


@pytest.fixture
def words(tmp_path):
    """The same with item ids of text."""
    ids = ["tea", "ham", "egg, big", 'oil "x"', "rye", "fig"]
    return on_disk(tmp_path, HISTORIES, [7, 8, 9], ids)


def put(tmp_path, text, name="lists.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def put_table(tmp_path, columns):
    path = tmp_path / "lists.parquet"
    pq.write_table(pa.table(columns), path)
    return path


# --- reading and writing what is right


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("ids", ["numbers", "words"])
def test_round_trip_of_the_long_form(tmp_path, request, suffix, ids):
    data = request.getfixturevalue("shop" if ids == "numbers" else "words")
    lists = np.array([[5, 0, 3], [1, -1, -1], [-1, 2, 4]], np.int32)
    scores = np.array([[3.5, 1e-9, -2.0], [7.0, -np.inf, -np.inf], [-np.inf, 0.5, 0.25]])
    path = tmp_path / f"lists{suffix}"
    write_ranked(path, data, [2, 0, 1], lists, scores)
    got = read_ranked(path, data)
    assert got.users.tolist() == [0, 1, 2]
    assert got.lists.tolist() == [[1, -1, -1], [2, 4, -1], [5, 0, 3]]
    assert got.lengths.tolist() == [1, 2, 3]
    assert got.notes == ()
    assert read_ranked(path, data, k=1).lists.tolist() == [[1], [2], [5]]
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "shop"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_of_the_wide_form(tmp_path, shop, suffix):
    path = tmp_path / f"lists{suffix}"
    write_ranked(path, shop, [1, 0], [[4, 3, -1], [0, -1, 2]], form="wide")
    got = read_ranked(path, shop)
    assert got.users.tolist() == [0, 1]
    assert got.lists.tolist() == [[0, 2], [4, 3]]


def test_what_is_in_the_files(tmp_path, words):
    titles = pa.table({"title": ["Tea", None, "Eggs", "Oil", "Rye", "Fig"]})
    data = on_disk(
        tmp_path / "b", HISTORIES, ["ann", "bob", "cy"], [10, 20, 30, 40, 50, 60], titles
    )
    write_ranked(tmp_path / "a.csv", data, [1], [[2, 1]])
    assert (tmp_path / "a.csv").read_text() == "user_id,item_id,rank\nbob,30,1\nbob,20,2\n"
    write_ranked(tmp_path / "a.csv", data, [1], [[2, 1]], form="wide")
    assert (tmp_path / "a.csv").read_text() == "user_id,items\nbob,30 20\n"
    write_ranked(tmp_path / "a.csv", words, [1], [[2, 3]], [[0.5, 0.25]])
    quoted = '"user_id","item_id","rank","score"\n8,"egg, big",1,0.5\n8,"oil ""x""",2,0.25\n'
    assert (tmp_path / "a.csv").read_text() == quoted
    write_ranked(tmp_path / "a.parquet", data, [1], [[2, 1]], [[0.5, 0.25]], titles=True)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.to_pydict() == {
        "user_id": ["bob", "bob"],
        "item_id": [30, 20],
        "rank": [1, 2],
        "score": [0.5, 0.25],
        "title": ["Eggs", None],
    }
    write_ranked(tmp_path / "a.parquet", data, [1, 2], [[2, 1], [0, -1]], form="wide")
    wide = {"user_id": ["bob", "cy"], "items": [[30, 20], [10]]}
    assert pq.read_table(tmp_path / "a.parquet").to_pydict() == wide


def test_writing_in_blocks_is_writing_at_once(tmp_path, shop, monkeypatch):
    lists = [[0, 1], [2, 3], [4, 5]]
    write_ranked(tmp_path / "a.csv", shop, [0, 1, 2], lists)
    monkeypatch.setattr(ranked_writer, "_BLOCK_USERS", 2)
    write_ranked(tmp_path / "b.csv", shop, [0, 1, 2], lists)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_no_lists_write_a_header(tmp_path, shop):
    write_ranked(tmp_path / "a.csv", shop, np.zeros(0, np.int32), np.zeros((0, 3), np.int32))
    assert (tmp_path / "a.csv").read_text() == "user_id,item_id,rank\n"


def test_rows_in_any_order_follow_the_rank(tmp_path, shop):
    text = "rank,user_id,item_id\n2,bob,20\n3,bob,30\n1,ann,60\n1.0,bob,10\n"
    got = read_ranked(put(tmp_path, text), shop)
    assert got.users.tolist() == [0, 1]
    assert got.lists.tolist() == [[5, -1, -1], [0, 1, 2]]


def test_without_ranks_the_score_ranks(tmp_path, shop):
    text = "user_id,item_id,score\nann,20,0.5\nann,10,0.5\nann,30,2\nbob,40,-1\n"
    got = read_ranked(put(tmp_path, text), shop)
    assert got.lists.tolist() == [[2, 1, 0], [3, -1, -1]]
    assert got.notes == ("lists.csv has no column rank: ranked by score",)


def test_scores_that_contradict_the_ranks_are_told(tmp_path, shop):
    text = "user_id,item_id,rank,score\nann,20,1,0.5\nann,10,2,0.6\nbob,40,1,3\nbob,10,2,3\n"
    got = read_ranked(put(tmp_path, text), shop)
    assert got.lists.tolist() == [[1, 0], [3, 0]]
    assert got.notes == ("scores rise with rank for 1 users; the rank was followed",)


@pytest.mark.parametrize("items", ["20 10", " 20  10 ", '"20,10"', '"[20, 10]"', "20|10", "20;10"])
def test_wide_text_of_whole_numbers(tmp_path, shop, items):
    got = read_ranked(put(tmp_path, f"user_id,items\nbob,{items}\n"), shop)
    assert got.lists.tolist() == [[1, 0]]


def test_wide_text_of_words_with_a_separator(tmp_path, words):
    text = 'user_id,items\n8,"tea;egg, big"\n7,fig\n9,\n'
    got = read_ranked(put(tmp_path, text), words, item_separator=";")
    assert got.users.tolist() == [0, 1]
    assert got.lists.tolist() == [[5, -1], [0, 2]]


def test_other_column_names_and_a_byte_order_mark(tmp_path, shop):
    text = "\ufeffwho,what,place,more\r\nbob,20,1,x\r\nbob,10,2,y\r\n"
    got = read_ranked(
        put(tmp_path, text), shop, user_column="who", item_column="what", rank_column="place"
    )
    assert got.lists.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([20, 10], pa.int32()),
        pa.array([20.0, 10.0]),
        pa.array(["20", "10"]),
        pa.array(["20", "10"], pa.large_string()),
        pa.array(["20", "10"]).dictionary_encode(),
    ],
    ids=str,
)
def test_ids_of_any_column_type(tmp_path, shop, column):
    users = pa.array(["bob", "bob"]).dictionary_encode()
    path = put_table(tmp_path, {"user_id": users, "item_id": column, "rank": [1, 2]})
    assert read_ranked(path, shop).lists.tolist() == [[1, 0]]


# --- what is wrong


LONG = "user_id,item_id,rank\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, wanted a header row"),
        (LONG, "holds no rows"),
        ("user_id,rank\nann,1\n", "has no column item_id, it has user_id, rank; wanted user_id,"),
        ("item_id,rank\n10,1\n", "has no column user_id, it has item_id, rank"),
        ("users,items\nann,10\n", "has no column user_id, it has users, items"),
        ("user_id,item_id\nann,10\n", "has neither a column rank nor score, it has user_id, item"),
        ("a,b\n1,2\n", "has no column user_id, it has a, b"),
        ("user_id,item_id,item_id,rank\nann,1,1,1\n", "the column item_id stands 2 times"),
        (LONG + "ann,10,1\nzoe,10,1\n", "row 3: user 'zoe' is not in the data set shop"),
        (LONG + "ann,10,1\nann,99,2\n", "row 3: item '99' is not in the data set shop"),
        (LONG + "ann,010,1\n", "row 2: item '010' is not in the data set shop; did you mean 10"),
        (LONG + "ann,10,1\n,20,1\n", "row 3: user_id is empty"),
        (LONG + "ann,,1\n", "row 2: item_id is empty"),
        (LONG + "ann,10,1\nbob,10,1\nann,10,2\n", "row 4: item 10 stands twice for user 'ann' "
         r"\(also in row 2\)"),
        (LONG + "ann,10,1\nann,20,3\n", "row 3: rank 3 of user 'ann' has no rank 2 before it"),
        (LONG + "ann,10,2\n", "row 2: rank 2 of user 'ann' has no rank 1 before it"),
        (LONG + "ann,10,1\nann,20,1\n", r"rank 1 stands twice for user 'ann' \(also in row 2\)"),
        (LONG + "ann,10,0\nann,20,1\n", "row 2: rank is 0, wanted whole numbers from 1"),
        (LONG + "ann,10,1.5\n", "row 2: rank is 1.5, wanted whole numbers from 1"),
        (LONG + "ann,10,1\nann,20,two\n", "row 3: rank is 'two', wanted a number"),
        (LONG + "ann,10,\n", "row 2: rank is '', wanted a number"),
        ("user_id,item_id,score\nann,10,nan\n", "row 2: score is nan, wanted a finite number"),
        ("user_id,item_id,score\nann,10,1\nann,20,inf\n", "row 3: score is inf, wanted a finite"),
        (LONG + "ann,10,1\nann,20\n", "row 3: has 2 fields, the header has 3"),
        (LONG + "ann,10,1,5\n", "row 2: has 4 fields, the header has 3"),
        ((LONG + "ann,10,1\n").encode() + b"b\xffb,10,1\n", "row 3: is not UTF-8 text"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        ("user_id,items\nann,10 20\nbob,30 99\n", "row 3: item '99' is not in the data set"),
        ("user_id,items\nann,10 20\nann,30\n", "row 3: user 'ann' has a row already"),
        ("user_id,items\nann,10\nbob,30 20 30\n", "row 3: item 30 stands twice for user 'bob'$"),
        ("user_id,items\nann,\nbob, \n", "every list is empty"),
    ],
)  # fmt: skip
def test_wrong_csv_is_one_clear_line(tmp_path, shop, text, message):
    path = put(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        read_ranked(path, shop)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["ann", None], "item_id": [10, 20], "rank": [1, 1]}, "row 2: user_id is empt"),
        ({"user_id": ["ann"], "item_id": [10.5], "rank": [1]}, "row 1: item_id is 10.5, wanted an"),
        ({"user_id": ["ann"], "item_id": [True], "rank": [1]}, "item_id holds bool, wanted whole"),
        ({"user_id": ["ann"], "item_id": [10], "rank": [[1]]}, "rank holds list<.*>, wanted numb"),
        ({"user_id": ["ann", "ann"], "item_id": [10, 20], "rank": [1, None]}, "row 2: rank is emp"),
        ({"user_id": ["ann"], "items": [10]}, "items holds int64, wanted a list of ids or text"),
        ({"user_id": ["ann", "bob"], "items": [[10], [20, None]]}, "row 2: items is empty"),
        ({"user_id": ["ann", "bob"], "items": [[10], [20, 99]]}, "row 2: item 99 is not in the"),
        ({"user_id": ["ann", "bob"], "items": [[], None]}, "every list is empty|holds null"),
    ],
)  # fmt: skip
def test_wrong_parquet_is_one_clear_line(tmp_path, shop, columns, message):
    path = put_table(tmp_path, columns)
    with pytest.raises(UserError, match=message) as caught:
        read_ranked(path, shop)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_cannot_be_read(tmp_path, shop):
    whole = gzip.compress(LONG.encode() + b"ann,10,1\n" * 500)
    spoilt = bytearray(whole)
    spoilt[-8] ^= 1
    for name, content, message in (
        ("a.csv.gz", b"user_id,item_id,rank\n", "not a whole gzip file|cannot be read"),
        ("a.csv.gz", whole[:30], "not a whole gzip file|cannot be read"),
        ("a.csv.gz", whole[:-12], "cannot be read|not a whole gzip"),
        ("a.parquet", b"PAR1 not really", "is not a whole Parquet file"),
        ("a.xlsx", b"", r"wanted a file named \*.csv, \*.csv.gz, \*.tsv"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_ranked(put(tmp_path, content, name), shop)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no such file"):
        read_ranked(tmp_path / "no.csv", shop)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder, wanted a file"):
        read_ranked(tmp_path / "folder.csv", shop)
    with pytest.raises(UserError, match="k must be at least 1, got 0"):
        read_ranked(tmp_path / "no.csv", shop, k=0)


def test_writer_refuses(tmp_path, shop):
    out = tmp_path / "out.csv"
    for arguments, options, message in (
        (([0], [0, 1]), {}, r"wanted users \[n\] and lists \[n, K\], got \(1,\) and \(2,\)"),
        (([0, 0], [[0], [1]]), {}, "a user has two lists, wanted one"),
        (([0.0], [[0]]), {}, "user indices must be integers, got float64"),
        (([3], [[0]]), {}, "user indices must lie between 0 and 2"),
        (([0], [[6]]), {}, "item indices must lie between -1 and 5"),
        (([0], [[0]], [[np.nan]]), {}, "the score of an item is not a finite number"),
        (([0], [[0]], [[0.0, 1.0]]), {}, r"wanted a score a slot, \(1, 1\), got \(1, 2\)"),
        (([0], [[0]]), {"form": "tall"}, "form must be one of long, wide, got 'tall'"),
        (([0], [[0]]), {"titles": True}, "shop has no item titles to write"),
        (([0], [[0]], [[1.0]]), {"form": "wide"}, "the wide form has no place for scores"),
    ):
        with pytest.raises(UserError, match=message):
            write_ranked(out, shop, *arguments, **options)
    with pytest.raises(UserError, match=r"wanted a file named \*.csv"):
        write_ranked(tmp_path / "out.txt", shop, [0], [[0]])
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        write_ranked(tmp_path / "no" / "out.csv", shop, [0], [[0]])
    (tmp_path / "out.parquet").mkdir()
    with pytest.raises(UserError, match="is a folder, wanted a file name"):
        write_ranked(tmp_path / "out.parquet", shop, [0], [[0]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "shop"]


def test_ids_with_spaces_do_not_fit_the_wide_text(tmp_path, words):
    with pytest.raises(UserError, match="item id 'egg, big' holds a space"):
        write_ranked(tmp_path / "a.csv", words, [0], [[0]], form="wide")
    write_ranked(tmp_path / "a.parquet", words, [0], [[2, 3]], form="wide")
    assert read_ranked(tmp_path / "a.parquet", words).lists.tolist() == [[2, 3]]


def write_blocks(path, shop, blocks, end=None):
    with RankedWriter(path, shop) as out:
        for users, lists in blocks:
            out.write(users, lists)
        if end is not None:
            raise end


def test_one_user_in_two_blocks(tmp_path, shop):
    with pytest.raises(UserError, match="a user has two lists"):
        write_blocks(tmp_path / "a.csv", shop, [([0], [[0]]), ([0], [[1]])])
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt])
def test_interrupted_writing_leaves_the_old_file(tmp_path, shop, suffix, end):
    path = tmp_path / f"lists{suffix}"
    write_ranked(path, shop, [0], [[0]])
    before = path.read_bytes()
    with pytest.raises(end):
        write_blocks(path, shop, [([0], [[1]])], end)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "shop"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, shop, suffix):
    resource = pytest.importorskip("resource")
    lists = np.tile(np.arange(6, dtype=np.int32), (3, 1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: "):
            write_ranked(tmp_path / f"a{suffix}", shop, [0, 1, 2], lists)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["shop"]


# --- evaluation


def test_evaluation_of_a_file(tmp_path, shop):
    # Targets: ann 40, bob 10, cy 20.
    text = LONG + "cy,60,1\ncy,20,2\nann,40,1\nann,50,2\nbob,60,1\nbob,20,2\n"
    split = leave_one_out(shop)
    got = evaluate_ranked(put(tmp_path, text), shop, split, ks=(1, 2))
    wanted = ranking_metrics([[3, 4], [5, 1], [5, 1]], [3, 0, 1], 6, ks=(1, 2))
    assert dict(got) == wanted
    assert got["hr@2"] == pytest.approx(2 / 3)
    assert got["hr@1"] == pytest.approx(1 / 3)
    assert got["coverage@2"] == pytest.approx(4 / 6)
    # cy's 60 was seen.
    assert got.seen_listed == 1
    assert got.notes == ("1 listed items stand in the history of their user",)
    # Validation targets: 30, 50, 10.
    other = evaluate_ranked(put(tmp_path, text), shop, split, part="validation", ks=(2,))
    assert other["hr@2"] == 0.0
    assert other.notes[0].startswith("no list names a target: lists made from whole histories")


def test_missing_users_are_misses(tmp_path, shop):
    # The one in the middle: a list that lands on another user's row would find nothing.
    text = LONG + "bob,10,1\nbob,20,2\nbob,60,3\n"
    got = evaluate_ranked(put(tmp_path, text), shop, leave_one_out(shop), ks=(1, 3))
    assert got["hr@1"] == pytest.approx(1 / 3)
    assert got["coverage@3"] == pytest.approx(3 / 6)
    assert got.per_list["hr@1"].tolist() == [0.0, 1.0, 0.0]
    assert got.notes == ("2 of 3 users have no list and count as misses",)


def test_lists_that_are_too_short(tmp_path, shop):
    path = put(tmp_path, "user_id,items\nann,50 40 60\nbob,10\ncy,20 30\n")
    split = leave_one_out(shop)
    with pytest.raises(UserError, match=r"longest list holds 3 items, too few .* of 5: .* up to 3"):
        evaluate_ranked(path, shop, split, ks=(1, 5))
    got = evaluate_ranked(path, shop, split, ks=(1, 3))
    assert got["hr@1"] == pytest.approx(2 / 3)
    assert got["hr@3"] == 1.0
    assert got.notes == ("2 lists hold fewer than 3 items",)


def test_a_catalogue_smaller_than_the_cut_off(tmp_path, shop):
    path = put(tmp_path, "user_id,items\nann,40 10 20 30 50 60\nbob,40 10 20 30 50 60\n")
    got = evaluate_ranked(path, shop, leave_one_out(shop), ks=(10,))
    assert got["hr@10"] == pytest.approx(2 / 3)
    assert "fewer than" not in " ".join(got.notes)


def test_users_without_a_target(tmp_path):
    shop = on_disk(tmp_path, [[0, 1, 2], [1, 2]], ["ann", "bob"], [10, 20, 30])
    split = leave_one_out(shop)
    path = put(tmp_path, "user_id,items\nbob,10\nann,30\n")
    got = evaluate_ranked(path, shop, split, ks=(1,))
    assert got["hr@1"] == 1.0
    assert got["coverage@1"] == pytest.approx(1 / 3)
    assert got.notes == ("1 users of the file have no target and are left out",)
    with pytest.raises(UserError, match="none of its 1 users has a target in the test part of sho"):
        evaluate_ranked(put(tmp_path, "user_id,items\nbob,10\n"), shop, split, ks=(1,))


def test_several_targets_of_a_user_judge_one_list(tmp_path, rng):
    shop = write_prepared(
        tmp_path / "shop",
        name="shop",
        users=np.repeat([0, 1], 6),
        items=np.array([0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]),
        timestamps=np.tile(np.arange(6), 2),
        ratings=None,
        user_ids=["ann", "bob"],
        item_ids=[10, 20, 30, 40, 50, 60],
        source={},
        tie_order="as given",
    )
    split = temporal(shop, 0.6, 0.5, target="all")
    relevant = [shop.items[split.test.targets[split.test.users == user]] for user in (0, 1)]
    assert [len(items) for items in relevant] == [2, 2]
    got = evaluate_ranked(
        put(tmp_path, "user_id,items\nann,50 10\nbob,10 20\n"), shop, split, ks=(2,)
    )
    assert got["recall@2"] == pytest.approx((1 / 2 + 1) / 2)
    assert got["precision@2"] == pytest.approx((1 / 2 + 1) / 2)
    assert got.num_targets == 4
    # ann's 10 is in the history before the first target; bob's own targets are not.
    assert got.seen_listed == 1


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_our_own_lists_evaluate_to_the_same(tmp_path, rng, suffix):
    histories = [rng.integers(0, 40, rng.integers(3, 9)).tolist() for _ in range(50)]
    shop = on_disk(tmp_path, histories, [f"u{i}" for i in rng.permutation(50)], rng.permutation(40))
    split = leave_one_out(shop)
    lists = popularity(shop, split, k=10)
    path = tmp_path / f"lists{suffix}"
    order = rng.permutation(len(lists))
    write_ranked(path, shop, split.test.users[order], lists[order])
    got = evaluate_ranked(path, shop, split, ks=(1, 10))
    assert dict(got) == dict(evaluate_lists(lists, shop, split.test, ks=(1, 10)))
    assert got.notes == ()


def test_a_file_of_another_library(tmp_path, shop):
    """What a data frame writes: an index column, floats for ranks."""
    path = tmp_path / "lists.csv"
    table = pa.table(
        {"": [0, 1], "user_id": ["ann", "ann"], "item_id": [40, 50], "rank": [1.0, 2.0]}
    )
    pacsv.write_csv(table, path)
    assert read_ranked(path, shop).lists.tolist() == [[3, 4]]
