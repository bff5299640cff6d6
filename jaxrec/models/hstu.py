"""HSTU: hierarchical sequential transduction units, gated attention without softmax."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrec import ops
from jaxrec.models.cache import (
    Cache,
    KeysAndValues,
    Newest,
    append,
    check_capacity,
    into_slots,
    nan_where_full,
)
from jaxrec.models.config import HSTUConfig
from jaxrec.models.layers import Keys, LayerNorm, Linear, initial, maybe_dropout, unit_rows
from jaxrec.models.sequence_model import SequenceModel, zero_padding

# Meta's runs pad sequences to the longest history plus ten outputs plus one.
_EXTRA_LENGTH = 11


class RelativeBias(nnx.Module):
    """Learned tables over the distance of two events, in events and in time."""

    def __init__(self, config: HSTUConfig, *, max_length: int, rngs: nnx.Rngs) -> None:
        def table(length: int) -> nnx.Param:
            return initial((length,), scale=config.init_scale, rngs=rngs)

        self.position = table(2 * max_length - 1) if "position" in config.bias else None
        self.time = table(config.time_buckets + 1) if "time" in config.bias else None

    def tables(self) -> dict[str, Array | None]:
        """As `ops.hstu_attention` takes them."""
        return {
            "position_table": None if self.position is None else self.position[...],
            "time_table": None if self.time is None else self.time[...],
        }


class Unit(nnx.Module):
    """One HSTU layer.

    [U, V, Q, K] = split(SiLU(LN(x) W));  y = (SiLU(scale Q K^T + bias) / N * causal) V;
    x <- x + dropout(U * LN(y)) W_o + b_o
    """

    def __init__(self, config: HSTUConfig, *, max_length: int, rngs: nnx.Rngs) -> None:
        heads, width, epsilon = config.heads, config.width, config.norm_epsilon
        self.config = config
        self.query_width = config.query_width or width // heads
        self.value_width = config.value_width or width // heads
        self.normalizer = config.normalizer or max_length + _EXTRA_LENGTH
        values = heads * self.value_width
        self.input_norm = LayerNorm(width, epsilon=epsilon, affine=config.norm_affine)
        self.project = Linear(
            width,
            2 * values + 2 * heads * self.query_width,
            init_scale=config.init_scale,
            use_bias=config.projection_bias,
            rngs=rngs,
        )
        self.bias = RelativeBias(config, max_length=max_length, rngs=rngs)
        normed = self.value_width if config.group_norm else values
        self.output_norm = LayerNorm(normed, epsilon=epsilon, affine=config.norm_affine)
        inner = 3 * values if config.concat else values
        self.output = Linear(inner, width, init_scale=None, uniform=True, rngs=rngs)

    def __call__(self, x: Array, keys: Keys, **masks: Any) -> Array:
        gate, query, key, value = self.projections(x)
        out = ops.hstu_attention(query, key, value, **self.attention_options(), **masks)
        return self.rest(x, gate, out, keys)

    def projections(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """The gate [rows, length, heads * value_width]; queries, keys, values a head."""
        config = self.config
        values, queries = config.heads * self.value_width, config.heads * self.query_width
        mixed = self.project(self.input_norm(x))
        if config.silu == "uvqk":
            mixed = jax.nn.silu(mixed)
        gate, value, query, key = jnp.split(
            mixed, [values, 2 * values, 2 * values + queries], axis=-1
        )
        if config.silu == "u":
            gate = jax.nn.silu(gate)

        def heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], config.heads, -1)

        return gate, heads(query), heads(key), heads(value)

    def attention_options(self) -> dict[str, Any]:
        scale = 1.0 if self.config.scale == "one" else self.query_width**-0.5
        return {"normalizer": self.normalizer, "scale": scale, **self.bias.tables()}

    def rest(self, x: Array, gate: Array, out: Array, keys: Keys) -> Array:
        config = self.config
        normed = self.output_norm(out if config.group_norm else out.reshape(gate.shape))
        normed = normed.reshape(gate.shape)
        y = gate * normed
        if config.concat:
            y = jnp.concatenate([gate, out.reshape(gate.shape), y], axis=-1)
        return x + self.output(maybe_dropout(y, config.dropout, keys))


class HSTU(SequenceModel):
    """Layers of gated pointwise attention over a user's items and the times of their events.

    h_0 = dropout(sqrt(width) E[s] + P[position]);  h_b = Unit_b(h_{b-1});
    f = h_B / |h_B|;  score(t, i) = <f_t, E[i] / |E[i]|>.

    Source: Zhai et al., "Actions speak louder than words" (ICML 2024, arXiv 2402.17152). The
    defaults are its public research configuration: SiLU on all four projections, no scaling of the
    products, weights divided by the constant N = max_length + 11, a bias by distance and by time
    shared by the heads, normalisation without scale and bias, cosine scores (a loss divides them
    by its temperature, 0.05 there). Attention weights are not dropped, as in that code. Positions
    are counted from the oldest event.

    The serving variant (DLRM-v3 of the same repository): `silu="u", scale="rsqrt", bias="none",
    projection_bias=True, norm_affine=True, concat=True`, with `group_norm` where wanted.

    Args:
      config: names and numbers.
      num_items: rows of the item table.
      max_length: longest sequence.
      rngs: initialises the parameters.
    """

    Config = HSTUConfig

    def __init__(
        self, config: HSTUConfig, *, num_items: int, max_length: int, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, num_items=num_items, max_length=max_length, rngs=rngs)
        self.blocks = nnx.List(
            [Unit(config, max_length=max_length, rngs=rngs) for _ in range(config.blocks)]
        )

    def hidden(
        self,
        items: Int[Array, "rows length"],
        *,
        valid: Bool[Array, "rows length"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length"],
        timestamps: Int[Array, "rows length"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "rows length width"]:
        """The state after every event, from which its next item is scored.

        Args:
          items: item indices; anything in range where not valid.
          valid: False on padding.
          segment_ids: equal within a sequence, different between the sequences of a row.
          positions: counted from the oldest event.
          timestamps: seconds since any origin of the sequence's own; needed with a bias by time.
          key: turns dropout on.

        Returns:
          States in the activations' dtype, of length 1 if `normalize`; rows of padding are finite
          and meaningless.
        """
        keys = Keys(key)
        x = self.embed(items, valid, positions, keys)
        masks = {"valid": valid, "segment_ids": segment_ids, **self._times(timestamps)}
        for block in self.blocks:
            x = zero_padding(block(x, keys, **masks), valid)
        return self.finish(x)

    def prefill(
        self,
        items: Int[Array, "batch length"],
        length: Int[Array, " batch"],
        *,
        timestamps: Int[Array, "batch length"] | None = None,
        capacity: int | None = None,
    ) -> tuple[Float[Array, "batch width"], Cache]:
        """The state after the newest event of every user, and the cache that `extend` takes.

        With a bias by time the newest event is kept beside the layers: it asks at the time of its
        successor, so what it becomes is known when that one comes.

        Args:
          items: one user a row, oldest event first.
          length: how many of a row's items there are, at least 1.
          timestamps: seconds since one origin for all of a user's events, now and later.
          capacity: the most events that a history can grow to; None for the model's max_length.

        Raises:
          ValueError: a capacity out of range; times that are missing.
        """
        capacity = check_capacity(items.shape[1], capacity, self.max_length)
        positions = jnp.broadcast_to(jnp.arange(items.shape[1], dtype=jnp.int32), items.shape)
        valid = positions < length[:, None]
        keys = Keys(None)
        masks: dict[str, Any] = {"valid": valid, **self._times(timestamps)}
        x = self.embed(items, valid, positions, keys)
        layers = []
        for block in self.blocks:
            gate, query, key, value = block.projections(x)
            out = ops.hstu_attention(query, key, value, **block.attention_options(), **masks)
            x = zero_padding(block.rest(x, gate, out, keys), valid)
            layers.append(KeysAndValues(into_slots(key, capacity), into_slots(value, capacity)))
        last = (length - 1)[:, None]
        states = self.finish(jnp.take_along_axis(x, last[..., None], axis=1))[:, 0]
        if timestamps is None or not self.config.reads_timestamps:
            return states, Cache(tuple(layers), None, length, None)
        newest = Newest(
            jnp.take_along_axis(items, last, axis=1)[:, 0],
            jnp.take_along_axis(timestamps, last, axis=1)[:, 0],
        )
        times = into_slots(timestamps, capacity)
        return states, Cache(tuple(layers), times, length - 1, newest)

    def extend(
        self,
        cache: Cache,
        items: Int[Array, "batch new"],
        *,
        timestamps: Int[Array, "batch new"] | None = None,
    ) -> tuple[Float[Array, "batch new width"], Cache]:
        """The states after new events, equal to those of `hidden` on the longer sequences.

        A user whose history outgrows the cache gets NaN from there on; `prefill` anew then.

        Args:
          cache: of the users' histories.
          items: as many new events for every user, oldest first.
          timestamps: of the new events, from the same origin as before.

        Raises:
          ValueError: times that are missing.
        """
        self._times(timestamps)
        waiting = cache.newest is not None
        if cache.newest is not None and timestamps is not None:
            items = jnp.concatenate([cache.newest.item[:, None], items], axis=1)
            before = cache.newest.timestamp.astype(timestamps.dtype)
            timestamps = jnp.concatenate([before[:, None], timestamps], axis=1)
        new = items.shape[1]
        positions = cache.length[:, None] + jnp.arange(new, dtype=jnp.int32)[None, :]
        keys = Keys(None)
        x = self.embed(items, jnp.ones(items.shape, jnp.bool_), positions, keys)
        times: dict[str, Any] = {}
        if cache.times is not None:
            times = {"timestamps": cache.times, "own_timestamps": timestamps}
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            gate, query, key, value = block.projections(x)
            out = ops.cached_hstu_attention(
                query,
                layer.key,
                layer.value,
                own_key=key,
                own_value=value,
                length=cache.length,
                **block.attention_options(),
                **times,
            )
            x = block.rest(x, gate, out, keys)
            layers.append(
                KeysAndValues(
                    append(layer.key, key, cache.length), append(layer.value, value, cache.length)
                )
            )
        length = cache.length + new
        states = nan_where_full(self.finish(x), length, cache.layers[0].capacity)
        if not waiting or timestamps is None:
            return states, Cache(tuple(layers), None, length, None)
        assert cache.times is not None
        known = append(cache.times, timestamps, cache.length)
        newest = Newest(items[:, -1], timestamps[:, -1])
        # What was appended for the newest event is not counted, and written over by the next.
        return states[:, 1:], Cache(tuple(layers), known, length - 1, newest)

    def finish(self, x: Float[Array, "rows length width"]) -> Float[Array, "rows length width"]:
        return unit_rows(x) if self.config.normalize else x

    def _times(self, timestamps: Array | None) -> dict[str, Array]:
        """The times, if the model reads them."""
        if not self.config.reads_timestamps:
            return {}
        if timestamps is None:
            raise ValueError("HSTU with a bias by time needs timestamps")
        return {"timestamps": timestamps}
