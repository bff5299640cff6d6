"""Objectives over the target and negatives drawn anew in every step.

All three draw from the catalogue with replacement and take the mean over valid positions. They
share these arguments:

- `key`: a random key; `own_items`: int32[positions, E], the items of each position's own sequence,
  -1 where padding; `item_counts`: float32[items], how often each item is a training event; where
  the item table is split over devices, `item_axis` and `num_items` as in `ops.bce_loss`. Training
  hands these in.
- `negatives`: how many.
- `sharing`: "position", every position draws its own; "batch", all positions use the same.
- `sampling`: "uniform", or "popularity": an item is drawn in proportion to its count to the power
  of `sampling_power`.
- `temperature`: scores are divided by it.
- `avoid`: "nothing", a negative may be any item; "target", one equal to the position's target is
  left out; "sequence", no negative is an item of the position's sequence. A position's own negative
  that is one is drawn again, up to three times, and left out if it still is; of shared ones those
  that are, are left out. The sequence is what the batch holds of the user's training events, the
  most recent `data.max_length` + 1: older ones may be drawn.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrec import ops

Sharing = Literal["position", "batch"]
Sampling = Literal["uniform", "popularity"]
Avoid = Literal["nothing", "target", "sequence"]

_REDRAWS = 3
# Positions whose negatives are compared with their lists at once.
_LOOKED_UP = 256


def sampled_softmax(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    targets: Int[Array, " positions"],
    valid: Bool[Array, " positions"],
    *,
    key: Array,
    own_items: Int[Array, "positions own"],
    item_counts: Float[Array, " items"] | None = None,
    negatives: int = 256,
    sharing: Sharing = "position",
    sampling: Sampling = "uniform",
    sampling_power: float = 1.0,
    temperature: float = 1.0,
    avoid: Avoid = "nothing",
    correction: bool = False,
    item_axis: str | None = None,
    num_items: int | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy of the next item among itself and its negatives.

    mean_p [ log( exp z_p0 + sum_k exp z_pk ) - z_p0 ], by `ops.sampled_softmax_loss`.

    With `correction`, log(negatives q(item)) is subtracted from a negative's score, q being the
    distribution that it was drawn from, so that their sum estimates the one over the catalogue.

    Source: Klenitskiy and Vasilev, "Turning dross into gold loss" (RecSys 2023); negatives of each
    position's own as in Tikhonovich et al., "eSASRec" (RecSys 2025).
    """
    source = _source(item_table, num_items, item_counts, sampling, sampling_power)
    ids, options = _draw(key, source, targets, own_items, negatives, sharing, avoid)
    if correction:
        options["log_q"] = math.log(negatives) + source.log_probability(ids)
    losses = ops.sampled_softmax_loss(
        hidden,
        item_table,
        targets,
        ids,
        valid=valid,
        temperature=temperature,
        item_axis=item_axis,
        num_items=num_items,
        **options,
    )
    return _mean(losses, valid)


def bce(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    targets: Int[Array, " positions"],
    valid: Bool[Array, " positions"],
    *,
    key: Array,
    own_items: Int[Array, "positions own"],
    item_counts: Float[Array, " items"] | None = None,
    negatives: int = 1,
    sharing: Sharing = "position",
    sampling: Sampling = "uniform",
    sampling_power: float = 1.0,
    temperature: float = 1.0,
    avoid: Avoid = "sequence",
    item_axis: str | None = None,
    num_items: int | None = None,
) -> Float[Array, ""]:
    """Mean binary cross-entropy of the next item against its negatives: SASRec's own objective.

    mean_p 1 / (k + 1) [ -log sigma(s_p0) - sum_k log(1 - sigma(s_pk)) ], by `ops.bce_loss`.

    SASRec draws its one negative from the items outside the user's training part; see `avoid` for
    how near this comes.

    Source: Kang and McAuley, "Self-attentive sequential recommendation" (ICDM 2018), section III-E.
    """
    source = _source(item_table, num_items, item_counts, sampling, sampling_power)
    ids, options = _draw(key, source, targets, own_items, negatives, sharing, avoid)
    losses = ops.bce_loss(
        hidden,
        item_table,
        targets,
        ids,
        valid=valid,
        temperature=temperature,
        item_axis=item_axis,
        num_items=num_items,
        **options,
    )
    return _mean(losses, valid)


