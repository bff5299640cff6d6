"""Configs: JSON and back, every wrong field named, config files with their line."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.models.config import ModelConfig, PositionalKernelConfig, SASRecConfig
from jaxrec.registry import register
from jaxrec.training.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    Published,
    TrainingConfig,
    check,
    from_dict,
    load_config,
    to_dict,
)

FULL = Experiment(
    name="everything",
    data=DataConfig(name="shop", split="temporal", quantile=0.8, max_length=7, packed=False),
    model=SASRecConfig(
        width=12,
        heads=3,
        feed_forward=5,
        position="kernel",
        kernel=PositionalKernelConfig(logits="full", values="identity", per_head=True),
    ),
    loss=LossConfig(label_smoothing=0.1, temperature=0.5, negatives=3, avoid="target"),
    optimizer=OptimizerConfig(name="adamw", clip_norm=1.5, schedule="cosine", warmup_steps=3),
    training=TrainingConfig(metric="hr@3", seed=5),
    evaluation=EvaluationConfig(ks=(3, 7)),
    published={"shop": (Published("Somebody 2020", {"hr@10": 0.5}, "a note"),)},
)


def changed(**changes):
    """`section__field=value`; `section__inner__field` goes one deeper."""

    def put(target, names, value):
        if len(names) > 1:
            value = put(getattr(target, names[0]), names[1:], value)
        return replace(target, **{names[0]: value})

    config = Experiment()
    for name, value in changes.items():
        config = put(config, name.split("__"), value)
    return config


@pytest.mark.parametrize("config", [Experiment(), FULL], ids=["defaults", "everything"])
def test_json_and_back(config):
    values = json.loads(json.dumps(to_dict(config)))
    assert values["model"]["type"] == "sasrec"
    assert from_dict(values, "x.json") == config
    assert check(config) == config


def test_missing_fields_take_their_defaults():
    values = {"model": {"type": "sasrec", "width": 8}, "training": {"epochs": 2}}
    config = from_dict(values, "x.json")
    assert config.model == SASRecConfig(width=8)
    assert config.training == TrainingConfig(epochs=2)
    assert config.data == DataConfig()
    assert from_dict({}, "x.json") == Experiment()


def test_whole_numbers_are_taken_for_decimal_ones():
    config = check(changed(optimizer__learning_rate=1, model__dropout=0))
    assert isinstance(config.optimizer.learning_rate, float)


IMPOSSIBLE = {
    "data__max_length": [0, -3],
    "data__prefetch": [0],
    "data__quantile": [0.0, 1.0, 2.5],
    "data__validation_quantile": [0.0, 1.0],
    "data__target": ["newest"],
    "data__split": ["leave_two_out"],
    "loss__name": ["full_softmaxx"],
    "loss__label_smoothing": [-0.1, 1.0],
    "loss__temperature": [0.0, -1.0, math.inf],
    "loss__negatives": [0, -1],
    "loss__sharing": ["user"],
    "loss__avoid": ["seen"],
    "loss__t": [-0.1, 1.5, math.nan],
    "optimizer__name": ["sgdd"],
    "optimizer__learning_rate": [0.0, -1e-3, math.nan, math.inf],
    "optimizer__b1": [-0.1, 1.0],
    "optimizer__b2": [1.0, math.nan],
    "optimizer__eps": [0.0],
    "optimizer__weight_decay": [-0.1],
    "optimizer__warmup_steps": [-1],
    "optimizer__schedule": ["cosin"],
    "optimizer__clip_norm": [0.0, -1.0, math.inf],
    "training__batch_size": [0],
    "training__epochs": [0],
    "training__patience": [-1],
    "training__validate_every": [0],
    "training__metric": ["ndcg", "ndcg@7", "ndcg@010", "precision@10", "loss", "coverage@10"],
    "training__seed": [-1, 2**31],
    "training__checkpoint_every": [-1],
    "training__log_every": [0],
    "evaluation__ks": [(), (0,), (10, -1)],
    "evaluation__batch_size": [0],
    "evaluation__validation_users": [-1],
    "evaluation__level": [0.0, 1.0],
    "evaluation__resamples": [0],
    "model__width": [0],
    "model__dropout": [1.0, math.nan],
    "model__position": ["rotary"],
    "model__kernel__logits": ["toplitz"],
    "model__kernel__power": [math.inf],
}
WRONG_TYPES = {
    "data__name": [3, None],
    "data__packed": ["yes", 1],
    "optimizer__learning_rate": ["fast", None],
    "training__epochs": [1.5, "3", True],
    "evaluation__ks": [10, "10", (1.5,)],
    "model__width": ["64"],
    "model__feed_forward": ["none"],
    "model__kernel": ["toeplitz"],
    "published": [{"shop": "0.3"}],
    "training": ["fast"],
}
CASES = [
    (field, value)
    for table in (IMPOSSIBLE, WRONG_TYPES)
    for field, values in table.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{f}={v}" for f, v in CASES])
def test_a_wrong_value_is_refused_by_field(field, value):
    with pytest.raises(UserError) as caught:
        check(changed(**{field: value}))
    message = str(caught.value)
    assert "\n" not in message
    section, _, name = field.rpartition("__")
    wanted = field.replace("__", ".")
    kinds = {"loss": "loss", "optimizer": "optimizer"}
    assert wanted in message or (
        message.startswith(f"config: unknown {kinds.get(section, name)} {value!r}; known: ")
    ), message


@pytest.mark.parametrize("field", ["model__width", "training__epochs", "data__max_length"])
def test_values_of_other_libraries_are_refused_by_field(field):
    with pytest.raises(
        UserError, match=rf"{field.replace('__', '.')} must be a plain Python value"
    ):
        check(changed(**{field: np.int64(3)}))


@pytest.mark.parametrize("model", ["sasrec", SASRecConfig, None, {"type": "sasrec"}])
def test_a_model_that_is_no_config_is_refused(model):
    with pytest.raises(UserError, match="config: model must be a model's config"):
        check(replace(Experiment(), model=model))


def test_the_base_config_is_no_model():
    with pytest.raises(UserError, match="unknown model ''; known: esasrec, hstu, sasrec"):
        check(replace(Experiment(), model=ModelConfig()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "x.json: an experiment is a table of fields, got list"),
        ({"optimiser": {}}, "x.json: unknown field optimiser; fields there: name, data,"),
        ({"data": {"nam": "x"}}, "x.json: unknown field data.nam; fields there: name, split,"),
        (
            {"model": {"type": "sasrec", "hight": 3}},
            "x.json: unknown field model.hight; fields there: width,",
        ),
        (
            {"model": {"type": "sasrec", "kernel": {"bend": 3}}},
            "x.json: unknown field model.kernel.bend; fields there: logits,",
        ),
        ({"model": {"width": 8}}, "x.json: model must be a table of fields with a 'type'"),
        ({"model": "sasrec"}, "x.json: model must be a table of fields with a 'type'"),
        ({"model": {"type": "gru"}}, "unknown model 'gru'; known: esasrec, hstu, sasrec"),
        ({"model": {"type": ["gru"]}}, "unknown model ['gru']; known: esasrec, hstu, sasrec"),
        ({"data": []}, "x.json: data: "),
        ({"name": 3}, "x.json: name: "),
        ({"training": {"epochs": "3"}}, "x.json: training.epochs: "),
        ({"model": {"type": "sasrec", "width": None}}, "x.json: model.width: "),
        ({"published": {"shop": [{"source": "x"}]}}, "x.json: published"),
    ],
)
def test_stored_configs_are_read_strictly(values, message):
    with pytest.raises(UserError) as caught:
        from_dict(values, "x.json")
    assert str(caught.value).startswith(message), caught.value


def test_a_registered_model_goes_through():
    @dataclass(frozen=True)
    class MineConfig(ModelConfig):
        type: ClassVar[str] = "mine-for-the-test"
        depth: int = 3

        def check(self, *, max_length):
            if self.depth > max_length:
                raise UserError("config: model.depth is too large")

    class Mine:
        Config = MineConfig

    register("model", "mine-for-the-test", Mine)
    config = replace(Experiment(), model=MineConfig(depth=4))
    assert from_dict(to_dict(config), "x.json") == config
    assert check(config) == config
    with pytest.raises(UserError, match=r"model.depth"):
        check(replace(config, model=MineConfig(depth=51)))


def test_config_files_may_import_one_another_and_use_their_own_path(tmp_path):
    (tmp_path / "base.py").write_text(
        "from jaxrec.training.config import Experiment\nconfig = Experiment(name='base')\n"
    )
    path = tmp_path / "own.py"
    path.write_text(
        "from dataclasses import replace\nfrom pathlib import Path\nfrom runpy import run_path\n"
        "base = run_path(str(Path(__file__).with_name('base.py')))['config']\n"
        "config = replace(base, name=base.name + '-own')\n"
    )
    assert load_config(path).name == "base-own"
    assert load_config(str(path)).name == "base-own"


START = "from jaxrec.training.config import *\n"
FILES = {
    "syntax": ("config = (\n", "own.py, line 1: '(' was never closed"),
    "indentation": ("x = 1\n  config = 2\n", "own.py, line 2: unexpected indent"),
    "name": ("x = 1\nconfig = Experimnt()\n", "own.py, line 2: NameError: name 'Experimnt'"),
    "field": (START + "config = Experiment(naem='x')\n", "own.py, line 2: TypeError: "),
    "import": ("import no_such_module_here\n", "own.py, line 1: ModuleNotFoundError: "),
    "none": ("x = 1\n", "own.py: must define `config`, a jaxrec.training.config.Experiment; "),
    "table": ("config = {'name': 'x'}\n", "own.py: must define `config`, "),
    "value": (
        START + "config = Experiment(training=TrainingConfig(epochs=0))\n",
        "training.epochs",
    ),
    "exit": ("import sys\nsys.exit(0)\n", "own.py, line 2: ends Python instead of defining"),
    "encoding": (b"x = 1\nconfig = '\xff'\n", "own.py, line "),
    "empty": ("", "own.py: must define `config`"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_a_wrong_config_file_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "own.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_in_an_imported_file_is_told_by_that_file(tmp_path, monkeypatch):
    (tmp_path / "helper_of_config.py").write_text("x = 1\ny = (\n")
    (tmp_path / "own.py").write_text("import helper_of_config\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"helper_of_config.py, line 2: "):
        load_config(tmp_path / "own.py")


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.py", "no such config file"), (".", "no such config"), ("c.json", "Python file")],
)
def test_what_is_no_config_file(tmp_path, name, message):
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / name)
