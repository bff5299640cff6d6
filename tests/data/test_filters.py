"""Filters against plain loops."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from event_sets import make_set
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.filters import compact, k_core, refine
from jaxrec.errors import UserError


def _k_core(pairs, min_user, min_item):
    """Removes one user or item at a time until all have enough."""
    events = list(enumerate(pairs))
    while True:
        users = Counter(user for _, (user, _) in events)
        items = Counter(item for _, (_, item) in events)
        bad_users = [user for user, count in users.items() if count < min_user]
        bad_items = [item for item, count in items.items() if count < min_item]
        if bad_users:
            events = [event for event in events if event[1][0] != bad_users[0]]
        elif bad_items:
            events = [event for event in events if event[1][1] != bad_items[0]]
        else:
            return [number for number, _ in events]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=50),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_k_core_is_the_plain_loop(pairs, min_user, min_item):
    users, items = np.array(pairs).T
    kept = k_core(users, items, min_user, min_item)
    assert np.flatnonzero(kept).tolist() == _k_core(pairs, min_user, min_item)


def test_k_core_takes_several_rounds():
    # a chain in which each removal makes the next one necessary
    users = np.array([0, 0, 1, 1, 2, 2, 3])
    items = np.array([0, 1, 1, 2, 2, 3, 3])
    assert not k_core(users, items, 2, 2).any()
    assert k_core(users, items, 1, 2).sum() == 6


def test_k_core_of_nothing_and_of_the_wrong_shape():
    assert k_core(np.empty(0, int), np.empty(0, int), 5, 5).shape == (0,)
    with pytest.raises(ValueError, match="one event a row"):
        k_core(np.zeros(3, int), np.zeros(4, int), 1, 1)


def test_compact_keeps_the_order_of_ids():
    codes, ids = compact(np.array([4, 1, 4, 3]), pa.array(["a", "b", "c", "d", "e"]))
    assert ids.to_pylist() == ["b", "d", "e"]
    assert [ids[int(code)].as_py() for code in codes] == ["e", "b", "e", "d"]


@pytest.fixture
def shop(tmp_path):
    return make_set(
        tmp_path / "shop",
        users=[0, 0, 0, 0, 1, 1, 1, 2],
        items=[0, 0, 1, 0, 1, 2, 2, 3],
        timestamps=[1, 2, 3, 4, 1, 2, 3, 1],
        ratings=[5, 4, 3, 2, 1, 5, 5, 5],
        item_table=pa.table({"title": ["A", "B", None, "D"], "colour": [1, 2, 3, 4]}),
        item_vectors=np.arange(8, dtype=np.float32).reshape(4, 2),
    )


def test_refine_by_rating_keeps_what_belongs_to_the_items(shop, tmp_path):
    good = refine(shop, "good", min_rating=4, data_dir=tmp_path)
    assert [good.user_id(user) for user in range(good.num_users)] == [100, 101, 102]
    assert good.item_ids.tolist() == [500, 502, 503]
    assert good.item_titles == ["A", None, "D"]
    assert good.item_table["colour"].to_pylist() == [1, 3, 4]
    assert good.item_vectors.tolist() == [[0, 1], [4, 5], [6, 7]]
    assert good.history(1).tolist() == [1, 1]
    assert good.timestamps.tolist() == [1, 2, 2, 3, 1]
    assert good.ratings.tolist() == [5, 4, 5, 5, 5]
    assert good.manifest["source"] == {
        "kind": "refined",
        "name": "shop",
        "hash": shop.hash,
        "dropped": 3,
    }


def test_refine_drops_immediate_repeats_of_one_user_only(shop, tmp_path):
    # user 1 ends with 2, 2; user 0 returns to item 0 later, which is no immediate repeat
    quiet = refine(shop, "quiet", drop_consecutive_repeats=True, data_dir=tmp_path)
    assert quiet.history(0).tolist() == [0, 1, 0]
    assert quiet.history(1).tolist() == [1, 2]
    across = make_set(tmp_path / "across", [0, 0, 1, 1], [0, 1, 1, 0])
    kept = refine(across, "kept", drop_consecutive_repeats=True, data_dir=tmp_path)
    assert kept.num_events == 4


def test_refine_to_the_core(shop, tmp_path):
    core = refine(shop, "core", min_user_events=2, min_item_events=2, data_dir=tmp_path)
    assert core.num_users == 2
    assert core.num_events == 7
    assert core.item_ids.tolist() == [500, 501, 502]


def test_refine_refuses(shop, tmp_path):
    with pytest.raises(UserError, match="no event is left with min_user_events=9"):
        refine(shop, "none", min_user_events=9, data_dir=tmp_path)
    unrated = make_set(tmp_path / "unrated", [0, 0], [0, 1])
    with pytest.raises(UserError, match="min_rating needs ratings"):
        refine(unrated, "none", min_rating=1, data_dir=tmp_path)
    with pytest.raises(UserError, match="a data set of that name exists"):
        refine(shop, "shop", data_dir=tmp_path)
    assert not (tmp_path / "none").exists()
