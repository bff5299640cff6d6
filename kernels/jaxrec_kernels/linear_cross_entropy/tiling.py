"""Sizes of blocks, and what the kernels can take. Imports no Pallas."""

from functools import partial
from typing import Any, NamedTuple

from jaxrec_kernels import LANES, tuning
from jaxrec_kernels.generations import V5E

FORWARD, BACKWARD = "linear_cross_entropy_forward", "linear_cross_entropy_backward"
WIDEST = 256
_POSITIONS = 512
# With less, beginning and ending the kernels' pipelines takes longer than XLA's whole form.
_FEWEST_POSITIONS, _FEWEST_LOGITS = 128, 1 << 21
# Of the forward kernel where matrix units are ahead of the vector units: with more, what they give
# does not fit into registers. Those of a v5e are not, and are kept busy by more.
_FORWARD_CHUNK = 256
# What a step of the grid and a round over a chunk cost besides the items in them, in items.
_STEP, _ROUND = 160, 90
# Products of float32 in one pass or in float32; what lies between has no lowering.
_PRECISIONS = (None, "default", "highest", "float32")
# Of the 16 MiB that a kernel has by default on a v5e; the rest is the compiler's.
VMEM_BYTES = 12 << 20
# What blocks of a table may fill up beyond what those of the rule do, so that no gain is lost.
_MOST_FILLING = 1.01
# Catalogues from here on are cut alike: what the last block fills up is little.
_LARGE = 1 << 15


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

    @property
    def half(self) -> int:
        """Of a chunk, where a whole one needs more registers than there are; 128 at least."""
        return max(self.chunk // 2, LANES)


def blocks_for(
    positions: int,
    items: int,
    width: int,
    itemsize: int,
    kernel: str = BACKWARD,
    device_kind: str | None = None,
) -> Blocks:
    """Blocks that cover positions and items in the fewest cycles.

    Args:
      positions, items, width: of the arrays.
      itemsize: of both of them.
      kernel: the name given to `pl.pallas_call`.
      device_kind: of the TPU; None for blocks that are safe on v5e and later ones.

    >>> blocks_for(25_600, 100_000, 64, 2)
    Blocks(positions=512, items=2048, chunk=512)
    >>> blocks_for(25_600, 100_000, 64, 2, FORWARD)
    Blocks(positions=512, items=2048, chunk=256)
    >>> blocks_for(25_600, 100_000, 64, 2, FORWARD, "TPU v5 lite")
    Blocks(positions=512, items=2048, chunk=512)
    >>> blocks_for(25_600, 3_416, 64, 2)
    Blocks(positions=512, items=1152, chunk=384)
    >>> blocks_for(10, 20, 64, 2)
    Blocks(positions=128, items=256, chunk=128)
    """
    largest = 2048 if width * itemsize <= 2 * LANES else 1024
    largest_chunk = LANES if width > LANES else 1024 // itemsize
    if kernel == FORWARD and device_kind not in V5E:
        largest_chunk = min(largest_chunk, _FORWARD_CHUNK)

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


def tuned_blocks(
    kernel: str, positions: int, items: int, width: int, itemsize: int, *, biased: bool
) -> Blocks:
    """Those of the tuning table for such a call, where there are some that fit; else `blocks_for`.

    Args:
      kernel: the name given to `pl.pallas_call`.
      positions, items, width: of the arrays.
      itemsize: of both of them.
      biased: whether there is a bias.
    """
    sizes = positions, items, width, itemsize
    return tuning.tuned(
        kernel,
        call_class(*sizes, biased=biased),
        partial(fit, *sizes, biased=biased),
        partial(blocks_for, *sizes, kernel, tuning.device_kind()),
    )


def call_class(
    positions: int, items: int, width: int, itemsize: int, *, biased: bool
) -> dict[str, int]:
    """What tells calls apart in a tuning table: those of a class are cut alike.

    Positions count by how long the rule makes a block of them, items in lanes, large catalogues as
    one.
    """
    return {
        "positions": blocks_for(positions, items, width, itemsize).positions,
        "items": min(-(-items // LANES) * LANES, _LARGE),
        "width": width,
        "itemsize": itemsize,
        "biased": int(biased),
    }


def fit(
    of_positions: int,
    of_items: int,
    width: int,
    itemsize: int,
    *,
    biased: bool,
    positions: int,
    items: int,
    chunk: int,
) -> Blocks | None:
    """Blocks of these sizes; None where the kernels cannot take them, or waste more than the rule.

    Args:
      of_positions, of_items: how many there are.
      width, itemsize, biased: as in `tuned_blocks`.
      positions, items, chunk: as in `Blocks`.
    """
    blocks = Blocks(positions, items, chunk)
    if positions % LANES or chunk % LANES or items % chunk or items < 2 * chunk:
        return None
    if vmem_bytes(blocks, width, itemsize, biased) > VMEM_BYTES:
        return None
    rule = blocks_for(of_positions, of_items, width, itemsize)
    for count, size, usual in (
        (of_positions, positions, rule.positions),
        (of_items, items, rule.items),
    ):
        if -(-count // size) * size > _MOST_FILLING * (-(-count // usual) * usual):
            return None
    return blocks


def vmem_bytes(blocks: Blocks, width: int, itemsize: int, biased: bool) -> int:
    """Of the kernel that takes more: the forward one with its weights, or the backward one."""
    positions, items, _ = blocks
    square = positions * items
    # A block of rows, as wide as its tiles; operands are there twice, one for the next step.
    wide = -(-width // 16) * 16
    lines = 8 * 4
    operands = 2 * (positions + items) * wide * itemsize + 2 * 4 * positions * lines
    # Positions and items once more, with what is beside them or without.
    sided = (wide + 16) * itemsize
    forward = square * (4 + itemsize) + (2 * items + positions) * sided
    forward += 2 * 4 * width * positions + 5 * positions * lines + 2 * 3 * positions * lines
    backward = square * itemsize + (items + 2 * positions) * sided
    backward += 4 * (wide + 16) * items + 2 * 4 * width * items
    if biased:
        operands += 2 * items * lines
        backward += 2 * items * lines
        if width % LANES == 0:
            operands += items * LANES * 4
    return operands + max(forward, backward)


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


def slower(positions: int, items: int) -> str | None:
    """Why XLA's form would take less time than the kernels, or None if it would not.

    By the schedules for v5e with width 64, kernel / XLA: at 8 to 64 positions 2.5 to 9.4 with 3,416
    items and 1.4 to 3.1 with 100,000, but 0.9 for the gradient of the losses one by one; at 512
    positions and 3,416 items 1.3 and 1.5 with a gradient, at 1,024 0.9.
    """
    if positions < _FEWEST_POSITIONS:
        return f"the kernel is slower than XLA's form below {_FEWEST_POSITIONS} positions"
    if positions * items < _FEWEST_LOGITS:
        return f"the kernel is slower than XLA's form below {_FEWEST_LOGITS:,} logits"
    return None
