"""What the sequence models share: the item table, the input, and the scores."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrec import ops
from jaxrec.models.layers import Keys, activation_dtype, initial, maybe_dropout, unit_rows


class SequenceModel(nnx.Module):
    """Item vectors in, states out, scores by products with the item vectors.

    A subclass defines `hidden(items, *, valid, segment_ids, positions, key=None)`, and takes
    `timestamps` too if its config says that it reads them.

    Args:
      config: names and numbers; `width`, `init_scale`, `scale_embedding`, `untied`, `dropout`,
        `position`, `normalize` and `dtype` are read here.
      num_items: rows of the item table.
      max_length: longest sequence.
      rngs: initialises the parameters.

    Attributes:
      item_axis: inside `jax.shard_map`, the mesh axis that the rows of the item table are split
        over; None where it is whole.
      num_items: items of the whole catalogue.
    """

    # Parameters whose rows are items.
    by_item: ClassVar[tuple[str, ...]] = ("item_embedding", "output_embedding")

    def __init__(self, config: Any, *, num_items: int, max_length: int, rngs: nnx.Rngs) -> None:
        def table(rows: int) -> nnx.Param:
            return initial((rows, config.width), scale=config.init_scale, rngs=rngs)

        self.config = config
        self.max_length = max_length
        self.num_items = num_items
        self.item_axis: str | None = None
        self.item_embedding = table(num_items)
        self.position_embedding = table(max_length) if "additive" in config.position else None
        # Last, so that a model without it starts from the same numbers.
        self.output_embedding = table(num_items) if config.untied else None

    def __call__(self, *args: Any, **columns: Any) -> Float[Array, "rows length width"]:
        """`hidden`. Its `key` turns dropout on; `train()` and `eval()` change nothing."""
        return self.hidden(*args, **columns)

    def embed(
        self,
        items: Int[Array, "rows length"],
        valid: Bool[Array, "rows length"],
        positions: Int[Array, "rows length"],
        keys: Keys,
    ) -> Float[Array, "rows length width"]:
        """dropout(sqrt(width) E[item] + P[position]), zero on padding."""
        config = self.config
        x = ops.take_rows(self.item_embedding[...], items, axis=self.item_axis)
        if config.scale_embedding:
            x = x * jnp.sqrt(jnp.float32(config.width))
        if self.position_embedding is not None:
            x = x + self.position_embedding[...][positions]
        x = jnp.where(valid[..., None], x, 0.0).astype(activation_dtype(config.dtype))
        return maybe_dropout(x, config.dropout, keys)

    def newest(
        self, items: Int[Array, "rows length"], *, last: Int[Array, " users"], **columns: Array
    ) -> Float[Array, "users width"]:
        """The states of some slots alone, `hidden` elsewhere left out where the model can.

        Args:
          items, columns: as `hidden` takes them, without a key.
          last: flat slots [rows * length] of events that are the newest of their sequences.
        """
        hidden = self.hidden(items, **columns)
        return hidden.reshape(-1, hidden.shape[-1])[last]

    def score(
        self, states: Float[Array, "users width"], items: Int[Array, " items"] | None = None
    ) -> Float[Array, "users items"]:
        """Scores of `items` (all by default) for each state, in float32; for a whole table."""
        table = self.item_table()
        table = table if items is None else table[items]
        return jnp.matmul(states, table.T, preferred_element_type=jnp.float32)

    def item_table(self) -> Float[Array, "items width"]:
        """The vectors that states are scored against, in the activations' dtype."""
        output = self.output_embedding
        table = (self.item_embedding if output is None else output)[...]
        table = unit_rows(table) if self.config.normalize else table
        return table.astype(activation_dtype(self.config.dtype))


def zero_padding(x: Array, valid: Array) -> Array:
    """States with zeros on padding."""
    return jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))


def end_aligned(positions: Array, valid: Array, segment_ids: Array, size: int) -> Array:
    """Positions counted from the oldest event, moved so that every newest one is at size - 1."""
    # A sequence lies in one piece: its newest event is the next slot where the id changes.
    length = segment_ids.shape[1]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    slot = jnp.where(last, jnp.arange(length, dtype=jnp.int32)[None], length)
    newest = jax.lax.cummin(slot, axis=1, reverse=True)
    newest_position = jnp.take_along_axis(positions, newest, axis=1)
    return jnp.where(valid, size - 1 - newest_position + positions, 0)
