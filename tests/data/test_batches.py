"""Batches: each sequence once an epoch, alike in size, determined by seed and index.

The item column is the events' own index, so every slot of a batch tells which event is in it.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import shop

from jaxrec.data import batches as batches_module
from jaxrec.data.batches import (
    ContextBatches,
    TrainingBatches,
    recent,
    stratified_batches,
)
from jaxrec.data.ranges import events_of
from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError


def ranges(lengths, gap=3):
    """Ranges of these lengths, with events that belong to nobody between them."""
    lengths = np.array(lengths, np.int64)
    stops = np.cumsum(lengths + gap)
    return stops - lengths, stops, np.arange(int(stops[-1]) + gap, dtype=np.int32)


def make(lengths, **options):
    starts, stops, items = ranges(lengths)
    defaults = {"batch_size": 4, "max_length": 8, "epochs": 3, "seed": 0}
    return TrainingBatches(items, starts, stops, **(defaults | options))


def random_lengths(seed, count=50, most=12):
    return np.random.default_rng(seed).integers(2, most, count)


def sequences_of(batch):
    """The (inputs, targets) of every sequence of a batch, each a tuple of events."""
    valid = batch["target_valid"]
    slots, targets = batch["slots"][valid], batch["targets"][valid]
    assert set(slots.tolist()) == set(np.flatnonzero(batch["valid"].reshape(-1)).tolist())
    target_at = dict(zip(slots.tolist(), targets.tolist(), strict=True))
    assert len(target_at) == len(slots)
    length = batch["items"].shape[1]
    found = []
    for row in range(len(batch["items"])):
        for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
            own = np.flatnonzero(batch["segment_ids"][row] == segment)
            assert own[-1] - own[0] + 1 == len(own)
            inputs = tuple(batch["items"][row, own].tolist())
            found.append((inputs, tuple(target_at[row * length + at] for at in own)))
    return found


def test_recent_cuts_to_the_newest():
    cut = recent(np.array([0, 10, 20]), np.array([3, 20, 21]), 4)
    assert cut.starts.tolist() == [0, 16, 20]
    assert cut.stops.tolist() == [3, 20, 21]
    assert cut.lengths.tolist() == [3, 4, 1]


def test_events_of_ranges():
    assert events_of(np.array([5, 0, 9]), np.array([7, 3, 10])).tolist() == [5, 6, 0, 1, 2, 9]
    assert events_of(np.array([], int), np.array([], int)).tolist() == []


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.data())
@settings(deadline=None)
def test_dealing_covers_everything_evenly(lengths, data):
    lengths = np.array(lengths)
    count = data.draw(st.integers(1, len(lengths)))
    dealt = stratified_batches(lengths, count, np.random.default_rng(0))
    assert len(dealt) == count
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(lengths)))
    sizes = [len(one) for one in dealt]
    assert max(sizes) - min(sizes) <= 1
    # Of every stratum of length a batch has one: its i-th shortest lies in the i-th stratum.
    ordered = np.sort(lengths)
    for one in dealt:
        for i, length in enumerate(np.sort(lengths[one])):
            assert ordered[i * count] <= length <= ordered[min((i + 1) * count, len(lengths)) - 1]


def test_stratification_keeps_totals_near_equal():
    lengths = np.random.default_rng(1).lognormal(3, 1, 3000).astype(int) + 1
    dealt = stratified_batches(lengths, 30, np.random.default_rng(0))
    stratified = np.array([lengths[one].sum() for one in dealt])
    shuffled = np.random.default_rng(0).permutation(lengths).reshape(30, 100).sum(1)
    assert stratified.std() < 0.35 * shuffled.std()
    assert stratified.max() < 1.2 * stratified.mean()


def test_who_meets_whom_is_random():
    lengths = np.full(40, 5)
    first, second = (
        {frozenset(one.tolist()) for one in stratified_batches(lengths, 10, rng)}
        for rng in (np.random.default_rng(0), np.random.default_rng(1))
    )
    assert len(first & second) <= 2


@pytest.mark.parametrize("packed", [True, False])
def test_every_epoch_has_every_sequence_once(packed):
    lengths = random_lengths(0)
    batches = make(lengths, packed=packed)
    starts, stops, _ = ranges(lengths)
    wanted = [
        (tuple(range(max(start, stop - 9), stop - 1)), tuple(range(max(start, stop - 9) + 1, stop)))
        for start, stop in zip(starts, stops, strict=True)
    ]
    assert batches.sequences == len(lengths)
    assert batches.batches_per_epoch == 13
    assert len(batches) == 39
    assert batches.events == sum(len(inputs) for inputs, _ in wanted)
    for epoch in range(3):
        found = [sequences_of(batches[epoch * 13 + number]) for number in range(13)]
        assert sorted(itertools.chain(*found)) == sorted(wanted)
        assert {len(one) for one in found} == {3, 4}


def test_packed_or_not_the_same_sequences_meet():
    lengths = random_lengths(2, most=7)
    packed, alone = make(lengths, packed=True), make(lengths, packed=False)
    assert len(packed) == len(alone)
    for number in range(len(packed)):
        assert sorted(sequences_of(packed[number])) == sorted(sequences_of(alone[number]))
    assert packed.rows < alone.rows == 4
    assert packed.occupancy > alone.occupancy
    assert alone.occupancy == alone.events / (4 * 8 * 13)


def test_packing_never_takes_more_rows_than_sequences():
    assert make([9] * 30).rows == 4


def test_a_range_too_short_is_left_out():
    batches = make([1, 2, 1, 5], batch_size=2)
    assert batches.sequences == 2
    with pytest.raises(UserError, match="two or more events"):
        make([1, 1])


def test_targets_are_the_next_item_and_never_held_out():
    data = shop()
    split = leave_one_out(data)
    held_out = {*split.validation.targets.tolist(), *split.test.targets.tolist()}
    events = np.arange(data.num_events, dtype=np.int32)
    batches = TrainingBatches(
        events,
        split.train.starts,
        split.train.stops,
        batch_size=16,
        max_length=10,
        epochs=1,
        seed=0,
    )
    owner = np.repeat(np.arange(data.num_users), np.diff(data.offsets))
    seen = set()
    for number in range(len(batches)):
        batch = batches[number]
        inputs = batch["items"].reshape(-1)[batch["slots"]][batch["target_valid"]]
        targets = batch["targets"][batch["target_valid"]]
        np.testing.assert_array_equal(targets, inputs + 1)
        np.testing.assert_array_equal(owner[targets], owner[inputs])
        seen |= {*inputs.tolist(), *targets.tolist()}
    assert seen
    assert not seen & held_out


def test_items_and_targets_come_from_the_item_column():
    starts, stops, items = ranges([4, 3])
    column = (items * 7 + 1).astype(np.int32)
    options = {"batch_size": 2, "max_length": 8, "epochs": 1, "seed": 0}
    plain = TrainingBatches(items, starts, stops, **options)[0]
    mapped = TrainingBatches(column, starts, stops, **options)[0]
    np.testing.assert_array_equal(
        mapped["items"], np.where(plain["valid"], plain["items"] * 7 + 1, 0)
    )
    valid = plain["target_valid"]
    np.testing.assert_array_equal(mapped["targets"][valid], plain["targets"][valid] * 7 + 1)


@pytest.mark.parametrize("newest", [True, False])
def test_positions_count_from_the_end_asked_for(newest):
    batch = make([6, 4, 9], count_from_newest=newest)[0]
    for inputs, _ in sequences_of(batch):
        row, first = np.argwhere(batch["items"] == inputs[0])[0]
        own = batch["positions"][row, first : first + len(inputs)].tolist()
        counted = list(range(len(inputs)))
        assert own == (counted[::-1] if newest else counted)


def test_all_batches_have_one_shape():
    batches = make(random_lengths(3), epochs=5)
    shapes = {
        tuple((name, array.shape, str(array.dtype)) for name, array in batches[i].items())
        for i in range(len(batches))
    }
    assert len(shapes) == 1
    assert batches[0]["items"].shape == (batches.rows, 8)
    assert batches.events_capacity % 8 == 0


def test_a_batch_that_does_not_fit_grows_and_drops_nothing():
    lengths = random_lengths(4)
    wanted = make(lengths)
    tight = make(lengths)
    tight._shard_rows, tight._shard_events = 1, 8
    for number in range(wanted.batches_per_epoch):
        batch = tight[number]
        assert sorted(sequences_of(batch)) == sorted(sequences_of(wanted[number]))


def test_growth_goes_in_eighths_so_that_few_shapes_are_compiled():
    grown = batches_module._grown
    assert grown(64, 64) == 64
    assert grown(64, 65) == grown(64, 72) == 72
    assert grown(64, 73) == 80
    assert grown(3, 5) == 5


def test_later_epochs_fit_into_what_the_first_ones_needed(monkeypatch):
    # One probed epoch stands for many: the spare must cover what the others need.
    monkeypatch.setattr(batches_module, "_PROBED_BATCHES", 1)
    batches = make(random_lengths(5, 400, 9), batch_size=32, epochs=20)
    assert {batches[i]["items"].shape[0] for i in range(len(batches))} == {batches.rows}


def test_the_same_seed_and_index_give_the_same_batch():
    lengths = random_lengths(6)
    one, other = make(lengths), make(lengths)
    for number in (20, 3, 38, 3):
        a, b = one[number], other[np.int64(number)]
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_seeds_and_epochs_shuffle_anew():
    lengths = random_lengths(7)
    one, other = make(lengths), make(lengths, seed=1)
    per_epoch = one.batches_per_epoch

    def groups(batches, epoch):
        return [frozenset(sequences_of(batches[epoch * per_epoch + i])) for i in range(per_epoch)]

    assert groups(one, 0) != groups(one, 1)
    assert len(set(groups(one, 0)) & set(groups(one, 1))) <= 2
    assert len(set(groups(one, 0)) & set(groups(other, 0))) <= 2


def test_fewer_epochs_are_the_beginning_of_more():
    lengths = random_lengths(8)
    short, long = make(lengths, epochs=1), make(lengths, epochs=4)
    for number in range(len(short)):
        np.testing.assert_array_equal(short[number]["items"], long[number]["items"])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.booleans(), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_contexts_come_once_with_their_newest_event(lengths, packed, batch_size):
    starts, stops, items = ranges(lengths)
    batches = ContextBatches(
        items, starts, stops, batch_size=batch_size, max_length=6, packed=packed
    )
    assert len(batches) == -(-len(lengths) // min(batch_size, len(lengths)))
    seen = []
    for number in range(len(batches)):
        rows, last, which = batches[number]
        assert rows["items"].shape == (batches.rows, 6)
        assert (which[which < 0] == -1).all()
        assert not (which[:-1][np.diff(which < 0)] < 0).any()
        which = which[which >= 0]
        assert last.shape == (batches.batch_size,)
        seen += which.tolist()
        assert not last[len(which) :].any()
        for at, user in zip(last, which, strict=False):
            row, column = divmod(int(at), 6)
            own = rows["segment_ids"][row] == rows["segment_ids"][row, column]
            wanted = np.arange(max(starts[user], stops[user] - 6), stops[user])
            np.testing.assert_array_equal(rows["items"][row, own], wanted)
            assert rows["items"][row, column] == stops[user] - 1
            assert rows["valid"][row, column]
            assert rows["positions"][row, column] == len(wanted) - 1
        assert rows["valid"].sum() == np.minimum(np.array(lengths)[which], 6).sum()
    assert sorted(seen) == list(range(len(lengths)))


def test_contexts_counted_from_the_newest():
    starts, stops, items = ranges([4, 2])
    rows, last, _ = ContextBatches(
        items, starts, stops, batch_size=8, max_length=6, count_from_newest=True
    )[0]
    assert rows["positions"].reshape(-1)[last].tolist() == [0, 0]
    assert sorted(rows["positions"][rows["valid"]].tolist()) == [0, 0, 1, 1, 2, 3]


def test_no_context_at_all():
    none = np.array([], np.int64)
    assert len(ContextBatches(np.arange(3), none, none, batch_size=4, max_length=6)) == 0


def test_an_empty_context_is_refused():
    with pytest.raises(ValueError, match="at least one event"):
        ContextBatches(np.arange(3), np.array([0, 2]), np.array([2, 2]), batch_size=4, max_length=6)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_hold_the_same_sequences_in_parts_of_one_shape(shards):
    lengths = random_lengths(3)
    whole, split = make(lengths), make(lengths, shards=shards)
    assert split.batches_per_epoch == whole.batches_per_epoch
    for number in range(len(whole)):
        batch = split[number]
        rows, events = split.rows // shards, split.events_capacity // shards
        parts = [
            {
                name: array[p * size : (p + 1) * size]
                for name, array in batch.items()
                for size in [events if name in ("slots", "targets", "target_valid") else rows]
            }
            for p in range(shards)
        ]
        found = [one for part in parts for one in sequences_of(part)]
        wanted = sequences_of(whole[number])
        assert sorted(map(str, found)) == sorted(map(str, wanted))
        counts = [len(sequences_of(part)) for part in parts]
        assert max(counts) - min(counts) <= 1
        assert sum(len(batch[name]) for name in ("slots",)) == split.events_capacity


@pytest.mark.parametrize("shards", [2, 3])
def test_contexts_in_shards_come_once(shards):
    starts, stops, items = ranges([4, 2, 9, 1, 3, 3, 5])
    batches = ContextBatches(items, starts, stops, batch_size=4, max_length=6, shards=shards)
    seen = []
    for number in range(len(batches)):
        columns, last, which = batches[number]
        size = len(which) // shards
        rows = batches.rows // shards
        for part in range(shards):
            own = columns["items"][part * rows : (part + 1) * rows].reshape(-1)
            for at, user in zip(
                last[part * size :][:size], which[part * size :][:size], strict=True
            ):
                if user >= 0:
                    assert own[at] == stops[user] - 1
                    seen.append(user)
    assert sorted(seen) == list(range(7))


def test_times_of_the_inputs_are_in_the_batch():
    batch = make([6, 4, 9], timestamps=np.arange(40) * 10)[0]
    assert batch["timestamps"].dtype == np.int32
    for inputs, _ in sequences_of(batch):
        row, first = np.argwhere(batch["items"] == inputs[0])[0]
        own = batch["timestamps"][row, first : first + len(inputs)]
        assert own.tolist() == [10 * i for i in range(len(inputs))]
    assert "timestamps" not in make([6, 4, 9])[0]
