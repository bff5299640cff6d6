"""The benchmark of the ops, on shapes that take no time.

Mutations that these tests are there to fail for: a naive form without its mask, with the lag the
other way round, with the next event's time taken across sequences; ratios to the wrong row; rounds
that always begin with the same way; overlapping spans of a trace counted twice; a batch that is not
halved; rows that are written in the end only.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels
from benchmarks.cases import Case, argument_names, program
from benchmarks.kernels import Arguments, Bench, Skip, fitted, main, prepared
from benchmarks.timings import clock, naive, rows
from benchmarks.timings.ceilings import Ceilings, measure_ceilings
from benchmarks.timings.clock import Timing, in_turns
from benchmarks.timings.device_trace import busy_seconds, device_seconds
from benchmarks.timings.inputs import arrays
from experiments import report
from jaxrec_kernels.shapes import ATTENTION, CATALOGUE, AttentionShape, CatalogueShape

ROOFS = Ceilings(1e11, 1e10)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION, "n50", AttentionShape(2, 7, 2, 16))
    monkeypatch.setitem(CATALOGUE, "v3k", CatalogueShape(6, 11, 4))
    monkeypatch.setattr(kernels, "measure_ceilings", lambda dtype: ROOFS)


def packed(case: Case) -> list[jax.Array]:
    """The case's arguments, but two sequences in a row, and padding behind them."""
    given = dict(zip(argument_names(case, "float32"), arrays(case, "float32"), strict=True))
    if "ids" in given:
        given["ids"] = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]], jnp.int32)
    return list(given.values())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("op", list(naive._FORMS))
def test_a_naive_form_is_the_op(op: str) -> None:
    case = Case(op, "n50" if "attention" in op else "v3k", False)
    given = packed(case)
    wanted = jax.jit(program(case, "float32", "xla").function)(*given)
    found = jax.jit(program(case, "float32", None, naive.naive(case)).function)(*given)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    assert np.abs(wanted).max() > 0.01


@pytest.mark.usefixtures("tiny")
def test_arguments_are_full_rows_of_the_asked_size() -> None:
    case = Case("hstu_attention", "n50", False, rows=1)
    query, *_, seconds, ids = arrays(case, "bfloat16")
    assert query.shape == (1, 7, 2 * 16)
    assert query.dtype == jnp.bfloat16
    assert (np.asarray(ids) == 1).all()
    assert (np.diff(np.asarray(seconds)) >= 0).all()
    *_, labels = arrays(Case("linear_cross_entropy", "v3k", False, rows=300), "float32")
    assert set(np.asarray(labels).tolist()) == set(range(11))


@pytest.mark.usefixtures("tiny")
def test_a_run(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    target, plot = tmp_path / "rows.jsonl", tmp_path / "roofline.png"
    asked = Arguments(
        op=("causal_attention",), shape=("n50",), seconds=1e-3, rows=1, json=target, plot=plot
    )
    assert main(asked) == 0
    found = {(r["direction"], r["implementation"]): r for r in rows.read(target)}
    assert len(found) == 6
    for direction in ("forward", "gradient"):
        missing = found[direction, "pallas"]
        assert "tpu" in missing["skipped"]
        xla, dense = found[direction, "xla"], found[direction, "naive"]
        assert xla["ratio"] == 1.0
        assert dense["ratio"] == pytest.approx(dense["median_ms"] / xla["median_ms"])
        assert xla["size"]["batch"] == 1
        assert xla["reduced"] == "1 of 2 sequences: asked for by --rows"
        cost = Case("causal_attention", "n50", direction == "gradient", 1).cost(4)
        assert xla["flops_per_second"] == pytest.approx(1e3 * cost.flops / xla["median_ms"])
        roof = max(cost.flops / 1e11, cost.bytes / 1e10)
        assert xla["of_roofline"] == pytest.approx(1e3 * roof / xla["median_ms"])
        assert xla["rounds"] >= clock.LEAST_ROUNDS
        assert xla["spread_ms"][0] <= xla["median_ms"] <= xla["spread_ms"][1]
        assert xla["compile_seconds"] > 0
        assert xla["device_ms"] is None
        assert xla["clock"] == "host, each call awaited"
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "no kernel here" in shown
    assert "n50 *" in shown
    assert f"n50\\* {found['gradient', 'naive']['ratio']:.2f}" in report._kernels(rows.read(target))


@pytest.mark.usefixtures("tiny")
def test_a_crash_loses_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: Case, bench: Bench) -> Any:
        if case.backward:
            raise MemoryError
        yield dict.fromkeys((*rows._KEY, "skipped", "skipped_briefly"), "-")

    monkeypatch.setattr(kernels, "measure", measure)
    target = tmp_path / "rows.jsonl"
    with pytest.raises(MemoryError):
        main(Arguments(op=("hstu_attention",), shape=("n50",), json=target))
    assert len(rows.read(target)) == 1


