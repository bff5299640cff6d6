"""The TPU kernel of positional kernel attention, interpreted, against the op's XLA form in float32
and the literal float64 form.

Mutations seen to fail: the two triangles swapped, `<` for `<=` in the causal mask, the segment mask
left out of the mix or of the logits, padding not cleaned (NaN), the scale left out of dQ, dK' not
multiplied by it, the operator not turned for dK, a band one too narrow, table gradients overwritten
instead of added, statistics of the wrong head, dropout bits of another row.
"""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close
from oracles import positional_kernel as oracle
from positional_kernel_cases import (
    FULL,
    NAN,
    NONE,
    RACES,
    TAPS,
    Case,
    on_kernel,
    pka,
    run_on_kernel,
)

from jaxrec import ops
from jaxrec.ops._attention_dropout import keep_mask
from jaxrec_kernels.attention_dropout import keep_bits
from jaxrec_kernels.generations import V5E, V6E
from jaxrec_kernels.positional_kernel_attention import spec
from jaxrec_kernels.positional_kernel_attention.regions import regions_for

GRID = [
    ((2, 20, 1, 16), "plain", (TAPS, TAPS), {}),
    ((8, 50, 1, 64), "left", (TAPS, TAPS), {}),
    ((4, 140, 1, 64), "packed_holes", (TAPS, TAPS), {}),
    ((3, 140, 2, 64), "plain", (FULL, TAPS), {}),
    ((3, 140, 2, 64), "empty_rows", (NONE, FULL), {}),
    ((2, 140, 4, 64), "right", (TAPS, TAPS), {"heads": 4}),
    ((4, 72, 2, 32), "packed", (TAPS, NONE), {"heads": 2}),
    ((2, 300, 2, 64), "packed_holes", (TAPS, TAPS), {"band": 10}),
    ((2, 200, 1, 128), "interleaved", (TAPS, TAPS), {"rate": 0.3}),
    ((3, 50, 1, 50), "packed", (NONE, NONE), {"rate": 0.3}),
    # Wider than the lanes.
    ((2, 140, 1, 256), "packed", (TAPS, TAPS), {}),
]


@pytest.mark.parametrize(
    ("shape", "pattern", "structure", "options"), GRID, ids=[f"{s}-{p}" for s, p, *_ in GRID]
)
def test_values_and_gradients_are_those_of_xla(shape, pattern, structure, options):
    case = Case(shape, pattern, structure, **options)
    got = run_on_kernel(case)
    for name, a, b in zip(case.names(), got, case.run(), strict=True):
        assert a.dtype == b.dtype
        close(a, b, 5e-6, name)


@pytest.mark.parametrize(
    ("kind", "shape"), [(V5E[0], (8, 140, 1, 64)), (V6E[0], (2, 300, 2, 64))], ids=["v5e", "v6e"]
)
def test_regions_of_a_chip(monkeypatch, kind, shape):
    """What a chip schedules together changes no value; on a v6e products pass the triangle."""
    monkeypatch.setattr(spec, "regions_for", lambda _, length: regions_for(kind, length))
    case = Case(shape, "packed_holes", (TAPS, FULL), band=140)
    for name, a, b in zip(case.names(), run_on_kernel(case, NAN), case.run(), strict=True):
        close(a, b, 5e-6, name)


def test_the_literal_form_in_float64():
    case = Case((2, 36, 2, 16), "packed_holes", (TAPS, TAPS), heads=2, band=9)
    got = run_on_kernel(case)[0]
    q, k, v, u, w = map(np.asarray, case.arrays)
    wanted = oracle.positional_kernel_attention(
        q, k, v, u, w, structure=(TAPS, TAPS), valid=case.valid, segment_ids=case.ids
    )
    close(got, wanted, 2e-6)


def test_no_races_and_bfloat16():
    case = Case((4, 140, 1, 64), "packed", (TAPS, TAPS), dtype=jnp.bfloat16)
    got = run_on_kernel(case, RACES)
    exact = Case((4, 140, 1, 64), "packed", (TAPS, TAPS))
    rounded = [x.astype(jnp.float32) for x in case.arrays]
    exact.d_out = case.d_out.astype(jnp.float32)
    for name, a, b in zip(case.names(), got, exact.run(rounded), strict=True):
        close(a.astype(jnp.float32), b, 2e-2, name)


def test_padding_and_what_was_never_written_are_read_by_nobody():
    case = Case((4, 40, 1, 64), "packed_holes", (TAPS, TAPS))
    hole = jnp.asarray(~case.valid)[:, :, None, None]
    dirty = [jnp.where(hole, jnp.nan, x) for x in case.arrays[:3]] + case.arrays[3:]
    for name, a, b in zip(
        case.names(), run_on_kernel(case, NAN, dirty), run_on_kernel(case), strict=True
    ):
        close(a, b, 2e-6, name)
        if name in ("out", "dq", "dk", "dv"):
            assert not np.asarray(a)[~case.valid].any(), name


def test_causal_attention_has_the_same_kernel(rng):
    arrays = [jnp.asarray(x) for x in cases.qkv(rng, 2, 30, 2, 16, 16)]
    run = jax.jit(functools.partial(ops.causal_attention, implementation="pallas"))
    with on_kernel():
        got = run(*arrays)
    close(got, ops.causal_attention(*arrays, implementation="xla"), 2e-6)


def test_dropout_bits_are_those_of_the_op():
    seeds = jnp.array([123456789, 4111222333], jnp.uint32)
    batch, heads, length = 2, 3, 37
    wanted = keep_mask(
        seeds,
        0.3,
        batch=batch,
        heads=heads,
        length=length,
        rows=jnp.arange(length),
        cols=jnp.arange(length),
    )
    words = jax.lax.bitcast_convert_type(seeds, jnp.int32)
    row = jnp.arange(batch * heads * length, dtype=jnp.int32).reshape(batch, heads, length, 1)
    column = jnp.arange(length, dtype=jnp.int32).reshape(1, 1, 1, length)
    np.testing.assert_array_equal(keep_bits(words[0], words[1], row, column, 0.3), wanted)


def test_what_runs_is_told():
    def spec(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def asked(*shape, dtype=jnp.float32, **options):
        x = spec(*shape, dtype=dtype)
        taps = spec(shape[1])
        return ops.explain(pka, x, x, x, taps, taps, target="tpu", **options)

    assert asked(4, 200, 1, 64).implementation == "pallas"
    assert asked(4, 200, 1, 64, implementation="xla").implementation == "xla"
    assert asked(4, 2000, 1, 64, implementation="pallas").implementation == "pallas"
    assert "up to 16384, not 20000" in asked(4, 20000, 1, 64).reason
    assert "3 heads of 48" in asked(4, 200, 3, 48).reason
    assert asked(4, 200, 2, 48).implementation == "pallas"
    x = spec(4, 200, 1, 64)
    full = spec(200, 200)
    ids = spec(4, 200, dtype=jnp.int32)
    choice = ops.explain(pka, x, x, x, full, full, structure="full", segment_ids=ids, target="tpu")
    assert "at the slots of a row" in choice.reason
    with pytest.raises(ValueError, match="cannot run: the kernel is for lengths up to 16384"):
        asked(4, 20000, 1, 64, implementation="pallas")
    assert (
        "no bias by distance"
        in ops.explain("causal_attention", x, x, x, distance_bias=spec(200), target="tpu").reason
    )
