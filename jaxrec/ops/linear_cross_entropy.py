"""Softmax cross-entropy over the whole item catalogue, without the matrix of logits."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _catalogue, _catalogue_kernel, _catalogue_loss, _dispatch
from jaxrec.ops._catalogue import Shard
from jaxrec.ops._catalogue_loss import Blocks, Gradients, Problem
from jaxrec.ops._manual_axes import vary_together
from jaxrec.ops._valid_first import AsGiven, ValidFirst, valid_first

T = TypeVar("T")


class Tiling(NamedTuple):
    """How large a block of logits may be.

    A block is written once and read three times, so it should stay in the last-level cache or a
    TPU's VMEM; both sides must be long enough to keep matrix units busy and to hide the fixed cost
    of an operation. One pass needs blocks [positions, V] of at most `one_pass_logits`.

    `sorted_positions`, where there is a number: a call that says which positions are valid has them
    sorted, and does without blocks that hold no valid one. So that the last of them wastes little
    there are `SORTED_BLOCKS`, but none is shorter than this.
    """

    positions: int
    items: int
    one_pass_logits: int
    sorted_positions: int | None = None


# Measured on two cores; chosen by the TPU compiler's own cycle estimates for v5e.
CPU_TILING = Tiling(positions=512, items=2048, one_pass_logits=1 << 24, sorted_positions=128)
ACCELERATOR_TILING = Tiling(positions=2048, items=8192, one_pass_logits=1 << 25)
SORTED_BLOCKS = 8
# With fewer positions a block, reading the item table for each costs what the one pass saves.
ONE_PASS_POSITIONS = 128


class _Options(NamedTuple):
    smoothing: float
    shard: Shard | None
    cpu: Tiling
    accelerator: Tiling
    kernel: bool  # whether the Pallas kernels are compiled for a TPU
    padded: bool  # whether the caller says which positions are valid


class _Residuals(NamedTuple):
    """What the forward pass leaves for the backward pass of `_losses`."""

    arguments: tuple[Any, ...]
    lse: jax.Array  # float32[P]
    # Only the kernel makes and reads it; None without it.
    kept: _catalogue_kernel.Kept | None


# The mean, its gradients, and its gradient by the weights.
_MeanResults = tuple[jax.Array, Gradients, jax.Array]


class _Arguments(NamedTuple):
    hidden: jax.Array
    item_table: jax.Array
    bias: jax.Array | None
    labels: jax.Array
    valid: jax.Array


def _in_order(
    problem: Problem, options: _Options, tiling: Tiling
) -> tuple[Problem, ValidFirst | AsGiven, int]:
    """The problem as the loops take it, its order, and how many positions a block has at most."""
    positions = problem.hidden.shape[0]
    if not options.padded or tiling.sorted_positions is None:
        return problem, AsGiven(), tiling.positions
    most = min(tiling.positions, max(tiling.sorted_positions, -(-positions // SORTED_BLOCKS)))
    if positions <= most:
        return problem, AsGiven(), most
    order = valid_first(problem.valid)
    return _catalogue_loss.sort(problem, order), order, most


def _two_pass_blocks(problem: Problem, most: int, tiling: Tiling) -> Blocks:
    return Blocks(
        _catalogue.balanced(problem.hidden.shape[0], most),
        _catalogue.balanced(problem.table.shape[0], tiling.items),
    )


def _one_pass_positions(items: int, tiling: Tiling) -> int:
    return min(tiling.one_pass_logits // items, tiling.positions)


def _per_platform(
    options: _Options,
    compute: Callable[..., T],
    by_kernel: Callable[..., T],
    operands: tuple[Any, ...],
) -> T:
    """`compute(tiling, *operands)` for the platform that is compiled for, or `by_kernel`."""
    xla = partial(compute, options.accelerator)
    others: dict[str, Callable[..., T]] = {"cpu": partial(compute, options.cpu)}
    if options.kernel:
        others["tpu"] = _dispatch.differentiated_as(by_kernel, xla)
    return _dispatch.platform_switch(xla, others, *operands)


def _unsupported(hidden: Any) -> str | None:
    """Why the Pallas kernel cannot take this call."""
    return _catalogue_kernel.unsupported(hidden)


def _slower(positions: int, items: int) -> str | None:
    """Why the Pallas kernel would take longer than XLA's form."""
    return _catalogue_kernel.slower(positions, items)


