"""What must not matter does not: of every model, with every choice of positions.

Later events, other sequences of the row, other rows and what stands in padding are drawn anew (in
padding an item whose vector is NaN); neither the states nor the gradient of any parameter changes
by a bit. One compiled function serves all examples of a variant: what is drawn is data alone.
"""

import functools
from dataclasses import fields, replace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_compiler import QUICKEST

from jaxrec.models import attention, hstu
from jaxrec.models.binding import build_model, split_model
from jaxrec.models.config import (
    ESASRecConfig,
    HSTUConfig,
    Position,
    PositionalKernelConfig,
    SASRecConfig,
)
from jaxrec.registry import names

ROWS, LENGTH, ITEMS = 2, 9, 12
# Stands in padding alone.
NO_NUMBER = ITEMS - 1

SASREC = SASRecConfig(width=8, blocks=1, heads=2, dropout=0.0)
HSTU = HSTUConfig(width=8, blocks=1, heads=2, dropout=0.0)
FULL = PositionalKernelConfig(logits="full", values="full")
VARIANTS = {
    "sasrec": replace(SASREC, blocks=2, dropout=0.2),
    "sasrec, kernel": replace(SASREC, position="kernel", residual="input"),
    "sasrec, full kernel": replace(SASREC, position="kernel", kernel=FULL),
    "sasrec, full kernel from the newest": replace(
        SASREC, position="additive+kernel", kernel=FULL, position_order="newest"
    ),
    "sasrec, t5": replace(SASREC, position="t5"),
    "sasrec, alibi": replace(SASREC, position="alibi", output_projection=False),
    "sasrec, rope": replace(SASREC, position="rope"),
    "sasrec, relative": replace(SASREC, position="relative", normalize=True),
    "sasrec, none": replace(SASREC, position="none"),
    "esasrec": ESASRecConfig(width=8, blocks=1, heads=2, expansion=2, dropout=0.0),
    "hstu": replace(HSTU, dropout=0.2),
    "hstu, position": replace(HSTU, bias="position", position="none"),
    "hstu, time": replace(HSTU, bias="time", time_buckets=20),
    "hstu, serving": replace(
        HSTU, silu="u", scale="rsqrt", bias="none", projection_bias=True, norm_affine=True,
        group_norm=True, concat=True, normalize=False,
    ),
}  # fmt: skip
LOW = ["sasrec, full kernel", "esasrec", "hstu"]


def test_every_model_and_scheme_has_a_variant():
    assert {config.type for config in VARIANTS.values()} == set(names("model"))
    schemes = {c.position for c in VARIANTS.values() if c.type == "sasrec"}
    assert schemes == set(get_args(Position))
    # And every choice by name that HSTU's config offers.
    hints = get_type_hints(HSTUConfig)
    for choice in fields(HSTUConfig):
        wanted = set(get_args(hints[choice.name]))
        if choice.name != "dtype" and all(isinstance(value, str) for value in wanted) and wanted:
            chosen = {getattr(c, choice.name) for c in VARIANTS.values() if c.type == "hstu"}
            assert chosen == wanted, choice.name


def drawn_model(config):
    """Parameters none of which is at the zero or one that it started from, and `bind`."""
    sizes = {"num_items": ITEMS, "max_length": LENGTH, "seed": 0}
    # Shapes alone: initial values would be compiled one by one.
    parameters, bind = split_model(nnx.eval_shape(lambda: build_model(config, **sizes)))
    rng = np.random.default_rng(0)
    parameters = {
        name: rng.normal(1.0 if name.endswith("scale") else 0.0, 0.5, value.shape).astype(
            np.float32
        )
        for name, value in sorted(parameters.items())
    }
    parameters["item_embedding"][NO_NUMBER] = np.nan
    return parameters, bind


def compile_variant(config):
    """(rows, cotangent) -> states, gradients of all parameters."""
    parameters, bind = drawn_model(config)

    def both(rows, cotangent):
        def states(parameters):
            key = jax.random.key(0) if config.dropout else None
            return bind(parameters).hidden(**rows, key=key)

        out, pull = jax.vjp(states, parameters)
        return out, pull(cotangent.astype(out.dtype))[0]

    compiled = jax.jit(both, compiler_options=QUICKEST)

    def call(rows, cotangent):
        found = compiled(rows, jnp.asarray(cotangent))
        return jax.tree.map(lambda x: np.asarray(x, np.float32), found)

    return call


@functools.cache
def compiled_variant(name, dtype):
    return compile_variant(replace(VARIANTS[name], dtype=dtype))


