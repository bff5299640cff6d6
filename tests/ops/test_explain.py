"""explain says what `choose` decides, without running anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_cases import loss_module

from jaxrec import ops
from jaxrec.ops._dispatch import Choice
from jaxrec_kernels import tuning

ROWS = jax.ShapeDtypeStruct((8, 16), jnp.float32)
LABELS = jax.ShapeDtypeStruct((8,), jnp.int32)
HEADS = jax.ShapeDtypeStruct((2, 6, 2, 4), jnp.float32)
TAPS = jax.ShapeDtypeStruct((3,), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))

# A call of every op of jaxrec.ops that computes something.
CALLS = {
    "cached_attention": (
        (HEADS, HEADS, HEADS),
        {"own_key": HEADS, "own_value": HEADS, "length": LABELS.update(shape=(2,))},
    ),
    "cached_hstu_attention": (
        (HEADS, HEADS, HEADS),
        {
            "own_key": HEADS,
            "own_value": HEADS,
            "length": LABELS.update(shape=(2,)),
            "normalizer": 6,
        },
    ),
    "causal_attention": ((HEADS, HEADS, HEADS), {}),
    "dropout": ((ROWS, 0.5), {"key": KEY}),
    "hstu_attention": ((HEADS, HEADS, HEADS), {"normalizer": 6}),
    "linear_cross_entropy": ((ROWS, ROWS, LABELS), {}),
    "mean_linear_cross_entropy": (
        (ROWS, ROWS, LABELS),
        {"weights": LABELS.update(dtype="float32")},
    ),
    "positional_kernel_attention": ((HEADS, HEADS, HEADS, TAPS, TAPS), {"structure": "toeplitz"}),
    "top_k_items": ((ROWS, ROWS, 3), {"deny": jax.ShapeDtypeStruct((8,), bool)}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("by_name", [True, False])
def test_every_op_can_be_explained(name, by_name):
    specs, options = CALLS[name]
    choice = ops.explain(name if by_name else getattr(ops, name), *specs, **options)
    assert isinstance(choice, Choice)
    assert choice.op == name
    assert choice.implementation == "xla"
    assert choice.reason


def test_options_reach_the_op():
    specs, _ = CALLS["linear_cross_entropy"]
    forced = ops.explain("linear_cross_entropy", *specs, implementation="xla")
    assert forced.reason == "asked for by the caller"
    wide = ROWS.update(shape=(8, 300))
    with pytest.raises(ValueError, match="implementation='pallas' cannot run: the kernel takes"):
        ops.explain("linear_cross_entropy", wide, wide, specs[2], implementation="pallas")


def test_a_call_that_the_op_refuses_is_refused():
    with pytest.raises(ValueError, match=r"labels must have shape \(8,\), got \(8, 16\)"):
        ops.explain("linear_cross_entropy", ROWS, ROWS, LABELS.update(shape=(8, 16)))


def test_arrays_serve_as_specs_and_nothing_is_computed(monkeypatch):
    monkeypatch.setattr(loss_module, "_losses", lambda options, hidden, *_: hidden[:, 0] / 0)
    choice = ops.explain(
        "linear_cross_entropy", np.ones((4, 2), np.float32), jnp.ones((5, 2)), np.zeros(4, int)
    )
    assert choice.implementation == "xla"


@pytest.mark.parametrize(
    ("target", "implementation"),
    [
        ("tpu", "pallas"),
        ("cpu", "xla"),
        ("gpu", "xla"),
        ("cuda", "xla"),
        (None, "xla"),
        (jax.devices()[0], "xla"),
        (jax.sharding.AbstractDevice("TPU v5 lite", 1, platform="tpu"), "pallas"),
    ],
    ids=str,
)
def test_a_kernel_counts_on_its_own_platforms_only(target, implementation, monkeypatch):
    monkeypatch.setattr(loss_module, "_unsupported", lambda *_, **__: None)
    monkeypatch.setattr(loss_module, "_slower", lambda *_: None)
    specs, _ = CALLS["linear_cross_entropy"]
    choice = ops.explain("linear_cross_entropy", *specs, target=target)
    assert choice.implementation == implementation
    if implementation == "xla":
        assert "the kernel is for tpu, the target is" in choice.reason


OLD = jax.sharding.AbstractDevice("TPU v4", 1, platform="tpu")
WITH_KERNELS = (
    "causal_attention",
    "hstu_attention",
    "linear_cross_entropy",
    "mean_linear_cross_entropy",
    "positional_kernel_attention",
)


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_kernels_are_left_out_on_a_tpu_that_is_too_old_for_them(name):
    """A v4 compiles some of them and fails with others, where a user has asked for nothing."""
    specs, options = CALLS[name]
    if "cross_entropy" in name:
        specs = (*(ROWS.update(shape=(4096, 64)),) * 2, LABELS.update(shape=(4096,)))
        options = {}
    else:
        wide = HEADS.update(shape=(2, 128, 1, 64))
        specs = tuple(wide if spec is HEADS else spec for spec in specs)
    assert ops.explain(name, *specs, target="tpu", **options).implementation == "pallas"
    told = ops.explain(name, *specs, target=OLD, **options)
    assert told.implementation == "xla"
    assert told.reason == "the kernels are made for v5e and later TPUs, and this is a TPU v4"
    forced = ops.explain(name, *specs, target=OLD, implementation="pallas", **options)
    assert forced.implementation == "pallas"

    function = functools.partial(getattr(ops, name), **options)
    with tuning.compiling_for("TPU v4"):
        assert "pallas_call" not in str(jax.make_jaxpr(function)(*specs))
    with tuning.compiling_for("TPU v5 lite"):
        assert "pallas_call" in str(jax.make_jaxpr(function)(*specs))


@pytest.mark.parametrize("name", ["causal_attention", "positional_kernel_attention"])
def test_long_rows_are_left_to_xla(name):
    def explain(length, **options):
        x = jax.ShapeDtypeStruct((2, length, 1, 64), jnp.bfloat16)
        taps = [jax.ShapeDtypeStruct((length,), jnp.float32)] * 2 if "kernel" in name else []
        if taps:
            options["structure"] = "toeplitz"
        return ops.explain(name, x, x, x, *taps, target="tpu", **options)

    assert explain(1024).implementation == "pallas"
    told = explain(1025)
    assert told.implementation == "xla"
    assert "on rows of more than 1,024 events XLA's form is about as fast" in told.reason
    assert explain(1025, implementation="pallas").implementation == "pallas"


@pytest.mark.parametrize("op", ["softmax", len, jnp.sum, "explain", ops.explain])
def test_what_is_no_op_is_named(op):
    with pytest.raises(ValueError, match=r"no op .* in jaxrec.ops; there are .*top_k_items"):
        ops.explain(op, ROWS)


@pytest.mark.parametrize("target", ["tpuv5", 3, "CPU"])
def test_what_is_no_target_is_named(target):
    specs, _ = CALLS["linear_cross_entropy"]
    with pytest.raises(ValueError, match="target must be 'cpu', 'gpu', 'tpu'"):
        ops.explain("linear_cross_entropy", *specs, target=target)
