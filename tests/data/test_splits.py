"""Splits against plain loops, and what must hold of them whatever the data."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from event_sets import make_set
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import splits as oracle

from jaxrec import registry
from jaxrec.data.splits import Split, leave_one_out, make_split, resolve_split, temporal
from jaxrec.errors import UserError


def _targets(targets) -> list[tuple[int, ...]]:
    columns = (targets.users, targets.starts, targets.stops, targets.targets)
    return [tuple(int(value) for value in row) for row in zip(*columns, strict=True)]


def _train(split: Split) -> list[tuple[int, list[int]]]:
    spans = split.train
    return [
        (int(user), list(range(start, stop)))
        for user, start, stop in zip(spans.users, spans.starts, spans.stops, strict=True)
    ]


def _assert_equals(split: Split, expected: dict) -> None:
    assert _train(split) == expected["train"]
    assert _targets(split.validation) == expected["validation"]
    assert _targets(split.test) == expected["test"]


@st.composite
def logs(draw):
    """Events of up to eight users with many equal times."""
    count = draw(st.integers(8, 60))
    users = draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    items = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    times = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    return users, items, times


def test_leave_one_out_by_hand(tmp_path):
    shop = make_set(tmp_path / "shop", [0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 1, 2, 4, 0, 1])
    split = leave_one_out(shop)
    assert _train(split) == [(0, [0, 1]), (1, [4, 5]), (2, [6])]
    assert _targets(split.validation) == [(0, 0, 2, 2), (2, 6, 7, 7)]
    assert _targets(split.test) == [(0, 0, 3, 3), (2, 6, 8, 8)]
    assert split.description["users_in_training_only"] == 1
    assert split.description["test_users"] == 2
    # item 3 is user 0's test item and nobody's training item
    assert split.description["cold_test_targets"] == 1
    assert split.description["items_in_training"] == 4
    assert split.train.events().tolist() == [0, 1, 4, 5, 6]
    assert split.train.num_events == 5


@settings(max_examples=30, deadline=None)
@given(logs(), st.integers(3, 6))
def test_leave_one_out_is_the_oracle(log, min_events):
    with tempfile.TemporaryDirectory() as folder:
        shop = make_set(Path(folder, "shop"), *log)
        longest = int(np.diff(shop.offsets).max())
        if longest < min_events:
            with pytest.raises(UserError, match=f"no user has {min_events} events"):
                leave_one_out(shop, min_events)
            return
        split = leave_one_out(shop, min_events)
        _assert_equals(split, oracle.leave_one_out(shop.offsets.tolist(), min_events))
        events = split.train.events().tolist()
        held = [*split.validation.targets.tolist(), *split.test.targets.tolist()]
        assert sorted(events + held) == list(range(shop.num_events))


def test_leave_one_out_wants_three_events(tmp_path):
    shop = make_set(tmp_path / "shop", [0, 0, 0], [0, 1, 2])
    with pytest.raises(UserError, match="min_events is 2; leave-one-out needs at least 3"):
        leave_one_out(shop, min_events=2)


@settings(max_examples=60, deadline=None)
@given(
    logs(),
    st.sampled_from([0.3, 0.5, 0.75, 0.9]),
    st.sampled_from([0.4, 0.6, 0.9]),
    st.sampled_from(["last", "first", "all"]),
)
def test_temporal_is_the_oracle(log, quantile, validation_quantile, rule):
    with tempfile.TemporaryDirectory() as folder:
        shop = make_set(Path(folder, "shop"), *log)
        offsets, times = shop.offsets.tolist(), shop.timestamps.tolist()
        expected = oracle.temporal(offsets, times, quantile, validation_quantile, rule)
        if all(expected.values()):
            split = temporal(shop, quantile, validation_quantile, rule)
            _assert_equals(split, expected)
        else:
            with pytest.raises(UserError, match="choose"):
                temporal(shop, quantile, validation_quantile, rule)


@settings(max_examples=60, deadline=None)
@given(
    logs(),
    st.sampled_from([0.5, 0.8, 0.9]),
    st.sampled_from([0.5, 0.9]),
    st.sampled_from(["last", "first", "random", "all"]),
    st.integers(0, 5),
)
def test_nothing_of_the_future_enters_training(log, quantile, validation_quantile, rule, seed):
    with tempfile.TemporaryDirectory() as folder:
        shop = make_set(Path(folder, "shop"), *log)
        try:
            split = temporal(shop, quantile, validation_quantile, rule, seed)
        except UserError:
            return
        test_after = split.description["test_after"]
        validation_after = split.description["validation_after"]
        times = np.asarray(shop.timestamps)
        assert validation_after <= test_after
        assert times[split.train.events()].max() <= validation_after
        assert times[split.validation.targets].min() > validation_after
        assert times[split.validation.targets].max() <= test_after
        assert times[split.test.targets].min() > test_after
        for targets in (split.validation, split.test):
            owner = np.searchsorted(shop.offsets, targets.targets, side="right") - 1
            assert np.array_equal(owner, targets.users)
            assert np.array_equal(targets.starts, shop.offsets[targets.users])
            # everything before the target and nothing else, and never nothing
            assert np.array_equal(targets.stops, targets.targets)
            assert (targets.stops > targets.starts).all()
        if rule != "all":
            assert len(np.unique(split.test.users)) == len(split.test)


def test_temporal_by_hand(tmp_path):
    # user 0: 1 2 3 | 8 9; user 1: 1 4 | 9; user 2: 9 only; user 3: 5 | 10
    users = [0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 3]
    times = [1, 2, 3, 8, 9, 1, 4, 9, 9, 5, 10]
    shop = make_set(tmp_path / "shop", users, [0, 1, 2, 3, 4, 0, 1, 5, 6, 0, 7], times)
    split = temporal(shop, quantile=0.5, validation_quantile=0.5, target="last")
    assert split.description["test_after"] == 5
    # times up to 5 of users with two of them: 1 2 3 1 4
    assert split.description["validation_after"] == 2
    assert _train(split) == [(0, [0, 1])]
    assert _targets(split.validation) == [(0, 0, 2, 2), (1, 5, 6, 6)]
    assert _targets(split.test) == [(0, 0, 4, 4), (1, 5, 7, 7), (3, 9, 10, 10)]
    assert split.description["test_targets_without_context"] == 1
    assert split.description["cold_test_targets"] == 3
    assert split.description["test_after_utc"] == "1970-01-01 00:00:05 UTC"
    first = temporal(shop, 0.5, 0.5, "first")
    assert _targets(first.test) == [(0, 0, 3, 3), (1, 5, 7, 7), (3, 9, 10, 10)]
    every = temporal(shop, 0.5, 0.5, "all")
    assert _targets(every.test) == [(0, 0, 3, 3), (0, 0, 4, 4), (1, 5, 7, 7), (3, 9, 10, 10)]


def test_random_targets_follow_the_seed(tmp_path, rng):
    users = np.repeat(np.arange(40), 12)
    times = rng.integers(0, 1000, len(users))
    shop = make_set(tmp_path / "shop", users, rng.integers(0, 30, len(users)), times)
    once, again = temporal(shop, 0.5, target="random"), temporal(shop, 0.5, target="random")
    other = temporal(shop, 0.5, target="random", seed=1)
    assert np.array_equal(once.test.targets, again.test.targets)
    assert not np.array_equal(once.test.targets, other.test.targets)
    last = temporal(shop, 0.5, target="last")
    assert not np.array_equal(once.test.targets, last.test.targets)
    assert once.description["seed"] == 0
    assert last.description["seed"] is None


def test_times_beyond_float_precision_split_exactly(tmp_path):
    base = 1_700_000_000_000_000_000
    users = np.repeat(np.arange(5), 4)
    times = base + np.tile(np.arange(4), 5)
    shop = make_set(tmp_path / "shop", users, np.tile(np.arange(4), 5), times, time_unit="ns")
    split = temporal(shop, 0.6, 0.6)
    assert split.description["test_after"] == base + 2
    assert len(split.test) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 0.0}, "quantile is 0.0; wanted a number between 0 and 1"),
        ({"quantile": 1.0}, "quantile is 1.0"),
        ({"validation_quantile": 1.5}, "validation_quantile is 1.5"),
        ({"target": "second"}, "target is 'second'; wanted one of last, first, random, all"),
    ],
)
def test_temporal_refuses(tmp_path, options, message):
    shop = make_set(tmp_path / "shop", [0, 0, 0], [0, 1, 2], [1, 2, 3])
    with pytest.raises(UserError, match=message):
        temporal(shop, **options)


def test_temporal_needs_time(tmp_path):
    shop = make_set(tmp_path / "shop", [0, 0, 0], [0, 1, 2])
    with pytest.raises(UserError, match="shop: the set has no timestamps"):
        temporal(shop)


def test_temporal_says_which_part_is_empty(tmp_path):
    one_moment = make_set(tmp_path / "shop", [0, 0, 1, 1], [0, 1, 2, 0], [7, 7, 7, 7])
    with pytest.raises(UserError, match="nothing is left for validation after 1970-01-01 00:00:07"):
        temporal(one_moment)
    strangers = make_set(tmp_path / "strangers", [0, 1, 2, 3], [0, 1, 2, 0], [1, 2, 3, 4])
    with pytest.raises(UserError, match="no user has two events up to"):
        temporal(strangers)


def test_splits_have_names():
    assert resolve_split("leave_one_out") is leave_one_out
    assert resolve_split("leave-one-out") is leave_one_out
    assert resolve_split("temporal") is temporal
    assert resolve_split(temporal) is temporal
    with pytest.raises(UserError, match="unknown split 'loo'; known: leave_one_out, temporal"):
        resolve_split("loo")


def test_a_registered_split_resolves(monkeypatch):
    monkeypatch.setitem(registry._COMPONENTS, "split", dict(registry._COMPONENTS["split"]))
    registry.register("split", "mine", temporal)
    assert resolve_split("mine") is temporal


def test_make_split_checks_options(tmp_path):
    shop = make_set(tmp_path / "shop", [0] * 5, [0, 1, 2, 3, 4])
    assert make_split(shop, "leave_one_out", min_events=4).description["min_events"] == 4
    with pytest.raises(UserError, match="has no option 'quantil'; it has: min_events"):
        make_split(shop, "leave_one_out", quantil=0.9)


def test_take_keeps_rows_together(tmp_path):
    shop = make_set(tmp_path / "shop", [0] * 4 + [1] * 4, [0, 1, 2, 3] * 2)
    test = leave_one_out(shop).test
    assert _targets(test.take(np.array([1]))) == [_targets(test)[1]]
