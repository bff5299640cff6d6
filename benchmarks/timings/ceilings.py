"""What the device at hand can do, measured: the roofs of a roofline."""

import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timings.clock import calls_a_round, sample


class Ceilings(NamedTuple):
    """The best of several measurements each."""

    flops_per_second: float
    bytes_per_second: float

    def roofline_seconds(self, flops: float, moved: float) -> float:
        """The least time for so many FLOPs of matrix products and bytes of main memory."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


def measure_ceilings(
    dtype: Any, *, side: int | None = None, stream_bytes: int | None = None, repeats: int = 7
) -> Ceilings:
    """FLOP/s of a large square product, and bytes/s of an array that is read and written.

    A bfloat16 program is free to compute in float32, which is faster on most CPUs, so its ceiling
    is the better of the two. Products have the precision that the ops' have.

    Args:
      dtype: of the product.
      side: of the square matrices.
      stream_bytes: of the array.
      repeats: the best of so many counts.
    """
    cpu = jax.default_backend() == "cpu"
    side = side or (2048 if cpu else 8192)
    stream_bytes = stream_bytes or (1 << 28 if cpu else 1 << 30)
    rates = [_products(side, d, repeats) for d in {jnp.dtype(dtype), jnp.dtype(jnp.float32)}]
    return Ceilings(max(rates), _stream(stream_bytes, repeats))


def _products(side: int, dtype: Any, repeats: int) -> float:
    x = jnp.full((side, side), 1 / side, dtype)
    product = jax.jit(lambda x: x @ x)
    chained = jax.default_backend() != "cpu"
    calls = calls_a_round(lambda: product(x), chained=chained)
    best = min(sample(lambda: product(x), calls, chained=chained) for _ in range(repeats))
    return 2.0 * side**3 / best


def _stream(size: int, repeats: int) -> float:
    # In place: pages that the system must first find would be a cost of their own.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(size // 4, jnp.float32)
    calls = 1 if jax.default_backend() == "cpu" else 20
    best = float("inf")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*donated")
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(calls):
                x = add(x)
            jax.block_until_ready(x)
            best = min(best, (time.perf_counter() - start) / calls)
    return 2.0 * x.nbytes / best
