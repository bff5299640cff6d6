"""The TPU kernel of HSTU's attention, interpreted, against float64 loops and the op's XLA form.

Mutations seen to fail: `<` for `<=` in the causal mask, segments not compared, candidates that see
each other, the bias of candidates by their own distance, buckets one too large, SiLU's slope
without its second term, the scale left out of dQ, gradients of the position table overwritten
instead of added or one lag off, an output that a later block overwrites, blocks skipped that share
a segment.
"""

import functools
from contextlib import contextmanager, nullcontext

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, draw
from jax.experimental.pallas import tpu as pltpu
from oracles import hstu as oracle
from quick_compiler import QUICKEST

from jaxrec import ops
from jaxrec.ops import _dispatch, _hstu_core, _time_buckets
from jaxrec_kernels import tuning
from jaxrec_kernels.generations import V5E
from jaxrec_kernels.hstu_attention import facts, plan, step, supports, tile, tpu

EDGES = tuple(_time_buckets.edges(127, 32))
NAMES = ("q", "k", "v", "position_table", "time_table")
# Races, reads of what was never written or lies outside; several times slower.
STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@contextmanager
def on_kernel(interpret=True, block=plan.LARGEST_BLOCK, rows=2, kind=None, **changes):
    """Inside, the op runs its TPU kernel, interpreted.

    `block`, `rows`: the most events of a block and rows of a program, so that small arrays have
    several of each. `kind`: the chip whose regions it has. `changes`: of the plan.
    """

    def forced(xla, kernels, *operands):
        return kernels["tpu"](*operands) if "tpu" in kernels else switch(xla, kernels, *operands)

    def planned(kernel, size, times):
        return plan_for(size)._replace(**changes)

    switch, plan_for = _dispatch.platform_switch, plan.plan_for
    chip = nullcontext() if kind is None else tuning.compiling_for(kind)
    with chip, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "platform_switch", forced)
        patch.setattr(plan, "LARGEST_BLOCK", block)
        patch.setattr(plan, "MOST_SEQUENCES", rows)
        patch.setattr(step, "tuned_plan", planned)
        for name in ("forward", "backward"):
            patch.setattr(tpu, name, functools.partial(getattr(tpu, name), interpret=interpret))
        # What was traced outside does not hold inside, nor the other way around.
        _hstu_core.attend.clear_cache()
        yield
    _hstu_core.attend.clear_cache()