def gbce(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    targets: Int[Array, " positions"],
    valid: Bool[Array, " positions"],
    *,
    key: Array,
    own_items: Int[Array, "positions own"],
    item_counts: Float[Array, " items"] | None = None,
    negatives: int = 256,
    sharing: Sharing = "position",
    sampling: Sampling = "uniform",
    sampling_power: float = 1.0,
    temperature: float = 1.0,
    avoid: Avoid = "nothing",
    t: float = 0.75,
    item_axis: str | None = None,
    num_items: int | None = None,
) -> Float[Array, ""]:
    """Mean generalised binary cross-entropy, which undoes the overconfidence of few negatives.

    mean_p 1 / (k + 1) [ -beta log sigma(s_p0) - sum_k log(1 - sigma(s_pk)) ], by `ops.gbce_loss`,
    with beta = 1 - t (1 - k / (items - 1)).

    Source: Petrov and Macdonald, "gSASRec" (RecSys 2023).
    """
    source = _source(item_table, num_items, item_counts, sampling, sampling_power)
    ids, options = _draw(key, source, targets, own_items, negatives, sharing, avoid)
    losses = ops.gbce_loss(
        hidden,
        item_table,
        targets,
        ids,
        t=t,
        valid=valid,
        temperature=temperature,
        item_axis=item_axis,
        num_items=num_items,
        **options,
    )
    return _mean(losses, valid)


class _Source(NamedTuple):
    """What negatives are drawn from."""

    items: int
    weights: Array | None  # float32[items]; None for equal ones

    def draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        return ops.sample_items(key, self.items, shape, weights=self.weights)

    def log_probability(self, ids: Array) -> Array:
        """float32 like `ids`; any number for an id that is none."""
        if self.weights is None:
            return jnp.full(ids.shape, -math.log(self.items), jnp.float32)
        return jnp.log(self.weights / self.weights.sum())[jnp.maximum(ids, 0)]


def _source(
    item_table: Array, num_items: int | None, counts: Array | None, sampling: str, power: float
) -> _Source:
    items = item_table.shape[0] if num_items is None else num_items
    if sampling == "uniform":
        return _Source(items, None)
    if sampling != "popularity":
        raise ValueError(f"sampling must be 'uniform' or 'popularity', got {sampling!r}")
    if counts is None:
        raise ValueError("sampling='popularity' needs item_counts")
    # An item that was never seen stays one that is never drawn, with power 0 too.
    counts = counts.astype(jnp.float32)
    return _Source(items, jnp.where(counts > 0, counts**power, jnp.float32(0)))


def _draw(
    key: Array,
    source: _Source,
    targets: Array,
    own_items: Array,
    negatives: int,
    sharing: str,
    avoid: str,
) -> tuple[Array, dict[str, Any]]:
    """Negatives, and the options that make an op leave out what it must."""
    if sharing == "batch":
        ids = source.draw(key, (negatives,))
        if avoid == "sequence":
            return ids, {"exclude": own_items}
        return ids, _masks(avoid)
    shape = (targets.shape[0], negatives)
    first, *others = jax.random.split(key, 1 + _REDRAWS)
    ids = source.draw(first, shape)
    if avoid != "sequence":
        return ids, _masks(avoid)
    for again in others:
        ids = jnp.where(_in_rows(own_items, ids), source.draw(again, shape), ids)
    return jnp.where(_in_rows(own_items, ids), -1, ids), {}


def _masks(avoid: str) -> dict[str, Any]:
    return {"mask_collisions": avoid == "target"}


def _in_rows(lists: Array, ids: Array) -> Array:
    """bool like `ids` [positions, k]: which of them are in their row of `lists` [positions, E]."""

    def one(row: tuple[Array, Array]) -> Array:
        return (row[1][:, None] == row[0][None, :]).any(-1)

    # In blocks: [positions, k, E] may be large, and not every compiler fuses it away.
    return jax.lax.map(one, (lists, ids), batch_size=_LOOKED_UP)


def _mean(losses: Array, valid: Array) -> Array:
    return losses.sum() / jnp.maximum(valid.sum(), 1).astype(losses.dtype)
