"""A whole train step compiled for a TPU in a process of its own: `benchmarks.tpu_aot` starts it.

    python -m benchmarks.tpu.train_step '{"model": "sasrec", "items": 10000000, "mesh": [2, 2],
        "dtype": "bfloat16", "loss": "full_softmax", "chip": "v5e"}'

The step is the one that `jaxrec train` makes from the experiment's config: loss, gradient, Adam,
the guard against values that are not finite, the state donated. Only the sizes are set here, and
the loss on request. The batch is the largest there is: every history is longer than a row, so every
sequence fills one.

The last line printed is a JSON object: what a chip holds, the kernels and the collectives, or the
compiler's own figure where it refuses the step; or `error`, why there are no figures.
"""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding

from benchmarks.tpu.bundles import NoScheduleError
from benchmarks.tpu.chips import chip_named
from benchmarks.tpu.hlo_text import Program, Step
from jaxrec.data.batches import TrainingBatches
from jaxrec.devices import BY_ITEM, BY_SEQUENCE, DATA, EVERYWHERE, MODEL, Placement
from jaxrec.errors import UserError
from jaxrec.models.binding import build_model, split_model
from jaxrec.training.config import Experiment, LossConfig, load_config
from jaxrec.training.optimizer import make_optimizer
from jaxrec.training.setup import count_from_newest, make_loss
from jaxrec.training.state import initial_state, make_train_step

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
# SASRec with positions as a learned kernel in attention; HSTU in its research configuration.
MODELS = {"sasrec": "sasrec_kernel.py", "hstu": "hstu.py"}
WIDTH, BLOCKS, LENGTH, SEQUENCES = 64, 2, 200, 128
# The learning rate is constant, so the number of steps changes nothing.
_STEPS = 1000
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def experiment(
    model: str,
    *,
    dtype: str = "float32",
    loss: str = "full_softmax",
    length: int = LENGTH,
    sequences: int = SEQUENCES,
) -> Experiment:
    """The config of the experiment with the sizes of this benchmark.

    Args:
      model: a name of `MODELS`.
      dtype: of activations.
      loss: "full_softmax", over the whole catalogue at the experiment's temperature; or "own", the
        experiment's.
      length: slots of a row.
      sequences: of a batch.

    Raises:
      UserError: there is no such model.
    """
    if model not in MODELS:
        raise UserError(f"no train step of {model!r}; there are {', '.join(MODELS)}")
    config = load_config(EXPERIMENTS / MODELS[model])
    if loss == "full_softmax":
        config = replace(config, loss=LossConfig(temperature=config.loss.temperature))
    return replace(
        config,
        data=replace(config.data, max_length=length),
        model=replace(config.model, width=WIDTH, blocks=BLOCKS, dtype=dtype),
        training=replace(config.training, batch_size=sequences),
    )


def lowered(config: Experiment, items: int, mesh: tuple[int, int], devices: Sequence[Any]) -> Any:
    """The train step, traced for chips that need not be there.

    Args:
      config: of the experiment.
      items: of the catalogue.
      mesh: devices along `data` and along `model`; (1, 1) is one chip without a mesh.
      devices: of the topology, at least as many.
    """
    model = nnx.eval_shape(
        lambda: build_model(
            config.model, num_items=items, max_length=config.data.max_length, seed=0
        )
    )
    parameters, bind = split_model(model)
    used = np.array(devices[: mesh[0] * mesh[1]]).reshape(mesh)
    placement = None
    if used.size > 1:
        placement = Placement(Mesh(used, (DATA, MODEL)), type(model).by_item, items)
    one_chip = SingleDeviceSharding(used.flat[0])

    def placed(spec: PartitionSpec, x: Any) -> jax.ShapeDtypeStruct:
        if placement is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_chip)
        shape = (placement.rows, *x.shape[1:]) if spec == BY_ITEM else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=placement.sharding(spec))

    optimizer = make_optimizer(config.optimizer, _STEPS)
    step = make_train_step(bind, make_loss(config.loss), optimizer, config.training.seed, placement)
    state = jax.eval_shape(lambda p: initial_state(p, optimizer), parameters)
    specs = jax.tree.map(lambda _: EVERYWHERE, state)
    if placement is not None:
        specs = placement.specs(state)
    batch = fullest_batch(config, shards=mesh[0])
    return step.lower(
        jax.tree.map(placed, specs, state), {n: placed(BY_SEQUENCE, x) for n, x in batch.items()}
    )


