"""What an experiment is: frozen dataclasses of names and numbers, and their JSON form.

Nothing here imports JAX. Every field can be set on the command line by its dotted name
(`--training.epochs 3`), is stored in the run folder as JSON, and is checked when read back; nothing
that is stored is executed.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from jaxrec._python_files import run_python_file
from jaxrec.errors import UserError
from jaxrec.models.config import ModelConfig, SASRecConfig
from jaxrec.registry import names, resolve


@dataclass(frozen=True)
class DataConfig:
    """Which data set, how it is split, and how sequences become rows."""

    name: str = "generated"
    """A prepared data set (`jaxrec data list`), or the path of its folder."""
    split: str = "leave_one_out"
    """leave_one_out, temporal, or a registered split."""
    quantile: float = 0.9
    """Temporal split: the quantile of time from which events are for testing."""
    validation_quantile: float = 0.9
    """Temporal split: the same within the training part, for validation."""
    target: Literal["last", "first", "random", "all"] = "last"
    """Temporal split: which event past the threshold is to be predicted; random draws by
    training.seed, so that runs of two seeds are judged on different events."""
    max_length: int = 50
    """A sequence is cut to this many of its most recent events."""
    packed: bool = True
    """Several sequences share a row (no compute on padding); False gives every sequence its own."""
    prefetch: int = 4
    """Batches made ahead of the step that uses them."""


@dataclass(frozen=True)
class LossConfig:
    """The training objective."""

    name: str = "full_softmax"
    """full_softmax, sampled_softmax, bce, gbce, or a registered loss."""
    label_smoothing: float = 0.0
    """full_softmax: share of the target that is spread over all items."""
    temperature: float = 1.0
    """Scores are divided by it; with normalized vectors, 0.05 is usual."""
    negatives: int | None = None
    """Sampled losses: items drawn for each target; none for 1 with bce and 256 with the others."""
    sharing: Literal["position", "batch"] = "position"
    """Sampled losses: whether every position draws its own, or all of a batch use the same."""
    sampling: Literal["uniform", "popularity"] = "uniform"
    """Sampled losses: every item alike, or in proportion to its training events."""
    sampling_power: float = 1.0
    """popularity: the power of the number of events; 0.75 is usual."""
    avoid: Literal["nothing", "target", "sequence"] | None = None
    """Sampled losses: which items are no negatives: the position's target, or every item of its
    sequence; none for sequence with bce and nothing with the others."""
    t: float = 0.75
    """gbce: calibration, from 0 (plain BCE) to 1."""
    correction: bool = False
    """sampled_softmax: subtract the log of how often an item is expected among the negatives."""


@dataclass(frozen=True)
class OptimizerConfig:
    """An optax optimiser and its schedule."""

    name: str = "adam"
    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled (AdamW); never applied to vectors (biases, normalisation), position
    biases or positional kernels."""
    warmup_steps: int = 0
    """The rate rises linearly from zero over this many steps."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """cosine and linear decay to zero at the last step of the last epoch."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how many at once, what decides."""

    batch_size: int = 128
    """Sequences an optimiser step, packed or not."""
    epochs: int = 100
    """Upper bound; early stopping usually ends sooner."""
    patience: int = 10
    """Validations without improvement before training stops; 0 never stops early."""
    validate_every: int = 1
    """Epochs between validations."""
    metric: str = "ndcg@10"
    """The validation metric that picks the best checkpoint and stops training."""
    seed: int = 0
    checkpoint_every: int = 0
    """Steps between checkpoints besides the one after every validation; 0 for none."""
    log_every: int = 50
    """Steps between two points of the training curve (and two checks that the loss is finite)."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the tensorboard extra)."""


@dataclass(frozen=True)
class MeshConfig:
    """How a run spreads over devices; 1 by 1 is one device."""

    data: int = 1
    """Devices that the sequences of a batch are split over; 0 for all that `model` leaves."""
    model: int = 1
    """Devices that the rows of the item table, and the scores of items, are split over."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How ranked lists are made and judged."""

    ks: tuple[int, ...] = (1, 5, 10, 20)
    filter_seen: bool = True
    """Items of the user's own history are never recommended."""
    batch_size: int = 1024
    """Users ranked at once."""
    validation_users: int = 0
    """Validate on this many users, drawn once by the seed; 0 for all."""
    level: float = 0.95
    """Of the bootstrap interval over users."""
    resamples: int = 1000