def _checked(
    op: str,
    hidden: Any,
    item_table: Any,
    labels: Any,
    bias: Any,
    valid: Any,
    label_smoothing: float,
    implementation: str | None,
) -> tuple[_Arguments, _dispatch.Choice]:
    """What both functions take, as arrays whose shapes and dtypes agree."""
    hidden, item_table, labels = map(jnp.asarray, (hidden, item_table, labels))
    _catalogue.check_matrices(op, hidden, item_table)
    positions, items = hidden.shape[0], item_table.shape[0]
    _catalogue.check_integer(op, "labels", labels)
    _catalogue.check_shape(op, "labels", labels, (positions,))
    if bias is not None:
        bias = jnp.asarray(bias)
        _catalogue.check_float(op, "bias", bias)
        _catalogue.check_shape(op, "bias", bias, (items,))
    valid = jnp.ones((positions,), jnp.bool_) if valid is None else jnp.asarray(valid)
    _catalogue.check_bool(op, "valid", valid)
    _catalogue.check_shape(op, "valid", valid, (positions,))
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"{op}: label_smoothing must be a Python number from 0 to 1, got {label_smoothing!r}"
        )
    choice = _dispatch.choose(
        op,
        implementation,
        _unsupported(hidden),
        slower=_slower(positions, items),
        blocks=partial(_catalogue_kernel.look_up, hidden, item_table, bias),
    )
    # Narrower ones could not be compared with the number of items.
    labels = _catalogue.ids_as_int32(labels)
    return _Arguments(hidden, item_table, bias, labels, valid), choice


def linear_cross_entropy(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    labels: Int[Array, " positions"],
    *,
    bias: Float[Array, " items"] | None = None,
    valid: Bool[Array, " positions"] | None = None,
    label_smoothing: float = 0.0,
    item_axis: str | None = None,
    num_items: int | None = None,
    implementation: _dispatch.Implementation | None = None,
) -> Float[Array, " positions"]:
    """Softmax cross-entropy of every position over all items, never holding [positions, items].

    With logits ``l_pv = <hidden_p, item_table_v> + bias_v`` and label ``y_p``::

        loss_p = log sum_v exp(l_pv) - (1 - eps) l_p,y_p - eps / V sum_v l_pv

    For the mean over positions, which is what training needs, `mean_linear_cross_entropy` has a
    gradient that is a quarter cheaper.

    Args:
      hidden: [P, D], float32 or bfloat16.
      item_table: [V, D], in the dtype of `hidden`; row v belongs to item v.
      labels: integers [P], item ids from 0 to V - 1.
      bias: [V], float32 or bfloat16; the popularity of items, for example. -inf removes an
        item, unless labels are smoothed: their loss takes every item's logit, and is then infinite.
        For the kernel every bias of -2^99 or less is -inf.
      valid: bool [P], by default all True. Where False the loss is 0 and nothing of that position,
        NaN included, reaches a result or a gradient; its label may be anything.
      label_smoothing: eps, a Python number from 0 to 1.
      item_axis: inside `jax.shard_map`, the mesh axis that the rows of `item_table` and `bias` are
        split over; labels then are ids of the whole catalogue, and the result is one of all items.
        Adds three reductions over that axis, of [P] each, and one of the gradient [P, D].
      num_items: with `item_axis`, how many of the rows of all shards are items; those after them
        are padding and take no part. By default all of them.
      implementation: "xla", "pallas", or None to let the op choose.

    Returns:
      float32 [P]. A label outside of 0..V-1 cannot raise under `jit`: at a valid position it makes
      the loss NaN, and every gradient that the position takes part in.

    Raises:
      ValueError: shapes, dtypes or options do not fit, or the asked implementation cannot run.

    Cost: 2 P V D FLOPs forward, 8 P V D for value and gradient: the logits are computed twice, in
    blocks of at most 512 by 2,048 on a CPU and 2,048 by 8,192 elsewhere. Kept between the two: the
    inputs and float32 [P]. On a CPU P counts the valid positions where `valid` is given, rounded up
    to blocks of an eighth of all, 128 to 512: they are sorted to the front, and blocks after them
    are left out. On a TPU two Pallas kernels run for widths up to 256, with blocks in VMEM of 512
    by 2,048; they keep float32 [P, D] and [P] besides. Products run in the inputs' dtype
    (`jax.default_matmul_precision` applies), sums and statistics in float32; gradients come in the
    inputs' dtypes. Reverse mode only.

    Source: the blockwise form of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models" (arXiv 2411.09009), without its gradient filter; label smoothing as in Szegedy et al.
    (arXiv 1512.00567), section 7.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxrec import ops
      >>> hidden = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> item_table = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
      >>> losses = ops.linear_cross_entropy(hidden, item_table, jnp.array([0, 1]))
      >>> [round(float(x), 4) for x in losses]
      [0.4076, 0.2395]
    """
    arguments, choice = _checked(
        "linear_cross_entropy",
        hidden,
        item_table,
        labels,
        bias,
        valid,
        label_smoothing,
        implementation,
    )
    shard = _catalogue.make_shard(
        "linear_cross_entropy", arguments.item_table, item_axis, num_items
    )
    return _per_position(arguments, _options(label_smoothing, shard, choice, valid is not None))


