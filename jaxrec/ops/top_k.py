"""The best items of each row out of the whole catalogue, exact, block by block."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _catalogue, _dispatch

_NO_KERNEL = "there is no Pallas kernel of this op yet"


def top_k_items(
    hidden: Float[Array, "rows width"],
    item_table: Float[Array, "items width"],
    k: int,
    *,
    bias: Float[Array, " items"] | None = None,
    exclude: Int[Array, "rows excluded"] | None = None,
    allow: Bool[Array, " items"] | Int[Array, "rows allowed"] | None = None,
    deny: Bool[Array, " items"] | Int[Array, "rows denied"] | None = None,
    item_block: int | None = None,
    implementation: _dispatch.Implementation | None = None,
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The `k` best items of each row: scores (float32) and ids (int32), best first."""
    hidden, item_table = map(jnp.asarray, (hidden, item_table))
    _catalogue.check_matrices("top_k_items", hidden, item_table)
    _dispatch.choose("top_k_items", implementation, _NO_KERNEL)
    batch, items = hidden.shape[0], item_table.shape[0]
    column = jnp.zeros((items,), jnp.float32)
    if bias is not None:
        column = column + bias.astype(jnp.float32)
    drops = [] if exclude is None else [jnp.asarray(exclude)]
    allow_ids = None
    if allow is not None:
        if allow.dtype == jnp.bool_:
            column = jnp.where(allow, column, -jnp.inf)
        else:
            allow_ids = jnp.asarray(allow)
    if deny is not None:
        if deny.dtype == jnp.bool_:
            column = jnp.where(deny, -jnp.inf, column)
        else:
            drops.append(jnp.asarray(deny))
    row = jnp.arange(batch)[:, None]

    def block(columns, carry):
        scores = lax.dot_general(
            hidden,
            columns.take(item_table),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        scores = scores + jnp.where(columns.fresh, columns.take(column), -jnp.inf)[None]
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)

        def local(ids):
            ids = ids - columns.start
            return jnp.where((ids >= 0) & (ids < columns.size), ids, columns.size)

        if allow_ids is not None:
            allowed = jnp.zeros(scores.shape, bool).at[row, local(allow_ids)].set(True, mode="drop")
            scores = jnp.where(allowed, scores, -jnp.inf)
        for ids in drops:
            scores = scores.at[row, local(ids)].set(-jnp.inf, mode="drop")
        best, where = lax.top_k(scores, min(k, columns.size))
        best = jnp.concatenate([carry[0], best], 1)
        ids = jnp.concatenate([carry[1], where.astype(jnp.int32) + columns.start], 1)
        best, where = lax.top_k(best, k)
        return best, jnp.take_along_axis(ids, where, 1)

    empty = jnp.zeros_like(hidden[:, :1], dtype=jnp.float32) - jnp.inf
    scores = jnp.broadcast_to(empty, (batch, k))
    ids = jnp.full_like(scores, -1, dtype=jnp.int32)
    size = items if item_block is None else item_block
    scores, ids = _catalogue.over_rows(items, size, block, (scores, ids))
    return scores, jnp.where(scores == -jnp.inf, -1, ids)
