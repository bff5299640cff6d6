"""The tables that are in the package: every entry fits its call, gains, and changes no value."""

import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import close

from jaxrec.ops import _hstu_core, _time_buckets
from jaxrec_kernels import shapes, tuning
from jaxrec_kernels.hstu_attention import plan
from jaxrec_kernels.hstu_attention import tpu as hstu_tpu
from jaxrec_kernels.linear_cross_entropy import tiling, tpu_backward, tpu_forward
from jaxrec_kernels.long_attention import plan as long_plan
from jaxrec_kernels.positional_kernel_attention import spec
from jaxrec_kernels.positional_kernel_attention import tpu as whole_rows_tpu
from jaxrec_kernels.tuning import lookup, table


def entries():
    """(chip, entry) of all files."""
    for file in resources.files("jaxrec_kernels.tuning").iterdir():
        if file.name.endswith(".json"):
            values = json.loads(file.read_text("utf-8"))
            yield from ((values["chip"], entry) for entry in values["entries"])


ALL = [
    pytest.param(entry, id=f"{chip}-{entry['kernel']}-{entry['measured']['shape']}")
    for chip, entry in entries()
]
WITH_BLOCKS = [x for x in ALL if x.values[0]["blocks"] is not None]
# As an entry could be: of kernels that the tables have no blocks for.
COULD_BE = {
    "kernel": plan.FORWARD,
    "call": {"length": 20, "heads": 1, "head_dim": 16},
    "blocks": {"block": 20, "sequences": 4, "together": 2, "group": 1},
}


def call_and_fit(entry):
    """The class of the call that an entry was measured on, and what its blocks become there."""
    kernel, name, dtype = entry["kernel"], entry["measured"]["shape"], entry["measured"]["dtype"]
    itemsize = jnp.dtype(dtype).itemsize
    blocks = entry["blocks"] or entry["measured"]["rule"]["blocks"]
    if kernel.startswith("linear_cross_entropy"):
        sizes = *shapes.CATALOGUE[name], itemsize
        call = tiling.call_class(*sizes, biased=False)
        return call, tiling.fit(*sizes, biased=False, **blocks)
    batch, length, heads, head_dim = shapes.ATTENTION[name]
    if kernel.startswith("hstu"):
        size = plan.Size(batch, length, heads, head_dim, head_dim, itemsize, fields=3)
        return plan.call_class(size, times=True), plan.fit(size, **blocks)
    if kernel == "long_attention":
        call = long_plan.call_class(length, heads, head_dim, itemsize)
        return call, long_plan.fit(length, heads, head_dim, **blocks)
    mixes = entry["call"]["mixes"]
    query = jax.ShapeDtypeStruct(shapes.ATTENTION[name], dtype)
    size = spec.size_of(query, (jnp.zeros((1, 1, 1)),) * mixes)
    return spec.call_class(size), spec.fit(size, **blocks)


@pytest.mark.parametrize("entry", ALL)
def test_an_entry_is_for_the_call_it_was_measured_on_and_fits_it(entry):
    call, fitted = call_and_fit(entry)
    assert call == entry["call"]
    assert fitted is not None


@pytest.mark.parametrize("entry", ALL)
def test_the_figures_beside_an_entry_bear_it_out(entry):
    measured = entry["measured"]
    rule, best = measured["rule"], measured["best"]
    unit = "cycles" if measured["by"] == "schedule" else "seconds"
    assert measured["gain"] == pytest.approx(1 - best[unit] / rule[unit], abs=1e-4)
    assert measured["tried"] >= 2
    worth = best[unit] <= 0.98 * rule[unit] and best["spills"] <= rule["spills"]
    assert entry["blocks"] == (best["blocks"] if worth else None)


def arrays(*shapes_):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes_]


