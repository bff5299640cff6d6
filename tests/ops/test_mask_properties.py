"""What must not matter does not: of every op, in every form that it has.

Future events, other segments and other rows of the batch are drawn anew, padding becomes NaN, and
neither an output nor a gradient changes by a bit. One compiled function serves all examples of a
case: what is drawn is data alone.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import draw as normal
from catalogue_cases import TILINGS, loss_module
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_compiler import QUICKEST

from jaxrec import ops
from jaxrec.ops import _attention_dense, _attention_factors, _masking

BATCH, LENGTH, HEADS, WIDTH, VALUES = 2, 21, 2, 4, 3
BLOCK = 8
BUCKETS = 16
NAMES = ("query", "key", "value")
# Modules whose name in the package is that of a function.
attention = sys.modules[ops.causal_attention.__module__]
hstu = sys.modules[ops.hstu_attention.__module__]
sampled = sys.modules[ops.bce_loss.__module__]


@dataclass(frozen=True)
class Part:
    """An array, and which of its leading axes' entries may matter.

    Attributes:
      values: as drawn.
      matters: where a change may reach the outputs that are looked at; None for everywhere.
      absent: where even NaN must reach nothing.
      low: takes the dtype of the case; learned arrays mostly stay float32.
    """

    values: np.ndarray
    matters: np.ndarray | None = None
    absent: np.ndarray | None = None
    low: bool = True

    def otherwise(self, rng: np.random.Generator) -> np.ndarray:
        """The same where it matters."""
        if self.matters is None:
            return self.values
        other = np.where(_over(self.matters, self.values), self.values, 10 * like(rng, self.values))
        absent = np.zeros(self.matters.shape, bool) if self.absent is None else self.absent
        return np.where(_over(absent, self.values), np.float32(np.nan), other)


@dataclass(frozen=True)
class Drawn:
    """One example.

    Attributes:
      parts: what is differentiated, by name.
      outputs: the cotangent: `matters` are the outputs that are looked at, `absent` those that must
        be zero, whatever their cotangent is.
      rest: masks and integers.
      otherwise: those of them that may be other ones.
    """

    parts: dict[str, Part]
    outputs: Part
    rest: dict[str, Any]
    otherwise: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A way to call ops.

    Attributes:
      ops: the names of those it is about.
      call: (parts, rest) -> output.
      draw: makes an example.
      patches: (module, name, value), for the form of the op.
      gradients: compare them too; False for what has none, or is not trained through.
      sees: whether what is changed changes some other output for sure; few ranks may stay.
    """

    ops: tuple[str, ...]
    call: Callable[[dict[str, Any], dict[str, Any]], Any]
    draw: Callable[[np.random.Generator], Drawn]
    patches: tuple[tuple[Any, str, Any], ...] = ()
    gradients: bool = True
    sees: bool = True


def like(rng, x):
    return normal(rng, *x.shape)


def _over(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def compile_case(case, dtype):
    def both(parts, d_out, rest):
        if not case.gradients:
            return case.call(parts, rest), {}
        out, pull = jax.vjp(lambda parts: case.call(parts, rest), parts)
        return out, pull(d_out.astype(out.dtype))[0]

    compiled = jax.jit(both, compiler_options=QUICKEST)

    def call(parts, lows, d_out, rest):
        given = {n: jnp.asarray(x, dtype if lows[n] else jnp.float32) for n, x in parts.items()}
        with contextlib.ExitStack() as stack:
            for module, name, value in case.patches:
                stack.enter_context(mock.patch.object(module, name, value))
            found = compiled(given, jnp.asarray(d_out), rest)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), found)

    return call


@functools.cache
def compiled_case(name, dtype):
    return compile_case(CASES[name], dtype)


