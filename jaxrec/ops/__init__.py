"""The core: pure functions over arrays. Needs JAX and jaxtyping alone."""

from jaxrec.ops._attention_decode import (
    PositionalKernelState,
    positional_kernel_prefill,
    positional_kernel_step,
)
from jaxrec.ops._attention_positions import segment_positions
from jaxrec.ops.attention import causal_attention
from jaxrec.ops.cached_attention import cached_attention, cached_hstu_attention
from jaxrec.ops.distance_bias import alibi_bias, alibi_slopes, t5_bias, t5_bucket
from jaxrec.ops.dropout import dropout
from jaxrec.ops.explain import explain
from jaxrec.ops.hstu import hstu_attention
from jaxrec.ops.layer_norm import layer_norm
from jaxrec.ops.linear_cross_entropy import linear_cross_entropy, mean_linear_cross_entropy
from jaxrec.ops.positional_kernel import (
    init_positional_kernel,
    positional_kernel_attention,
    positional_mix,
)
from jaxrec.ops.ranks import ranking_metrics, target_ranks
from jaxrec.ops.rotary import rotary_embedding
from jaxrec.ops.sample_items import sample_items
from jaxrec.ops.sampled_loss import bce_loss, gbce_loss, sampled_softmax_loss
from jaxrec.ops.take_rows import take_rows
from jaxrec.ops.top_k import top_k_items

__all__ = [
    "PositionalKernelState",
    "alibi_bias",
    "alibi_slopes",
    "bce_loss",
    "cached_attention",
    "cached_hstu_attention",
    "causal_attention",
    "dropout",
    "explain",
    "gbce_loss",
    "hstu_attention",
    "init_positional_kernel",
    "layer_norm",
    "linear_cross_entropy",
    "mean_linear_cross_entropy",
    "positional_kernel_attention",
    "positional_kernel_prefill",
    "positional_kernel_step",
    "positional_mix",
    "ranking_metrics",
    "rotary_embedding",
    "sample_items",
    "sampled_softmax_loss",
    "segment_positions",
    "t5_bias",
    "t5_bucket",
    "take_rows",
    "target_ranks",
    "top_k_items",
]
