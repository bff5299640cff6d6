"""Baselines and seen items by plain loops over one user at a time."""


def training_counts(items, train, num_items):
    counts = [0] * num_items
    for start, stop in zip(train.starts, train.stops, strict=True):
        for event in range(start, stop):
            counts[items[event]] += 1
    return counts


def training_last_times(items, times, train, num_items, never):
    last = [never] * num_items
    for start, stop in zip(train.starts, train.stops, strict=True):
        for event in range(start, stop):
            last[items[event]] = max(last[items[event]], int(times[event]))
    return last


def by_score(scores):
    """Item indices, the largest score first, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda item: (-scores[item], item))


def cut(ranked, k):
    return (ranked + [-1] * k)[:k]


def ranked_lists(scores, items, targets, k, filter_seen):
    order = by_score(scores)
    lists = []
    for start, stop in zip(targets.starts, targets.stops, strict=True):
        seen = {int(item) for item in items[start:stop]} if filter_seen else set()
        lists.append(cut([item for item in order if item not in seen], k))
    return lists


def own_most_recent(scores, items, targets, k):
    order = by_score(scores)
    lists = []
    for start, stop in zip(targets.starts, targets.stops, strict=True):
        own = []
        for item in reversed(items[start:stop].tolist()):
            if item not in own:
                own.append(item)
        lists.append(cut(own + [item for item in order if item not in own], k))
    return lists


def item_similarities(items, train, num_items, neighbours, shrinkage):
    users = [set() for _ in range(num_items)]
    for user, (start, stop) in enumerate(zip(train.starts, train.stops, strict=True)):
        for event in range(start, stop):
            users[items[event]].add(user)
    rows = []
    for i in range(num_items):
        row = [0.0] * num_items
        for j in range(num_items):
            common = len(users[i] & users[j])
            if i != j and common:
                row[j] = common / ((len(users[i]) * len(users[j])) ** 0.5 + shrinkage)
        kept = by_score(row)[:neighbours]
        rows.append([value if j in kept else 0.0 for j, value in enumerate(row)])
    return rows


def neighbour_scores(similarities, history):
    """Of every item, for one history."""
    return [sum(similarities[j][i] for j in set(history)) for i in range(len(similarities))]


def seen_listed(lists, items, targets):
    total = 0
    for ranked, start, stop in zip(lists, targets.starts, targets.stops, strict=True):
        history = {int(item) for item in items[start:stop]}
        total += sum(1 for item in ranked if int(item) in history)
    return total


def repeated_targets(items, targets):
    total = 0
    for start, stop, event in zip(targets.starts, targets.stops, targets.targets, strict=True):
        total += int(items[event]) in {int(item) for item in items[start:stop]}
    return total
