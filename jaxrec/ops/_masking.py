"""Which key each query may attend to, and what stands in the slots nobody may read."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

# Finite, so that a row without any visible key gives numbers (which are then zeroed) and not NaN,
# and exp(MASKED - anything a real logit can be) is exactly 0.
MASKED = -1e30


def clean(
    x: Shaped[Array, "batch length heads width"], valid: Bool[Array, "batch length"] | None
) -> Shaped[Array, "batch length heads width"]:
    """Zeros in invalid slots. A product with a mask would let NaN through."""
    if valid is None:
        return x
    return jnp.where(valid[:, :, None, None], x, jnp.zeros((), x.dtype))


def visible(
    rows: Int[Array, " rows"],
    cols: Int[Array, " cols"],
    valid_cols: Bool[Array, "batch cols"] | None,
    segment_rows: Int[Array, "batch rows"] | None,
    segment_cols: Int[Array, "batch cols"] | None,
) -> Bool[Array, "#batch rows cols"]:
    """True where the key at `cols` is no later than the query at `rows`, valid, and of its segment.

    Rows are not asked whether they are valid themselves: zeroing a row of the result costs one pass
    over [rows, width] and not one over [rows, cols].
    """
    mask = (cols[None, :] <= rows[:, None])[None]
    if valid_cols is not None:
        mask = mask & valid_cols[:, None, :]
    return mask & same_segment(segment_rows, segment_cols)


def same_segment(
    segment_rows: Int[Array, "batch rows"] | None, segment_cols: Int[Array, "batch cols"] | None
) -> Bool[Array, "#batch #rows #cols"]:
    if segment_rows is None or segment_cols is None:
        return jnp.ones((1, 1, 1), jnp.bool_)
    return segment_rows[:, :, None] == segment_cols[:, None, :]


def masked_logits(
    logits: Float[Array, "batch heads rows cols"], mask: Bool[Array, "#batch rows cols"]
) -> Float[Array, "batch heads rows cols"]:
    return jnp.where(mask[:, None], logits, jnp.asarray(MASKED, logits.dtype))
