"""Calls of positional kernel attention, and its TPU kernels interpreted; shared by their tests."""

import functools
from contextlib import contextmanager

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import draw
from jax.experimental.pallas import tpu as pltpu

from jaxrec import ops
from jaxrec.ops import _dispatch, _positional_kernel_core
from jaxrec_kernels.long_attention import tpu as long_rows
from jaxrec_kernels.positional_kernel_attention import tpu as whole_rows
from jaxrec_kernels.tracing import forget_traces

pka = ops.positional_kernel_attention

TAPS, FULL, NONE = "toeplitz", "full", "identity"


@contextmanager
def on_kernel(interpret=True):
    """Inside, ops run their TPU kernel, interpreted."""

    def forced(xla, kernels, *operands):
        return kernels["tpu"](*operands) if "tpu" in kernels else switch(xla, kernels, *operands)

    switch = _dispatch.platform_switch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_positional_kernel_core, "platform_switch", forced)
        for name in ("forward", "backward"):
            for tpu in (whole_rows, long_rows):
                run = functools.partial(getattr(tpu, name), interpret=interpret)
                patch.setattr(tpu, name, run)
        # What was traced outside does not hold inside, nor the other way around.
        _positional_kernel_core.attend.clear_cache()
        forget_traces()
        yield
    _positional_kernel_core.attend.clear_cache()
    forget_traces()


class Case:
    """Arrays of a call of the op, and the call."""

    def __init__(
        self, shape, pattern, structure, *, dtype=jnp.float32, heads=None, band=None, rate=0.0
    ):
        batch, length, count, width = shape
        rng = np.random.default_rng(7)
        self.valid, self.ids = cases.rows(pattern, batch, length)
        q, k, v = cases.qkv(rng, batch, length, count, width, width)

        def factor(name):
            if name == NONE:
                return None
            lead = () if heads is None else (heads,)
            inner = (band or length,) if name == TAPS else (length, length)
            return draw(rng, *lead, *inner) * 0.3

        self.structure, self.rate = structure, rate
        self.factors = [factor(name) for name in structure]
        self.arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
        self.arrays += [jnp.asarray(x) for x in self.factors if x is not None]
        self.d_out = jnp.asarray(draw(rng, batch, length, count, width), dtype)

    def op(self, q, k, v, *factors):
        given = iter(factors)
        u, w = (None if factor is None else next(given) for factor in self.factors)
        return pka(
            q,
            k,
            v,
            u,
            w,
            structure=self.structure,
            valid=self.valid,
            segment_ids=self.ids,
            dropout_rate=self.rate,
            dropout_key=jax.random.key(3),
        )

    def run(self, arrays=None):
        def both(arrays, d_out):
            out, pull = jax.vjp(self.op, *arrays)
            return [out, *pull(d_out)]

        arrays = self.arrays if arrays is None else arrays
        return jax.jit(both, compiler_options=cases.QUICK)(arrays, self.d_out)

    def names(self):
        factors = zip("ul", self.factors, strict=True)
        return ["out", "dq", "dk", "dv", *(f"d{n}" for n, x in factors if x is not None)]


def run_on_kernel(case, interpret=True, arrays=None):
    with on_kernel(interpret):
        return case.run(arrays)


# Fills what was never written with NaN; several times slower.
NAN = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
RACES = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
