"""Positional kernel attention: what the kernels take; they themselves are imported when traced."""

from typing import Any

from jaxrec_kernels import LANES

# Squares up to this side stay in VMEM with everything that is computed from them; longer rows are
# for `jaxrec_kernels.long_attention`, as long as a row's gradient of queries stays there.
LONGEST_WHOLE, LONGEST = 1024, 16384


def heads_of_slab(heads: int, head_dim: int) -> int | None:
    """How many heads lie side by side in the lanes of a block; None where no cut is allowed."""
    if heads * head_dim <= LANES:
        return heads
    if head_dim % LANES == 0:
        return 1
    count = LANES // head_dim
    return count if LANES % head_dim == 0 and heads % count == 0 else None


def supports(query: Any, value: Any) -> str | None:
    """Why the kernel cannot take these arrays (or shapes with dtypes); None if it can."""
    _, length, heads, head_dim = query.shape
    if query.dtype.name not in ("float32", "bfloat16"):
        return f"the kernel is for float32 and bfloat16, not {query.dtype.name}"
    if value.shape != query.shape or value.dtype != query.dtype:
        return "the kernel wants values of the shape and dtype of the queries"
    if 0 in query.shape:
        return "there is nothing to compute"
    if length > LONGEST:
        return f"the kernel is for lengths up to {LONGEST}, not {length}"
    if head_dim > 256:
        return f"the kernel is for head_dim up to 256, not {head_dim}"
    if heads_of_slab(heads, head_dim) is None or (heads > 1 and head_dim % 16):
        return (
            f"{heads} heads of {head_dim} do not fill the kernel's blocks of {LANES} lanes; "
            "head_dim must be 16, 32, 64 or a multiple of 128, or all heads at most 128 lanes"
        )
    return None


def slower(query: Any) -> str | None:
    """Why XLA's form takes about as long as the kernel, or less, or None if it takes longer.

    By the schedules, kernel / XLA, with gradient and forward alone: mixes and attention at 2,048
    events with heads of 128 .94 and .85 on a v5e, 1.15 and 1.10 on a v6e (heads of 64, forward:
    1.15 and 1.38); at 8,192 events .98 and 1.05, and 1.20 and 1.38. Attention alone there: 1.01 and
    1.25, and 1.20 and 1.57. Up to 1,024 events the kernel is faster, but
    for mixes and attention with gradient at 50 events on a v6e, 1.04.
    """
    if query.shape[1] <= LONGEST_WHOLE:
        return None
    return f"on rows of more than {LONGEST_WHOLE:,} events XLA's form is about as fast, or faster"
