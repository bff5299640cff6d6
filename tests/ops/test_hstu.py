"""hstu_attention against float64 loops: biases, candidates, masks, forms, transformations."""

import functools
import math
from unittest import mock

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, draw, gradients_of, qkv, run
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding
from oracles import hstu as oracle
from oracles.attention import finite_differences

from jaxrec import ops
from jaxrec.ops import _time_buckets, hstu

NAMES = ("q", "k", "v", "position_table", "time_table")
# Of the time table: enough to be reached and to be overrun, few enough to compile quickly.
ENTRIES = 12


def hstu_with(block, *arrays, normalizer=17, scale=0.7, **options):
    """The op with the tile size in the test's hand, so that a short row has many tiles."""
    with mock.patch.object(hstu, "block_for", return_value=block):
        return hstu.hstu_attention(*arrays, normalizer=normalizer, scale=scale, **options)


def with_tables(block, q, k, v, positions, times, **rest):
    return hstu_with(block, q, k, v, position_table=positions, time_table=times, **rest)


@functools.cache
def compiled(block):
    """Values and gradients in q, k, v and the tables."""
    return gradients_of(functools.partial(with_tables, block))


@functools.cache
def forward(block):
    return jax.jit(functools.partial(with_tables, block), compiler_options=cases.QUICK)


def seconds(rng, batch, length):
    """Gaps from nothing to months, sorted as a history is."""
    gaps = np.floor(10 ** rng.uniform(-1, 4, (batch, length)))
    return (1_600_000_000 + np.cumsum(gaps, axis=1)).astype(np.int32)


def inputs(rng, batch, length, heads=2, head_dim=4, value_dim=3, longest=None):
    arrays = [
        *qkv(rng, batch, length, heads, head_dim, value_dim),
        draw(rng, 2 * (longest or length + 3) - 1),
        draw(rng, ENTRIES),
    ]
    return arrays, draw(rng, batch, length, heads, value_dim), seconds(rng, batch, length)


def check(both, arrays, d_out, tolerance=2e-5, **options):
    out, gradients = both(arrays, d_out, **options)
    options = {"normalizer": 17, "scale": 0.7} | options
    close(out, oracle.hstu_attention(*arrays, **options), tolerance, "out")
    wanted = oracle.hstu_attention(*arrays, d_out, **options)
    for name, got, want in zip(NAMES, gradients, wanted, strict=True):
        close(got, want, tolerance, f"d_{name}")


# Buckets


def test_published_buckets():
    wanted = {0: 0, 1: 0, 2: 2, 3: 3, 10: 7, 60: 13, 3600: 27, 86400: 37, 604800: 44, 10**9: 68}
    table = jnp.arange(129.0)
    apart = jnp.asarray(list(wanted), jnp.uint32)
    assert _time_buckets.lookup(table, apart).tolist() == list(wanted.values())


def test_buckets_are_exact_at_every_edge():
    edges = _time_buckets.edges(128, 32)
    assert len(edges) == math.floor(math.log(2**32 - 1) / 0.301)
    near = sorted({0, 1, 2**32 - 1} | {e + d for e in edges for d in (-1, 0, 1)})
    wanted = [oracle.bucket(x, 128) for x in near]
    got = _time_buckets.lookup(jnp.arange(129.0), jnp.asarray(near, jnp.uint32))
    np.testing.assert_array_equal(got, wanted)
    few = _time_buckets.lookup(jnp.arange(6.0), jnp.asarray(near, jnp.uint32))
    np.testing.assert_array_equal(few, np.minimum(wanted, 5))


def test_differences_do_not_overflow():
    low, high = -(2**31), 2**31 - 1
    a, b = jnp.asarray([low, high, 5, -3]), jnp.asarray([high, low, 7, -3])
    assert _time_buckets.distance(a, b).tolist() == [2**32 - 1, 2**32 - 1, 2, 0]
    narrow = _time_buckets.distance(jnp.asarray([-128], jnp.int8), jnp.asarray([127], jnp.int8))
    assert narrow.tolist() == [255]


