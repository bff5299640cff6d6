"""The mix for a short band of taps: one shifted copy of the input a lag, no matrix.

`out[j] = sum_t taps[t] x[j - t]` over the lags t whose two ends share a segment. Work and memory
are O(length * band).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A product with a masked matrix overtakes the shifts somewhere above eight taps.
MOST_LAGS = 8


def _meets(
    segment_ids: Int[Array, "batch length"] | None, length: int, lags: int
) -> Bool[Array, "#batch length lags"]:
    """Whether slot j and slot j - t stand in one segment of one row."""
    index = jnp.arange(length)
    inside = [(index >= t)[None] for t in range(lags)]
    if segment_ids is not None:
        inside = [
            # A roll wraps around; the index test drops what wraps.
            m & (segment_ids == jnp.roll(segment_ids, t, axis=1))
            for t, m in enumerate(inside)
        ]
    return jnp.stack(inside, axis=-1)


def _weights(
    taps: Float[Array, "groups lags"], meets: Bool[Array, "#batch length lags"]
) -> Float[Array, "#batch groups length lags"]:
    return jnp.where(meets[:, None], taps[None, :, None, :], jnp.zeros((), taps.dtype))


def _before(x: Array, lags: int) -> list[Array]:
    """`x[j - t]` for every lag, zero before the start."""
    length = x.shape[2]
    padded = jnp.pad(x, ((0, 0), (0, 0), (lags - 1, 0), (0, 0)))
    return [padded[:, :, lags - 1 - t : lags - 1 - t + length] for t in range(lags)]


def _after(x: Array, t: int) -> Array:
    """`x[j + t]`, zero behind the end."""
    return jnp.pad(x[:, :, t:], ((0, 0), (0, 0), (0, t), (0, 0)))


def forward(
    taps: Float[Array, "groups lags"],
    x: Float[Array, "batch groups length channels"],
    segment_ids: Int[Array, "batch length"] | None,
) -> Float[Array, "batch groups length channels"]:
    lags = taps.shape[1]
    weights = _weights(taps, _meets(segment_ids, x.shape[2], lags))
    return _total([s * weights[..., t, None] for t, s in enumerate(_before(x, lags))])


def backward(
    taps: Float[Array, "groups lags"],
    x: Float[Array, "batch groups length channels"],
    segment_ids: Int[Array, "batch length"] | None,
    d_out: Float[Array, "batch groups length channels"],
) -> tuple[Array, Array]:
    lags = taps.shape[1]
    meets = _meets(segment_ids, x.shape[2], lags)
    weights = _weights(taps, meets)
    d_x = _total([_after(d_out * weights[..., t, None], t) for t in range(lags)])
    products = jnp.stack([(s * d_out).sum(-1) for s in _before(x, lags)], axis=-1)
    d_taps = jnp.where(meets[:, None], products, jnp.zeros((), products.dtype)).sum((0, 2))
    return d_taps, d_x


def _total(parts: list[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
