"""Where a CPU compiles another form of a step than accelerators do, both give the same.

Everything else here runs on a CPU, so these tests are what runs the other forms.
"""

import functools
from unittest import mock

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, draw, gradients_of, qkv
from oracles import hstu as oracle

from jaxrec import ops
from jaxrec.ops import _attention_mix_tables, _catalogue_top_k, _hstu_rows, _time_buckets

WITH_FORMS = (_attention_mix_tables, _hstu_rows, _time_buckets)


def elsewhere(default, kernels, *operands):
    """`platform_switch` on a platform that is not named."""
    del kernels
    return default(*operands)


@pytest.fixture
def on_an_accelerator():
    """Traced inside, the steps have the form that accelerators compile."""
    switches = [mock.patch.object(module, "platform_switch", elsewhere) for module in WITH_FORMS]
    for switch in switches:
        switch.start()
    yield
    for switch in switches:
        switch.stop()


def test_another_form_is_taken(on_an_accelerator):
    for form, arguments in [
        (_time_buckets.lookup, (jnp.zeros(3), jnp.zeros((2, 2), jnp.uint32))),
        (_hstu_rows.next_times, (jnp.zeros((1, 3), jnp.int32), None, None)),
        (_attention_mix_tables.toeplitz, (jnp.zeros(5),)),
    ]:
        assert "gather" not in str(jax.make_jaxpr(form)(*arguments))


FORMS = {
    "lookup": (_time_buckets._lookup_by_edges, _time_buckets._lookup_by_number),
    "sums": (_time_buckets._sums_by_edges, _time_buckets._sums_by_number),
    "next": (_hstu_rows._by_doubling, _hstu_rows._by_gather),
    "toeplitz": (
        _attention_mix_tables._by_strides,
        _attention_mix_tables._by_gather,
        _attention_mix_tables._by_moves,
    ),
}


@pytest.mark.parametrize("entries", [1, 6, 74, 129])
@pytest.mark.parametrize("form", FORMS["lookup"])
def test_buckets_are_exact_at_every_edge(form, entries):
    edges = _time_buckets.edges(128, 32)
    near = sorted({0, 1, 2, 2**31, 2**32 - 1} | {e + d for e in edges for d in (-1, 0, 1)})
    near += [2**k + d for k in range(2, 32) for d in (-1, 0, 1)]
    wanted = [oracle.bucket(x, entries - 1) for x in near]
    apart = jnp.asarray(near, jnp.uint32)
    for shape in ((-1,), (1, -1), (-1, 1, 1)):
        got = form(jnp.arange(float(entries)), apart.reshape(shape))
        np.testing.assert_array_equal(got.reshape(-1), wanted)


@pytest.mark.parametrize("form", FORMS["lookup"])
def test_buckets_of_wide_differences(form):
    with jax.enable_x64(True):
        edges = _time_buckets.edges(128, 64)
        # Further up float64, which the edges are made of, is not exact itself.
        near = [e + d for e in edges if e < 2**50 for d in (-1, 0, 1)]
        got = form(jnp.arange(129.0), jnp.asarray(near, jnp.uint64))
        wanted = np.searchsorted(edges, near, side="right")
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("entries", [1, 6, 129])
@pytest.mark.parametrize("form", FORMS["sums"])
def test_sums_by_bucket(rng, form, entries):
    apart = (10 ** rng.uniform(0, 9.6, (3, 7, 29))).astype(np.uint32)
    d_out = draw(rng, 3, 7, 29)
    wanted = np.zeros(entries)
    np.add.at(
        wanted, [oracle.bucket(x, entries - 1) for x in apart.ravel()], np.float64(d_out.ravel())
    )
    close(form(jnp.zeros(entries), jnp.asarray(apart), jnp.asarray(d_out)), wanted, 2e-6)