@pytest.mark.parametrize("entries", [1, 6, 129])
def test_gradient_of_the_time_table(rng, entries):
    apart = np.concatenate([[0, 1, 2**32 - 1], 10 ** rng.uniform(0, 9.6, 300)]).astype(np.uint32)
    d_out = draw(rng, apart.size)
    wanted = np.zeros(entries)
    for x, d in zip(apart, d_out, strict=True):
        wanted[oracle.bucket(x, entries - 1)] += d
    got = _time_buckets.lookup_gradient(jnp.zeros(entries), jnp.asarray(apart), jnp.asarray(d_out))
    close(got, wanted, 1e-6)


# The bias, read off the output: with zero queries and one-hot values it is silu(rab) / N


def weights_of_bias(length, normalizer=1, **options):
    zeros = jnp.zeros((1, length, 1, 2))
    values = jnp.eye(length)[None, :, None]
    f = functools.partial(ops.hstu_attention, normalizer=normalizer)
    out = run(lambda options: f(zeros, zeros, values, **options), options)
    return np.asarray(out)[0, :, 0]


def test_published_index_of_the_position_table():
    index = np.tril([[3, 4, 5, 6], [2, 3, 4, 5], [1, 2, 3, 4], [0, 1, 2, 3]])
    table = 1 + jnp.arange(7.0)
    wanted = np.tril(np.asarray(jax.nn.silu(1.0 + index)))
    close(weights_of_bias(4, position_table=table), wanted, 1e-6)
    close(weights_of_bias(4, position_table=table, normalizer=5), wanted / 5, 1e-6)
    # A longer table has its middle at N - 1 too.
    longer = jnp.concatenate([jnp.zeros(2), table, jnp.zeros(2)])
    close(weights_of_bias(4, position_table=longer), wanted, 1e-6)


def test_times_are_those_of_the_prediction():
    """Each event asks at the time of the next one, the last at its own."""
    table = 1 + jnp.arange(129.0)
    times = jnp.asarray([[0, 60, 60 + 3600, 60 + 3600 + 86400]])
    seen = [
        [13, 0, 0, 0],
        [oracle.bucket(3660, 128), 27, 0, 0],
        [oracle.bucket(90060, 128), oracle.bucket(90000, 128), 37, 0],
        [oracle.bucket(90060, 128), oracle.bucket(90000, 128), 37, 0],
    ]
    wanted = np.tril(np.asarray(jax.nn.silu(1.0 + np.asarray(seen))))
    close(weights_of_bias(4, time_table=table, timestamps=times), wanted, 1e-6)


def test_the_next_time_skips_padding_and_stays_in_the_segment():
    """The last event of a segment asks at its own time, whatever stands behind it."""
    table = 1 + jnp.arange(129.0)
    times = jnp.asarray([[0, 10**9, 60, 3660, 7, 10**9]])
    valid = jnp.asarray([[True, False, True, True, True, False]])
    ids = jnp.asarray([[4, 4, 4, 9, 9, 9]])
    got = weights_of_bias(6, time_table=table, timestamps=times, valid=valid, segment_ids=ids)
    wanted = np.zeros((6, 6))
    for i, j, apart in [
        (0, 0, 60),
        (2, 0, 60),
        (2, 2, 0),
        (3, 3, 3653),
        (4, 3, 3653),
        (4, 4, 0),
    ]:
        wanted[i, j] = jax.nn.silu(1.0 + oracle.bucket(apart, 128))
    close(got, wanted, 1e-6)


# Against the oracle


