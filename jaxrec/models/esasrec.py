"""eSASRec: SASRec's objective with gated (LiGR) transformer layers."""

from typing import Any

import jax
from flax import nnx
from jax import Array

from jaxrec.models.attention import Positions, SelfAttention
from jaxrec.models.config import ESASRecConfig
from jaxrec.models.layers import Keys, LayerNorm, Linear, maybe_dropout
from jaxrec.models.transformer import Transformer
from jaxrec.registry import resolve


class LiGRBlock(SelfAttention):
    """Pre-normalised attention and a gated feed-forward network, each behind a learned gate.

    a = Attention(LN(x));             x <- x + sigmoid(W_g1 x + b_1) * dropout(a)
    z = LN(x), f = W_2 dropout(SiLU(W_1 z) * W_3 z);  x <- x + sigmoid(W_g2 x + b_2) * dropout(f)
    """

    def __init__(self, config: ESASRecConfig, *, positions: Positions, rngs: nnx.Rngs) -> None:
        super().__init__(config, positions=positions, output=True, rngs=rngs)
        width, inner = config.width, config.width * config.expansion

        def linear(features_in: int, features_out: int, *, bias: bool) -> Linear:
            return Linear(
                features_in,
                features_out,
                init_scale=config.init_scale,
                use_bias=bias,
                rngs=rngs,
            )

        self.config: ESASRecConfig = config
        self.attention_norm = LayerNorm(width, epsilon=config.norm_epsilon)
        self.attention_gate = linear(width, width, bias=True)
        self.feed_forward_norm = LayerNorm(width, epsilon=config.norm_epsilon)
        self.expand = linear(width, inner, bias=False)
        self.expand_gate = linear(width, inner, bias=False)
        self.contract = linear(inner, width, bias=False)
        self.feed_forward_gate = linear(width, width, bias=True)

    def __call__(self, x: Array, keys: Keys, **masks: Array) -> Array:
        query_input, key_input = self.attention_inputs(x)
        return self.rest(x, query_input, self.attend(query_input, key_input, keys, **masks), keys)

    def attention_inputs(self, x: Array) -> tuple[Array, Array]:
        normalized = self.attention_norm(x)
        return normalized, normalized

    def rest(self, x: Array, query_input: Array, attended: Array, keys: Keys) -> Array:
        rate = self.config.dropout
        attended = maybe_dropout(attended, rate, keys)
        x = x + jax.nn.sigmoid(self.attention_gate(x)) * attended
        z = self.feed_forward_norm(x)
        inner = resolve("activation", self.config.activation)(self.expand(z)) * self.expand_gate(z)
        inner = self.contract(maybe_dropout(inner, rate, keys))
        return x + jax.nn.sigmoid(self.feed_forward_gate(x)) * maybe_dropout(inner, rate, keys)


class ESASRec(Transformer):
    """Causal transformer of LiGR layers; scores are products with the item table.

    h_0 = dropout(E[s] + P[position]);  h_b = LiGRBlock_b(h_{b-1});  score(t, i) = <h_B,t, E[i]>.

    Source: Tikhonovich et al., "eSASRec" (RecSys 2025, arXiv 2508.06450); its recipe trains with a
    sampled softmax (`experiments/esasrec.py`). No normalisation follows the last block. Positions
    are counted from the newest event. Weights ~ N(0, 0.02), and item vectors are not scaled by
    sqrt(width) at the input: both are our choice where the published text leaves it open
    (`init_scale`, `scale_embedding`); the authors' library has `init_scale=None`, Xavier's rule for
    each matrix, and so has the experiment. All position schemes of `SASRec` can be had.

    Args:
      config: names and numbers.
      num_items: rows of the item table.
      max_length: longest sequence.
      rngs: initialises the parameters.
    """

    Config = ESASRecConfig

    def __init__(self, config: ESASRecConfig, **sizes: Any) -> None:
        super().__init__(config, block=LiGRBlock, last_norm=False, **sizes)
