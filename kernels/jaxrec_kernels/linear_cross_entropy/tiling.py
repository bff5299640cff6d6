"""Sizes of blocks, and what the kernels can take. Imports no Pallas."""

from typing import Any, NamedTuple

LANES = 128
WIDEST = 256
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
    """Blocks of equal size that cover positions and items with little left over.

    >>> blocks_for(25_600, 100_000, 64, 2)
    Blocks(positions=512, items=2048, chunk=512)
    >>> blocks_for(25_600, 3_416, 64, 2)
    Blocks(positions=512, items=1024, chunk=512)
    >>> blocks_for(10, 20, 64, 2)
    Blocks(positions=128, items=256, chunk=128)
    """
    # A step more than there are blocks of items is taken: few items are cut finer.
    largest = 2048 if width * itemsize <= 2 * LANES and items > 8192 else 1024
    of_items = _even(items, largest, 2 * LANES)
    chunk = LANES if width > LANES else 1024 // itemsize
    # Two at least: a loop of one round is none, and what is in it spills.
    while of_items % chunk or of_items == chunk:
        chunk //= 2
    return Blocks(_even(positions, 512, LANES), of_items, chunk)


def _even(count: int, largest: int, multiple: int) -> int:
    blocks = -(-count // largest)
    return -(-count // (blocks * multiple)) * multiple


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