def check(case, call, seed):
    """Runs one example as drawn and otherwise, and compares."""
    rng = np.random.default_rng(seed)
    drawn = case.draw(rng)
    lows = {name: part.low for name, part in drawn.parts.items()}
    outputs = drawn.outputs
    looked = np.ones((), bool) if outputs.matters is None else outputs.matters
    absent = np.zeros(looked.shape, bool) if outputs.absent is None else outputs.absent
    d_out = np.where(_over(looked, outputs.values), outputs.values, np.float32(0))
    poisoned = np.where(_over(absent, d_out), np.float32(np.nan), d_out)

    own = {name: part.values for name, part in drawn.parts.items()}
    other = {name: part.otherwise(rng) for name, part in drawn.parts.items()}
    out, gradients = call(own, lows, d_out, drawn.rest)
    out_2, gradients_2 = call(other, lows, poisoned, drawn.rest | drawn.otherwise)

    np.testing.assert_array_equal(out_2[looked], out[looked])
    assert np.isfinite(out[looked]).all()
    for x in (out, out_2):
        assert not x[absent].any(), "an output that is not there"
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradients_2[name], gradient, err_msg=name)
        assert np.isfinite(gradient).all()
        matters = drawn.parts[name].matters
        if matters is not None:
            assert not gradient[~matters].any(), name
    # What was changed can be seen, only not where it must not.
    elsewhere = ~looked & ~absent
    if elsewhere.any() and case.sees:
        assert not np.array_equal(out[elsewhere], out_2[elsewhere])
    assert out[looked].any()
    assert not case.gradients or any(g.any() for g in gradients.values())


# Rows of events


def packed_rows(rng, *, segments=True):
    """`valid`, `segment_ids`, and the valid slots of one segment of the first row up to an event.

    The end of that segment comes along.
    """
    cuts = np.sort(rng.choice(np.arange(1, LENGTH), rng.integers(0, 4) * segments, replace=False))
    edges = [0, *cuts.tolist(), LENGTH]
    names = rng.permutation(100)[: len(edges) - 1] - 50
    ids = np.tile(np.repeat(names, np.diff(edges)).astype(np.int32), (BATCH, 1))
    valid = rng.random((BATCH, LENGTH)) > 0.2
    valid[:, : rng.integers(0, 4)] = False
    valid[:, LENGTH - rng.integers(0, 4) :] = False
    valid[1] &= rng.random() > 0.2  # or nothing in all of the row
    which = int(rng.integers(len(edges) - 1))
    start, end = edges[which], edges[which + 1]
    stop = int(rng.integers(start + 1, end + 1))
    valid[0, stop - 1] = True
    known = np.zeros((BATCH, LENGTH), bool)
    known[0, start:stop] = valid[0, start:stop]
    return valid, ids, known, end


def other_ids(rng, valid, ids):
    """Padding before the first and behind the last event of a segment gets ids of its own.

    What is between two events of a segment belongs to it: a segment is one run of equal ids.
    """
    other = ids.copy()
    for row in range(BATCH):
        for name in np.unique(ids[row]):
            here = np.flatnonzero(ids[row] == name)
            events = here[valid[row, here]]
            outer = here[(here < min(events, default=LENGTH)) | (here > max(events, default=-1))]
            other[row, outer] = rng.integers(1000, 2000, len(outer))
    return other


def times_of(rng, *shape):
    """Seconds, and others; most of them so near that their buckets differ."""
    seconds = 1_600_000_000 + np.cumsum(np.floor(10 ** rng.uniform(-1, 1.3, shape)), axis=1)
    others = seconds + rng.integers(-90, 90, shape)
    return seconds.astype(np.int32), others.astype(np.int32)


def slots(rng, known, valid):
    """query, key and value of every slot."""
    widths = dict(zip(NAMES, (WIDTH, WIDTH, VALUES), strict=True))
    return {
        name: Part(normal(rng, *known.shape, HEADS, width), known, ~valid)
        for name, width in widths.items()
    }


