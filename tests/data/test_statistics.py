"""Figures of a set that can be counted by hand."""

import json

import numpy as np
import pyarrow as pa
import pytest
from event_sets import make_set

from jaxrec.data.statistics import describe, list_prepared


def test_describe_by_hand(tmp_path):
    shop = make_set(
        tmp_path / "shop",
        users=[0, 0, 0, 0, 1, 1, 2],
        items=[0, 1, 1, 0, 2, 0, 0],
        timestamps=[10, 10, 11, 11, 11, 12, 86400],
        ratings=[1, 2, 3, 4, 5, 5, 1],
        item_table=pa.table({"title": ["A", None, "C"]}),
    )
    figures = describe(shop)
    assert (figures["users"], figures["items"], figures["events"]) == (3, 3, 7)
    assert figures["density"] == pytest.approx(7 / 9)
    assert figures["events_per_user"]["min"] == 1
    assert figures["events_per_user"]["median"] == 2
    assert figures["events_per_user"]["max"] == 4
    assert figures["events_per_user"]["mean"] == pytest.approx(7 / 3)
    assert figures["events_per_item"]["max"] == 4
    assert set(figures["events_per_user"]) == {
        "mean",
        "min",
        "p5",
        "p25",
        "median",
        "p75",
        "p95",
        "max",
    }
    # counts 1, 2, 4: mean absolute difference over all pairs, halved and divided by the mean
    assert figures["item_gini"] == pytest.approx((1 + 3 + 2) * 2 / 9 / (2 * 7 / 3))
    assert figures["top_1_percent_share"] == pytest.approx(4 / 7)
    # user 1 begins at the time user 0 ends at, which is no tie
    # steps: 0-1 tied, 1-1, 1-0 tied of user 0; 2-0 of user 1
    assert figures["tied_steps"] == pytest.approx(2 / 4)
    assert figures["users_with_tied_last_events"] == pytest.approx(1 / 2)
    assert figures["repeated_events"] == pytest.approx(2 / 7)
    assert figures["immediate_repeats"] == pytest.approx(1 / 4)
    assert figures["first_time"] == "1970-01-01 00:00:10+00:00"
    assert figures["last_time"] == "1970-01-02 00:00:00+00:00"
    assert figures["ratings"] == {"mean": 3.0, "min": 1.0, "max": 5.0}
    assert figures["titles"] == 2
    assert figures["vector_width"] is None
    json.dumps(figures, allow_nan=False)


def test_describe_without_time_ratings_or_steps(tmp_path):
    bare = make_set(tmp_path / "bare", [0, 1], [0, 0], item_vectors=np.ones((1, 5), np.float16))
    figures = describe(bare)
    assert figures["tied_steps"] is None
    assert figures["immediate_repeats"] is None
    assert figures["ratings"] is None
    assert figures["titles"] is None
    assert figures["time_unit"] is None
    assert figures["vector_width"] == 5
    assert figures["item_gini"] == 0
    json.dumps(figures, allow_nan=False)


def test_describe_reads_milliseconds(tmp_path):
    shop = make_set(tmp_path / "shop", [0, 0], [0, 1], [1500, 86_400_000], time_unit="ms")
    assert describe(shop)["first_time"] == "1970-01-01 00:00:01+00:00"
    assert describe(shop)["last_time"] == "1970-01-02 00:00:00+00:00"


def test_list_prepared(tmp_path):
    assert list_prepared(tmp_path / "nowhere") == []
    shop = make_set(tmp_path / "shop", [0, 1], [0, 0], [3, 4])
    make_set(tmp_path / "broken", [0, 1], [0, 0])
    (tmp_path / "broken" / "items.npy").unlink()
    (tmp_path / "no-set").mkdir()
    broken, listed = list_prepared(tmp_path)
    assert listed["name"] == "shop"
    assert (listed["users"], listed["items"], listed["events"]) == (2, 1, 2)
    assert listed["has_time"] is True
    assert listed["has_ratings"] is False
    assert listed["hash"] == shop.hash
    sizes = [f.stat().st_size for f in shop.path.iterdir() if f.name != "manifest.json"]
    assert listed["bytes"] == sum(sizes)
    assert listed["source"] == "test"
    assert broken["name"] == "broken"
    assert "items.npy: the file is missing" in broken["error"]
