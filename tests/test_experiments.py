"""Every config of `experiments/` is one that training accepts, under its own name."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_sets import small_config

from jaxrec.training.config import load_config
from jaxrec.training.loop import train

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
COMMANDS = ("__init__", "report", "position_study", "plot_taps")
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in COMMANDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_name_is_that_of_its_file_and_it_says_what_was_published(name):
    config = load_config(FOLDER / f"{name}.py")
    assert config.name == name
    assert config.published
    assert set(config.published) <= {"movielens-1m", "amazon-2014-beauty"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["esasrec", "hstu"])
def test_it_trains(name, tmp_path):
    config, small = load_config(FOLDER / f"{name}.py"), small_config()
    config = replace(
        config,
        data=small.data,
        model=replace(config.model, width=8, blocks=1),
        training=replace(small.training, epochs=1),
    )
    folder = train(config, tmp_path / "run", show_progress=False)
    losses = [line["loss"] for line in folder.read_metrics() if "loss" in line]
    assert losses[-1] < losses[0]
