"""What `supports` lets through has blocks: a rule without any for a shape would fail a user's call.

On every platform, since the TPU's branch is traced everywhere. Mutation seen to fail: heads wider
than the lanes left to the rule of those that fill a part of them.
"""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.ops import _catalogue_kernel, _positional_kernel_core
from jaxrec_kernels import LANES, hstu_attention, positional_kernel_attention, tuning
from jaxrec_kernels.generations import V5E, V6E
from jaxrec_kernels.positional_kernel_attention import spec
from jaxrec_kernels.positional_kernel_attention.spec import Cut

DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16])
WIDTHS = st.one_of(st.integers(1, 256), st.sampled_from([16, 32, 64, 128, 256]))
HEADS = {
    "batch": st.integers(1, 200),
    "length": st.one_of(st.integers(1, 1100), st.integers(1, 20_000)),
    "heads": st.integers(1, 16),
    "dtype": DTYPES,
    "width": WIDTHS,
}
EXAMPLES = settings(max_examples=300, deadline=None)


@EXAMPLES
@given(**HEADS, operators=st.sampled_from([(), (1,), (1, 1), (0, 1), (0, 0)]))
def test_positional_kernel_attention(batch, length, heads, width, dtype, operators):
    query = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    if positional_kernel_attention.supports(query, query) is not None:
        return
    # One for all heads, or (0) one a head.
    kernels = tuple(jnp.zeros((count or heads, 1, 1)) for count in operators)
    kernels += (None,) * (2 - len(kernels))
    cut = _positional_kernel_core.look_up(query, kernels)
    if isinstance(cut, Cut):
        assert batch % cut.rows == 0
        assert cut.rows % cut.packed == 0
        assert cut.packed == 1 or cut.packed * heads * width <= LANES


@pytest.mark.parametrize("kind", [V5E[0], V6E[0]])
@pytest.mark.parametrize("length", [268, 300, 490])
def test_wide_slabs_fit_the_memory(kind, length):
    """As many at once as fit, where a chip schedules more of them together than others do."""
    query = jax.ShapeDtypeStruct((8, length, 8, 256), jnp.float32)
    with tuning.compiling_for(kind):
        size = spec.size_of(query, (jnp.zeros((1, 1, 1)), None))
    assert spec.vmem_bytes(size, spec.cut_for(size)) <= spec.VMEM_BYTES - spec.SPARE_BYTES


@EXAMPLES
@given(**HEADS, value_width=WIDTHS, times=st.booleans(), candidates=st.booleans())
def test_hstu_attention(batch, length, heads, width, dtype, value_width, times, candidates):
    query = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    value = query.update(shape=(batch, length, heads, value_width))
    integers = (jax.ShapeDtypeStruct((batch, length), jnp.int32),) if times else ()
    table = jnp.zeros(129) if times else None
    reason = hstu_attention.supports(
        query, value, tables=(table,), integers=integers, candidates=candidates
    )
    if reason is None:
        assert hstu_attention.look_up(query, value, integers, table, candidates) is not None


@EXAMPLES
@given(
    positions=st.integers(1, 60_000),
    items=st.integers(1, 20_000_000),
    width=WIDTHS,
    dtype=DTYPES,
    biased=st.booleans(),
)
def test_catalogue_losses(positions, items, width, dtype, biased):
    hidden = jax.ShapeDtypeStruct((positions, width), dtype)
    table = jax.ShapeDtypeStruct((items, width), dtype)
    if _catalogue_kernel.unsupported(hidden) is None:
        blocks = _catalogue_kernel.look_up(hidden, table, True if biased else None)
        assert min(blocks) >= 1
