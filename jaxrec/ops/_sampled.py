"""Losses over a label and some sampled items, a block of positions at a time.

With logits z_p0 of the label and z_p1 .. z_pK of the negatives, a loss needs its value and its
slopes d loss / d z; everything else is the same for all of them. The logits of a block are computed
one of three ways:

- *shared*: all positions have the same negatives; their rows are gathered once, the rest is matrix
  products.
- *gathered*: every position has its own; the block's rows [block, K, D] are gathered.
- *dense*: as gathered, but the catalogue is small beside K: a matrix product scores all items of
  it, and the K logits are picked out.

The backward pass computes the logits again. No array of [positions, K, D] ever exists.

Inside `shard_map` the table may be one `Shard` of a larger one. Every shard sees all ids and adds
what its own rows give: rows of others count as zero, and the logits are summed over the axis.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrec.ops import _catalogue
from jaxrec.ops._catalogue import Rows, Shard

_F32 = jnp.float32
Way = Literal["shared", "gathered", "dense"]


class Objective(NamedTuple):
    """Which loss, and the numbers in it."""

    kind: Literal["softmax", "bce"]
    scale: float  # what products are multiplied by: 1 / temperature
    power: float  # of the label's probability, "bce" only
    mask_label: bool  # negatives equal to the label are left out


class Problem(NamedTuple):
    """Arrays of one call, cleaned: invalid positions have zero hidden rows and label 0."""

    hidden: jax.Array  # [P, D]
    table: jax.Array  # [V, D], or this shard's rows of it
    labels: jax.Array  # int32[P], all in 0..V-1
    negatives: jax.Array  # int32[P, K] or [K]; ids outside of 0..V-1 are left out
    log_q: jax.Array | None  # float32, the shape of negatives
    log_q_labels: jax.Array | None  # float32[P]
    exclude: jax.Array | None  # int32[P, E]
    valid: jax.Array  # bool[P]
    bad: jax.Array  # bool[P]: a valid position whose label is outside the catalogue
    shard: Shard | None

    @property
    def items(self) -> int:
        return self.table.shape[0] if self.shard is None else self.shard.items

    def rows_of(self, ids: jax.Array) -> jax.Array:
        """Where the items are in `table`; past its end for those that other shards have."""
        if self.shard is None:
            return ids
        rows = self.table.shape[0]
        local = ids - self.shard.first(rows)
        return jnp.where((local >= 0) & (local < rows), local, rows)

    def read(self, rows: jax.Array) -> jax.Array:
        """The rows of `table`; zeros past its end."""
        if self.shard is None:
            return self.table[rows]
        return self.table.at[rows].get(mode="fill", fill_value=0)

    def over_shards(self, part: jax.Array) -> jax.Array:
        """The sum over all shards of what each has of it."""
        return part if self.shard is None else lax.psum(part, self.shard.axis)


class Gradients(NamedTuple):
    """Float32 cotangents of hidden [P, D] and table [V, D]."""

    hidden: jax.Array
    table: jax.Array


class _Block(NamedTuple):
    """One block of positions and its logits, -inf where a negative is left out."""

    hidden: jax.Array  # [b, D]
    at: jax.Array  # int32[b, K], or [K] where shared: rows of the table, or past its end
    rows: jax.Array  # what the logits were computed from: [K, D], [b, K, D] or [V, D]
    label: jax.Array  # float32[b]
    negatives: jax.Array  # float32[b, K]


def clean(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    negatives: jax.Array,
    log_q: jax.Array | None,
    log_q_labels: jax.Array | None,
    exclude: jax.Array | None,
    valid: jax.Array,
    *,
    shard: Shard | None = None,
) -> Problem:
    items = table.shape[0] if shard is None else shard.items
    inside = (labels >= 0) & (labels < items)
    return Problem(
        hidden=jnp.where(valid[:, None], hidden, jnp.zeros((), hidden.dtype)),
        table=table,
        labels=jnp.where(valid & inside, labels, jnp.zeros((), labels.dtype)).astype(jnp.int32),
        negatives=negatives,
        log_q=log_q,
        log_q_labels=log_q_labels,
        exclude=exclude,
        valid=valid,
        bad=valid & ~inside,
        shard=shard,
    )


def block_size(problem: Problem, way: Way, elements: int) -> int:
    """Positions whose largest temporary has about `elements` elements."""
    (items, width), count = problem.table.shape, problem.negatives.shape[-1]
    listed = 1 if problem.exclude is None else problem.exclude.shape[1]
    each = {
        "shared": count * max(1, listed),
        "gathered": count * max(width, listed),
        "dense": max(items, count * listed),
    }[way]
    return _catalogue.balanced(problem.hidden.shape[0], max(1, elements // each))


def losses(problem: Problem, objective: Objective, way: Way, block: int) -> jax.Array:
    """float32[P]; 0 where invalid, NaN where the label is bad."""
    shared = _shared_rows(problem, way)
    everywhere = None if shared is None else problem.over_shards(shared)

    def some(rows: Rows, carry: jax.Array) -> jax.Array:
        logits = _logits(problem, objective, way, rows, everywhere)
        return rows.put(carry, _value(objective, logits))

    empty = jnp.zeros_like(problem.hidden[:, 0], dtype=_F32)
    value = _catalogue.over_rows(problem.hidden.shape[0], block, some, empty)
    return jnp.where(problem.valid, value, _F32(0))


def gradients(
    problem: Problem, objective: Objective, way: Way, block: int, g: jax.Array
) -> Gradients:
    """Of sum_p g_p loss_p; `g` is zero where invalid."""
    hidden, table = problem.hidden, problem.table
    shared = _shared_rows(problem, way)
    everywhere = None if shared is None else problem.over_shards(shared)
    scale = _F32(objective.scale)

    def some(rows: Rows, carry: tuple[Gradients, jax.Array]) -> tuple[Gradients, jax.Array]:
        (d_hidden, d_rows), d_label = carry
        logits = _logits(problem, objective, way, rows, everywhere)
        if shared is not None:
            # Every shard adds to the gradient of the states what its own rows give.
            logits = logits._replace(rows=shared)
        on_label, on_negatives = _slopes(objective, logits)
        # A logit that is no number at an invalid position must not meet its zero.
        ok, gain = rows.take(problem.valid), rows.take_fresh(g) * scale
        on_label = jnp.where(ok, gain * on_label, _F32(0))
        on_negatives = jnp.where(ok[:, None], gain[:, None] * on_negatives, _F32(0))
        d_some, d_rows = _pull(way, logits, on_negatives, d_rows)
        return Gradients(rows.add(d_hidden, d_some), d_rows), rows.add(d_label, on_label)

    # Transposed but for gathered rows: on CPU the block of slopes is then never transposed.
    d_rows = jnp.zeros_like(
        table if way == "gathered" else (table if shared is None else shared).T, dtype=_F32
    )
    start = Gradients(jnp.zeros_like(hidden, dtype=_F32), d_rows)
    (d_hidden, d_rows), d_label = _catalogue.over_rows(
        hidden.shape[0], block, some, (start, jnp.zeros_like(start.hidden[:, 0]))
    )
    if way == "shared":
        d_table = jnp.zeros_like(table, dtype=_F32).at[_shared_at(problem)].add(d_rows.T)
    else:
        d_table = d_rows if way == "gathered" else d_rows.T
    at = problem.rows_of(problem.labels)
    d_table = d_table.at[at].add(d_label[:, None] * hidden.astype(_F32))
    d_hidden = d_hidden + d_label[:, None] * problem.read(at).astype(_F32)
    return Gradients(d_hidden, d_table)


def _shared_at(problem: Problem) -> jax.Array:
    return problem.rows_of(jnp.clip(problem.negatives, 0, problem.items - 1))


def _shared_rows(problem: Problem, way: Way) -> jax.Array | None:
    """The negatives' rows, as far as they are in this shard."""
    return problem.read(_shared_at(problem)) if way == "shared" else None


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=_F32)


