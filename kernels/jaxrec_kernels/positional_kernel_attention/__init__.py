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
