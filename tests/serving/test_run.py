"""A run opened again: what it recommends, judges and exports, and how damage is told."""

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from oracles import ranking_metrics as metrics_oracle
from oracles import sasrec as oracle
from small_sets import (
    FIRST_USER,
    ITEMS,
    MAX_LENGTH,
    compiled_once,
    copy_of,
    histories,
    shop,
    small_config,
    trained_run,
)

import jaxrec
from jaxrec.data.prepared import write_prepared
from jaxrec.data.splits import leave_one_out
from jaxrec.errors import UserError
from jaxrec.serving._answers import checked_times
from jaxrec.training.run_folder import RunFolder, write_json

IDS = [f"i{i:02d}" for i in range(ITEMS)]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with compiled_once():
        yield


@functools.cache
def run():
    return jaxrec.load(trained_run())


def scores_of(history, which=None):
    """float64[items] by the oracle."""
    parameters = (which or run()).parameters
    states = oracle.hidden(parameters, history[-MAX_LENGTH:], run().config.model)
    return states[-1] @ np.asarray(parameters["item_embedding"], np.float64).T


def best(history, k, *, seen=True, allow=None, deny=()):
    scores = scores_of(history)
    if seen:
        scores[history] = -np.inf
    for item in range(ITEMS):
        if (allow is not None and IDS[item] not in allow) or IDS[item] in deny:
            scores[item] = -np.inf
    ranked = [int(i) for i in np.argsort(-scores, kind="stable")[:k] if np.isfinite(scores[i])]
    return [IDS[i] for i in ranked], scores[ranked]


def assert_recommended(found, wanted):
    assert [r.item_id for r in found] == wanted[0]
    np.testing.assert_allclose([r.score for r in found], wanted[1], atol=1e-4)


def test_the_public_names_are_what_they_say():
    from jaxrec import Run, fit, load
    from jaxrec import UserError as Error

    assert callable(fit)
    assert callable(load)
    assert jaxrec.fit is fit
    assert isinstance(run(), Run)
    assert Error is UserError


def test_the_readme_is_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^run\.(?:.*)$", text, flags=re.MULTILINE)
    assert len(lines) == 4
    ids = {"4711": repr(FIRST_USER), '"sku-17"': repr(IDS[3])}
    for line in lines:
        for shown, own in ids.items():
            line = line.replace(shown, own)
        found = eval(line, {"run": run()})
        assert found is not None or Path("vectors.npy").exists()


def test_it_says_what_it_is():
    assert repr(run()) == f"Run({str(trained_run())!r}: sasrec on shop, step {run().step})"
    assert run().config == small_config()
    assert run().num_items == ITEMS
    assert run().item_ids.tolist() == IDS
    assert run().item_titles == shop().item_titles
    assert run().interactions.hash == shop().hash


@pytest.mark.parametrize("index", [0, 7, 30])
def test_a_user_gets_what_the_formula_says(index):
    history = histories()[index]
    wanted = best(history, 5)
    assert_recommended(run().recommend(FIRST_USER + index, k=5), wanted)
    assert_recommended(run().recommend(str(FIRST_USER + index), k=5), wanted)
    assert_recommended(run().recommend(history=[IDS[i] for i in history], k=5), wanted)


@pytest.mark.parametrize("repeats", [1, 20])
def test_few_ids_and_many_are_found_alike(repeats):
    """Few are looked for one by one, many at once."""
    ids = IDS[3:6] * repeats
    found = run().recommend(history=ids, k=4)
    assert_recommended(found, best([3, 4, 5] * repeats, 4))
    with pytest.raises(UserError, match="item 'i99' is not in the data set shop"):
        run().recommend(history=[*ids, "i99"])
    users = [FIRST_USER + 1, str(FIRST_USER)] * repeats
    np.testing.assert_array_equal(run().recommend_all(users, k=2).users, [1, 0] * repeats)
    with pytest.raises(UserError, match="user 7 is not in the data set shop"):
        run().recommend_all([*users, 7])


