"""The core: pure functions over arrays. Needs JAX alone."""

from jaxrec.ops.attention import causal_attention
from jaxrec.ops.dropout import dropout
from jaxrec.ops.linear_cross_entropy import linear_cross_entropy, mean_linear_cross_entropy
from jaxrec.ops.positional_kernel import (
    init_positional_kernel,
    positional_kernel_attention,
    positional_mix,
)
from jaxrec.ops.top_k import top_k_items

__all__ = [
    "causal_attention",
    "dropout",
    "init_positional_kernel",
    "linear_cross_entropy",
    "mean_linear_cross_entropy",
    "positional_kernel_attention",
    "positional_mix",
    "top_k_items",
]
