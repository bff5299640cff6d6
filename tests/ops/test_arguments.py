"""What users hand to ops: lists, NumPy arrays and numbers, narrow integers, a mesh that is set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import draw, qkv
from jax.sharding import AxisType, PartitionSpec

from jaxrec import ops
from jaxrec.ops._dispatch import recorded

IDS = [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
VALID = [[True, True, False, True, True], [True] * 5]
TIMES = [[5, 9, 20, 21, 400], [0, 1, 2, 3, 90]]


def attention_calls(rng):
    """Op, arguments, options; arrays as lists of lists."""
    q, k, v = (x.tolist() for x in qkv(rng, 2, 5, 2, 4, 4))
    taps, full = [1.0, 0.5], np.tril(draw(rng, 5, 5)).tolist()
    masks = {"valid": VALID, "segment_ids": IDS}
    tables = {"position_table": draw(rng, 9).tolist(), "time_table": draw(rng, 9).tolist()}
    one = [[x[0]] for x in q]
    cached = {"own_key": one, "own_value": one, "length": [3, 5], "own_valid": [[True], [False]]}
    return {
        "causal": (ops.causal_attention, (q, k, v), {**masks, "distance_bias": [0.1] * 5}),
        "positional": (ops.positional_kernel_attention, (q, k, v, taps, full), masks),
        "mix": (ops.positional_mix, (full, q), {**masks, "positions": IDS}),
        "prefill": (ops.positional_kernel_prefill, (q, k, v, taps, taps), {"capacity": 6}),
        "hstu": (ops.hstu_attention, (q, k, v), {**masks, **tables, "timestamps": TIMES}),
        "hstu, candidates": (ops.hstu_attention, (q, k, v), {"num_candidates": [1, 2]}),
        "cached": (ops.cached_attention, (one, k, v), cached),
        "cached hstu": (
            ops.cached_hstu_attention,
            (one, k, v),
            {**cached, **tables, "timestamps": TIMES, "own_timestamps": [[500], [99]]},
        ),
        "rotary": (ops.rotary_embedding, (q, IDS), {}),
        "positions": (ops.segment_positions, (IDS,), {"valid": VALID}),
        "norm": (ops.layer_norm, (q, [1.0] * 4, [0.5] * 4), {}),
        "rows": (ops.take_rows, (full, IDS), {}),
        "t5": (ops.t5_bias, (full, 7), {"max_distance": 9}),
        "alibi": (ops.alibi_bias, ([0.5, 0.25], 7), {}),
    }


@pytest.mark.parametrize("name", attention_calls(np.random.default_rng(0)))
def test_lists_and_numpy_are_arrays(rng, name):
    op, arguments, options = attention_calls(rng)[name]
    if "hstu" in name:
        op = functools.partial(op, normalizer=7)

    def converted(x, to):
        return to(x) if isinstance(x, list) else x

    def asked(to):
        given = [converted(x, to) for x in arguments]
        return op(*given, **{key: converted(x, to) for key, x in options.items()})

    wanted = asked(jnp.asarray)
    for to in (lambda x: x, np.asarray):
        jax.tree.map(np.testing.assert_array_equal, asked(to), wanted)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16])
def test_narrow_integers_name_every_item(rng, dtype):
    """Fewer items than the integers reach beside more: the same numbers either way."""
    items = 300 if np.iinfo(dtype).bits == 8 else 40_000
    hidden, table, labels = draw(rng, 3, 4), draw(rng, items, 4), [100, 0, 7]
    negatives = [[5, 6]] * 3
    for op, more in [
        (ops.linear_cross_entropy, ()),
        (ops.mean_linear_cross_entropy, ()),
        (ops.sampled_softmax_loss, (np.asarray(negatives, dtype),)),
        (ops.bce_loss, (np.asarray(negatives, dtype),)),
    ]:
        got = op(hidden, table, np.asarray(labels, dtype), *more)
        wanted = op(hidden, table, np.asarray(labels), *more)
        assert np.isfinite(wanted).all()
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(
        ops.take_rows(table, np.asarray(labels, dtype)), table[np.asarray(labels)]
    )
    ranks = np.asarray([1, 2, 90], dtype)
    assert float(ops.ranking_metrics(ranks, 40_000)["hr@40000"]) == 1.0


def test_narrow_positions_read_a_wide_factor(rng):
    x, full = draw(rng, 1, 3, 1, 2), np.tril(draw(rng, 300, 300))
    positions = np.asarray([[3, 50, 100]])
    got = ops.positional_mix(full, x, positions=positions.astype(np.int8))
    np.testing.assert_array_equal(got, ops.positional_mix(full, x, positions=positions))


def test_ids_below_the_integers_are_padding_too():
    with jax.enable_x64(True):
        hidden, table = jnp.ones((1, 2), jnp.float32), jnp.ones((7, 2), jnp.float32)
        below = jnp.asarray([[-(2**32) + 5]])
        _, items = ops.top_k_items(hidden, table, 7, exclude=below)
    assert 5 in items.tolist()[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.dropout(jnp.arange(8), 0.25, key=jax.random.key(0)),
            "x must be float32 or bfloat16",
        ),
        (lambda: ops.dropout(jnp.ones(8), "a", key=jax.random.key(0)), "Python number"),
        (lambda: ops.take_rows(jnp.ones((3, 2)), jnp.ones(2)), "indices must hold integers"),
        (lambda: ops.take_rows(jnp.ones((3, 2)), jnp.array([True])), "indices must hold integers"),
        (lambda: ops.take_rows(jnp.ones(3), jnp.array([1])), r"table must be \[rows, width\]"),
        (lambda: ops.take_rows(jnp.ones((3, 2)), [1], axis="model"), "'model' is no mesh axis"),
        (lambda: ops.layer_norm(jnp.ones(3), epsilon=-1.0), "epsilon must be"),
        (lambda: ops.alibi_slopes(2.0), "heads must be a positive Python integer"),
        (
            lambda: ops.linear_cross_entropy(jnp.ones((2, 0)), jnp.ones((3, 0)), [0, 1]),
            "at least one number",
        ),
        (
            lambda: ops.hstu_attention(
                *[jnp.ones((1, 2, 1, 4))] * 3,
                normalizer=2,
                time_table=jnp.ones(3),
                timestamps=jnp.ones((1, 2), jnp.uint32),
            ),
            "timestamps must be signed",
        ),
        (
            lambda: ops.positional_kernel_attention(
                *[jnp.ones((1, 2, 1, 4))] * 3,
                jnp.ones((2, 2)),
                None,
                structure=("full", "toeplitz"),
                tie=True,
            ),
            "tie=True mixes the values by structure 'full' too",
        ),
        (
            lambda: ops.cached_attention(
                *[jnp.ones((1, 2, 1, 0))] * 3,
                own_key=jnp.ones((1, 2, 1, 0)),
                own_value=jnp.ones((1, 2, 1, 0)),
                length=[1],
            ),
            "head_dim must be positive",
        ),
    ],
)
def test_what_cannot_be_is_told_in_a_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [3e38, 3e38, 3e38]])
def test_weights_without_a_sum_still_give_items(weights):
    ids = ops.sample_items(jax.random.key(0), 3, 50, weights=weights)
    assert ids.shape == (50,)
    assert int(ids.max()) <= 2


def test_a_step_of_no_rows():
    x, taps = jnp.ones((0, 4, 2, 8)), jnp.array([1.0, 0.5])
    _, state = ops.positional_kernel_prefill(x, x, x, taps, taps, capacity=5)
    out, _ = ops.positional_kernel_step(state, x[:, 0], x[:, 0], x[:, 0], taps, taps)
    assert out.shape == (0, 2, 8)


def test_explain_takes_numpy_numbers_and_names_no_classes():
    x = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)
    assert ops.explain("causal_attention", x, x, x, scale=np.float64(0.5), target="tpu")
    with pytest.raises(ValueError, match="no op 'PositionalKernelState'"):
        ops.explain("PositionalKernelState")


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_prefill_runs_what_it_says(implementation):
    x, taps = jnp.ones((1, 4, 1, 64)), jnp.array([1.0, 0.5])
    with recorded() as decisions:
        options = {"capacity": 5, "implementation": implementation}
        jax.eval_shape(
            lambda x: ops.positional_kernel_prefill(x, x, x, taps, taps, **options)[0], x
        )
    assert len({d.choice.implementation for d in decisions}) == 1
    told = ops.explain(
        "positional_kernel_prefill", x, x, x, taps, taps, target="tpu", **options
    ).implementation
    assert told == decisions[0].choice.implementation


CALLS = {
    "causal": lambda x, f: ops.causal_attention(x, x, x, **f),
    "positional": lambda x, f: ops.positional_kernel_attention(
        x, x, x, jnp.ones(3), jnp.ones(3), **f
    ),
    "prefill": lambda x, f: ops.positional_kernel_prefill(
        x, x, x, jnp.ones(3), jnp.ones(3), capacity=16, **f
    )[0],
    "hstu": lambda x, f: ops.hstu_attention(x, x, x, normalizer=16, **f),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_kernel_under_a_mesh_that_is_not_manual(name):
    """The compiler does not split a kernel over devices: it would refuse the program."""
    call = CALLS[name]
    x = jax.ShapeDtypeStruct((2, 16, 1, 64), jnp.float32)

    def lowered(f):
        return jax.jit(f).trace(x).lower(lowering_platforms=("tpu",)).as_text()

    assert "tpu_custom_call" in lowered(lambda x: call(x, {}))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert "tpu_custom_call" not in lowered(lambda x: call(x, {}))
        with pytest.raises(ValueError, match=r"inside jax.shard_map over all mesh axes; data"):
            jax.eval_shape(lambda x: call(x, {"implementation": "pallas"}), x)
        spec = PartitionSpec("data")
        inside = jax.shard_map(lambda x: call(x, {}), in_specs=spec, out_specs=spec)
        assert "tpu_custom_call" in lowered(inside)
