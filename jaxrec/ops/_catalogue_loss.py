"""Softmax cross-entropy over a catalogue, block by block: forward, and two ways to the gradient.

With l_pv = <h_p, E_v> + b_v, s_p = sum_v exp(l_pv) and cotangents g_p, the gradient needs
d_pv = exp(l_pv) / s_p - (1 - eps) [v = y_p] - eps / V, and from it

    dH_p = g_p sum_v d_pv E_v        dE_v = sum_p g_p d_pv h_p        db_v = sum_p g_p d_pv.

*Two passes* (`log_sum_exp`, then `gradients`): both axes are cut into blocks, nothing larger than
one block of logits is held, and l is computed twice: four matrix products, two exponentials.

*One pass* (`value_and_gradients`): a block of positions sees the whole catalogue at once, so s_p
is known before its part of the gradient is formed, and l is computed once: three products, one
exponential. 1 / s_p scales rows of H and dH, never the block of logits. This needs the g_p
beforehand, which a weighted mean provides, and a catalogue whose block of logits is affordable.

Positions that are not valid take part in no sum. Where they are many, as the padding of packed rows
is, sorting the valid ones to the front (`sort`) lets both loops end with the last of them.

The eps / V term has a closed form, and so has the term of the label: neither costs a pass.

Inside `shard_map` the table may be one `Shard` of a larger one: statistics of disjoint sets of
items combine over the mesh axis, and everything else stays where the rows are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrec.ops import _catalogue
from jaxrec.ops._catalogue import Shard
from jaxrec.ops._manual_axes import vary_together
from jaxrec.ops._valid_first import ValidFirst

_F32 = jnp.float32


class Blocks(NamedTuple):
    """How many positions and items one block of logits has."""

    positions: int
    items: int


class Problem(NamedTuple):
    """Arrays of one call, cleaned: invalid positions have zero hidden rows and label 0."""

    hidden: jax.Array  # [P, D]
    table: jax.Array  # [V, D]
    bias: jax.Array | None  # float32[V]
    labels: jax.Array  # int32[P], rows of `table`; outside of it where another shard has the label
    valid: jax.Array  # bool[P]
    bad: jax.Array  # bool[P]: a valid position whose label is outside the catalogue
    real: jax.Array | None  # bool[V]: False for padding of the last shards; None: all are items
    shard: Shard | None
    end: jax.Array | None = None  # int32[]: from here on no position is valid; None: not known

    @property
    def items(self) -> int:
        return self.table.shape[0] if self.shard is None else self.shard.items

    def over_shards(self, part: jax.Array) -> jax.Array:
        """The sum over all shards of what each has of it."""
        return part if self.shard is None else lax.psum(part, self.shard.axis)


class Gradients(NamedTuple):
    """Float32 cotangents of hidden [P, D]; of table [V, D] in its dtype or float32; of bias [V]."""

    hidden: jax.Array
    table: jax.Array
    bias: jax.Array | None


class Statistics(NamedTuple):
    """Of each position, over some of the items.

    Statistics of disjoint sets of items combine (`combine`), whichever device or block they came
    from; the label belongs to one of the sets and contributes zero in the others.
    """

    largest: jax.Array  # max_v l_pv, or an upper bound
    total: jax.Array  # sum_v exp(l_pv - largest)
    target: jax.Array  # l_p,y_p


def clean(
    hidden: jax.Array,
    table: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    valid: jax.Array,
    *,
    shard: Shard | None = None,
) -> Problem:
    rows = table.shape[0]
    inside = (labels >= 0) & (labels < (rows if shard is None else shard.items))
    own = jnp.where(valid & inside, labels, jnp.zeros((), labels.dtype)).astype(jnp.int32)
    bias, real = None if bias is None else bias.astype(_F32), None
    if shard is not None:
        first = lax.axis_index(shard.axis) * rows
        own = own - first
        if (
            shard.items % lax.axis_size(shard.axis)
            or shard.items // lax.axis_size(shard.axis) != rows
        ):
            real = first + jnp.arange(rows, dtype=jnp.int32) < shard.items
            bias = jnp.where(real, _F32(0) if bias is None else bias, _F32(-jnp.inf))
            # Loops carry sums of it and of what varies with the positions.
            bias = vary_together(bias, hidden)[0]
    return Problem(
        hidden=jnp.where(valid[:, None], hidden, jnp.zeros((), hidden.dtype)),
        table=table,
        bias=bias,
        labels=own,
        valid=valid,
        bad=valid & ~inside,
        real=real,
        shard=shard,
    )


def sort(problem: Problem, order: ValidFirst) -> Problem:
    """The problem with its positions in this order; loops over them end where the valid ones do."""
    return problem._replace(
        hidden=order.sort(problem.hidden),
        labels=order.sort(problem.labels),
        valid=order.sort(problem.valid),
        bad=order.sort(problem.bad),
        end=order.end,
    )


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=_F32)


def _logits(hidden: jax.Array, table: jax.Array, bias: jax.Array | None) -> jax.Array:
    logits = _dot(hidden, table, (1, 1))
    return logits if bias is None else logits + bias[None, :]


def _finite_or_zero(largest: jax.Array) -> jax.Array:
    # A position whose logits are all -inf would otherwise give inf - inf.
    return jnp.where(largest == -jnp.inf, _F32(0), largest)


def _pick(logits: jax.Array, columns: jax.Array) -> jax.Array:
    """logits[p, columns[p]], and 0 where the column is outside."""
    inside = (columns >= 0) & (columns < logits.shape[1])
    safe = jnp.where(inside, columns, jnp.int32(0))
    return jnp.where(inside, jnp.take_along_axis(logits, safe[:, None], 1)[:, 0], _F32(0))


def block_statistics(
    logits: jax.Array, label_columns: jax.Array, fresh: jax.Array | None = None
) -> Statistics:
    """Statistics of one block of logits.

    Args:
      logits: float32[positions, items].
      label_columns: int32[positions], the label's column in this block; anything outside of it
        where the label is elsewhere.
      fresh: bool[items], which items count; `None`: all of them.
    """
    # Items that do not count may set `largest`: an upper bound is enough.
    largest = logits.max(1)
    shifted = logits - _finite_or_zero(largest)[:, None]
    if fresh is not None:
        # A row that is added is cheaper than a mask of the block.
        shifted = shifted + jnp.where(fresh, _F32(0), _F32(-jnp.inf))[None, :]
    target = _pick(logits, label_columns)
    if fresh is not None:
        counted = fresh[jnp.clip(label_columns, 0, fresh.shape[0] - 1)]
        target = jnp.where(counted, target, _F32(0))
    return Statistics(largest, jnp.exp(shifted).sum(1), target)


def combine(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the union of two disjoint sets of items."""
    largest = jnp.maximum(a.largest, b.largest)
    shift = _finite_or_zero(largest)
    total = a.total * jnp.exp(a.largest - shift) + b.total * jnp.exp(b.largest - shift)
    return Statistics(largest, total, a.target + b.target)


