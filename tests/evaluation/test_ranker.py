"""Ranked lists on the device against brute force in NumPy.

The model here has whole numbers for weights, so its scores are exact and full of ties.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import ranking_metrics as oracle
from small_sets import MAX_LENGTH, shop

from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError
from jaxrec.evaluation import ranker as ranker_module
from jaxrec.evaluation.evaluator import Evaluator
from jaxrec.evaluation.ranker import Contexts, Ranker

ITEMS, WIDTH, LONGEST = 23, 3, 5
PARAMETERS = {
    "table": jnp.asarray(np.random.default_rng(0).integers(-2, 3, (ITEMS, WIDTH)), jnp.float32)
}


class Sums:
    """The state is the sum over the sequence so far of the items' vectors times position + 1."""

    def __init__(self, parameters):
        self.table = parameters["table"]

    def hidden(self, items, *, valid, segment_ids, positions):
        slot = jnp.arange(items.shape[1])
        seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & valid[:, None, :]
        seen &= (slot[:, None] >= slot[None, :])[None]
        weights = jnp.where(seen, positions[:, None, :] + 1, 0).astype(jnp.float32)
        return weights @ self.table[items]

    def item_table(self):
        return self.table


@functools.cache
def ranker():
    return Ranker(Sums)


def states_of(histories, *, newest=False):
    table = np.asarray(PARAMETERS["table"])
    result = []
    for history in histories:
        recent = history[-LONGEST:]
        weights = np.arange(1, len(recent) + 1)
        result.append((weights[::-1] if newest else weights) @ table[recent])
    return np.array(result)


def best(histories, k, *, seen=True, allow=None, deny=None, newest=False):
    """(scores, items): sorted by falling score, then by index."""
    all_scores = states_of(histories, newest=newest) @ np.asarray(PARAMETERS["table"]).T
    scores = np.full((len(histories), k), -np.inf)
    items = np.full((len(histories), k), -1)
    for i, history in enumerate(histories):
        candidates = [
            item
            for item in range(ITEMS)
            if not (seen and item in history)
            and (allow is None or allow[item])
            and (deny is None or not deny[item])
        ]
        ranked = sorted(candidates, key=lambda item: (-all_scores[i, item], item))[:k]
        items[i, : len(ranked)] = ranked
        scores[i, : len(ranked)] = all_scores[i, ranked]
    return scores, items


def histories_of(count=17, most=12, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(ITEMS, size=n) for n in rng.integers(1, most + 1, count)]


def contexts_of(histories, **options):
    """The histories lie apart in the item column, in another order than they are asked for."""
    order = np.random.default_rng(1).permutation(len(histories))
    starts = np.zeros(len(histories), np.int64)
    column = [7]
    for i in order:
        starts[i] = len(column)
        column += [*histories[i], 9]
    stops = starts + [len(history) for history in histories]
    defaults = {"batch_size": 4, "max_length": LONGEST}
    return Contexts(np.array(column, np.int32), starts, stops, **(defaults | options))


def assert_lists(histories, contexts, k, **options):
    seen = options.pop("filter_seen", True)
    newest = options.pop("newest", False)
    scores, lists = ranker().lists(PARAMETERS, contexts, k, filter_seen=seen, **options)
    wanted_scores, wanted = best(histories, k, seen=seen, newest=newest, **options)
    np.testing.assert_array_equal(lists, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)
    assert lists.dtype == np.int32
    assert scores.dtype == np.float32


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("filter_seen", [True, False])
def test_lists_are_those_of_brute_force(packed, filter_seen):
    histories = histories_of()
    assert_lists(histories, contexts_of(histories, packed=packed), 6, filter_seen=filter_seen)


def test_ties_are_there_and_go_to_the_lower_index():
    scores, items = best(histories_of(), 6)
    tied = scores[:, 1:] == scores[:, :-1]
    assert tied.sum() > 10
    assert (np.diff(items, axis=1)[tied] > 0).all()


def test_states_come_in_the_order_asked_for():
    histories = histories_of()
    states = ranker().states(PARAMETERS, contexts_of(histories))
    np.testing.assert_array_equal(states, states_of(histories))


def test_positions_counted_from_the_newest():
    histories = histories_of()
    contexts = contexts_of(histories, count_from_newest=True)
    assert_lists(histories, contexts, 6, newest=True)
    assert (states_of(histories) != states_of(histories, newest=True)).any()


def test_more_asked_for_than_there_are_items():
    histories = histories_of(5)
    assert_lists(histories, contexts_of(histories), ITEMS)
    scores, lists = ranker().lists(PARAMETERS, contexts_of(histories), ITEMS, filter_seen=True)
    for i, history in enumerate(histories):
        left = ITEMS - len(set(history.tolist()))
        assert (lists[i, left:] == -1).all()
        assert (scores[i, left:] == -np.inf).all()
        assert len(set(lists[i, :left].tolist())) == left


@pytest.mark.parametrize("filter_seen", [True, False])
def test_allowed_and_denied_items(filter_seen):
    rng = np.random.default_rng(3)
    allow, deny = rng.random(ITEMS) < 0.5, rng.random(ITEMS) < 0.3
    histories = histories_of(6)
    contexts = contexts_of(histories)
    for options in ({"allow": allow}, {"deny": deny}, {"allow": allow, "deny": deny}):
        assert_lists(histories, contexts, 8, filter_seen=filter_seen, **options)


def test_nothing_is_allowed():
    histories = histories_of(3)
    assert_lists(histories, contexts_of(histories), 4, allow=np.zeros(ITEMS, bool))


