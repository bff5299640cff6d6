"""An exported run answers as the run itself does, without its code, and damage is told."""

import functools
import json
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from small_sets import (
    ITEMS,
    MAX_LENGTH,
    base_dir,
    compiled_once,
    copy_of,
    histories,
    shop,
    small_config,
    trained_run,
)

import jaxrec
from jaxrec._json_files import write_json
from jaxrec.errors import UserError
from jaxrec.models.config import ESASRecConfig, HSTUConfig
from jaxrec.serving.exported import load_exported
from jaxrec.training.loop import train

IDS = [f"i{i:02d}" for i in range(ITEMS)]
# One event, repeats, more events than the model reads, most of the catalogue.
HISTORIES = [[4], [4, 4, 9], [0, 2, 4, 6], list(range(25)), histories()[7], histories()[30]]
NAMED = [[IDS[i] for i in history] for history in HISTORIES]
# Seconds to years apart, and some together.
TIMES = [(10**9 + np.arange(len(one)) ** 6 // 7).tolist() for one in HISTORIES]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with compiled_once():
        yield


@functools.cache
def run():
    return jaxrec.load(trained_run())


@functools.cache
def folder():
    return run().export(base_dir() / "exported", k=7)


@functools.cache
def exported():
    return load_exported(folder())


def assert_same(found, wanted):
    assert [(r.item_id, r.title) for r in found] == [(r.item_id, r.title) for r in wanted]
    np.testing.assert_allclose([r.score for r in found], [r.score for r in wanted], atol=1e-5)


def test_it_says_what_it_is():
    assert repr(exported()) == (
        f"ExportedRun({str(folder())!r}: sasrec on shop, step {run().step}, for cpu)"
    )


def test_it_answers_as_the_run_does():
    for history in NAMED:
        assert_same(exported().recommend(history), run().recommend(history=history, k=7))
    few = exported().recommend(NAMED[3])
    assert len(few) == 5


def test_items_of_the_history_come_back_if_asked_for():
    for history in NAMED[:3]:
        wanted = run().recommend(history=history, k=4, filter_seen=False)
        assert_same(exported().recommend(history, k=4, filter_seen=False), wanted)


def test_many_at_once_in_their_order():
    many = NAMED * 12  # more than one batch
    found = exported().recommend_many(many, k=5)
    for one, history in zip(found, many, strict=True):
        assert_same(one, exported().recommend(history, k=5))
    assert exported().recommend_many([]) == []


def test_a_fixed_batch_size_and_every_item(tmp_path):
    path = run().export(tmp_path / "fixed", platforms=["cpu"], k=10**6, batch_size=4)
    fixed = load_exported(path)
    assert fixed.manifest.k == ITEMS
    found = fixed.recommend_many(NAMED, k=10**9)
    for one, history in zip(found, NAMED, strict=True):
        assert_same(one, run().recommend(history=history, k=ITEMS))
    assert fixed.manifest.outputs[0]["shape"] == [4, ITEMS]


@pytest.mark.parametrize(
    "model",
    [
        HSTUConfig(width=8, blocks=1, heads=2),
        ESASRecConfig(width=8, blocks=1, heads=2),
    ],
    ids=lambda model: model.type,
)
def test_other_models(model, tmp_path):
    """One reads times, the other counts positions from the newest event."""
    config = small_config(model=model, training__epochs=1)
    train(config, tmp_path / "run", show_progress=False)
    own = jaxrec.load(tmp_path / "run")
    there = load_exported(own.export(tmp_path / "out", platforms=["cpu"], k=5))
    times = TIMES if model.reads_timestamps else None
    assert there.manifest.reads_timestamps == model.reads_timestamps
    for index, one in enumerate(there.recommend_many(NAMED, times)):
        given = times and times[index]
        wanted = own.recommend(history=NAMED[index], times=given, k=5)
        assert_same(one, wanted)
    if not model.reads_timestamps:
        return
    with pytest.raises(UserError, match="the model reads when events happened; give times"):
        there.recommend(["i00"])
    with pytest.raises(UserError, match=re.escape("one a history item (1), got 2")):
        there.recommend(["i00"], [1, 2])
    with pytest.raises(UserError, match=re.escape("one list a history (2), got 1")):
        there.recommend_many([["i00"], ["i01"]], [[1]])
    with pytest.raises(UserError, match="must not decrease"):
        there.recommend(["i00", "i01"], [2, 1])


def test_the_function_itself():
    """What stands on padding is not read; any number of rows and of seen items."""
    items = np.full((3, MAX_LENGTH), 10**6, np.int32)
    items[0, :2], items[1, :3] = [3, 5], [7, 8, 9]
    lengths = np.array([2, 3, 0], np.int32)
    seen = np.full((3, 256), -1, np.int32)
    seen[0, 255], seen[1, :3] = 3, [7, 8, 9]
    scores, best = exported().function(exported().parameters, items, lengths, seen)
    assert scores.shape == best.shape == (3, 7)
    assert (scores.dtype, best.dtype) == (jnp.float32, jnp.int32)
    wanted = run().recommend(history=["i03", "i05"], k=ITEMS, filter_seen=False)
    wanted = [r for r in wanted if r.item_id != "i03"][:7]
    assert [IDS[i] for i in best[0]] == [r.item_id for r in wanted]
    np.testing.assert_allclose(scores[0], [r.score for r in wanted], atol=1e-5)
    wanted = run().recommend(history=["i07", "i08", "i09"], k=7, filter_seen=True)
    assert [IDS[i] for i in best[1]] == [r.item_id for r in wanted]
    assert best[2].tolist() == [-1] * 7
    assert np.isneginf(scores[2]).all()


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_each_platform_has_a_function(platform):
    content = (folder() / f"recommend.{platform}.bin").read_bytes()
    function = jax.export.deserialize(bytearray(content))
    assert function.platforms == (platform,)
    assert function.nr_devices == 1
    # The parameters are arguments, not constants of the function.
    assert len(content) < 200_000


def test_what_is_in_the_folder():
    values = json.loads((folder() / "manifest.json").read_text())
    assert values["format"] == 1
    assert values["model"] == "sasrec"
    assert values["data"] == {"name": "shop", "hash": shop().hash, "items": ITEMS}
    assert (values["max_length"], values["k"], values["step"]) == (MAX_LENGTH, 7, run().step)
    assert values["platforms"] == ["cpu", "tpu", "cuda"]
    assert values["jax"] == jax.__version__
    assert values["batch_size"] is None
    assert values["inputs"] == [
        {"name": "items", "shape": ["batch", MAX_LENGTH], "dtype": "int32"},
        {"name": "lengths", "shape": ["batch"], "dtype": "int32"},
        {"name": "seen", "shape": ["batch", "seen"], "dtype": "int32"},
    ]
    paths = {p.relative_to(folder()).as_posix() for p in folder().rglob("*") if p.is_file()}
    assert paths == {"manifest.json", *values["files"]}
    for name, about in values["files"].items():
        assert about["bytes"] == (folder() / name).stat().st_size
    for name, value in run().parameters.items():
        stored = np.load(folder() / "parameters" / f"{name}.npy", allow_pickle=False)
        np.testing.assert_array_equal(stored, value)
    table = pq.read_table(folder() / "items.parquet")
    assert table.column_names == ["item_id", "title"]
    assert table["item_id"].to_pylist() == IDS


def test_bfloat16_parameters(tmp_path):
    own = jaxrec.load(trained_run())
    name, bind = "item_embedding", own.bind
    own.parameters[name] = own.parameters[name].astype(jnp.bfloat16)
    own.bind = lambda p: bind({**p, name: p[name].astype(jnp.float32)})
    there = load_exported(own.export(tmp_path / "out", platforms=["cpu"], k=5))
    assert there.parameters[name].dtype == jnp.bfloat16
    np.testing.assert_array_equal(there.parameters[name], own.parameters[name])


def test_ranking_needs_no_model_code():
    code = f"""
import sys
from jaxrec.serving.exported import load_exported
found = load_exported({str(folder())!r}).recommend({NAMED[2]!r})
print(*(r.item_id for r in found))
heavy = "flax orbax optax grain tyro tensorflow_datasets jaxrec.models jaxrec.training jaxrec.ops"
print(*sorted(set(heavy.split()) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, heavy = done.stdout.split("\n")[:2]
    assert found.split() == [r.item_id for r in run().recommend(history=NAMED[2], k=7)]
    assert heavy == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": ["i00", "i99"]}, "item 'i99' is not in the data set shop"),
        ({"history": ["I00"]}, "did you mean 'i00'"),
        ({"history": []}, "the history is empty"),
        ({"history": "i00,i01"}, "history is a list of item ids"),
        ({"history": ["i00"], "k": 0}, "k must be at least 1, got 0"),
        ({"history": ["i00"], "k": 8}, "ranks 7; export it with --k 8"),
    ],
)
def test_what_it_cannot_answer_is_told(arguments, message):
    with pytest.raises(UserError) as caught:
        exported().recommend(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_function_of_a_newer_jax_is_told(tmp_path):
    there = load_exported(copy_of(folder(), tmp_path / "copy"))

    def function(*_):
        raise jax.errors.JaxRuntimeError("Failed to deserialize StableHLO\nand so on")

    there.function = function
    with pytest.raises(UserError, match=r"cannot read what jax .* exported .Failed") as caught:
        there.recommend(["i00"])
    assert "\n" not in str(caught.value)


def remove(name):
    return lambda folder: (folder / name).unlink()


def flip(name):
    def spoil(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def change(**values):
    def spoil(folder):
        stored = json.loads((folder / "manifest.json").read_text())
        write_json(folder / "manifest.json", {**stored, **values})

    return spoil


EMBEDDING = "parameters/item_embedding.npy"
DAMAGE = {
    "no manifest": (remove("manifest.json"), "not an exported run, it has no manifest.json"),
    "manifest not JSON": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json: not JSON",
    ),
    "manifest of something else": (change(format="x"), "not the manifest of an exported run"),
    "newer format": (change(format=2), "manifest.json: format 2, this jaxrec reads format 1"),
    "field of another type": (change(k=True), "manifest.json: k is True; the file is damaged"),
    "field is missing": (change(inputs=None), "manifest.json: inputs is None"),
    "another platform": (
        change(platforms=["tpu"]),
        "was not exported for cpu, only for tpu; export it with --platforms cpu",
    ),
    "no function": (remove("recommend.cpu.bin"), "recommend.cpu.bin: no such file"),
    "function is damaged": (flip("recommend.cpu.bin"), "recommend.cpu.bin: the checksum is not"),
    "no items": (remove("items.parquet"), "items.parquet: no such file"),
    "items are damaged": (flip("items.parquet"), "items.parquet: the checksum is not"),
    "no parameter": (remove(EMBEDDING), f"{EMBEDDING}: no such file"),
    "parameter is damaged": (flip(EMBEDDING), f"{EMBEDDING}: the checksum is not"),
    "parameter elsewhere": (change(parameters={"../x": {}}), "wanted a dotted name"),
    "parameter without a file": (change(parameters={"x": {}}), "files lacks parameters/x.npy"),
    "parameter of another shape": (
        change(parameters={"item_embedding": {"shape": [1], "dtype": "float32"}}),
        "parameters.item_embedding is",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told(tmp_path, spoil, message):
    spoil(copy_of(folder(), tmp_path / "copy"))
    with pytest.raises(UserError) as caught:
        load_exported(tmp_path / "copy")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        load_exported(tmp_path / "gone")


def test_functions_of_other_platforms_may_be_left_behind(tmp_path):
    copy = copy_of(folder(), tmp_path / "copy")
    (copy / "recommend.tpu.bin").unlink()
    (copy / "recommend.cuda.bin").unlink()
    assert load_exported(copy).manifest == exported().manifest


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("new", {"platforms": ["gpu"]}, "unknown platform 'gpu'; known: cpu, tpu, cuda"),
        ("new", {"platforms": []}, "platforms is a list out of cpu, tpu, cuda"),
        ("new", {"platforms": "cpu"}, "platforms is a list out of cpu, tpu, cuda, got 'cpu'"),
        ("new", {"platforms": ["cpu", "cpu"]}, "a platform stands twice in cpu, cpu"),
        ("new", {"k": 0}, "k must be at least 1, got 0"),
        ("new", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("full", {}, "full: is in use; export into a new folder"),
        ("full/thesis.txt", {}, "thesis.txt: is a file"),
        ("absent/new", {}, "absent: no such folder to export into"),
    ],
)
def test_what_cannot_be_exported(tmp_path, out, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("important")
    with pytest.raises(UserError, match=re.escape(message)):
        run().export(tmp_path / out, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch):
    def save(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(UserError, match="out: cannot be written \\(No space left on device\\)"):
        run().export(tmp_path / "out", platforms=["cpu"])
    assert list(tmp_path.iterdir()) == []
