"""Plain loops over the definitions of the metrics; one list, one set, one cut-off at a time."""

import math

import numpy as np


def hits(ranked, relevant, k):
    """1 where the list names a relevant item for the first time, for ranks 1 to k."""
    seen, result = set(), []
    for item in list(ranked)[:k]:
        new = item >= 0 and item in relevant and item not in seen
        result.append(1 if new else 0)
        seen.add(item)
    return result


def hr(ranked, relevant, k):
    return 1.0 if sum(hits(ranked, relevant, k)) > 0 else 0.0


def recall(ranked, relevant, k):
    return sum(hits(ranked, relevant, k)) / len(relevant)


def precision(ranked, relevant, k):
    return sum(hits(ranked, relevant, k)) / k


def dcg(gains):
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def ndcg(ranked, relevant, k):
    ideal = [1] * min(len(relevant), k)
    return dcg(hits(ranked, relevant, k)) / dcg(ideal)


def mrr(ranked, relevant, k):
    for rank, hit in enumerate(hits(ranked, relevant, k), start=1):
        if hit:
            return 1.0 / rank
    return 0.0


def average_precision(ranked, relevant, k):
    total, found = 0.0, 0
    for rank, hit in enumerate(hits(ranked, relevant, k), start=1):
        if hit:
            found += 1
            total += found / rank
    return total / min(len(relevant), k)


BY_NAME = {
    "hr": hr,
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "mrr": mrr,
    "map": average_precision,
}


def per_list(lists, relevant_sets, ks):
    """The same keys and arrays as `jaxrec.evaluation.metrics.per_user`."""
    return {
        f"{name}@{k}": np.array(
            [
                metric(ranked, set(relevant), k)
                for ranked, relevant in zip(lists, relevant_sets, strict=True)
            ]
        )
        for name, metric in BY_NAME.items()
        for k in ks
    }


def coverage(lists, num_items, k):
    listed = set()
    for ranked in lists:
        listed.update(item for item in list(ranked)[:k] if item >= 0)
    return len(listed) / num_items


def auc(labels, scores):
    """Wins of positives over negatives, pair by pair."""
    wins, pairs = 0.0, 0
    for label, score in zip(labels, scores, strict=True):
        for other_label, other_score in zip(labels, scores, strict=True):
            if label == 1 and other_label == 0:
                pairs += 1
                wins += 1.0 if score > other_score else 0.5 if score == other_score else 0.0
    return wins / pairs


def gauc(labels, scores, users):
    """Impression-weighted mean of the users' AUC: (value, users, skipped, impressions)."""
    total, weight, counted, skipped = 0.0, 0, 0, 0
    for user in sorted(set(users)):
        rows = [row for row, owner in enumerate(users) if owner == user]
        mine = [labels[row] for row in rows]
        if len(set(mine)) < 2:
            skipped += 1
            continue
        counted += 1
        total += len(rows) * auc(mine, [scores[row] for row in rows])
        weight += len(rows)
    return total / weight, counted, skipped, weight


def log_loss(labels, probabilities):
    return -sum(
        math.log(p) if label == 1 else math.log(1.0 - p)
        for label, p in zip(labels, probabilities, strict=True)
    ) / len(labels)
