"""Real data sets: each comes in with one call, and its counts are those its README states."""

import functools

import numpy as np
import pyarrow.csv as pacsv
import pytest
from shared_data import shared_data

from jaxrec.data.prepared import open_prepared
from jaxrec.data.splits import leave_one_out, temporal
from jaxrec.data.statistics import describe
from jaxrec.data.tabular import import_table
from jaxrec.errors import UserError

# folder: users, items with events, events, titles (None: no title column), vectors, first, last
SETS = {
    "amazon-2014-beauty": (22_363, 12_101, 198_502, 12_094, True, "2002-06-12", "2014-07-23"),
    "amazon-2014-sports": (35_598, 18_357, 296_337, 0, True, "2002-03-07", "2014-07-23"),
    "amazon-2014-toys": (19_412, 11_924, 167_597, None, True, "2000-07-28", "2014-07-23"),
    "movielens-1m": (6_040, 3_416, 999_611, 3_416, True, "2000-04-25", "2003-02-28"),
    "movielens-100k": (943, 1_682, 100_000, 1_682, False, "1997-09-20", "1998-04-22"),
    "food-com": (17_813, 41_240, 555_618, 41_240, False, "2000-09-12", "2018-12-18"),
    "kuairand-pure-slice": (25_156, 6_361, 228_329, None, False, "2022-04-24", "2022-05-08"),
}


def _import(folder, name, sets):
    vectors = folder / "item_emb_minilm.npy"
    return import_table(
        folder / "interactions.csv.gz",
        name,
        items_file=folder / "items.csv.gz",
        item_vectors_file=vectors if vectors.exists() else None,
        data_dir=sets,
    )


def _rows(name):
    """User and item ids of a file, row by row."""
    table = pacsv.read_csv(shared_data(name) / "interactions.csv.gz")
    return table["user_id"].to_numpy(), table["item_id"].to_numpy()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def imported(sets):
    """name -> the set, imported when first asked for."""
    return functools.cache(lambda name: _import(shared_data(name), name, sets))


@pytest.mark.parametrize("name", SETS)
def test_counts_are_those_of_the_readme(name, imported):
    users, items, events, titles, vectors, first, last = SETS[name]
    shop = imported(name)
    figures = describe(shop)
    assert (figures["users"], figures["items"], figures["events"]) == (users, items, events)
    assert figures["first_time"].startswith(first)
    assert figures["last_time"].startswith(last)
    if name == "amazon-2014-toys":  # "titles for 99.5 % of items"
        assert figures["titles"] / items == pytest.approx(0.995, abs=0.0006)
    else:
        assert figures["titles"] == titles
    assert figures["vector_width"] == (384 if vectors else None)
    assert shop.time_unit == ("ms" if name.startswith("kuairand") else "s")
    assert (shop.ratings is not None) == name.startswith("movielens")
    assert shop.user_ids.dtype == shop.item_ids.dtype == np.int64
    assert open_prepared(shop.path, verify=True).hash == shop.hash
    test = leave_one_out(shop).description
    if not name.startswith("kuairand"):
        assert test["test_users"] == users
        assert test["users_in_training_only"] == 0
    assert temporal(shop).description["test_users"] > 0


@pytest.mark.parametrize("name", ["amazon-2014-beauty", "movielens-1m"])
def test_histories_are_the_files_rows_in_their_order(name, imported):
    """These files hold the order their papers use, ties included, so sorting changes nothing."""
    shop = imported(name)
    users, items = _rows(name)
    owner = np.repeat(np.arange(shop.num_users), np.diff(shop.offsets))
    assert np.array_equal(shop.user_ids[owner], users)
    assert np.array_equal(shop.item_ids[shop.items], items)


def test_last_item_is_the_files_last_row(imported):
    movielens = imported("movielens-1m")
    last = dict(zip(*(column.tolist() for column in _rows("movielens-1m")), strict=True))
    test = leave_one_out(movielens).test
    targets = movielens.item_ids[movielens.items[test.targets]]
    users = movielens.user_ids[test.users]
    assert dict(zip(users.tolist(), targets.tolist(), strict=True)) == last
    # ties are what makes this hard: many a last event shares its second with the one before
    assert describe(movielens)["users_with_tied_last_events"] > 0.3


def test_movielens_in_detail(imported):
    movielens = imported("movielens-1m")
    assert np.bincount(movielens.ratings.astype(int)).tolist()[1:] == [
        56_062,
        107_449,
        261_034,
        348_811,
        226_255,
    ]
    figures = describe(movielens)["events_per_user"]
    assert (figures["min"], figures["max"]) == (18, 2_277)
    assert figures["mean"] == pytest.approx(165.5, abs=0.05)
    assert movielens.item_text(movielens.item_index("1")) == "Toy Story"
    assert movielens.manifest["source"]["items_file"] == {
        "rows": 3_883,
        "rows_without_events": 467,
        "items_without_a_row": 0,
    }
    vectors = np.load(shared_data("movielens-1m") / "item_emb_minilm.npy")
    assert np.array_equal(movielens.item_vectors[movielens.item_index(1)], vectors[0])


def test_rated_movielens_by_ratings_and_core(sets):
    folder = shared_data("movielens-100k")
    liked = import_table(
        folder / "interactions.csv.gz",
        "liked",
        min_rating=4,
        min_user_events=5,
        min_item_events=5,
        data_dir=sets,
    )
    assert liked.ratings.min() == 4
    assert np.diff(liked.offsets).min() >= 5
    assert np.bincount(liked.items).min() >= 5
    assert liked.num_events < 55_375  # ratings of 4 and 5 in the file
    assert liked.num_events > 54_000


def test_a_log_without_users_is_refused_with_advice(sets):
    """Rounds of a bandit belong to nobody: a choice of column is the user's to make."""
    folder = shared_data("open-bandit-sample")
    file = folder / "interactions_all_random.csv.gz"
    with pytest.raises(UserError, match=r"no column 'user_id' .*--user-column"):
        import_table(file, "bandit", data_dir=sets)
    assert not (sets / "bandit").exists()
    # the one way it has: a hashed feature in the place of the user
    shop = import_table(file, "bandit", user_column="user_feature_0", data_dir=sets)
    assert (shop.num_items, shop.num_events) == (80, 10_000)
    assert shop.time_unit == "us"
    assert describe(shop)["first_time"].startswith("2019-11-24")


def test_a_set_without_time_is_refused_with_advice(sets):
    folder = shared_data("gowalla-lightgcn")
    file = folder / "interactions.csv.gz"
    with pytest.raises(UserError, match=r"no column 'timestamp' .*--no-time"):
        import_table(file, "gowalla", data_dir=sets)
    shop = import_table(file, "gowalla", no_time=True, data_dir=sets)
    assert (shop.num_users, shop.num_items, shop.num_events) == (29_858, 40_981, 1_027_370)
    with pytest.raises(UserError, match="no timestamps"):
        temporal(shop)