def test_times_are_numbers():
    with pytest.raises(UserError, match="times must be numbers of seconds"):
        checked_times([1.0, float("nan")], 2)


def test_histories_short_and_long():
    for history in ([4], [4, 4, 4], list(range(25))):
        found = run().recommend(history=[IDS[i] for i in history], k=6)
        assert_recommended(found, best(history, 6))
    assert len(run().recommend(history=[IDS[i] for i in range(25)], k=10)) == 5


def test_titles_come_along_where_there_are_any():
    for found in run().recommend(FIRST_USER, k=30):
        index = IDS.index(found.item_id)
        assert found.title == (f"Thing {index}" if index % 3 else None)
    assert run().item_text("i01") == "Thing 1"
    assert run().item_text("i03") == "i03"


def test_items_of_the_history_come_back_if_asked_for():
    history = [3, 5, 7]
    found = run().recommend(history=["i03", "i05", "i07"], k=ITEMS, filter_seen=False)
    assert_recommended(found, best(history, ITEMS, seen=False))
    without = run().recommend(history=["i03", "i05", "i07"], k=ITEMS)
    assert {r.item_id for r in found} - {r.item_id for r in without} == {"i03", "i05", "i07"}


def test_allowed_and_denied():
    history, allow, deny = [3, 5], ["i01", "i03", "i09", "i11"], ["i09"]
    named = ["i03", "i05"]
    for options in ({"allow": allow}, {"deny": deny}, {"allow": allow, "deny": deny}):
        found = run().recommend(history=named, k=8, **options)
        assert_recommended(found, best(history, 8, **options))
    assert run().recommend(history=named, allow=[]) == []
    assert len(run().recommend(history=named, allow=iter(["i01"]))) == 1


