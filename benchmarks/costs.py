"""FLOPs and bytes of the ops, counted by hand.

`compiled.cost_analysis()` counts the body of a loop once, so it cannot be used. FLOPs are those of
the matrix products that the op cannot do without, each pair of events counted where causality lets
it count; bytes are each argument read once and each result written once in every pass. Both are
lower limits: what a program does beyond them is what its ratio to the roofline shows.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxrec_kernels.shapes import AttentionShape, CatalogueShape


class Cost(NamedTuple):
    """FLOPs of matrix products, and bytes between main memory and chip."""

    flops: float
    bytes: float


def linear_cross_entropy(shape: CatalogueShape, backward: bool, itemsize: int) -> Cost:
    """One product of [P, D] and [D, V]; with the gradient four, the logits being taken twice."""
    return _catalogue(shape, backward, itemsize, products=4)


def mean_linear_cross_entropy(shape: CatalogueShape, backward: bool, itemsize: int) -> Cost:
    """With the gradient three products: its weights are known while the logits are at hand."""
    return _catalogue(shape, backward, itemsize, products=3)


def _catalogue(shape: CatalogueShape, backward: bool, itemsize: int, products: int) -> Cost:
    positions, items, width = shape
    flops = 2.0 * positions * items * width
    arguments = itemsize * (positions + items) * width + 4 * positions
    if not backward:
        return Cost(flops, arguments + 4 * positions)
    gradients = itemsize * (positions + items) * width
    return Cost(products * flops, 2 * arguments + gradients + 4 * positions)


def causal_attention(shape: AttentionShape, backward: bool, itemsize: int) -> Cost:
    """Two products of [n, d] and [n, n] below the diagonal; five more for the gradient."""
    return _attention(shape, backward, itemsize, mixes=0)


def hstu_attention(shape: AttentionShape, backward: bool, itemsize: int) -> Cost:
    """Two products of [n, d] and [n, n] below the diagonal; five more for the gradient."""
    return _attention(shape, backward, itemsize, mixes=0)


def positional_kernel_attention(shape: AttentionShape, backward: bool, itemsize: int) -> Cost:
    """As plain attention, and keys and values mixed by a triangle each.

    The gradient of a mix takes two products more: by what is mixed, and by the triangle.
    """
    return _attention(shape, backward, itemsize, mixes=2)


def _attention(shape: AttentionShape, backward: bool, itemsize: int, mixes: int) -> Cost:
    batch, length, heads, head_dim = shape
    pairs = batch * heads * length * (length + 1) / 2
    array = float(itemsize * batch * length * heads * head_dim)
    product = 2.0 * pairs * head_dim
    if not backward:
        return Cost((2 + mixes) * product, 4 * array)
    return Cost((7 + 3 * mixes) * product, 4 * array + 8 * array)


COSTS: dict[str, Callable[..., Cost]] = {
    "linear_cross_entropy": linear_cross_entropy,
    "mean_linear_cross_entropy": mean_linear_cross_entropy,
    "causal_attention": causal_attention,
    "hstu_attention": hstu_attention,
    "positional_kernel_attention": positional_kernel_attention,
}
