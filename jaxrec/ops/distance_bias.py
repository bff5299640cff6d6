"""Biases of attention logits by distance, for `causal_attention(..., distance_bias=...)`."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrec.ops._checks import check_float, check_rank


def t5_bucket(
    distance: Int[Array, "..."], buckets: int = 32, max_distance: int = 128
) -> Int[Array, "..."]:
    """Bucket of a distance into the past: one each for the near ones, then on a log scale.

    With `e = buckets // 2`: `D` for `D < e`, else
    `min(buckets - 1, e + floor(ln(D / e) / ln(max_distance / e) (buckets - e)))`.

    Args:
      distance: integers, how far the key lies before the query; a negative one counts as 0.
      buckets: how many there are.
      max_distance: from here on all distances share the last bucket.

    Returns:
      int32, the shape of `distance`. Exact at the edges, which are found in whole numbers.

    Raises:
      ValueError: distances that are not integers, fewer than two buckets, or a `max_distance`
        not above `buckets // 2`.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1, the
    unidirectional case.

    Example:
      >>> import jax.numpy as jnp
      >>> t5_bucket(jnp.array([0, 15, 18, 19, 112, 113, 5000])).tolist()
      [0, 15, 16, 17, 30, 31, 31]
    """
    distance = jnp.asarray(distance)
    if not jnp.issubdtype(distance.dtype, jnp.integer):
        raise ValueError(f"t5_bucket: distance must be integer, got {distance.dtype.name}")
    if distance.dtype.itemsize < 4:
        distance = distance.astype(jnp.int32)
    edges = jnp.asarray(_edges("t5_bucket", buckets, max_distance), distance.dtype)
    return jnp.searchsorted(edges, distance, side="right").astype(jnp.int32)


def _edges(op: str, buckets: int, max_distance: int) -> list[int]:
    """The least distance of each bucket but the first."""
    near = buckets // 2
    if buckets < 2 or max_distance <= near:
        raise ValueError(
            f"{op}: wants buckets >= 2 and max_distance > buckets // 2, "
            f"got buckets={buckets}, max_distance={max_distance}"
        )
    far = buckets - near
    edges = list(range(1, near + 1))
    for k in range(1, far):
        # The least D with ln(D / near) / ln(max / near) * far >= k, taken out of the logarithms.
        edge = math.floor(near * (max_distance / near) ** (k / far)) - 1
        while edge**far < max_distance**k * near ** (far - k):
            edge += 1
        edges.append(edge)
    return edges


def t5_bias(
    table: Float[Array, "buckets heads"], length: int, *, max_distance: int = 128
) -> Float[Array, "heads length"]:
    """Learned bias of each head and distance: `out[h, D] = table[t5_bucket(D), h]`.

    The original has no `1 / sqrt(head_dim)` in its logits; `causal_attention` keeps that scale
    unless told otherwise.

    Args:
      table: `[buckets, heads]`, learned, one for all layers in the source.
      length: of the sequence.
      max_distance: as in `t5_bucket`.

    Returns:
      `[heads, length]` in the table's dtype.

    Raises:
      ValueError: a table that is no float `[buckets, heads]`, or as `t5_bucket`.

    Source: as `t5_bucket`.

    Example:
      >>> import jax.numpy as jnp
      >>> table = jnp.arange(8.0)[:, None]
      >>> t5_bias(table, 10, max_distance=8)[0].astype(int).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
    """
    op, table = "t5_bias", jnp.asarray(table)
    check_rank(op, "table", table, 2, "buckets, heads")
    check_float(op, "table", table)
    edges = _edges(op, table.shape[0], max_distance)
    return table[np.searchsorted(edges, np.arange(length), side="right")].T


def alibi_slopes(heads: int) -> Float[Array, " heads"]:
    """Slopes of ALiBi: `2^(-8 h / heads)` for `h = 1 ... heads`, a power of two.

    For another number of heads: those of the largest power of two `p` below it, then every other
    one of `2 p`, the first, the third and so on. One head alone gets 1 / 256, which is hardly a
    bias; give `alibi_bias` a slope of your own there.

    Args:
      heads: how many, at least one.

    Returns:
      `float32[heads]`.

    Raises:
      ValueError: no heads.

    Source: Press, Smith and Lewis, "Train Short, Test Long", ICLR 2022, section 3, and the
    authors' code for numbers of heads that are no powers of two.

    Example:
      >>> alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"alibi_slopes: heads must be a positive Python integer, got {heads!r}")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2.0 ** (-4 * h / power) for h in range(1, 2 * (heads - power), 2)]
    return jnp.asarray(slopes, jnp.float32)


def alibi_bias(slopes: Float[Array, " heads"], length: int) -> Float[Array, "heads length"]:
    """Bias that grows with the distance: `out[h, D] = -slopes[h] D`.

    Args:
      slopes: `[heads]`, from `alibi_slopes` or chosen.
      length: of the sequence.

    Returns:
      `[heads, length]` in the slopes' dtype.

    Raises:
      ValueError: slopes that are no float `[heads]`.

    Source: as `alibi_slopes`.

    Example:
      >>> alibi_bias(alibi_slopes(2), 3).tolist()
      [[-0.0, -0.0625, -0.125], [-0.0, -0.00390625, -0.0078125]]
    """
    slopes = jnp.asarray(slopes)
    check_rank("alibi_bias", "slopes", slopes, 1, "heads")
    check_float("alibi_bias", "slopes", slopes)
    return -slopes[:, None] * jnp.arange(length, dtype=slopes.dtype)[None]
