"""A run on eight virtual devices: what one device gives, read straight into its parts."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_sets import FIRST_USER, ITEMS, compiled_once, copy_of, small_config, trained_run

import jaxrec
from jaxrec.cli.main import main
from jaxrec.devices import BY_ITEM, EVERYWHERE
from jaxrec.errors import UserError
from jaxrec.training.config import MeshConfig
from jaxrec.training.run_folder import RunFolder

MESHES = {"padded": MeshConfig(2, 4), "divided": MeshConfig(0, 2), "items alone": MeshConfig(1, 8)}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with compiled_once():
        yield


@functools.cache
def alone():
    return jaxrec.load(trained_run())


@pytest.fixture(scope="module", params=MESHES)
def run(request):
    return jaxrec.load(trained_run(), mesh=MESHES[request.param])


def test_each_device_has_its_rows(run):
    model = run._placement.model
    for name, value in run.parameters.items():
        spec = BY_ITEM if name == "item_embedding" else EVERYWHERE
        assert value.sharding == run._placement.sharding(spec), name
    table = run.parameters["item_embedding"]
    rows = -(-ITEMS // model)
    assert {s.data.shape for s in table.addressable_shards} == {(rows, 8)}
    np.testing.assert_array_equal(
        np.asarray(table)[:ITEMS], np.asarray(alone().parameters["item_embedding"])
    )
    assert not np.asarray(table)[ITEMS:].any()


def test_one_device_is_the_default_whatever_it_was_trained_on():
    for value in alone().parameters.values():
        assert value.sharding == jax.numpy.zeros(()).sharding


def test_lists_are_those_of_one_device(run):
    for options in ({}, {"filter_seen": False}, {"allow": ["i03", "i29"]}, {"deny": ["i29"]}):
        found = run.recommend(FIRST_USER, k=ITEMS, **options)
        wanted = alone().recommend(FIRST_USER, k=ITEMS, **options)
        assert [r.item_id for r in found] == [r.item_id for r in wanted]
        np.testing.assert_allclose([r.score for r in found], [r.score for r in wanted], atol=1e-5)
    assert (
        run.recommend(history=["i03"])[0].item_id == alone().recommend(history=["i03"])[0].item_id
    )
    found, wanted = run.recommend_all(k=7), alone().recommend_all(k=7)
    np.testing.assert_array_equal(found.items, wanted.items)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)


def test_metrics_are_those_of_one_device(run):
    for part in ("test", "validation"):
        found, wanted = run.evaluate(part), alone().evaluate(part)
        assert dict(found.model) == dict(wanted.model)
        assert found.intervals == wanted.intervals


def test_vectors_and_neighbours_are_those_of_one_device(run):
    np.testing.assert_array_equal(run.item_vectors(), alone().item_vectors())
    assert run.similar_items("i03", ITEMS) == alone().similar_items("i03", ITEMS)


def test_it_is_exported_as_from_one_device(run, tmp_path):
    for which, name in ((run, "mesh"), (alone(), "one")):
        which.export(tmp_path / name, platforms=("cpu",), k=3)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.npy"))
    assert files
    for file in files:
        assert (tmp_path / "mesh" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    manifests = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("mesh", "one")]
    assert manifests[0]["parameters"] == manifests[1]["parameters"]


def test_a_checkpoint_of_other_items_is_refused_before_it_is_padded(tmp_path):
    """Reading would fill up a shorter table with zeros."""
    folder = RunFolder(copy_of(trained_run(), tmp_path / "run"))
    values = json.loads(folder.data.read_text())
    folder.data.write_text(json.dumps(values | {"items": ITEMS + 1}))
    with pytest.raises(UserError, match=r"item_embedding has shape \(30, 8\)"):
        jaxrec.load(folder.path, mesh=MeshConfig(1, 8))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(4, 4), "mesh.data x mesh.model is 4 x 4, but there are 8 devices"),
        (MeshConfig(1, 0), "mesh.model must be positive, got 0"),
        (MeshConfig(-1, 1), "mesh.data must not be negative, got -1"),
    ],
)
def test_a_mesh_that_cannot_be(mesh, message):
    with pytest.raises(UserError, match=message):
        jaxrec.load(trained_run(), mesh=mesh)


def test_what_was_trained_on_a_mesh_is_judged_on_it(tmp_path):
    config = replace(small_config(training__epochs=1), mesh=MeshConfig(2, 4))
    run = jaxrec.fit(config, tmp_path / "run", show_progress=False)
    assert len(run.parameters["item_embedding"].sharding.device_set) == 8
    results = RunFolder(tmp_path / "run").read_results()
    wanted = jaxrec.load(tmp_path / "run").evaluate()
    for name, value in wanted.model.items():
        assert results["metrics"]["test"][name] == value, name


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_commands_take_a_mesh(tmp_path, capsys):
    folder = str(trained_run())
    mesh = ["--mesh.data", "2", "--mesh.model", "4"]
    for words in (
        ["evaluate", folder],
        ["recommend", folder, "--history", "i03,i05"],
        ["similar", folder, "--item", "i03"],
    ):
        said = []
        for options in (mesh, []):
            assert main([*words, *options, "--json"]) == 0
            said.append(last_json(capsys))
        assert _rounded(said[0]) == _rounded(said[1]), words
    for name, options in (("mesh.npy", mesh), ("one.npy", [])):
        assert main(["vectors", folder, "--out", str(tmp_path / name), *options]) == 0
    assert (tmp_path / "mesh.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def test_the_commands_refuse_a_mesh_that_is_not_read(tmp_path, capsys):
    (tmp_path / "lists.csv").write_text("user_id,item_id,rank\n101,i03,1\n")
    words = ["evaluate", str(trained_run()), "--ranked", str(tmp_path / "lists.csv")]
    assert main([*words, "--mesh.model", "2"]) == 2
    assert capsys.readouterr().err == (
        "jaxrec: evaluate: --mesh.data and --mesh.model spread a run's own parameters over "
        "devices; leave them out with --ranked\n"
    )
    assert main(["evaluate", str(trained_run()), "--mesh.model", "16"]) == 2
    assert "1 x 16, but there are 8 devices" in capsys.readouterr().err
    assert main(["export", str(trained_run()), "--out", str(tmp_path), "--mesh.model", "2"]) == 2
    assert "mesh" in capsys.readouterr().err