class Case:
    """Arrays of a call of the op, and the call."""

    def __init__(
        self,
        shape,
        pattern="packed_holes",
        *,
        value_dim=None,
        dtype=jnp.float32,
        tables="both",
        candidates=None,
        entries=129,
    ):
        batch, length, heads, head_dim = shape
        rng = np.random.default_rng(5)
        value_dim = value_dim or head_dim
        valid, ids = cases.rows(pattern, batch, length)
        gaps = np.floor(10 ** rng.uniform(-1, 4, (batch, length)))
        seconds = (1_600_000_000 + np.cumsum(gaps, axis=1)).astype(np.int32)
        self.options = {"normalizer": 17, "scale": 0.7}
        masks = {"valid": valid, "segment_ids": ids if candidates is None else None}
        if candidates is not None:
            masks["num_candidates"] = np.asarray(candidates, np.int32)
        if tables in ("both", "times"):
            masks["timestamps"] = seconds
        self.masks = {k: x for k, x in masks.items() if x is not None}
        # Small numbers keep what bfloat16 rounds small.
        self.arrays = [
            jnp.asarray(x / 2, dtype) for x in cases.qkv(rng, *shape, value_dim=value_dim)
        ]
        for name, size in (("positions", 2 * length + 5), ("times", entries)):
            there = tables in ("both", name)
            # In float32, which the vectors need not be.
            self.arrays.append(jnp.asarray(draw(rng, size) / 2) if there else None)
        self.d_out = jnp.asarray(draw(rng, batch, length, heads, value_dim), dtype)

    def op(self, arrays, masks):
        q, k, v, positions, times = arrays
        return ops.hstu_attention(
            q, k, v, position_table=positions, time_table=times, **masks, **self.options
        )

    def both(self, arrays, d_out, masks):
        """The output, and the gradients of all arrays that there are."""
        out, pull = jax.vjp(lambda *a: self.op(a, masks), *arrays)
        return [out, *pull(d_out)]

    def on_kernel(self, **kernel):
        """A compiled call, for this case and for others of its shapes."""
        with on_kernel(**kernel):
            lowered = jax.jit(self.both).lower(self.arrays, self.d_out, self.masks)
            compiled = lowered.compile(compiler_options=QUICKEST)

        def run(arrays=None, d_out=None, **masks):
            try:
                return jax.block_until_ready(
                    compiled(
                        self.arrays if arrays is None else arrays,
                        self.d_out if d_out is None else d_out,
                        {k: jnp.asarray(x) for k, x in (self.masks | masks).items()},
                    )
                )
            except Exception:
                pltpu.reset_tpu_interpret_mode_state()
                raise

        return run

    def check(self, got, **changed):
        """Against the float64 loops."""
        exact = [None if x is None else np.asarray(x, np.float64) for x in self.arrays]
        options = self.options | self.masks | changed
        d_out = np.asarray(self.d_out, np.float64)
        wanted = [
            oracle.hstu_attention(*exact, **options),
            *oracle.hstu_attention(*exact, d_out, **options),
        ]
        given = [self.arrays[2], *self.arrays]
        tolerance = 2**-6 if self.d_out.dtype == jnp.bfloat16 else 5e-6
        for name, x, a, b in zip(("out", *NAMES), given, got, wanted, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                assert a.dtype == x.dtype, name
                close(a, b, tolerance, name)


# At least two programs, two blocks of a cut row, a ragged last one. Chunks are of 128 events.
CASES = {
    # Heads side by side across two registers; rows scheduled in pairs.
    "whole": (((4, 21, 2, 50), "packed_holes"), {"value_dim": 72}, {"interpret": STRICT}),
    "candidates": (((2, 140, 1, 8), "right"), {"candidates": [7, 40]}, {"rows": 1}),
    "empty rows": (
        ((2, 9, 4, 64), "empty_rows"),
        {"tables": "times", "dtype": jnp.bfloat16, "entries": 30},
        {"group": 2},
    ),
    # Blocks of two chunks.
    "cut": (((1, 300, 1, 8), "packed_holes"), {"entries": 60}, {"block": 256}),
    # As a v5e has it: stages in turn, a tile after the other.
    "cut, v5e": (((1, 300, 1, 8), "packed_holes"), {}, {"block": 256, "kind": V5E[0]}),
    "heads, v5e": (
        ((2, 140, 2, 64), "packed_holes"),
        {"tables": "positions", "dtype": jnp.bfloat16},
        {"kind": V5E[0], "interpret": STRICT},
    ),
    # Four heads that share registers, two of them at a time.
    "lots": (((2, 300, 4, 8), "packed_holes"), {"tables": "times"}, {}),
    # Of 300 lanes of scores 256 are taken first.
    "parts": (((1, 300, 1, 8), "packed_holes"), {"tables": "positions"}, {"interpret": STRICT}),
    "cut, heads": (
        ((2, 150, 4, 64), "plain"),
        {"tables": "positions", "candidates": [40, 3]},
        {"block": 128, "group": 2, "interpret": STRICT},
    ),
}


@functools.cache
def compiled(name):
    arguments, options, kernel = CASES[name]
    case = Case(*arguments, **options)
    return case, case.on_kernel(**kernel)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    case, run = compiled(name)
    case.check(run())


@pytest.mark.parametrize("name", ["cut", "candidates"])
def test_what_is_not_there_is_not_read(name):
    """Vectors, times and gradients of invalid slots, entries of the tables that no pair meets."""
    case, run = compiled(name)
    batch, length = case.arrays[0].shape[:2]
    seconds, valid = case.masks["timestamps"], case.masks["valid"]
    ids = case.masks.get("segment_ids", np.zeros((batch, length), np.int32))
    counts = case.masks.get("num_candidates", np.zeros(batch, np.int32))
    entries = case.arrays[4].size
    met = {
        (steps, oracle.bucket(apart, entries - 1))
        for b in range(batch)
        for _, _, steps, apart in oracle.pairs_of_row(valid[b], ids[b], seconds[b], counts[b])
    }
    steps, buckets = (np.array(sorted(set(x))) for x in zip(*met, strict=True))
    middle = (case.arrays[3].size + 1) // 2 - 1
    kept = (middle - steps, buckets)
    hole = ~valid[:, :, None, None]

    def poisoned(poison, shift):
        own = [jnp.where(hole, poison, x) for x in case.arrays[:3]]
        tables = [
            jnp.full(x.shape, poison).at[at].set(x[at])
            for x, at in zip(case.arrays[3:], kept, strict=True)
        ]
        moved = np.where(valid, seconds, seconds + shift).astype(np.int32)
        return run(own + tables, jnp.where(hole, poison, case.d_out), timestamps=moved)

    got = poisoned(jnp.nan, 10**8)
    for what, a, b in zip(("out", *NAMES), got, poisoned(0.0, 0), strict=True):
        np.testing.assert_array_equal(a, b, what)
    for x in got[:4]:
        assert (np.asarray(x)[~valid] == 0).all()
    for gradient, at in zip(got[4:], kept, strict=True):
        unmet = np.setdiff1d(np.arange(gradient.size), at)
        assert len(unmet)
        assert (np.asarray(gradient)[unmet] == 0).all()


def test_blocks_of_other_segments_are_not_computed():
    """Ids that do not overlap: what is skipped changes nothing, whatever stands there."""
    case, run = compiled("cut")
    masks = {
        "valid": np.ones((1, 300), bool),
        "segment_ids": np.repeat([9, -4], [256, 44])[None].astype(np.int32),
    }
    together = run(**masks)
    case.check(together, **masks)
    huge = [x.at[:, :256].multiply(1e30) for x in case.arrays[:3]]
    alone = run(huge + case.arrays[3:], **masks)
    np.testing.assert_array_equal(together[0][:, 256:], alone[0][:, 256:])


def test_vmap():
    """Each of a batch of calls has gradients of its tables of its own."""
    case = Case((2, 12, 1, 4), "plain", tables="positions")
    arrays = [jnp.stack([x, 2 * x]) if x is not None else None for x in case.arrays]
    d_outs = jnp.stack([case.d_out] * 2)
    with on_kernel():
        mapped = jax.vmap(functools.partial(case.both, masks={}))
        got = jax.jit(mapped, compiler_options=QUICKEST)(arrays, d_outs)
    for i in range(2):
        alone = Case((2, 12, 1, 4), "plain", tables="positions")
        alone.arrays = [None if x is None else x[i] for x in arrays]
        alone.check([None if x is None else x[i] for x in got])


# Pieces


def test_buckets_are_exact_at_every_edge():
    near = {0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1} | {e + d for e in EDGES for d in (-1, 0, 1)}
    near = np.array(sorted(near))
    low = -(2**31)
    later = jnp.asarray((low + near).astype(np.int32))[:, None]
    earlier = jnp.full((1, plan.LANES), low, jnp.int32)
    for a, b in ((later, earlier), (earlier, later)):
        sides = [tile.Events(None, None, x, None, None) for x in (a, b)]
        got = np.asarray(tile.bucket(*sides, facts.edge_row(EDGES)))
        wanted = [[oracle.bucket(x, 128)] * plan.LANES for x in near]
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("entries", [1, 6, 129])
def test_rows_of_the_time_table(rng, entries):
    table = draw(rng, entries)
    row = np.asarray(facts.time_row(jnp.asarray(table)))[0]
    np.testing.assert_array_equal(row, table[np.minimum(np.arange(128), entries - 1)])
    d_row = draw(rng, plan.BUCKETS)
    got = facts.time_row_gradient(jnp.asarray(d_row), entries)
    wanted = np.zeros(entries)
    np.add.at(wanted, np.minimum(np.arange(plan.BUCKETS), entries - 1), d_row)
    close(got, wanted, 1e-6)


def test_sums_along_diagonals(rng):
    tiles = draw(rng, 3, 128, 128)
    wanted = np.zeros(3 * 128)
    for d, key, query in np.ndindex(tiles.shape):
        if 128 * d + query - key >= 0:
            wanted[128 * d + query - key] += tiles[d, key, query]
    close(facts.lag_tiles_gradient(jnp.asarray(tiles), 300)[0], wanted[:300], 1e-5)
    rows = np.asarray(facts.lag_rows(jnp.asarray(wanted[None, :300], jnp.float32), 3))
    for d, lag in ((0, -1), (0, 5), (1, -128), (2, 43), (2, 44)):
        there = 0 <= 128 * d + lag < 300
        close(rows[d, lag % 256], wanted[128 * d + lag] if there else 0, 1e-6)


# What runs, and where


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def explained(x, value=None, *, target="tpu", **options):
    value = x if value is None else value
    return ops.explain("hstu_attention", x, x, value, normalizer=5, target=target, **options)


def test_what_runs_is_told():
    x = spec(4, 200, 2, 64)
    assert explained(x).implementation == "pallas"
    choice = explained(x, target="cpu")
    assert choice.implementation == "xla"
    assert "the kernel is for tpu" in choice.reason
    assert explained(x, implementation="xla").reason == "asked for by the caller"
    assert explained(spec(4, 16384, 4, 128, dtype=jnp.bfloat16)).implementation == "pallas"
    for arguments, options, reason in [
        ((spec(4, 200, 2, 64, dtype=jnp.float16),), {}, "float32 and bfloat16, not float16"),
        ((spec(4, 200, 1, 300),), {}, "heads of up to 256, not 300"),
        ((spec(4, 200, 1, 8), spec(4, 200, 1, 300)), {}, "heads of up to 256, not 300"),
        ((spec(1, 10**6, 1, 64),), {}, "rows of 1000000 events with 1 heads of 64 do not fit"),
        ((x,), {"position_table": spec(399, dtype=jnp.float16)}, "not float16"),
    ]:
        choice = explained(*arguments, **options)
        assert choice.implementation == "xla"
        assert reason in choice.reason
        with pytest.raises(ValueError, match="implementation='pallas' cannot run"):
            explained(*arguments, implementation="pallas", **options)


def test_wide_integers_are_not_for_the_kernel():
    x, seconds = spec(2, 9, 1, 8), spec(2, 9, dtype=jnp.int64)
    assert "up to 32 bits, not int64" in supports(x, x, integers=(None, seconds))
    assert supports(x, x, integers=(None, spec(2, 9, dtype=jnp.int16))) is None


def test_the_kernel_is_not_traced_where_it_is_not_asked_for():
    x = spec(2, 9, 1, 8)
    text = str(jax.make_jaxpr(functools.partial(explained_op, implementation="xla"))(x))
    assert "pallas_call" not in text
    assert "pallas_call" in str(jax.make_jaxpr(explained_op)(x))


def explained_op(x, **options):
    return ops.hstu_attention(x, x, x, normalizer=9, **options)


def test_plans_fit_the_memory():
    """From a few events to many, with narrow heads and wide ones."""
    for length in (1, 7, 50, 513, 1024, 4096, 16384):
        for heads, width in ((1, 64), (4, 32), (3, 50), (8, 128), (16, 256)):
            size = plan.Size(24, length, heads, width, width, 2, 3)
            found = plan.plan_for(size)
            assert found is not None, (length, heads, width)
            assert found.filled >= length
            assert found.whole == (length <= plan.LARGEST_BLOCK)
            assert heads % found.group == 0
            assert found.group % found.bundle == 0
            assert found.bundle == heads or found.bundle * width % plan.LANES == 0
            assert 24 % found.sequences == 0
            assert plan.vmem_bytes(size, found) <= plan.VMEM_BYTES
