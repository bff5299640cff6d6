"""Evaluations, protocols, and reports in JSON and as a table."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import baselines as oracle
from oracles import ranking_metrics
from rich.console import Console
from toy_sets import in_memory

from jaxrec.data.splits import leave_one_out, temporal
from jaxrec.errors import UserError
from jaxrec.evaluation import _questions
from jaxrec.evaluation.baselines import evaluate_baselines
from jaxrec.evaluation.bootstrap import confidence_interval, paired_difference
from jaxrec.evaluation.report import as_json, as_table, compare, json_line, print_report, summary
from jaxrec.evaluation.results import describe_protocol, evaluate_lists


@pytest.fixture
def shop(rng):
    histories = [rng.integers(0, 30, rng.integers(4, 12)).tolist() for _ in range(60)]
    return in_memory(histories, 30, [list(range(len(history))) for history in histories])


@pytest.fixture
def split(shop):
    return leave_one_out(shop)


def oracle_lists(shop, split, rng, k=6):
    """Lists that find some targets: the target itself at a random rank, or none."""
    lists = np.argsort(rng.random((len(split.test), shop.num_items)), axis=1)[:, :k]
    return lists.astype(np.int32)


def rendered(report, **options) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console, **options)
    return console.file.getvalue()


def test_evaluation_is_the_metrics_of_the_targets(shop, split, rng):
    lists = oracle_lists(shop, split, rng)
    result = evaluate_lists(lists, shop, split.test, ks=(2, 6), notes=["a note"])
    targets = [[int(shop.items[event])] for event in split.test.targets]
    wanted = ranking_metrics.per_list(lists, targets, (2, 6))
    for key, values in wanted.items():
        np.testing.assert_allclose(result.per_list[key], values, atol=1e-15)
        assert result[key] == pytest.approx(values.mean(), abs=1e-15)
    assert result["coverage@2"] == ranking_metrics.coverage(lists, 30, 2)
    assert len(result) == len(wanted) + 2
    assert dict(result) == result.metrics
    assert (result.num_users, result.num_targets, result.notes) == (60, 60, ("a note",))
    assert list(result)[:2] == ["hr@2", "ndcg@2"]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_seen_items_and_repeats_equal_plain_loops(data):
    item = st.integers(0, 6)
    histories = data.draw(st.lists(st.lists(item, min_size=3, max_size=8), min_size=1, max_size=5))
    shop = in_memory(histories, 7)
    split = leave_one_out(shop)
    slot = st.integers(-1, 6)
    row = st.lists(slot, min_size=4, max_size=4)
    lists = np.array([data.draw(row) for _ in range(len(split.test))], np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_questions, "_BLOCK_EVENTS", data.draw(st.integers(1, 20)))
        result = evaluate_lists(lists, shop, split.test, ks=(3,))
        protocol = describe_protocol(shop, split)
    assert result.seen_listed == oracle.seen_listed(lists[:, :3], shop.items, split.test)
    assert protocol["repeat_targets"] == oracle.repeated_targets(shop.items, split.test)


def test_number_of_lists_must_fit(shop, split):
    with pytest.raises(UserError, match="wanted 60 lists, one a question, got 59"):
        evaluate_lists(np.zeros((59, 1), np.int32), shop, split.test, ks=(1,))


def test_protocol_is_complete(shop, split):
    protocol = describe_protocol(shop, split, part="validation", filter_seen=False)
    assert protocol["data"] == "toy"
    assert protocol["data_hash"] == "abc"
    assert protocol["split"] == "leave_one_out"
    assert protocol["part"] == "validation"
    assert protocol["candidates"] == "all 30 items"
    assert protocol["seen_items"] == "may be listed"
    assert protocol["split_description"] == split.description
    assert (protocol["lists"], protocol["users"]) == (60, 60)
    json.dumps(protocol, allow_nan=False)


def test_json_has_the_keys_that_scripts_read(shop, split, rng):
    ks = (1, 6)
    model = evaluate_lists(oracle_lists(shop, split, rng), shop, split.test, ks=ks)
    baselines = evaluate_baselines(shop, split, ks=ks)
    report = compare(model, baselines, describe_protocol(shop, split), name="sasrec", resamples=200)
    line = json_line(report)
    assert "\n" not in line
    got = json.loads(line)
    assert got == json.loads(json.dumps(as_json(report)))
    for key in ("hr@6", "ndcg@6", "coverage@6", "recall@1", "precision@1", "map@6", "mrr@6"):
        assert got[key] == model[key]
        assert got["popularity"][key] == baselines["popularity"][key]
        assert got["most_recent"][key] == baselines["most_recent"][key]
    assert all(isinstance(value, float) for value in got["popularity"].values())
    assert (got["model"], got["users"], got["lists"], got["targets"]) == ("sasrec", 60, 60, 60)
    assert got["protocol"]["split"] == "leave_one_out"
    wanted = confidence_interval(model.per_list["hr@6"], resamples=200)
    assert got["intervals"]["hr@6"] == [wanted.low, wanted.high]
    assert "coverage@6" not in got["intervals"]
    assert set(got["baseline_intervals"]) == {"popularity", "most_recent"}
    wanted = paired_difference(
        model.per_list["ndcg@6"], baselines["popularity"].per_list["ndcg@6"], resamples=200
    )
    assert got["differences"]["popularity"]["ndcg@6"] == wanted._asdict()
    assert got["interval_method"] == {
        "level": 0.95,
        "resamples": 200,
        "seed": 0,
        "method": "bootstrap over users, percentile",
    }


def test_json_refuses_what_is_not_json(shop, split):
    model = evaluate_lists(np.zeros((60, 1), np.int32), shop, split.test, ks=(1,))
    report = compare(model, {}, {})
    report.model.metrics["hr@1"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_line(report)


def test_table_shows_the_numbers(shop, split, rng):
    model = evaluate_lists(oracle_lists(shop, split, rng), shop, split.test, ks=(1, 6))
    baselines = evaluate_baselines(shop, split, ks=(1, 6))
    report = compare(model, baselines, describe_protocol(shop, split), name="sasrec", level=0.9)
    text = rendered(report)
    lines = text.splitlines()
    assert max(map(len, lines[:-4])) <= 80
    assert lines[0].strip() == "toy: 60 users"
    heading = "metric sasrec 90 % interval popularity most recent"
    assert lines[2].split() == heading.split()
    row = next(line for line in lines if line.strip().startswith("hr@6")).split()
    interval = report.intervals["model"]["hr@6"]
    assert row == [
        "hr@6",
        f"{model['hr@6']:.4f}",
        f"{interval.low:.4f}",
        "–",
        f"{interval.high:.4f}",
        f"{baselines['popularity']['hr@6']:.4f}",
        f"{baselines['most_recent']['hr@6']:.4f}",
    ]
    # With one target they would repeat hr and mrr.
    assert "recall@6" not in text
    assert "precision@6" not in text
    only = rendered(report, metrics=["recall@6"])
    assert "recall@6" in only
    assert "hr@6" not in only
    with pytest.raises(UserError, match="hr@7 was not evaluated, there is hr@1"):
        as_table(report, metrics=["hr@7"])


def test_table_of_several_targets_shows_recall(rng):
    histories = rng.integers(0, 9, (20, 8)).tolist()
    shop = in_memory(histories, 9, [sorted(rng.integers(0, 50, 8).tolist()) for _ in range(20)])
    split = temporal(shop, 0.6, 0.6, target="all")
    baselines = evaluate_baselines(shop, split, ks=(2,), by_user=True)
    model = baselines["popularity"]
    assert model.num_targets > len(model.users)
    assert "recall@2" in rendered(compare(model, baselines, {}))

    # One list a target: several lists a user, and users are what is resampled.
    baselines = evaluate_baselines(shop, split, ks=(2,))
    model = baselines["popularity"]
    assert model.num_users < len(model.users) == model.num_targets
    report = compare(model, baselines, describe_protocol(shop, split))
    by_user = confidence_interval(model.per_list["hr@2"], groups=model.users)
    assert report.intervals["model"]["hr@2"] == by_user
    assert by_user != confidence_interval(model.per_list["hr@2"])
    assert f"{model.num_users} users, {len(model.users)} lists" in rendered(report)


def test_summary_says_what_the_reader_must_know(shop, split):
    best = shop.items[split.test.targets][:, None]
    good = evaluate_lists(best, shop, split.test, ks=(1,), notes=["odd thing"])
    bad = evaluate_lists((best + 1) % 30, shop, split.test, ks=(1,))
    protocol = describe_protocol(shop, split)
    lines = summary(compare(good, {"popularity": bad}, protocol, name="sasrec"))
    assert lines[0].startswith("ndcg@1, sasrec minus popularity: +1.0000 [")
    assert "better" not in lines[0]
    assert lines[1] == (
        "protocol: leave_one_out split, test part, full ranking of all 30 items, seen items left "
        "out, one list a target"
    )
    repeats = protocol["repeat_targets"]
    assert repeats > 0
    assert lines[2].startswith(f"{repeats} targets stand in their user's history already and ")
    assert lines[-1] == "note: odd thing"
    worse = summary(compare(bad, {"popularity": good}, {}))
    assert worse == [
        "ndcg@1, model minus popularity: -1.0000 [-1.0000, -1.0000]: the baseline is better"
    ]
    even = summary(compare(good, {"most_recent": good}, {}))
    assert even[0].endswith("[+0.0000, +0.0000], which does not tell them apart")


def test_names_are_not_markup(shop, split):
    model = evaluate_lists(np.zeros((60, 1), np.int32), shop, split.test, ks=(1,))
    assert "[red]x" in rendered(compare(model, {}, {}, name="[red]x"))


def test_systems_must_answer_the_same(shop, split):
    model = evaluate_lists(np.zeros((60, 1), np.int32), shop, split.test, ks=(1,))
    fewer = split.test.take(np.arange(10))
    other = evaluate_lists(np.zeros((10, 1), np.int32), shop, fewer, ks=(1,))
    with pytest.raises(UserError, match="popularity was evaluated on 10 lists of other users"):
        compare(model, {"popularity": other}, {})
    deeper = evaluate_lists(np.zeros((60, 2), np.int32), shop, split.test, ks=(2,))
    with pytest.raises(UserError, match="popularity was not evaluated for hr@2"):
        compare(deeper, {"popularity": model}, {})
