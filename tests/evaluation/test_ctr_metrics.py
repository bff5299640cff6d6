"""AUC, grouped AUC and log loss against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ranking_metrics as oracle

from jaxrec.errors import UserError
from jaxrec.evaluation.ctr_metrics import auc, gauc, log_loss

# Few distinct scores, so that ties are the rule.
rows = st.lists(
    st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 3)), min_size=2, max_size=25
)


def test_auc_by_hand():
    assert auc([1, 0], [2.0, 1.0]) == 1.0
    assert auc([1, 0], [1.0, 2.0]) == 0.0
    assert auc([1, 0], [1.0, 1.0]) == 0.5
    # Pairs (0.4 > 0.1), (0.4 > 0.3), (0.3 > 0.1), (0.3 = 0.3).
    assert auc([0, 1, 1, 0], [0.1, 0.4, 0.3, 0.3]) == 3.5 / 4
    assert auc([True, False], [np.inf, -np.inf]) == 1.0


@settings(deadline=None, max_examples=150)
@given(rows)
def test_auc_equals_all_pairs(table):
    labels, scores, _ = zip(*table, strict=True)
    if len(set(labels)) < 2:
        with pytest.raises(UserError, match="both classes"):
            auc(labels, scores)
        return
    wanted = oracle.auc(labels, scores)
    assert auc(labels, scores) == pytest.approx(wanted, abs=1e-14)
    assert auc(labels, np.exp(scores)) == pytest.approx(wanted, abs=1e-14)
    assert auc(labels, -np.array(scores)) == pytest.approx(1 - wanted, abs=1e-14)


@settings(deadline=None, max_examples=150)
@given(rows)
def test_gauc_equals_plain_loops(table):
    labels, scores, users = zip(*table, strict=True)
    classes = {user: {y for y, _, u in table if u == user} for user in users}
    if all(len(mine) < 2 for mine in classes.values()):
        with pytest.raises(UserError, match="none of the"):
            gauc(labels, scores, users)
        return
    value, counted, skipped, impressions = oracle.gauc(labels, scores, users)
    got = gauc(labels, scores, [f"user {user}" for user in users])
    assert got.value == pytest.approx(value, abs=1e-14)
    assert got[1:] == (counted, skipped, impressions)


def test_gauc_weights():
    # User 0: AUC 1 with 3 impressions, 2 positives; user 1: AUC 0 with 2 impressions, 1 positive;
    # user 2 has one class.
    labels = [1, 1, 0, 1, 0, 0]
    scores = [2, 3, 1, 0, 1, 5]
    users = [0, 0, 0, 1, 1, 2]
    assert gauc(labels, scores, users) == (3 / 5, 2, 1, 5)
    assert gauc(labels, scores, users, weight="positives").value == 2 / 3
    assert gauc(labels, scores, users, weight="uniform").value == 1 / 2
    with pytest.raises(UserError, match="weight must be one of impressions"):
        gauc(labels, scores, users, weight="clicks")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.001, 0.999)), min_size=1, max_size=20))
def test_log_loss_equals_the_formula(table):
    labels, probabilities = zip(*table, strict=True)
    wanted = oracle.log_loss(labels, probabilities)
    assert log_loss(labels, probabilities) == pytest.approx(wanted, rel=1e-12)
    logits = [math.log(p / (1 - p)) for p in probabilities]
    assert log_loss(labels, logits, from_logits=True) == pytest.approx(wanted, rel=1e-9)


def test_log_loss_at_the_ends():
    assert log_loss([1, 0], [1.0, 0.0]) == 0.0
    assert log_loss([1], [0.0]) == pytest.approx(-math.log(1e-15))
    assert log_loss([1], [0.0], eps=1e-3) == pytest.approx(-math.log(1e-3))
    # Far beyond what a probability can say.
    assert log_loss([0], [1000.0], from_logits=True) == 1000.0
    assert log_loss([1], [50.0], from_logits=True) == pytest.approx(math.exp(-50.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([0, 1, 2], [0.0, 1.0, 2.0]), "label 2 is 2, wanted 0 or 1"),
        (lambda: auc([0, 1], [0.0, np.nan]), "prediction 1 is NaN"),
        (lambda: auc([0, 1], [0.0]), r"got \(2,\) and \(1,\)"),
        (lambda: auc([], []), "no row to evaluate"),
        (lambda: auc([1, 1], [0.0, 1.0]), "got 2 positives and 0 negatives"),
        (lambda: gauc([0, 1], [0.0, 1.0], [1]), r"users has shape \(1,\)"),
        (lambda: log_loss([0, 1], [0.5, 1.5]), "prediction 1 is 1.5, .* from_logits=True"),
        (lambda: log_loss([0], [np.inf], from_logits=True), "logit 0 is infinite"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