def rows(learned=None, *, times=False):
    """Packed rows with holes; `learned` are shapes by name."""

    def draw(rng):
        valid, ids, known, end = packed_rows(rng)
        parts = slots(rng, known, valid)
        for name, shape in (learned or {}).items():
            parts[name] = Part(normal(rng, *shape), low=False)
        rest = {"valid": valid, "segment_ids": ids}
        otherwise = {"segment_ids": other_ids(rng, valid, ids)}
        if times:
            seconds, others = times_of(rng, BATCH, LENGTH)
            # The next event's time is part of what an event may know.
            read, last = known.copy(), int(np.flatnonzero(known[0])[-1])
            read[0, [i for i in range(last + 1, end) if valid[0, i]][:1]] = True
            rest["timestamps"] = seconds
            otherwise["timestamps"] = np.where(read, seconds, others).astype(np.int32)
        outputs = Part(normal(rng, BATCH, LENGTH, HEADS, VALUES), known, ~valid)
        return Drawn(parts, outputs, rest, otherwise)

    return draw


def history_and_candidates(rng):
    """A row ends with candidates, of which one is looked at; it has the first one's time."""
    valid, _, _, _ = packed_rows(rng, segments=False)
    counts = rng.integers(2, 6, BATCH).astype(np.int32)
    valid[:, :8] = True
    events = np.flatnonzero(valid[0])
    candidates = events[-counts[0] :]
    known = np.zeros((BATCH, LENGTH), bool)
    known[0, events[: -counts[0]]] = True
    known[0, rng.choice(candidates)] = True
    parts = slots(rng, known, valid) | {
        "position_table": Part(normal(rng, 2 * LENGTH - 1), low=False),
        "time_table": Part(normal(rng, BUCKETS), low=False),
    }
    seconds, others = times_of(rng, BATCH, LENGTH)
    read = known.copy()
    read[0, candidates] = False
    read[0, candidates[0]] = True
    otherwise = {"timestamps": np.where(read, seconds, others).astype(np.int32)}
    outputs = Part(normal(rng, BATCH, LENGTH, HEADS, VALUES), known, ~valid)
    return Drawn(
        parts,
        outputs,
        {"valid": valid, "timestamps": seconds, "num_candidates": counts},
        otherwise,
    )


def masked(f, *learned, **options):
    """`f` of the rows, the learned arrays behind them, and what is in `rest`."""
    return lambda parts, rest: f(*(parts[name] for name in (*NAMES, *learned)), **options, **rest)


def with_bias(make):
    def call(parts, rest):
        return ops.causal_attention(
            *(parts[name] for name in NAMES), distance_bias=make(parts["learned"]), **rest
        )

    return call


def rotated(parts, rest):
    positions = ops.segment_positions(rest["segment_ids"], valid=rest["valid"])
    query, key = (ops.rotary_embedding(parts[name], positions) for name in ("query", "key"))
    return ops.causal_attention(query, key, parts["value"], **rest)


def mixed(structure, parts, rest):
    return ops.positional_mix(parts["kernel"], parts["value"], structure=structure, **rest)


def rows_at_given_positions(rng):
    drawn = rows({"kernel": (LENGTH, LENGTH)})(rng)
    positions = rng.integers(0, LENGTH, (BATCH, LENGTH)).astype(np.int32)
    known = drawn.outputs.matters
    others = rng.integers(-5, LENGTH + 5, positions.shape)
    drawn.rest["positions"] = positions
    drawn.otherwise["positions"] = np.where(known, positions, others).astype(np.int32)
    return drawn


def timed(f, tables=("position_table", "time_table")):
    def call(parts, rest):
        given = {name: parts[name] for name in tables}
        return f(*(parts[name] for name in NAMES), normalizer=17, scale=0.7, **given, **rest)

    return call


def dense_and_blocks(name, case, module):
    """The case as it is, and with rows of several tiles."""
    tiles = (module, "block_for", lambda length: BLOCK)
    return {
        name: case,
        f"{name}, in blocks": Case(case.ops, case.call, case.draw, (*case.patches, tiles)),
    }


