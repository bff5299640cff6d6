"""Self-attention of the softmax models, with a choice of how position enters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrec import ops
from jaxrec.models.cache import KeysAndValues, LayerCache, append, into_slots
from jaxrec.models.config import PositionalKernelConfig, Structure, TransformerConfig
from jaxrec.models.layers import Keys, Linear, initial

# T5's buckets: distances below 16 have one each, those from 128 on share the last.
_T5_BUCKETS, _T5_MAX_DISTANCE = 32, 128
# ALiBi's slope of the last head where the heads are a power of two.
_ALIBI_LAST = 2.0**-8


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

    def factors(self) -> tuple[Array | None, Array | None]:
        """The learned arrays; None for an identity, and for a tied value factor."""
        return (
            None if self.logits is None else self.logits[...],
            None if self.values is None else self.values[...],
        )

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        logit_kernel, value_kernel = self.factors()
        return ops.positional_kernel_attention(
            query,
            key,
            value,
            logit_kernel,
            value_kernel,
            structure=(self.config.logits, self.config.values),
            tie=self.config.tie,
            **options,
        )

    def mixed(self, key: Array, value: Array, **masks: Any) -> tuple[Array, Array]:
        """Keys and values as the queries meet them."""
        logit_kernel, value_kernel = self.factors()
        structures = self.config.logits, self.config.values
        if self.config.tie:
            value_kernel, structures = logit_kernel, (structures[0],) * 2
        return (
            ops.positional_mix(logit_kernel, key, structure=structures[0], upper=True, **masks),
            ops.positional_mix(
                value_kernel, value, structure=structures[1], upper=self.config.tie, **masks
            ),
        )

    def prefill(
        self, query: Array, key: Array, value: Array, *, valid: Array, capacity: int
    ) -> tuple[Array, ops.PositionalKernelState]:
        logit_kernel, value_kernel = self.factors()
        return ops.positional_kernel_prefill(
            query,
            key,
            value,
            logit_kernel,
            value_kernel,
            structure=(self.config.logits, self.config.values),
            tie=self.config.tie,
            valid=valid,
            capacity=capacity,
        )

    def extend(
        self, state: ops.PositionalKernelState, query: Array, key: Array, value: Array
    ) -> tuple[Array, ops.PositionalKernelState]:
        logit_kernel, value_kernel = self.factors()

        def step(
            state: ops.PositionalKernelState, event: tuple[Array, ...]
        ) -> tuple[ops.PositionalKernelState, Array]:
            out, state = ops.positional_kernel_step(
                state,
                *(event[0], event[1], event[2]),
                logit_kernel,
                value_kernel,
                structure=(self.config.logits, self.config.values),
                tie=self.config.tie,
            )
            return state, out

        events = tuple(jnp.swapaxes(x, 0, 1) for x in (query, key, value))
        state, out = jax.lax.scan(step, state, events)
        return jnp.swapaxes(out, 0, 1), state


class DistanceBias(nnx.Module):
    """What is added to the logits of two events that are so far apart: T5's, ALiBi's, or a table.

    T5 (Raffel et al. 2020): a learned table [buckets, heads] over logarithmic buckets of distance;
    all blocks share it. Unlike in T5 itself the products keep their 1/sqrt(head_dim).
    ALiBi (Press et al. 2022): -slope_h * distance, not learned. Relative: a learned entry a
    distance, shared by the heads, as HSTU's position table has it.
    """

    def __init__(self, config: TransformerConfig, *, length: int, rngs: nnx.Rngs) -> None:
        def table(*shape: int) -> nnx.Param:
            return initial(shape, scale=config.init_scale, rngs=rngs)

        self.config = config
        self.table = {
            "t5": lambda: table(_T5_BUCKETS, config.heads),
            "relative": lambda: table(length),
            "alibi": lambda: None,
        }[config.position]()

    def __call__(self, length: int) -> Float[Array, "..."]:
        """`float32[length]` or `[heads, length]`, by distance."""
        if self.table is None:
            slope = self.config.alibi_slope
            slopes = ops.alibi_slopes(self.config.heads)
            slopes = slopes if slope is None else slopes * (slope / _ALIBI_LAST)
            return ops.alibi_bias(slopes, length)
        if self.config.position == "t5":
            return ops.t5_bias(self.table[...], length, max_distance=_T5_MAX_DISTANCE)
        return self.table[...][:length]


class Positions(nnx.Module):
    """How position enters the attention of one block; at most one of the two is there."""

    def __init__(
        self, *, kernel: PositionalKernel | None = None, bias: DistanceBias | None = None
    ) -> None:
        self.kernel = kernel
        self.bias = bias


def make_positions(
    config: TransformerConfig, *, max_length: int, rngs: nnx.Rngs
) -> list[Positions]:
    """One for every block, sharing what the config says is shared."""

    def one() -> Positions:
        if "kernel" in config.position:
            kernel = PositionalKernel(config.kernel, heads=config.heads, length=max_length)
            return Positions(kernel=kernel)
        if config.position in ("t5", "relative", "alibi"):
            return Positions(bias=DistanceBias(config, length=max_length, rngs=rngs))
        return Positions()

    shared = config.kernel.shared if "kernel" in config.position else config.position == "t5"
    count = 1 if shared else config.blocks
    made = [one() for _ in range(count)]
    return [made[i % count] for i in range(config.blocks)]


class SelfAttention(nnx.Module):
    """Queries, keys, values and output of a block's attention; the base of the blocks.

    Args:
      config: of the model.
      positions: how position enters.
      output: whether a linear layer follows.
      rngs: initialises the parameters.
    """

    def __init__(
        self, config: TransformerConfig, *, positions: Positions, output: bool, rngs: nnx.Rngs
    ) -> None:
        def linear() -> Linear:
            return Linear(config.width, config.width, init_scale=config.init_scale, rngs=rngs)

        self.config = config
        self.query = linear()
        self.key = linear()
        self.value = linear()
        self.output = linear() if output else None
        self.kernel = positions.kernel
        self.bias = positions.bias

    def attend(
        self,
        query_input: Float[Array, "rows length width"],
        key_input: Float[Array, "rows length width"],
        keys: Keys,
        *,
        valid: Bool[Array, "rows length"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length"],
    ) -> Float[Array, "rows length width"]:
        """Attention of the events whose states are `query_input` over those of `key_input`."""
        config = self.config
        query, key, value = self.project(query_input, key_input)
        dropout_key = keys.next() if config.dropout else None
        options: dict[str, Any] = {
            "valid": valid,
            "segment_ids": segment_ids,
            "dropout_rate": config.dropout if dropout_key is not None else 0.0,
            "dropout_key": dropout_key,
        }
        length = query.shape[1]
        # Logits depend on differences alone, and a sequence lies in one piece.
        query, key = self.rotated(query, key)
        if self.kernel is not None:
            out = self.kernel(query, key, value, positions=positions, **options)
        elif self.bias is not None:
            out = ops.causal_attention(
                query, key, value, distance_bias=self.bias(length), **options
            )
        else:
            out = ops.causal_attention(query, key, value, **options)
        return self.finish(out)

    def attend_newest(
        self,
        query_input: Float[Array, "rows length width"],
        key_input: Float[Array, "rows length width"],
        last: Int[Array, " users"],
        *,
        valid: Bool[Array, "rows length"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length"],
    ) -> Float[Array, "users 1 width"]:
        """`attend` without dropout, from the flat slots `last`, each its sequence's newest."""
        query, key, value = self.project(query_input, key_input)
        length = key.shape[1]
        query, key = self.rotated(query, key)
        if self.kernel is not None:
            masks = {"valid": valid, "segment_ids": segment_ids, "positions": positions}
            key, value = self.kernel.mixed(key, value, **masks)
        row, slot = last // length, last % length
        # A sequence lies in one piece, so its events are those before the newest.
        mine = (segment_ids[row] == segment_ids[row, slot][:, None]) & valid[row]
        before = mine.sum(1) - 1
        # Its slots from the first on; what lies behind the newest is not read.
        first = (last - before)[:, None]
        places = jnp.minimum(first + jnp.arange(length, dtype=jnp.int32)[None], last[:, None])

        def of_users(x: Array, at: Array) -> Array:
            return x.reshape(-1, *x.shape[2:])[at]

        out = ops.cached_attention(
            of_users(query, last)[:, None],
            of_users(key, places),
            of_users(value, places),
            own_key=of_users(key, last)[:, None],
            own_value=of_users(value, last)[:, None],
            length=before,
            distance_bias=None if self.bias is None else self.bias(length),
        )
        return self.finish(out)

    def prefill(
        self,
        query_input: Float[Array, "rows length width"],
        key_input: Float[Array, "rows length width"],
        *,
        valid: Bool[Array, "rows length"],
        capacity: int,
    ) -> tuple[Float[Array, "rows length width"], LayerCache]:
        """`attend` without dropout for one sequence a row, oldest event first, and its cache."""
        query, key, value = self.project(query_input, key_input)
        if self.kernel is not None:
            out, state = self.kernel.prefill(query, key, value, valid=valid, capacity=capacity)
            return self.finish(out), state
        length = query.shape[1]
        query, key = self.rotated(query, key)
        bias = None if self.bias is None else self.bias(length)
        out = ops.causal_attention(query, key, value, valid=valid, distance_bias=bias)
        cache = KeysAndValues(into_slots(key, capacity), into_slots(value, capacity))
        return self.finish(out), cache

    def extend(
        self,
        query_input: Float[Array, "rows new width"],
        key_input: Float[Array, "rows new width"],
        cache: LayerCache,
        length: Int[Array, " rows"],
    ) -> tuple[Float[Array, "rows new width"], LayerCache]:
        """`attend` for events that follow the `length` ones of the cache, and the longer cache."""
        query, key, value = self.project(query_input, key_input)
        if self.kernel is not None:
            out, cache = self.kernel.extend(cache, query, key, value)
            return self.finish(out), cache
        query, key = self.rotated(query, key, behind=length)
        bias = None if self.bias is None else self.bias(cache.key.shape[1])
        out = ops.cached_attention(
            query,
            cache.key,
            cache.value,
            own_key=key,
            own_value=value,
            length=length,
            distance_bias=bias,
        )
        longer = KeysAndValues(append(cache.key, key, length), append(cache.value, value, length))
        return self.finish(out), longer

    def project(self, query_input: Array, key_input: Array) -> tuple[Array, Array, Array]:
        """[rows, length, heads, head_dim] of each."""
        config = self.config
        shape = (*query_input.shape[:2], config.heads, config.width // config.heads)
        return (
            self.query(query_input).reshape(shape),
            self.key(key_input).reshape(shape),
            self.value(key_input).reshape(shape),
        )

    def rotated(
        self, query: Array, key: Array, *, behind: Int[Array, " rows"] | int = 0
    ) -> tuple[Array, Array]:
        """Where positions are rotary, turned by their slots, the first of which is `behind`."""
        if self.config.position != "rope":
            return query, key
        new = jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
        slots = jnp.asarray(behind, jnp.int32).reshape(-1, 1) + new
        slots = jnp.broadcast_to(slots, query.shape[:2])

        def turned(x: Array) -> Array:
            return ops.rotary_embedding(x, slots, base=self.config.rope_base)

        return turned(query), turned(key)

    def finish(self, out: Array) -> Array:
        out = out.reshape(*out.shape[:2], self.config.width)
        return out if self.output is None else self.output(out)
