"""Objectives over the whole catalogue."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxrec import ops


def full_softmax(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    targets: Int[Array, " positions"],
    valid: Bool[Array, " positions"],
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    item_axis: str | None = None,
    num_items: int | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy of the next item over all items, at the valid positions.

    mean_p [ logsumexp_i z_pi - z_{p, target_p} ] with z_pi = <h_p, E_i> / temperature, by
    `ops.mean_linear_cross_entropy`: the logits are never held at once, and under differentiation
    both gradients come out of the forward sweep. `item_axis` and `num_items` are as there; training
    hands them in where the item table is split over devices.

    Source: Klenitskiy and Vasilev, "Turning dross into gold loss" (RecSys 2023), who showed that it
    lifts SASRec above BERT4Rec.
    """
    if temperature != 1:
        hidden = hidden * jnp.asarray(1 / temperature, hidden.dtype)
    return ops.mean_linear_cross_entropy(
        hidden,
        item_table,
        targets,
        valid=valid,
        label_smoothing=label_smoothing,
        item_axis=item_axis,
        num_items=num_items,
    )
