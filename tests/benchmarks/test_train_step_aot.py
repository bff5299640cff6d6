"""Whole train steps compiled for TPUs: the parts of the program, on small sizes.

Mutations that these tests were seen to fail for: collectives of a loop counted once, the ends of
asynchronous ones counted again, the model's own loss kept where the whole catalogue was asked for,
a row measured again added to the one before.
"""

import json

import pytest

from benchmarks import tpu_aot
from benchmarks.tpu.hlo_text import Program
from benchmarks.tpu.results import Results
from benchmarks.tpu.step_table import NOTE, mesh_of, step_table
from benchmarks.tpu.train_step import (
    SEQUENCES,
    compiled_figures,
    consists_of,
    experiment,
    fullest_batch,
    lowered,
    refusal,
)
from experiments import report
from jaxrec.errors import UserError


def test_the_step_is_that_of_the_experiments():
    sasrec, hstu = experiment("sasrec", dtype="bfloat16"), experiment("hstu")
    assert (sasrec.model.position, sasrec.model.dtype) == ("kernel", "bfloat16")
    assert (hstu.model.bias, hstu.model.normalize) == ("position+time", True)
    assert (hstu.loss.name, hstu.loss.temperature) == ("full_softmax", 0.05)
    assert experiment("hstu", loss="own").loss.name == "sampled_softmax"
    for config in (sasrec, hstu):
        assert (config.model.width, config.model.blocks, config.data.max_length) == (64, 2, 200)
    with pytest.raises(UserError, match="no train step of 'gru4rec'"):
        experiment("gru4rec")


def test_every_slot_of_the_batch_is_an_event():
    batch = fullest_batch(experiment("hstu", length=5), shards=2)
    assert batch["items"].shape == batch["timestamps"].shape == (SEQUENCES, 5)
    assert batch["valid"].all()
    events = 5 * SEQUENCES
    assert batch["target_valid"].sum() == events
    # Training keeps some room.
    assert events < batch["slots"].size < 1.05 * events


COLLECTIVES = """
%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %out = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%next, %sum)
}

%condition (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %more = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%zero, %a)
  %loop = (s32[], f32[8,128]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %r = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %begun = f32[8,128]{1,0:T(8,128)} all-reduce-start(%r), replica_groups={{0,1}}, to_apply=%add
  ROOT %done = f32[8,128]{1,0:T(8,128)} all-reduce-done(%begun)
}
"""


def test_collectives_count_the_rounds_of_their_loop():
    found = consists_of(Program(COLLECTIVES))
    assert found == {"kernels": {}, "collectives": {"all-reduce": {"count": 4, "bytes": 4 * 4096}}}


def test_what_does_not_fit_is_told_with_the_compilers_figure():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm"
    assert refusal(f"{message}.\n\nTotal")["hbm_bytes"] == {"total": round(18.5 * 2**30)}
    assert refusal("RESOURCE_EXHAUSTED: another text")["hbm_bytes"] == {}


ROW = {"model": "sasrec", "loss": "full_softmax", "items": 1_000_000, "mesh": [1, 1]}
ROW |= {"width": 64, "blocks": 2, "length": 200, "sequences": 128}
ROW |= {"chip": "v5e", "dtype": "float32", "chip_bytes": 16 << 30}
HELD = {"arguments": 3, "temporaries": 2, "outputs": 3, "aliased": 3, "total": 8 << 30}
FITS = ROW | {
    "fits": True,
    "hbm_bytes": HELD,
    "kernels": {"a_kernel": 2},
    "compile_cpu_seconds": 9.0,
}
FITS |= {"collectives": {"all-reduce": {"count": 4, "bytes": 5_000_000}}}
TOO_MUCH = ROW | {"items": 10_000_000, "fits": False, "hbm_bytes": {"total": 20 << 30}}


def test_the_table_and_the_results_say_what_fits(capsys):
    rows = [FITS, TOO_MUCH, ROW | {"error": "killed"}]
    tpu_aot.Console(width=220).print(step_table(rows))
    shown = capsys.readouterr().out
    for text in (NOTE, "50%", "125%, too much", "2 a_kernel", "4 all-reduce 5", "error"):
        assert text in shown
    result = {"note": tpu_aot.NOTE, "versions": {"libtpu": "1"}, "rows": [], "train_steps": rows}
    told = report._tpu_aot(result)
    assert "not measured" in told
    assert "1M items on 1x1 8.6 GB, 10M items on 1x1 21.5 GB (does not fit)" in told


def test_a_results_file_is_continued(tmp_path, capsys):
    path = tmp_path / "rows.json"
    Results(path).add_step(FITS)
    again = Results(path)
    again.add_step(TOO_MUCH)
    again.add_step(FITS | {"mesh": (1, 1), "fits": False})
    written = json.loads(path.read_text())
    assert [r["fits"] for r in written["train_steps"]] == [False, False]
    path.write_text(json.dumps(written | {"versions": {"jax": "0.1"}}))
    assert tpu_aot.main(tpu_aot.Arguments(json=path)) == 2
    assert f"--json {path}: made by jax 0.1, here is" in capsys.readouterr().err
    path.write_text("[]")
    with pytest.raises(UserError, match="not a results file"):
        Results(path)


@pytest.mark.parametrize("text", ["2", "2x", "0x2", "4x2"])
def test_a_mesh_that_is_none_ends_in_one_line(text, capsys):
    assert tpu_aot.main(tpu_aot.Arguments(train_step=("sasrec",), mesh=(text,))) == 2
    assert f"--mesh {text}: " in capsys.readouterr().err
    assert mesh_of("1x4") == (1, 4)


@pytest.mark.slow
def test_a_small_step_compiles():
    """By the program's own functions; the state is given away to the step, and counts once."""
    from tpu_topologies import devices

    # Large enough for the loss to take the kernel.
    config = experiment("sasrec", length=32, sequences=16)
    found = compiled_figures(lowered(config, 20_001, (2, 2), devices("v5e")), 1 << 30)
    held = found["hbm_bytes"]
    assert found["fits"]
    assert held["total"] < 1 << 30
    assert any("positional_kernel" in name for name in found["kernels"])
    assert any("linear_cross_entropy" in name for name in found["kernels"])
    assert "all-reduce" in found["collectives"]
    # Half of 20,002 rows and their two moments.
    assert held["arguments"] > 3 * 10_001 * 64 * 4
    assert held["aliased"] > 0.9 * held["outputs"]
    assert held["total"] < held["arguments"] + held["temporaries"] + 0.1 * held["outputs"]
    json.dumps(found)
