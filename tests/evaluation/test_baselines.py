"""Popularity and most-recent lists against plain loops, and what they may look at."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import baselines as oracle
from toy_sets import in_memory

from jaxrec.data.splits import leave_one_out, temporal
from jaxrec.errors import UserError
from jaxrec.evaluation import _questions
from jaxrec.evaluation.baselines import (
    NEVER,
    evaluate_baselines,
    most_recent,
    popularity,
    popularity_scores,
    recency_scores,
)
from jaxrec.evaluation.results import evaluate_lists


@st.composite
def sets(draw):
    """A few users with repeats, ties in time and in popularity, and items nobody took."""
    num_items = draw(st.integers(2, 9))
    item = st.integers(0, num_items - 1)
    histories = draw(st.lists(st.lists(item, min_size=3, max_size=9), min_size=1, max_size=6))
    times = [sorted(draw(st.integers(0, 5)) for _ in history) for history in histories]
    return in_memory(histories, num_items, times)


@settings(deadline=None, max_examples=150)
@given(sets(), st.integers(1, 11), st.integers(1, 12), st.sampled_from(["validation", "test"]))
def test_lists_equal_plain_loops(shop, k, block, part):
    split = leave_one_out(shop)
    targets = getattr(split, part)
    counts = oracle.training_counts(shop.items, split.train, shop.num_items)
    last = oracle.training_last_times(
        shop.items, shop.timestamps, split.train, shop.num_items, NEVER
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_questions, "_BLOCK_EVENTS", block)
        patch.setattr(_questions, "_BLOCK_ROWS", 2)
        assert popularity_scores(shop, split).tolist() == counts
        assert recency_scores(shop, split).tolist() == last
        for rank, scores in ((popularity, counts), (most_recent, last)):
            got = rank(shop, split, part=part, k=k)
            assert got.dtype == np.int32
            assert got.tolist() == oracle.ranked_lists(scores, shop.items, targets, k, True)
        got = popularity(shop, split, part=part, k=k, filter_seen=False)
        assert got.tolist() == oracle.ranked_lists(counts, shop.items, targets, k, False)
        got = most_recent(shop, split, part=part, k=k, filter_seen=False)
        assert got.tolist() == oracle.own_most_recent(last, shop.items, targets, k)


def test_by_hand():
    # Training: 0 1 | 0 2 | 3 0; validation 4, 1, 1; test 2, 4, 5.
    shop = in_memory(
        [[0, 1, 4, 2], [0, 2, 1, 4], [3, 0, 1, 5]],
        6,
        [[1, 2, 3, 4], [5, 9, 10, 11], [1, 7, 8, 9]],
    )
    split = leave_one_out(shop)
    assert popularity_scores(shop, split).tolist() == [3, 1, 1, 1, 0, 0]
    assert recency_scores(shop, split).tolist() == [7, 2, 9, 1, NEVER, NEVER]
    assert popularity(shop, split, k=4).tolist() == [[2, 3, 5, -1], [3, 4, 5, -1], [2, 4, 5, -1]]
    assert popularity(shop, split, part="validation", k=2).tolist() == [[2, 3], [1, 3], [1, 2]]
    assert most_recent(shop, split, k=2).tolist() == [[2, 3], [3, 4], [2, 4]]
    repeats = most_recent(shop, split, k=4, filter_seen=False)
    assert repeats.tolist() == [[4, 1, 0, 2], [1, 2, 0, 3], [1, 0, 3, 2]]
    results = evaluate_baselines(shop, split, ks=(1, 2))
    assert results["popularity"]["hr@1"] == pytest.approx(1 / 3)
    assert results["popularity"]["hr@2"] == pytest.approx(2 / 3)
    assert results["popularity"]["coverage@2"] == pytest.approx(3 / 6)
    assert results["most_recent"]["hr@2"] == pytest.approx(2 / 3)
    assert results["popularity"].seen_listed == 0


@pytest.mark.parametrize("scores", [popularity_scores, recency_scores])
def test_what_is_held_out_is_not_counted(rng, scores):
    histories = rng.integers(0, 20, (30, 6)).tolist()
    times = [list(range(6))] * 30
    shop = in_memory(histories, 20, times)
    other = in_memory([[*history[:-2], 7, 7] for history in histories], 20, times)
    wanted = scores(shop, leave_one_out(shop))
    np.testing.assert_array_equal(scores(other, leave_one_out(other)), wanted)
    # It does depend on training events.
    moved = in_memory([[*history[:3], 7, *history[4:]] for history in histories], 20, times)
    assert (scores(moved, leave_one_out(moved)) != wanted).any()


@settings(deadline=None, max_examples=60)
@given(sets())
def test_temporal_split_with_all_targets(shop):
    try:
        split = temporal(shop, 0.6, 0.6, target="all")
    except UserError:
        assume(False)
    counts = oracle.training_counts(shop.items, split.train, shop.num_items)
    assert popularity_scores(shop, split).tolist() == counts
    got = popularity(shop, split, k=3)
    assert got.tolist() == oracle.ranked_lists(counts, shop.items, split.test, 3, True)

    # One list a user, from the history before the first target.
    by_user = popularity(shop, split, k=3, by_user=True)
    users = np.unique(split.test.users)
    first = [np.flatnonzero(split.test.users == user)[0] for user in users]
    wanted = oracle.ranked_lists(counts, shop.items, split.test.take(np.array(first)), 3, True)
    assert by_user.tolist() == wanted
    result = evaluate_lists(by_user, shop, split.test, ks=(3,), by_user=True)
    targets = [shop.items[split.test.targets[split.test.users == user]] for user in users]
    hits = [bool(set(row) & set(mine.tolist())) for row, mine in zip(wanted, targets, strict=True)]
    assert result["hr@3"] == pytest.approx(np.mean(hits))
    assert result.users.tolist() == users.tolist()
    backwards = split.test.take(np.arange(len(split.test))[::-1])
    again = evaluate_lists(by_user, shop, backwards, ks=(3,), by_user=True)
    assert dict(again) == dict(result)


def test_order_of_targets_does_not_matter(rng):
    shop = in_memory(rng.integers(0, 12, (9, 8)).tolist(), 12, [list(range(8))] * 9)
    split = leave_one_out(shop)
    order = rng.permutation(9)
    shuffled = dataclasses.replace(split, test=split.test.take(order))
    for rank in (popularity, most_recent):
        np.testing.assert_array_equal(rank(shop, shuffled, k=5), rank(shop, split, k=5)[order])
        # By user, the answer follows the users' indices.
        np.testing.assert_array_equal(
            rank(shop, shuffled, k=5, by_user=True), rank(shop, split, k=5)
        )


def test_without_timestamps():
    shop = in_memory([[0, 1, 2, 3], [1, 2, 0, 3]], 5)
    split = leave_one_out(shop)
    with pytest.raises(UserError, match="toy has no timestamps"):
        most_recent(shop, split, k=2)
    assert list(evaluate_baselines(shop, split, ks=(1,))) == ["popularity"]
    # Repeats need no order between users; popularity (1, then 0 and 2) fills the list.
    got = most_recent(shop, split, k=5, filter_seen=False)
    assert got.tolist() == [[2, 1, 0, 3, 4], [0, 2, 1, 3, 4]]
    both = evaluate_baselines(shop, split, ks=(1,), filter_seen=False)
    assert list(both) == ["popularity", "most_recent"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), max_size=12),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_blocks_of_histories_are_all_ranges_within_the_bounds(ranges, most_events, most_rows):
    starts = np.array([start for start, _ in ranges], np.int64)
    stops = starts + np.array([length for _, length in ranges], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_questions, "_BLOCK_EVENTS", most_events)
        patch.setattr(_questions, "_BLOCK_ROWS", most_rows)
        blocks = list(_questions.histories(starts, stops))
    got = [[] for _ in ranges]
    at = 0
    for rows, owners, events in blocks:
        assert rows.start == at < rows.stop <= at + most_rows
        assert len(events) <= most_events or rows.stop == at + 1
        for owner, event in zip(owners, events, strict=True):
            got[at + owner].append(int(event))
        at = rows.stop
    assert at == len(ranges)
    for one, following in pairwise(blocks):
        room = len(one.events) + ranges[following.rows.start][1] <= most_events
        assert not room or one.rows.stop - one.rows.start == most_rows
    assert got == [list(range(start, start + length)) for start, length in ranges]


def test_bad_arguments():
    shop = in_memory([[0, 1, 2]], 3)
    split = leave_one_out(shop)
    with pytest.raises(UserError, match="k must be at least 1, got 0"):
        popularity(shop, split, k=0)
    with pytest.raises(UserError, match="part must be one of validation, test, got 'train'"):
        popularity(shop, split, part="train")
    empty = dataclasses.replace(split, test=split.test.take(np.zeros(1, bool)))
    with pytest.raises(UserError, match="the test part of the split leave_one_out has no targets"):
        popularity(shop, empty)