def catalogue(kernel, blocks):
    positions, items, width = 100, blocks["items"] + 90, 8
    hidden, rows, gain = arrays((positions, width), (items, width), (positions,))
    labels = jnp.arange(positions, dtype=jnp.int32) * 7 % items
    found = tiling.Blocks(**blocks)
    if kernel == tiling.FORWARD:
        return lambda own: tpu_forward.statistics(
            hidden, rows, labels, weighted=True, blocks=own or found, interpret=True
        ), tiling.Blocks(128, 256, 128)
    target, lse = jnp.full((positions,), 3.0), jnp.full((positions,), 9.0)
    return lambda own: tpu_backward.table_gradient(
        hidden, rows, labels, target, lse, gain, blocks=own or found, interpret=True
    ), tiling.Blocks(128, 256, 128)


def hstu(kernel, entry):
    blocks, call = entry["blocks"], entry["call"]
    batch, length, heads = 2 * blocks["sequences"], call["length"], call["heads"]
    shape = batch, length, heads, call["head_dim"]
    query, key, value, d_out = arrays(*[shape] * 4)
    distance, times = arrays((1, length), (129,))
    seconds = jnp.cumsum(jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length), 1)
    ids = jnp.where(jnp.arange(length) < length // 3, 1, 2).astype(jnp.int32)
    ids = jnp.broadcast_to(ids, (batch, length))
    inputs = _hstu_core.Inputs(
        query, key, value, distance, None, times, None, ids, None, seconds, seconds
    )
    size = plan.size_of(query, value, 3)
    sizes = {name: blocks[name] for name in table.KERNELS[kernel].blocks}
    static = {
        "scale": 0.1,
        "normalizer": float(length),
        "edges": tuple(_time_buckets.edges(127, 32)),
        "interpret": True,
    }

    def run(own):
        found = own or plan.fit(size, **sizes)
        if kernel == plan.FORWARD:
            return hstu_tpu.forward(inputs, plan=found, **static)
        return hstu_tpu.backward(inputs, d_out, plan=found, **static)

    return run, plan.plan_for(size)


def whole_rows(kernel, entry):
    blocks, call = entry["blocks"], entry["call"]
    length, heads = call["length"], call["heads"]
    shape = 2 * blocks["rows"], length, heads, call["head_dim"]
    query, key, value, out, d_out = arrays(*[shape] * 5)
    squares = [jnp.tril(x)[None] * 0.1 for x in arrays(*[(length, length)] * call["mixes"])]
    operators = [*squares, None, None][:2]
    lse = jnp.full((shape[0], heads, length), 3.0)
    given = whole_rows_tpu.Arrays(query, key, value, None, None, *operators)
    static = {
        "scale": 0.1,
        "dropout_rate": 0.0,
        "bands": (length, length),
        "segmented": False,
        "interpret": True,
    }
    mine = spec.call_class(spec.size_of(query, tuple(operators)))

    def run(own):
        sizes = {} if own else {(kernel, frozenset(mine.items())): blocks}
        with tuning.using(table.Table("entry", (), sizes)), tuning.looked_up() as lookups:
            if kernel == spec.FORWARD:
                found = whole_rows_tpu.forward(given, **static)
            else:
                found = whole_rows_tpu.backward(given, out, lse, d_out, **static)
        assert [x.chip for x in lookups] == [None if own else "entry"]
        return found

    return run, True


@pytest.mark.parametrize("entry", [*WITH_BLOCKS, pytest.param(COULD_BE, id="hstu")])
def test_blocks_of_an_entry_change_no_value(entry):
    kernel = entry["kernel"]
    if kernel.startswith("linear_cross_entropy"):
        run, usual = catalogue(kernel, entry["blocks"])
    elif kernel.startswith("hstu"):
        run, usual = hstu(kernel, entry)
    elif kernel.startswith("positional"):
        run, usual = whole_rows(kernel, entry)
    else:
        pytest.skip("its own tests run several sizes of blocks")
    found, wanted = (jax.tree.leaves(run(own)) for own in (None, usual))
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 2e-5, kernel)


def test_tables_are_read_once():
    assert table.tables() is table.tables()
    assert lookup.table_for("TPU v5e") is lookup.table_for("TPU v5 lite")
