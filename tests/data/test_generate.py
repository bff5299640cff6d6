"""The generated set: what is planted in it can be found, and it is the same each time."""

import re
import time

import numpy as np
import pytest

from jaxrec.data.generate import generate
from jaxrec.data.splits import leave_one_out, temporal
from jaxrec.data.statistics import describe
from jaxrec.errors import UserError


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return generate("shop", data_dir=tmp_path_factory.mktemp("sets"))


def _hit_rate(interactions, split, scores_of, k=10):
    items = np.asarray(interactions.items)
    hits = 0
    test = split.test
    for start, stop, target in zip(test.starts, test.stops, test.targets, strict=True):
        scores = scores_of(items[start:stop])
        scores[items[start:stop]] = -np.inf
        hits += int(np.sum(scores > scores[items[target]]) < k)
    return hits / len(test)


def _transitions(interactions, split, lag):
    items = np.asarray(interactions.items)
    counts = np.zeros((interactions.num_items, interactions.num_items))
    for start, stop in zip(split.train.starts, split.train.stops, strict=True):
        np.add.at(counts, (items[start : stop - lag], items[start + lag : stop]), 1)
    return counts / (counts.sum(axis=1, keepdims=True) + 1)


def test_order_tells_more_than_popularity(shop):
    split = leave_one_out(shop)
    items = np.asarray(shop.items)
    popular = np.bincount(items[split.train.events()], minlength=shop.num_items).astype(float)
    after = [_transitions(shop, split, lag) for lag in (1, 2, 3)]
    by_popularity = _hit_rate(shop, split, lambda history: popular.copy())
    by_last = _hit_rate(shop, split, lambda h: after[0][h[-1]] + 1e-9 * popular)
    by_lags = _hit_rate(
        shop, split, lambda h: sum(after[k][h[-1 - k]] for k in range(3)) + 1e-9 * popular
    )
    assert 0.03 < by_popularity < 0.15
    assert by_last > 5 * by_popularity
    assert by_lags > by_last + 0.03


def test_sequels_follow_at_each_lag(shop):
    """The part of events that continue the series of one, two or three events ago."""
    series = shop.item_table["series"].to_numpy(zero_copy_only=False)
    part = shop.item_table["part"].to_numpy()
    items = np.asarray(shop.items)
    owner = np.repeat(np.arange(shop.num_users), np.diff(shop.offsets))
    shares = []
    for lag in (1, 2, 3, 4):
        same = owner[lag:] == owner[:-lag]
        now, before = items[lag:][same], items[:-lag][same]
        shares.append(np.mean((series[now] == series[before]) & (part[now] == part[before] + 1)))
    assert shares[0] > 0.15
    assert shares[0] > shares[1] > shares[2] > 1.5 * shares[3]


def test_looks_like_a_shop(shop):
    assert (shop.num_users, shop.num_items) == (2000, 500)
    figures = describe(shop)
    assert 22 < figures["events_per_user"]["mean"] < 28
    assert figures["events_per_user"]["min"] >= 5
    assert figures["repeated_events"] == 0
    assert 0.1 < figures["tied_steps"] < 0.2
    assert figures["item_gini"] > 0.3
    assert figures["ratings"]["min"] == 1
    assert figures["ratings"]["max"] == 5
    assert np.all(np.asarray(shop.ratings) * 2 % 1 == 0)
    assert len(set(shop.item_titles)) == 500
    titled = re.compile(r"[A-Z][a-z]+ [A-Z][a-z-]+ [A-Z][a-z]+(, part [1-5])?")
    assert all(titled.fullmatch(title) for title in shop.item_titles)
    assert temporal(shop).description["test_users"] > 200
    assert shop.item_text(0) == shop.item_titles[0]


def test_index_tells_nothing_of_the_structure(shop):
    """Neighbours by index are of one genre no more often than chance has it."""
    genre = shop.item_table["genre"].to_numpy(zero_copy_only=False)
    assert np.mean(genre[1:] == genre[:-1]) < 0.2


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    def make(name, **options):
        return generate(name, users=60, items=80, events_per_user=8, data_dir=tmp_path, **options)

    one, same, other = make("one"), make("same"), make("other", seed=1)
    assert one.hash == same.hash
    assert one.hash != other.hash
    assert one.item_titles == same.item_titles
    assert one.manifest["options"]["seed"] == 0


def test_is_made_in_seconds(tmp_path):
    start = time.perf_counter()
    generate("shop", data_dir=tmp_path)
    assert time.perf_counter() - start < 6  # about one second on two free cores


def test_more_users_than_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrec.data.generate._USERS_AT_ONCE", 16)
    shop = generate("shop", users=40, items=60, events_per_user=5, data_dir=tmp_path)
    assert shop.num_users == 40
    assert np.diff(shop.offsets).min() >= 3
    histories = {tuple(shop.history(user).tolist()) for user in range(40)}
    assert len(histories) == 40


def test_small_catalogue_still_has_no_repeats(tmp_path):
    shop = generate("shop", users=30, items=20, events_per_user=10, data_dir=tmp_path)
    assert all(len(set(shop.history(u).tolist())) == len(shop.history(u)) for u in range(30))


def test_titles_stay_distinct_where_words_run_out(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrec.data.generate.ADJECTIVES", ("Odd",))
    monkeypatch.setattr("jaxrec.data.generate.FORMS", ("Tale",))
    shop = generate("shop", users=5, items=800, events_per_user=5, data_dir=tmp_path)
    assert len(set(shop.item_titles)) == 800


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 0}, "users is 0; wanted at least 1"),
        ({"items": 19}, "items is 19; wanted at least 20"),
        ({"events_per_user": 2}, "events_per_user is 2; wanted at least 3"),
        ({"items": 40, "events_per_user": 30}, "at most half the items"),
        ({"name": "../x"}, "cannot name a data set"),
    ],
)
def test_refuses(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        generate(**({"name": "shop", "data_dir": tmp_path} | options))
    assert list(tmp_path.iterdir()) == []