def kernel_cases():
    square = (LENGTH, LENGTH)
    forms = {
        "toeplitz": ({"logits": (LENGTH,), "values": (HEADS, 3)}, {}),
        "full": ({"logits": square, "values": square}, {"structure": "full"}),
    }
    cases = {}
    for name, (learned, options) in forms.items():
        call = masked(ops.positional_kernel_attention, "logits", "values", **options)
        cases[f"kernel, {name}"] = Case(("positional_kernel_attention",), call, rows(learned))
    for name, shape, draw in (
        ("mix, taps", (5,), rows({"kernel": (5,)})),
        ("mix, full", square, rows_at_given_positions),
    ):
        structure = "toeplitz" if len(shape) == 1 else "full"
        call = functools.partial(mixed, structure)
        case = Case(("positional_mix",), call, only_value(draw))
        cases |= dense_and_blocks(name, case, _attention_factors)
    return cases


def only_value(draw):
    """Examples of an op that has no queries and keys."""

    def drawn(rng):
        found = draw(rng)
        parts = {name: p for name, p in found.parts.items() if name not in ("query", "key")}
        return Drawn(parts, found.outputs, found.rest, found.otherwise)

    return drawn


# Beside a cache


SLOTS, NEW = 7, 4


def beside_cache(mode, tables, *, times=False):
    """The first row's cache is filled in part; outputs up to one new event are looked at, or it."""

    def draw(rng):
        length = rng.integers(0, SLOTS + 1, BATCH).astype(np.int32)
        own_valid = rng.random((BATCH, NEW)) > 0.3
        event = int(rng.integers(NEW))
        own_valid[0, event] = True
        filled = np.arange(SLOTS)[None] < length[:, None]
        first = np.arange(BATCH)[:, None] == 0
        upto = np.arange(NEW)[None] <= event
        if mode == "independent":
            upto = np.arange(NEW)[None] == event
        known, seen = first & upto & own_valid, first & filled
        widths = {"key": WIDTH, "value": VALUES}
        parts = {"query": Part(normal(rng, BATCH, NEW, HEADS, WIDTH), known, ~own_valid)}
        for name, width in widths.items():
            parts[name] = Part(normal(rng, BATCH, SLOTS, HEADS, width), seen, ~filled)
            own = normal(rng, BATCH, NEW, HEADS, width)
            parts[f"own_{name}"] = Part(own, known, ~own_valid)
        for name, shape in tables.items():
            parts[name] = Part(normal(rng, *shape), low=False)
        rest, otherwise = {"length": length, "own_valid": own_valid}, {}
        if times:
            seconds, others = times_of(rng, BATCH, SLOTS + NEW)
            read, later = known.copy(), np.flatnonzero(own_valid[0, event + 1 :]) + event + 1
            if mode == "causal":
                read[0, later[:1]] = True
            read = np.concatenate([seen, read], axis=1)
            moved = np.where(read, seconds, others).astype(np.int32)
            for target, array in ((rest, seconds), (otherwise, moved)):
                target["timestamps"] = array[:, :SLOTS]
                target["own_timestamps"] = array[:, SLOTS:]
        outputs = Part(normal(rng, BATCH, NEW, HEADS, VALUES), known, ~own_valid)
        return Drawn(parts, outputs, rest, otherwise)

    return draw


def cached(f, mode, **options):
    return lambda parts, rest: f(mode=mode, **parts, **options, **rest)


def cache_cases():
    bias = {"distance_bias": (HEADS, SLOTS + NEW)}
    tables = {"position_table": (2 * (SLOTS + NEW) - 1,), "time_table": (BUCKETS,)}
    cases = {}
    for mode in ("causal", "independent"):
        cases[f"cache, {mode}"] = Case(
            ("cached_attention",),
            cached(ops.cached_attention, mode),
            beside_cache(mode, bias),
        )
        cases[f"hstu cache, {mode}"] = Case(
            ("cached_hstu_attention",),
            cached(ops.cached_hstu_attention, mode, normalizer=13),
            beside_cache(mode, tables, times=True),
        )
    return cases


