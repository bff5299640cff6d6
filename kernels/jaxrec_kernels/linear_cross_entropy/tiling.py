"""Sizes of blocks, and what the kernels can take. Imports no Pallas."""

from typing import Any, NamedTuple

LANES = 128
WIDEST = 256
_POSITIONS = 512
# What a step of the grid and a round over a chunk cost besides the items in them, in items.
_STEP, _ROUND = 160, 90
# Products of float32 in one pass or in float32; what lies between has no lowering.
_PRECISIONS = (None, "default", "highest", "float32")


class Blocks(NamedTuple):
    """A program holds `positions` x `items` logits and works on `chunk` items of them at a time.

    Chosen by the compiler's schedules for v5e and v6e: a longer block of items amortises what is
    done once a block, a larger chunk keeps the matrix units busy, and both end where registers
    spill or VMEM does. At the largest, 512 x 2,048, the float32 logits and their bfloat16 weights
    take 6 MiB of the 16 MiB that a kernel has by default; nothing takes more than 12.
    """

    positions: int
    items: int
    chunk: int


def blocks_for(positions: int, items: int, width: int, itemsize: int) -> Blocks:
    """Blocks that cover positions and items in the fewest cycles.

    >>> blocks_for(25_600, 100_000, 64, 2)
    Blocks(positions=512, items=2048, chunk=512)
    >>> blocks_for(25_600, 3_416, 64, 2)
    Blocks(positions=512, items=1152, chunk=384)
    >>> blocks_for(10, 20, 64, 2)
    Blocks(positions=128, items=256, chunk=128)
    """
    largest = 2048 if width * itemsize <= 2 * LANES else 1024
    largest_chunk = LANES if width > LANES else 1024 // itemsize

    def cost(chunk: int, rounds: int) -> int:
        blocks = -(-items // (rounds * chunk))
        return blocks * (_STEP + rounds * (_ROUND + chunk))

    # Two rounds at least: a loop of one is none, and what is in it spills.
    chunk, rounds = min(
        (
            (chunk, rounds)
            for chunk in range(LANES, largest_chunk + 1, LANES)
            for rounds in range(2, largest // chunk + 1)
        ),
        key=lambda sizes: cost(*sizes),
    )
    blocks = -(-positions // _POSITIONS)
    of_positions = -(-positions // (blocks * LANES)) * LANES
    return Blocks(of_positions, rounds * chunk, chunk)


def supports(width: int, dtype: Any, precision: str | None) -> str | None:
    """Why the kernels cannot take a call, or None if they can.

    Args:
      width: D of both arrays.
      dtype: of both arrays.
      precision: `jax.config.jax_default_matmul_precision`.
    """
    if width > WIDEST:
        return f"the kernel takes a width of at most {WIDEST}, got {width}"
    if str(dtype) not in ("float32", "bfloat16"):
        return f"the kernel takes float32 and bfloat16, got {dtype}"
    if str(dtype) == "float32" and precision not in _PRECISIONS:
        return (
            f"the kernel has no products with default_matmul_precision {precision!r}; it has "
            "'default' and 'highest'"
        )
    return None
