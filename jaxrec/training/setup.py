"""From a config to the parts of a run: data, split, model."""

import inspect
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from jaxrec.data.batches import TrainingBatches
from jaxrec.data.paths import dataset_names
from jaxrec.data.prepared import Interactions, open_prepared
from jaxrec.data.splits import Split, make_split, resolve_split
from jaxrec.devices import Placement, make_mesh
from jaxrec.errors import UserError
from jaxrec.models.binding import Parameters, build_model, split_model
from jaxrec.registry import resolve
from jaxrec.training.config import DataConfig, Experiment, LossConfig
from jaxrec.training.run_folder import RunFolder
from jaxrec.training.state import LossFunction, sequence_loss

# The embedded default: made where it is first needed, without a network.
GENERATED = "generated"


def open_data(config: DataConfig) -> Interactions:
    """The data set that the config names; the default generated one is made if it is missing.

    Every file is compared with its hash first: nobody trains on, or is judged by, a set that was
    damaged on disk. That reads the set once, a second for some 20 million events.

    Raises:
      UserError: there is no such set, or a file of it is not what was written.
    """
    if config.name == GENERATED and GENERATED not in dataset_names():
        from jaxrec.data.generate import generate

        try:
            return generate(GENERATED)
        except UserError:
            # Another process may have made it meanwhile.
            if GENERATED not in dataset_names():
                raise
    return open_prepared(config.name, verify=True)


def open_trained_on(folder: RunFolder, config: Experiment) -> Interactions:
    """The data set that a run was trained on.

    Raises:
      UserError: it is not at hand, or is another version by its hash.
    """
    data, interactions = folder.read_data(), open_data(config.data)
    if interactions.hash != data["hash"]:
        raise UserError(
            f"{folder.path}: was trained on {data['name']!r} with hash {data['hash'][:12]}, the "
            f"set at {interactions.path} has {interactions.hash[:12]}; import the version it was "
            "trained on"
        )
    return interactions


def located(config: Experiment) -> Experiment:
    """The config with the path of a data set made absolute: a run is opened from anywhere."""
    if os.sep not in config.data.name:
        return config
    path = Path(config.data.name).expanduser().absolute()
    return replace(config, data=replace(config.data, name=str(path)))


def split_data(config: Experiment, interactions: Interactions) -> Split:
    """The split that the config names, with those of the config's options that it has."""
    options: dict[str, Any] = {
        "quantile": config.data.quantile,
        "validation_quantile": config.data.validation_quantile,
        "target": config.data.target,
        "seed": config.training.seed,
    }
    known = inspect.signature(resolve_split(config.data.split)).parameters
    return make_split(
        interactions, config.data.split, **{k: v for k, v in options.items() if k in known}
    )


def count_from_newest(config: Experiment) -> bool:
    """Whether the model wants positions counted back from the newest event."""
    return getattr(config.model, "position_order", "oldest") == "newest"


def timestamps(config: Experiment, interactions: Interactions) -> NDArray[np.int64] | None:
    """int64[events] in seconds, if the model reads them.

    Raises:
      UserError: it does, and the data set has none.
    """
    if not config.model.reads_timestamps:
        return None
    if interactions.timestamps is None:
        raise UserError(
            f"{interactions.name} has no timestamps, which the model reads; choose another model, "
            "or one without a bias by time (--model.bias position)"
        )
    ticks = interactions.ticks_per_second
    return interactions.timestamps if ticks == 1 else interactions.timestamps // ticks


def training_batches(
    config: Experiment, interactions: Interactions, split: Split, *, shards: int = 1
) -> TrainingBatches:
    return TrainingBatches(
        interactions.items,
        split.train.starts,
        split.train.stops,
        batch_size=config.training.batch_size,
        max_length=config.data.max_length,
        epochs=config.training.epochs,
        seed=config.training.seed,
        packed=config.data.packed,
        count_from_newest=count_from_newest(config),
        shards=shards,
        timestamps=timestamps(config, interactions),
    )


def make_placement(config: Experiment, num_items: int) -> Placement | None:
    """What lies where on the devices that the config asks for; None for a single one.

    Raises:
      UserError: there are not as many devices.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    if mesh is None:
        return None
    by_item = getattr(resolve("model", config.model.type), "by_item", ())
    return Placement(mesh, by_item, num_items)


def make_model(
    config: Experiment, num_items: int
) -> tuple[Parameters, Callable[[dict[str, Array]], Any]]:
    """Initial parameters, on one device, and the function that binds parameters to the model."""
    return split_model(_build(config, num_items, config.training.seed))


def model_shapes(
    config: Experiment, num_items: int
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[dict[str, Array]], Any]]:
    """`make_model` with shapes in the place of parameters: nothing is computed, nothing held."""
    model = nnx.eval_shape(lambda: _build(config, num_items, config.training.seed))
    shapes: Any
    shapes, bind = split_model(model)
    return shapes, bind


def initialiser(config: Experiment, num_items: int) -> Callable[[Array], Parameters]:
    """Gives the initial parameters from `jax.random.key(config.training.seed)`; may be traced."""
    return lambda key: split_model(_build(config, num_items, key))[0]


def _build(config: Experiment, num_items: int, seed: int | Array) -> nnx.Module:
    return build_model(
        config.model, num_items=num_items, max_length=config.data.max_length, seed=seed
    )


def make_loss(
    config: LossConfig, item_counts: Callable[[], NDArray[np.int64]] | None = None
) -> LossFunction:
    """The loss that the config names, with those of the config's options that it has.

    Args:
      config: of the loss.
      item_counts: gives the training events of each item, for sampling by popularity.

    Raises:
      UserError: an option was set that the loss does not have.
    """
    loss = resolve("loss", config.name)
    options, defaults = asdict(config), asdict(LossConfig())
    del options["name"]
    known = inspect.signature(loss).parameters
    for name, value in options.items():
        if name not in known and value != defaults[name]:
            has = ", ".join(option for option in options if option in known) or "none"
            raise UserError(
                f"config: loss.{name} does not apply to {config.name}; its options: {has}"
            )
    # None leaves an option to the loss, whose own default it then takes.
    chosen = {k: v for k, v in options.items() if k in known and v is not None}
    counts = None
    if config.sampling == "popularity" and item_counts is not None:
        counts = item_counts()
    return sequence_loss(loss, item_counts=counts, **chosen)
