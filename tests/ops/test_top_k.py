"""top_k_items against a sort in NumPy, and its promises."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_cases import QUICK, close, double, draw, run
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from oracles import top_k as oracle

from jaxrec import ops
from jaxrec.ops import _catalogue_top_k

module = sys.modules[ops.top_k_items.__module__]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows, several of columns of an id list, and a ragged one of each."""
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(_catalogue_top_k, "_ID_COLUMNS", 3)


def lists(rng, batch, items, width):
    """Ids of each row with padding anywhere, repeats, and ids that no item has."""
    ids = rng.integers(0, items, (batch, width))
    odd = rng.random((batch, width))
    ids = np.where(odd < 0.2, -1, ids)
    ids = np.where(odd > 0.95, items + 3, ids)
    return ids.astype(np.int32)


def whole(rng, *shape):
    """Small integers: scores are exact, and many are equal."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def check(hidden, table, k, **options):
    names = [n for n in ("bias", "exclude", "allow", "deny") if options.get(n) is not None]
    arrays = [jnp.asarray(options.pop(n)) for n in names]

    def f(hidden, table, *arrays):
        return ops.top_k_items(hidden, table, k, **dict(zip(names, arrays, strict=True)), **options)

    scores, ids = run(f, jnp.asarray(hidden), jnp.asarray(table), *arrays)
    assert (scores.dtype, ids.dtype) == (jnp.float32, jnp.int32)
    filters = {n: np.asarray(a) for n, a in zip(names, arrays, strict=True)}
    if "bias" in filters:
        filters["bias"] = double(filters["bias"])
    want_scores, want_ids = oracle.top_k_items(double(hidden), double(table), k, **filters)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(scores, want_scores)
    return np.asarray(scores), np.asarray(ids)


@pytest.mark.parametrize("item_block", [None, 1, 7, 23, 100])
@pytest.mark.parametrize("k", [5, 30])
def test_blocks_and_ties(rng, k, item_block):
    """Whole numbers: equal scores everywhere, within blocks and across them."""
    check(whole(rng, 9, 3), whole(rng, 23, 3), k, item_block=item_block)


@pytest.mark.parametrize("item_block", [None, 7])
@pytest.mark.parametrize(
    "filters",
    [
        "bias",
        "exclude",
        "allow mask",
        "deny mask",
        "allow ids",
        "deny ids",
        "exclude, deny ids",
        "exclude, allow mask, deny ids",
        "bias, exclude, allow ids, deny mask",
    ],
)
def test_filters(rng, filters, item_block):
    options = {}
    for name in filters.split(", "):
        kind, _, form = name.partition(" ")
        if kind == "bias":
            options[kind] = whole(rng, 23)
        elif form == "mask":
            options[kind] = rng.random(23) > 0.4
        else:
            options[kind] = lists(rng, 9, 23, 8)
    check(whole(rng, 9, 3), whole(rng, 23, 3), 6, item_block=item_block, **options)


@pytest.mark.parametrize("others", ["", "bias", "exclude", "deny mask", "deny ids", "all"])
def test_short_lists_are_scored_by_themselves(rng, others, monkeypatch):
    """Same answers as through the catalogue, without touching it."""
    options = {"allow": lists(rng, 9, 200, 7)}
    # The same item twice, an empty list, and a list of one.
    options["allow"][0] = 5
    options["allow"][1] = -1
    options["allow"][2] = [-1, 9, -1, -1, -1, -1, -1]
    if others in ("bias", "all"):
        options["bias"] = whole(rng, 200)
    if others in ("exclude", "all"):
        options["exclude"] = np.concatenate([options["allow"][:, 2:4], lists(rng, 9, 200, 3)], 1)
    if others == "deny mask":
        options["deny"] = rng.random(200) > 0.5
    if others in ("deny ids", "all"):
        options["deny"] = options["allow"][:, 4:6]
    hidden, table = whole(rng, 9, 3), whole(rng, 200, 3)
    monkeypatch.setattr(_catalogue_top_k, "of_catalogue", None)
    monkeypatch.setattr(module, "BLOCK_SCORES", 60)
    for k in (3, 10):
        _, ids = check(hidden, table, k, **options)
        assert (ids[1] == -1).all()
    assert ids.max() > 0


def test_long_lists_go_through_the_catalogue(rng, monkeypatch):
    monkeypatch.setattr(_catalogue_top_k, "of_lists", None)
    check(whole(rng, 5, 3), whole(rng, 40, 3), 4, allow=lists(rng, 5, 40, 10))


@pytest.mark.parametrize("name", ["exclude", "allow", "deny"])
@pytest.mark.parametrize("items", [10, 100])
def test_lists_without_columns(rng, name, items):
    """No id to exclude or deny changes nothing; no id to allow leaves nothing."""
    hidden, table = whole(rng, 5, 3), whole(rng, items, 3)
    _, ids = check(hidden, table, 4, **{name: np.zeros((5, 0), np.int32)})
    assert (ids == -1).all() == (name == "allow")


def test_everything_excluded(rng):
    exclude = np.tile(np.arange(6, dtype=np.int32), (3, 1))
    exclude[0, 4] = -1
    scores, ids = check(whole(rng, 3, 2), whole(rng, 6, 2), 3, exclude=exclude)
    assert ids[0].tolist() == [4, -1, -1]
    assert (ids[1:] == -1).all()
    assert (scores[1:] == -np.inf).all()


def test_scores_that_are_no_numbers_are_no_candidates(rng):
    hidden, table = whole(rng, 4, 2), whole(rng, 9, 2)
    table[3] = np.nan
    table[5, 0] = np.inf
    hidden[1] = np.nan
    bias = np.zeros(9, np.float32)
    bias[7] = -np.inf
    hidden[2] = [1, 0]  # item 5 scores +inf for this row
    _, ids = check(hidden, table, 9, bias=bias, item_block=4)
    assert not np.isin(ids, [3, 7]).any()
    assert (ids[1] == -1).all()
    assert ids[2, 0] == 5


def test_minus_zero_equals_zero():
    hidden = jnp.array([[1.0]])
    table = jnp.array([[-1.0], [-0.0], [0.0], [-0.0]])
    scores, ids = run(lambda h, t: ops.top_k_items(h, t, 3), hidden, table)
    assert ids.tolist() == [[1, 2, 3]]
    assert not np.signbit(scores).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_random_scores(rng, dtype):
    hidden, table, _ = draw(rng, 11, 37, 6, dtype)
    exclude = lists(rng, 11, 37, 9)
    scores, ids = run(
        lambda h, t, e: ops.top_k_items(h, t, 5, exclude=e, item_block=8), hidden, table, exclude
    )
    want, want_ids = oracle.top_k_items(double(hidden), double(table), 5, exclude=exclude)
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(ids, want_ids)
    close(scores, want, 2e-6)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from([(1, 3), (12, 4), (4, 10)]),
    kept=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_properties(case, kept, seed):
    k, item_block = case
    rng = np.random.default_rng(seed)
    hidden, table, bias = whole(rng, 5, 2), whole(rng, 10, 2), whole(rng, 10)
    exclude = lists(rng, 5, 10, 4)
    allow = rng.random(10) < kept
    scores, ids = (
        np.asarray(x) for x in compiled(k, item_block)(hidden, table, bias, exclude, allow)
    )
    want = oracle.top_k_items(
        double(hidden), double(table), k, bias=double(bias), exclude=exclude, allow=allow
    )
    np.testing.assert_array_equal(ids, want[1])
    np.testing.assert_array_equal(scores, want[0])
    assert (scores[:, 1:] <= scores[:, :-1]).all()


@functools.cache
def compiled(k, item_block):
    def f(hidden, table, bias, exclude, allow):
        return ops.top_k_items(
            hidden, table, k, bias=bias, exclude=exclude, allow=allow, item_block=item_block
        )

    return jax.jit(f, compiler_options=QUICK)


def sharded(f, hidden, exclude):
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))
    rows = PartitionSpec("data")
    return run(jax.shard_map(f, mesh=mesh, in_specs=(rows, rows), out_specs=rows), hidden, exclude)


def by_rows(way):
    def g(f, hidden, exclude):
        split = [x.reshape(3, 4, *x.shape[1:]) for x in (hidden, exclude)]
        scores, ids = way(f)(*split)
        return scores.reshape(12, -1), ids.reshape(12, -1)

    return g


TRANSFORMATIONS = {
    "eager": lambda f, *x: f(*x),
    "jit": lambda f, *x: run(f, *x),
    "remat": lambda f, *x: run(jax.checkpoint(f), *x),
    "vmap": by_rows(lambda f: jax.jit(jax.vmap(f), compiler_options=QUICK)),
    "scan": by_rows(
        lambda f: lambda *x: run(lambda *x: jax.lax.scan(lambda c, r: (c, f(*r)), 0, x)[1], *x)
    ),
    "shard_map": sharded,
    "pmap": by_rows(jax.pmap),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformations(rng, transformation):
    hidden, table = whole(rng, 12, 3), jnp.asarray(whole(rng, 17, 3))
    exclude = lists(rng, 12, 17, 5)

    def f(hidden, exclude):
        return ops.top_k_items(hidden, table, 4, exclude=exclude, item_block=5)

    scores, ids = TRANSFORMATIONS[transformation](f, jnp.asarray(hidden), jnp.asarray(exclude))
    want = oracle.top_k_items(double(hidden), double(table), 4, exclude=exclude)
    np.testing.assert_array_equal(ids, want[1])
    np.testing.assert_array_equal(scores, want[0])


@pytest.mark.parametrize("short", [False, True])
def test_scores_have_a_gradient(rng, short):
    hidden, table, _ = draw(rng, 6, 40, 3)
    bias = jnp.asarray(rng.normal(size=40), jnp.float32)
    # Two of the places have no candidate, and one item is denied.
    allow = np.full((6, 2), -1, np.int32)
    allow[:, 0] = np.arange(6) + 7
    options = {"allow": jnp.asarray(allow)} if short else {"deny": jnp.arange(40) == 3}
    weights = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)

    def f(hidden, table, bias):
        scores, ids = ops.top_k_items(hidden, table, 4, bias=bias, **options, item_block=9)
        return jnp.where(ids >= 0, scores * weights, 0.0).sum(), ids

    (_, ids), grads = run(jax.value_and_grad(f, (0, 1, 2), has_aux=True), hidden, table, bias)
    want = [np.zeros(x.shape) for x in (hidden, table, bias)]
    for (b, place), item in np.ndenumerate(np.asarray(ids)):
        if item >= 0:
            w = double(weights)[b, place]
            want[0][b] += w * double(table)[item]
            want[1][item] += w * double(hidden)[b]
            want[2][item] += w
    for got, w in zip(grads, want, strict=True):
        close(got, w, 2e-6)


def test_no_rows():
    scores, ids = ops.top_k_items(jnp.zeros((0, 3)), jnp.ones((5, 3)), 4)
    assert scores.shape == ids.shape == (0, 4)
    assert (scores.dtype, ids.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.ones(4, np.float32)}, r"hidden must have rank 2, got shape \(4,\)"),
        ({"hidden": np.ones((6, 5), np.float32)}, "one width, got 5 and 4"),
        ({"hidden": np.ones((6, 4), np.float16)}, "hidden must be float32 or bfloat16"),
        ({"k": 0}, "k must be a positive Python integer, got 0"),
        ({"k": 2.0}, "k must be a positive Python integer, got 2.0"),
        ({"k": True}, "k must be a positive Python integer, got True"),
        ({"item_block": 0}, "item_block must be a positive"),
        ({"bias": np.ones(6, np.float32)}, r"bias must have shape \(9,\), got \(6,\)"),
        ({"exclude": np.ones((6, 2), np.float32)}, "exclude must hold integers, got float32"),
        ({"exclude": np.ones(6, np.int32)}, r"exclude must have shape \(6, ids per row\)"),
        ({"exclude": np.ones((5, 2), np.int32)}, r"got \(5, 2\)"),
        ({"exclude": np.ones(9, bool)}, "exclude must hold integers, got bool"),
        ({"allow": np.ones(8, bool)}, r"allow must have shape \(9,\), got \(8,\)"),
        ({"allow": np.ones((6, 9), bool)}, r"allow must have shape \(9,\), got \(6, 9\)"),
        ({"allow": np.ones(6, np.int32)}, "allow must have shape.*give a bool mask of items"),
        ({"deny": np.ones((6, 2), np.float32)}, "deny must hold integers"),
        ({"implementation": "pallas"}, "there is no Pallas kernel"),
    ],
)
def test_what_does_not_fit_raises_while_tracing(change, message):
    arrays = {"hidden": np.ones((6, 4), np.float32), "item_table": np.ones((9, 4), np.float32)}
    call = {"k": 3, **arrays, **change}
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda: ops.top_k_items(**call))
    assert str(error.value).startswith("top_k_items: ")


@pytest.mark.parametrize("kind", ["int8", "uint32", "int64"])
def test_ids_of_any_integer_type(rng, kind):
    exclude = rng.integers(0, 12, (4, 3)).astype(kind)
    check(whole(rng, 4, 2), whole(rng, 12, 2), 3, exclude=exclude)


def test_ids_beyond_int32_do_not_wrap(rng):
    exclude = np.array([[2**32 - 1, 2**31]], np.uint32)
    check(whole(rng, 1, 2), whole(rng, 6, 2), 6, exclude=exclude)


def test_little_memory_at_any_size(monkeypatch):
    """Scores of 22,363 users over a million items would be 89 GB."""
    monkeypatch.undo()
    specs = (
        jax.ShapeDtypeStruct((22_363, 64), jnp.float32),
        jax.ShapeDtypeStruct((1_000_000, 64), jnp.float32),
        jax.ShapeDtypeStruct((22_363, 100), jnp.int32),
    )
    f = jax.jit(lambda h, t, e: ops.top_k_items(h, t, 10, exclude=e))
    assert f.lower(*specs).compile().memory_analysis().temp_size_in_bytes < 60e6