@pytest.mark.parametrize("candidates", [None, np.array([2, 0], np.int32)])
def test_oracle_gradients_are_finite_differences(rng, candidates):
    arrays, d_out, times = inputs(rng, 2, 5, 1, 2, 2)
    valid, ids = cases.rows("packed_holes", 2, 5)
    options = {"normalizer": 3, "timestamps": times, "valid": valid, "scale": 0.7}
    options |= {"segment_ids": ids} if candidates is None else {"num_candidates": candidates}

    def total(*arrays):
        return (oracle.hstu_attention(*arrays, **options) * d_out).sum()

    got = oracle.hstu_attention(*arrays, d_out, **options)
    for a, b in zip(got, finite_differences(total, arrays), strict=True):
        close(a, b, 1e-7)


@pytest.mark.parametrize("pattern", ["plain", "left", "packed", "packed_holes", "interleaved"])
@pytest.mark.parametrize("block", [None, 8])
def test_values_and_gradients(rng, pattern, block):
    arrays, d_out, times = inputs(rng, 2, 21)
    valid, ids = cases.rows(pattern, 2, 21)
    if pattern == "left":
        ids = np.zeros((2, 21), np.int32)
    check(compiled(block), arrays, d_out, timestamps=times, valid=valid, segment_ids=ids)


@pytest.mark.parametrize("pattern", ["right", "packed_holes", "empty_rows"])
@pytest.mark.parametrize("block", [None, 8])
def test_candidates(rng, pattern, block):
    """Some, one, none, and more than there are events; unsorted times beside."""
    arrays, d_out, times = inputs(rng, 5, 21)
    valid, _ = cases.rows(pattern, 5, 21)
    counts = np.array([6, 1, 0, 30, 11], np.int32)
    times[:, -4:] -= rng.integers(0, 10**5, (5, 4)).astype(np.int32)
    check(compiled(block), arrays, d_out, timestamps=times, valid=valid, num_candidates=counts)


@pytest.mark.parametrize(
    ("block", "tables"),
    [(None, "positions"), (None, "times"), (8, "positions"), (8, "times"), (8, "none")],
)
def test_each_table_alone(rng, block, tables):
    arrays, d_out, times = inputs(rng, 2, 21)
    if tables != "positions":
        arrays[3] = None
    if tables != "times":
        arrays[4] = times = None
    given = [i for i, x in enumerate(arrays) if x is not None]
    counts = np.array([3, 5], np.int32)

    def f(*some):
        filled = dict(zip(given, some, strict=True))
        return hstu_with(
            block,
            *some[:3],
            position_table=filled.get(3),
            time_table=filled.get(4),
            timestamps=times,
            num_candidates=counts,
        )

    out, gradients = gradients_of(f)([arrays[i] for i in given], d_out)
    options = {"normalizer": 17, "scale": 0.7, "timestamps": times, "num_candidates": counts}
    close(out, oracle.hstu_attention(*arrays, **options), 2e-5)
    wanted = oracle.hstu_attention(*arrays, d_out, **options)
    for i, got in zip(given, gradients, strict=True):
        close(got, wanted[i], 2e-5, NAMES[i])


