"""The trunk of the softmax-attention models: blocks between an input and a last normalisation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrec.models.attention import Positions, make_positions
from jaxrec.models.cache import Cache, LayerCache, check_capacity, nan_where_full
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
        masks = {"valid": valid, "segment_ids": segment_ids}
        x, places = self._begin(items, positions, keys, **masks)
        for block in self.blocks:
            x = zero_padding(block(x, keys, positions=places, **masks), valid)
        return self.finish(x)

    def newest(
        self, items: Int[Array, "rows length"], *, last: Int[Array, " users"], **columns: Array
    ) -> Float[Array, "users width"]:
        """As in `SequenceModel`: the last block attends from those slots alone."""
        keys = Keys(None)
        masks = {name: columns[name] for name in ("valid", "segment_ids")}
        x, places = self._begin(items, columns["positions"], keys, **masks)
        *before, final = self.blocks
        for block in before:
            x = zero_padding(block(x, keys, positions=places, **masks), masks["valid"])
        query_input, key_input = final.attention_inputs(x)
        attended = final.attend_newest(query_input, key_input, last, positions=places, **masks)

        def at(rows: Array) -> Array:
            return rows.reshape(-1, rows.shape[-1])[last][:, None]

        return self.finish(final.rest(at(x), at(query_input), attended, keys))[:, 0]

    def _begin(
        self, items: Array, positions: Array, keys: Keys, *, valid: Array, segment_ids: Array
    ) -> tuple[Array, Array]:
        """The input of the first block, and the positions that its kernel reads."""
        x = self.embed(items, valid, positions, keys)
        if self._has_full_kernel():
            # A full factor is indexed so that the newest event comes last.
            positions = (
                self.max_length - 1 - positions
                if self.config.position_order == "newest"
                else end_aligned(positions, valid, segment_ids, self.max_length)
            )
        return x, positions

    def prefill(
        self,
        items: Int[Array, "batch length"],
        length: Int[Array, " batch"],
        *,
        capacity: int | None = None,
    ) -> tuple[Float[Array, "batch width"], Cache]:
        """The state after the newest event of every user, and the cache that `extend` takes.

        Args:
          items: one user a row, oldest event first.
          length: how many of a row's items there are, at least 1.
          capacity: the most events that a history can grow to; None for the model's max_length.

        Raises:
          ValueError: a capacity out of range; positions that count from the newest event, which
            every new event would move.
        """
        self._check_extendable()
        capacity = check_capacity(items.shape[1], capacity, self.max_length)
        positions = jnp.broadcast_to(jnp.arange(items.shape[1], dtype=jnp.int32), items.shape)
        valid = positions < length[:, None]
        keys = Keys(None)
        x = self.embed(items, valid, positions, keys)
        layers = []
        for block in self.blocks:
            query_input, key_input = block.attention_inputs(x)
            attended, layer = block.prefill(query_input, key_input, valid=valid, capacity=capacity)
            x = zero_padding(block.rest(x, query_input, attended, keys), valid)
            layers.append(layer)
        newest = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)
        return self.finish(newest)[:, 0], Cache(tuple(layers), None, length, None)

    def extend(
        self, cache: Cache, items: Int[Array, "batch new"]
    ) -> tuple[Float[Array, "batch new width"], Cache]:
        """The states after new events, equal to those of `hidden` on the longer sequences.

        A user whose history outgrows the cache gets NaN from there on; `prefill` anew then.

        Args:
          cache: of the users' histories.
          items: as many new events for every user, oldest first.
        """
        new = items.shape[1]
        positions = cache.length[:, None] + jnp.arange(new, dtype=jnp.int32)[None, :]
        keys = Keys(None)
        x = self.embed(items, jnp.ones(items.shape, jnp.bool_), positions, keys)
        layers = []
        for block, before in zip(self.blocks, cache.layers, strict=True):
            query_input, key_input = block.attention_inputs(x)
            attended, layer = block.extend(query_input, key_input, before, cache.length)
            x = block.rest(x, query_input, attended, keys)
            layers.append(layer)
        length = cache.length + new
        states = nan_where_full(self.finish(x), length, _capacity(cache.layers[0]))
        return states, Cache(tuple(layers), None, length, None)

    def finish(self, x: Float[Array, "rows length width"]) -> Float[Array, "rows length width"]:
        x = x if self.norm is None else self.norm(x)
        return unit_rows(x) if self.config.normalize else x

    def _check_extendable(self) -> None:
        counted = "additive" in self.config.position and self.config.position_order == "newest"
        if counted or self._has_full_kernel():
            raise ValueError(
                "prefill: this model counts positions from the newest event, so a new one would "
                "move all others; train with position_order 'oldest' and without full kernels"
            )

    def _has_full_kernel(self) -> bool:
        kernel = self.config.kernel
        return "kernel" in self.config.position and "full" in (kernel.logits, kernel.values)


def _capacity(layer: LayerCache) -> int:
    capacity: int = layer.capacity
    return capacity
