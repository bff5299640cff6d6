"""What users really get wrong: code 2, one line that names it, nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest
from small_sets import copy_of, data_dir, shop, trained_run

from jaxrec.cli.main import main
from jaxrec.training.run_folder import RunFolder, write_json

START = """
from jaxrec.models.config import *
from jaxrec.training.config import *
small = dict(
    data=DataConfig(name="shop", max_length=10),
    model=SASRecConfig(width=8, blocks=1),
    training=TrainingConfig(batch_size=16, epochs=1),
    evaluation=EvaluationConfig(ks=(1, 10), resamples=40),
)
"""
GOOD = START + "config = Experiment(**small)\n"


@pytest.fixture(autouse=True)
def _place(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXREC_DATA_DIR", str(data_dir()))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def everything():
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path().rglob("*")}


def refused(capsys, *words):
    """The line that a command is refused with."""
    before = everything()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert captured.err.startswith("jaxrec: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert not set("│╭─╰") & set(captured.err)
    assert "----" not in captured.err
    assert everything() == before
    return captured.err


def config(text, name="own.py"):
    Path(name).write_text(text)
    return name


CONFIGS = {
    "syntax error": ("config = Experiment(\n", "own.py, line 1: "),
    "no config in it": ("experiment = 3\n", "own.py: must define `config`"),
    "config is a table": ("config = {}\n", "own.py: must define `config`"),
    "error while it runs": ("x = 1\n1 / 0\n", "own.py, line 2: ZeroDivisionError"),
    "typo in an import": ("import jaxreck\n", "own.py, line 1: ModuleNotFoundError"),
    "unknown field": (START + "config = Experiment(modell=1)\n", "modell"),
    "unknown field of a section": (START + "config = TrainingConfig(epoch=1)\n", "epoch"),
    "wrong type": (
        START + "config = Experiment(training=TrainingConfig(epochs='three'))\n",
        "training.epochs",
    ),
    "none where a number is wanted": (
        START + "config = Experiment(model=SASRecConfig(width=None))\n",
        "model.width",
    ),
    "impossible value": (
        START + "config = Experiment(model=SASRecConfig(dropout=1.5))\n",
        "model.dropout",
    ),
    "heads that do not divide": (
        START + "config = Experiment(model=SASRecConfig(width=10, heads=4))\n",
        "model.heads",
    ),
    "unknown loss": (
        START + "config = Experiment(loss=LossConfig('bce2'))\n",
        "unknown loss 'bce2'",
    ),
    "unknown split": (
        START + "config = Experiment(data=DataConfig(split='random'))\n",
        "unknown split 'random'; known: leave_one_out",
    ),
    "unknown optimizer": (
        START + "config = Experiment(optimizer=OptimizerConfig('lion9'))\n",
        "unknown optimizer 'lion9'",
    ),
    "unknown model": (START + "config = Experiment(model=ModelConfig())\n", "unknown model ''"),
    "no such set": (
        START + "config = Experiment(data=DataConfig('shopp'))\n",
        "no data set 'shopp'",
    ),
    "band longer than sequences": (
        GOOD + "from dataclasses import replace\n"
        "kernel = PositionalKernelConfig(band=11)\n"
        "config = replace(config, model=SASRecConfig(position='kernel', kernel=kernel))\n",
        "model.kernel.band",
    ),
}


@pytest.mark.parametrize(("text", "named"), CONFIGS.values(), ids=CONFIGS)
def test_configs(capsys, text, named):
    assert named in refused(capsys, "train", config(text), "--out", "run")


TRAIN = {
    "no config": (["--out", "run"], "config"),
    "no out": (["good.py"], "--out"),
    "config is missing": (["absent.py", "--out", "run"], "absent.py: no such config file"),
    "config is a folder": (["folder", "--out", "run"], "folder: no such config file"),
    "config is JSON": (["good.json", "--out", "run"], "a config is a Python file"),
    "typo in an option": (["good.py", "--out", "run", "--trainig.epochs", "3"], "--trainig.epochs"),
    "unknown option": (["good.py", "--out", "run", "--fast"], "--fast"),
    "option without a value": (["good.py", "--out", "run", "--training.epochs"], "training.epochs"),
    "option of the wrong type": (
        ["good.py", "--out", "run", "--training.epochs", "many"],
        "training.epochs",
    ),
    "impossible option": (["good.py", "--out", "run", "--training.epochs", "0"], "training.epochs"),
    "option before the config": (
        ["--training.epochs", "0", "good.py", "--out", "run"],
        "training.epochs must be positive, got 0",
    ),
    "unknown choice": (["good.py", "--out", "run", "--model.position", "up"], "model.position"),
    "infinite rate": (
        ["good.py", "--out", "run", "--optimizer.learning-rate", "inf"],
        "optimizer.learning_rate",
    ),
    "unknown set": (["good.py", "--out", "run", "--data", "shopp"], "did you mean 'shop'"),
    "set by a wrong path": (["good.py", "--out", "run", "--data", "./shop"], "not a prepared"),
    "out is a file": (["good.py", "--out", "good.json"], "good.json: is a file"),
    "out is something else": (["good.py", "--out", "folder"], "folder: not a run folder"),
    "overwriting something else": (
        ["good.py", "--out", "folder", "--overwrite"],
        "folder: not a run folder, so it is not overwritten",
    ),
    "out below a file": (["good.py", "--out", "good.json/run"], "cannot be made"),
    "results is a file": (["good.py", "--out", "run", "--results", "good.json"], "cannot be made"),
    "metric without its cut-off": (
        ["good.py", "--out", "run", "--training.metric", "ndcg@20"],
        "training.metric",
    ),
    "nothing left to train on": (
        ["good.py", "--out", "run", "--data.split", "temporal", "--data.quantile", "0.000001"],
        "quantile",
    ),
}


@pytest.mark.parametrize(("words", "named"), TRAIN.values(), ids=TRAIN)
def test_train(capsys, words, named):
    config(GOOD, "good.py")
    Path("good.json").write_text("{}")
    Path("folder").mkdir()
    Path("folder/thesis.txt").write_text("important")
    assert named in refused(capsys, "train", *words)


def test_a_run_of_another_config(capsys):
    copy_of(trained_run(), Path("run"))
    config(GOOD)
    line = refused(capsys, "train", "own.py", "--out", "run", "--data", shop().path)
    assert "holds a run with " in line
    assert "--overwrite" in line


RUNS = {
    "no such folder": (shutil.rmtree, "run: no such run folder"),
    "empty": (
        lambda run: (shutil.rmtree(run), run.mkdir()),
        "run: not a run folder, it has no config.json",
    ),
    "config is broken": (
        lambda run: (run / "config.json").write_text("{"),
        "config.json: not JSON",
    ),
    "config of a newer version": (
        lambda run: write_json(run / "config.json", {"format": 9, "experiment": {}}),
        "newer jaxrec",
    ),
    "unknown field": (
        lambda run: write_json(run / "config.json", {"format": 1, "experiment": {"modle": 1}}),
        "unknown field modle",
    ),
    "data is missing": (lambda run: (run / "data.json").unlink(), "data.json: no such file"),
    "data is broken": (
        lambda run: (run / "data.json").write_text('{"name": "shop"}'),
        "data.json: hash is None",
    ),
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint there yet"),
    "another model's checkpoint": (
        lambda run: edit(run, model={"width": 16}),
        "a checkpoint of another model",
    ),
    "the set is gone": (
        lambda run: edit(run, data={"name": "sold"}),
        "no data set 'sold'",
    ),
    "the set is another": (
        lambda run: write_json(run / "data.json", RunFolder(run).read_data() | {"hash": "0" * 64}),
        "with hash 000000000000",
    ),
    "items are gone": (lambda run: (run / "items.parquet").unlink(), "items.parquet: cannot be"),
}


def edit(run, **sections):
    values = json.loads((run / "config.json").read_text())
    for section, fields in sections.items():
        values["experiment"][section] |= fields
    write_json(run / "config.json", values)


@pytest.mark.parametrize(("spoil", "named"), RUNS.values(), ids=RUNS)
def test_run_folders(capsys, spoil, named):
    spoil(copy_of(trained_run(), Path("run")))
    assert named in refused(capsys, "recommend", "run", "--user", "101")


SHOWN = {
    "curve is broken": ("metrics.jsonl", "x\n", "metrics.jsonl, line 1: not JSON"),
    "results are broken": ("results.json", "{}", "results.json: not a results file"),
    "results are cut off": ("results.json", '{"metrics": {', "results.json: not JSON"),
    "data is broken": ("data.json", "[]", "data.json: wanted a JSON object"),
}


@pytest.mark.parametrize(("name", "text", "named"), SHOWN.values(), ids=SHOWN)
def test_show(capsys, name, text, named):
    run = copy_of(trained_run(), Path("run"))
    (run / name).write_text(text)
    assert named in refused(capsys, "show", "run")


RUN = "{run}"
ARGUMENTS = {
    "unknown command": (["recomend", RUN], "unknown command 'recomend'; commands: quickstart, "),
    "half a command": (["data"], "unknown command 'data'; commands: data import, data list"),
    "unknown half": (["data", "impot", "x.csv"], "unknown command 'data impot'"),
    "nobody asked for": (["recommend", RUN], "give one of --user ID, --history a,b,c, or --all"),
    "user and history": (["recommend", RUN, "--user", "101", "--history", "i00"], "give one of"),
    "unknown user": (["recommend", RUN, "--user", "1"], "user '1' is not in the data set shop"),
    "user without a value": (["recommend", RUN, "--user"], "user"),
    "unknown item": (["recommend", RUN, "--history", "i00,i99"], "item 'i99' is not in"),
    "hole in a history": (["recommend", RUN, "--history", "i00,,i01"], "separated by commas"),
    "empty history": (["recommend", RUN, "--history", ""], "separated by commas"),
    "unknown allowed item": (["recommend", RUN, "--user", "101", "--allow", "x"], "item 'x'"),
    "unknown denied item": (["recommend", RUN, "--user", "101", "--deny", "x"], "item 'x'"),
    "none at all": (["recommend", RUN, "--user", "101", "-k", "0"], "k must be at least 1"),
    "k is no number": (["recommend", RUN, "--user", "101", "-k", "ten"], "ten"),
    "everyone to nowhere": (["recommend", RUN, "--all"], "--out FILE.parquet"),
    "out for one": (["recommend", RUN, "--user", "101", "--out", "x.csv"], "--out goes with --all"),
    "everyone, none": (["recommend", RUN, "--all", "--out", "x.csv", "-k", "0"], "k must be"),
    "everyone, unknown denied": (
        ["recommend", RUN, "--all", "--out", "x.csv", "--deny", "x"],
        "item 'x'",
    ),
    "everyone to another form": (["recommend", RUN, "--all", "--out", "x.xlsx"], "x.xlsx"),
    "everyone to no folder": (["recommend", RUN, "--all", "--out", "no/x.csv"], "no/x.csv"),
    "no run": (["recommend", "--user", "101"], "run"),
    "run is a file": (["recommend", "a.csv", "--user", "101"], "a.csv: no such run folder"),
    "unknown checkpoint": (
        ["recommend", RUN, "--user", "101", "--checkpoint", "bset"],
        "no checkpoint 'bset'; there are best, last and steps",
    ),
    "unknown similar": (["similar", RUN, "--item", "i99"], "item 'i99' is not in the data set"),
    "no similar": (["similar", RUN], "--item"),
    "vectors to another form": (["vectors", RUN, "--out", "v.txt"], "v.txt: item vectors are"),
    "vectors to no folder": (["vectors", RUN, "--out", "no/v.npy"], "no/v.npy: cannot be written"),
    "export to nowhere": (["export", RUN], "--out"),
    "export for another platform": (
        ["export", RUN, "--out", "x", "--platforms", "cpu,gpu"],
        "unknown platform 'gpu'; known: cpu, tpu, cuda",
    ),
    "export for no platform": (["export", RUN, "--out", "x", "--platforms", ""], "platform ''"),
    "export of none": (["export", RUN, "--out", "x", "-k", "0"], "k must be at least 1"),
    "export for a batch of none": (
        ["export", RUN, "--out", "x", "--batch-size", "0"],
        "batch_size must be at least 1, got 0",
    ),
    "export for any batch": (
        ["export", RUN, "--out", "x", "--batch-size", "any"],
        "--batch-size takes a whole number or symbolic, got 'any'",
    ),
    "export over a file": (["export", RUN, "--out", "a.csv"], "a.csv: is a file"),
    "export to no folder": (["export", RUN, "--out", "no/x"], "no: no such folder to export into"),
    "export of an unknown checkpoint": (
        ["export", RUN, "--out", "x", "--checkpoint", "bset"],
        "no checkpoint 'bset'",
    ),
    "picture of another form": (["show", RUN, "--png", "c.jpg"], "drawn to a .png file"),
    "picture to no folder": (["show", RUN, "--png", "no/c.png"], "no/c.png: cannot be written"),
    "nothing to judge": (["evaluate"], "give a run folder, or --ranked FILE"),
    "a set beside a run": (["evaluate", "run", "--data", "shop"], "--data and --split go with"),
    "a split beside a run": (["evaluate", "run", "--split", "temporal"], "--data and --split"),
    "a checkpoint of lists": (
        ["evaluate", "--ranked", "a.csv", "--data", "shop", "--checkpoint", "last"],
        "--checkpoint is of a run's own lists",
    ),
    "lists without a set": (["evaluate", "--ranked", "a.csv"], "give --data NAME"),
    "lists are missing": (["evaluate", "--ranked", "b.csv", "--data", "shop"], "b.csv"),
    "lists are something else": (["evaluate", "--ranked", "a.csv", "--data", "shop"], "a.csv"),
    "lists for no set": (["evaluate", "--ranked", "a.csv", "--data", "sold"], "no data set 'sold'"),
    "lists by no split": (
        ["evaluate", "--ranked", "a.csv", "--data", "shop", "--split", "random"],
        "unknown split 'random'",
    ),
    "unknown part": (["evaluate", RUN, "--part", "train"], "part"),
    "cut-off of none": (["evaluate", RUN, "--ks", "0"], "cut-offs must be whole numbers from 1"),
    "negative cut-off": (["evaluate", RUN, "--ks", "-1"], "-1"),
    "unknown option": (["evaluate", RUN, "--jsn"], "--jsn"),
    "no such set": (["data", "stats", "shp"], "did you mean 'shop'"),
    "too small a set": (["data", "generate", "--name", "x", "--items", "3"], "items is 3"),
    "name of a set": (["data", "generate", "--name", "a/b"], "a/b"),
    "set of that name": (["data", "generate", "--name", "shop"], "shop"),
    "no epoch": (["quickstart", "--epochs", "0", "--out", "q"], "training.epochs"),
    "seed": (["quickstart", "--seed", "-1", "--out", "q"], "training.seed"),
}


@pytest.mark.parametrize(("words", "named"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(capsys, words, named):
    Path("a.csv").write_text("x,y\n1,2\n")
    words = [str(trained_run()) if word == RUN else word for word in words]
    assert named in refused(capsys, *words)


def test_similar_options_are_suggested(capsys):
    config(GOOD, "good.py")
    line = refused(capsys, "train", "good.py", "--out", "run", "--training.epoch", "3")
    assert "--training.epochs" in line
    line = refused(capsys, "recommend", trained_run(), "--usr", "3")
    assert "--usr" in line
    assert "jaxrec recommend --help" in line
