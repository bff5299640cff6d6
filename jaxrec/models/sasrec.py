"""SASRec: self-attentive sequential recommendation, with a choice of how position enters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrec import ops
from jaxrec.models.config import PositionalKernelConfig, SASRecConfig, Structure
from jaxrec.models.layers import Keys, LayerNorm, Linear, activation_dtype, maybe_dropout
from jaxrec.registry import resolve


class PositionalKernel(nnx.Module):
    """The two factors of a learned kernel over positions (`ops.positional_kernel_attention`)."""

    def __init__(self, config: PositionalKernelConfig, *, heads: int, length: int) -> None:
        def factor(structure: Structure) -> nnx.Param | None:
            if structure == "identity":
                return None
            return nnx.Param(
                ops.init_positional_kernel(
                    structure,
                    length,
                    band=config.band if structure == "toeplitz" else None,
                    heads=heads if config.per_head else None,
                    init=config.init,
                    power=config.power,
                )
            )

        self.config = config
        self.logits = factor(config.logits)
        self.values = None if config.tie else factor(config.values)

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        return ops.positional_kernel_attention(
            query,
            key,
            value,
            None if self.logits is None else self.logits[...],
            None if self.values is None else self.values[...],
            structure=(self.config.logits, self.config.values),
            tie=self.config.tie,
            **options,
        )


class Block(nnx.Module):
    """Attention and a pointwise feed-forward network, each with a residual.

    With `residual="normalized"` (the original), the attention is added to LN(x), and keys and
    values come from x itself; the feed-forward network is added to its normalised input.
    """

    def __init__(
        self,
        config: SASRecConfig,
        *,
        kernel: PositionalKernel | None,
        rngs: nnx.Rngs,
    ) -> None:
        width, inner = config.width, config.feed_forward or config.width

        def linear(features_in: int, features_out: int) -> Linear:
            return Linear(features_in, features_out, init_scale=config.init_scale, rngs=rngs)

        self.config = config
        self.attention_norm = LayerNorm(width, epsilon=config.norm_epsilon)
        self.query = linear(width, width)
        self.key = linear(width, width)
        self.value = linear(width, width)
        self.output = linear(width, width) if config.output_projection else None
        self.kernel = kernel
        self.feed_forward_norm = LayerNorm(width, epsilon=config.norm_epsilon)
        self.expand = linear(width, inner)
        self.contract = linear(inner, width)

    def __call__(self, x: Array, keys: Keys, **masks: Array) -> Array:
        config = self.config
        batch, length, width = x.shape
        heads = (batch, length, config.heads, width // config.heads)
        normalized = self.attention_norm(x)
        query = self.query(normalized).reshape(heads)
        key = self.key(x).reshape(heads)
        value = self.value(x).reshape(heads)
        dropout_key = keys.next() if config.dropout else None
        options: dict[str, Any] = {
            "valid": masks["valid"],
            "segment_ids": masks["segment_ids"],
            "dropout_rate": config.dropout if dropout_key is not None else 0.0,
            "dropout_key": dropout_key,
        }
        if self.kernel is None:
            attended = ops.causal_attention(query, key, value, **options)
        else:
            attended = self.kernel(query, key, value, positions=masks["positions"], **options)
        attended = attended.reshape(batch, length, width)
        if self.output is not None:
            attended = self.output(attended)
        y = attended + (normalized if config.residual == "normalized" else x)
        z = self.feed_forward_norm(y)
        inner = resolve("activation", config.activation)(self.expand(z))
        inner = maybe_dropout(inner, config.dropout, keys)
        inner = maybe_dropout(self.contract(inner), config.dropout, keys)
        return inner + (z if config.residual == "normalized" else y)


class SASRec(nnx.Module):
    """Causal transformer over a user's items; scores are products with the item table.

    h_0 = dropout(sqrt(width) E[s] + P[position]);  h_b = Block_b(h_{b-1});  f = LN(h_B);
    score(t, i) = <f_t, E[i]>.

    Source: Kang and McAuley, "Self-attentive sequential recommendation" (ICDM 2018). The defaults
    follow its PyTorch ports: weights ~ N(0, 0.02), an output projection after attention (the
    original: `output_projection=False`), no item for padding (masks alone mark it), so a padded
    slot takes part in nothing. Positions are counted from the sequence's oldest event unless
    `position_order="newest"`.

    With `position="kernel"` the additive vectors P are left out, and attention takes its keys and
    values from learned causal mixtures over positions instead (`ops.positional_kernel_attention`;
    Nabiev and Frolov, arXiv 2602.21052). The exact equation of that paper was not at hand: see the
    op for what is inferred, and `PositionalKernelConfig` for the switches. A `full` factor is
    indexed so that the newest event of a sequence is last, whatever `position_order` says.

    Args:
      config: names and numbers.
      num_items: rows of the item table.
      max_length: longest sequence.
      rngs: initialises the parameters.
    """

    Config = SASRecConfig

    def __init__(
        self, config: SASRecConfig, *, num_items: int, max_length: int, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.max_length = max_length
        scale = config.init_scale
        self.item_embedding = nnx.Param(
            scale * jax.random.normal(rngs.params(), (num_items, config.width))
        )
        self.position_embedding = (
            nnx.Param(scale * jax.random.normal(rngs.params(), (max_length, config.width)))
            if "additive" in config.position
            else None
        )
        kernels: list[PositionalKernel | None] = [None] * config.blocks
        if "kernel" in config.position:
            count = 1 if config.kernel.shared else config.blocks
            made = [
                PositionalKernel(config.kernel, heads=config.heads, length=max_length)
                for _ in range(count)
            ]
            kernels = [made[i % count] for i in range(config.blocks)]
        self.blocks = nnx.List([Block(config, kernel=k, rngs=rngs) for k in kernels])
        self.norm = LayerNorm(config.width, epsilon=config.norm_epsilon)

    def hidden(
        self,
        items: Int[Array, "rows length"],
        *,
        valid: Bool[Array, "rows length"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length"],
        key: Array | None = None,
    ) -> Float[Array, "rows length width"]:
        """The state after every event, from which its next item is scored.

        Args:
          items: item indices; anything in range where not valid.
          valid: False on padding.
          segment_ids: equal within a sequence, different between the sequences of a row.
          positions: as `position_order` counts them.
          key: turns dropout on.

        Returns:
          States in the activations' dtype; rows of padding are finite and meaningless.
        """
        config, keys = self.config, Keys(key)
        x = self.item_embedding[...][items]
        if config.scale_embedding:
            x = x * jnp.sqrt(jnp.float32(config.width))
        if self.position_embedding is not None:
            x = x + self.position_embedding[...][positions]
        x = jnp.where(valid[..., None], x, 0.0).astype(activation_dtype(config.dtype))
        x = maybe_dropout(x, config.dropout, keys)
        masks = {"valid": valid, "segment_ids": segment_ids}
        masks["positions"] = (
            self._end_aligned(valid, segment_ids, positions)
            if self._has_full_kernel()
            else positions
        )
        for block in self.blocks:
            x = block(x, keys, **masks)
            x = jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))
        return self.norm(x)

    def score(
        self, states: Float[Array, "users width"], items: Int[Array, " items"] | None = None
    ) -> Float[Array, "users items"]:
        """Scores of `items` (all by default) for each state, in float32."""
        table = self.item_table()
        table = table if items is None else table[items]
        return jnp.matmul(states, table.T, preferred_element_type=jnp.float32)

    def item_table(self) -> Float[Array, "items width"]:
        """The vectors that states are scored against, in the activations' dtype."""
        return self.item_embedding[...].astype(activation_dtype(self.config.dtype))

    def _has_full_kernel(self) -> bool:
        kernel = self.config.kernel
        return "kernel" in self.config.position and "full" in (kernel.logits, kernel.values)

    def _end_aligned(self, valid: Array, segment_ids: Array, positions: Array) -> Array:
        """Positions such that the newest event of every sequence is at max_length - 1."""
        if self.config.position_order == "newest":
            return self.max_length - 1 - positions
        # A sequence lies in one piece: its newest event is the next slot where the id changes.
        length = segment_ids.shape[1]
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
        slot = jnp.where(last, jnp.arange(length, dtype=jnp.int32)[None], length)
        newest = jax.lax.cummin(slot, axis=1, reverse=True)
        newest_position = jnp.take_along_axis(positions, newest, axis=1)
        return jnp.where(valid, self.max_length - 1 - newest_position + positions, 0)
