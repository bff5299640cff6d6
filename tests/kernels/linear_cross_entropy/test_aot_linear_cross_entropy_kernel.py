"""The catalogue loss's kernels compiled for TPUs, on a machine that has none: do they fit."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpu_topologies import devices

from benchmarks.tpu.chips import CHIPS
from jaxrec import ops
from jaxrec_kernels.shapes import CATALOGUE

pytestmark = pytest.mark.slow

SHAPE = CATALOGUE["v100k"]
# Width, dtype and whether there is a bias: arrays that lie as columns and as rows.
KERNELS = [(50, "bfloat16", True), (128, "bfloat16", False), (256, "float32", True)]

NAMED = ["v3k", "v100k"]

MEASURE = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp
from benchmarks.tpu.chips import CHIPS
from benchmarks.tpu.schedule import compile_and_measure
from benchmarks.cases import Case, program
from benchmarks.tpu.measure import figures
from jaxrec_kernels import tuning
from jaxrec_kernels.shapes import CATALOGUE
from jaxrec_kernels.linear_cross_entropy.tpu_backward import table_gradient
from jaxrec_kernels.linear_cross_entropy.tpu_forward import statistics

chip, kernels, named = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
case = program(Case("linear_cross_entropy", "v100k", backward=True), jnp.bfloat16, "pallas")
found = {"gradient": figures(compile_and_measure(*case, chip))}

def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

def measure(size, dtype, biased):
    positions, items, width = size
    arrays = [spec(positions, width, dtype=dtype), spec(items, width, dtype=dtype)]
    arrays.append(spec(positions, dtype=jnp.int32))
    bias = [spec(items)] if biased else []
    lines = [spec(positions)] * 3
    for name, f, given in (
        ("forward", partial(statistics, weighted=True), [*arrays, *bias]),
        ("forward alone", partial(statistics, weighted=False), [*arrays, *bias]),
        ("table_gradient", table_gradient, [*arrays, *lines, *bias]),
    ):
        name = f"{name} {size} {dtype}{' biased' if biased else ''}"
        found[name] = figures(compile_and_measure(f, given, chip))

for width, dtype, biased in kernels:
    measure((1_000, 9_000, width), dtype, biased)
# With the blocks that are best on the chip, where those above are safe on any.
with tuning.compiling_for(CHIPS[chip].device_kinds[0]):
    for name in named:
        for biased in (False, True):
            measure(tuple(CATALOGUE[name]), "bfloat16", biased)
print(json.dumps(found))
"""


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_kernels_fit_and_leave_no_units_idle(chip):
    # In a process of its own: the compiler is asked for its schedules when it starts.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, chip, json.dumps(KERNELS), json.dumps(NAMED)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 1 + 3 * (len(KERNELS) + 2 * len(NAMED))
    for name, figures in found.items():
        assert figures["spills"] == 0, name
        assert figures["vmem_bytes"] < 12 << 20, name
    gradient = found["gradient"]
    assert len(gradient["kernels"]) == 2
    assert not gradient["lower_limit"]
    assert all(kernel["conditions_known"] for kernel in gradient["kernels"].values())
    # The dense form holds the logits.
    assert 1000 * gradient["temporaries"] < 2 * SHAPE.positions * SHAPE.items
    if chip == "v5e":
        # Four products at the rate of the matrix units, the width filled up to their side.
        products = 4 * 2 * SHAPE.positions * SHAPE.items * 128 / CHIPS[chip].flops_per_cycle
        assert gradient["cycles"] < 1.15 * products


def test_a_table_on_four_chips():
    """Two shards of items for each of two shards of positions; the last shard is filled up."""
    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "model"))
    rows, split, whole = PartitionSpec("data"), PartitionSpec("model"), PartitionSpec()

    def part(hidden, table, bias, labels, valid):
        options = {"bias": bias, "valid": valid, "label_smoothing": 0.1}
        options |= {"item_axis": "model", "num_items": 199_999, "implementation": "pallas"}
        each = ops.linear_cross_entropy(hidden, table, labels, **options).sum()
        mean = ops.mean_linear_cross_entropy(hidden, table, labels, **options)
        return jax.lax.psum(each + mean, "data")

    specs = (rows, split, split, rows, rows)
    f = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=whole)
    shapes = [
        ((4096, 64), jnp.bfloat16),
        ((200_000, 64), jnp.bfloat16),
        ((200_000,), jnp.float32),
        ((4096,), jnp.int32),
        ((4096,), jnp.bool_),
    ]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, p))
        for (shape, dtype), p in zip(shapes, specs, strict=True)
    ]
    compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(*arguments).compile()
    text = compiled.as_text()
    # Both losses take the same statistics.
    assert text.count("tpu_custom_call") == 3
    assert "all-reduce" in text
    # Far below the logits of one shard.
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 100_000 * 4 / 10
