"""The kernels of HSTU's attention compiled ahead of time for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops
from jaxrec_kernels.shapes import ATTENTION


def gradients(q, k, v, positions, times, seconds, ids):
    def total(q, k, v, positions, times):
        out = ops.hstu_attention(
            q,
            k,
            v,
            normalizer=100,
            position_table=positions,
            time_table=times,
            timestamps=seconds,
            valid=ids > 0,
            segment_ids=ids,
            implementation="pallas",
        )
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.grad(total, (0, 1, 2, 3, 4))(q, k, v, positions, times)


def specs(rows, everywhere, shape, dtype=jnp.bfloat16):
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=rows)
    tables = [
        jax.ShapeDtypeStruct((size,), jnp.float32, sharding=everywhere)
        for size in (2 * shape[1] - 1, 129)
    ]
    return x, x, x, *tables, ids, ids


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "name"), [("v5e", "n200"), ("v6e", "n50"), ("v5e", "n8192")])
def test_named_shapes_compile(chip, name):
    one, shape = SingleDeviceSharding(devices(chip)[0]), ATTENTION[name]
    program = jax.jit(gradients).lower(*specs(one, one, tuple(shape))).compile()
    assert "tpu_custom_call" in program.as_text()
    # Less than ten arrays of the inputs' size, narrow heads filled up to a register.
    size = shape.batch * shape.length * max(shape.heads * shape.head_dim, 128) * 2
    assert program.memory_analysis().temp_size_in_bytes < 10 * size


@pytest.mark.slow
def test_packed_rows_over_four_chips_compile():
    """Over the mesh of training: rows split over `data`, the same on both chips along `model`."""
    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "model"))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    f = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(rows,) * 3 + (everywhere,) * 2 + (rows,) * 2,
        out_specs=(rows,) * 3 + (everywhere,) * 2,
    )
    placed = [NamedSharding(mesh, spec) for spec in (rows, everywhere)]
    given = specs(*placed, tuple(ATTENTION["n200-heads"]), jnp.float32)
    text = jax.jit(f).lower(*given).compile().as_text()
    assert "tpu_custom_call" in text
    assert "all-reduce" in text