@pytest.mark.parametrize("length", [150, 1030])
def test_values_and_gradients_at_real_lengths(rng, length):
    """The public op with the published table, fully optimised."""
    arrays, d_out, times = inputs(rng, 1, length, 1, 4, 4)
    arrays[4] = draw(rng, 129)
    ids = np.repeat(np.arange(10), length // 10)[None].astype(np.int32)
    valid = rng.random((1, length)) > 0.1

    def f(q, k, v, positions, entries, **rest):
        return ops.hstu_attention(
            q, k, v, normalizer=17, scale=0.7, position_table=positions, time_table=entries, **rest
        )

    both = gradients_of(f, compiler_options=None)
    check(both, arrays, d_out, 5e-5, timestamps=times, valid=valid, segment_ids=ids)


def test_float64_agrees_to_the_last_digits(rng):
    arrays, d_out, times = inputs(rng, 1, 11, 1)
    with jax.enable_x64(True):
        check(
            compiled(8),
            [x.astype(np.float64) for x in arrays],
            d_out.astype(np.float64),
            1e-12,
            timestamps=times.astype(np.int64) * 7,
        )


def test_default_scale_is_one(rng):
    arrays = qkv(rng, 1, 6, 1, 4, 4)
    got = run(ops.hstu_attention, *arrays, normalizer=6)
    close(got, oracle.hstu_attention(*arrays, normalizer=6), 2e-5)


# Candidates


@pytest.mark.parametrize("block", [None, 8])
def test_a_candidate_scores_the_same_alone_and_in_any_order(rng, block):
    history, count = 9, 4
    (*qkv_, positions, entries), _, times = inputs(rng, 1, history + count)
    times[:, history:] = times[:, history : history + 1]

    def scored(slots, candidates):
        rows = [x[:, slots] for x in qkv_]
        options = {} if candidates is None else {"num_candidates": jnp.asarray([candidates])}
        return forward(block)(*rows, positions, entries, timestamps=times[:, slots], **options)

    together = scored([*range(history + count)], count)
    alone = [scored([*range(history), history + c], 1) for c in range(count)]
    for c, out in enumerate(alone):
        close(out[:, :history], together[:, :history], 1e-6)
        close(out[:, history], together[:, history + c], 1e-6)
    order = [*range(history), *(history + rng.permutation(count))]
    close(scored(order, count), together[:, order], 1e-6)
    # One candidate is what the newest event is in plain causal attention.
    close(scored([*range(history + 1)], None), alone[0], 1e-6)


# Masks


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("pattern", ["packed_holes", "empty_rows"])
def test_what_is_not_there_is_not_read(rng, block, pattern):
    """Vectors and times of invalid slots, entries of the tables that no pair meets."""
    arrays, d_out, times = inputs(rng, 2, 21)
    valid, ids = cases.rows(pattern, 2, 21)
    ids = np.zeros((2, 21), np.int32) if ids is None else ids
    slots = valid[:, :, None, None]
    middle = (arrays[3].size + 1) // 2 - 1
    met = {
        (middle - steps, oracle.bucket(apart, ENTRIES - 1))
        for b in range(2)
        for _, _, steps, apart in oracle.pairs_of_row(valid[b], ids[b], times[b], 0)
    }
    unmet = [
        np.setdiff1d(np.arange(x.size), list(entries))
        for x, entries in zip(arrays[3:], zip(*met, strict=True), strict=True)
    ]

    def poisoned(poison, shift):
        own = [np.where(slots, x, np.float32(poison)) for x in (*arrays[:3], d_out)]
        tables = [x.copy() for x in arrays[3:]]
        for table, at in zip(tables, unmet, strict=True):
            table[at] = poison
        moved = np.where(valid, times, times + shift).astype(np.int32)
        return compiled(block)(
            own[:3] + tables, own[3], timestamps=moved, valid=valid, segment_ids=ids
        )

    got, want = poisoned(np.nan, 10**8), poisoned(0, 0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    for x in (got[0], *got[1][:3]):
        assert (np.asarray(x)[~valid] == 0).all()
    assert len(unmet[0])
    for gradient, at in zip(got[1][3:], unmet, strict=True):
        assert (np.asarray(gradient)[at] == 0).all()


# Precision and memory


@pytest.mark.parametrize("block", [None, 8])
def test_bfloat16(rng, block):
    low = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    arrays, d_out, times = inputs(rng, 2, 21, 2, 8, 8)
    arrays, d_out = [low(x) for x in arrays], low(d_out)
    ids = np.zeros((2, 21), np.int32)
    valid = np.ones((2, 21), bool)
    options = {"timestamps": times, "valid": valid, "segment_ids": ids}
    out, gradients = compiled(block)(arrays, d_out, **options)
    assert out.dtype == jnp.bfloat16
    options |= {"normalizer": 17, "scale": 0.7}
    exact = [np.asarray(x, np.float64) for x in (*arrays, d_out)]
    close(out, oracle.hstu_attention(*exact[:5], **options), 2**-7)
    for got, want in zip(gradients, oracle.hstu_attention(*exact, **options), strict=True):
        assert got.dtype == jnp.bfloat16
        close(got, want, 2**-6)


@pytest.mark.parametrize("block", [None, 64])
def test_sums_of_bfloat16_rows_are_float32(block):
    """A sum of 512 ones in bfloat16 would stop growing at 256."""
    x = jnp.zeros((1, 513, 1, 1), jnp.bfloat16)
    table = jnp.full((2 * 513 - 1,), 20.0)
    ones = jnp.ones((1, 513, 1, 1), jnp.float32)

    def f(q, v, table):
        return hstu_with(block, q, q, v, normalizer=1, position_table=table)

    out, (_, _, gradient) = gradients_of(f)([x, ones, table], ones)
    close(out[0, :, 0, 0], 20.0 * np.arange(1, 514), 1e-6)
    close(gradient[:513], np.arange(1, 514), 1e-6)


def test_long_rows_form_no_square():
    rows = jax.ShapeDtypeStruct((1, 8192, 2, 8), jnp.float32)
    ints = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    tables = (
        jax.ShapeDtypeStruct((2 * 8192 - 1,), jnp.float32),
        jax.ShapeDtypeStruct((129,), jnp.float32),
    )

    def gradients(q, k, v, positions, entries, times):
        def total(q, k, v, positions, entries):
            return ops.hstu_attention(
                q,
                k,
                v,
                normalizer=8192,
                position_table=positions,
                time_table=entries,
                timestamps=times,
                num_candidates=times[:, 0],
                implementation="xla",
            ).sum()

        return jax.grad(total, range(5))(q, k, v, positions, entries)

    largest = cases.largest_intermediate(gradients, rows, rows, rows, *tables, ints)
    assert largest <= 2 * 2 * 256 * 256


@pytest.mark.slow
def test_v5e_compiles_the_gradient_within_bounded_memory():
    """A tile of [8, 4, 256, 256] is 8 MB; the weights of all rows would take 537 MB."""
    pytest.importorskip("libtpu")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]

    def spec(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def total(q, k, v, positions, entries, times):
        return ops.hstu_attention(
            q,
            k,
            v,
            normalizer=2048,
            position_table=positions,
            time_table=entries,
            timestamps=times,
            implementation="xla",
        ).sum()

    rows = spec(8, 2048, 4, 64)
    arguments = (rows, rows, rows, spec(4095), spec(129), spec(8, 2048, dtype=jnp.int32))
    compiled = jax.jit(jax.grad(total, range(5))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.25e9


def test_the_gradient_of_the_gradient_does_not_need_the_kernel_to_have_one(rng):
    arrays, _, times = inputs(rng, 1, 6)

    def norm(implementation, *arrays):
        def total(*arrays):
            out = with_tables(None, *arrays, timestamps=times, implementation=implementation)
            return (out**2).sum()

        return sum((g**2).sum() for g in jax.grad(total, range(5))(*arrays))

    got, wanted = (
        run(jax.grad(functools.partial(norm, implementation), range(5)), *arrays)
        for implementation in (None, "xla")
    )
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert np.abs(b).max() > 1e-3, name
        close(a, b, 1e-6, name)


@pytest.mark.parametrize("shape", [(0, 5, 1, 4), (2, 0, 1, 4), (2, 5, 0, 4)])
def test_empty(shape):
    x = jnp.zeros(shape)
    times = jnp.zeros(shape[:2], jnp.int32)

    def f(q, table):
        return ops.hstu_attention(
            q,
            q,
            q,
            normalizer=5,
            position_table=table,
            time_table=table,
            timestamps=times,
            num_candidates=jnp.ones(shape[0], jnp.int32),
        )

    out, pull = jax.vjp(f, x, jnp.zeros(9))
    assert out.shape == shape
    assert [g.shape for g in pull(out)] == [shape, (9,)]


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((2, 5, 4), np.float32)}, r"query must be \[batch, length, heads"),
        ({"value": np.zeros((2, 6, 1, 4), np.float32)}, "value must agree with key"),
        ({"normalizer": 0}, "normalizer must be a positive Python integer, got 0"),
        ({"normalizer": 5.0}, "normalizer must be a positive Python integer"),
        ({"position_table": np.zeros(8, np.float32)}, r"\[2 N - 1\] with N >= 5, got shape \(8,\)"),
        ({"position_table": np.zeros(7, np.float32)}, r"N >= 5, got shape \(7,\)"),
        ({"position_table": np.zeros((9, 1), np.float32)}, "position_table must be"),
        ({"position_table": np.zeros(9, np.int32)}, "position_table must be float32"),
        ({"time_table": np.zeros(129, np.float32)}, "time_table needs timestamps"),
        ({"timestamps": np.zeros((2, 5), np.int32)}, "timestamps needs time_table"),
        (
            {"time_table": np.zeros(0, np.float32), "timestamps": np.zeros((2, 5), np.int32)},
            "time_table must have at least one entry",
        ),
        ({"timestamps": np.zeros((2, 5), np.float32)}, "timestamps must be integer"),
        ({"num_candidates": np.zeros((2, 1), np.int32)}, r"num_candidates must be int\[batch\]"),
        ({"num_candidates": np.zeros(2, np.float32)}, "num_candidates must be int"),
        (
            {
                "num_candidates": np.zeros(2, np.int32),
                "segment_ids": np.zeros((2, 5), np.int32),
            },
            "a packed row ends with one",
        ),
        ({"valid": np.ones((2, 4), bool)}, "valid must be"),
        ({"segment_ids": np.ones((2, 5), np.float32)}, "segment_ids must be integer"),
        ({"scale": float("inf")}, "scale must be a finite"),
        (
            {"implementation": "pallas", "value": np.zeros((2, 5, 1, 300), np.float32)},
            "cannot run: the kernel is for heads of up to 256, not 300",
        ),
    ],
)
def test_errors(change, message):
    x = np.zeros((2, 5, 1, 4), np.float32)
    arguments = {"query": x, "key": x, "value": x, "normalizer": 5} | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: ops.hstu_attention(**arguments))