def test_the_batch_is_halved_until_a_call_is_short_enough() -> None:
    bench = Bench(Arguments(longest=20), "float32", Ceilings(1e11, 1e10), {})
    case = Case("linear_cross_entropy", "v1m", True)
    # Four products of 25,600 x 1,000,000 x 64 take 131 s, so an eighth of them does.
    smaller, why = fitted(case, bench)
    assert smaller.rows == 3_200
    assert why == "3,200 of 25,600 positions: a call would take at least 33 s with 6,400"
    assert smaller.size.items == 1_000_000
    assert fitted(Case("causal_attention", "n50", True), bench) == (
        Case("causal_attention", "n50", True),
        None,
    )
    quick, why = fitted(case, bench._replace(arguments=Arguments(quick=True)))
    assert (quick.rows, why) == (512, "512 of 25,600 positions: asked for by --quick")


def test_what_does_not_fit_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "free_bytes", lambda: 10**9)
    found = prepared(Case("causal_attention", "n8192", False), "naive", "float32")
    assert found == Skip(
        "does not fit: its dense array alone takes 8.6 GB, 1.0 GB are free", "does not fit"
    )
    monkeypatch.setattr(kernels, "free_bytes", lambda: 1000)
    found = prepared(Case("linear_cross_entropy", "v3k", False, 2), "xla", "float32")
    assert isinstance(found, Skip)
    assert "arguments, results and temporaries take" in found.reason


def test_ways_take_turns_until_they_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = {"a": 1.0, "b": 2.0}

    def sample(way: Any, calls: int, *, chained: bool) -> float:
        order.append(way())
        return seconds[way()] * calls

    monkeypatch.setattr(clock, "sample", sample)
    ways = {"a": (lambda: "a", 1), "b": (lambda: "b", 3)}
    found = in_turns(ways, seconds=1e9, chained=False)
    assert "".join(order) == "abbaabbaab"
    assert found == {"a": Timing((1.0,) * 5, 1), "b": Timing((6.0,) * 5, 3)}

    order.clear()
    noise = iter(range(1, 1000))
    monkeypatch.setattr(clock, "sample", lambda *_, **__: float(next(noise)))
    assert len(in_turns(ways, seconds=1e9, chained=False)["a"].seconds) == clock.MOST_ROUNDS
    assert len(in_turns(ways, seconds=0, chained=False)["a"].seconds) == clock.LEAST_ROUNDS


def test_middle_half() -> None:
    timing = Timing((5.0, 1.0, 2.0, 100.0, 3.0), 1)
    assert (timing.median, timing.quartiles) == (3.0, (2.0, 5.0))
    assert Timing((1.0,), 1).quartiles == (1.0, 1.0)


def event(start: int, duration: int) -> str:
    return f"events {{ metadata_id: 1 offset_ps: {start}000 duration_ps: {duration}000 }}"


def profile(*lines: tuple[str, str]) -> Any:
    text = "\n".join(f'lines {{ id: {i} name: "{n}" {e} }}' for i, (n, e) in enumerate(lines))
    names = 'event_metadata { key: 1 value { id: 1 name: "fusion" } }'
    planes = f'planes {{ name: "/host:CPU" lines {{ name: "python" {event(0, 9999)} }} {names} }}'
    planes += f'planes {{ name: "/device:GPU:0" {text} {names} }}'
    return jax.profiler.ProfileData.from_text_proto(planes)


def test_a_device_is_busy_while_any_of_its_streams_is() -> None:
    found = profile(("Stream #1", event(0, 10) + event(20, 10)), ("Stream #2", event(5, 10)))
    assert busy_seconds(found) == pytest.approx(25e-9)
    found = profile(("XLA Modules", event(0, 40)), ("XLA Ops", event(0, 10) + event(50, 10)))
    assert busy_seconds(found) == pytest.approx(40e-9)
    assert busy_seconds(profile()) is None
    assert device_seconds(lambda: None) is None


def test_ceilings_are_rates() -> None:
    found = measure_ceilings("bfloat16", side=64, stream_bytes=1 << 16, repeats=2)
    assert 1e6 < found.flops_per_second < 1e15
    assert 1e6 < found.bytes_per_second < 1e15
    assert Ceilings(10, 100).roofline_seconds(20, 100) == 2
    assert Ceilings(10, 100).roofline_seconds(20, 1000) == 10


def test_of_rows_measured_twice_the_last_counts(tmp_path: Any) -> None:
    file = tmp_path / "rows.jsonl"
    row = dict.fromkeys(rows._KEY, "x")
    rows.append(file, row | {"n": 1})
    rows.append(file, row | {"op": "y", "n": 2})
    rows.append(file, row | {"n": 3})
    with file.open("a") as end:
        end.write('{"op": "cut o')
    assert [r["n"] for r in rows.read(file)] == [2, 3]
    file.write_text(json.dumps({"op": "x"}) + "\n")
    with pytest.raises(rows.UserError, match=r"rows.jsonl, line 1: no row of"):
        rows.read(file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"op": ("attention",)}, "--op attention: no such op; there are "),
        ({"shape": ("n51",)}, "--shape n51: no such shape; there are"),
        ({"op": ("hstu_attention",), "shape": ("v3k",)}, "none of these ops has any of these"),
        ({"rows": 0}, "--rows must be positive, got 0"),
        ({"json": "none/rows.jsonl"}, "none/rows.jsonl: there is no such folder"),
        ({"plot": "roofline.pdf"}, "roofline.pdf: a plot is written to a .png file"),
    ],
)
def test_what_cannot_be_ends_in_one_line(
    given: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {k: kernels.Path(v) if k in ("json", "plot") else v for k, v in given.items()}
    assert main(Arguments(**paths)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