def next_times(times, valid, ids):
    found = times.copy()
    for b, i in np.ndindex(*times.shape):
        behind = [j for j in range(i + 1, times.shape[1]) if valid is None or valid[b, j]]
        if behind and (ids is None or ids[b, behind[0]] == ids[b, i]):
            found[b, i] = times[b, behind[0]]
    return found


@pytest.mark.parametrize("form", FORMS["next"])
@pytest.mark.parametrize("masks", ["none", "valid", "ids", "both"])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_the_time_of_the_next_event(rng, form, masks, length):
    times = rng.integers(-(2**31), 2**31, (6, length)).astype(np.int32)
    valid = rng.random((6, length)) < 0.6 if masks in ("valid", "both") else None
    ids = np.sort(rng.integers(0, 4, (6, length))).astype(np.int32)
    ids = ids if masks in ("ids", "both") else None
    given = [None if x is None else jnp.asarray(x) for x in (times, valid, ids)]
    np.testing.assert_array_equal(form(*given), next_times(times, valid, ids))


@pytest.mark.parametrize("form", FORMS["toeplitz"])
@pytest.mark.parametrize("size", [1, 2, 7, 128, 129, 300])
def test_toeplitz_matrices_and_their_transpose(rng, form, size):
    values, d_out = draw(rng, 2, 3, 2 * size - 1), draw(rng, 2, 3, size, size)
    out, pull = jax.vjp(form, jnp.asarray(values))
    (d_values,) = pull(jnp.asarray(d_out))
    lags = np.subtract.outer(np.arange(size), np.arange(size))
    np.testing.assert_array_equal(out, values[..., size - 1 + lags])
    wanted = np.stack([d_out[..., lags == lag].sum(-1) for lag in range(1 - size, size)], axis=-1)
    close(d_values, wanted, 1e-6)


@pytest.mark.parametrize("length", [21, 1030])
def test_hstu_as_accelerators_compute_it(rng, on_an_accelerator, length):
    """The short form and the one in tiles, values and gradients."""
    heads, width = 1, 2
    arrays = [*qkv(rng, 1, length, heads, width, width), draw(rng, 2 * length - 1), draw(rng, 9)]
    gaps = np.floor(10 ** rng.uniform(-1, 4, (1, length)))
    times = (1_600_000_000 + np.cumsum(gaps, axis=1)).astype(np.int32)
    valid, ids = cases.rows("packed_holes", 1, length)
    d_out = draw(rng, 1, length, heads, width)

    def f(q, k, v, positions, table, **rest):
        tables = {"position_table": positions, "time_table": table}
        return ops.hstu_attention(q, k, v, normalizer=17, scale=0.7, **tables, **rest)

    masks = {"timestamps": times, "valid": valid, "segment_ids": ids}
    out, gradients = gradients_of(functools.partial(f))(arrays, d_out, **masks)
    options = {"normalizer": 17, "scale": 0.7, **masks}
    close(out, oracle.hstu_attention(*arrays, **options), 2e-5)
    wanted = oracle.hstu_attention(*arrays, d_out, **options)
    for name, got, want in zip(("q", "k", "v", "p", "t"), gradients, wanted, strict=True):
        close(got, want, 2e-5, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_best_items_as_a_tpu_scores_them(rng, monkeypatch, dtype):
    """The table is cut along its turned columns; the last block of 8 begins early."""
    asked = []

    def on_a_tpu(default, kernels, *operands):
        asked.append(default)
        return kernels["tpu"](*operands)

    monkeypatch.setattr(_catalogue_top_k, "platform_switch", on_a_tpu)
    hidden, table = (draw(rng, *shape).astype(dtype) for shape in ((5, 3), (29, 3)))
    scores, ids = ops.top_k_items(jnp.asarray(hidden), jnp.asarray(table), 4, item_block=8)
    assert asked
    wanted = np.float64(hidden) @ np.float64(table).T
    order = np.argsort(-wanted, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(ids, order)
    close(scores, np.take_along_axis(wanted, order, 1), 1e-6)
