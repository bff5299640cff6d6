"""Splits of a prepared data set into training, validation and test, as ranges of events.

Nothing is copied: a split names ranges of the set's flat event columns. The context of a target
is a range that ends before it; the target is one event.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from jaxrec.data.prepared import Interactions
from jaxrec.data.ranges import events_of
from jaxrec.errors import UserError
from jaxrec.registry import names, resolve

TargetRule = Literal["last", "first", "random", "all"]
_TARGET_RULES = ("last", "first", "random", "all")


@dataclass(frozen=True, eq=False)
class Spans:
    """Runs of consecutive events of one user each: `items[start:stop]`.

    Attributes:
        users: int32[m], user index.
        starts: int64[m], first event.
        stops: int64[m], one past the last event.
    """

    users: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_events(self) -> int:
        """Number of events in all runs."""
        return int(np.sum(self.stops - self.starts))

    def events(self) -> np.ndarray:
        """int64[num_events], the flat event indices of all runs, in order."""
        return events_of(self.starts, self.stops)


@dataclass(frozen=True, eq=False)
class Targets:
    """What a model is asked to rank: an event, given a user's events before it.

    Attributes:
        users: int32[m], user index.
        starts: int64[m], first event of the context.
        stops: int64[m], one past the context's last event; `stops <= targets`.
        targets: int64[m], event to be predicted; its item is `items[targets]`.
    """

    users: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: np.ndarray) -> "Targets":
        """The targets at `rows` (indices or a mask), for instance a sample for validation."""
        return Targets(self.users[rows], self.starts[rows], self.stops[rows], self.targets[rows])


@dataclass(frozen=True, eq=False)
class Split:
    """Training runs, validation and test targets, and how they were made.

    Attributes:
        name: the split's name.
        train: events that training may see.
        validation: targets to choose a model by.
        test: targets to report.
        description: protocol, parameters and counts, ready for JSON.
    """

    name: str
    train: Spans
    validation: Targets
    test: Targets
    description: dict[str, Any]


def leave_one_out(interactions: Interactions, min_events: int = 3) -> Split:
    """Last event of each user for test, the last but one for validation.

    For a user with events e_1 .. e_n, n >= min_events:
    train e_1 .. e_(n-2); validation e_(n-1) given e_1 .. e_(n-2); test e_n given e_1 .. e_(n-1).
    A user with fewer events is training material only. The order is the prepared set's: by
    time, and within a tie as its `tie_order` says.

    Args:
        interactions: the set.
        min_events: events a user needs to be evaluated, at least 3.

    Returns:
        The split; `description` counts targets whose item never occurs in training.

    Raises:
        UserError: where min_events is below 3, or no user has that many events.

    Source: the protocol of SASRec (Kang and McAuley, 2018), with full ranking.
    """
    if min_events < 3:
        raise UserError(
            f"min_events is {min_events}; leave-one-out needs at least 3 (one event each for "
            "training, validation and test)"
        )
    starts, ends = interactions.offsets[:-1], interactions.offsets[1:]
    lengths = ends - starts
    held_out = lengths >= min_events
    if not held_out.any():
        raise UserError(
            f"{interactions.name}: no user has {min_events} events (the longest history has "
            f"{int(lengths.max(initial=0))}), so nobody can be evaluated"
        )
    users = np.arange(interactions.num_users, dtype=np.int32)
    train = _spans(users, starts, np.where(held_out, ends - 2, ends))
    users, starts, ends = users[held_out], starts[held_out], ends[held_out]
    validation = Targets(users, starts, ends - 2, ends - 2)
    test = Targets(users, starts, ends - 1, ends - 1)
    description: dict[str, Any] = {
        "protocol": "leave-one-out: last event is test, last but one is validation",
        "min_events": int(min_events),
        "users_in_training_only": int(np.sum(~held_out & (lengths > 0))),
    }
    return _described("leave_one_out", interactions, train, validation, test, description)


def temporal(
    interactions: Interactions,
    quantile: float = 0.9,
    validation_quantile: float = 0.9,
    target: TargetRule = "last",
    seed: int = 0,
) -> Split:
    """Global temporal split: training lies before one moment for everybody.

    T is the `quantile` of all timestamps (a timestamp that occurs), and V the
    `validation_quantile` of those timestamps up to T that belong to users with at least two such
    events. With t(e) the time of an event,

        training:    events t(e) <= V of users with at least two such events;
        validation:  users whose last event up to T is after V; history up to T, targets in (V, T];
        test:        users whose last event is after T; full history, targets after T.

    The context of a target is everything the user did before it, in order. A target without any
    context is left out and counted.

    Args:
        interactions: the set, with timestamps.
        quantile: share of all events up to the test threshold, in (0, 1).
        validation_quantile: the same within the training part.
        target: which events past the threshold are targets: the user's "last", "first", one at
            "random", or "all" (successive: each with its own context).
        seed: for `target="random"`.

    Returns:
        The split; `description` holds the thresholds and counts, targets with items that never
        occur in training ("cold") among them: those stay, and count as misses.

    Raises:
        UserError: where the set has no timestamps, an option is out of range, or a part is empty.

    Source: Gusak et al., "Time to Split", RecSys 2025: global temporal split with validation by
    time.
    """
    _check_temporal(interactions, quantile, validation_quantile, target)
    assert interactions.timestamps is not None
    times = np.asarray(interactions.timestamps)
    starts, ends = interactions.offsets[:-1], interactions.offsets[1:]

    threshold = _quantile(times, quantile)
    test_begins = _first_after(times, interactions.offsets, threshold)
    trainable = test_begins - starts >= 2
    part = events_of(starts[trainable], test_begins[trainable])
    if len(part) == 0:
        raise UserError(
            f"{interactions.name}: no user has two events up to {_moment(threshold, interactions)} "
            f"(quantile {quantile}); choose a later quantile"
        )
    validation_threshold = _quantile(times[part], validation_quantile)
    validation_begins = _first_after(times, interactions.offsets, validation_threshold)
    users = np.arange(interactions.num_users, dtype=np.int32)
    learnt = validation_begins - starts >= 2
    train = _spans(users, starts, np.where(learnt, validation_begins, starts))

    rng = np.random.default_rng(seed)
    # A user outside the training part has one event up to T at most, so no target with a context.
    validation, skipped_validation = _targets(
        users, starts, validation_begins, test_begins, target, rng
    )
    test, skipped_test = _targets(users, starts, test_begins, ends, target, rng)
    for name, targets, moment, option in (
        ("validation", validation, validation_threshold, "validation_quantile"),
        ("test", test, threshold, "quantile"),
    ):
        if len(targets) == 0:
            raise UserError(
                f"{interactions.name}: nothing is left for {name} after "
                f"{_moment(moment, interactions)}; choose an earlier {option}"
            )
    if len(train) == 0:
        raise UserError(
            f"{interactions.name}: no user has two events up to "
            f"{_moment(validation_threshold, interactions)}; choose a later validation_quantile"
        )
    description: dict[str, Any] = {
        "protocol": "global temporal split, validation by time",
        "quantile": float(quantile),
        "validation_quantile": float(validation_quantile),
        "target": target,
        "seed": int(seed) if target == "random" else None,
        "test_after": threshold,
        "test_after_utc": _moment(threshold, interactions),
        "validation_after": validation_threshold,
        "validation_after_utc": _moment(validation_threshold, interactions),
        "time_unit": interactions.time_unit,
        "validation_targets_without_context": skipped_validation,
        "test_targets_without_context": skipped_test,
    }
    return _described("temporal", interactions, train, validation, test, description)


def resolve_split(name: str | Callable[..., Split]) -> Callable[..., Split]:
    """The split function of that name; a function is returned as it is.

    Args:
        name: "leave_one_out", "temporal" (dashes will do) or a name registered with
            `jaxrec.registry.register("split", name, function)`; or a function
            `(interactions, **options) -> Split`.

    Raises:
        UserError: for an unknown name.

    >>> resolve_split("leave-one-out").__name__
    'leave_one_out'
    """
    if callable(name):
        return name
    key = name.replace("-", "_")
    return resolve("split", key if key in names("split") else name)


def make_split(
    interactions: Interactions, name: str | Callable[..., Split], **options: Any
) -> Split:
    """Splits a set by the split's name and options, as a config gives them.

    Raises:
        UserError: for an unknown split or an option that it does not have.
    """
    function = resolve_split(name)
    known = list(inspect.signature(function).parameters)[1:]
    for option in options:
        if option not in known:
            raise UserError(f"split {name!r} has no option {option!r}; it has: {', '.join(known)}")
    return function(interactions, **options)


def _check_temporal(
    interactions: Interactions, quantile: float, validation_quantile: float, target: str
) -> None:
    for option, value in (("quantile", quantile), ("validation_quantile", validation_quantile)):
        if not 0.0 < value < 1.0:
            raise UserError(f"{option} is {value}; wanted a number between 0 and 1, such as 0.9")
    if target not in _TARGET_RULES:
        raise UserError(f"target is {target!r}; wanted one of {', '.join(_TARGET_RULES)}")
    if interactions.timestamps is None:
        raise UserError(
            f"{interactions.name}: the set has no timestamps, so it has no temporal split; use "
            "leave_one_out, or import it with a time column"
        )


def _quantile(times: np.ndarray, quantile: float) -> int:
    """The lower quantile: a time that occurs, exact for 64-bit times."""
    place = int(np.floor(quantile * (len(times) - 1)))
    return int(np.partition(times, place)[place])


def _first_after(times: np.ndarray, offsets: np.ndarray, threshold: int) -> np.ndarray:
    """int64[U]: each user's first event later than the threshold; the end where there is none."""
    before = np.zeros(len(times) + 1, np.int64)
    np.cumsum(times <= threshold, out=before[1:])
    return offsets[:-1] + before[offsets[1:]] - before[offsets[:-1]]


