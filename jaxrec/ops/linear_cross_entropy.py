"""Softmax cross-entropy over the whole item catalogue, without the matrix of logits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _catalogue, _dispatch, _manual_axes

_NO_KERNEL = "there is no Pallas kernel of this op yet"


class _Options(NamedTuple):
    smoothing: float
    positions: int
    items: int


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def linear_cross_entropy(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    labels: Int[Array, " positions"],
    *,
    bias: Float[Array, " items"] | None = None,
    valid: Bool[Array, " positions"] | None = None,
    label_smoothing: float = 0.0,
    implementation: _dispatch.Implementation | None = None,
) -> Float[Array, " positions"]:
    """Cross-entropy of each position against all items."""
    hidden, item_table, labels = map(jnp.asarray, (hidden, item_table, labels))
    op = "linear_cross_entropy"
    _catalogue.check_matrices(op, hidden, item_table)
    _dispatch.choose(op, implementation, _NO_KERNEL)
    if hidden.shape[0] == 0:
        return jnp.zeros((0,), jnp.float32)
    if valid is None:
        valid = jnp.ones(labels.shape, bool)
    options = _Options(float(label_smoothing), 512, 8192)
    hidden, item_table, bias, labels, valid = _manual_axes.vary_together(
        hidden, item_table, bias, labels, valid
    )
    return _losses(options, hidden, item_table, bias, labels, valid)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options, hidden, table, bias, labels, valid):
    return _forward(options, hidden, table, bias, labels, valid)[0]


def _clean(hidden, table, labels, valid):
    inside = (labels >= 0) & (labels < table.shape[0])
    safe = jnp.where(valid & inside, labels, 0).astype(jnp.int32)
    return jnp.where(valid[:, None], hidden, jnp.zeros((), hidden.dtype)), safe, inside


def _block_logits(h, table_rows, bias_rows):
    logits = _dot(h, table_rows, (1, 1))
    return logits if bias_rows is None else logits + bias_rows.astype(jnp.float32)[None, :]


def _log_sum_exp(options, hidden, table, bias):
    def positions(rows, lse):
        h = rows.take(hidden)

        def items(columns, carry):
            top, total = carry
            logits = _block_logits(
                h, columns.take(table), None if bias is None else columns.take(bias)
            )
            new = jnp.maximum(top, logits.max(1))
            shift = jnp.where(new == -jnp.inf, jnp.zeros_like(new), new)
            weights = jnp.where(columns.fresh[None], jnp.exp(logits - shift[:, None]), 0.0)
            return new, total * jnp.exp(top - shift) + weights.sum(1)

        zero = jnp.zeros_like(rows.take(lse))
        top, total = _catalogue.over_rows(
            table.shape[0], options.items, items, (zero - jnp.inf, zero)
        )
        return rows.put(lse, top + jnp.log(total))

    empty = jnp.zeros_like(hidden[:, 0], dtype=jnp.float32)
    return _catalogue.over_rows(hidden.shape[0], options.positions, positions, empty)


def _forward(options, hidden, table, bias, labels, valid):
    clean, safe, inside = _clean(hidden, table, labels, valid)
    lse = _log_sum_exp(options, clean, table, bias)
    lse = jnp.where(inside | ~valid, lse, jnp.nan)
    h32 = clean.astype(jnp.float32)
    logit = (h32 * table[safe].astype(jnp.float32)).sum(1)
    mean = h32 @ table.astype(jnp.float32).mean(0)
    if bias is not None:
        logit = logit + bias[safe].astype(jnp.float32)
        mean = mean + bias.astype(jnp.float32).mean()
    eps = options.smoothing
    losses = jnp.where(valid, lse - (1 - eps) * logit - eps * mean, 0.0)
    return losses, (hidden, table, bias, labels, valid, lse)


def _backward(options, residuals, g):
    hidden, table, bias, labels, valid, lse = residuals
    clean, safe, _ = _clean(hidden, table, labels, valid)
    g = jnp.where(valid, g, 0.0)
    h32 = clean.astype(jnp.float32)
    eps, count = options.smoothing, table.shape[0]

    def items(columns, carry):
        d_hidden, d_table, d_bias = carry
        e = columns.take(table)
        e_fresh = columns.take_fresh(table)
        b = None if bias is None else columns.take(bias)

        def positions(rows, inner):
            d_hidden, d_e, d_b = inner
            probs = jnp.exp(_block_logits(rows.take(clean), e, b) - rows.take(lse)[:, None])
            gain = rows.take_fresh(g)
            probs = probs * gain[:, None]
            d_hidden = rows.add(d_hidden, _dot(probs, e_fresh.astype(jnp.float32), (1, 0)))
            d_e = d_e + _dot(probs, rows.take(h32), (0, 0))
            d_b = d_b + probs.sum(0)
            return d_hidden, d_e, d_b

        d_e = jnp.zeros_like(e, dtype=jnp.float32)
        d_hidden, d_e, d_b = _catalogue.over_rows(
            hidden.shape[0], options.positions, positions, (d_hidden, d_e, d_e[:, 0])
        )
        return d_hidden, columns.put(d_table, d_e), columns.put(d_bias, d_b)

    zero_table = jnp.zeros_like(table, dtype=jnp.float32)
    d_hidden, d_table, d_bias = _catalogue.over_rows(
        count, options.items, items, (jnp.zeros_like(h32), zero_table, zero_table[:, 0])
    )
    t32 = table.astype(jnp.float32)
    d_hidden = d_hidden - g[:, None] * ((1 - eps) * t32[safe] + eps * t32.mean(0)[None])
    gh = g[:, None] * h32
    d_table = d_table.at[safe].add(-(1 - eps) * gh) - eps / count * gh.sum(0)[None]
    d_bias = d_bias.at[safe].add(-(1 - eps) * g) - eps / count * g.sum()
    d_hidden = jnp.where(valid[:, None], d_hidden, 0.0)
    return (
        d_hidden.astype(hidden.dtype),
        d_table.astype(table.dtype),
        None if bias is None else d_bias.astype(bias.dtype),
        None,
        None,
    )


_losses.defvjp(_forward, _backward)


def mean_linear_cross_entropy(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    labels: Int[Array, " positions"],
    *,
    bias: Float[Array, " items"] | None = None,
    valid: Bool[Array, " positions"] | None = None,
    weights: Float[Array, " positions"] | None = None,
    label_smoothing: float = 0.0,
    implementation: _dispatch.Implementation | None = None,
) -> Float[Array, ""]:
    """Weighted mean of `linear_cross_entropy` over the valid positions."""
    losses = linear_cross_entropy(
        hidden,
        item_table,
        labels,
        bias=bias,
        valid=valid,
        label_smoothing=label_smoothing,
        implementation=implementation,
    )
    w = jnp.ones(losses.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    if valid is not None:
        w = jnp.where(valid, w, 0.0)
    total = w.sum()
    return jnp.where(total == 0, 0.0, (w * losses).sum() / jnp.where(total == 0, 1.0, total))
