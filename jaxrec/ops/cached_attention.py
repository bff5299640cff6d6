"""New events attending to a cache of keys and values: what `extend` and `score` are made of."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _cached_pairs as _pairs
from jaxrec.ops import _hstu_rows as _rows
from jaxrec.ops import _hstu_tile as _tile
from jaxrec.ops import _time_buckets
from jaxrec.ops._cached_pairs import Mode
from jaxrec.ops._checks import as_arrays, check_float, check_scale, check_times, statistics_dtype
from jaxrec.ops._dispatch import Implementation, choose
from jaxrec.ops._masking import masked_logits

_NO_KERNEL = "there is no Pallas kernel of this op yet"


def cached_attention(
    query: Float[Array, "batch new heads head_dim"],
    key: Float[Array, "batch slots heads head_dim"],
    value: Float[Array, "batch slots heads value_dim"],
    *,
    own_key: Float[Array, "batch new heads head_dim"],
    own_value: Float[Array, "batch new heads value_dim"],
    length: Int[Array, " batch"],
    mode: Mode = "causal",
    own_valid: Bool[Array, "batch new"] | None = None,
    distance_bias: Float[Array, "distances"] | Float[Array, "heads distances"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch new heads value_dim"]:
    """The last rows of `causal_attention`, given the keys and values of the rows before them.

    A new event attends to the `length` events of the cache and to itself, and, with
    `mode="causal"`, to the new events before it: what `causal_attention` gives at the end of the
    longer sequence. With `mode="independent"` new events are candidates for one next place: none
    sees another, and each gives what it would alone, in any order and any split into calls.

    Args:
      query: `[batch, new, heads, head_dim]`, float32 or bfloat16.
      key, value: the cache, `[batch, slots, heads, head_dim]` and
        `[batch, slots, heads, value_dim]`, oldest event in slot 0.
      own_key, own_value: of the new events; the caller appends them to the cache, or does not.
      length: `int[batch]`, how many slots are filled. The others are not read, whatever they hold.
      mode: `"causal"` or `"independent"`.
      own_valid: `bool[batch, new]`, `False` for a new event that is not there: it is read by
        nobody and gives zeros.
      distance_bias: as in `causal_attention`, `[distances]` or `[heads, distances]`: the next
        event after the cache lies `length - slot` behind a slot. It must reach `slots`; an event
        further than it reaches from another that it sees gives NaN.
      scale: factor of the products; `None` is `1 / sqrt(head_dim)`.
      implementation: `"xla"`, `"pallas"`, or `None` for the best that runs.

    Returns:
      `[batch, new, heads, value_dim]` in the dtype of `value`. The softmax runs in float32.

    Raises:
      ValueError: shapes or dtypes that do not belong together, an unknown mode, a bias shorter
        than the cache, a forced implementation that cannot run.

    Cost: one read of the cache; `2 new slots (head_dim + value_dim)` FLOPs a head and sequence,
    and `[heads, new, slots]` weights: for few new events.

    Source: as `causal_attention`; candidates beside one cached history: Zhai et al., arXiv
    2402.17152, section 3.4 (M-FALCON).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxrec.ops import causal_attention
      >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
      >>> cache, new = jnp.pad(x[:, :4], ((0, 0), (0, 3), (0, 0), (0, 0))), x[:, 4:]
      >>> out = cached_attention(
      ...     new, cache, cache, own_key=new, own_value=new, length=jnp.array([4])
      ... )
      >>> bool(jnp.allclose(out, causal_attention(x, x, x)[:, 4:], atol=1e-6))
      True
    """
    op = "cached_attention"
    x = _pairs.prepare(op, query, key, value, own_key, own_value, length, mode, own_valid)
    query, key, value, own_value = x.query, x.key, x.value, x.own_value
    heads, head_dim = query.shape[2:]
    scale = check_scale(op, scale, head_dim)
    bias = _check_bias(op, distance_bias, heads, key.shape[1])
    choose(op, implementation, _NO_KERNEL)
    if query.size == 0 or value.shape[3] == 0:
        return jnp.zeros(own_value.shape, own_value.dtype)
    seen = _pairs.seen(x)
    logits = _pairs.products(x) * scale
    if bias is not None:
        logits = logits + _pairs.bias_at(bias.astype(logits.dtype), x, seen)
    logits = masked_logits(logits, seen)
    # The softmax does not depend on what is taken off, and the gradient of a maximum looks for the
    # place where its recomputed argument equals it, which rounding may leave nowhere.
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    weights = weights / weights.sum(-1, keepdims=True)
    return _pairs.mix(x, weights).astype(value.dtype)


def _check_bias(op: str, bias: Array | None, heads: int, slots: int) -> Array | None:
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    check_float(op, "distance_bias", bias)
    rows = () if bias.ndim == 1 else (heads,)
    if bias.ndim not in (1, 2) or bias.shape[:-1] != rows or bias.shape[-1] < slots:
        raise ValueError(
            f"{op}: distance_bias must be [distances] or [heads, distances] with heads={heads} "
            f"and at least as many distances as the cache has slots, {slots}; "
            f"got shape {bias.shape}"
        )
    return bias[None] if bias.ndim == 1 else bias


def cached_hstu_attention(
    query: Float[Array, "batch new heads head_dim"],
    key: Float[Array, "batch slots heads head_dim"],
    value: Float[Array, "batch slots heads value_dim"],
    *,
    own_key: Float[Array, "batch new heads head_dim"],
    own_value: Float[Array, "batch new heads value_dim"],
    length: Int[Array, " batch"],
    normalizer: int,
    mode: Mode = "causal",
    own_valid: Bool[Array, "batch new"] | None = None,
    position_table: Float[Array, " positions"] | None = None,
    time_table: Float[Array, " buckets_and_one"] | None = None,
    timestamps: Int[Array, "batch slots"] | None = None,
    own_timestamps: Int[Array, "batch new"] | None = None,
    scale: float | None = 1.0,
    implementation: Implementation | None = None,
) -> Float[Array, "batch new heads value_dim"]:
    """The last rows of `hstu_attention`, given the keys and values of the rows before them.

    As `cached_attention`, with the weights of `hstu_attention`. With `mode="causal"` a new event
    asks at the time of the next new one, the last at its own. With `mode="independent"` each
    candidate asks at its own time and stands next after the cache; `hstu_attention` with
    `num_candidates` takes the first one's time for all, so the two agree where candidates share
    the time of the request.

    An event asks at the time of its successor, so the output of the newest event changes once the
    next is known, and with it what deeper layers would cache for it. A model that is to be exact
    with a time table keeps its newest event out of the cache and passes it again with the next.

    Args:
      query, key, value, own_key, own_value, length, mode, own_valid: as in `cached_attention`.
      normalizer, position_table, time_table, scale: as in `hstu_attention`, and the same as there.
        The position table must reach `slots` distances; an event further than it reaches from
        another that it sees gives NaN.
      timestamps: `int[batch, slots]`, seconds, of the cache; given if and only if `time_table` is.
      own_timestamps: `int[batch, new]`, of the new events; likewise.
      implementation: `"xla"`, `"pallas"`, or `None` for the best that runs.

    Returns:
      `[batch, new, heads, value_dim]` in the dtype of `value`.

    Raises:
      ValueError: as `cached_attention` and `hstu_attention`.

    Cost: as `cached_attention`.

    Source: as `hstu_attention` and `cached_attention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxrec.ops import hstu_attention
      >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
      >>> out = cached_hstu_attention(
      ...     x[:, 4:],
      ...     x[:, :4],
      ...     x[:, :4],
      ...     own_key=x[:, 4:],
      ...     own_value=x[:, 4:],
      ...     length=jnp.array([4]),
      ...     normalizer=6,
      ... )
      >>> bool(jnp.allclose(out, hstu_attention(x, x, x, normalizer=6)[:, 4:], atol=1e-6))
      True
    """
    op = "cached_hstu_attention"
    x = _pairs.prepare(op, query, key, value, own_key, own_value, length, mode, own_valid)
    query, key, value, own_value = x.query, x.key, x.value, x.own_value
    batch, slots = key.shape[:2]
    timestamps = check_times(op, "timestamps", timestamps, (batch, slots))
    own_timestamps = check_times(op, "own_timestamps", own_timestamps, query.shape[:2])
    _rows.check_normalizer(op, normalizer)
    position_table, time_table = as_arrays(position_table, time_table)
    _rows.check_tables(
        op,
        position_table,
        slots,
        time_table,
        {"timestamps": timestamps, "own_timestamps": own_timestamps},
    )
    scale = check_scale(op, scale, query.shape[3])
    choose(op, implementation, _NO_KERNEL)
    if query.size == 0 or value.shape[3] == 0:
        return jnp.zeros(own_value.shape, own_value.dtype)
    stat = statistics_dtype(query.dtype)
    seen = _pairs.seen(x)
    bias = None
    if position_table is not None:
        reach = (position_table.shape[0] + 1) // 2
        by_distance = _rows.by_distance(position_table.astype(stat), reach)
        assert by_distance is not None
        bias = _pairs.bias_at(by_distance, x, seen)[:, 0]
    if time_table is not None:
        assert timestamps is not None
        assert own_timestamps is not None
        in_time = _time_bias(x, time_table.astype(stat), timestamps, own_timestamps)
        in_time = jnp.where(seen, in_time, jnp.zeros((), stat))
        bias = in_time if bias is None else bias + in_time
    weights = _tile.weights(_tile.scores(_pairs.products(x), scale, bias), seen)
    return (_pairs.mix(x, weights) / normalizer).astype(value.dtype)


def _time_bias(
    x: _pairs.New, table: Array, timestamps: Array, own: Array
) -> Float[Array, "batch new keys"]:
    asked = _rows.next_times(own, x.valid, None) if x.causal else own
    cache = _time_buckets.distance(asked[:, :, None], timestamps[:, None, :])
    own = own[:, None, :] if x.causal else own[:, :, None]
    itself = _time_buckets.distance(asked[:, :, None], own)
    return _time_buckets.lookup(table, jnp.concatenate([cache, itself], axis=-1))