def _logits(
    problem: Problem, objective: Objective, way: Way, rows: Rows, shared: jax.Array | None
) -> _Block:
    scale = _F32(objective.scale)
    h, labels = rows.take(problem.hidden), rows.take(problem.labels)
    own = problem.negatives.ndim == 2
    given = rows.take(problem.negatives) if own else problem.negatives[None, :]
    out = (given < 0) | (given >= problem.items)
    if objective.mask_label:
        out = out | (given == labels[:, None])
    if problem.exclude is not None and problem.exclude.shape[1]:
        listed = rows.take(problem.exclude)
        out = out | (given[:, :, None] == listed[:, None, :]).any(-1)

    if shared is not None:
        at, source = _shared_at(problem), shared
        z = _dot(h, source, (1, 1))
    else:
        # What is left out reads the label's row, which the position reads anyway.
        at = problem.rows_of(jnp.where(out, labels[:, None], given))
        if way == "dense":
            source = problem.table
            z = _pick(problem, _dot(h, source, (1, 1)), at)
        else:
            source = problem.read(at)
            z = jnp.einsum("bd,bkd->bk", h, source, preferred_element_type=_F32)
        z = problem.over_shards(z)
    z = z * scale
    own_rows = problem.read(problem.rows_of(labels))
    label = problem.over_shards((h.astype(_F32) * own_rows.astype(_F32)).sum(1)) * scale
    if problem.log_q is not None:
        z = z - (rows.take(problem.log_q) if own else problem.log_q[None, :])
    if problem.log_q_labels is not None:
        label = label - rows.take(problem.log_q_labels)
    label = jnp.where(rows.take(problem.bad), _F32(jnp.nan), label)
    return _Block(h, at, source, label, jnp.where(out, _F32(-jnp.inf), z))