def history_and_event(rng):
    """A padded history, and one event more for some of the users."""
    valid, _, _, _ = packed_rows(rng, segments=False)
    first = np.arange(BATCH)[:, None] == 0
    comes = rng.random(BATCH) > 0.5
    comes[0] = True
    parts = slots(rng, first & valid, valid)
    for name, width in zip(NAMES, (WIDTH, WIDTH, VALUES), strict=True):
        parts[f"new_{name}"] = Part(normal(rng, BATCH, HEADS, width), first[:, 0], ~comes)
    parts |= {name: Part(normal(rng, LENGTH + 1), low=False) for name in ("logits", "values")}
    looked = np.concatenate([first & valid, first & comes[:, None]], axis=1)
    absent = ~np.concatenate([valid, comes[:, None]], axis=1)
    outputs = Part(normal(rng, BATCH, LENGTH + 1, HEADS, VALUES), looked, absent)
    return Drawn(parts, outputs, {"valid": valid, "comes": comes})


def prefill_and_step(parts, rest):
    factors = parts["logits"], parts["values"]
    rows_ = (parts[name] for name in NAMES)
    out, state = ops.positional_kernel_prefill(
        *rows_, *factors, capacity=LENGTH + 1, valid=rest["valid"]
    )
    event = (parts[f"new_{name}"] for name in NAMES)
    new, _ = ops.positional_kernel_step(state, *event, *factors, valid=rest["comes"])
    return jnp.concatenate([out, new[:, None]], axis=1)


# The catalogue


POSITIONS, ITEMS, SAMPLED = 9, 11, 4
NO_ITEM = np.array([-1, ITEMS, 2**31 - 1, -(2**31)], np.int64)


def positions(*, own=None, corrected=False, everything=False):
    """Some of the valid positions are looked at; labels of the others are other ones.

    Args:
      own: a list of items a position ("own") or one for all ("shared").
      corrected: with the logs of how often an item is drawn.
      everything: all valid positions are looked at, by one number.
    """

    def draw(rng):
        valid = rng.random(POSITIONS) > 0.3
        valid[0] = True
        known = valid & (everything | (rng.random(POSITIONS) > 0.4))
        known[0] = True
        parts = {
            "hidden": Part(normal(rng, POSITIONS, WIDTH), known, ~valid),
            "item_table": Part(normal(rng, ITEMS, WIDTH)),
        }

        def ids(*shape):
            return rng.integers(0, ITEMS, shape).astype(np.int32)

        def other(x):
            """Other items, and none at all where the position is not valid."""
            anything = np.where(_over(valid, x), ids(*x.shape), rng.choice(NO_ITEM, x.shape))
            return np.where(_over(known, x), x, anything).astype(np.int32)

        labels = ids(POSITIONS)
        rest, otherwise = {"labels": labels, "valid": valid}, {"labels": other(labels)}
        if own == "own":
            rest["negatives"] = ids(POSITIONS, SAMPLED)
            otherwise["negatives"] = other(rest["negatives"])
        elif own == "shared":
            rest["negatives"] = ids(SAMPLED)
        if corrected:
            for name, shape in (("log_q", (POSITIONS, SAMPLED)), ("log_q_labels", (POSITIONS,))):
                part = Part(normal(rng, *shape), known, ~valid)
                rest[name], otherwise[name] = part.values, part.otherwise(rng)
        looked = Part(normal(rng, POSITIONS), known, ~valid)
        return Drawn(parts, Part(normal(rng)) if everything else looked, rest, otherwise)

    return draw


def catalogue(f, **options):
    def call(parts, rest):
        labels, valid = rest["labels"], rest["valid"]
        return f(parts["hidden"], parts["item_table"], labels, valid=valid, **options)

    return call


def among_negatives(f):
    def call(parts, rest):
        return f(parts["hidden"], parts["item_table"], mask_collisions=True, **rest)

    return call


def small_blocks(name):
    """Blocks of few positions and items."""
    tiling = TILINGS[name]
    return (
        (loss_module, "CPU_TILING", tiling),
        (loss_module, "ACCELERATOR_TILING", tiling),
        (loss_module, "ONE_PASS_POSITIONS", 1),
    )


