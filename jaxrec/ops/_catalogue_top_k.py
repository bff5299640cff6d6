"""Selection of the best items, from blocks of the catalogue or from short lists of each row."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxrec.ops import _catalogue
from jaxrec.ops._catalogue import Rows
from jaxrec.ops._dispatch import platform_switch

_F32 = jnp.float32
_LOWEST = -jnp.inf
# Columns of a list of ids that are looked at together.
_ID_COLUMNS = 128

Best = tuple[jax.Array, jax.Array]  # float32[rows, k], int32[rows, k]


def of_catalogue(
    k: int,
    row_block: int,
    item_block: int,
    hidden: jax.Array,
    table: jax.Array,
    column: jax.Array | None,
    drops: jax.Array | None,
    allowed: jax.Array | None,
) -> Best:
    """The best of all items; scores exist for one block of rows and items at a time."""
    items = table.shape[0]

    def some_rows(rows: Rows, result: Best) -> Best:
        h = rows.take(hidden)
        drop = None if drops is None else rows.take(drops)
        allow = None if allowed is None else rows.take(allowed)

        def some_items(columns: Rows, best: Best) -> Best:
            scores = _scores(h, table, columns)
            if column is not None:
                scores = scores + columns.take(column)[None, :]
            out = jnp.isnan(scores) | ~columns.fresh[None, :]
            if drop is not None:
                out |= members(drop, columns)
            if allow is not None:
                out |= ~members(allow, columns)
            return _merge(best, _candidates(scores, out), columns.start)

        best = _catalogue.over_rows(items, item_block, some_items, _nothing(h, k))
        return rows.put(result[0], best[0]), rows.put(result[1], best[1])

    return _catalogue.over_rows(hidden.shape[0], row_block, some_rows, _nothing(hidden, k))


def of_lists(
    k: int,
    row_block: int,
    item_block: int,
    hidden: jax.Array,
    table: jax.Array,
    column: jax.Array | None,
    drops: jax.Array | None,
    allowed: jax.Array,
) -> Best:
    """The best of each row's own list; only the listed items are scored."""
    items = table.shape[0]

    def some_rows(rows: Rows, result: Best) -> Best:
        listed = rows.take(allowed)
        # Ascending, so that of equal scores the smaller id comes first; padding last.
        ids = lax.sort(jnp.where((listed >= 0) & (listed < items), listed, items))
        out = ids == items
        out |= jnp.concatenate([jnp.zeros_like(out[:, :1]), ids[:, 1:] == ids[:, :-1]], 1)
        safe = jnp.where(out, 0, ids)
        scores = jnp.einsum(
            "bd,bad->ba", rows.take(hidden), table[safe], preferred_element_type=_F32
        )
        if column is not None:
            scores = scores + column[safe]
        if drops is not None and drops.shape[1]:
            out |= _in_sorted(lax.sort(rows.take(drops)), ids)
        out |= jnp.isnan(scores)
        none = _nothing(rows.take(hidden), k)
        best = none if ids.shape[1] == 0 else _merge(none, _candidates(scores, out), ids)
        return rows.put(result[0], best[0]), rows.put(result[1], best[1])

    return _catalogue.over_rows(hidden.shape[0], row_block, some_rows, _nothing(hidden, k))


def _scores(h: jax.Array, table: jax.Array, columns: Rows) -> jax.Array:
    """float32[rows, block]: products of the rows with one block of the table."""

    def by_rows(h: jax.Array, table: jax.Array, start: jax.Array) -> jax.Array:
        block = columns._replace(start=start).take(table)
        return lax.dot_general(h, block, (((1,), (1,)), ((), ())), preferred_element_type=_F32)

    def by_columns(h: jax.Array, table: jax.Array, start: jax.Array) -> jax.Array:
        # A narrow table lies in a TPU's memory with its items along the lanes. Cut there, it stays
        # so; without the barrier the compiler turns the whole of it, to twice the size.
        turned = lax.optimization_barrier(table.T)
        block = lax.dynamic_slice_in_dim(turned, start, columns.size, 1)
        return lax.dot_general(h, block, (((1,), (0,)), ((), ())), preferred_element_type=_F32)

    return platform_switch(by_rows, {"tpu": by_columns}, h, table, columns.start)


def _nothing(like: jax.Array, k: int) -> Best:
    """No candidate yet; made from `like` to vary over the mesh as it does."""
    shape = (like.shape[0], k)
    return (
        jnp.full_like(like, _LOWEST, shape=shape, dtype=_F32),
        jnp.full_like(like, -1, shape=shape, dtype=jnp.int32),
    )


def _candidates(scores: jax.Array, out: jax.Array) -> jax.Array:
    # The selection orders -0.0 below 0.0, which would break the rule for equal scores.
    return jnp.where(out, _F32(_LOWEST), jnp.where(scores == 0, _F32(0), scores))


def _merge(best: Best, scores: jax.Array, ids: jax.Array) -> Best:
    """The best of what was found before and of `scores`, whose ids are larger.

    `ids` are those of the columns [rows, columns], or the id of the first one.
    """
    k = best[0].shape[1]
    top, where = lax.top_k(scores, min(k, scores.shape[1]))
    where = where.astype(jnp.int32)
    found = where + ids if ids.ndim == 0 else jnp.take_along_axis(ids, where, 1)
    found = jnp.where(top == _LOWEST, -1, found)
    # Equal scores stay in order of position, so those found before stay ahead.
    both, where = lax.top_k(jnp.concatenate([best[0], top], 1), k)
    return both, jnp.take_along_axis(jnp.concatenate([best[1], found], 1), where, 1)


def members(ids: jax.Array, columns: Rows) -> jax.Array:
    """bool[rows, block]: which items of the block are in each row's list."""
    size = columns.size
    none = jnp.zeros_like(ids, shape=(ids.shape[0], size), dtype=jnp.bool_)
    width = min(_ID_COLUMNS, ids.shape[1])
    if width == 0:
        return none
    local = ids - columns.start
    # What is elsewhere goes one past the end, where a scatter drops it.
    local = jnp.where((local >= 0) & (local < size), local, size)
    used = jnp.where((local < size).any(0), jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32), 0)
    row = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]

    def more(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return state[0] < used.max()

    def mark(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begin, mask = state
        some = lax.dynamic_slice_in_dim(local, begin, width, 1)
        return begin + width, mask.at[row, some].set(True, mode="drop")

    begin = jnp.zeros_like(used[0])
    return lax.while_loop(more, mark, (begin, none))[1]


def _in_sorted(sorted_ids: jax.Array, queries: jax.Array) -> jax.Array:
    """bool like `queries` [rows, A]: which of them are in the row of `sorted_ids` [rows, E]."""
    place = jax.vmap(jnp.searchsorted)(sorted_ids, queries)
    place = jnp.minimum(place, sorted_ids.shape[1] - 1)
    return jnp.take_along_axis(sorted_ids, place, 1) == queries