def test_several_widths_of_seen_items(monkeypatch):
    """Users are grouped by the length of their history; everyone is answered once."""
    monkeypatch.setattr(ranker_module, "_SEEN_WIDTHS", (1, 4, 8, 1 << 30))
    histories = [*histories_of(), np.arange(ITEMS), np.array([3]), np.arange(8), np.arange(4)]
    contexts = contexts_of(histories)
    widths = {}
    asked = []
    for which, _, seen in contexts.batches():
        asked += which[which >= 0].tolist()
        assert (seen[which < 0] == -1).all()
        for i, row in zip(which[which >= 0], seen[which >= 0], strict=True):
            widths[int(i)] = seen.shape[1]
            assert sorted(row[row >= 0].tolist()) == sorted(histories[i].tolist())
    assert sorted(asked) == list(range(len(histories)))
    assert set(widths.values()) == {1, 4, 8, 32}
    for i, history in enumerate(histories):
        assert widths[i] == {1: 1}.get(len(history), 4 if len(history) <= 4 else widths[i])
        assert widths[i] >= len(history)
    assert_lists(histories, contexts, 5)


def test_long_histories_are_filtered_whole_though_the_model_reads_the_end():
    history = np.arange(20)
    scores, lists = ranker().lists(PARAMETERS, contexts_of([history]), ITEMS, filter_seen=True)
    assert sorted(lists[0, :3].tolist()) == [20, 21, 22]
    assert (lists[0, 3:] == -1).all()
    assert np.isfinite(scores[0, :3]).all()


def test_progress_counts_everybody():
    histories = histories_of()
    told = []
    ranker().lists(PARAMETERS, contexts_of(histories), 2, filter_seen=True, progress=told.append)
    assert sum(told) == len(histories)
    assert max(told) <= 4


def test_nobody_is_asked_about():
    none = np.array([], np.int64)
    contexts = Contexts(np.arange(3, dtype=np.int32), none, none, batch_size=4, max_length=5)
    assert len(contexts) == 0
    scores, lists = ranker().lists(PARAMETERS, contexts, 4, filter_seen=True)
    assert scores.shape == lists.shape == (0, 4)
    assert len(ranker().states(PARAMETERS, contexts)) == 0


def test_the_batch_size_changes_nothing():
    histories = histories_of()
    for batch_size in (1, 3, 100):
        contexts = contexts_of(histories, batch_size=batch_size)
        _, lists = ranker().lists(PARAMETERS, contexts, 3, filter_seen=True)
        np.testing.assert_array_equal(lists, best(histories, 3)[1])


class ShopModel(Sums):
    """Another catalogue, with scores that differ from item to item."""

    def item_table(self):
        return self.table


def shop_evaluator(targets, ks=(1, 3, 10), **options):
    defaults = {"filter_seen": True, "batch_size": 16, "packed": True, "count_from_newest": False}
    return Evaluator(
        shop(), targets, Ranker(ShopModel), ks=ks, max_length=MAX_LENGTH, **(defaults | options)
    )


SHOP_PARAMETERS = {
    "table": jnp.asarray(np.random.default_rng(5).normal(size=(30, WIDTH)), jnp.float32)
}


@pytest.mark.parametrize("filter_seen", [True, False])
def test_metrics_are_those_of_the_lists_and_the_lists_those_of_brute_force(filter_seen):
    targets = leave_one_out(shop()).test
    evaluator = shop_evaluator(targets, filter_seen=filter_seen)
    lists = evaluator.lists(SHOP_PARAMETERS)
    table = np.asarray(SHOP_PARAMETERS["table"], np.float64)
    wanted = []
    for start, stop in zip(targets.starts, targets.stops, strict=True):
        history = shop().items[start:stop]
        recent = history[-MAX_LENGTH:]
        scores = table @ (np.arange(1, len(recent) + 1) @ table[recent])
        if filter_seen:
            scores[history] = -np.inf
        ranked = np.argsort(-scores, kind="stable")[:10]
        wanted.append([int(i) if np.isfinite(scores[i]) else -1 for i in ranked])
    np.testing.assert_array_equal(lists, wanted)
    truth = [{int(shop().items[event])} for event in targets.targets]
    metrics = evaluator.metrics(SHOP_PARAMETERS)
    for name, values in oracle.per_list(lists.tolist(), truth, (1, 3, 10)).items():
        assert metrics[name] == pytest.approx(values.mean()), name
    assert metrics["coverage@3"] == pytest.approx(oracle.coverage(lists.tolist(), 30, 3))


def test_cut_offs_beyond_the_catalogue():
    targets = leave_one_out(shop()).test.take(np.arange(5))
    evaluator = shop_evaluator(targets, ks=(1, 50))
    lists = evaluator.lists(SHOP_PARAMETERS)
    assert lists.shape == (5, 50)
    assert (lists[:, 30:] == -1).all()
    metrics = evaluator.metrics(SHOP_PARAMETERS)
    unseen = [
        shop().items[event] not in shop().items[start:stop]
        for start, stop, event in zip(targets.starts, targets.stops, targets.targets, strict=True)
    ]
    assert metrics["hr@50"] == pytest.approx(np.mean(unseen))


def test_an_empty_part_is_one_line():
    targets = leave_one_out(shop()).test.take(np.array([], np.int64))
    evaluator = shop_evaluator(targets)
    assert evaluator.lists(SHOP_PARAMETERS).shape == (0, 10)
    with pytest.raises(UserError, match="no list to evaluate"):
        evaluator.metrics(SHOP_PARAMETERS)
