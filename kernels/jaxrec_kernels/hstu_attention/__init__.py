"""Pointwise attention of HSTU: what the kernels take; they themselves are imported when traced.

Why kernels. Composed, the op writes the biases, logits and weights of a row to HBM, squares of
`length * length` numbers, some of them for every head, and reads one again for every bucket of the
time table's gradient, 74 times. Here the squares stay in VMEM, a tile at a time: forward reads q, k
and v and writes o; backward reads q, k, v, dO and writes dQ, dK, dV.

A causal half takes `2 n^2 d` FLOPs forward and `5 n^2 d` backward a head and sequence (q k^T and
w v; q k^T again, dO v^T, dw^T q, w^T dO, dw k). At [128, 200, 1, 64] in bfloat16 that is 0.7 GFLOP
forward and 1.6 backward, 3 and 8 us at a v5e's 197 TFLOP/s, against 26 and 46 MB (64 lanes fill up
to 128), 32 and 56 us at its 819 GB/s; on an H100 with 990 TFLOP/s and 3.35 TB/s 1 and 2 us, and
4 and 7 us for the half of those bytes that is data. A square of float32 logits alone is 33 MB more.
At [4, 8192, 8, 128]: 0.55 TFLOP forward, 2.8 ms, and 1.4 TFLOP backward, 7 ms, against 0.3 and
0.5 GB; one square of float32 logits would be 8.6 GB.

Nearer to the truth is what runs beside the products on every pair of events: some 15 operations of
the vector unit for SiLU and the mask, and 25 more, with two look-ups, for a bias by time, which is
formed once for all heads. The time table's gradient is dearest, since a TPU cannot scatter: three
operations for each bucket between the least and the largest of a tile, of the sum over heads.
"""

from typing import Any

from jaxrec_kernels.hstu_attention.plan import FORWARD, plan_for, size_of, tuned_plan

_FLOATS = ("float32", "bfloat16")
_WIDEST_HEAD = 256


def supports(
    query: Any,
    value: Any,
    *,
    tables: tuple[Any, ...] = (),
    integers: tuple[Any, ...] = (),
    candidates: bool = False,
) -> str | None:
    """Why the kernels cannot take these arrays (or shapes with dtypes); None if they can.

    `tables`, `integers`: the bias tables; timestamps and segment ids. None among them is no array.
    """
    _, length, heads, head_dim = query.shape
    value_dim = value.shape[3]
    for x in (query, value, *tables):
        if x is not None and x.dtype.name not in _FLOATS:
            return f"the kernel is for float32 and bfloat16, not {x.dtype.name}"
    for x in integers:
        if x is not None and x.dtype.itemsize > 4:
            return f"the kernel is for integers of up to 32 bits, not {x.dtype.name}"
    if 0 in (*query.shape, *value.shape):
        return "there is nothing to compute"
    if max(head_dim, value_dim) > _WIDEST_HEAD:
        return f"the kernel is for heads of up to {_WIDEST_HEAD}, not {max(head_dim, value_dim)}"
    if plan_for(size_of(query, value, _fields(integers, candidates))) is None:
        return (
            f"rows of {length} events with {heads} heads of {max(head_dim, value_dim)} "
            "do not fit the kernel's memory"
        )
    return None


def look_up(
    query: Any, value: Any, integers: tuple[Any, ...], time_table: Any, candidates: bool
) -> Any:
    """The plan of the forward kernel; arguments as of `supports`."""
    size = size_of(query, value, _fields(integers, candidates))
    return tuned_plan(FORWARD, size, time_table is not None)


def _fields(integers: tuple[Any, ...], candidates: bool) -> int:
    """Numbers that are read of each event beside its vectors."""
    return 1 + sum(x is not None for x in integers) + 2 * candidates
