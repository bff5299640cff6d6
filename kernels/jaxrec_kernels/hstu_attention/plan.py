"""How a call is cut: programs, blocks of a row, chunks of a block, bundles of heads."""

from functools import partial
from typing import Any, NamedTuple

from jaxrec_kernels import LANES, tuning

FORWARD, BACKWARD = "hstu_attention_forward", "hstu_attention_backward"
# Of a row that is cut; a shorter one is a block by itself.
LARGEST_BLOCK = 512
# That a tuning table may ask for.
LONGEST_BLOCK = 1024
# Rows of a program at most: more hide the start of a program behind no more work.
MOST_SEQUENCES = 8
# Rows so short that two together still fit the registers.
_SHORT = 64
# What a program may take of the vector memory: half of a v5e's or v6e's.
VMEM_BYTES = 64 << 20
# Left to the compiler.
SPARE_BYTES = 8 << 20
# What a kernel gets that asks for nothing.
DEFAULT_BYTES = 16 << 20
# In a table that is read by bucket, and in its gradient.
BUCKETS = 80
SUBLANES = 8


class Size(NamedTuple):
    """Sizes of a call; `itemsize` is of the wider of queries and values, `fields` counts facts."""

    batch: int
    length: int
    heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    fields: int


def size_of(query: Any, value: Any, fields: int) -> Size:
    """The sizes of arrays, or of shapes with dtypes."""
    batch, length, heads, head_dim = query.shape
    itemsize = max(query.dtype.itemsize, value.dtype.itemsize)
    return Size(batch, length, heads, head_dim, value.shape[3], itemsize, fields)


class Plan(NamedTuple):
    """A program takes `sequences` rows of the batch and `group` heads through a pair of blocks.

    A row that fits one block is one, whatever its length; otherwise blocks are whole chunks of
    `LANES`, and a program takes one row. A bundle is as many heads as fill whole registers.
    """

    block: int
    blocks: int
    sequences: int
    together: int  # of the sequences, so many are scheduled as one
    group: int
    bundle: int

    @property
    def whole(self) -> bool:
        """One block covers a row."""
        return self.blocks == 1

    @property
    def chunks(self) -> int:
        """Chunks of a block; the last one of a whole row may be a ragged one."""
        return -(-self.block // LANES)

    @property
    def distances(self) -> int:
        """How many chunks apart two events of a row can be, none included."""
        return self.chunks * self.blocks

    @property
    def filled(self) -> int:
        """Length of a row of facts, filled up to whole chunks."""
        return self.distances * LANES

    def chunk(self, index: int) -> int:
        """The size of a chunk of a block."""
        return min(LANES, self.block - index * LANES)


def plan_for(size: Size) -> Plan | None:
    """The largest programs that fit the vector memory, backward too; None where none does."""
    blocks = -(-size.length // LARGEST_BLOCK)
    block = size.length if blocks == 1 else -(-size.length // (blocks * LANES)) * LANES
    bundle = bundle_of(size)
    groups = [g for g in range(size.heads, 0, -1) if size.heads % g == 0 and g % bundle == 0]
    rows = [s for s in range(MOST_SEQUENCES, 0, -1) if size.batch % s == 0] if blocks == 1 else [1]
    for group in groups:
        for sequences in rows:
            together = 2 if size.length <= _SHORT and sequences % 2 == 0 else 1
            plan = Plan(block, blocks, sequences, together, group, bundle)
            if vmem_bytes(size, plan) <= VMEM_BYTES - SPARE_BYTES:
                return plan
    return None


def tuned_plan(kernel: str, size: Size, times: bool) -> Plan | None:
    """That of the tuning table for such a call, where there is one that fits; else `plan_for`.

    Args:
      kernel: the name given to `pl.pallas_call`.
      size: of the call.
      times: whether there is a bias by time.
    """
    return tuning.tuned(
        kernel, call_class(size, times), partial(fit, size), partial(plan_for, size)
    )


def call_class(size: Size, times: bool) -> dict[str, int]:
    """What tells calls apart in a tuning table; batches of all sizes are cut alike."""
    return {
        "length": size.length,
        "heads": size.heads,
        "head_dim": size.head_dim,
        "value_dim": size.value_dim,
        "itemsize": size.itemsize,
        "times": int(times),
    }


def fit(size: Size, *, block: int, sequences: int, together: int, group: int) -> Plan | None:
    """The plan with these sizes, as in `Plan`; None where the call cannot be cut so."""
    bundle = bundle_of(size)
    blocks = -(-size.length // block)
    whole = blocks == 1
    if (
        (block != size.length if whole else block % LANES or sequences > 1)
        or block > LONGEST_BLOCK
        or size.batch % sequences
        or sequences % together
        or size.heads % group
        or group % bundle
    ):
        return None
    plan = Plan(block, blocks, sequences, together, group, bundle)
    return plan if vmem_bytes(size, plan) <= VMEM_BYTES - SPARE_BYTES else None


def bundle_of(size: Size) -> int:
    """The fewest heads whose vectors begin and end at a register's edge, or all of them."""
    for heads in range(1, size.heads):
        whole = heads * size.head_dim % LANES == 0 and heads * size.value_dim % LANES == 0
        if whole and size.heads % heads == 0:
            return heads
    return size.heads


def vmem_bytes(size: Size, plan: Plan) -> int:
    """Of the backward kernel, which takes more than the forward one."""
    rows = plan.sequences * up_to(plan.block, 2 * SUBLANES)
    query, value = (up_to(plan.group * width, LANES) for width in (size.head_dim, size.value_dim))
    # Operands are there twice, one for the next program: q, k, v, dO and dQ, dK, dV.
    operands = 2 * rows * (4 * query + 3 * value) * size.itemsize
    facts = rows * size.fields * LANES * 4 + 2 * 2 * plan.sequences * 8 * plan.chunks * LANES * 4
    cleaned = rows * (2 * query + value) * size.itemsize
    sums = rows * (query + value) * 4 + plan.blocks * rows * query * 4
    squares = rows * plan.chunks * LANES * (3 * 4 + 2 * size.itemsize)
    tables = 3 * plan.distances * LANES * LANES * 4 + 2 * BUCKETS * SUBLANES * LANES * 4
    return operands + facts + cleaned + sums + squares + tables


def up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