def _options(
    smoothing: float, shard: Shard | None, choice: _dispatch.Choice, padded: bool
) -> _Options:
    kernel = choice.implementation == "pallas"
    return _Options(float(smoothing), shard, CPU_TILING, ACCELERATOR_TILING, kernel, padded)


def _per_position(arguments: _Arguments, options: _Options) -> jax.Array:
    if arguments.hidden.shape[0] == 0:
        return jnp.zeros((0,), jnp.float32)
    return _catalogue.alike(
        options.shard, _losses(options, *_catalogue.together(options.shard, *arguments))
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options: _Options, *arguments: Any) -> jax.Array:
    return _forward(options, False, arguments)[0]


def _forward(
    options: _Options, keep: bool, arguments: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array, _catalogue_kernel.Kept | None]:
    """Losses, log-sum-exp and, where wanted, `kept` of the residuals."""

    def compute(
        tiling: Tiling, *arguments: Any
    ) -> tuple[jax.Array, jax.Array, _catalogue_kernel.Kept | None]:
        problem = _catalogue_loss.clean(*arguments, shard=options.shard)
        sorted_problem, order, most = _in_order(problem, options, tiling)
        blocks = _two_pass_blocks(problem, most, tiling)
        stats = _catalogue_loss.statistics(sorted_problem, blocks)
        lse = order.restore(_catalogue_loss.log_sum_exp(stats))
        # As the order does, over more axes of a mesh than sums over the items do.
        lse = vary_together(lse, problem.valid)[0]
        target = order.restore(stats.target)
        value = _catalogue_loss.losses(problem, lse, target, options.smoothing)
        # Never read; there for the residuals to have one form on all platforms.
        unused = _catalogue_kernel.Kept(stats.target, jnp.zeros_like(problem.hidden, jnp.float32))
        return value, lse, unused if keep and options.kernel else None

    def by_kernel(
        *arguments: Any,
    ) -> tuple[jax.Array, jax.Array, _catalogue_kernel.Kept | None]:
        problem = _catalogue_loss.clean(*arguments, shard=options.shard)
        value, lse, kept = _catalogue_kernel.losses(problem, options.smoothing, keep)
        return value, vary_together(lse, problem.valid)[0], kept

    return _per_platform(options, compute, by_kernel, arguments)


def _losses_forward(options: _Options, *arguments: Any) -> tuple[jax.Array, _Residuals]:
    losses, lse, kept = _forward(options, True, arguments)
    return losses, _Residuals(arguments, lse, kept)


