"""Softmax cross-entropy over the whole item catalogue, without the matrix of logits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.ops import _catalogue, _catalogue_loss, _dispatch, _manual_axes
from jaxrec.ops._catalogue_loss import Blocks, Gradients, Problem

_NO_KERNEL = "there is no Pallas kernel of this op yet"

# Logits that one block may hold, and the largest and smallest number of positions in one.
BLOCK_LOGITS = 1 << 24
BLOCK_POSITIONS = 512
LEAST_POSITIONS = 128
BLOCK_ITEMS = 4096


class _Options(NamedTuple):
    smoothing: float
    blocks: Blocks


def _two_pass_blocks(positions: int, items: int) -> Blocks:
    return Blocks(
        _catalogue.balanced(positions, BLOCK_POSITIONS), _catalogue.balanced(items, BLOCK_ITEMS)
    )


def _one_pass_block(positions: int, items: int) -> int | None:
    """Positions in a block that sees all items at once; None if there are too many items."""
    affordable = min(BLOCK_LOGITS // items, BLOCK_POSITIONS)
    if affordable < min(LEAST_POSITIONS, positions):
        return None
    return _catalogue.balanced(positions, affordable)


class _Arguments(NamedTuple):
    hidden: jax.Array
    item_table: jax.Array
    bias: jax.Array | None
    labels: jax.Array
    valid: jax.Array


def _arguments(
    op: str,
    hidden: Any,
    item_table: Any,
    labels: Any,
    bias: Any,
    valid: Any,
    label_smoothing: float,
    implementation: str | None,
) -> _Arguments:
    """Checked arguments of both functions."""
    hidden, item_table, labels = map(jnp.asarray, (hidden, item_table, labels))
    _catalogue.check_matrices(op, hidden, item_table)
    positions, items = hidden.shape[0], item_table.shape[0]
    _catalogue.check_integer(op, "labels", labels)
    _catalogue.check_shape(op, "labels", labels, (positions,))
    if bias is not None:
        bias = jnp.asarray(bias)
        _catalogue.check_float(op, "bias", bias)
        _catalogue.check_shape(op, "bias", bias, (items,))
    if valid is None:
        valid = jnp.ones((positions,), bool)
    valid = jnp.asarray(valid)
    _catalogue.check_bool(op, "valid", valid)
    _catalogue.check_shape(op, "valid", valid, (positions,))
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"{op}: label_smoothing must be a Python number in 0..1, got {label_smoothing!r}"
        )
    _dispatch.choose(op, implementation, _NO_KERNEL)
    return _Arguments(hidden, item_table, bias, labels, valid)


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
    """TODO"""
    arguments = _arguments(
        "linear_cross_entropy",
        hidden,
        item_table,
        labels,
        bias,
        valid,
        label_smoothing,
        implementation,
    )
    if arguments.labels.shape[0] == 0:
        return jnp.zeros((0,), jnp.float32)
    return _per_position(arguments, float(label_smoothing))


def _per_position(arguments: _Arguments, smoothing: float) -> jax.Array:
    blocks = _two_pass_blocks(arguments.hidden.shape[0], arguments.item_table.shape[0])
    return _losses(_Options(smoothing, blocks), *_manual_axes.vary_together(*arguments))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options: _Options, *arguments: Any) -> jax.Array:
    return _losses_forward(options, *arguments)[0]


def _losses_forward(options: _Options, *arguments: Any) -> tuple[jax.Array, Any]:
    problem = _catalogue_loss.clean(*arguments)
    stats = _catalogue_loss.statistics(problem, options.blocks)
    lse = _catalogue_loss.log_sum_exp(stats)
    losses = _catalogue_loss.losses(problem, lse, stats.target, options.smoothing)
    return losses, (arguments, lse)


def _losses_backward(options: _Options, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    arguments, lse = residuals
    problem = _catalogue_loss.clean(*arguments)
    g = jnp.where(problem.valid, g, jnp.float32(0))
    grads = _catalogue_loss.gradients(problem, lse, g, options.smoothing, options.blocks)
    return _cotangents(_Arguments(*arguments), grads, jnp.float32(1))


def _cotangents(
    arguments: _Arguments, grads: Gradients, scale: jax.Array
) -> tuple[Any, ...]:
    hidden, table, bias, _, valid = arguments
    d_hidden = jnp.where(valid[:, None], scale * grads.hidden, jnp.float32(0))
    return (
        d_hidden.astype(hidden.dtype),
        (scale.astype(grads.table.dtype) * grads.table).astype(table.dtype),
        None if bias is None or grads.bias is None else (scale * grads.bias).astype(bias.dtype),
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
    implementation: _dispatch.Implementation | None = None,
) -> Float[Array, ""]:
    """TODO"""
    op = "mean_linear_cross_entropy"
    arguments = _arguments(
        op, hidden, item_table, labels, bias, valid, label_smoothing, implementation
    )
    positions, items = arguments.hidden.shape[0], arguments.item_table.shape[0]
    if weights is None:
        weights = jnp.ones((positions,), jnp.float32)
    weights = jnp.asarray(weights)
    _catalogue.check_float(op, "weights", weights)
    _catalogue.check_shape(op, "weights", weights, (positions,))
    if positions == 0:
        return jnp.zeros((), jnp.float32)
    smoothing = float(label_smoothing)
    block = _one_pass_block(positions, items)
    if block is None:
        w, total = _normalised(weights, arguments.valid)
        return (w * _per_position(arguments, smoothing)).sum()
    blocks = Blocks(block, items)
    operands = _manual_axes.vary_together(*arguments, weights)
    return _mean(_Options(smoothing, blocks), *operands)


def _normalised(weights: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 weights that sum to one (all zero if nothing counts), and their sum before."""
    w = jnp.where(valid, weights.astype(jnp.float32), jnp.float32(0))
    total = w.sum()
    return jnp.where(total == 0, jnp.float32(0), w / jnp.where(total == 0, jnp.float32(1), total)), total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean(options: _Options, *operands: Any) -> jax.Array:
    *arguments, weights = operands
    w, _ = _normalised(weights, arguments[-1])
    return (w * _losses_forward(options, *arguments)[0]).sum()


def _mean_forward(options: _Options, *operands: Any) -> tuple[jax.Array, Any]:
    *arguments, weights = operands
    problem = _catalogue_loss.clean(*arguments)
    w, total = _normalised(weights, problem.valid)
    lse, target, grads = _catalogue_loss.value_and_gradients(
        problem, w, options.smoothing, options.blocks.positions
    )
    values = _catalogue_loss.losses(problem, lse, target, options.smoothing)
    mean = (w * values).sum()
    return mean, (operands, grads, values - mean, total)


def _mean_backward(options: _Options, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    operands, grads, centred, total = residuals
    *rest, weights = operands
    arguments = _Arguments(*rest)
    d_weights = jnp.where(
        arguments.valid & (total != 0), g * centred / jnp.where(total == 0, jnp.float32(1), total), jnp.float32(0)
    )
    return *_cotangents(arguments, grads, g), d_weights.astype(weights.dtype)


_mean.defvjp(_mean_forward, _mean_backward)
