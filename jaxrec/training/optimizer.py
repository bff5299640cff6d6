"""From an `OptimizerConfig` to an optax transformation."""

from typing import Any

import jax
import optax
from jax import Array

from jaxrec.registry import resolve
from jaxrec.training.config import OptimizerConfig

Parameters = dict[str, Array]


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step."""
    decay_steps = max(1, total_steps - config.warmup_steps)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, decay_steps),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decayed(parameters: Parameters) -> dict[str, bool]:
    """Which parameters weight decay applies to: matrices that say nothing of positions alone."""
    of_positions = (".kernel.logits", ".kernel.values", ".bias.table")
    return {
        name: value.ndim >= 2 and not any(part in name for part in of_positions)
        for name, value in parameters.items()
    }


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The whole chain: clipping, then the optimiser with its schedule."""
    rate = learning_rate(config, total_steps)
    chain = [
        resolve("optimizer", config.name)(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    ]
    if config.clip_norm is not None:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    chained = optax.chain(*chain)

    def update(gradients: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        # Optax counts in int32 and multiplies by floats, which a user's strict setting forbids.
        with jax.numpy_dtype_promotion("standard"):
            return chained.update(gradients, state, parameters)

    return optax.GradientTransformation(chained.init, update)