def loss_cases():
    cases = {
        "cross-entropy": Case(
            ("linear_cross_entropy",),
            catalogue(ops.linear_cross_entropy, label_smoothing=0.1),
            positions(),
            small_blocks("small"),
        )
    }
    for passes, blocks in (("one pass", "small"), ("two passes", "small_two_pass")):
        cases[f"mean cross-entropy, {passes}"] = Case(
            ("mean_linear_cross_entropy",),
            catalogue(ops.mean_linear_cross_entropy),
            positions(everything=True),
            small_blocks(blocks),
        )
    for op, way, cost in (
        (ops.sampled_softmax_loss, "own", 0),
        (ops.bce_loss, "shared", 0),
        # By all items' scores, as where the catalogue is small.
        (ops.gbce_loss, "own", 1000),
    ):
        patches = ((sampled, "GATHER_COST", cost), (sampled, "CPU_ELEMENTS", 100))
        draw = positions(own=way, corrected=op is ops.sampled_softmax_loss)
        cases[f"{op.__name__}, {way}"] = Case((op.__name__,), among_negatives(op), draw, patches)
    return cases


def users(rng):
    """Some users are looked at; the lists of all have more and other padding."""
    known = rng.random(POSITIONS) > 0.4
    known[0] = True
    seen = rng.integers(0, ITEMS, (POSITIONS, 3))
    seen[rng.random(seen.shape) < 0.4] = -1
    anything = np.where(known[:, None], seen, rng.integers(0, ITEMS, seen.shape))
    anything = np.where(anything == -1, rng.choice(NO_ITEM, seen.shape), anything)
    targets = rng.integers(0, ITEMS, POSITIONS)
    others = np.where(known, targets, rng.integers(0, ITEMS, POSITIONS))
    parts = {
        "hidden": Part(normal(rng, POSITIONS, WIDTH), known),
        "item_table": Part(normal(rng, ITEMS, WIDTH)),
    }
    return Drawn(
        parts,
        Part(normal(rng, POSITIONS, 8), known),
        {"exclude": seen.astype(np.int32), "targets": targets.astype(np.int32)},
        {"exclude": anything.astype(np.int32), "targets": others.astype(np.int32)},
    )


def best_items(parts, rest):
    scores, ids = ops.top_k_items(
        parts["hidden"], parts["item_table"], 4, exclude=rest["exclude"], item_block=3
    )
    return jnp.concatenate([scores, ids.astype(jnp.float32)], axis=1)


def ranks(parts, rest):
    found = ops.target_ranks(
        parts["hidden"], parts["item_table"], rest["targets"], exclude=rest["exclude"]
    )
    return jnp.repeat(found.astype(jnp.float32)[:, None], 8, axis=1)


def ranked(rng):
    valid = rng.random((3, 5)) > 0.4
    valid[0, 0] = True
    found = rng.integers(1, 9, valid.shape)
    found[0, 0] = 1
    others = np.where(valid, found, rng.integers(-9, 2**31, valid.shape))
    return Drawn(
        {},
        Part(normal(rng, 6)),
        {"ranks": found.astype(np.int32), "valid": valid},
        {"ranks": others.astype(np.int32)},
    )


def metrics(parts, rest):
    found = ops.ranking_metrics(rest["ranks"], (1, 5), rest["valid"])
    return jnp.stack([found[name] for name in sorted(found)])


def where_events_stand(rng):
    valid, ids, known, _ = packed_rows(rng)
    last = int(np.flatnonzero(known[0])[-1])
    later = np.zeros((BATCH, LENGTH), bool)
    later[0, last + 1 :] = True
    later[1] = True
    return Drawn(
        {},
        Part(normal(rng, BATCH, LENGTH), known),
        {"valid": valid, "segment_ids": ids},
        {
            "valid": np.where(later, ~valid, valid),
            "segment_ids": np.where(later, rng.integers(0, 9, ids.shape), ids).astype(np.int32),
        },
    )