def _spans(users: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Spans:
    kept = stops > starts
    return Spans(users[kept], starts[kept], stops[kept])


def _targets(
    users: np.ndarray,
    starts: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
    target: str,
    rng: np.random.Generator,
) -> tuple[Targets, int]:
    """Targets among the events [begins, ends) of each user, and how many lacked a context."""
    # The very first event of a user has nothing before it to predict from.
    usable = np.maximum(begins, starts + 1)
    if target == "all":
        without_context = int(np.sum((begins < ends) & (begins == starts)))
        lengths = np.maximum(ends - usable, 0)
        chosen = events_of(usable, usable + lengths)
        rows = np.repeat(np.arange(len(users)), lengths)
        return Targets(users[rows], starts[rows], chosen, chosen), without_context
    kept = usable < ends
    if target == "first":
        kept &= begins > starts
    without_context = int(np.sum((begins < ends) & ~kept))
    users, starts, usable, ends = users[kept], starts[kept], usable[kept], ends[kept]
    if target == "last":
        chosen = ends - 1
    elif target == "first":
        chosen = usable
    else:
        chosen = rng.integers(usable, ends)
    return Targets(users, starts, chosen, chosen), without_context


def _moment(time: int, interactions: Interactions) -> str:
    ticks = interactions.ticks_per_second or 1
    try:
        return datetime.fromtimestamp(time // ticks, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return str(time)


def _described(
    name: str,
    interactions: Interactions,
    train: Spans,
    validation: Targets,
    test: Targets,
    description: dict[str, Any],
) -> Split:
    learnt = np.zeros(interactions.num_items, bool)
    learnt[interactions.items[train.events()]] = True
    description |= {
        "train_users": len(train),
        "train_events": train.num_events,
        "items_in_training": int(learnt.sum()),
    }
    for part, targets in (("validation", validation), ("test", test)):
        description |= {
            f"{part}_users": len(np.unique(targets.users)),
            f"{part}_targets": len(targets),
            f"cold_{part}_targets": int(np.sum(~learnt[interactions.items[targets.targets]])),
        }
    return Split(name, train, validation, test, description)
