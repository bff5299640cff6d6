"""target_ranks against the lists of top_k_items, and ranking_metrics against the evaluator's."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_cases import QUICK, double, run
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from oracles import top_k as oracle

from jaxrec import ops
from jaxrec.evaluation import metrics

module = sys.modules[ops.target_ranks.__module__]
NOT_RANKED = 2**31 - 1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows and items, and a ragged one of each."""
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(module, "BLOCK_SCORES", 28)


def whole(rng, *shape):
    """Small integers: scores are exact, and many are equal."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def ranks_of(hidden, table, targets, bias=None, exclude=None):
    """From the whole sorted list of every row."""
    bias = None if bias is None else double(bias)
    _, lists = oracle.top_k_items(
        double(hidden), double(table), len(table), bias=bias, exclude=exclude
    )
    found = [np.flatnonzero(row == t) for row, t in zip(lists, targets, strict=True)]
    return [
        int(at[0]) + 1 if at.size and t >= 0 else NOT_RANKED
        for at, t in zip(found, targets, strict=True)
    ]


@pytest.mark.parametrize("filters", ["", "bias", "exclude", "bias, exclude"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_place_in_the_sorted_list(rng, filters, dtype):
    hidden, table = jnp.asarray(whole(rng, 9, 3), dtype), jnp.asarray(whole(rng, 23, 3), dtype)
    targets = rng.integers(0, 23, 9).astype(np.int32)
    targets[3], targets[5] = 23, -1
    options = {}
    if "bias" in filters:
        bias = whole(rng, 23)
        bias[targets[1]] = -np.inf
        options["bias"] = jnp.asarray(bias, dtype)
    if "exclude" in filters:
        exclude = rng.integers(-1, 25, (9, 6)).astype(np.int32)
        exclude[2, 4] = targets[2]
        options["exclude"] = exclude
    got = run(lambda h, t: ops.target_ranks(h, t, targets, **options), hidden, table)
    assert got.dtype == jnp.int32
    want = ranks_of(hidden, table, targets, **options)
    assert got.tolist() == want
    assert 2 + ("bias" in filters) + ("exclude" in filters) <= want.count(NOT_RANKED) < 9


def test_scores_that_are_no_numbers(rng):
    hidden, table = whole(rng, 6, 2), whole(rng, 9, 2)
    table[3] = np.nan
    hidden[1] = np.nan
    targets = np.array([3, 0, 1, 2, 4, 5], np.int32)
    got = run(lambda h, t: ops.target_ranks(h, t, targets), hidden, table)
    assert got.tolist() == ranks_of(hidden, table, targets)
    assert got[:2].tolist() == [NOT_RANKED] * 2


def test_rounded_scores_follow_the_lists_of_top_k(rng):
    """Items that are equal up to rounding stand where top_k_items puts them."""
    one = rng.normal(size=8)
    table = jnp.asarray(np.tile(one, (40, 1)) * (1 + 1e-7 * rng.normal(size=(40, 1))), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    targets = np.array([0, 17, 30, 39])

    def both(hidden, table):
        _, ids = ops.top_k_items(hidden, table, 40, item_block=7)
        return ids, ops.target_ranks(hidden, table, targets)

    ids, ranks = run(both, hidden, table)
    for row, target, rank in zip(ids, targets, ranks, strict=True):
        assert row[rank - 1] == target


def test_under_vmap_and_a_mesh(rng):
    hidden, table = jnp.asarray(whole(rng, 8, 3)), jnp.asarray(whole(rng, 11, 3))
    targets = jnp.asarray(rng.integers(0, 11, 8), jnp.int32)
    exclude = jnp.asarray(rng.integers(-1, 11, (8, 2)), jnp.int32)
    rows, rest = PartitionSpec("data"), PartitionSpec()

    def one(hidden, table, targets, exclude):
        return ops.target_ranks(hidden, table, targets, exclude=exclude)

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    sharded = jax.shard_map(one, mesh=mesh, in_specs=(rows, rest, rows, rows), out_specs=rows)

    def parts(hidden, table, targets, exclude):
        split = [x.reshape(2, 4, *x.shape[1:]) for x in (hidden, targets, exclude)]
        return jax.vmap(one, (0, None, 0, 0))(split[0], table, *split[1:]).reshape(-1)

    want = ranks_of(hidden, table, np.asarray(targets), exclude=np.asarray(exclude))
    for f in (sharded, parts):
        assert run(f, hidden, table, targets, exclude).tolist() == want


def test_no_rows():
    ranks = ops.target_ranks(jnp.zeros((0, 3)), jnp.ones((4, 3)), jnp.zeros(0, jnp.int32))
    assert (ranks.shape, ranks.dtype) == ((0,), jnp.int32)
    found = ops.ranking_metrics(ranks, (3,))
    assert {name: float(value) for name, value in found.items()} == {
        "hr@3": 0,
        "ndcg@3": 0,
        "mrr@3": 0,
    }


def test_the_scores_are_never_whole():
    specs = (
        jax.ShapeDtypeStruct((2_000, 8), jnp.float32),
        jax.ShapeDtypeStruct((50_000, 8), jnp.float32),
        jax.ShapeDtypeStruct((2_000,), jnp.int32),
    )
    compiled = jax.jit(ops.target_ranks, compiler_options=QUICK).lower(*specs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2_000 * 50_000 / 100


measured = jax.jit(lambda ranks, valid: ops.ranking_metrics(ranks, (1, 3), valid))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 9, NOT_RANKED, 0]), st.booleans()),
        min_size=6,
        max_size=6,
    )
)
def test_metrics_are_those_of_the_evaluator(rows):
    ranks = np.array([rank for rank, _ in rows], np.int32)
    valid = np.array([keep for _, keep in rows])
    got = measured(ranks, valid)
    assert set(got) == {f"{m}@{k}" for k in (1, 3) for m in ("hr", "ndcg", "mrr")}
    if not valid.any():
        assert not any(float(v) for v in got.values())
        return
    # Lists in which item 7 stands at the rank, where that is among the first three.
    lists = np.where(np.arange(1, 4) == ranks[valid][:, None], 7, np.array([0, 1, 2]))
    want = metrics.ranking_metrics(
        lists, np.full(len(lists), 7), 8, (1, 3), names=("hr", "ndcg", "mrr")
    )
    for name, value in got.items():
        assert float(value) == pytest.approx(want[name], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": jnp.ones(6)}, "targets must hold integers, got float32"),
        ({"targets": jnp.ones(5, int)}, r"targets must have shape \(6,\), got \(5,\)"),
        ({"bias": jnp.ones(6)}, r"bias must have shape \(9,\), got \(6,\)"),
        ({"exclude": jnp.ones(6, int)}, r"\(6, ids per row\), got \(6,\)"),
        ({"hidden": jnp.ones((6, 5))}, "one width, got 5 and 4"),
    ],
)
def test_what_does_not_fit(change, message):
    call = {
        "hidden": jnp.ones((6, 4)),
        "item_table": jnp.ones((9, 4)),
        "targets": jnp.zeros(6, int),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.target_ranks(**call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones(3), (1,)), "ranks must hold integers"),
        ((jnp.ones(3, int), (0,)), "cut-offs must be positive Python integers, got 0"),
        ((jnp.ones(3, int), (1,), jnp.ones(2, bool)), r"valid must have shape \(3,\), got \(2,\)"),
        ((jnp.ones(3, int), (1,), jnp.ones(3)), "valid must be bool"),
    ],
)
def test_metrics_of_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.ranking_metrics(*arguments)
