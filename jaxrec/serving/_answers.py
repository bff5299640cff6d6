"""What is asked of a run or of an exported one, checked, and what is answered."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxrec.data._ids import Id, IdIndex
from jaxrec.errors import UserError


class Recommendation(NamedTuple):
    """One item of a ranked list."""

    item_id: Id
    title: str | None
    score: float


def checked_history(history: Sequence[Id], items: IdIndex) -> NDArray[np.int32]:
    """Item indices of a history, which must not be empty."""
    if isinstance(history, str):
        raise UserError(f"recommend: history is a list of item ids, got the text {history!r}")
    events = items.find_each(history)
    if not len(events):
        raise UserError("recommend: the history is empty; give at least one item")
    return events


def checked_times(times: Sequence[int] | None, events: int) -> NDArray[np.int64]:
    """The times of a history of so many events, in whole seconds."""
    if times is None:
        raise UserError("recommend: the model reads when events happened; give times as well")
    try:
        given = np.asarray(times, np.float64)
        if not np.isfinite(given).all():
            raise ValueError
        seconds: NDArray[Any] = given.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"recommend: times must be numbers of seconds, got {times!r}") from None
    if seconds.shape != (events,):
        raise UserError(
            f"recommend: times must be one a history item ({events}), got {len(seconds)}"
        )
    if (np.diff(seconds) < 0).any():
        raise UserError("recommend: times must not decrease; the history is oldest first")
    return seconds
