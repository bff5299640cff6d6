"""What `vmap` makes of a kernel's operands is still something that a TPU takes.

Lowered for a TPU, which no interpreter replaces: there a block must fill tiles.
"""

import jax
import jax.numpy as jnp
import pytest

from jaxrec import ops


def lowered(f, *arguments):
    """The text for a TPU; needs no compiler for it."""
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
    return jax.jit(f).trace(*specs).lower(lowering_platforms=("tpu",)).as_text()


def rows(length, *lead):
    return jnp.zeros((*lead, 2, length, 2, 64))


def total_gradient(f):
    return jax.grad(lambda x, *rest: f(x, *rest).sum())


@pytest.mark.parametrize("length", [16, 1100])
def test_a_batch_of_dropout_keys(length):
    def f(x, key):
        return ops.causal_attention(
            x, x, x, dropout_rate=0.5, dropout_key=key, implementation="pallas"
        )

    keys = jax.random.split(jax.random.key(0), 3)
    for g in (f, total_gradient(f)):
        assert "tpu_custom_call" in lowered(jax.vmap(g, (None, 0)), rows(length), keys)


@pytest.mark.parametrize("length", [16, 1100])
@pytest.mark.parametrize("op", ["causal", "positional", "hstu"])
@pytest.mark.parametrize("of_vectors", [None, 0])
def test_a_batch_of_segments(length, op, of_vectors):
    taps = jnp.ones(5)

    def f(x, ids):
        # Long rows are left to XLA's form otherwise.
        options = {"segment_ids": ids, "implementation": "pallas"}
        if op == "hstu":
            return ops.hstu_attention(x, x, x, normalizer=length, **options)
        if op == "positional":
            return ops.positional_kernel_attention(x, x, x, taps, taps, **options)
        return ops.causal_attention(x, x, x, **options)

    ids = jnp.zeros((3, 2, length), jnp.int32)
    x = rows(length) if of_vectors is None else rows(length, 3)
    for g in (f, total_gradient(f)):
        assert "tpu_custom_call" in lowered(jax.vmap(g, (of_vectors, 0)), x, ids)
