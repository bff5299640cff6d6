"""Small prepared sets and one tiny trained run, made once a session and shared by the tests.

What is handed out is for reading; a test that changes a run or a set copies it first.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.experimental.compilation_cache import compilation_cache

import jaxrec
from jaxrec.data.prepared import Interactions, write_prepared
from jaxrec.models.config import SASRecConfig
from jaxrec.training.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    Published,
    TrainingConfig,
    to_dict,
)

USERS, ITEMS, MAX_LENGTH = 60, 30, 10
FIRST_USER = 101


@functools.cache
def base_dir() -> Path:
    """A folder that lives as long as the session."""
    folder = Path(tempfile.mkdtemp(prefix="jaxrec-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def data_dir() -> Path:
    """To be `$JAXREC_DATA_DIR` where a test names sets; holds `shop`."""
    shop()
    return base_dir() / "data"


def histories(seed: int = 0) -> list[list[int]]:
    """Item indices by user: often the item after next, and some longer than MAX_LENGTH.

    The last two users have two events and one: too few to be evaluated, or to train on.
    """
    rng = np.random.default_rng(seed)
    result = []
    for user in range(USERS):
        length = {USERS - 2: 2, USERS - 1: 1}.get(user, int(rng.integers(3, 25)))
        items = [int(rng.integers(ITEMS))]
        while len(items) < length:
            follows = rng.random() < 0.7
            items.append((items[-1] + 2) % ITEMS if follows else int(rng.integers(ITEMS)))
        result.append(items)
    return result


@functools.cache
def shop() -> Interactions:
    """60 users with integer ids, 30 items with text ids, some of them with a title."""
    lists = histories()
    lengths = [len(items) for items in lists]
    events = sum(lengths)
    titles = [f"Thing {i}" if i % 3 else None for i in range(ITEMS)]
    return write_prepared(
        base_dir() / "data" / "shop",
        name="shop",
        users=np.repeat(np.arange(USERS), lengths),
        items=np.concatenate([np.array(items) for items in lists]),
        timestamps=1_600_000_000 + 60 * np.arange(events, dtype=np.int64),
        ratings=None,
        user_ids=np.arange(USERS) + FIRST_USER,
        item_ids=[f"i{i:02d}" for i in range(ITEMS)],
        item_table=pa.table({"title": pa.array(titles, pa.string())}),
        source={"kind": "test"},
        tie_order="as given",
    )


def small_config(**changes: Any) -> Experiment:
    """An experiment on `shop` that trains in a moment; `section__field=value` changes a field."""
    config = Experiment(
        name="small",
        data=DataConfig(name=str(shop().path), max_length=MAX_LENGTH),
        model=SASRecConfig(width=8, blocks=1, dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        training=TrainingConfig(
            batch_size=16, epochs=3, patience=0, log_every=3, checkpoint_every=3
        ),
        evaluation=EvaluationConfig(ks=(1, 5, 10), batch_size=32, resamples=40),
        published={"shop": (Published("Somebody 2020", {"hr@10": 0.5}, "for the test"),)},
    )
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            value = replace(getattr(config, section), **{field: value})
        config = replace(config, **{section: value})
    return config


def config_file(path: Path, config: Experiment, then: str = "") -> Path:
    """A config file that says `config`, and then does what else it is told to."""
    path.with_suffix(".json").write_text(json.dumps(to_dict(config)))
    path.write_text(
        "import json\nfrom pathlib import Path\nfrom jaxrec.training.config import from_dict\n"
        "text = Path(__file__).with_suffix('.json').read_text()\n"
        f"config = from_dict(json.loads(text), 'the test')\n{then}"
    )
    return path


@contextmanager
def compiled_once() -> Iterator[Path]:
    """Programs compiled inside are kept for the session, so that a config is compiled once."""
    options = {
        "jax_compilation_cache_dir": str(base_dir() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield base_dir() / "compiled"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@functools.cache
def trained_run() -> Path:
    """The folder of a finished run of `small_config()`."""
    folder = base_dir() / "run"
    with compiled_once():
        jaxrec.fit(small_config(), folder, show_progress=False)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(folder, target)
    return target