def _losses_backward(options: _Options, residuals: _Residuals, g: jax.Array) -> tuple[Any, ...]:
    def prepared(g: jax.Array, arguments: tuple[Any, ...]) -> tuple[Any, jax.Array]:
        problem = _catalogue_loss.clean(*arguments, shard=options.shard)
        return problem, jnp.where(problem.valid, g, jnp.float32(0))

    def compute(tiling: Tiling, lse: jax.Array, kept: Any, g: Any, *rest: Any) -> Gradients:
        problem, g = prepared(g, rest)
        sorted_problem, order, most = _in_order(problem, options, tiling)
        blocks = _two_pass_blocks(problem, most, tiling)
        lse, g = order.sort(lse), order.sort(g)
        grads = _catalogue_loss.gradients(sorted_problem, lse, g, options.smoothing, blocks)
        return grads._replace(hidden=order.restore(grads.hidden))

    def by_kernel(lse: jax.Array, kept: Any, g: jax.Array, *rest: Any) -> Gradients:
        problem, g = prepared(g, rest)
        return _catalogue_kernel.gradients(
            problem, lse, kept, g, options.smoothing, problem.table.dtype
        )

    arguments, lse, kept = residuals
    operands = (lse, kept, _catalogue.from_all(options.shard, g), *arguments)
    grads = _per_platform(options, compute, by_kernel, operands)
    return _cotangents(_Arguments(*arguments), grads)


def _cotangents(arguments: _Arguments, grads: Gradients) -> tuple[Any, ...]:
    d_hidden = jnp.where(arguments.valid[:, None], grads.hidden, jnp.float32(0))
    bias = arguments.bias
    return (
        d_hidden.astype(arguments.hidden.dtype),
        grads.table.astype(arguments.item_table.dtype),
        None if bias is None or grads.bias is None else grads.bias.astype(bias.dtype),
        None,
        None,
    )


_losses.defvjp(_losses_forward, _losses_backward)


def mean_linear_cross_entropy(
    hidden: Float[Array, "positions width"],
    item_table: Float[Array, "items width"],
    labels: Int[Array, " positions"],
    *,
    bias: Float[Array, " items"] | None = None,
    valid: Bool[Array, " positions"] | None = None,
    weights: Float[Array, " positions"] | None = None,
    label_smoothing: float = 0.0,
    item_axis: str | None = None,
    num_items: int | None = None,
    implementation: _dispatch.Implementation | None = None,
) -> Float[Array, ""]:
    """Weighted mean of `linear_cross_entropy` over the valid positions: the training loss.

    ``sum_p w_p loss_p / sum_p w_p`` over the valid positions; 0 when the weights sum to 0.

    Every position's share in the mean is known before the backward pass, so the gradient is formed
    while the logits are at hand: three matrix products and one exponential per logit, where
    differentiating `linear_cross_entropy` takes four and two. The backward pass only scales. On a
    TPU the kernels of `linear_cross_entropy` take four and two, in fewer cycles than the three.

    Args:
      hidden: as `linear_cross_entropy`.
      item_table: as `linear_cross_entropy`.
      labels: as `linear_cross_entropy`.
      bias: as `linear_cross_entropy`.
      valid: as `linear_cross_entropy`; an invalid position also leaves the sum of weights.
      weights: [P], float32 or bfloat16, not negative, by default all 1. They have a gradient, and a
        NaN loss stays NaN under weight 0: use `valid` to leave a position out.
      label_smoothing: as `linear_cross_entropy`.
      item_axis: as `linear_cross_entropy`.
      num_items: as `linear_cross_entropy`.
      implementation: as `linear_cross_entropy`.

    Returns:
      float32 scalar, the mean over the positions of this call. Inside `jax.shard_map` these are one
      shard's: for the mean over all of them, scale by this shard's part of the weights and `psum`.

    Raises:
      ValueError: shapes, dtypes or options do not fit, or the asked implementation cannot run.

    Cost: 6 P V D FLOPs for value and gradient while a block of 128 positions over all items fits in
    64 MiB (V up to 131,072); above, and on a TPU, those of `linear_cross_entropy`. Temporaries:
    that block, except on a TPU, and the gradient of the item table in float32. Reverse mode only.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxrec import ops
      >>> hidden = jnp.array([[1.0, 0.0], [0.0, 2.0], [jnp.nan, 0.0]])
      >>> item_table = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
      >>> labels, valid = jnp.array([0, 1, -1]), jnp.array([True, True, False])
      >>> loss = lambda h: ops.mean_linear_cross_entropy(h, item_table, labels, valid=valid)
      >>> round(float(loss(hidden)), 4)
      0.3236
      >>> float(jax.grad(loss)(hidden)[2].max())
      0.0
    """
    op = "mean_linear_cross_entropy"
    arguments, choice = _checked(
        op, hidden, item_table, labels, bias, valid, label_smoothing, implementation
    )
    positions, items = arguments.hidden.shape[0], arguments.item_table.shape[0]
    weights = jnp.ones((positions,), jnp.float32) if weights is None else jnp.asarray(weights)
    _catalogue.check_float(op, "weights", weights)
    _catalogue.check_shape(op, "weights", weights, (positions,))
    if positions == 0:
        return jnp.zeros((), jnp.float32)
    shard = _catalogue.make_shard(op, arguments.item_table, item_axis, num_items)
    options = _options(label_smoothing, shard, choice, valid is not None)
    affordable = min(_one_pass_positions(items, t) for t in (CPU_TILING, ACCELERATOR_TILING))
    if affordable < min(ONE_PASS_POSITIONS, positions):
        shares, _ = _shares(weights, arguments.valid)
        return (shares * _per_position(arguments, options)).sum()
    return _catalogue.alike(
        options.shard, _mean(options, *_catalogue.together(options.shard, *arguments, weights))
    )


