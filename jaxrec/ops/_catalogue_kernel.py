"""The catalogue loss by Pallas kernels: what is around them.

The gradient of a position needs of the catalogue sum_v p_pv E_v alone, with p the softmax: the
forward kernel gives it with the statistics, so that the backward kernel is left with the table. The
label's part and that of label smoothing have closed forms here as in `_catalogue_loss`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrec.ops import _catalogue, _catalogue_loss, _manual_axes
from jaxrec.ops._catalogue_loss import Gradients, Problem
from jaxrec_kernels.linear_cross_entropy import tiling

_F32 = jnp.float32
# To gather rows the compiler turns a table that lies transposed, into rows of 128 lanes.
_TURNED_BYTES = 64 << 20


def unsupported(hidden: Any) -> str | None:
    """Why the kernels cannot take a call with these hidden states, or None if they can."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    reason = tiling.supports(hidden.shape[1], hidden.dtype, precision)
    return reason or _manual_axes.not_manual()


def slower(positions: int, items: int) -> str | None:
    """Why XLA's form takes less time than the kernels, or None if it does not."""
    return tiling.slower(positions, items)


def look_up(hidden: Any, table: Any, bias: Any) -> Any:
    """The blocks of the forward kernel."""
    (positions, width), items = hidden.shape, table.shape[0]
    return tiling.tuned_blocks(
        tiling.FORWARD, positions, items, width, hidden.dtype.itemsize, biased=bias is not None
    )


class Kept(NamedTuple):
    """What the gradient takes of the forward kernel besides the log-sum-exp, float32."""

    target: jax.Array  # [P], the label's logit
    expected: jax.Array  # [P, D], sum_v p_pv E_v over this shard


def losses(
    problem: Problem, smoothing: float, kept: bool
) -> tuple[jax.Array, jax.Array, Kept | None]:
    """Losses and log-sum-exp [P], and where wanted what the gradient takes besides."""
    # Pallas takes a while to import, and is needed where a kernel is traced.
    from jaxrec_kernels.linear_cross_entropy.tpu_forward import statistics

    found = statistics(problem.hidden, problem.table, problem.labels, problem.bias, weighted=kept)
    stats = _catalogue_loss.Statistics(found.largest, found.total, found.target)
    if problem.shard is not None:
        stats = _catalogue_loss.combine_shards(stats, problem.shard.axis)
    lse = _catalogue_loss.log_sum_exp(stats)
    value = _catalogue_loss.losses(problem, lse, stats.target, smoothing)
    if found.weighted is None:
        return value, lse, None
    expected = found.weighted * jnp.exp(found.largest - lse)[:, None]
    return value, lse, Kept(stats.target, expected)


def gradients(
    problem: Problem,
    lse: jax.Array,
    kept: Kept | None,
    g: jax.Array,
    smoothing: float,
    table_dtype: Any,
) -> Gradients:
    """Cotangents as `_catalogue_loss.gradients`; `g` is zero where invalid."""
    from jaxrec_kernels.linear_cross_entropy.tpu_backward import table_gradient

    assert kept is not None
    hidden, table, labels = problem.hidden, problem.table, problem.labels
    bad = problem.bad
    hit = 1 - smoothing
    found = table_gradient(
        hidden,
        table,
        labels,
        kept.target,
        jnp.where(bad, _F32(jnp.nan), lse),
        g,
        problem.bias,
        hit=hit,
        dtype=_F32 if smoothing else table_dtype,
    )
    own = _rows_of(labels, table).astype(_F32)
    d_row = jnp.where(bad[:, None], _F32(jnp.nan), kept.expected) - _F32(hit) * own
    d_table, d_bias = found.table, found.bias
    if smoothing:
        mean = _catalogue_loss.real_sum(problem, table) / problem.items
        d_row = d_row - _F32(smoothing) * mean[None, :]
        spread = jnp.full((table.shape[0],), smoothing / problem.items, _F32)
        if problem.real is not None:
            spread = jnp.where(problem.real, spread, _F32(0))
        gh = lax.dot_general(
            g, hidden.astype(_F32), (((0,), (0,)), ((), ())), lax.Precision.HIGHEST
        )
        d_table = (d_table - spread[:, None] * gh[None, :]).astype(table_dtype)
        d_bias = None if d_bias is None else d_bias - spread * g.sum()
    return Gradients(g[:, None] * d_row, d_table, d_bias)


def _rows_of(labels: jax.Array, table: jax.Array) -> jax.Array:
    """table[labels], zeros where a label is outside; of a large table, part by part."""
    items, width = table.shape
    row_bytes = -(-width // tiling.LANES) * tiling.LANES * table.dtype.itemsize

    def part(rows: _catalogue.Rows, found: jax.Array) -> jax.Array:
        places = labels - rows.start
        here = (places >= 0) & (places < rows.size)
        own = rows.take(table)[jnp.where(here, places, jnp.int32(0))]
        return jnp.where(here[:, None], own, found)

    empty = jnp.zeros((labels.shape[0], width), table.dtype)
    empty = _manual_axes.vary_together(empty, labels, table)[0]
    return _catalogue.over_rows(items, _TURNED_BYTES // row_bytes, part, empty)
