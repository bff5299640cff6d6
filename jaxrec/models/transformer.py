"""The trunk of the softmax-attention models: blocks between an input and a last normalisation."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrec.models.attention import Positions, make_positions
from jaxrec.models.config import TransformerConfig
from jaxrec.models.layers import Keys, LayerNorm, unit_rows
from jaxrec.models.sequence_model import SequenceModel, end_aligned, zero_padding


class Transformer(SequenceModel):
    """h_0 = embed(s);  h_b = Block_b(h_{b-1});  f = LN(h_B), or h_B without a last norm.

    Args:
      config, num_items, max_length, rngs: as in `SequenceModel`.
      block: (config, positions=, rngs=) -> a block, called as block(x, keys, **masks).
      last_norm: whether the states are normalised at the end.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_items: int,
        max_length: int,
        rngs: nnx.Rngs,
        block: Callable[..., Any],
        last_norm: bool,
    ) -> None:
        super().__init__(config, num_items=num_items, max_length=max_length, rngs=rngs)
        schemes: list[Positions] = make_positions(config, max_length=max_length, rngs=rngs)
        self.blocks = nnx.List([block(config, positions=p, rngs=rngs) for p in schemes])
        self.norm = LayerNorm(config.width, epsilon=config.norm_epsilon) if last_norm else None

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
        keys = Keys(key)
        x = self.embed(items, valid, positions, keys)
        if self._has_full_kernel():
            # A full factor is indexed so that the newest event comes last.
            positions = (
                self.max_length - 1 - positions
                if self.config.position_order == "newest"
                else end_aligned(positions, valid, segment_ids, self.max_length)
            )
        for block in self.blocks:
            x = block(x, keys, valid=valid, segment_ids=segment_ids, positions=positions)
            x = zero_padding(x, valid)
        x = x if self.norm is None else self.norm(x)
        return unit_rows(x) if self.config.normalize else x

    def _has_full_kernel(self) -> bool:
        kernel = self.config.kernel
        return "kernel" in self.config.position and "full" in (kernel.logits, kernel.values)