# Transformations


@pytest.mark.parametrize("block", [None, 4])
def test_transformations(rng, block):
    """vmap over rows with tables of their own; rows sharded beside replicated tables."""
    (q, k, v, *tables), _, times = inputs(rng, 2, 10, 2, 4, 4)
    counts = np.array([2, 3], np.int32)

    def total(q, k, v, positions, entries, times, counts):
        out = hstu_with(
            block,
            q,
            k,
            v,
            position_table=positions,
            time_table=entries,
            timestamps=times,
            num_candidates=counts,
        )
        return (out**2).sum(), out

    f = jax.value_and_grad(total, range(5), has_aux=True)
    rows = (q, k, v)
    (loss, out), gradients = run(f, *rows, *tables, times, counts)

    alone = [x[:, None] for x in rows]
    (losses, outs), each = run(
        jax.vmap(f), *alone, *(np.stack([x] * 2) for x in tables), times[:, None], counts[:, None]
    )
    close(losses.sum(), loss, 1e-5)
    close(outs[:, 0], out, 1e-5)
    for got, want in zip(each, gradients, strict=True):
        close(got[:, 0] if want.ndim == 4 else got.sum(0), want, 1e-5)

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    own, all_ = PartitionSpec("data"), PartitionSpec()

    def local(*arguments):
        (loss, out), gradients = f(*arguments)
        return (jax.lax.psum(loss, "data"), out), gradients

    specs = (own, own, own, all_, all_)
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(*specs, own, own), out_specs=((all_, own), specs)
    )
    got = run(sharded, *rows, *tables, times, counts)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(((loss, out), gradients)), strict=True):
        close(a, b, 1e-5)