def statistics(problem: Problem, blocks: Blocks) -> Statistics:
    """First of the two passes: statistics of all positions over all items."""
    hidden, table, bias = problem.hidden, problem.table, problem.bias
    items = table.shape[0]

    def positions(rows: _catalogue.Rows, carry: Statistics) -> Statistics:
        h, labels = rows.take(hidden), rows.take(problem.labels)

        def one(columns: _catalogue.Rows, inner: Statistics) -> Statistics:
            logits = _logits(h, columns.take(table), None if bias is None else columns.take(bias))
            fresh = None if blocks.items >= items else columns.fresh
            return combine(inner, block_statistics(logits, labels - columns.start, fresh))

        zero = jnp.zeros_like(rows.take(carry.total))
        none = Statistics(zero - _F32(jnp.inf), zero, zero)
        found = _catalogue.over_rows(items, blocks.items, one, none)
        return Statistics(*map(rows.put, carry, found))

    empty = jnp.zeros_like(hidden[:, 0], dtype=_F32)
    # Positions that the loop does not reach have a finite log-sum-exp.
    start = Statistics(empty, jnp.ones_like(empty), empty)
    found = _catalogue.over_rows(
        hidden.shape[0], blocks.positions, positions, start, end=problem.end
    )
    return found if problem.shard is None else combine_shards(found, problem.shard.axis)


