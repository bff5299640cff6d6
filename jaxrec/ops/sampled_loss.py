"""Losses over a label and sampled negatives: softmax, binary cross-entropy, generalised BCE."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _catalogue, _dispatch, _sampled
from jaxrec.ops._sampled import Gradients, Objective, Way

_NO_KERNEL = "there is no Pallas kernel for this op yet"

# Elements of the largest temporary of a block of positions: 4 MiB on a CPU, 64 MiB elsewhere.
CPU_ELEMENTS = 1 << 20
ACCELERATOR_ELEMENTS = 1 << 24
# Gathering the row of one negative costs about as much as this many items in a matrix product.
GATHER_COST = 24


class _Options(NamedTuple):
    objective: Objective
    way: Way
    shard: _catalogue.Shard | None
    cpu: int
    accelerator: int


def _unsupported(*arguments: Any, **options: Any) -> str | None:
    """Why the Pallas kernel cannot take this call."""
    return _NO_KERNEL


def sampled_softmax_loss(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    labels: Int[Array, " positions"],
    negatives: Int[Array, "positions sampled"] | Int[Array, " sampled"],
    *,
    log_q: Float[Array, "positions sampled"] | Float[Array, " sampled"] | None = None,
    log_q_labels: Float[Array, " positions"] | None = None,
    temperature: float = 1.0,
    mask_collisions: bool = False,
    exclude: Int[Array, "positions excluded"] | None = None,
    valid: Bool[Array, " positions"] | None = None,
    item_axis: str | None = None,
    num_items: int | None = None,
    implementation: _dispatch.Implementation | None = None,
) -> Float[Array, " positions"]:
    """Softmax cross-entropy of the label among itself and its sampled negatives.

    With ``z_pv = <hidden_p, item_table_v> / temperature - log_q_pv``, label ``y_p`` and negatives
    ``n_p1 .. n_pK``::

        loss_p = log( exp z_p,y_p + sum_k exp z_p,n_pk ) - z_p,y_p

    With ``log_q = log(K q(n))`` for negatives drawn from q, the sum estimates the one over the
    catalogue without bias, and the loss approaches the full cross-entropy as K grows.

    Args:
      hidden: [P, D], float32 or bfloat16.
      item_table: [V, D], in the dtype of `hidden`; row v belongs to item v.
      labels: integers [P], item ids from 0 to V - 1.
      negatives: integers, [P, K] for each position's own or [K] for the same ones everywhere; K at
        least 1. An id outside of 0..V-1 is padding and left out.
      log_q: the shape of `negatives`, subtracted from their logits; no gradient reaches it.
      log_q_labels: [P], the same for the labels (in-batch negatives need it; a label that is
        always there does not).
      temperature: a positive Python number.
      mask_collisions: leave out the negatives equal to their position's label.
      exclude: integers [P, E], items that a position's negatives must not be: such negatives are
        left out. An id outside of 0..V-1 is padding.
      valid: bool [P], by default all True. Where False the loss is 0 and nothing of that position,
        NaN included, reaches a result or a gradient; its label may be anything.
      item_axis: inside `jax.shard_map`, the mesh axis that the rows of the table are split over, in
        order; ids are those of the whole table. Every device along it must be given the same
        positions, labels and negatives, and gets the same result.
      num_items: with `item_axis`, how many of all rows are items, where the last are padding.
      implementation: "xla", "pallas", or None to let the op choose.

    Returns:
      float32 [P]; 0 where every negative is left out. A label outside of 0..V-1 at a valid position
      makes its loss NaN, and the gradients that it takes part in.

    Raises:
      ValueError: shapes, dtypes or options do not fit, or the asked implementation cannot run.

    Cost: 2 P (K + 1) D FLOPs forward, 8 P (K + 1) D for value and gradient: the logits are computed
    twice. Own negatives read P K rows of the table (P K D elements, twice) and scatter as many;
    where V < 24 K all V items are scored by matrix products instead, V taking the place of K + 1.
    Shared ones read K rows. Temporaries: a block of 4 MiB (64 MiB off the CPU) and the float32
    gradient of the table. Lists of E items to exclude add P K E comparisons. Reverse mode only.

    Source: Jean et al., "On Using Very Large Target Vocabulary for Neural Machine Translation"
    (ACL 2015), section 3; for recommenders with uniform negatives and no correction, Klenitskiy
    and Vasilev (RecSys 2023).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxrec import ops
      >>> hidden = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> table = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
      >>> losses = ops.sampled_softmax_loss(
      ...     hidden, table, jnp.array([0, 1]), jnp.array([0, 1, 2]), mask_collisions=True)
      >>> [round(float(x), 4) for x in losses]  # every other item is a negative: the full softmax
      [0.4076, 0.2395]
    """
    return _loss(
        "sampled_softmax_loss",
        "softmax",
        hidden,
        item_table,
        labels,
        negatives,
        log_q=log_q,
        log_q_labels=log_q_labels,
        temperature=temperature,
        mask_collisions=mask_collisions,
        exclude=exclude,
        valid=valid,
        item_axis=item_axis,
        num_items=num_items,
        implementation=implementation,
    )


def bce_loss(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    labels: Int[Array, " positions"],
    negatives: Int[Array, "positions sampled"] | Int[Array, " sampled"],
    *,
    temperature: float = 1.0,
    mask_collisions: bool = False,
    exclude: Int[Array, "positions excluded"] | None = None,
    valid: Bool[Array, " positions"] | None = None,
    item_axis: str | None = None,
    num_items: int | None = None,
    implementation: _dispatch.Implementation | None = None,
) -> Float[Array, " positions"]:
    """Binary cross-entropy: the label against its sampled negatives, each by itself.

    With ``s_pv = <hidden_p, item_table_v> / temperature``::

        loss_p = 1 / (K + 1) [ -log sigma(s_p,y_p) - sum_k log(1 - sigma(s_p,n_pk)) ]

    SASRec's objective is this with K = 1, but for the factor 1/2. Terms that are left out still
    count in K.

    Args, returns, raises, cost: as `sampled_softmax_loss`, but that the label's own term stays
    where every negative is left out.

    Source: Kang and McAuley, "Self-attentive sequential recommendation" (ICDM 2018), section III-E.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxrec import ops
      >>> hidden, table = jnp.array([[1.0]]), jnp.array([[2.0], [-1.0]])
      >>> round(float(ops.bce_loss(hidden, table, jnp.array([0]), jnp.array([[1]]))[0]), 4)
      0.2201
    """
    return _loss(
        "bce_loss",
        "bce",
        hidden,
        item_table,
        labels,
        negatives,
        temperature=temperature,
        mask_collisions=mask_collisions,
        exclude=exclude,
        valid=valid,
        item_axis=item_axis,
        num_items=num_items,
        implementation=implementation,
    )


def gbce_loss(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    labels: Int[Array, " positions"],
    negatives: Int[Array, "positions sampled"] | Int[Array, " sampled"],
    *,
    t: float = 0.75,
    temperature: float = 1.0,
    mask_collisions: bool = False,
    exclude: Int[Array, "positions excluded"] | None = None,
    valid: Bool[Array, " positions"] | None = None,
    item_axis: str | None = None,
    num_items: int | None = None,
    implementation: _dispatch.Implementation | None = None,
) -> Float[Array, " positions"]:
    """Generalised BCE: the label's probability to a power that undoes the overconfidence.

    Sampling few of many negatives makes plain BCE overestimate probabilities. With
    ``s_pv = <hidden_p, item_table_v> / temperature``::

        loss_p = 1 / (K + 1) [ -beta log sigma(s_p,y_p) - sum_k log(1 - sigma(s_p,n_pk)) ]
        beta = 1 - t (1 - alpha),    alpha = min(1, K / (V - 1))

    t = 0 is `bce_loss`; t = 1 calibrates fully.

    Args, returns, raises, cost: as `bce_loss`; and
      t: a Python number from 0 to 1.

    Source: Petrov and Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation
    Trained with Negative Sampling" (RecSys 2023). beta log sigma(s) is -beta softplus(-s): float32
    is enough.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxrec import ops
      >>> hidden, table = jnp.array([[1.0]]), jnp.array([[2.0], [-1.0], [0.0]])
      >>> label, negatives = jnp.array([0]), jnp.array([[1]])  # alpha = 1/2
      >>> round(float(ops.gbce_loss(hidden, table, label, negatives, t=1.0)[0]), 4)
      0.1884
    """
    op = "gbce_loss"
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= 1:
        raise ValueError(f"{op}: t must be a Python number from 0 to 1, got {t!r}")
    return _loss(
        op,
        "bce",
        hidden,
        item_table,
        labels,
        negatives,
        t=float(t),
        temperature=temperature,
        mask_collisions=mask_collisions,
        exclude=exclude,
        valid=valid,
        item_axis=item_axis,
        num_items=num_items,
        implementation=implementation,
    )


def gbce_power(negatives: int, num_items: int, t: float) -> float:
    """beta of `gbce_loss`.

    >>> round(gbce_power(256, 3416, 0.75), 6), round(gbce_power(256, 12101, 0.75), 6)
    (0.306223, 0.265868)
    """
    alpha = min(1.0, negatives / max(1, num_items - 1))
    return 1 - t * (1 - alpha)


def _loss(
    op: str,
    kind: Any,
    hidden: Any,
    item_table: Any,
    labels: Any,
    negatives: Any,
    *,
    log_q: Any = None,
    log_q_labels: Any = None,
    t: float = 0.0,
    temperature: float,
    mask_collisions: bool,
    exclude: Any,
    valid: Any,
    item_axis: str | None,
    num_items: int | None,
    implementation: str | None,
) -> jax.Array:
    hidden, item_table, labels, negatives = map(
        jnp.asarray, (hidden, item_table, labels, negatives)
    )
    _catalogue.check_matrices(op, hidden, item_table)
    shard = _catalogue.make_shard(op, item_table, item_axis, num_items)
    positions, items = hidden.shape[0], item_table.shape[0] if shard is None else shard.items
    _catalogue.check_integer(op, "labels", labels)
    _catalogue.check_shape(op, "labels", labels, (positions,))
    _catalogue.check_integer(op, "negatives", negatives)
    if negatives.ndim not in (1, 2) or negatives.shape[:-1] not in ((), (positions,)):
        raise ValueError(
            f"{op}: negatives must have shape ({positions}, K) for each position's own or (K,) for "
            f"shared ones, got {negatives.shape}"
        )
    count = negatives.shape[-1]
    if count == 0:
        raise ValueError(f"{op}: there must be at least one negative, got {negatives.shape}")
    log_q = _correction(op, "log_q", log_q, negatives.shape)
    log_q_labels = _correction(op, "log_q_labels", log_q_labels, (positions,))
    if exclude is not None:
        exclude = jnp.asarray(exclude)
        _catalogue.check_integer(op, "exclude", exclude)
        if exclude.ndim != 2 or exclude.shape[0] != positions:
            raise ValueError(
                f"{op}: exclude must have shape ({positions}, ids per position), got "
                f"{exclude.shape}"
            )
        exclude = _catalogue.ids_as_int32(exclude)
    valid = jnp.ones((positions,), jnp.bool_) if valid is None else jnp.asarray(valid)
    _catalogue.check_bool(op, "valid", valid)
    _catalogue.check_shape(op, "valid", valid, (positions,))
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be a positive Python number, got {temperature!r}")
    if not isinstance(mask_collisions, bool):
        raise ValueError(f"{op}: mask_collisions must be True or False, got {mask_collisions!r}")
    _dispatch.choose(op, implementation, _unsupported(hidden, item_table, labels, negatives))
    if positions == 0:
        return jnp.zeros((0,), jnp.float32)
    power = gbce_power(count, items, t)
    objective = Objective(kind, 1 / float(temperature), power, mask_collisions)
    way: Way = "shared"
    if negatives.ndim == 2:
        way = "dense" if item_table.shape[0] < GATHER_COST * count else "gathered"
    options = _Options(objective, way, shard, CPU_ELEMENTS, ACCELERATOR_ELEMENTS)
    ids = _catalogue.ids_as_int32(negatives)
    labels = _catalogue.ids_as_int32(labels)
    arguments = (hidden, item_table, labels, ids, log_q, log_q_labels, exclude, valid)
    return _catalogue.alike(shard, _losses(options, *_catalogue.together(shard, *arguments)))


def _correction(op: str, name: str, given: Any, shape: tuple[int, ...]) -> jax.Array | None:
    if given is None:
        return None
    given = jnp.asarray(given)
    _catalogue.check_float(op, name, given)
    _catalogue.check_shape(op, name, given, shape)
    return given.astype(jnp.float32)


def _per_platform(options: _Options, compute: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """`compute(block elements, *operands)` for the platform that is compiled for."""
    return _dispatch.platform_switch(
        partial(compute, options.accelerator), {"cpu": partial(compute, options.cpu)}, *operands
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options: _Options, *arguments: Any) -> jax.Array:
    return _losses_forward(options, *arguments)[0]


def _losses_forward(options: _Options, *arguments: Any) -> tuple[jax.Array, Any]:
    def compute(elements: int, *arguments: Any) -> jax.Array:
        problem = _sampled.clean(*arguments, shard=options.shard)
        block = _sampled.block_size(problem, options.way, elements)
        return _sampled.losses(problem, options.objective, options.way, block)

    return _per_platform(options, compute, arguments), arguments


def _losses_backward(options: _Options, arguments: Any, g: jax.Array) -> tuple[Any, ...]:
    def compute(elements: int, g: jax.Array, *arguments: Any) -> Gradients:
        problem = _sampled.clean(*arguments, shard=options.shard)
        block = _sampled.block_size(problem, options.way, elements)
        return _sampled.gradients(problem, options.objective, options.way, block, g)

    hidden, table, *others, valid = arguments
    g = _catalogue.from_all(options.shard, g)
    grads: Gradients = _per_platform(
        options, compute, (jnp.where(valid, g, jnp.float32(0)), *arguments)
    )
    d_hidden = jnp.where(valid[:, None], grads.hidden, jnp.float32(0))
    constant = [None] * (len(others) + 1)
    return d_hidden.astype(hidden.dtype), grads.table.astype(table.dtype), *constant


_losses.defvjp(_losses_forward, _losses_backward)
