"""The catalogue loss's TPU kernels, interpreted, against float64.

Mutations that these tests were seen to fail for: the maximum not carried from block to block, sums
or weighted rows not moved to the new maximum, the last block's exponentials left out, rows that
fill the last block counted or multiplied as NaN, positions that fill the last block given a share,
labels not taken relative to the block, a label just beyond the table picked, the table's gradient
not set to zero for a new block or written too early, the bias or its gradient left out of one of
the kernels, statistics of shards not combined, the label's part of a gradient left out or given
without its smoothing, a large table's rows gathered without their offset, the derivative of a
kernel left to JAX.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from kernel_cases import SMALL, interpreted, run
from oracles import linear_cross_entropy as oracle

from jaxrec import ops
from jaxrec.ops import _catalogue_kernel
from jaxrec_kernels.linear_cross_entropy.tiling import Blocks, blocks_for, supports
from jaxrec_kernels.linear_cross_entropy.tpu_backward import table_gradient
from jaxrec_kernels.linear_cross_entropy.tpu_forward import statistics

# Relative to the largest element; bfloat16 weights and results have 8 bits.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1.2e-2}


def draw(rng, positions, items, width, dtype=jnp.float32):
    # Logits of about 3: probabilities spread over several items.
    hidden = jnp.asarray(rng.normal(size=(positions, width)) * min(1, 3 / width**0.5), dtype)
    table = jnp.asarray(rng.normal(size=(items, width)), dtype)
    labels = jnp.asarray(rng.integers(items, size=positions), jnp.int32)
    # The first and the last item, and both sides of a block's end.
    edges = [v for v in (0, items - 1, SMALL.items - 1, SMALL.items) if v < items]
    return hidden, table, labels.at[jnp.arange(len(edges))].set(jnp.array(edges))


def double(x):
    return None if x is None else np.asarray(x).astype(np.float64)


def close(got, want, tolerance):
    got, want = double(got), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-30)


@pytest.mark.parametrize(
    ("shape", "dtype", "biased", "smoothing", "blocks"),
    [
        ((300, 600, 64), jnp.bfloat16, False, 0.0, SMALL),
        ((140, 300, 50), jnp.float32, True, 0.1, SMALL),
        ((140, 300, 128), jnp.float32, True, 0.0, SMALL),
        ((5, 7, 3), jnp.float32, False, 0.0, None),
        ((130, 1_100, 8), jnp.float32, False, 0.0, SMALL),
        ((130, 1_100, 128), jnp.float32, False, 0.1, SMALL),
        ((130, 300, 40), jnp.bfloat16, True, 0.0, SMALL),
    ],
    ids=["bf16", "lines", "rows", "tiny", "five blocks", "five blocks of rows", "bf16 biased"],
)
def test_values_and_gradients(rng, monkeypatch, shape, dtype, biased, smoothing, blocks):
    positions, items, _ = shape
    hidden, table, labels = draw(rng, *shape, dtype)
    bias = jnp.asarray(rng.normal(size=items), jnp.float32) if biased else None
    valid = jnp.asarray(rng.random(positions) > 0.3).at[:4].set(True).at[4].set(False)
    weights = jnp.asarray(rng.random(positions) + 0.1, jnp.float32)
    g = jnp.asarray(rng.normal(size=positions), jnp.float32)
    dirty = jnp.where(valid[:, None], hidden, jnp.nan)
    odd = jnp.where(valid, labels, items + 3)
    options = {"valid": valid, "label_smoothing": smoothing}

    def both(hidden, table, bias, weights, g):
        each, pull = jax.vjp(
            lambda h, t, b: ops.linear_cross_entropy(h, t, odd, bias=b, **options),
            hidden,
            table,
            bias,
        )
        mean = jax.value_and_grad(
            lambda h, t, b, w: ops.mean_linear_cross_entropy(
                h, t, odd, bias=b, weights=w, **options
            ),
            (0, 1, 2, 3) if biased else (0, 1, 3),
        )
        alone = ops.linear_cross_entropy(hidden, table, odd, bias=bias, **options)
        return alone, each, pull(g), *mean(hidden, table, bias, weights)

    with interpreted(monkeypatch, blocks):
        # Cotangents of what is invalid may be anything.
        given = jnp.where(valid, g, jnp.inf)
        alone, each, grads, mean, mean_grads = run(both, dirty, table, bias, weights, given)
    exact = (double(hidden), double(table), np.asarray(labels))
    options = {"bias": double(bias), "valid": np.asarray(valid), "label_smoothing": smoothing}
    losses = oracle.losses(*exact, **options)
    close(alone, losses, 2e-6)
    close(each, losses, 2e-6)
    close(mean, oracle.mean(*exact, weights=double(weights), **options), 2e-6)
    share = np.where(valid, double(weights), 0)
    by_weights = np.where(valid, (losses - double(mean)) / share.sum(), 0)
    for got, cotangents, last in ((grads, g, []), (mean_grads, share / share.sum(), [by_weights])):
        wanted = list(oracle.gradients(*exact, np.where(valid, cotangents, 0), **options))
        wanted = (wanted if biased else wanted[:2]) + last
        found = [x for x in got if x is not None]
        for x, want in zip(found, wanted, strict=True):
            close(x, want, TOLERANCE[dtype])


def test_no_races_and_nothing_uninitialised(rng):
    """Memory starts as NaN; every read and write is checked against the others."""
    hidden, table, labels = draw(rng, 130, 200, 8)
    labels = labels.at[5].set(200).at[6].set(-1)
    g = jnp.asarray(rng.normal(size=130), jnp.float32)
    # So large that its exponential alone is infinite: it is a row's of zeros that fills a block.
    bias = jnp.asarray(rng.normal(size=200) + 92, jnp.float32)
    checked = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )
    options = {"blocks": Blocks(128, 128, 128), "interpret": checked}
    logits = double(hidden) @ double(table).T + double(bias)[None]
    shares = np.exp(logits - logits.max(1, keepdims=True))
    lse = logits.max(1) + np.log(shares.sum(1))
    hit = np.asarray(labels)[:, None] == np.arange(200)[None]
    try:
        found = run(partial(statistics, weighted=True, **options), hidden, table, labels, bias)
        races = [interpret_pallas_call.races.races_found]
        gradient = run(
            partial(table_gradient, hit=0.9, **options),
            *(hidden, table, labels, found.target, jnp.asarray(lse, jnp.float32), g, bias),
        )
        races.append(interpret_pallas_call.races.races_found)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert races == [False, False]
    close(found.largest, logits.max(1), 1e-6)
    close(found.total, shares.sum(1), 3e-5)
    close(found.target, (hit * logits).sum(1), 1e-6)
    close(found.weighted, shares @ double(table), 3e-5)
    delta = (np.exp(logits - lse[:, None]) - 0.9 * hit) * double(g)[:, None]
    close(gradient.table, delta.T @ double(hidden), 3e-5)
    close(gradient.bias, delta.sum(0), 3e-5)


def test_what_is_extreme(rng, monkeypatch):
    """Items removed by a bias of -inf, large logits, blocks far apart, a bad label."""
    hidden, table, labels = draw(rng, 140, 300, 4)
    hidden, labels = hidden.at[0].set(3e3).at[1].set(0), labels.at[2].set(300)
    table = table.at[:, 0].set(-jnp.abs(table[:, 0])).at[:, 1:].set(0.0)
    far = jnp.where(jnp.arange(300) < SMALL.items, -200.0, -400.0)
    bias = jnp.where(jnp.arange(300) % 3 == 0, -jnp.inf, far)
    labels = jnp.where(labels % 3 == 0, labels + 1, labels).at[2].set(300)
    g = jnp.asarray(rng.normal(size=140), jnp.float32)

    def f(hidden, table, bias):
        each, pull = jax.vjp(
            lambda h, t, b: ops.linear_cross_entropy(h, t, labels, bias=b), hidden, table, bias
        )
        return each, pull(g)

    with interpreted(monkeypatch):
        losses, (d_hidden, d_table, d_bias) = run(f, hidden, table, bias)
    kept = np.flatnonzero(np.asarray(bias) > -np.inf)
    place = np.searchsorted(kept, np.minimum(np.asarray(labels), 299))
    good = np.arange(140) != 2
    exact = (double(hidden)[good], double(table)[kept], place[good])
    few = {"bias": double(bias)[kept]}
    close(np.asarray(losses)[good], oracle.losses(*exact, **few), 1e-5)
    wanted = oracle.gradients(*exact, double(g)[good], **few)[0]
    close(np.asarray(d_hidden)[good], wanted, 1e-5)
    # What one position does to the table cannot be taken out of it again.
    for bad in (losses[2], d_hidden[2], d_table, d_bias):
        assert np.isnan(bad).all()


def test_rows_of_a_large_table_come_part_by_part(rng, monkeypatch):
    monkeypatch.setattr(_catalogue_kernel, "_TURNED_BYTES", 7 * 128 * 4)
    table = jnp.asarray(rng.normal(size=(20, 3)), jnp.float32)
    labels = jnp.array([0, 6, 7, 13, 14, 19, 20, -1])
    found = _catalogue_kernel._rows_of(labels, table)
    np.testing.assert_array_equal(found[:6], table[labels[:6]])
    np.testing.assert_array_equal(found[6:], np.zeros((2, 3)))


def test_a_table_on_two_devices(rng, monkeypatch):
    """Statistics combine over the items' axis; the last rows of the last shard are no items.

    The interpreter takes no part in the checks of shard_map, and the gradients of its sums are
    others without them: held against XLA's form in the same place, which other tests hold against
    the whole table.
    """
    hidden, table, labels = draw(rng, 256, 600, 8)
    labels = labels % 597
    weights = jnp.asarray(rng.random(256), jnp.float32)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, split = PartitionSpec("data"), PartitionSpec("model")

    def part(hidden, table, labels, weights):
        losses = ops.linear_cross_entropy(
            hidden, table, labels, item_axis="model", num_items=597, label_smoothing=0.1
        )
        return losses * weights

    def both(hidden, table):
        f = jax.shard_map(
            part, mesh=mesh, in_specs=(rows, split, rows, rows), out_specs=rows, check_vma=False
        )
        losses, pull = jax.vjp(lambda h, t: f(h, t, labels, weights), hidden, table)
        return losses, *pull(jnp.cos(losses))

    wanted = run(both, hidden, table)
    with interpreted(monkeypatch):
        found = run(both, hidden, table)
    exact = (double(hidden), double(table)[:597], np.asarray(labels))
    close(found[0], double(weights) * oracle.losses(*exact, label_smoothing=0.1), 1e-5)
    for x, want in zip(found, wanted, strict=True):
        close(x, want, 1e-5)


def test_second_derivatives_are_those_of_xla(rng, monkeypatch):
    hidden, table, labels = draw(rng, 6, 9, 3)
    direction = jnp.asarray(rng.normal(size=table.shape), jnp.float32)

    def product(table):
        gradient = jax.grad(lambda t: ops.linear_cross_entropy(hidden, t, labels).mean())
        by_reverse = jax.grad(lambda t: (gradient(t) * direction).sum())(table)
        return *jax.jvp(gradient, (table,), (direction,)), by_reverse

    wanted = run(product, table)
    with interpreted(monkeypatch, None):
        found = run(product, table)
    for x, want in zip(found, wanted, strict=True):
        close(x, want, 1e-5)


def test_vmap(rng, monkeypatch):
    hidden, table, labels = draw(rng, 3 * 140, 300, 4)

    def f(hidden, table):
        rows = jax.vmap(ops.linear_cross_entropy, (0, None, 0))
        return jnp.sin(rows(hidden, table, labels.reshape(3, 140))).sum()

    with interpreted(monkeypatch):
        d_hidden, d_table = run(jax.grad(f, (0, 1)), hidden.reshape(3, 140, 4), table)
    exact = (double(hidden), double(table), np.asarray(labels))
    wanted = oracle.gradients(*exact, np.cos(oracle.losses(*exact)))
    close(d_hidden.reshape(420, 4), wanted[0], 1e-5)
    close(d_table, wanted[1], 1e-5)


@pytest.mark.parametrize("width", [1, 8, 32, 50, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_default_blocks(width, dtype):
    """They cover what is there, are whole tiles and chunks, and fit the memory of a kernel."""
    itemsize = jnp.dtype(dtype).itemsize
    for positions in (1, 128, 300, 513, 25_600):
        for items in (1, 127, 300, 3_416, 100_000, 10_000_000):
            blocks = blocks_for(positions, items, width, itemsize)
            for count, size in ((positions, blocks.positions), (items, blocks.items)):
                assert size % 128 == 0
                # Little is left over.
                assert -(-count // size) * size <= 1.2 * count + 256
            assert blocks.items % blocks.chunk == 0
            assert blocks.items > blocks.chunk
            lanes = max(width, 8) * itemsize
            logits = blocks.positions * blocks.items * (4 + itemsize)
            rows = 3 * blocks.items * lanes + 2 * blocks.positions * lanes
            assert logits + rows + 3 * 4 * width * blocks.positions < 15 << 20


@pytest.mark.parametrize(
    ("positions", "items", "reason"),
    [
        (127, 100_000, "below 128 positions"),
        (512, 3_416, "below 2,097,152 logits"),
        (128, 100_000, None),
        (1024, 3_416, None),
    ],
)
def test_few_logits_are_left_to_xla_unless_the_kernel_is_asked_for(positions, items, reason):
    hidden, table = (jax.ShapeDtypeStruct((n, 64), jnp.bfloat16) for n in (positions, items))
    labels = jax.ShapeDtypeStruct((positions,), jnp.int32)
    for op in ("linear_cross_entropy", "mean_linear_cross_entropy"):
        choice = ops.explain(op, hidden, table, labels, target="tpu")
        assert choice.implementation == ("pallas" if reason is None else "xla")
        assert (reason or "its blocks are") in choice.reason
        forced = ops.explain(op, hidden, table, labels, target="tpu", implementation="pallas")
        assert forced.implementation == "pallas"


def test_what_the_kernel_cannot_take_is_said():
    assert supports(64, jnp.dtype("bfloat16"), "tensorfloat32") is None
    assert supports(64, jnp.dtype("float32"), None) is None
    assert "at most 256, got 257" in supports(257, jnp.dtype("float32"), None)
    assert "float16" in supports(64, jnp.dtype("float16"), None)
    assert "'high'" in supports(64, jnp.dtype("float32"), "high")
    rows = jax.ShapeDtypeStruct((2048, 16), jnp.float32)
    labels = jax.ShapeDtypeStruct((2048,), jnp.int32)
    call = partial(ops.explain, "mean_linear_cross_entropy", rows, rows, labels)
    assert call(target="tpu").implementation == "pallas"
    assert "the target is cpu" in call(target="cpu").reason
    with jax.default_matmul_precision("tensorfloat32"):
        assert "'tensorfloat32'" in call(target="tpu").reason
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert "over all mesh axes; data, model is not" in call(target="tpu").reason
