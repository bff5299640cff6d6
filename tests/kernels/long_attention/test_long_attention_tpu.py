"""The TPU kernels for long rows, interpreted with short blocks, against the op's XLA form in
float32 and the literal float64 form.

Mutations seen to fail: `<` for `<=` in the causal mask, a band that reaches a block less, the
segment mask left out of the mix or of the operator's gradient, padding not cleaned (NaN), blocks
that share one id not met, gradients of queries not begun at zero, dK' without the logits' factor in
the operator's gradient, the operator not turned for dK.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close
from oracles import positional_kernel as oracle
from positional_kernel_cases import FULL, NAN, NONE, RACES, TAPS, Case, on_kernel, run_on_kernel

from jaxrec import ops
from jaxrec.ops import _positional_kernel_core
from jaxrec_kernels import tuning
from jaxrec_kernels.generations import V5E, V6E
from jaxrec_kernels.long_attention import plan


@pytest.fixture(autouse=True)
def short_rows_are_long(monkeypatch):
    """Rows beyond 64 are cut, into blocks of a tile."""
    monkeypatch.setattr(_positional_kernel_core, "LONGEST_WHOLE", 64)
    monkeypatch.setattr(plan, "_LARGEST_BLOCK", 128)


GRID = [
    ((2, 256, 1, 64), "plain", (TAPS, TAPS), {}),
    ((2, 300, 2, 64), "packed_holes", (TAPS, TAPS), {"heads": 2}),
    ((1, 300, 2, 32), "left", (FULL, TAPS), {"band": 40}),
    ((2, 200, 2, 128), "empty_rows", (TAPS, FULL), {"heads": 2}),
    ((2, 200, 1, 16), "interleaved", (NONE, NONE), {"rate": 0.3}),
    ((1, 140, 2, 16), "packed", (NONE, TAPS), {"rate": 0.3}),
]


def compare(case):
    got = run_on_kernel(case)
    for name, a, b in zip(case.names(), got, case.run(), strict=True):
        assert a.dtype == b.dtype
        close(a, b, 5e-6, name)


@pytest.mark.parametrize(
    ("shape", "pattern", "structure", "options"), GRID, ids=[f"{s}-{p}" for s, p, *_ in GRID]
)
def test_values_and_gradients_are_those_of_xla(shape, pattern, structure, options):
    compare(Case(shape, pattern, structure, **options))


@pytest.mark.parametrize(("kind", "length"), [(V5E[0], 500), (V6E[0], 400)])
def test_blocks_of_several_tiles(kind, length, monkeypatch):
    """In the order of each chip; of other lengths, so that nothing traced for one serves both."""
    monkeypatch.setattr(plan, "_LARGEST_BLOCK", 256)
    with tuning.compiling_for(kind):
        compare(Case((1, length, 1, 16), "packed", (TAPS, TAPS)))


def test_the_literal_form_in_float64():
    case = Case((1, 200, 2, 16), "packed_holes", (TAPS, TAPS), heads=2, band=150)
    got = run_on_kernel(case)[0]
    q, k, v, u, w = map(np.asarray, case.arrays)
    wanted = oracle.positional_kernel_attention(
        q, k, v, u, w, structure=(TAPS, TAPS), valid=case.valid, segment_ids=case.ids
    )
    close(got, wanted, 2e-6)


def test_no_races_and_bfloat16():
    shape = (2, 200, 1, 64)
    case = Case(shape, "packed", (TAPS, TAPS), dtype=jnp.bfloat16)
    got = run_on_kernel(case, RACES)
    exact = Case(shape, "packed", (TAPS, TAPS))
    rounded = [x.astype(jnp.float32) for x in case.arrays]
    exact.d_out = case.d_out.astype(jnp.float32)
    for name, a, b in zip(case.names(), got, exact.run(rounded), strict=True):
        close(a.astype(jnp.float32), b, 2e-2, name)


def test_padding_and_what_was_never_written_are_read_by_nobody():
    case = Case((2, 200, 2, 32), "packed_holes", (TAPS, TAPS))
    hole = jnp.asarray(~case.valid)[:, :, None, None]
    dirty = [jnp.where(hole, jnp.nan, x) for x in case.arrays[:3]] + case.arrays[3:]
    clean = run_on_kernel(case)
    case.d_out = jnp.where(hole, jnp.nan, case.d_out)
    for name, a, b in zip(case.names(), run_on_kernel(case, NAN, dirty), clean, strict=True):
        close(a, b, 2e-6, name)
        if name in ("out", "dq", "dk", "dv"):
            assert not np.asarray(a)[~case.valid].any(), name


def test_rows_of_a_vmapped_call_are_its_own():
    case = Case((2, 140, 1, 16), "packed", (TAPS, TAPS))

    def one(q, k, v, ids, valid):
        return ops.positional_kernel_attention(
            q[None], k[None], v[None], *case.arrays[3:], segment_ids=ids[None], valid=valid[None]
        )[0]

    run = jax.jit(jax.vmap(one))
    with on_kernel():
        got = run(*case.arrays[:3], jnp.asarray(case.ids), jnp.asarray(case.valid))
    close(got, case.run()[0], 5e-6)
