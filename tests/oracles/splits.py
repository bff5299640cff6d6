"""Leave-one-out and the temporal split of one user at a time, in plain loops.

Histories are lists of (time, event index); a target is (user, context start, context stop, event).
"""

import math

Target = tuple[int, int, int, int]


def leave_one_out(offsets: list[int], min_events: int) -> dict[str, list]:
    train, validation, test = [], [], []
    for user in range(len(offsets) - 1):
        start, end = offsets[user], offsets[user + 1]
        if end - start >= min_events:
            train.append((user, list(range(start, end - 2))))
            validation.append((user, start, end - 2, end - 2))
            test.append((user, start, end - 1, end - 1))
        elif end > start:
            train.append((user, list(range(start, end))))
    return {"train": train, "validation": validation, "test": test}


def _quantile(times: list[int], q: float) -> int:
    return sorted(times)[math.floor(q * (len(times) - 1))]


def _targets(user: int, start: int, candidates: list[int], first_after: int, rule: str) -> list:
    """Targets of one user; `first_after` is the user's first event past the threshold."""
    with_context = [event for event in candidates if event > start]
    if rule == "all":
        chosen = with_context
    elif rule == "last":
        chosen = with_context[-1:]
    elif rule == "first":
        chosen = [event for event in candidates if event == first_after and event > start]
    else:
        raise ValueError(rule)
    return [(user, start, event, event) for event in chosen]


def temporal(
    offsets: list[int], times: list[int], q: float, validation_q: float, rule: str
) -> dict[str, list]:
    users = range(len(offsets) - 1)
    threshold = _quantile(times, q)
    before = {
        user: [e for e in range(offsets[user], offsets[user + 1]) if times[e] <= threshold]
        for user in users
    }
    part = {user: events for user, events in before.items() if len(events) >= 2}
    if not part:
        return {"train": [], "validation": [], "test": []}
    validation_threshold = _quantile([times[e] for es in part.values() for e in es], validation_q)
    train, validation, test = [], [], []
    for user in users:
        start, end = offsets[user], offsets[user + 1]
        after = [e for e in range(start, end) if times[e] > threshold]
        if after:
            test += _targets(user, start, after, after[0], rule)
        if user not in part:
            continue
        learnt = [e for e in part[user] if times[e] <= validation_threshold]
        held_out = [e for e in part[user] if times[e] > validation_threshold]
        if len(learnt) >= 2:
            train.append((user, learnt))
        if held_out:
            validation += _targets(user, start, held_out, held_out[0], rule)
    return {"train": train, "validation": validation, "test": test}