def draw_rows(config, rng):
    """Rows as training packs them, what of them may be otherwise, and the slots looked at."""
    valid = np.zeros((ROWS, LENGTH), bool)
    ids, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    spans = []
    for row in range(ROWS):
        start = int(rng.integers(0, 3))
        # What is padding says `valid` alone, whatever ids it has.
        ids[row, :start] = rng.integers(0, 2)
        for number in range(1, 4):
            stop = min(start + int(rng.integers(1, 6)), LENGTH)
            if start < stop and (number == 1 or rng.random() < 0.8):
                valid[row, start:stop], ids[row, start:stop] = True, number
                counted = np.arange(stop - start)
                newest = getattr(config, "position_order", "oldest") == "newest"
                positions[row, start:stop] = counted[::-1] if newest else counted
                spans.append((row, start, stop))
                start = stop + int(rng.integers(0, 2))
    row, start, end = spans[int(rng.integers(len(spans)))]
    stop = int(rng.integers(start + 1, end + 1))
    known = np.zeros_like(valid)
    known[row, start:stop] = True
    # Where positions count from the newest event, they belong to the whole sequence.
    sequence, asked = known.copy(), known.copy()
    sequence[row, start:end] = True
    # An event asks at the time of the next one.
    asked[row, start : min(stop + 1, end)] = True

    rows = {
        "items": rng.integers(0, NO_NUMBER, valid.shape),
        "valid": valid,
        "segment_ids": ids,
        "positions": positions,
    }
    other = {
        "items": np.where(valid, rng.integers(0, NO_NUMBER, valid.shape), NO_NUMBER),
        "segment_ids": rng.integers(100, 200, valid.shape),
        "positions": rng.integers(0, LENGTH, valid.shape),
    }
    same = {"items": known, "segment_ids": valid, "positions": sequence}
    if config.reads_timestamps:
        rows["timestamps"] = np.cumsum(np.exp(rng.uniform(0, 15, valid.shape)), 1)
        other["timestamps"], same["timestamps"] = rng.integers(0, 2**31, valid.shape), asked
    rows = {name: x if name == "valid" else x.astype(np.int32) for name, x in rows.items()}
    changed = {
        name: np.where(same[name], rows[name], other[name]).astype(np.int32) for name in other
    }
    return rows, rows | changed, known


def check(config, call, seed):
    rng = np.random.default_rng(seed)
    rows, otherwise, known = draw_rows(config, rng)
    cotangent = rng.normal(size=(ROWS, LENGTH, config.width)).astype(np.float32)
    cotangent[~known] = 0
    states, gradients = call(rows, cotangent)
    states_2, gradients_2 = call(otherwise, cotangent)
    np.testing.assert_array_equal(states_2[known], states[known])
    assert np.isfinite(states).all()
    assert np.isfinite(states_2).all()
    assert states[known].any()
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradients_2[name], gradient, err_msg=name)
        assert np.isfinite(gradient).all(), name
    assert gradients["item_embedding"].any()
    elsewhere = rows["valid"] & ~known
    if elsewhere.any():
        assert not np.array_equal(states[elsewhere], states_2[elsewhere])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in VARIANTS] + [(name, "bfloat16") for name in LOW],
)
@settings(max_examples=8, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_matters_that_must_not(name, dtype, seed):
    check(VARIANTS[name], compiled_variant(name, dtype), seed)


def without(mask):
    """The model's attention as if it had not been given the mask."""

    def broken(op):
        return lambda *arguments, **options: op(
            *arguments, **{k: v for k, v in options.items() if k != mask}
        )

    return broken


@pytest.mark.parametrize(
    ("name", "module", "op", "mask"),
    [
        ("sasrec, none", attention, "causal_attention", "valid"),
        ("sasrec, kernel", attention, "positional_kernel_attention", "segment_ids"),
        ("hstu, serving", hstu, "hstu_attention", "valid"),
        ("hstu, serving", hstu, "hstu_attention", "segment_ids"),
    ],
)
def test_a_mask_that_the_model_forgets_is_seen(monkeypatch, mask, name, module, op):
    monkeypatch.setattr(module.ops, op, without(mask)(getattr(module.ops, op)))
    call, seen = compile_variant(VARIANTS[name]), 0
    for seed in range(8):
        try:
            check(VARIANTS[name], call, seed)
        except AssertionError:
            seen += 1
    assert seen


@functools.cache
def cached(name):
    parameters, bind = drawn_model(VARIANTS[name])
    model = bind({name: jnp.asarray(value) for name, value in parameters.items()})

    def states(items, length, new, **times):
        first = {n: t[:, : LENGTH - 2] for n, t in times.items()}
        later = {n: t[:, LENGTH - 2 :] for n, t in times.items()}
        before, cache = model.prefill(items, length, **first)
        return before, model.extend(cache, new, **later)[0]

    return jax.jit(states, compiler_options=QUICKEST)


@pytest.mark.parametrize("name", ["sasrec", "sasrec, kernel", "hstu"])
@settings(max_examples=8, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_stands_behind_a_history_and_after_a_new_event_never_matters(name, seed):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, LENGTH - 1, ROWS)
    there = np.arange(LENGTH - 2)[None] < length[:, None]
    there[1] = False  # another user's
    items = rng.integers(0, NO_NUMBER, (ROWS, LENGTH - 2))
    behind = np.arange(LENGTH - 2)[None] >= length[:, None]
    others = np.where(behind, NO_NUMBER, rng.integers(0, NO_NUMBER, items.shape))
    new = rng.integers(0, NO_NUMBER, (ROWS, 2))
    newer = np.where([[True, False], [False, False]], new, (new + 1) % NO_NUMBER)
    times, other_times = {}, {}
    if VARIANTS[name].reads_timestamps:
        seconds = np.cumsum(np.exp(rng.uniform(0, 15, (ROWS, LENGTH))), 1).astype(np.int32)
        # The first new event asks at the time of the second.
        read = np.concatenate([there, [[True, True], [False, False]]], axis=1)
        moved = np.where(read, seconds, rng.integers(0, 2**31, seconds.shape)).astype(np.int32)
        times, other_times = {"timestamps": seconds}, {"timestamps": moved}

    def run(items, new, times):
        arrays = (x.astype(np.int32) for x in (items, length, new))
        return map(np.asarray, cached(name)(*arrays, **times))

    before, after = run(items, new, times)
    before_2, after_2 = run(np.where(there, items, others), newer, other_times)
    np.testing.assert_array_equal(before_2[0], before[0])
    np.testing.assert_array_equal(after_2[0, 0], after[0, 0])
    assert np.isfinite(before_2).all()
    assert not np.array_equal(after_2[0, 1], after[0, 1])