def combine_shards(a: Statistics, axis: str) -> Statistics:
    """Statistics over all shards, from each one's own."""
    largest = lax.pmax(a.largest, axis)
    total = a.total * jnp.exp(a.largest - _finite_or_zero(largest))
    return Statistics(largest, lax.psum(total, axis), lax.psum(a.target, axis))


def log_sum_exp(stats: Statistics) -> jax.Array:
    return _finite_or_zero(stats.largest) + jnp.log(stats.total)


def losses(problem: Problem, lse: jax.Array, target: jax.Array, smoothing: float) -> jax.Array:
    """float32[P]; 0 where invalid, NaN where the label is bad."""
    value = lse - _F32(1 - smoothing) * target
    if smoothing:
        mean = (problem.hidden.astype(_F32) * _mean_row(problem)[None, :]).sum(1)
        if problem.bias is not None:
            mean = mean + problem.over_shards(real_sum(problem, problem.bias)) / problem.items
        value = value - _F32(smoothing) * mean
    value = jnp.where(problem.bad, _F32(jnp.nan), value)
    return jnp.where(problem.valid, value, _F32(0))


def real_sum(problem: Problem, rows: jax.Array) -> jax.Array:
    """Sum over the items of this shard of something that there is one of for each."""
    if problem.real is not None:
        real = problem.real.reshape((-1,) + (1,) * (rows.ndim - 1))
        rows = jnp.where(real, rows, jnp.zeros((), rows.dtype))
    return rows.sum(0, dtype=_F32)


def _mean_row(problem: Problem) -> jax.Array:
    return problem.over_shards(real_sum(problem, problem.table)) / problem.items


def gradients(
    problem: Problem, lse: jax.Array, g: jax.Array, smoothing: float, blocks: Blocks
) -> Gradients:
    """Second of the two passes: recomputes the logits; `g` is zero where invalid."""
    hidden, table, bias, labels = problem.hidden, problem.table, problem.bias, problem.labels
    dtype = hidden.dtype
    lse = jnp.where(problem.bad, _F32(jnp.nan), lse)
    h32 = hidden.astype(_F32)
    spread = _F32(smoothing / problem.items)

    def items(columns: _catalogue.Rows, carry: Gradients) -> Gradients:
        e, e_fresh = columns.take(table), columns.take_fresh(table)
        b = None if bias is None else columns.take(bias)
        ids = columns.start + jnp.arange(columns.size, dtype=jnp.int32)

        def positions(rows: _catalogue.Rows, inner: Gradients) -> Gradients:
            probs = jnp.exp(_logits(rows.take(hidden), e, b) - rows.take(lse)[:, None])
            hit = rows.take(labels)[:, None] == ids[None, :]
            delta = jnp.where(hit, probs - _F32(1 - smoothing), probs)
            if smoothing:
                real = None if problem.real is None else columns.take(problem.real)[None, :]
                delta = delta - (spread if real is None else jnp.where(real, spread, _F32(0)))
            gain = rows.take_fresh(g)[:, None]
            d_bias = None if inner.bias is None else inner.bias + _dot(gain, delta, (0, 0))[0]
            delta = delta.astype(dtype)
            return Gradients(
                rows.add(inner.hidden, gain * _dot(delta, e_fresh, (1, 0))),
                inner.table + _dot((gain * rows.take(h32)).astype(dtype), delta, (0, 0)),
                d_bias,
            )

        zero = jnp.zeros_like(e.T, dtype=_F32)
        inner = Gradients(carry.hidden, zero, None if bias is None else zero[0])
        inner = _catalogue.over_rows(
            hidden.shape[0], blocks.positions, positions, inner, end=problem.end
        )
        # The repeated items of the last block get the values that they already have.
        d_bias = carry.bias
        if d_bias is not None and inner.bias is not None:
            d_bias = columns.put(d_bias, inner.bias)
        d_table = columns.put(carry.table, inner.table.T.astype(table.dtype))
        return Gradients(inner.hidden, d_table, d_bias)

    start = Gradients(
        jnp.zeros_like(h32), jnp.zeros_like(table), None if bias is None else jnp.zeros_like(bias)
    )
    return _catalogue.over_rows(table.shape[0], blocks.items, items, start)