def _pick(problem: Problem, scores: jax.Array, at: jax.Array) -> jax.Array:
    """scores[p, at[p, k]]; zero for the rows of other shards."""
    if problem.shard is None:
        return jnp.take_along_axis(scores, at, 1)
    return jnp.take_along_axis(scores, at, 1, mode="fill", fill_value=0)


def _pull(
    way: Way, logits: _Block, slopes: jax.Array, d_rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What slopes [b, K] add to the block's hidden rows, and the rows' cotangents with theirs."""
    h, dtype = logits.hidden, logits.hidden.dtype
    if way == "gathered":
        d_hidden = jnp.einsum(
            "bk,bkd->bd", slopes.astype(dtype), logits.rows, preferred_element_type=_F32
        )
        update = slopes[:, :, None] * h.astype(_F32)[:, None, :]
        return d_hidden, d_rows.at[logits.at].add(update)
    if way == "dense":
        everything = jnp.zeros_like(slopes, shape=(slopes.shape[0], logits.rows.shape[0]))
        owner = jnp.arange(slopes.shape[0], dtype=jnp.int32)[:, None]
        slopes = everything.at[owner, logits.at].add(slopes)
    slopes = slopes.astype(dtype)
    return _dot(slopes, logits.rows, (1, 0)), d_rows + _dot(h, slopes, (0, 0))


def _value(objective: Objective, logits: _Block) -> jax.Array:
    label, z = logits.label, logits.negatives
    if objective.kind == "softmax":
        return _log_sum_exp(label, z) - label
    total = _F32(objective.power) * jax.nn.softplus(-label) + jax.nn.softplus(z).sum(1)
    return total / _F32(1 + z.shape[1])


def _slopes(objective: Objective, logits: _Block) -> tuple[jax.Array, jax.Array]:
    label, z = logits.label, logits.negatives
    if objective.kind == "softmax":
        lse = _log_sum_exp(label, z)
        return jnp.exp(label - lse) - _F32(1), jnp.exp(z - lse[:, None])
    share = _F32(1 / (1 + z.shape[1]))
    return -_F32(objective.power) * share * jax.nn.sigmoid(-label), share * jax.nn.sigmoid(z)


def _log_sum_exp(label: jax.Array, z: jax.Array) -> jax.Array:
    largest = jnp.maximum(label, z.max(1))
    return largest + jnp.log(jnp.exp(label - largest) + jnp.exp(z - largest[:, None]).sum(1))
