"""The kernel of positional kernel attention compiled ahead of time for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops
from jaxrec_kernels.shapes import ATTENTION


def gradients(q, k, v, u, w, ids=None):
    def total(*arrays):
        masks = {} if ids is None else {"segment_ids": ids, "valid": ids > 0}
        out = ops.positional_kernel_attention(*arrays, implementation="pallas", **masks)
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.grad(total, (0, 1, 2, 3, 4))(q, k, v, u, w)


def specs(rows, everywhere, batch, length, heads, width, dtype=jnp.bfloat16):
    x = jax.ShapeDtypeStruct((batch, length, heads, width), dtype, sharding=rows)
    taps = jax.ShapeDtypeStruct((length,), jnp.float32, sharding=everywhere)
    return x, x, x, taps, taps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "shape"),
    [
        ("v5e", (128, 50, 1, 64)),
        ("v5e", (128, 200, 1, 64)),
        ("v6e", (32, 200, 4, 32)),
        ("v5e", (16, 1024, 4, 64)),
        ("v5e", (16, 200, 1, 256)),
    ],
)
def test_named_shapes_compile(chip, shape):
    one = SingleDeviceSharding(devices(chip)[0])
    program = jax.jit(gradients).lower(*specs(one, one, *shape)).compile()
    assert "tpu_custom_call" in program.as_text()
    size = np.prod(shape[:3]) * max(shape[3], 128 // shape[2]) * 2
    square = shape[1] ** 2 * 4
    # Copies of the inputs in other layouts, the output and its gradient, a few operators; no square
    # of a row and head.
    assert program.memory_analysis().temp_size_in_bytes < 10 * size + 8 * square


@pytest.mark.slow
def test_packed_rows_over_four_chips_compile():
    """Over the mesh of training: rows split over `data`, the same on both chips along `model`."""
    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "model"))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    f = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(rows,) * 3 + (everywhere,) * 2 + (rows,),
        out_specs=(rows,) * 3 + (everywhere,) * 2,
    )
    placed = [NamedSharding(mesh, spec) for spec in (rows, everywhere)]
    shape = ATTENTION["n200-heads"]
    ids = jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32, sharding=placed[0])
    program = jax.jit(f).lower(*specs(*placed, *shape, jnp.float32), ids).compile()
    text = program.as_text()
    assert "tpu_custom_call" in text
    assert "all-reduce" in text
