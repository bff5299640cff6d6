"""cached_attention and cached_hstu_attention are the full ops' last rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close, draw, run

from jaxrec import ops

SLOTS, NEW, LENGTHS = 8, 3, np.array([0, 3, 5, 8], np.int32)
BATCH = len(LENGTHS)
cached = {"softmax": ops.cached_attention, "silu": ops.cached_hstu_attention}
full = {"softmax": ops.causal_attention, "silu": ops.hstu_attention}


def events(rng, dtype=np.float32):
    """Cache and new events: query (of the new alone), key, value, times."""
    shapes = [(2, 4), (2, 4), (2, 3)]
    cache = [draw(rng, BATCH, SLOTS, *shape, dtype=dtype) for shape in shapes]
    new = [draw(rng, BATCH, NEW, *shape, dtype=dtype) for shape in shapes]
    times = np.cumsum(10 ** rng.uniform(0, 5, (BATCH, SLOTS + NEW)), axis=1).astype(np.int32)
    return cache, new, times


def options_of(kind, rng):
    if kind == "softmax":
        return {"scale": 0.4, "distance_bias": draw(rng, 2, SLOTS + NEW)}
    tables = {"position_table": draw(rng, 2 * (SLOTS + NEW) - 1), "time_table": draw(rng, 50)}
    return {"scale": 0.4, "normalizer": 13, **tables}


def appended(cache, new):
    """Cache and new events behind each other, and where the new ones come to stand."""
    length = SLOTS + new.shape[1]
    row = np.zeros((BATCH, length, *cache.shape[2:]), cache.dtype)
    for b, filled in enumerate(LENGTHS):
        row[b, :filled] = cache[b, :filled]
        row[b, filled : filled + new.shape[1]] = new[b]
    return row


def at_new(x, count):
    return np.stack([np.asarray(x)[b, n : n + count] for b, n in enumerate(LENGTHS)])


def whole(kind, cache, new, times, options):
    """The full op on the longer sequence, at the new events."""
    rows = [appended(c, n) for c, n in zip(cache, new, strict=True)]
    count = new[0].shape[1]
    valid = np.arange(SLOTS + count)[None] < (LENGTHS + count)[:, None]
    if kind == "silu":
        own_times = times[:, SLOTS : SLOTS + count]
        options = {**options, "timestamps": appended(times[:, :SLOTS], own_times)}
    elif "distance_bias" in options:
        options = {**options, "distance_bias": options["distance_bias"][:, : SLOTS + count]}
    return at_new(run(functools.partial(full[kind], valid=valid, **options), *rows), count)


def beside_cache(kind, cache, new, times, options, mode="causal", **more):
    if kind == "silu":
        more |= {"timestamps": times[:, :SLOTS], "own_timestamps": times[:, SLOTS:]}
    call = functools.partial(cached[kind], mode=mode, **options, **more)

    def f(query, key, value, own_key, own_value):
        return call(query, key, value, own_key=own_key, own_value=own_value, length=LENGTHS)

    return run(f, new[0], *cache[1:], *new[1:])


@pytest.mark.parametrize("kind", cached)
def test_causal_is_the_end_of_the_longer_sequence(rng, kind):
    """The cache filled to nothing, in part, and to the brim; what is not filled is NaN."""
    cache, new, times = events(rng)
    options = options_of(kind, rng)
    wanted = whole(kind, cache, new, times, options)
    for b, filled in enumerate(LENGTHS):
        for x in cache:
            x[b, filled:] = np.nan
    got = beside_cache(kind, cache, new, times, options)
    assert got.dtype == jnp.float32
    close(got, wanted, 1e-5)


@pytest.mark.parametrize("kind", cached)
def test_independent_candidates_are_each_alone_at_the_end(rng, kind):
    cache, new, times = events(rng)
    options = options_of(kind, rng)
    got = beside_cache(kind, cache, new, times, options, mode="independent")
    for c in range(NEW):
        one = [x[:, c : c + 1] for x in new]
        own_times = np.concatenate([times[:, :SLOTS], times[:, SLOTS + c : SLOTS + c + 1]], axis=1)
        close(got[:, c : c + 1], whole(kind, cache, one, own_times, options), 1e-5)


def test_candidates_are_those_of_the_full_op(rng):
    cache, new, times = events(rng)
    times[:, SLOTS:] = times[:, SLOTS : SLOTS + 1]
    options = options_of("silu", rng)
    got = beside_cache("silu", cache, new, times, options, mode="independent")
    counts = np.full(BATCH, NEW, np.int32)
    close(got, whole("silu", cache, new, times, options | {"num_candidates": counts}), 1e-5)


@pytest.mark.parametrize("kind", cached)
def test_what_is_not_there_takes_no_weight(rng, kind):
    """Without what depends on where events stand, as if it had not been passed."""
    cache, new, times = events(rng)
    options = {} if kind == "softmax" else {"normalizer": 13, "time_table": draw(rng, 50)}
    own_valid = np.array([[True, False, True]] * BATCH)
    got = beside_cache(kind, cache, new, times, options, own_valid=own_valid)
    rest = [x[:, [0, 2]] for x in new]
    own_times = np.delete(times, SLOTS + 1, axis=1)
    close(got[:, [0, 2]], beside_cache(kind, cache, rest, own_times, options), 1e-5)


@pytest.mark.parametrize("kind", cached)
def test_gradients_are_those_of_the_full_op(rng, kind):
    """In the tables, the new events and the cache, through a full row that is built in JAX."""
    cache, new, times = events(rng)
    cache, new, times = [x[3:] for x in cache], [x[3:] for x in new], times[3:]
    options = options_of(kind, rng)
    learned = {n: options.pop(n) for n in list(options) if "table" in n or "bias" in n}
    d_out = draw(rng, 1, NEW, 2, 3)

    def by_cache(learned, query, key, value, own_key, own_value):
        more = {"timestamps": times[:, :SLOTS], "own_timestamps": times[:, SLOTS:]}
        out = cached[kind](
            query,
            key,
            value,
            own_key=own_key,
            own_value=own_value,
            length=LENGTHS[3:],
            **options,
            **learned,
            **(more if kind == "silu" else {}),
        )
        return (out * d_out).sum()

    def by_row(learned, query, key, value, own_key, own_value):
        rows = [
            jnp.concatenate(x, axis=1)
            for x in ((cache[0], query), (key, own_key), (value, own_value))
        ]
        more = {"timestamps": times} if kind == "silu" else {}
        return (full[kind](*rows, **options, **learned, **more)[:, SLOTS:] * d_out).sum()

    arguments = (learned, new[0], *cache[1:], *new[1:])
    got, want = (run(jax.grad(f, range(6)), *arguments) for f in (by_cache, by_row))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("kind", cached)
@pytest.mark.parametrize("mode", ["causal", "independent"])
def test_splits_change_nothing(rng, kind, mode):
    """Candidates in two calls; events in two calls, the first ones moved into the cache."""
    cache, new, times = events(rng)
    options = options_of(kind, rng)
    if mode == "causal":
        options.pop("time_table", None)
    more = {"length": LENGTHS - 3, "mode": mode, **options}

    def call(query, key, value, own_key, own_value, seconds, own_seconds, **changed):
        timed = {"timestamps": seconds, "own_timestamps": own_seconds}
        return run(
            lambda *a: cached[kind](
                *a[:3],
                own_key=a[3],
                own_value=a[4],
                **(more | changed),
                **(timed if "time_table" in options else {}),
            ),
            query,
            key,
            value,
            own_key,
            own_value,
        )

    more["length"] = np.array([0, 1, 2, 5], np.int32)
    together = call(new[0], *cache[1:], *new[1:], times[:, :SLOTS], times[:, SLOTS:])
    first, rest = ([x[:, part] for x in new] for part in (slice(2), slice(2, None)))
    parts = [call(first[0], *cache[1:], *first[1:], times[:, :SLOTS], times[:, SLOTS:-1])]
    changed = {}
    if mode == "causal":
        changed["length"] = more["length"] + 2
        for x, y in zip(cache, first, strict=True):
            for b, n in enumerate(more["length"]):
                x[b, n : n + 2] = y[b]
    parts.append(call(rest[0], *cache[1:], *rest[1:], times[:, :SLOTS], times[:, -1:], **changed))
    close(np.concatenate(parts, axis=1), together, 1e-5)


@pytest.mark.parametrize("kind", cached)
def test_bfloat16(rng, kind):
    low = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    cache, new, times = events(rng)
    cache, new = ([np.asarray(low(x), np.float32) for x in part] for part in (cache, new))
    options = options_of(kind, rng)
    wanted = whole(kind, cache, new, times, options)
    got = beside_cache(kind, [low(x) for x in cache], [low(x) for x in new], times, options)
    assert got.dtype == jnp.bfloat16
    close(got, wanted, 2**-6)


@pytest.mark.parametrize("kind", cached)
def test_a_bias_that_does_not_reach_gives_nan(rng, kind):
    """Nothing can be raised from inside a compiled function."""
    cache, new, times = events(rng)
    options = options_of(kind, rng)
    if kind == "softmax":
        options["distance_bias"] = options["distance_bias"][:, :9]
    else:
        options["position_table"] = options["position_table"][: 2 * 9 - 1]
    out = np.asarray(beside_cache(kind, cache, new, times, options))
    broken = np.isnan(out).any((2, 3))
    # The event at index 9 sees the first one from a distance of 9, of which there is no entry.
    np.testing.assert_array_equal(broken, LENGTHS[:, None] + np.arange(NEW)[None] >= 9)


@pytest.mark.parametrize("kind", cached)
@pytest.mark.parametrize("empty", [{"new": 0}, {"batch": 0}, {"slots": 0}])
def test_empty(kind, empty):
    batch, slots, new = (empty.get(n, d) for n, d in (("batch", 2), ("slots", 4), ("new", 3)))
    cache, own = jnp.ones((batch, slots, 1, 2)), jnp.ones((batch, new, 1, 2))
    options = {} if kind == "softmax" else {"normalizer": 4}
    out = cached[kind](
        own, cache, cache, own_key=own, own_value=own, length=jnp.zeros(batch, int), **options
    )
    assert out.shape == own.shape
    assert np.isfinite(out).all()


X = np.zeros((2, 5, 1, 4), np.float32)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("softmax", {"query": X[0]}, r"query must be \[batch, length"),
        ("softmax", {"own_key": X[:, :3]}, r"own_key must be \(2, 5, 1, 4\) beside key"),
        ("softmax", {"own_value": X[..., :3]}, "own_value must be"),
        ("softmax", {"value": X[:1]}, "value must be"),
        ("softmax", {"own_key": jnp.asarray(X, jnp.bfloat16)}, "own_key must have the cache's"),
        ("softmax", {"length": np.zeros(3, np.int32)}, r"length must be int\[batch\] = \[2\]"),
        ("softmax", {"length": np.zeros(2, np.float32)}, "length must be int"),
        ("softmax", {"mode": "both"}, "mode must be 'causal' or 'independent'"),
        (
            "softmax",
            {"own_valid": np.ones((2, 4), bool)},
            r"own_valid must be \[batch, length\] = \[2, 5\]",
        ),
        ("softmax", {"distance_bias": np.ones(4, np.float32)}, "as many distances as the cache"),
        ("softmax", {"distance_bias": np.ones((2, 9), np.float32)}, "with heads=1"),
        ("softmax", {"implementation": "pallas"}, "cannot run"),
        ("silu", {"normalizer": 0}, "normalizer must be a positive"),
        ("silu", {"position_table": np.ones(7, np.float32)}, "N >= 5"),
        ("silu", {"time_table": np.ones(9, np.float32)}, "time_table needs timestamps"),
        (
            "silu",
            {"time_table": np.ones(9, np.float32), "timestamps": np.ones((2, 5), np.int32)},
            "time_table needs own_timestamps",
        ),
        ("silu", {"own_timestamps": np.ones((2, 5), np.int32)}, "own_timestamps needs time_table"),
    ],
)
def test_errors(kind, change, message):
    arguments = dict.fromkeys(("query", "key", "value", "own_key", "own_value"), X)
    arguments |= {"length": np.zeros(2, np.int32)}
    arguments |= ({} if kind == "softmax" else {"normalizer": 5}) | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: cached[kind](**arguments))