def test_as_many_as_there_are():
    assert len(run().recommend(history=["i00"], k=10**9)) == ITEMS - 1
    assert len(run().recommend(history=["i00"], k=1)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a user or a history, one of the two"),
        ({"user": 101, "history": ["i00"]}, "give a user or a history, one of the two"),
        ({"user": 999}, "user 999 is not in the data set shop"),
        ({"user": "ann"}, "user 'ann' is not in the data set shop"),
        ({"history": ["i00", "i99"]}, "item 'i99' is not in the data set shop"),
        ({"history": ["I00"]}, "did you mean 'i00'"),
        ({"history": [0]}, "item 0 is not in the data set shop"),
        ({"history": []}, "the history is empty"),
        ({"history": "i00,i01"}, "history is a list of item ids"),
        ({"user": 101, "k": 0}, "k must be at least 1, got 0"),
        ({"user": 101, "allow": ["i01", "nope"]}, "item 'nope' is not in"),
        ({"user": 101, "deny": ["nope"]}, "item 'nope' is not in"),
    ],
)
def test_what_it_cannot_answer_is_told(arguments, message):
    with pytest.raises(UserError) as caught:
        run().recommend(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everybody_at_once_gets_what_each_would_get_alone():
    told = []
    lists = run().recommend_all(k=4, progress=told.append)
    assert lists.users.tolist() == list(range(60))
    assert lists.items.shape == lists.scores.shape == (60, 4)
    assert sum(told) == 60
    for user in (0, 13, 58, 59):
        wanted = best(histories()[user], 4)
        assert [IDS[i] for i in lists.items[user]] == wanted[0]
        np.testing.assert_allclose(lists.scores[user], wanted[1], atol=1e-4)


def test_some_users_in_the_order_given():
    lists = run().recommend_all([FIRST_USER + 9, str(FIRST_USER + 2)], k=3, deny=["i01"])
    assert lists.users.tolist() == [9, 2]
    for row, user in enumerate((9, 2)):
        assert [IDS[i] for i in lists.items[row]] == best(histories()[user], 3, deny=["i01"])[0]
    with pytest.raises(UserError, match="user 1 is not in"):
        run().recommend_all([1])


def test_lists_of_a_part_leave_the_target_out_of_the_context():
    lists = run().lists("test")
    targets = leave_one_out(shop()).test
    assert lists.shape == (len(targets), 10)
    for row in (0, 20, 57):
        history = shop().items[targets.starts[row] : targets.stops[row]].tolist()
        assert [IDS[i] for i in lists[row] if i >= 0] == best(history, 10)[0]


def test_the_report_is_that_of_the_lists():
    report = run().evaluate()
    targets = leave_one_out(shop()).test
    truth = [{int(shop().items[event])} for event in targets.targets]
    lists = run().lists("test").tolist()
    for name, values in metrics_oracle.per_list(lists, truth, (1, 5, 10)).items():
        assert report.model[name] == pytest.approx(values.mean()), name
    assert report.model["coverage@10"] == metrics_oracle.coverage(lists, ITEMS, 10)
    assert set(report.baselines) >= {"popularity", "most_recent"}
    low, high = report.intervals["model"]["hr@10"][1:3]
    assert low <= report.model["hr@10"] <= high
    assert report.protocol["part"] == "test"
    assert report.protocol["seen_items"] == "left out"
    assert run().evaluate("validation").protocol["part"] == "validation"


def test_it_learnt_something():
    """The set's order is two steps on in seven cases of ten: popularity cannot know."""
    report = run().evaluate("validation", ks=(10,))
    assert report.model["ndcg@10"] > 0.2


def test_other_cut_offs():
    report = run().evaluate(ks=(2, 40))
    assert {"hr@2", "hr@40"} <= set(report.model)
    assert "hr@10" not in report.model
    assert report.model["coverage@40"] == 1.0


@pytest.mark.parametrize("ks", [(0,), (5, -1)])
def test_cut_offs_that_make_no_sense(ks):
    for call in (run().evaluate, run().lists):
        with pytest.raises(UserError, match="cut-offs must be whole numbers from 1 on"):
            call("test", ks=ks)


def test_an_unknown_part():
    with pytest.raises(UserError, match="train"):
        run().evaluate("train")
    with pytest.raises(UserError, match="train"):
        run().lists("train")


def test_similar_items_by_the_angle_of_their_vectors():
    vectors = np.asarray(run().parameters["item_embedding"], np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit[4]
    order = [i for i in np.argsort(-cosines) if i != 4][:6]
    found = run().similar_items("i04", k=6)
    assert [r.item_id for r in found] == [IDS[i] for i in order]
    np.testing.assert_allclose([r.score for r in found], cosines[order], atol=1e-6)
    assert len(run().similar_items("i04", k=500)) == ITEMS - 1
    with pytest.raises(UserError, match="item 'i4' is not in"):
        run().similar_items("i4")
    with pytest.raises(UserError, match="k must be at least 1"):
        run().similar_items("i04", k=0)


def test_vectors_as_numpy(tmp_path):
    path = run().export_item_vectors(tmp_path / "v.npy")
    got = np.load(path, allow_pickle=False)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, run().parameters["item_embedding"])
    np.testing.assert_array_equal(run().item_vectors(), got)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]


