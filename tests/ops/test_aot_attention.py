"""The attention ops compiled ahead of time for TPUs, on a machine that has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tpu_topologies import devices

from jaxrec import ops

# The TPU compiler takes about a minute of one core for a program of several fused products.
pytestmark = pytest.mark.slow


def spec(sharding, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def gradients(structure, q, k, v, ids, u, w, key):
    def total(q, k, v, u, w):
        out = ops.positional_kernel_attention(
            q,
            k,
            v,
            u,
            w,
            structure=structure,
            segment_ids=ids,
            valid=ids > 0,
            dropout_rate=0.2,
            dropout_key=jax.random.wrap_key_data(key),
        )
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.grad(total, (0, 1, 2, 3, 4))(q, k, v, u, w)


def arguments(rows, everywhere, batch, length, heads, width, structure, dtype):
    kernel = (length,) if structure == "toeplitz" else (length, length)
    x = spec(rows, batch, length, heads, width, dtype=dtype)
    return (
        x,
        x,
        x,
        spec(rows, batch, length, dtype=jnp.int32),
        spec(everywhere, *kernel),
        spec(everywhere, *kernel),
        spec(everywhere, 2, dtype=jnp.uint32),
    )


def compiled(chip, *shape, structure, dtype=jnp.bfloat16):
    one = SingleDeviceSharding(devices(chip)[0])
    f = jax.jit(functools.partial(gradients, structure))
    return f.lower(*arguments(one, one, *shape, structure, dtype)).compile()


@pytest.mark.parametrize(
    ("chip", "structure", "length"), [("v5e", "toeplitz", 200), ("v6e", "full", 120)]
)
def test_packed_rows_compile(chip, structure, length):
    """Batch 64: what is in HBM is less than one square of weights a row."""
    program = compiled(chip, 64, length, 1, 64, structure=structure)
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert temporaries < 64 * length**2 * 4


def test_long_rows_fit():
    """Length 4096, 8 rows, 4 heads: the logits alone would take 2 GiB."""
    program = compiled("v6e", 8, 4096, 4, 64, structure="toeplitz")
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert temporaries < 200 * 2**20


def test_sharded_rows_compile():
    """Rows over four chips with the kernels on each; shard_map sums the kernels' gradient."""
    mesh = Mesh(np.array(devices("v5e")), ("data",))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    f = jax.shard_map(
        functools.partial(gradients, "toeplitz"),
        mesh=mesh,
        in_specs=(rows,) * 4 + (everywhere,) * 3,
        out_specs=(rows,) * 3 + (everywhere,) * 2,
    )
    shardings = [NamedSharding(mesh, p) for p in (rows, everywhere)]
    specs = arguments(*shardings, 16, 200, 2, 32, "toeplitz", jnp.float32)
    program = jax.jit(f).lower(*specs).compile()
    assert "all-reduce" in program.as_text()


def test_decode_compiles():
    one = SingleDeviceSharding(devices("v5e")[0])
    history, event = spec(one, 8, 50, 2, 32), spec(one, 8, 2, 32)
    taps = spec(one, 16)

    def serve(history, event, taps):
        x = history
        _, state = ops.positional_kernel_prefill(x, x, x, taps, taps, capacity=64)
        return ops.positional_kernel_step(state, event, event, event, taps, taps)

    program = jax.jit(serve).lower(history, event, taps).compile()
    assert program.memory_analysis().output_size_in_bytes > 2 * 8 * 64 * 2 * 32 * 4