@dataclass(frozen=True)
class Published:
    """A number somebody published, which the result is held against."""

    source: str
    metrics: dict[str, float]
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run."""

    name: str = "sasrec"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=SASRecConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    published: dict[str, tuple[Published, ...]] = field(default_factory=dict)
    """By data set name."""


def check(config: Experiment) -> Experiment:
    """Returns `config` if every field has the right type and a possible value.

    Raises:
      UserError: naming the first field that is wrong.
    """
    config = from_dict(to_dict(config), "config")
    for name, value in _leaves(to_dict(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config: {name} must be a finite number, got {value}")
    positive = {
        "data.max_length": config.data.max_length,
        "data.prefetch": config.data.prefetch,
        "training.batch_size": config.training.batch_size,
        "training.epochs": config.training.epochs,
        "training.validate_every": config.training.validate_every,
        "training.log_every": config.training.log_every,
        "evaluation.batch_size": config.evaluation.batch_size,
        "evaluation.resamples": config.evaluation.resamples,
        "mesh.model": config.mesh.model,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "optimizer.eps": config.optimizer.eps,
        "optimizer.clip_norm": config.optimizer.clip_norm,
        "loss.temperature": config.loss.temperature,
        "loss.negatives": config.loss.negatives,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"config: {name} must be positive, got {value}")
    not_negative = {
        "training.patience": config.training.patience,
        "training.seed": config.training.seed,
        "training.checkpoint_every": config.training.checkpoint_every,
        "evaluation.validation_users": config.evaluation.validation_users,
        "mesh.data": config.mesh.data,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.warmup_steps": config.optimizer.warmup_steps,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"config: {name} must not be negative, got {value}")
    fractions = {
        "data.quantile": config.data.quantile,
        "data.validation_quantile": config.data.validation_quantile,
        "evaluation.level": config.evaluation.level,
    }
    for name, value in fractions.items():
        if not 0 < value < 1:
            raise UserError(f"config: {name} must be between 0 and 1, got {value}")
    below_one = {
        "loss.label_smoothing": config.loss.label_smoothing,
        "optimizer.b1": config.optimizer.b1,
        "optimizer.b2": config.optimizer.b2,
    }
    for name, value in below_one.items():
        if not 0 <= value < 1:
            raise UserError(f"config: {name} must be in [0, 1), got {value}")
    if not 0 <= config.loss.t <= 1:
        raise UserError(f"config: loss.t must be from 0 to 1, got {config.loss.t}")
    if config.training.seed >= 2**31:
        raise UserError(f"config: training.seed must be below 2^31, got {config.training.seed}")
    ks = config.evaluation.ks
    if not ks or any(k < 1 for k in ks):
        raise UserError(f"config: evaluation.ks must be one or more positive numbers, got {ks}")
    metric, _, k = config.training.metric.partition("@")
    if metric not in ("hr", "ndcg", "mrr", "recall") or k not in map(str, ks):
        raise UserError(
            "config: training.metric must be hr, ndcg, mrr or recall at one of evaluation.ks "
            f"{ks} (like ndcg@{ks[-1]}), got {config.training.metric!r}"
        )
    for kind, name in (
        ("model", config.model.type),
        ("loss", config.loss.name),
        ("split", config.data.split),
        ("optimizer", config.optimizer.name),
    ):
        if name not in names(kind):
            raise UserError(
                f"config: unknown {kind} {name!r}; known: {', '.join(names(kind))}; register one "
                "of your own first (jaxrec.registry.register)"
            )
    config.model.check(max_length=config.data.max_length)
    return config


def refuse_unread(config: Experiment) -> None:
    """Raises UserError for an option that is set, and that nothing reads as things are.

    Of new trainings: a run that was trained so may still be opened.
    """
    default = dataclasses.replace(Experiment(), model=type(config.model)())
    position = getattr(config.model, "position", None)
    for part, fields, reason, is_unread in (
        (
            "data",
            ("quantile", "validation_quantile", "target"),
            f"data.split {config.data.split!r}",
            config.data.split == "leave_one_out",
        ),
        (
            "loss",
            ("sampling_power",),
            f"loss.sampling {config.loss.sampling!r}",
            config.loss.sampling == "uniform",
        ),
        ("model", ("alibi_slope",), f"model.position {position!r}", position != "alibi"),
        ("model", ("rope_base",), f"model.position {position!r}", position != "rope"),
    ):
        for name in fields:
            given, usual = (getattr(getattr(c, part), name, None) for c in (config, default))
            if is_unread and given != usual:
                raise UserError(f"config: {part}.{name} ({given}) is not read with {reason}")


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested tables and lists with its dotted name."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from _leaves(value, f"{prefix}[{number}]")
    else:
        yield prefix, values


def to_dict(config: Experiment) -> dict[str, Any]:
    """`config` as JSON types; the model's dictionary carries its `type`."""
    if not isinstance(config.model, ModelConfig):
        raise UserError(
            f"config: model must be a model's config, such as SASRecConfig(), got {config.model!r}"
        )
    try:
        # msgspec leaves out what an instance only inherits: fields that an older file has not.
        result: dict[str, Any] = msgspec.to_builtins(dataclasses.asdict(config))
    except TypeError:
        raise UserError(f"config: {_not_plain(config)}") from None
    result["model"] = {"type": config.model.type, **result["model"]}
    return result


