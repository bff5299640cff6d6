"""Item-kNN against plain loops, whatever the blocks, and how it is asked for."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import baselines as oracle
from toy_sets import in_memory

from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError
from jaxrec.evaluation import _questions, item_neighbours
from jaxrec.evaluation.baselines import evaluate_baselines
from jaxrec.evaluation.item_neighbours import item_knn, item_similarities


@st.composite
def sets(draw):
    """A few users with repeats, and items nobody took."""
    num_items = draw(st.integers(2, 9))
    item = st.integers(0, num_items - 1)
    return in_memory(
        draw(st.lists(st.lists(item, min_size=3, max_size=9), min_size=1, max_size=6)), num_items
    )


@settings(deadline=None, max_examples=80)
@given(
    sets(),
    st.integers(1, 4),
    st.sampled_from([0.0, 2.5]),
    st.sampled_from([1, 7, 1000]),
    st.booleans(),
    st.integers(1, 11),
)
def test_equals_plain_loops(shop, neighbours, shrinkage, block, filter_seen, k):
    split = leave_one_out(shop)
    options = {"neighbours": neighbours, "shrinkage": shrinkage}
    want = oracle.item_similarities(shop.items, split.train, shop.num_items, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_neighbours, "_BLOCK_ENTRIES", block)
        patch.setattr(_questions, "_BLOCK_ROWS", 2)
        alike = item_similarities(shop, split, **options).toarray()
        lists = item_knn(shop, split, k=k, filter_seen=filter_seen, **options)
    np.testing.assert_allclose(alike, want, rtol=1e-12)
    assert lists.dtype == np.int32
    for row, start, stop in zip(lists, split.test.starts, split.test.stops, strict=True):
        history = shop.items[start:stop].tolist()
        scores = oracle.neighbour_scores(want, history)
        left = [i for i in range(shop.num_items) if not filter_seen or i not in history]
        best = sorted(left, key=lambda i: (-scores[i], i))[:k]
        count = len(best)
        assert (row[count:] == -1).all()
        assert len(set(row[:count].tolist())) == count
        assert set(row[:count].tolist()) <= set(left)
        # Sums of the same numbers in another order may be off by rounding, so ranks may be too.
        np.testing.assert_allclose([scores[i] for i in row[:count]], [scores[i] for i in best])
        rest = [i for i in row[:count] if scores[i] == 0]
        assert rest == sorted(rest)


def test_by_hand():
    # Training: 0 1 | 0 1 2 | 0 3 | 2 0; cosines with item 0: 2/sqrt(8), 2/sqrt(8), 1/2.
    shop = in_memory([[0, 1, 4, 2], [0, 1, 2, 3, 4], [0, 3, 1, 2], [2, 0, 1, 3]], 5)
    split = leave_one_out(shop)
    alike = item_similarities(shop, split).toarray()
    np.testing.assert_allclose(alike[0], [0, 2 / 8**0.5, 2 / 8**0.5, 0.5, 0])
    # Of equal neighbours the lower index is kept.
    np.testing.assert_allclose(
        item_similarities(shop, split, neighbours=1).toarray()[0], [0, 2 / 8**0.5, 0, 0, 0]
    )
    np.testing.assert_allclose(item_similarities(shop, split, shrinkage=1.0).toarray()[0, 3], 1 / 3)
    # User 0 took 0, 1, 4: item 2 is like 0 and 1, item 3 like 0.
    assert item_knn(shop, split, k=3).tolist()[0] == [2, 3, -1]
    assert item_knn(shop, split, k=1, part="validation").tolist()[0] == [2]
    found = evaluate_baselines(shop, split, ks=(1,), names=("item_knn", "popularity"))
    assert list(found) == ["item_knn", "popularity"]
    assert found["item_knn"].per_list["hr@1"][0] == 1
    assert found["item_knn"].seen_listed == 0


def test_by_user_and_in_any_order(rng):
    shop = in_memory(rng.integers(0, 12, (9, 8)).tolist(), 12)
    split = leave_one_out(shop)
    np.testing.assert_array_equal(
        item_knn(shop, split, k=5, by_user=True), item_knn(shop, split, k=5)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"neighbours": 0}, "item_knn: neighbours must be at least 1, got 0"),
        ({"shrinkage": -1.0}, "item_knn: shrinkage must not be negative, got -1.0"),
        ({"part": "train"}, "part must be one of validation, test"),
    ],
)
def test_bad_arguments(options, message):
    shop = in_memory([[0, 1, 2]], 3)
    with pytest.raises(UserError, match=message):
        item_knn(shop, leave_one_out(shop), **options)


def test_an_unknown_baseline_is_refused():
    shop = in_memory([[0, 1, 2]], 3)
    with pytest.raises(UserError, match="unknown baseline 'knn'; known: popularity, most_recent"):
        evaluate_baselines(shop, leave_one_out(shop), ks=(1,), names=("knn",))


def test_unused_it_costs_nothing():
    code = (
        "import sys, jaxrec.evaluation.baselines; "
        "print('jaxrec.evaluation.item_neighbours' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