CASES: dict[str, Case] = {
    **dense_and_blocks(
        "causal", Case(("causal_attention",), masked(ops.causal_attention), rows()), attention
    ),
    **dense_and_blocks(
        "distance bias",
        Case(("causal_attention",), with_bias(lambda x: x), rows({"learned": (HEADS, LENGTH)})),
        attention,
    ),
    "t5": Case(
        ("causal_attention", "t5_bias"),
        with_bias(lambda table: ops.t5_bias(table, LENGTH, max_distance=20)),
        rows({"learned": (8, HEADS)}),
    ),
    "alibi": Case(
        ("causal_attention", "alibi_bias"),
        with_bias(lambda slopes: ops.alibi_bias(slopes, LENGTH)),
        rows({"learned": (HEADS,)}),
    ),
    "rope": Case(("causal_attention", "rotary_embedding"), rotated, rows()),
    **kernel_cases(),
    **dense_and_blocks(
        "hstu",
        Case(
            ("hstu_attention",),
            timed(ops.hstu_attention),
            rows({"position_table": (2 * LENGTH - 1,), "time_table": (BUCKETS,)}, times=True),
        ),
        hstu,
    ),
    **dense_and_blocks(
        "hstu, candidates",
        Case(("hstu_attention",), timed(ops.hstu_attention), history_and_candidates),
        hstu,
    ),
    **cache_cases(),
    "prefill and step": Case(
        ("positional_kernel_prefill", "positional_kernel_step"),
        prefill_and_step,
        history_and_event,
        gradients=False,
    ),
    **loss_cases(),
    "top k": Case(("top_k_items",), best_items, users),
    "target ranks": Case(("target_ranks",), ranks, users, gradients=False, sees=False),
    "metrics": Case(("ranking_metrics",), metrics, ranked, gradients=False),
    "segment positions": Case(
        ("segment_positions",),
        lambda _, rest: 1.0 + ops.segment_positions(**rest).astype(jnp.float32),
        where_events_stand,
        gradients=False,
        sees=False,
    ),
}

# Why an op needs no case.
WITHOUT = {
    "PositionalKernelState": "no op: what prefill and step pass on",
    "alibi_slopes": "of a number of heads alone",
    "dropout": "element by element",
    "explain": "tells, computes nothing",
    "init_positional_kernel": "of sizes alone",
    "layer_norm": "row by row; has no masks",
    "sample_items": "of weights and a key; has no masks",
    "t5_bucket": "element by element",
    "take_rows": "of its own ids alone; has no masks",
}

LOW = [
    "causal",
    "distance bias, in blocks",
    "kernel, toeplitz",
    "mix, full",
    "hstu",
    "cache, independent",
    "hstu cache, independent",
    "cross-entropy",
    "sampled_softmax_loss, own",
]


def test_every_op_has_a_case_or_a_reason():
    covered = {name for case in CASES.values() for name in case.ops}
    assert covered | WITHOUT.keys() == set(ops.__all__)
    assert not covered & WITHOUT.keys()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in CASES] + [(name, jnp.bfloat16) for name in LOW],
    ids=lambda value: value if isinstance(value, str) else jnp.dtype(value).name,
)
@settings(max_examples=8, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_matters_that_must_not(name, dtype, seed):
    check(CASES[name], compiled_case(name, dtype), seed)


def broken(**changes):
    """`visible` with one of its rules broken."""
    right = _masking.visible

    def visible(rows, cols, valid_cols, segment_rows, segment_cols):
        arguments = {
            "rows": rows + changes.get("later", 0),
            "cols": cols,
            "valid_cols": None if "valid" in changes else valid_cols,
            "segment_rows": None if "segments" in changes else segment_rows,
            "segment_cols": None if "segments" in changes else segment_cols,
        }
        return right(**arguments)

    return visible


@pytest.fixture
def traced_anew():
    """What was traced with the right mask would be taken again, and the broken one after."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("changes", [{"later": 1}, {"valid": None}, {"segments": None}])
@pytest.mark.usefixtures("traced_anew")
def test_a_broken_mask_is_seen(changes):
    whole = CASES["causal"]
    patches = ((_attention_dense, "visible", broken(**changes)),)
    case = Case(whole.ops, whole.call, whole.draw, patches)
    call, seen = compile_case(case, jnp.float32), 0
    for seed in range(8):
        try:
            check(case, call, seed)
        except AssertionError:
            seen += 1
    assert seen
