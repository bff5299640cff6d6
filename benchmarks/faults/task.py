"""The small training that is killed and whose files are spoiled."""

import json
from dataclasses import replace
from pathlib import Path

from jaxrec.data.generate import generate
from jaxrec.models.config import SASRecConfig
from jaxrec.training.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    TrainingConfig,
    to_dict,
)

DATA = "robustness"
# Curves hold these beside what a seed decides.
TIMES = ("events_per_second", "epoch_seconds", "validation_seconds", "seconds")


def make_data(folder: Path, seed: int = 0) -> Path:
    """A generated set; returns its folder."""
    made = generate(
        DATA, users=200, items=100, events_per_user=10, seed=seed, data_dir=folder, overwrite=True
    )
    return made.path


def experiment(data: Path, *, epochs: int) -> Experiment:
    """SASRec with dropout, a checkpoint every few steps and a validation after every epoch."""
    return Experiment(
        name="robustness",
        data=DataConfig(name=str(data), max_length=20),
        model=SASRecConfig(width=16, blocks=1, dropout=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        training=TrainingConfig(
            batch_size=16, epochs=epochs, patience=0, checkpoint_every=5, log_every=5
        ),
        evaluation=EvaluationConfig(ks=(1, 5, 10), batch_size=128, resamples=200),
    )


def shorter(config: Experiment, epochs: int) -> Experiment:
    """The same, ended after fewer epochs; the longer one goes on from there."""
    return replace(config, training=replace(config.training, epochs=epochs))


def write_config(path: Path, config: Experiment) -> Path:
    """A config file for `jaxrec train`."""
    path.with_suffix(".json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    path.write_text(
        "import json\nfrom pathlib import Path\n\nfrom jaxrec.training.config import from_dict\n\n"
        "text = Path(__file__).with_suffix('.json').read_text(encoding='utf-8')\n"
        "config = from_dict(json.loads(text), __file__)\n",
        encoding="utf-8",
    )
    return path
