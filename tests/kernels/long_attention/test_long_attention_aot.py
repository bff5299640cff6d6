"""The kernels for long rows compiled ahead of time for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops

pytestmark = pytest.mark.slow


def gradients(q, k, v, u, w, ids=None, structure="toeplitz"):
    def total(*arrays):
        options = {} if ids is None else {"segment_ids": ids, "valid": ids > 0}
        options |= {"structure": structure, "implementation": "pallas"}
        out = ops.positional_kernel_attention(*arrays, **options)
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.grad(total, (0, 1, 2, 3, 4))(q, k, v, u, w)


def specs(rows, everywhere, batch, length, heads, width, *kernel):
    x = jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16, sharding=rows)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)
    factor = jax.ShapeDtypeStruct(kernel, jnp.float32, sharding=everywhere)
    return x, x, x, factor, factor, ids


def test_full_factors_of_ragged_length_compile():
    one = SingleDeviceSharding(devices("v6e")[0])
    *arrays, _ = specs(one, one, 2, 1500, 2, 64, 1500, 1500)
    program = jax.jit(functools.partial(gradients, structure="full")).lower(*arrays).compile()
    assert "long_attention_backward" in program.as_text()


def test_rows_over_four_chips_compile():
    mesh = Mesh(np.array(devices("v5e")), ("data",))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    f = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(rows,) * 3 + (everywhere,) * 2 + (rows,),
        out_specs=(rows,) * 3 + (everywhere,) * 2,
    )
    placed = [NamedSharding(mesh, spec) for spec in (rows, everywhere)]
    text = jax.jit(f).lower(*specs(*placed, 4, 1100, 1, 64, 100)).compile().as_text()
    assert "long_attention_backward" in text
    assert "all-reduce" in text


def test_packed_rows_with_a_kernel_a_head_compile():
    one = SingleDeviceSharding(devices("v6e")[0])
    given = specs(one, one, 2, 1100, 2, 64, 2, 1100)
    text = jax.jit(gradients).lower(*given).compile().as_text()
    assert "long_attention_backward" in text
