"""Ranking metrics against hand-computed cases, plain loops, and properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ranking_metrics as oracle

from jaxrec.errors import UserError
from jaxrec.evaluation import metrics
from jaxrec.evaluation.metrics import RelevantSets, coverage, per_list, ranking_metrics

LOG2_3 = math.log2(3)


def test_single_target_by_hand():
    # Ranks of the targets: 1, 3, none, 2.
    lists = [[7, 1, 2], [0, 1, 5], [0, 1, 2], [3, 4, -1]]
    result = ranking_metrics(lists, [7, 5, 9, 4], num_items=10, ks=(1, 2, 3))
    assert result["hr@1"] == 0.25
    assert result["hr@2"] == 0.5
    assert result["hr@3"] == 0.75
    assert result["ndcg@1"] == 0.25
    assert result["ndcg@2"] == pytest.approx((1 + 1 / LOG2_3) / 4, abs=1e-15)
    assert result["ndcg@3"] == pytest.approx((1 + 1 / LOG2_3 + 1 / 2) / 4, abs=1e-15)
    assert result["mrr@3"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 4, abs=1e-15)
    assert result["mrr@2"] == pytest.approx((1 + 1 / 2) / 4, abs=1e-15)
    assert result["precision@2"] == pytest.approx(0.25)
    # Top 1 names 7, 0, 3; top 3 names 7, 1, 2, 0, 5, 3, 4.
    assert result["coverage@1"] == pytest.approx(0.3)
    assert result["coverage@3"] == pytest.approx(0.7)


def test_several_targets_by_hand():
    # Relevant 0, 1, 2; hits at ranks 1 and 3 of four.
    result = ranking_metrics([[1, 8, 0, 9]], RelevantSets.from_lists([[0, 1, 2]]), 10, ks=(2, 4))
    assert result["hr@2"] == 1.0
    assert result["recall@2"] == pytest.approx(1 / 3)
    assert result["recall@4"] == pytest.approx(2 / 3)
    assert result["precision@4"] == 0.5
    # At 2 the ideal list holds two relevant items, at 4 three.
    assert result["ndcg@2"] == pytest.approx(1 / (1 + 1 / LOG2_3), abs=1e-15)
    assert result["ndcg@4"] == pytest.approx((1 + 1 / 2) / (1 + 1 / LOG2_3 + 1 / 2), abs=1e-15)
    assert result["map@2"] == pytest.approx(1 / 2)
    assert result["map@4"] == pytest.approx((1 + 2 / 3) / 3)
    assert result["mrr@4"] == 1.0


def test_repeated_item_counts_once():
    single = per_list([[5, 3, 3]], [3], ks=(3,))
    assert single["precision@3"][0] == pytest.approx(1 / 3)
    assert single["ndcg@3"][0] == pytest.approx(1 / LOG2_3)
    several = per_list([[3, 3, 4]], RelevantSets.from_lists([[3, 4]]), ks=(2, 3))
    assert several["recall@2"][0] == 0.5
    assert several["map@3"][0] == pytest.approx((1 + 2 / 3) / 2)


def test_relevant_item_named_twice_counts_once():
    twice = per_list([[3, 1], [2, 0]], RelevantSets.from_lists([[3, 3, 1], [0]]), ks=(2,))
    once = per_list([[3, 1], [2, 0]], RelevantSets.from_lists([[1, 3], [0]]), ks=(2,))
    for key, values in once.items():
        np.testing.assert_array_equal(twice[key], values)


def test_empty_slots_never_hit_and_keep_their_rank():
    result = per_list([[-1, -1, 0], [-1, 4, -1]], RelevantSets.from_lists([[0, 1], [3]]), ks=(3,))
    np.testing.assert_allclose(result["mrr@3"], [1 / 3, 0.0])
    assert coverage([[-1, -1, 0], [-1, 4, -1]], 5, 3) == pytest.approx(2 / 5)


def test_order_of_the_keys():
    keys = list(ranking_metrics([[0, 1]], [0], 3, ks=(2, 1), names=("coverage", "hr")))
    assert keys == ["coverage@2", "hr@2", "coverage@1", "hr@1"]


@st.composite
def problems(draw, single=None):
    items = draw(st.integers(1, 12))
    rows = draw(st.integers(1, 6))
    width = draw(st.integers(1, 8))
    slot = st.integers(-1, items - 1)
    lists = draw(
        st.lists(st.lists(slot, min_size=width, max_size=width), min_size=rows, max_size=rows)
    )
    most = 1 if single else 5
    item = st.integers(0, items - 1)
    relevant = draw(
        st.lists(st.lists(item, min_size=1, max_size=most), min_size=rows, max_size=rows)
    )
    ks = draw(st.lists(st.integers(1, width), min_size=1, max_size=3, unique=True))
    return np.array(lists, np.int32), relevant, items, ks


@settings(deadline=None, max_examples=150)
@given(problems(), st.integers(1, 9))
def test_equals_plain_loops(problem, block):
    lists, relevant, items, ks = problem
    wanted = oracle.per_list(lists, relevant, ks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_CELLS", block)
        got = per_list(lists, RelevantSets.from_lists(relevant), ks)
        means = ranking_metrics(lists, RelevantSets.from_lists(relevant), items, ks)
    assert set(got) == set(wanted)
    for key, values in wanted.items():
        np.testing.assert_allclose(got[key], values, rtol=0, atol=1e-14, err_msg=key)
        assert means[key] == pytest.approx(values.mean(), abs=1e-14)
    for k in ks:
        assert means[f"coverage@{k}"] == oracle.coverage(lists, items, k)


@settings(deadline=None, max_examples=100)
@given(problems(single=True))
def test_one_target_forms_agree(problem):
    lists, relevant, _, ks = problem
    targets = np.array([items[0] for items in relevant])
    as_sets = per_list(lists, RelevantSets.from_lists(relevant), ks)
    got = per_list(lists, targets, ks)
    wanted = oracle.per_list(lists, relevant, ks)
    for key, values in got.items():
        np.testing.assert_array_equal(values, as_sets[key])
        np.testing.assert_allclose(values, wanted[key], rtol=0, atol=1e-15)
    for k in ks:
        np.testing.assert_array_equal(got[f"recall@{k}"], got[f"hr@{k}"])
        np.testing.assert_array_equal(got[f"map@{k}"], got[f"mrr@{k}"])


@settings(deadline=None, max_examples=100)
@given(problems(), st.randoms(use_true_random=False))
def test_bounds_monotony_and_order_of_users(problem, random):
    lists, relevant, items, _ = problem
    ks = tuple(range(1, lists.shape[1] + 1))
    got = ranking_metrics(lists, RelevantSets.from_lists(relevant), items, ks)
    assert all(0.0 <= value <= 1.0 + 1e-15 for value in got.values())
    for name in ("hr", "recall", "mrr", "coverage"):
        values = [got[f"{name}@{k}"] for k in ks]
        assert values == sorted(values), name
    for k in ks:
        assert got[f"mrr@{k}"] <= got[f"hr@{k}"] + 1e-15
        assert got[f"recall@{k}"] <= got[f"hr@{k}"] + 1e-15
    order = list(range(len(lists)))
    random.shuffle(order)
    shuffled = ranking_metrics(
        lists[order], RelevantSets.from_lists([relevant[row] for row in order]), items, ks
    )
    for key, value in got.items():
        assert shuffled[key] == pytest.approx(value, abs=1e-14)


@settings(deadline=None, max_examples=50)
@given(problems(single=True))
def test_ndcg_of_one_target_grows_with_k(problem):
    lists, relevant, items, _ = problem
    ks = tuple(range(1, lists.shape[1] + 1))
    got = ranking_metrics(lists, np.array([r[0] for r in relevant]), items, ks)
    values = [got[f"ndcg@{k}"] for k in ks]
    assert values == sorted(values)


def test_blocks_give_what_one_block_gives(rng, monkeypatch):
    lists = rng.integers(0, 50, (101, 7))
    targets = rng.integers(0, 50, 101)
    sizes = rng.integers(1, 4, 101)
    sets = RelevantSets(np.append(0, np.cumsum(sizes)), rng.integers(0, 50, sizes.sum()))
    for judged in (targets, sets):
        whole = per_list(lists, judged, (5,))
        monkeypatch.setattr(metrics, "_BLOCK_CELLS", 50)
        parts = per_list(lists, judged, (5,))
        monkeypatch.undo()
        for key, values in whole.items():
            np.testing.assert_array_equal(parts[key], values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lists": [0, 1]}, r"item indices \[lists, K\], got int64 \(2,\)"),
        ({"lists": [[0.0, 1.0]]}, "got float64"),
        ({"lists": np.zeros((0, 3), np.int32), "targets": []}, "no list to evaluate"),
        ({"ks": (3,)}, "hold 2 items each, too few for a cut-off of 3"),
        ({"ks": (0,)}, r"whole numbers from 1 on, got \(0,\)"),
        ({"ks": ()}, r"whole numbers from 1 on, got \(\)"),
        ({"targets": [0, 1]}, r"wanted 1 targets, one a list, got shape \(2,\)"),
        ({"targets": [0.5]}, "integer item indices, got float64"),
        ({"targets": [-1]}, "the targets name item -1, wanted indices from 0 to 4"),
        ({"targets": [5]}, "the targets name item 5"),
        ({"lists": [[0, 5]]}, r"the lists name item 5, wanted .* 0 to 4 \(or -1 for none\)"),
        ({"lists": [[0, -2]]}, "the lists name item -2"),
        ({"num_items": 0}, "num_items must be at least 1, got 0"),
        ({"names": ("hr", "gini")}, "unknown metric 'gini', wanted one of hr, ndcg"),
        ({"targets": RelevantSets.from_lists([[]])}, "list 0 has no relevant item"),
        (
            {"targets": RelevantSets(np.array([0, 1]), np.array([1, 2]))},
            r"offsets must be \[2\] numbers from 0 to 2",
        ),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    given_arguments = {"lists": [[0, 1]], "targets": [1], "num_items": 5, "ks": (1, 2)} | arguments
    with pytest.raises(UserError, match=message) as caught:
        ranking_metrics(**given_arguments)
    assert "\n" not in str(caught.value)


def test_per_user_refuses_coverage():
    with pytest.raises(UserError, match="unknown metric 'coverage'"):
        per_list([[0]], [0], ks=(1,), names=("coverage",))
