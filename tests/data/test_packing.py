"""Packing: every sequence in one piece, in order, and nothing else in the rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.packing import fill, place, place_alone, slots


@st.composite
def cases(draw):
    capacity = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=40))
    return np.array(lengths), capacity


def first_fit_decreasing(lengths, capacity):
    """One sequence at a time, into the first row with room; plain lists."""
    rows, where = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        with_room = [r for r, used in enumerate(rows) if used + lengths[i] <= capacity]
        if not with_room:
            with_room = [len(rows)]
            rows.append(0)
        where[i] = (with_room[0], rows[with_room[0]])
        rows[with_room[0]] += lengths[i]
    return [where[i] for i in range(len(lengths))], len(rows)


@given(cases())
@settings(deadline=None)
def test_placed_as_first_fit_decreasing_does(case):
    lengths, capacity = case
    placed = place(lengths, capacity)
    wanted, rows = first_fit_decreasing(lengths.tolist(), capacity)
    assert list(zip(placed.row.tolist(), placed.offset.tolist(), strict=True)) == wanted
    assert placed.rows == rows


@given(cases())
@settings(deadline=None)
def test_sequences_lie_side_by_side_and_segments_count_them(case):
    lengths, capacity = case
    placed = place(lengths, capacity)
    assert placed.row.min() == 0
    assert placed.row.max() == placed.rows - 1
    for row in range(placed.rows):
        inside = np.flatnonzero(placed.row == row)
        inside = inside[np.argsort(placed.offset[inside])]
        ends = np.cumsum(lengths[inside])
        assert ends[-1] <= capacity
        np.testing.assert_array_equal(placed.offset[inside], ends - lengths[inside])
        np.testing.assert_array_equal(placed.segment[inside], np.arange(1, len(inside) + 1))


@given(cases())
@settings(deadline=None)
def test_no_two_rows_could_be_one(case):
    lengths, capacity = case
    placed = place(lengths, capacity)
    used = np.bincount(placed.row, weights=lengths)
    if placed.rows > 1:
        assert np.sort(used)[:2].sum() > capacity
    assert placed.rows <= 2 * lengths.sum() / capacity + 1


def test_large_batches_are_packed_to_within_three_percent():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.0, 1.0, 4000), 1, 200).astype(int)
    assert place(lengths, 200).rows <= 1.03 * np.ceil(lengths.sum() / 200)


@pytest.mark.parametrize("lengths", [[3, 6], [0, 2]], ids=["too long", "empty"])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths must be in \[1, 5\]"):
        place(np.array(lengths), 5)


def test_nothing_to_place():
    assert place(np.array([], int), 5).rows == 0


def test_alone_is_one_row_each():
    placed = place_alone(3)
    assert placed.rows == 3
    assert placed.row.tolist() == [0, 1, 2]
    assert placed.offset.tolist() == [0, 0, 0]
    assert placed.segment.tolist() == [1, 1, 1]


def test_a_small_case_by_hand():
    # 4 opens row 0; 3 opens row 1; 2 goes beside the 3; 1 beside the 4.
    placed = place(np.array([2, 4, 1, 3]), 5)
    assert placed.row.tolist() == [1, 0, 0, 1]
    assert placed.offset.tolist() == [3, 0, 4, 0]
    lengths, items = np.array([2, 4, 1, 3]), np.array([10, 11, 20, 21, 22, 23, 30, 40, 41, 42])
    rows, slot = fill(placed, lengths, items, rows=3, capacity=5)
    assert rows.items.tolist() == [[20, 21, 22, 23, 30], [40, 41, 42, 10, 11], [0] * 5]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 2, 2], [0] * 5]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1], [0] * 5]
    assert rows.valid.tolist() == [[True] * 5, [True] * 5, [False] * 5]
    assert slot.tolist() == [8, 9, 0, 1, 2, 3, 4, 5, 6, 7]
    newest, _ = fill(placed, lengths, items, rows=3, capacity=5, count_from_newest=True)
    assert newest.positions.tolist() == [[3, 2, 1, 0, 0], [2, 1, 0, 1, 0], [0] * 5]


@given(cases(), st.booleans(), st.booleans(), st.integers(0, 2))
@settings(deadline=None)
def test_what_was_filled_in_comes_out_again(case, packed, newest, spare):
    lengths, capacity = case
    placed = place(lengths, capacity) if packed else place_alone(len(lengths))
    items = np.arange(lengths.sum()) + 1
    rows, slot = fill(
        placed,
        lengths,
        items,
        rows=placed.rows + spare,
        capacity=capacity,
        count_from_newest=newest,
        timestamps=10**12 + items * 7,
    )
    for array in rows:
        assert array.shape == (placed.rows + spare, capacity)
    assert [a.dtype for a in rows] == [np.int32, bool, np.int32, np.int32, np.int32]

    np.testing.assert_array_equal(rows.items.reshape(-1)[slot], items)
    assert len(set(slot.tolist())) == lengths.sum()
    np.testing.assert_array_equal(np.flatnonzero(rows.valid.reshape(-1)), np.sort(slot))
    empty = ~rows.valid
    assert not rows.items[empty].any()
    assert not rows.segment_ids[empty].any()
    assert not rows.positions[empty].any()
    assert not rows.timestamps[empty].any()

    index = slots(placed, lengths, capacity)[1]
    stop = 0
    for i, length in enumerate(lengths):
        start, stop = stop, stop + length
        own = slot[start:stop]
        np.testing.assert_array_equal(own, own[0] + np.arange(length))
        # Seconds since the sequence's own first event.
        np.testing.assert_array_equal(rows.timestamps.reshape(-1)[own], 7 * np.arange(length))
        assert own[0] // capacity == own[-1] // capacity == placed.row[i]
        assert set(rows.segment_ids.reshape(-1)[own]) == {placed.segment[i]}
        np.testing.assert_array_equal(index[start:stop], np.arange(length))
        counted = np.arange(length)[::-1] if newest else np.arange(length)
        np.testing.assert_array_equal(rows.positions.reshape(-1)[own], counted)


def test_times_are_only_there_when_given_and_clipped_to_what_int32_holds():
    placed, lengths, items = place_alone(1), np.array([3]), np.arange(3)
    rows, _ = fill(placed, lengths, items, rows=1, capacity=3)
    assert rows.timestamps is None
    times = np.array([5, 6, 5 + 2**40])
    rows, _ = fill(placed, lengths, items, rows=1, capacity=3, timestamps=times)
    assert rows.timestamps.tolist() == [[0, 1, 2**31 - 1]]
