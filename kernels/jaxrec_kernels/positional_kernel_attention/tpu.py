"""Positional kernel attention on TPU, whole sequences in VMEM: forward and backward.

Why a kernel. Composed, the op writes mixed keys and values, logits or weights and their gradients
to HBM: at [128, 200, 1, 64] in bfloat16 three squares of 128 x 200 x 256 float32 numbers (26 MB
each) besides twelve arrays of the input's size (padded to 128 lanes, 6.5 MB each). Here the squares
and the mixed arrays stay in VMEM: forward reads q, k, v and writes o; backward reads q, k, v, o, do
and writes dq, dk, dv; the operators of the mix are read once. FLOPs a sequence and head, causal
half: 4 n^2 d forward (two mixes, two products), 11 n^2 d backward (the two mixes and the logits
again, four products of the attention, four of the mixes). At [128, 200, 1, 64]: 4.9 GFLOP, 25 us at
a v5e's 197 TFLOP/s; 79 MB, 96 us at its 819 GB/s, half of which the padding of 64 lanes costs.

Logits are held transposed, keys down and queries along the lanes: the statistics of the softmax are
then rows, which reduce and broadcast over sublanes, and every product that backward needs is a
plain one or has a narrow operand transposed, never a square one.

A *slab* is an array [length, lanes]: some heads of a batch row side by side in the lanes, or of
several batch rows where one fills less than half of them. Its *members* share a product where their
operator is the same; in the logits a member is picked by zeroing the other lanes of one operand,
which costs the MXU nothing below 128 lanes and moves no lanes.

The slabs of a *group* are computed at once, in stages that hand over through VMEM. A product comes
out of the matrix unit some hundred cycles after its operands went in, as long as a tile takes by
itself; so a stage is for many tiles, none of which waits for another, and keeps little in registers
for each: forward logits with their maxima, then weights with their sums, then one product along all
keys; backward both squares, then the products with them. A row of weights is whole in VMEM, and
nothing is rescaled as more keys come. Where a lot of tiles is in one stage, the next lot is in the
stage before. The compiler would begin everything as early as it can and spill; conditions that it
cannot see through hold it back (`Group.alone`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrec_kernels import compat
from jaxrec_kernels.attention_dropout import seed_words
from jaxrec_kernels.positional_kernel_attention.attention import backward_group, forward_group
from jaxrec_kernels.positional_kernel_attention.slab import Group, Slab, buffers, fill_ids
from jaxrec_kernels.positional_kernel_attention.spec import (
    BACKWARD,
    FORWARD,
    VMEM_BYTES,
    Mix,
    Spec,
    size_of,
    tuned_cut,
)
from jaxrec_kernels.tracing import traced_once

_F32 = jnp.float32


class Arrays(NamedTuple):
    """The operands: arrays of the op, and operators as squares."""

    query: Array  # [batch, length, heads, head_dim]
    key: Array
    value: Array
    ids: Array | None  # int32[batch, length], NOBODY for padding
    seeds: Array | None  # uint32[2]
    logit_table: Array | None  # [1 or heads, length, length], lower triangular
    value_table: Array | None


def _spec(
    kernel: str,
    arrays: Arrays,
    scale: float,
    rate: float,
    bands: tuple[int, int],
    segmented: bool,
) -> Spec:
    size = size_of(arrays.query, (arrays.logit_table, arrays.value_table))
    batch, length, heads, head_dim, slab_heads, *_ = size

    def mix(table: Array | None, band: int) -> Mix:
        groups = 0 if table is None else min(table.shape[0], slab_heads)
        return Mix(groups, min(band, length))

    cut = tuned_cut(kernel, size)

    return Spec(
        batch=batch,
        length=length,
        heads=heads,
        head_dim=head_dim,
        scale=scale,
        dropout_rate=rate,
        logits=mix(arrays.logit_table, bands[0]),
        values=mix(arrays.value_table, bands[1]),
        masked=arrays.ids is not None,
        segmented=segmented,
        rows=cut.rows,
        packed=cut.packed,
        slab_heads=slab_heads,
        regions=size.regions,
    )


class _Operands:
    """Collects what a kernel reads and writes: arrays, blocks and names."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.names: list[str] = []
        self.values: list[Any] = []
        self.blocks: list[pl.BlockSpec] = []

    def add(self, name: str, value: Any, block: pl.BlockSpec) -> None:
        self.names.append(name)
        self.values.append(value)
        self.blocks.append(block)

    def wide(self, name: str, value: Any) -> None:
        """[batch, length, heads * head_dim], a slab of some rows a program."""
        spec = self.spec
        shape = (spec.rows, spec.length, spec.block_lanes)
        self.add(name, value, pl.BlockSpec(shape, lambda slab, row: (row, 0, slab)))

    def statistics(self, name: str, value: Any) -> None:
        """[slabs, batch, heads of a slab, length]."""
        spec = self.spec
        shape = (None, spec.rows, spec.slab_heads, spec.length)
        self.add(name, value, pl.BlockSpec(shape, lambda slab, row: (slab, row, 0, 0)))

    def ids(self, value: Array | None) -> None:
        if value is not None:
            shape = (self.spec.rows, 1, self.spec.length)
            self.add("ids", value[:, None], pl.BlockSpec(shape, lambda slab, row: (row, 0, 0)))

    def seeds(self, value: Array | None) -> None:
        if value is not None:
            self.add("seeds", seed_words(value), pl.BlockSpec(memory_space=pltpu.SMEM))

    def table(self, name: str, value: Any) -> None:
        """[1 or heads, length, length]: fetched once, or once a slab."""
        if value is not None:
            groups, side = value.shape[0], value.shape[1]
            if groups == 1:
                self.add(name, value, pl.BlockSpec((1, side, side), lambda slab, row: (0, 0, 0)))
            else:
                shape = (self.spec.slab_heads, side, side)
                self.add(name, value, pl.BlockSpec(shape, lambda slab, row: (slab, 0, 0)))


