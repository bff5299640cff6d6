"""The iterator: all batches in order, and a position that can be stored and taken up again."""

import json

import numpy as np
import pytest

from jaxrec.data.batches import TrainingBatches
from jaxrec.data.pipeline import training_iterator


def source(epochs=3):
    lengths = np.random.default_rng(0).integers(2, 9, 30)
    stops = np.cumsum(lengths)
    items = np.arange(int(stops[-1]), dtype=np.int32)
    return TrainingBatches(
        items, stops - lengths, stops, batch_size=5, max_length=8, epochs=epochs, seed=0
    )


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("prefetch", [1, 4])
def test_all_batches_in_order(prefetch):
    batches = source()
    found = list(training_iterator(batches, prefetch))
    assert len(found) == len(batches) == 18
    assert all(same(found[i], batches[i]) for i in range(18))


@pytest.mark.parametrize("done", [0, 1, 6, 11, 18])
def test_a_stored_position_goes_on_with_the_next_batch(done):
    batches = source()
    first = training_iterator(batches, 3)
    for _ in range(done):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    # Another process, with another buffer.
    second = training_iterator(source(), 1)
    second.set_state(state)
    rest = list(second)
    assert len(rest) == 18 - done
    assert all(same(rest[i], batches[done + i]) for i in range(len(rest)))


def test_the_position_holds_for_more_epochs():
    first = training_iterator(source(epochs=1), 2)
    state = [first.get_state() for _ in first][-1]
    longer = training_iterator(source(epochs=2), 2)
    longer.set_state(state)
    rest = list(longer)
    assert len(rest) == 6
    assert all(same(rest[i], source(epochs=2)[6 + i]) for i in range(6))


def test_a_position_can_be_gone_back_to():
    iterator = training_iterator(source(), 4)
    next(iterator)
    state = iterator.get_state()
    ahead = [next(iterator) for _ in range(3)]
    iterator.set_state(state)
    assert all(same(next(iterator), one) for one in ahead)