class _Sums(NamedTuple):
    """What one pass over the blocks of positions fills in and adds up."""

    lse: jax.Array
    target: jax.Array
    hidden: jax.Array
    table: jax.Array  # transposed: [D, V]
    bias: jax.Array | None


def value_and_gradients(
    problem: Problem, g: jax.Array, smoothing: float, block: int
) -> tuple[jax.Array, jax.Array, Gradients]:
    """Log-sum-exp, the label's logit, and the gradients for `g` known beforehand, in one pass.

    `block` counts positions; every block sees the whole catalogue. `g` is zero where invalid.
    """
    hidden, table, bias, labels = problem.hidden, problem.table, problem.bias, problem.labels
    dtype = hidden.dtype
    h32 = hidden.astype(_F32)

    def positions(rows: _catalogue.Rows, carry: _Sums) -> _Sums:
        logits = _logits(rows.take(hidden), table, bias)
        target = problem.over_shards(_pick(logits, rows.take(labels)))
        largest = logits.max(1)
        if problem.shard is not None:
            largest = lax.pmax(largest, problem.shard.axis)
        largest = _finite_or_zero(largest)
        weights = jnp.exp(logits - largest[:, None])
        total = problem.over_shards(weights.sum(1))
        total = jnp.where(rows.take(problem.bad), _F32(jnp.nan), total)
        share = (rows.take(g) / total)[:, None]
        fresh = (rows.take_fresh(g) / total)[:, None]
        d_bias = None if carry.bias is None else carry.bias + _dot(fresh, weights, (0, 0))[0]
        weights = weights.astype(dtype)
        return _Sums(
            rows.put(carry.lse, largest + jnp.log(total)),
            rows.put(carry.target, target),
            rows.put(carry.hidden, share * _dot(weights, table, (1, 0))),
            # [D, V] rather than [V, D]: on CPU the block of weights is then never transposed.
            carry.table + _dot((fresh * rows.take(h32)).astype(dtype), weights, (0, 0)),
            d_bias,
        )

    empty = jnp.zeros_like(h32[:, 0])
    start = _Sums(
        empty,
        empty,
        jnp.zeros_like(h32),
        jnp.zeros_like(table.T, dtype=_F32),
        None if bias is None else jnp.zeros_like(bias),
    )
    end = _catalogue.over_rows(hidden.shape[0], block, positions, start, end=problem.end)

    hit, spread = _F32(1 - smoothing), jnp.full((1, 1), smoothing / problem.items, _F32)
    here = (labels >= 0) & (labels < table.shape[0])
    # What another shard has is dropped by the scatter, and zero in the gather.
    row = jnp.where(here, labels, table.shape[0])
    own = jnp.where(here[:, None], table[jnp.where(here, labels, 0)].astype(_F32), _F32(0))
    gh = g[:, None] * h32
    d_hidden = end.hidden - hit * g[:, None] * own
    d_table = end.table.T.at[row].add(-hit * gh, mode="drop")
    d_bias = None if end.bias is None else end.bias.at[row].add(-hit * g, mode="drop")
    if smoothing:
        if problem.real is not None:
            spread = jnp.where(problem.real[:, None], spread, _F32(0))
        mean = real_sum(problem, table) / problem.items
        d_hidden = d_hidden - _F32(smoothing) * g[:, None] * mean[None, :]
        d_table = d_table - spread * gh.sum(0)[None, :]
        d_bias = None if d_bias is None else d_bias - spread.reshape(-1) * g.sum()
    return end.lse, end.target, Gradients(d_hidden, d_table, d_bias)