def _shares(weights: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32[P] that sum to 1, all 0 if the weights sum to 0; and what to divide weights by."""
    w = jnp.where(valid, weights.astype(jnp.float32), jnp.float32(0))
    total = w.sum()
    divisor = jnp.where(total == 0, jnp.float32(jnp.inf), total)
    return w / divisor, divisor


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean(options: _Options, *operands: Any) -> jax.Array:
    *arguments, weights = operands
    shares, _ = _shares(weights, arguments[-1])
    return (shares * _forward(options, False, tuple(arguments))[0]).sum()


def _mean_forward(options: _Options, *operands: Any) -> tuple[jax.Array, Any]:
    def finished(
        shares: jax.Array, divisor: jax.Array, losses: jax.Array, grads: Gradients
    ) -> _MeanResults:
        mean = (shares * losses).sum()
        return mean, grads, (losses - mean) / divisor

    def compute(tiling: Tiling, *operands: Any) -> _MeanResults:
        *arguments, weights = operands
        problem = _catalogue_loss.clean(*arguments, shard=options.shard)
        sorted_problem, order, most = _in_order(problem, options, tiling)
        largest = min(most, _one_pass_positions(problem.table.shape[0], tiling))
        block = _catalogue.balanced(problem.hidden.shape[0], largest)
        shares, divisor = _shares(weights, problem.valid)
        lse, target, grads = _catalogue_loss.value_and_gradients(
            sorted_problem, order.sort(shares), options.smoothing, block
        )
        lse, target = order.restore(lse), order.restore(target)
        grads = grads._replace(hidden=order.restore(grads.hidden))
        losses = _catalogue_loss.losses(problem, lse, target, options.smoothing)
        return finished(shares, divisor, losses, grads)

    def by_kernel(*operands: Any) -> _MeanResults:
        *arguments, weights = operands
        problem = _catalogue_loss.clean(*arguments, shard=options.shard)
        shares, divisor = _shares(weights, problem.valid)
        losses, lse, kept = _catalogue_kernel.losses(problem, options.smoothing, True)
        grads = _catalogue_kernel.gradients(
            problem, lse, kept, shares, options.smoothing, jnp.float32
        )
        return finished(shares, divisor, losses, grads)

    mean, grads, d_weights = _per_platform(options, compute, by_kernel, operands)
    return mean, (operands, grads, d_weights)


def _mean_backward(options: _Options, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    operands, grads, d_weights = residuals
    *arguments, weights = operands
    total = _catalogue.from_all(options.shard, g)
    scaled = jax.tree.map(lambda x: total * x, grads)
    d_weights = jnp.where(arguments[-1], g * d_weights, jnp.float32(0))
    return *_cotangents(_Arguments(*arguments), scaled), d_weights.astype(weights.dtype)


_mean.defvjp(_mean_forward, _mean_backward)
