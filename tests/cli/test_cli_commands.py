"""The commands from end to end, in this process, on the shared tiny run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_sets import (
    FIRST_USER,
    ITEMS,
    compiled_once,
    config_file,
    copy_of,
    data_dir,
    shop,
    small_config,
    trained_run,
)

import jaxrec
from jaxrec.cli.main import COMMANDS, main
from jaxrec.evaluation.ranked_writer import write_ranked
from jaxrec.serving.exported import load_exported
from jaxrec.training import loop as loop_module
from jaxrec.training.run_folder import RunFolder

CONFIG = """
from jaxrec.models.config import SASRecConfig
from jaxrec.training.config import DataConfig, EvaluationConfig, Experiment, TrainingConfig

config = Experiment(
    name="cli",
    data=DataConfig(name="none-yet", max_length=10),
    model=SASRecConfig(width=8, blocks=1),
    training=TrainingConfig(batch_size=16, epochs=9, patience=0),
    evaluation=EvaluationConfig(ks=(1, 10), resamples=40),
)
"""


@pytest.fixture(autouse=True)
def _sets(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXREC_DATA_DIR", str(data_dir()))
    monkeypatch.chdir(tmp_path)
    # Tables are cut to the terminal's width.
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with compiled_once():
        yield


@pytest.fixture
def own_data_dir(monkeypatch, tmp_path):
    folder = tmp_path / "sets"
    monkeypatch.setenv("JAXREC_DATA_DIR", str(folder))
    return folder


def call(capsys, *words, code=0):
    """(standard output, standard error) of a command."""
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


def last_json(captured):
    line = captured.out.splitlines()[-1]
    values = json.loads(line)
    assert isinstance(values, dict)
    return values


def test_the_whole_path(capsys, own_data_dir, tmp_path):
    rng = np.random.default_rng(0)
    rows = ["who,what,when"]
    for user in range(30):
        for step, item in enumerate(rng.choice(25, 8, replace=False)):
            rows.append(f"user {user},item {item},{1000 + step}")
    Path("log.csv").write_text("\n".join(rows) + "\n")
    columns = ["--user-column", "who", "--item-column", "what", "--time-column", "when"]
    told = last_json(call(capsys, "data", "import", "log.csv", "--name", "log", *columns, "--json"))
    assert (told["users"], told["items"], told["events"]) == (30, 25, 240)
    assert Path(told["path"]) == own_data_dir / "log"

    prepared = last_json(call(capsys, "data", "list", "--json"))["prepared"]
    assert [one["name"] for one in prepared] == ["log"]
    assert "log" in call(capsys, "data", "list").out
    figures = last_json(call(capsys, "data", "stats", "log", "--json", "--verify"))
    assert figures["users"] == 30
    assert "users" in call(capsys, "data", "stats", "log").out

    Path("own.py").write_text(CONFIG)
    words = ["train", "own.py", "--out", "run", "--data", "log", "--training.epochs", "2"]
    words += ["--model.width", "4", "--optimizer.learning-rate", "0.02", "--results", "results"]
    captured = call(capsys, *words, "--json")
    results = last_json(captured)
    assert {"hr@10", "ndcg@10", "coverage@10", "popularity"} <= set(results["metrics"]["test"])
    assert results["dataset"] == "log"
    assert results["epochs"] == 2
    assert results == json.loads(Path("results/cli-log-seed0.json").read_text())
    assert "epoch 2: " in captured.err
    config = RunFolder("run").read_config()
    assert (config.model.width, config.optimizer.learning_rate) == (4, 0.02)
    assert (config.data.name, config.training.epochs, config.data.max_length) == ("log", 2, 10)

    evaluated = last_json(call(capsys, "evaluate", "run", "--json"))
    for name in ("hr@10", "ndcg@10", "coverage@10"):
        assert evaluated[name] == results["metrics"]["test"][name]
        assert evaluated["popularity"][name] == results["metrics"]["test"]["popularity"][name]

    found = last_json(call(capsys, "recommend", "run", "--user", "user 3", "-k", "4", "--json"))
    assert found["user"] == "user 3"
    assert len(found["items"]) == 4
    assert all(one["item_id"].startswith("item ") for one in found["items"])

    # The same command again finds it finished and prints the same.
    again = call(capsys, *words, "--json")
    assert last_json(again) == results
    assert again.err == ""
    assert "hr@10" in call(capsys, *words).out
    assert call(capsys, *words, "--quiet").err == ""


def test_generate(capsys, own_data_dir):
    words = ["data", "generate", "--name", "made", "--users", "30", "--items", "20"]
    told = last_json(call(capsys, *words, "--events-per-user", "5", "--json"))
    assert (told["users"], told["items"]) == (30, 20)
    assert (own_data_dir / "made" / "manifest.json").is_file()
    assert (
        "made: 30 users, 20 items"
        in call(capsys, *words, "--events-per-user", "5", "--overwrite").out
    )
    assert "prepared, in" in call(capsys, "data", "list").out


def test_no_set_yet(capsys, own_data_dir):
    captured = call(capsys, "data", "list")
    assert f"no prepared set in {own_data_dir} yet" in captured.out.replace("\n", "")
    assert "tfds:movielens-1m" in captured.out


def test_evaluate(capsys):
    report = jaxrec.load(trained_run()).evaluate()
    values = last_json(call(capsys, "evaluate", trained_run(), "--json"))
    for name in ("hr@10", "ndcg@10", "coverage@10"):
        assert values[name] == report.model[name]
        assert values["popularity"][name] == report.baselines["popularity"][name]
    assert values["protocol"]["part"] == "test"
    out = call(capsys, "evaluate", trained_run()).out
    assert f"{report.model['ndcg@10']:.4f}" in out
    assert "popularity" in out


def test_evaluate_another_part_checkpoint_and_cut_off(capsys):
    words = ["evaluate", trained_run(), "--part", "validation", "--checkpoint", "9", "--json"]
    values = last_json(call(capsys, *words, "--ks", "3", "7"))
    report = jaxrec.load(trained_run(), checkpoint="9").evaluate("validation", ks=(3, 7))
    assert values["hr@7"] == report.model["hr@7"]
    assert "hr@10" not in values


@pytest.mark.parametrize("name", ["lists.parquet", "lists.csv"])
def test_ranked_lists_are_judged_as_the_model_that_made_them(capsys, name):
    run = jaxrec.load(trained_run())
    write_ranked(name, shop(), run.split.test.users, run.lists("test"))
    wanted = run.evaluate()
    for words in (["--data", "shop"], [trained_run()]):
        values = last_json(call(capsys, "evaluate", *words, "--ranked", name, "--json"))
        for metric in ("hr@10", "ndcg@10", "coverage@10"):
            assert values[metric] == pytest.approx(wanted.model[metric])
            assert values["popularity"][metric] == pytest.approx(
                wanted.baselines["popularity"][metric]
            )
    assert name in call(capsys, "evaluate", "--ranked", name, "--data", "shop").out


def test_ranked_lists_of_everyone_can_be_read_back(capsys):
    """They rank for after the test event, so they are no answer to it, but they are readable."""
    call(capsys, "recommend", trained_run(), "--all", "--out", "all.parquet", "-k", "10")
    values = last_json(
        call(capsys, "evaluate", "--ranked", "all.parquet", "--data", "shop", "--json")
    )
    # What is listed is new to the user, and the test item is not.
    assert values["hr@10"] == 0.0


def test_recommend_for_a_user(capsys):
    wanted = jaxrec.load(trained_run()).recommend(FIRST_USER + 3, k=4)
    words = ["recommend", trained_run(), "--user", FIRST_USER + 3, "-k", "4"]
    values = last_json(call(capsys, *words, "--json"))
    assert values["user"] == str(FIRST_USER + 3)
    assert [r["item_id"] for r in values["items"]] == [r.item_id for r in wanted]
    assert [r["score"] for r in values["items"]] == pytest.approx([r.score for r in wanted])
    out = call(capsys, *words).out
    assert f"for user {FIRST_USER + 3}" in out
    for one in wanted:
        assert one.item_id in out
        assert one.title is None or one.title in out


def test_recommend_for_a_history(capsys):
    words = ["recommend", trained_run(), "--history", "i03, i05", "--json"]
    found = last_json(call(capsys, *words))
    assert found["history"] == ["i03", "i05"]
    ids = [r["item_id"] for r in found["items"]]
    assert len(ids) == 10
    assert not {"i03", "i05"} & set(ids)
    denied = last_json(call(capsys, *words, "--deny", f"{ids[0]},{ids[1]}"))
    assert [r["item_id"] for r in denied["items"]][:8] == ids[2:]
    allowed = last_json(call(capsys, *words, "--allow", f"{ids[4]},{ids[2]}"))
    assert [r["item_id"] for r in allowed["items"]] == [ids[2], ids[4]]
    again = last_json(call(capsys, *words, "--repeat", "--k", str(ITEMS)))
    assert {"i03", "i05"} <= {r["item_id"] for r in again["items"]}


@pytest.mark.parametrize("name", ["all.parquet", "all.csv"])
def test_recommend_for_everyone(capsys, name):
    words = ["recommend", trained_run(), "--all", "--out", name, "--k", "3"]
    told = last_json(call(capsys, *words, "--json"))
    assert told == {"users": 60, "k": 3, "out": name}
    if name.endswith("parquet"):
        rows = pq.read_table(name).to_pylist()
    else:
        head, *lines = Path(name).read_text().splitlines()
        assert head == "user_id,item_id,rank,score"
        cells = [line.split(",") for line in lines]
        rows = [
            {"user_id": int(u), "item_id": i, "rank": int(r), "score": float(s)}
            for u, i, r, s in cells
        ]
    assert len(rows) == 180
    lists = jaxrec.load(trained_run()).recommend_all(k=3)
    for number, row in enumerate(rows):
        user, rank = divmod(number, 3)
        assert row["user_id"] == FIRST_USER + user
        assert row["rank"] == rank + 1
        assert row["item_id"] == shop().item_id(lists.items[user, rank])
        assert row["score"] == pytest.approx(lists.scores[user, rank], abs=1e-5)
    assert "60 users written to" in call(capsys, *words).out


def test_similar(capsys):
    wanted = jaxrec.load(trained_run()).similar_items("i04", k=3)
    words = ["similar", trained_run(), "--item", "i04", "-k", "3"]
    values = last_json(call(capsys, *words, "--json"))
    assert [r["item_id"] for r in values["items"]] == [r.item_id for r in wanted]
    out = call(capsys, *words).out
    assert "like Thing 4" in out
    assert f"{wanted[0].score:.3f}" in out


def test_vectors(capsys):
    values = last_json(call(capsys, "vectors", trained_run(), "--out", "v.npy", "--json"))
    assert values == {"items": ITEMS, "width": 8, "out": "v.npy"}
    assert np.load("v.npy").shape == (ITEMS, 8)
    out = call(capsys, "vectors", trained_run(), "--out", "v.parquet", "--checkpoint", "9").out
    assert "30 vectors of 8 written to v.parquet" in out
    nine = jaxrec.load(trained_run(), checkpoint="9").item_vectors()
    got = np.array(pq.read_table("v.parquet")["vector"].to_pylist(), np.float32)
    np.testing.assert_array_equal(got, nine)


def test_show(capsys):
    out = call(capsys, "show", trained_run()).out
    assert "small: sasrec on shop (60 users, 30 items, " in out
    assert "training loss" in out
    assert "3 validations, best ndcg@10 " in out
    assert "not finished" not in out
    assert "published: Somebody 2020: hr@10 0.5000 (for the test)" in out
    values = last_json(call(capsys, "show", trained_run(), "--json"))
    assert values["config"]["model"]["type"] == "sasrec"
    assert values["curves"] == RunFolder(trained_run()).read_metrics()
    assert values["results"] == RunFolder(trained_run()).read_results()


def test_show_draws_a_picture(capsys):
    pytest.importorskip("matplotlib")
    call(capsys, "show", trained_run(), "--png", "curves.png")
    assert Path("curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in Path().iterdir()] == ["curves.png"]


def test_show_a_run_that_is_not_finished(capsys, tmp_path):
    folder = RunFolder(copy_of(trained_run(), tmp_path / "run"))
    folder.results.unlink()
    first, *_ = folder.metrics.read_text().splitlines()
    folder.metrics.write_text(first + '\n{"step": 4, "lo')
    out = call(capsys, "show", folder.path).out
    assert "not finished: the same train command continues it" in out
    folder.metrics.unlink()
    assert "nothing is trained yet" in call(capsys, "show", folder.path).out
    values = last_json(call(capsys, "show", folder.path, "--json"))
    assert values["curves"] == []
    assert values["results"] is None


def test_a_signal_ends_with_its_code_and_one_line(capsys, monkeypatch, tmp_path):
    config_file(Path("own.py"), small_config())
    make = loop_module.make_train_step

    # The flag is up only while the loop runs, so the signal comes with the first batch.
    def made(*arguments):
        step = make(*arguments)

        def first(state, batch):
            os.kill(os.getpid(), signal.SIGTERM)
            return step(state, batch)

        return first

    monkeypatch.setattr(loop_module, "make_train_step", made)
    captured = call(capsys, "train", "own.py", "--out", "run", "--quiet", code=128 + 15)
    assert captured.err == (
        "jaxrec: stopped at step 1 by a signal; the same command continues from there\n"
    )
    assert captured.out == ""
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    config_file(Path("own.py"), small_config())

    def make_train_step(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nand so on")

    monkeypatch.setattr(loop_module, "make_train_step", make_train_step)
    captured = call(capsys, "train", "own.py", "--out", "run", "--quiet", code=2)
    assert captured.err == (
        "jaxrec: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.); smaller "
        "batch_size, max_length or width need less, and --mesh.model N spreads the item table over "
        "N devices\n"
    )


def test_an_export_answers_as_the_run(capsys):
    words = ["export", trained_run(), "--platforms", "cpu", "-k", "4"]
    told = last_json(call(capsys, *words, "--out", "out", "--json"))
    assert told["out"] == str(Path("out").absolute())
    assert {"recommend.cpu.bin", "items.parquet"} <= set(told["files"])
    assert told["files"]["items.parquet"] == Path("out/items.parquet").stat().st_size
    found = load_exported("out").recommend(["i03", "i05"])
    wanted = jaxrec.load(trained_run()).recommend(history=["i03", "i05"], k=4)
    assert [r.item_id for r in found] == [r.item_id for r in wanted]

    shown = call(capsys, *words, "--out", "again", "--batch-size", "2", "--checkpoint", "9").out
    assert "recommend.cpu.bin: " in shown
    assert "parameters: " in shown
    assert "step 9 exported to " in shown
    assert load_exported("again").manifest.batch_size == 2


def test_a_loss_that_is_not_finite_is_one_line(capsys):
    config_file(Path("own.py"), small_config())
    words = ["train", "own.py", "--out", "run", "--quiet"]
    captured = call(capsys, *words, "--optimizer.learning-rate", "1e38", code=2)
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("jaxrec: not finite at step 1 (epoch 1, batch 1): the gradient")


@pytest.mark.slow
def test_quickstart(capsys, own_data_dir):
    captured = call(capsys, "quickstart", "--json", "--epochs", "2")
    values = last_json(captured)
    assert {"hr@10", "ndcg@10", "coverage@10", "popularity", "intervals"} <= set(values)
    assert values["ndcg@10"] > values["popularity"]["ndcg@10"]
    assert len(values["recommendations"]) == 5
    assert values["recommendations"][0]["title"]
    assert (own_data_dir / "generated" / "manifest.json").is_file()
    assert [path.name for path in Path().iterdir()] == ["sets"]


def help_of(capsys, *words):
    try:
        code = main([*words, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert not code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_options(capsys, name):
    out = help_of(capsys, *name.split())
    assert f"usage: jaxrec {name}" in out
    assert "--json" in out


def test_help_of_train_with_a_config_tells_its_fields(capsys):
    Path("own.py").write_text(CONFIG)
    out = help_of(capsys, "train", "own.py")
    assert "--model.width" in out
    assert "(default: 8)" in out
    assert "--training.epochs" in out
    assert "--overwrite" in out


def test_help_of_a_group_names_its_commands(capsys):
    out = help_of(capsys, "data")
    for name, (_, purpose) in COMMANDS.items():
        assert (purpose in out) == name.startswith("data ")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_the_overview_names_every_command(capsys, word):
    assert main([word]) == 0
    out = capsys.readouterr().out
    for name, (_, purpose) in COMMANDS.items():
        assert name in out
        assert purpose in out


def test_version_and_nothing_at_all(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxrec {jaxrec.__version__}\n"
    assert main([]) == 2
    assert "usage: jaxrec [--import MODULE] COMMAND" in capsys.readouterr().out


def test_the_command_is_there_and_starts_without_jax():
    code = (
        "import sys; from jaxrec.cli.main import main; code = main(['--help']); "
        "heavy = {'jax', 'flax', 'orbax', 'grain', 'tensorflow_datasets'} & set(sys.modules); "
        "sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_reader_that_leaves_is_no_error():
    child = subprocess.Popen(
        [sys.executable, "-m", "jaxrec.cli.main", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert child.wait() == 0
    assert errors == b""


def test_the_shared_run_was_left_as_it_was():
    assert RunFolder(trained_run()).read_config() == small_config()
