"""The tuner, with a measurer that only pretends.

Mutations that these tests are there to fail for: an entry for less than 2 %, or for more spills;
the first better neighbour taken for the best; a search that goes on for ever; entries of other
kernels lost; a table that is half written; a failure that ends the search.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks import tune
from benchmarks.cases import Case
from benchmarks.tpu.measure import cut_as, lookups
from benchmarks.tune import Arguments, main, merged, run
from benchmarks.tuning.measurers import Figure, MeasuringError, figure_of
from benchmarks.tuning.search import Climb, neighbours
from jaxrec.errors import UserError
from jaxrec_kernels import tuning
from jaxrec_kernels.linear_cross_entropy.tiling import BACKWARD, FORWARD
from jaxrec_kernels.shapes import ATTENTION, CATALOGUE, AttentionShape, CatalogueShape
from jaxrec_kernels.tuning import table

CASE = Case("linear_cross_entropy", "v3k", True)
QUIET = Console(quiet=True)


class Pretends:
    """Cycles by a formula; notes what is asked."""

    by, unit, said = "schedule", "cycles", "the compiler said no"

    def __init__(self, cost, apart=True, starts=False):
        self.cost, self.tells_apart, self.sees_starts, self.asked = cost, apart, starts, []

    def measure(self, case, dtype, blocks):
        self.asked.append({name: dict(sizes) for name, sizes in blocks.items()})
        found = {name: self.cost(name, **sizes) for name, sizes in blocks.items()}
        return None if None in found.values() else found


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(CATALOGUE, "v3k", CatalogueShape(1024, 3_416, 16))
    monkeypatch.setitem(ATTENTION, "n50", AttentionShape(16, 20, 1, 16))


def climbed(cost, rule, most=40, fits=lambda blocks: True):
    climb = Climb("positional_kernel_attention", rule, fits, most)
    asked = []
    while climb.asks is not None:
        asked.append(climb.asks)
        climb.tell(cost(**climb.asks))
    return climb.found(), asked


def test_a_climb_ends_at_the_best_that_it_can_reach():
    found, asked = climbed(
        lambda rows, packed: Figure(abs(rows - 32) + 10 * abs(packed - 2) + 100, 0),
        {"rows": 4, "packed": 1},
    )
    assert found.blocks == {"rows": 32, "packed": 2}
    assert asked[0] == found.rule == {"rows": 4, "packed": 1}
    assert len({tuple(x.values()) for x in asked}) == len(asked) == found.tried
    assert found.keeps
    assert found.gain == pytest.approx(1 - 100 / 138)


def test_a_climb_passes_over_what_fails_spills_or_does_not_fit():
    def cost(rows, packed):
        if rows == 8:
            return None
        return Figure(100 - rows - packed, spills=7 if packed == 4 else 3)

    found, asked = climbed(cost, {"rows": 4, "packed": 2}, fits=lambda x: x["rows"] < 32)
    assert found.blocks == {"rows": 4, "packed": 2}
    assert {"rows": 8, "packed": 2} in asked
    assert all(x["rows"] < 32 for x in asked)
    assert climbed(lambda **_: None, {"rows": 4, "packed": 2})[0] is None


def test_a_climb_ends_after_so_many():
    found, asked = climbed(lambda rows, packed: Figure(1e9 - rows, 0), {"rows": 1, "packed": 1}, 5)
    assert len(asked) == found.tried == 5


@pytest.mark.parametrize(
    ("cost", "spills", "keeps"), [(98.0, 5, True), (98.1, 5, False), (50.0, 6, False)]
)
def test_what_is_worth_an_entry(cost, spills, keeps):
    def figure(rows, packed):
        return Figure(cost, spills) if rows == 2 else Figure(100.0, 5)

    found, _ = climbed(figure, {"rows": 4, "packed": 1})
    assert found.keeps == keeps


@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [
        (FORWARD, {"positions": 128, "items": 256, "chunk": 128}),
        ("hstu_attention_forward", {"block": 50, "sequences": 1, "together": 1, "group": 1}),
        ("positional_kernel_attention_forward", {"rows": 1, "packed": 1}),
        ("long_attention", {"block": 128}),
    ],
)
def test_neighbours_have_all_sizes_and_none_is_nothing(kernel, blocks):
    found = list(neighbours(kernel, blocks))
    assert found
    for other in found:
        assert set(other) == set(blocks) == set(table.KERNELS[kernel].blocks)
        assert min(other.values()) > 0


@pytest.mark.usefixtures("small")
def test_a_case_becomes_entries_and_both_kernels_share_a_program(tmp_path):
    def cost(name, positions, items, chunk):
        slow = 1000 if name == BACKWARD else 500
        return Figure(slow - (100 if name == BACKWARD and chunk == 128 else 0), 0)

    measurer, path = Pretends(cost), tmp_path / "tpu_v5e.json"
    other = {"kernel": FORWARD, "call": {"positions": 512, "items": 9984, "width": 64}}
    other["call"] |= {"itemsize": 2, "biased": 1}
    other |= {"blocks": {"positions": 512, "items": 1024, "chunk": 512}, "measured": {}}
    path.write_text(json.dumps(merged(None, "v5e", [other])))
    arguments = Arguments(("linear_cross_entropy",), ("v3k",), json=path)
    assert run(arguments, measurer, QUIET) == 0

    values = json.loads(path.read_text())
    found = {(e["kernel"], e["call"]["items"]): e for e in values["entries"]}
    assert found[FORWARD, 9984] == other
    kept, stays = found[BACKWARD, 3456], found[FORWARD, 3456]
    assert kept["blocks"]["chunk"] == 128
    assert kept["blocks"] == kept["measured"]["best"]["blocks"]
    assert kept["measured"]["gain"] == pytest.approx(0.1)
    assert kept["measured"]["rule"]["cycles"] == 1000
    assert stays["blocks"] is None
    assert stays["measured"]["best"]["cycles"] == 500
    assert any(set(asked) == {FORWARD, BACKWARD} for asked in measurer.asked)
    parsed = table.parse(values, "it")
    assert parsed.find(BACKWARD, kept["call"]) == kept["blocks"]
    assert parsed.find(FORWARD, stays["call"]) is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing half written


@pytest.mark.usefixtures("small")
def test_kernels_that_fail_together_are_tried_alone():
    def cost(name, chunk, **_):
        return None if name == FORWARD and chunk == 128 else Figure(chunk, 0)

    entries = tune.tune(CASE, "bfloat16", Pretends(cost), 40)
    best = {e["kernel"]: e["measured"]["best"]["blocks"]["chunk"] for e in entries}
    assert best[BACKWARD] == 128
    assert best[FORWARD] > 128


@pytest.mark.usefixtures("small")
def test_a_measurer_that_cannot_tell_kernels_apart_gets_one_at_a_time():
    measurer = Pretends(lambda name, **_: Figure(1.0, 0), apart=False)
    tune.tune(Case("hstu_attention", "n50", True), "bfloat16", measurer, 4)
    assert {len(asked) for asked in measurer.asked} == {1}
    assert len({next(iter(asked)) for asked in measurer.asked}) == 2


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("starts", [False, True])
def test_smaller_programs_need_a_clock_that_sees_them_begin(starts):
    measurer = Pretends(lambda name, sequences, **_: Figure(sequences, 0), starts=starts)
    entries = tune.tune(Case("hstu_attention", "n50", True), "bfloat16", measurer, 40)
    for entry in entries:
        rule, best = (entry["measured"][x]["blocks"]["sequences"] for x in ("rule", "best"))
        assert best == (1 if starts else rule)
    assert rule > 1


@pytest.mark.usefixtures("small")
def test_a_rule_that_cannot_be_measured_is_said_and_the_table_stays(tmp_path):
    path = tmp_path / "tpu_v5e.json"
    with pytest.raises(MeasuringError, match="its rule's blocks: the compiler said no"):
        tune.tune(CASE, "bfloat16", Pretends(lambda *_, **__: None), 4)
    arguments = Arguments(("linear_cross_entropy",), ("v3k",), json=path)
    assert run(arguments, Pretends(lambda *_, **__: None), QUIET) == 1
    assert not path.exists()


@pytest.mark.usefixtures("small")
def test_given_blocks_reach_the_kernels():
    dtype = jnp.dtype("bfloat16")
    known = {x.kernel: x for x in lookups(CASE, dtype)}
    assert set(known) == {FORWARD, BACKWARD}
    blocks = {"positions": 512, "items": 1152, "chunk": 128}
    with cut_as(CASE, dtype, {BACKWARD: blocks}):
        for kernel in known:
            x = known[kernel]
            found = tuning.tuned(kernel, x.call, x.fit, x.rule)
            assert (found._asdict() == blocks) == (kernel == BACKWARD)


def test_figures_are_a_kernels_own_or_those_of_the_whole_program():
    part = {"cycles": 5, "spills": 1}
    figures = {"cycles": 20, "spills": 3, "kernels": {"a.1": part, "a.2": part, "ab.3": part}}
    assert figure_of("a", figures) == Figure(10, 2)
    assert figure_of("long_attention", figures) == Figure(20, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"op": ("softmax",)}, "--op softmax: no such op"),
        ({"shape": ("n7",)}, "--shape n7: no such shape"),
        ({"chip": "v9"}, "--chip v9: no such chip; there are v5e, v6e"),
        ({"most": 0}, "--most 0: must be at least 1"),
        ({"clock": "device"}, "the device at hand is 'cpu', not one of TPU v5 lite"),
    ],
)
def test_wrong_arguments_end_in_one_line(changes, said, capsys):
    assert main(Arguments(**changes)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_another_chips_table_is_not_written_over(tmp_path: Path):
    path = tmp_path / "here.json"
    path.write_text(json.dumps(merged(None, "v6e", [])))
    with pytest.raises(UserError, match="a table for v6e, not for v5e"):
        tune.read_table(path, "v5e")
    path.write_text('{"chip": "v5e"}')
    with pytest.raises(UserError, match="wanted chip, device_kinds and entries"):
        tune.read_table(path, "v5e")