def fullest_batch(config: Experiment, *, shards: int) -> dict[str, np.ndarray]:
    """A batch as training makes it, of histories that are longer than a row."""
    users, history = config.training.batch_size, config.data.max_length + 1
    starts = np.arange(users) * history
    events = np.zeros(users * history, np.int64)
    batches = TrainingBatches(
        events.astype(np.int32),
        starts,
        starts + history,
        batch_size=users,
        max_length=config.data.max_length,
        epochs=1,
        seed=0,
        packed=config.data.packed,
        count_from_newest=count_from_newest(config),
        shards=shards,
        timestamps=events if config.model.reads_timestamps else None,
    )
    return batches[0]


def compiled_figures(program: Any, chip_bytes: int) -> dict[str, Any]:
    """Compiles a traced step and says what a chip holds and what the program consists of.

    The compiler has accepted a step whose figures add up to more than the chip has (HSTU over ten
    million items on a v5e), so it is not asked alone.
    """
    begin = time.process_time()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, **refusal(str(error)), "compile_cpu_seconds": _since(begin)}
    memory = compiled.memory_analysis()
    held = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }
    # What is given away to the step lies where its results do.
    held["total"] = sum(held.values()) - 2 * held["aliased"]
    return {
        "fits": held["total"] <= chip_bytes,
        "hbm_bytes": held,
        **consists_of(Program(compiled.as_text())),
        "compile_cpu_seconds": _since(begin),
    }


def refusal(message: str) -> dict[str, Any]:
    """What the compiler says that a program needs which does not fit.

    >>> refusal("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.5G of 15.75G "
    ...         "hbm. Exceeded hbm capacity by 2.75G.")["hbm_bytes"]
    {'total': 19864223744}
    """
    line = next((s for s in message.splitlines() if "Used" in s), message.splitlines()[0])
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", line)
    needed = {"total": round(float(found[1]) * _UNITS[found[2]])} if found else {}
    return {"hbm_bytes": needed, "compiler": line[:300].strip()}


def consists_of(program: Program) -> dict[str, Any]:
    """The Pallas kernels by name, and the collectives by kind with the bytes that they make.

    Both are counted as often as the program runs them, where it says how often.
    """
    try:
        steps = list(program.steps())
    except NoScheduleError:
        # A loop whose rounds are data: every instruction counts once.
        steps = [Step(i, 1) for body in program.computations.values() for i in body.values()]
    return {"kernels": _kernels(steps), "collectives": _collectives(steps)}


def _kernels(steps: Iterable[Step]) -> dict[str, int]:
    found = Counter[str]()
    for instruction, times in steps:
        if instruction.is_kernel:
            found[instruction.kernel_name] += times
    return dict(sorted(found.items()))


def _collectives(steps: Iterable[Step]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for instruction, times in steps:
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            of_kind = found.setdefault(kind, {"count": 0, "bytes": 0})
            of_kind["count"] += times
            of_kind["bytes"] += times * sum(a.bytes for a in instruction.arrays)
    return found


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Compiles one train step in this process and says what was found."""
    from jax.experimental import topologies

    config = experiment(spec["model"], dtype=spec["dtype"], loss=spec["loss"])
    chip = chip_named(spec["chip"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    data, model = spec["mesh"]
    step = lowered(config, spec["items"], (data, model), topology.devices)
    return compiled_figures(step, chip.hbm_bytes)


def _since(begin: float) -> float:
    # Of the processor: the machine may do other work meanwhile.
    return round(time.process_time() - begin, 1)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