def _wide(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1)


def _call(
    spec: Spec,
    body: Callable[..., None],
    given: _Operands,
    made: _Operands,
    *,
    scratch: dict[str, Any],
    parallel: bool,
    name: str,
    interpret: Any,
) -> list[Array]:
    names = [*given.names, *made.names, *scratch]

    def kernel(*refs: Any) -> None:
        body(dict(zip(names, refs, strict=True)))

    kind = "parallel" if parallel else "arbitrary"
    results: list[Array] = pl.pallas_call(
        kernel,
        grid=spec.grid,
        in_specs=given.blocks,
        out_specs=made.blocks,
        out_shape=[compat.like(given.values, value) for value in made.values],
        scratch_shapes=list(scratch.values()),
        compiler_params=compat.compiler_params(
            dimension_semantics=(kind, kind), vmem_limit_bytes=VMEM_BYTES
        ),
        name=name,
        interpret=interpret,
    )(*given.values)
    return results


@traced_once("scale", "dropout_rate", "bands", "segmented", "interpret")
def forward(
    arrays: Arrays,
    *,
    scale: float,
    dropout_rate: float,
    bands: tuple[int, int],
    segmented: bool,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Output [batch, length, heads, head_dim] and log-sum-exp float32[batch, heads, length].

    Args:
      arrays: the operands.
      scale: of the logits.
      dropout_rate: of the weights.
      bands: entries of the operators this far or further below the diagonal are zero.
      segmented: the mix must not cross from one id to another.
      interpret: as in `pallas_call`.
    """
    spec = _spec(FORWARD, arrays, scale, dropout_rate, bands, segmented)
    given, made = _Operands(spec), _Operands(spec)
    given.wide("q", _wide(arrays.query))
    given.wide("k", _wide(arrays.key))
    given.wide("v", _wide(arrays.value))
    given.ids(arrays.ids)
    given.seeds(arrays.seeds)
    dtype = arrays.query.dtype
    given.table("logit_table", _as(dtype, arrays.logit_table))
    given.table("value_table", _as(dtype, arrays.value_table))
    made.wide("o", jax.ShapeDtypeStruct(given.values[0].shape, arrays.value.dtype))
    made.statistics("lse", jax.ShapeDtypeStruct(_statistics_shape(spec), _F32))

    def body(refs: dict[str, Any]) -> None:
        _each_group(spec, refs, forward_group)

    out, lse = _call(
        spec,
        body,
        given,
        made,
        scratch=buffers(spec, arrays.query.dtype, backward=False),
        parallel=True,
        name=FORWARD,
        interpret=interpret,
    )
    return out.reshape(arrays.value.shape), _from_slabs(spec, lse)


class Gradients(NamedTuple):
    query: Array
    key: Array
    value: Array
    logit_table: (
        Array | None
    )  # float32[1 or heads, length, length]; zero or not, above the diagonal
    value_table: Array | None


@traced_once("scale", "dropout_rate", "bands", "segmented", "interpret")
def backward(
    arrays: Arrays,
    out: Array,
    log_sum_exp: Array,
    d_out: Array,
    *,
    scale: float,
    dropout_rate: float,
    bands: tuple[int, int],
    segmented: bool,
    interpret: Any = False,
) -> Gradients:
    """Gradients of all arrays; arguments as in `forward`, and its results."""
    spec = _spec(BACKWARD, arrays, scale, dropout_rate, bands, segmented)
    given, made = _Operands(spec), _Operands(spec)
    given.wide("q", _wide(arrays.query))
    given.wide("k", _wide(arrays.key))
    given.wide("v", _wide(arrays.value))
    given.wide("o", _wide(out))
    given.wide("do", _wide(d_out))
    given.statistics("lse", _to_slabs(spec, log_sum_exp))
    given.ids(arrays.ids)
    given.seeds(arrays.seeds)
    shape = given.values[0].shape
    for name, x in (("dq", arrays.query), ("dk", arrays.key), ("dv", arrays.value)):
        made.wide(name, jax.ShapeDtypeStruct(shape, x.dtype))
    for name, table in (("logit", arrays.logit_table), ("value", arrays.value_table)):
        if table is not None:
            given.table(f"{name}_table", _as(arrays.query.dtype, table))
            turned = jnp.swapaxes(table, 1, 2)
            given.table(f"{name}_table_turned", _as(arrays.query.dtype, turned))
            made.table(f"d_{name}_table", jax.ShapeDtypeStruct(table.shape, _F32))
    scratch = buffers(spec, arrays.query.dtype, backward=True)

    def body(refs: dict[str, Any]) -> None:
        for name, table in (("logit", arrays.logit_table), ("value", arrays.value_table)):
            if table is not None:
                first = pl.program_id(1) == 0
                if table.shape[0] == 1:
                    first = first & (pl.program_id(0) == 0)
                _zero_when(first, refs[f"d_{name}_table"])
        _each_group(spec, refs, backward_group)

    results = _call(
        spec,
        body,
        given,
        made,
        scratch=scratch,
        parallel=False,
        name=BACKWARD,
        interpret=interpret,
    )
    found = dict(zip(made.names, results, strict=True))
    return Gradients(
        found["dq"].reshape(arrays.query.shape),
        found["dk"].reshape(arrays.key.shape),
        found["dv"].reshape(arrays.value.shape),
        found.get("d_logit_table"),
        found.get("d_value_table"),
    )


def _zero_when(condition: Any, ref: Any) -> None:
    @pl.when(condition)
    def _() -> None:
        ref[...] = jnp.zeros_like(ref)


def _each_group(spec: Spec, refs: dict[str, Any], one: Callable[[Group], None]) -> None:
    """Runs `one` on all slabs of the program."""
    first_head = pl.program_id(0) * spec.slab_heads
    first_row = pl.program_id(1) * spec.rows

    def slab(first: Any, number: int) -> Slab:
        row = (first + number) * spec.packed
        return Slab(spec, refs, number, first_head, row, first_row + row)

    def some(number: Any) -> None:
        first = number * spec.together
        one(Group(spec, refs, [slab(first, i) for i in range(spec.together)]))

    fill_ids(spec, refs)
    groups = spec.rows // spec.packed // spec.together
    if groups == 1:
        some(0)
    else:
        lax.fori_loop(0, groups, lambda i, _: some(i), None)


def _as(dtype: Any, table: Array | None) -> Array | None:
    return None if table is None else table.astype(dtype)


def _statistics_shape(spec: Spec) -> tuple[int, ...]:
    return (spec.heads // spec.slab_heads, spec.batch, spec.slab_heads, spec.length)


def _from_slabs(spec: Spec, x: Array) -> Array:
    return jnp.swapaxes(x, 0, 1).reshape(spec.batch, spec.heads, spec.length)


def _to_slabs(spec: Spec, x: Array) -> Array:
    slabs = spec.heads // spec.slab_heads
    return jnp.swapaxes(x.reshape(spec.batch, slabs, spec.slab_heads, spec.length), 0, 1)
