"""What a positional kernel can learn in one block that a block without it cannot.

Sequences of distinct random items, one transformer block as in SASRec, no position vectors. Copying
the item of three steps ago takes a kernel on the values; one-block induction ("what followed the
earlier occurrence of the last item?") takes a kernel on the logits. A factor that is dropped,
swapped with the other, or mixed along a wrong axis fails here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrec.ops import init_positional_kernel, positional_kernel_attention

# Each training run takes about ten seconds on one core.
pytestmark = pytest.mark.slow

ITEMS, LENGTH, WIDTH, BATCH, STEPS = 40, 12, 32, 128, 400
LAG = 3


def distinct_items(key):
    scores = jax.random.uniform(key, (BATCH, ITEMS))
    return jnp.argsort(scores, axis=1)[:, :LENGTH]


def lag_copy(key):
    """The target of a position is the item three steps before it."""
    items = distinct_items(key)
    targets = jnp.roll(items, LAG, axis=1)
    return items, targets, jnp.arange(LENGTH) >= LAG


def induction(key):
    """The last item repeats an earlier one; the target is what followed that one."""
    first, second = jax.random.split(key)
    items = distinct_items(first)
    place = jax.random.randint(second, (BATCH, 1), 0, LENGTH - 2)
    items = items.at[:, -1].set(jnp.take_along_axis(items, place, axis=1)[:, 0])
    target = jnp.take_along_axis(items, place + 1, axis=1)
    return items, jnp.broadcast_to(target, items.shape), jnp.arange(LENGTH) == LENGTH - 1


def init(key, logits, values):
    keys = iter(jax.random.split(key, 6))

    def dense(*shape):
        return shape[0] ** -0.5 * jax.random.normal(next(keys), shape)

    params = {name: dense(WIDTH, WIDTH) for name in ("query", "key", "value", "inner", "outer")}
    params["items"] = 0.02 * jax.random.normal(next(keys), (ITEMS, WIDTH))
    # Identity factors are no parameters.
    for name, structure in (("u", logits), ("l", values)):
        if structure != "identity":
            params[name] = init_positional_kernel(structure, LENGTH)
    return params


def normalized(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def scores(structure, params, items):
    x = WIDTH**0.5 * params["items"][items]
    q_in = normalized(x)
    heads = (*items.shape, 1, WIDTH)
    attended = positional_kernel_attention(
        (q_in @ params["query"]).reshape(heads),
        (x @ params["key"]).reshape(heads),
        (x @ params["value"]).reshape(heads),
        params.get("u"),
        params.get("l"),
        structure=structure,
    )
    z = normalized(q_in + attended.reshape(x.shape))
    z = z + jax.nn.relu(z @ params["inner"]) @ params["outer"]
    return normalized(z) @ params["items"].T


def train(task, logits, values, steps=STEPS, seed=0):
    """Accuracy at the last position, and the parameters."""
    # optax mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        return _train(task, logits, values, steps, seed)


def _train(task, logits, values, steps, seed):
    structure = (logits, values)
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        items, targets, counts = task(key)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            scores(structure, params, items), targets
        )
        return jnp.where(counts[None], losses, 0.0).sum() / (BATCH * counts.sum())

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, keys):
        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, keys)[0]

    start, data, test = jax.random.split(jax.random.key(seed), 3)
    params = init(start, logits, values)
    carry = (params, optimizer.init(params))
    params, _ = run(carry, jax.random.split(data, steps))
    items, targets, _ = task(test)
    best = jnp.argmax(scores(structure, params, items)[:, -1], axis=-1)
    return float((best == targets[:, -1]).mean()), params


@pytest.mark.parametrize(
    ("logits", "values", "low", "high"),
    [
        # Sums over the past tell how far along a row is, a weak sign of position.
        ("toeplitz", "identity", 0.0, 0.5),
        ("identity", "toeplitz", 0.9, 1.0),
        ("full", "full", 0.97, 1.0),
    ],
)
def test_lag_copy_takes_a_kernel_on_the_values(logits, values, low, high):
    accuracy, _ = train(lag_copy, logits, values)
    assert low <= accuracy <= high


@pytest.mark.parametrize(
    ("logits", "values", "low", "high"),
    [
        ("identity", "toeplitz", 0.0, 0.25),
        ("toeplitz", "identity", 0.97, 1.0),
        ("full", "full", 0.97, 1.0),
    ],
)
def test_induction_takes_a_kernel_on_the_logits(logits, values, low, high):
    accuracy, params = train(induction, logits, values)
    assert low <= accuracy <= high
    if logits == "toeplitz":
        # A key that carries the item before it: the largest tap is the one at lag 1.
        assert np.argmax(np.abs(np.asarray(params["u"]))) == 1
