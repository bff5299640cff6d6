"""Rotary position embedding of queries and keys."""

import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.ops._checks import check_float, check_int_rows, check_rank, statistics_dtype


def rotary_embedding(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "batch length"],
    *,
    base: float = 10000.0,
    layout: Literal["half", "interleaved"] = "half",
) -> Float[Array, "batch length heads head_dim"]:
    """Turns pairs of channels by angles that grow with the position.

    Pair `r = 0 ... head_dim / 2 - 1` is turned by `a = positions base^(-2 r / head_dim)`:
    `(x, y)` becomes `(x cos a - y sin a, x sin a + y cos a)`. Used on queries and keys alike, it
    makes their products depend on differences of positions only. Values stay as they are.

    Args:
      x: `[batch, length, heads, head_dim]`, `head_dim` even, float32 or bfloat16.
      positions: `int[batch, length]`, such as from `segment_positions`.
      base: of the geometric series of angles.
      layout: which channels are a pair: `"half"` is `(r, r + head_dim / 2)`, `"interleaved"`
        `(2 r, 2 r + 1)`. The two are the same up to a fixed order of the channels.

    Returns:
      The shape and dtype of `x`. Angles and products are float32.

    Raises:
      ValueError: wrong ranks, shapes or dtypes, an odd `head_dim`, a base that is no positive
        number, an unknown layout.

    Cost: one pass over `x`; `batch length head_dim / 2` sines and cosines.

    Source: Su et al., "RoFormer", arXiv 2104.09864, equation 15; the half layout is that of
    later code.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 0.0, 0.0, 1.0])[None, None, None]
      >>> [round(c, 4) for c in rotary_embedding(x, jnp.array([[1]]))[0, 0, 0].tolist()]
      [0.5403, -0.01, 0.8415, 0.9999]
    """
    op, x = "rotary_embedding", jnp.asarray(x)
    check_rank(op, "x", x, 4, "batch, length, heads, head_dim")
    check_float(op, "x", x)
    found = check_int_rows(op, "positions", positions, x.shape[:2])
    assert found is not None
    width = x.shape[3]
    if width % 2:
        raise ValueError(f"{op}: head_dim must be even, got {width}")
    if not isinstance(base, (int, float)) or not (base > 0 and math.isfinite(base)):
        raise ValueError(f"{op}: base must be a positive Python number, got {base!r}")
    if layout not in ("half", "interleaved"):
        raise ValueError(f"{op}: layout must be 'half' or 'interleaved', got {layout!r}")
    stat = statistics_dtype(x.dtype)
    speeds = jnp.asarray([float(base) ** (-2 * r / width) for r in range(width // 2)], stat)
    angles = (found.astype(stat)[..., None] * speeds[None, None])[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = x.astype(stat)
    if layout == "half":
        a, b = wide[..., : width // 2], wide[..., width // 2 :]
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
    turned = (a * cos - b * sin, a * sin + b * cos)
    if layout == "half":
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)