def _not_plain(config: Any, prefix: str = "") -> str:
    """Names the first field whose value is not a plain Python value."""
    for part in dataclasses.fields(config):
        name, value = prefix + part.name, getattr(config, part.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found = _not_plain(value, f"{name}.")
            if found:
                return found
            continue
        try:
            msgspec.to_builtins(value)
        except TypeError:
            return (
                f"{name} must be a plain Python value, got {value!r} "
                f"({type(value).__module__}.{type(value).__qualname__})"
            )
    return ""


def from_dict(values: dict[str, Any], where: str) -> Experiment:
    """The inverse of `to_dict`, strictly checked.

    Args:
      values: as `to_dict` gives them; missing fields take their defaults.
      where: file or other place the values come from, for messages.

    Raises:
      UserError: an unknown field, a value of the wrong type, an unknown model.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: an experiment is a table of fields, got {type(values).__name__}")
    values = dict(values)
    model = values.pop("model", {"type": "sasrec"})
    if not isinstance(model, dict) or "type" not in model:
        raise UserError(f"{where}: model must be a table of fields with a 'type'")
    model = dict(model)
    model_class = resolve("model", model.pop("type")).Config
    _reject_unknown(values, Experiment, where, "")
    _reject_unknown(model, model_class, where, "model.")
    try:
        parsed_model = msgspec.convert(model, model_class)
    except msgspec.ValidationError as error:
        raise UserError(_message(where, "model.", error)) from None
    try:
        parsed: Any = msgspec.convert(values, _WithoutModel)
    except msgspec.ValidationError as error:
        raise UserError(_message(where, "", error)) from None
    fields = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(_WithoutModel)}
    return Experiment(model=parsed_model, **fields)


_WithoutModel = dataclasses.make_dataclass(
    "_WithoutModel",
    [
        (
            f.name,
            f.type,
            field(default_factory=f.default_factory)
            if f.default_factory is not dataclasses.MISSING
            else field(default=f.default),
        )
        for f in dataclasses.fields(Experiment)
        if f.name != "model"
    ],
)


def _reject_unknown(values: dict[str, Any], cls: type, where: str, prefix: str) -> None:
    known = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise UserError(
                f"{where}: unknown field {prefix}{key}; fields there: {', '.join(known)}"
            )
        kind = known[key]
        if isinstance(value, dict) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
            _reject_unknown(value, kind, where, f"{prefix}{key}.")


def _message(where: str, prefix: str, error: msgspec.ValidationError) -> str:
    what, _, place = str(error).partition(" - at `$")
    name = prefix + place.strip("`.") if place else prefix.rstrip(".")
    return f"{where}: {name}: {what[0].lower()}{what[1:]}"


def load_config(path: str | Path) -> Experiment:
    """Runs a config file, which is Python and must define `config: Experiment`.

    Raises:
      UserError: no such file, an error in it (with its line), or no `config` in it.
    """
    path = Path(path)
    defined = run_python_file(path, what="config", doing="defining `config`")
    config = defined.get("config")
    if not isinstance(config, Experiment):
        raise UserError(
            f"{path}: must define `config`, a jaxrec.training.config.Experiment; "
            f"got {type(config).__name__}"
        )
    return check(config)
