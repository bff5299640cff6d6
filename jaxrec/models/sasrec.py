"""SASRec: self-attentive sequential recommendation, with a choice of how position enters."""

from typing import Any

from flax import nnx
from jax import Array

from jaxrec.models.attention import Positions, SelfAttention
from jaxrec.models.config import SASRecConfig
from jaxrec.models.layers import Keys, LayerNorm, Linear, maybe_dropout
from jaxrec.models.transformer import Transformer
from jaxrec.registry import resolve


class Block(SelfAttention):
    """Attention and a pointwise feed-forward network, each with a residual.

    With `residual="normalized"` (the original), the attention is added to LN(x), and keys and
    values come from x itself; the feed-forward network is added to its normalised input.
    """

    def __init__(self, config: SASRecConfig, *, positions: Positions, rngs: nnx.Rngs) -> None:
        super().__init__(config, positions=positions, output=config.output_projection, rngs=rngs)
        width, inner = config.width, config.feed_forward or config.width
        self.config: SASRecConfig = config
        self.attention_norm = LayerNorm(width, epsilon=config.norm_epsilon)
        self.feed_forward_norm = LayerNorm(width, epsilon=config.norm_epsilon)
        self.expand = Linear(width, inner, init_scale=config.init_scale, rngs=rngs)
        self.contract = Linear(inner, width, init_scale=config.init_scale, rngs=rngs)

    def __call__(self, x: Array, keys: Keys, **masks: Array) -> Array:
        query_input, key_input = self.attention_inputs(x)
        return self.rest(x, query_input, self.attend(query_input, key_input, keys, **masks), keys)

    def attention_inputs(self, x: Array) -> tuple[Array, Array]:
        return self.attention_norm(x), x

    def rest(self, x: Array, query_input: Array, attended: Array, keys: Keys) -> Array:
        config = self.config
        original = config.residual == "normalized"
        y = attended + (query_input if original else x)
        z = self.feed_forward_norm(y)
        inner = resolve("activation", config.activation)(self.expand(z))
        inner = maybe_dropout(inner, config.dropout, keys)
        inner = maybe_dropout(self.contract(inner), config.dropout, keys)
        return inner + (z if original else y)


class SASRec(Transformer):
    """Causal transformer over a user's items; scores are products with the item table.

    h_0 = dropout(sqrt(width) E[s] + P[position]);  h_b = Block_b(h_{b-1});  f = LN(h_B);
    score(t, i) = <f_t, E[i]>.

    Source: Kang and McAuley, "Self-attentive sequential recommendation" (ICDM 2018). The defaults
    follow its PyTorch ports: weights ~ N(0, 0.02), an output projection after attention (the
    original: `output_projection=False`), no item for padding (masks alone mark it), so a padded
    slot takes part in nothing. Positions are counted from the sequence's oldest event unless
    `position_order="newest"`, as RecTools has it. RecBoard's port is `residual="input"`.

    With `position="kernel"` the additive vectors P are left out, and attention takes its keys and
    values from learned causal mixtures over positions instead (`ops.positional_kernel_attention`;
    Nabiev and Frolov, arXiv 2602.21052). The exact equation of that paper was not at hand: see the
    op for what is inferred, and `PositionalKernelConfig` for the switches. A `full` factor is
    indexed so that the newest event of a sequence is last, whatever `position_order` says. The
    other schemes are those of `jaxrec.models.attention`.

    Args:
      config: names and numbers.
      num_items: rows of the item table.
      max_length: longest sequence.
      rngs: initialises the parameters.
    """

    Config = SASRecConfig

    def __init__(self, config: SASRecConfig, **sizes: Any) -> None:
        super().__init__(config, block=Block, last_norm=True, **sizes)