def test_vectors_as_parquet(tmp_path):
    table = pq.read_table(run().export_item_vectors(str(tmp_path / "v.parquet")))
    assert table.column_names == ["item_id", "title", "vector"]
    assert table["item_id"].to_pylist() == IDS
    assert table["title"].to_pylist() == shop().item_titles
    np.testing.assert_array_equal(
        np.array(table["vector"].to_pylist(), np.float32), run().parameters["item_embedding"]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["v.parquet"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v.csv", "item vectors are written to .npy or .parquet"),
        ("v", "item vectors are written to .npy or .parquet"),
        ("absent/v.npy", "cannot be written"),
        ("absent/v.parquet", "cannot be written"),
        ("file/v.npy", "cannot be written"),
        ("folder.npy", "cannot be written"),
    ],
)
def test_vectors_that_cannot_be_written(tmp_path, name, message):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(UserError, match=message):
        run().export_item_vectors(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.npy"]


def test_checkpoints_by_name_and_step():
    last = jaxrec.load(trained_run(), checkpoint="last")
    assert last.step == 12
    nine = jaxrec.load(trained_run(), checkpoint="9")
    assert nine.step == 9
    table = "item_embedding"
    assert np.abs(last.parameters[table] - nine.parameters[table]).max() > 1e-4
    wanted = scores_of([3, 5], nine)
    found = nine.recommend(history=["i03", "i05"], k=ITEMS, filter_seen=False)
    assert [r.item_id for r in found] == [IDS[i] for i in np.argsort(-wanted, kind="stable")]
    with pytest.raises(UserError, match="no checkpoint '10'; there are best, last and steps"):
        jaxrec.load(trained_run(), checkpoint="10")


def test_recommending_from_a_history_needs_no_data_set(tmp_path):
    """A run folder can be carried elsewhere."""
    folder = copy_of(trained_run(), tmp_path / "run")
    values = json.loads((folder / "config.json").read_text())
    values["experiment"]["data"]["name"] = "gone-from-here"
    write_json(folder / "config.json", values)
    carried = jaxrec.load(folder)
    assert_recommended(carried.recommend(history=["i03"], k=3), best([3], 3))
    assert len(carried.similar_items("i03")) == 10
    carried.export_item_vectors(tmp_path / "v.npy")
    for call in (lambda: carried.recommend(FIRST_USER), carried.evaluate, carried.recommend_all):
        with pytest.raises(UserError, match="no data set 'gone-from-here'"):
            call()


def other_shop(folder, lists, name="shop"):
    lengths = [len(one) for one in lists]
    return write_prepared(
        folder / name,
        name=name,
        users=np.repeat(np.arange(len(lists)), lengths),
        items=np.concatenate([np.array(one, np.int64) for one in lists if len(one)]),
        timestamps=None,
        ratings=None,
        user_ids=np.arange(len(lists)) + FIRST_USER,
        item_ids=IDS,
        source={},
        tie_order="as given",
    )


def on_another_set(tmp_path, lists, *, same_hash):
    """The trained run with another set in the place of its own."""
    data = other_shop(tmp_path, lists)
    folder = RunFolder(copy_of(trained_run(), tmp_path / "run"))
    folder.write_config(
        replace(small_config(), data=replace(small_config().data, name=str(data.path)))
    )
    if same_hash:
        write_json(folder.data, folder.read_data() | {"hash": data.hash})
    return jaxrec.load(folder.path)


def test_another_version_of_the_data_is_refused(tmp_path):
    changed = histories()
    changed[0] = [*changed[0], 1]
    opened = on_another_set(tmp_path, changed, same_hash=False)
    for call in (lambda: opened.recommend(FIRST_USER), opened.evaluate, opened.recommend_all):
        with pytest.raises(UserError, match="import the version it was trained on"):
            call()
    assert opened.recommend(history=["i03"])


def test_users_without_any_event(tmp_path):
    lists = histories()
    lists[5] = []
    opened = on_another_set(tmp_path, lists, same_hash=True)
    assert 5 not in opened.recommend_all(k=2).users
    with pytest.raises(UserError, match=f"the history of user {FIRST_USER + 5} is empty"):
        opened.recommend(FIRST_USER + 5)
    with pytest.raises(UserError, match=f"the history of user {FIRST_USER + 5} is empty"):
        opened.recommend_all([FIRST_USER, FIRST_USER + 5])


def remove(name):
    def spoil(folder):
        target = folder / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return spoil


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def change(name, **values):
    def spoil(folder):
        stored = json.loads((folder / name).read_text())
        for key, value in values.items():
            inner = stored
            *path, last = key.split("__")
            for step in path:
                inner = inner[step]
            inner[last] = value
        write_json(folder / name, stored)

    return spoil


def truncate_checkpoints(folder):
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file() and "ocdbt" in path.parent.name + path.name:
            path.write_bytes(b"")


DAMAGE = {
    "no folder": (shutil.rmtree, "no such run folder"),
    "no config": (remove("config.json"), "not a run folder, it has no config.json"),
    "config not JSON": (write("config.json", '{"format": 1,'), "config.json: not JSON"),
    "config of something else": (write("config.json", "{}"), "not the config of a run"),
    "newer format": (change("config.json", format=99), "written by a newer jaxrec"),
    "unknown model": (
        change("config.json", experiment__model={"type": "gru"}),
        "unknown model 'gru'",
    ),
    "unknown field": (
        change("config.json", experiment__data={"nmae": "x"}),
        "unknown field data.nmae",
    ),
    "no data.json": (remove("data.json"), "data.json: no such file"),
    "data.json damaged": (write("data.json", "{}"), "data.json: name is None"),
    "no checkpoints": (remove("checkpoints"), "no checkpoint there yet"),
    "checkpoints are a file": (
        lambda folder: (remove("checkpoints")(folder), write("checkpoints", "x")(folder)),
        "checkpoint",
    ),
    "checkpoints truncated": (truncate_checkpoints, "the checkpoint is damaged"),
    "wider model": (
        change("config.json", experiment__model__width=16),
        "has shape .*the config asks for",
    ),
    "more blocks": (change("config.json", experiment__model__blocks=2), "it lacks blocks.1"),
    "fewer parameters": (
        change("config.json", experiment__model__position="none"),
        "it has an unknown position_embedding",
    ),
    "more items": (change("data.json", items=31), "item_embedding has shape"),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_folder_is_told(tmp_path, spoil, message):
    folder = copy_of(trained_run(), tmp_path / "run")
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        jaxrec.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("items.parquet"), "items.parquet: cannot be read"),
        (write("items.parquet", "PAR1"), "items.parquet: cannot be read"),
        (
            lambda folder: pq.write_table(
                pq.read_table(folder / "items.parquet").slice(0, 3), folder / "items.parquet"
            ),
            "items.parquet: 3 items, wanted 30",
        ),
    ],
    ids=["missing", "not parquet", "too few"],
)
def test_damaged_items_are_told_when_they_are_needed(tmp_path, spoil, message):
    folder = copy_of(trained_run(), tmp_path / "run")
    spoil(folder)
    opened = jaxrec.load(folder)
    with pytest.raises(UserError, match=message):
        opened.recommend(history=["i03"])


