"""Ranks of known targets among all items, and the metrics of such ranks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _catalogue, _catalogue_top_k, _manual_axes
from jaxrec.ops._catalogue import Rows

_OP = "target_ranks"
_F32 = jnp.float32
# One block of scores holds at most ROWS rows, and about BLOCK_SCORES scores in all (16 MiB).
ROWS = 1024
BLOCK_SCORES = 1 << 22

NOT_RANKED = int(np.iinfo(np.int32).max)
"""The rank of a target that is no candidate."""


def target_ranks(
    hidden: Float[Array, "rows width"],
    item_table: Float[Array, "items width"],
    targets: Int[Array, " rows"],
    *,
    bias: Float[Array, " items"] | None = None,
    exclude: Int[Array, "rows excluded"] | None = None,
) -> Int[Array, " rows"]:
    """The place of each row's target in the list of all items, by counting; nothing is sorted.

    With ``score_bv = <hidden_b, item_table_v> + bias_v`` and target ``t_b``::

        rank_b = 1 + #{v: score_bv > score_b,t_b, or the same and v < t_b}

    over the items that row b does not exclude: the place at which `top_k_items` would list it.

    Args:
      hidden: [U, D], float32 or bfloat16.
      item_table: [V, D], in the dtype of `hidden`.
      targets: integers [U], ids from 0 to V - 1.
      bias: [V], float32 or bfloat16.
      exclude: integers [U, E], ids that do not count for a row; an id outside of 0..V-1 is padding.

    Returns:
      int32 [U], from 1. A target that is no candidate has the rank 2^31 - 1: one that is excluded,
      is outside of 0..V-1, or whose score is NaN or -inf.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Cost: 4 U V D FLOPs: the scores are computed twice, since a target's own must be rounded as
    those that it is compared with. Temporaries: a block of scores, 16 MiB. It has no gradient.

    Source: the rank of full-catalogue evaluation (Krichene and Rendle, "On Sampled Metrics for Item
    Recommendation", KDD 2020).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxrec import ops
      >>> hidden = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> table = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> ops.target_ranks(hidden, table, jnp.array([2, 0])).tolist()
      [2, 3]
      >>> ops.target_ranks(hidden, table, jnp.array([2, 0]), exclude=jnp.array([[0], [1]])).tolist()
      [1, 2]
    """
    hidden, item_table, targets = map(jnp.asarray, (hidden, item_table, targets))
    _catalogue.check_matrices(_OP, hidden, item_table)
    batch, items = hidden.shape[0], item_table.shape[0]
    _catalogue.check_integer(_OP, "targets", targets)
    _catalogue.check_shape(_OP, "targets", targets, (batch,))
    if bias is not None:
        bias = jnp.asarray(bias)
        _catalogue.check_float(_OP, "bias", bias)
        _catalogue.check_shape(_OP, "bias", bias, (items,))
        bias = bias.astype(_F32)
    if exclude is not None:
        exclude = jnp.asarray(exclude)
        _catalogue.check_integer(_OP, "exclude", exclude)
        if exclude.ndim != 2 or exclude.shape[0] != batch:
            raise ValueError(
                f"{_OP}: exclude must have shape ({batch}, ids per row), got {exclude.shape}"
            )
        exclude = _catalogue.ids_as_int32(exclude)
    if batch == 0:
        return jnp.zeros((0,), jnp.int32)
    operands = _manual_axes.vary_together(
        lax.stop_gradient(hidden),
        lax.stop_gradient(item_table),
        _catalogue.ids_as_int32(targets),
        None if bias is None else lax.stop_gradient(bias),
        exclude,
    )
    return _ranks(*operands)


def _ranks(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None,
    exclude: jax.Array | None,
) -> jax.Array:
    batch, items = hidden.shape[0], table.shape[0]
    row_block = _catalogue.balanced(batch, ROWS)
    item_block = _catalogue.balanced(items, max(1, BLOCK_SCORES // row_block))

    def some_rows(rows: Rows, result: jax.Array) -> jax.Array:
        h, target = rows.take(hidden), rows.take(targets)

        def scores(columns: Rows) -> jax.Array:
            dims = (((1,), (1,)), ((), ()))
            found = lax.dot_general(h, columns.take(table), dims, preferred_element_type=_F32)
            return found if bias is None else found + columns.take(bias)[None, :]

        def pick(columns: Rows, own: jax.Array) -> jax.Array:
            place = target - columns.start
            here = (place >= 0) & (place < columns.size)
            safe = jnp.where(here, place, 0)
            return jnp.where(
                here, jnp.take_along_axis(scores(columns), safe[:, None], 1)[:, 0], own
            )

        nothing = jnp.full_like(h[:, 0], -jnp.inf, dtype=_F32)
        own = _catalogue.over_rows(items, item_block, pick, nothing)[:, None]

        def count(columns: Rows, ahead: jax.Array) -> jax.Array:
            found = scores(columns)
            ids = columns.start + jnp.arange(columns.size, dtype=jnp.int32)
            before = (found > own) | ((found == own) & (ids[None, :] < target[:, None]))
            before &= columns.fresh[None, :]
            if exclude is not None:
                before &= ~_catalogue_top_k.members(rows.take(exclude), columns)
            return ahead + before.sum(1, dtype=jnp.int32)

        ahead = _catalogue.over_rows(items, item_block, count, jnp.zeros_like(target))
        # Also false where the score is NaN.
        ranked = own[:, 0] > -jnp.inf
        if exclude is not None:
            ranked &= ~(rows.take(exclude) == target[:, None]).any(1)
        return rows.put(result, jnp.where(ranked, ahead + 1, jnp.int32(NOT_RANKED)))

    return _catalogue.over_rows(batch, row_block, some_rows, jnp.zeros_like(targets))


def ranking_metrics(
    ranks: Int[Array, " rows"], ks: Sequence[int] | int, valid: Bool[Array, " rows"] | None = None
) -> dict[str, Float[Array, ""]]:
    """HR, NDCG and MRR of lists with one relevant item each, from its ranks.

    Means over the valid rows, 0 where there is none, of::

        hr@k = [rank <= k]     ndcg@k = [rank <= k] / log2(rank + 1)     mrr@k = [rank <= k] / rank

    Args:
      ranks: integers, any shape, from 1; what is below 1 is not ranked.
      ks: cut-offs, Python integers from 1; one or several.
      valid: bool, the shape of `ranks`, by default all True.

    Returns:
      `{"hr@k", "ndcg@k", "mrr@k"}` for every k, float32 scalars.

    Raises:
      ValueError: dtypes, shapes or cut-offs do not fit.

    Cost: one pass over the ranks a metric.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxrec import ops
      >>> found = ops.ranking_metrics(jnp.array([1, 3, 50]), (10,))
      >>> {name: round(float(value), 4) for name, value in found.items()}
      {'hr@10': 0.6667, 'ndcg@10': 0.5, 'mrr@10': 0.4444}
    """
    op, ranks = "ranking_metrics", jnp.asarray(ranks)
    _catalogue.check_integer(op, "ranks", ranks)
    valid = jnp.ones(ranks.shape, jnp.bool_) if valid is None else jnp.asarray(valid)
    _catalogue.check_bool(op, "valid", valid)
    _catalogue.check_shape(op, "valid", valid, ranks.shape)
    ks = tuple(_cut(op, k) for k in ((ks,) if hasattr(ks, "__index__") else ks))
    # Narrower ones could not be compared with every cut-off.
    ranks = _catalogue.ids_as_int32(ranks)
    rank = jnp.maximum(ranks, 1).astype(_F32)
    total = jnp.maximum(valid.sum(), 1).astype(_F32)
    result = {}
    for k in ks:
        hit = valid & (ranks >= 1) & (ranks <= k)
        for name, gain in (
            ("hr", jnp.ones_like(rank)),
            ("ndcg", 1 / jnp.log2(rank + 1)),
            ("mrr", 1 / rank),
        ):
            result[f"{name}@{k}"] = jnp.where(hit, gain, _F32(0)).sum() / total
    return result


def _cut(op: str, k: Any) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__") or int(k) < 1:
        raise ValueError(f"{op}: cut-offs must be positive Python integers, got {k!r}")
    return int(k)