def test_results_are_complete():
    results = RunFolder(trained_run()).read_results()
    wanted = "experiment dataset model seed metrics published device versions data_hash seconds"
    assert set(wanted.split()) <= set(results)
    assert (results["experiment"], results["dataset"], results["model"]) == (
        "small",
        "shop",
        "sasrec",
    )
    assert results["data_hash"] == shop().hash
    assert results["published"] == [
        {"source": "Somebody 2020", "metrics": {"hr@10": 0.5}, "note": "for the test"}
    ]
    assert results["device"].startswith("cpu: ")
    assert {"python", "jax", "jaxrec"} <= set(results["versions"])
    report = run().evaluate()
    assert results["metrics"]["test"]["hr@10"] == report.model["hr@10"]
    popularity = report.baselines["popularity"]["hr@10"]
    assert results["metrics"]["test"]["popularity"]["hr@10"] == popularity
    assert results["step"] == run().step
    assert results["epochs"] == 3


def test_results_go_into_a_folder_of_results_too(tmp_path):
    folder = copy_of(trained_run(), tmp_path / "run")
    jaxrec.fit(small_config(), folder, results_folder=tmp_path / "a" / "b", show_progress=False)
    stored = json.loads((tmp_path / "a" / "b" / "small-shop-seed0.json").read_text())
    assert stored == RunFolder(trained_run()).read_results()


def test_a_results_folder_that_cannot_be_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: cannot be made"):
        jaxrec.fit(small_config(), tmp_path / "run", results_folder=tmp_path / "file")
    assert not (tmp_path / "run").exists()
