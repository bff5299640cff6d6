"""The prepared form: what is written is what is read, and anything else is told in one line."""

import errno
import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from event_sets import make_set
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data import _store, prepared
from jaxrec.data._manifest import manifest_hash
from jaxrec.data._order import stable_order
from jaxrec.data.paths import data_dir, dataset_dir, dataset_names
from jaxrec.data.prepared import open_prepared, write_prepared
from jaxrec.errors import UserError


@pytest.fixture
def shop(tmp_path):
    return make_set(
        tmp_path / "shop",
        users=[2, 0, 2, 1, 0, 2],
        items=[1, 0, 0, 2, 1, 2],
        timestamps=[30, 20, 10, 5, 20, 10],
        ratings=[1, 2, 3, 4, 5, 4.5],
        user_ids=["ann", "bob", "eve"],
        item_ids=[7, 70, 700],
        item_table=pa.table({"title": ["Seven", None, "Set"], "kind": ["a", "b", "c"]}),
        item_vectors=np.eye(3, 4, dtype=np.float16),
    )


# -- order


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=40),
    st.sampled_from([1, 10**9, 2**58]),
    st.booleans(),
)
def test_order_is_by_user_time_and_place(rows, scale, has_time):
    users = np.array([user for user, _ in rows], np.int32)
    times = np.array([time * scale for _, time in rows], np.int64)
    order = stable_order(users, times if has_time else None)
    expected = sorted(range(len(rows)), key=lambda k: (users[k], times[k] if has_time else 0, k))
    assert (list(range(len(rows))) if order is None else order.tolist()) == expected


def test_order_of_sorted_events_costs_nothing():
    assert stable_order(np.array([0, 0, 1]), np.array([1, 1, 0])) is None


def test_order_where_keys_do_not_fit_64_bits(rng):
    users = rng.integers(0, 50, 3000).astype(np.int32)
    times = rng.integers(0, 4, 3000) * (2**61)
    order = stable_order(users, times)
    assert np.array_equal(order, np.lexsort((np.arange(3000), times, users)))


# -- round trip


def test_events_come_back_by_user_in_time_order(shop):
    assert shop.offsets.tolist() == [0, 2, 3, 6]
    # user 2: time 10 twice, in the order given, then 30
    assert shop.items.tolist() == [0, 1, 2, 0, 2, 1]
    assert shop.timestamps.tolist() == [20, 20, 5, 10, 10, 30]
    assert shop.ratings.tolist() == [2, 5, 4, 3, 4.5, 1]
    assert shop.history(2).tolist() == [0, 2, 1]
    assert (shop.num_users, shop.num_items, shop.num_events) == (3, 3, 6)
    assert (shop.items.dtype, shop.timestamps.dtype) == (np.int32, np.int64)
    assert (shop.ratings.dtype, shop.offsets.dtype) == (np.float32, np.int64)
    assert isinstance(shop.items, np.memmap)
    assert repr(shop) == "Interactions('shop': 3 users, 3 items, 6 events)"


def test_ids_go_both_ways(shop):
    assert shop.user_ids.tolist() == ["ann", "bob", "eve"]
    assert shop.item_ids.tolist() == [7, 70, 700]
    assert shop.item_ids.dtype == np.int64
    assert [shop.user_index(user) for user in ("ann", "bob", "eve")] == [0, 1, 2]
    assert shop.item_index(70) == shop.item_index("70") == shop.item_index(np.int64(70)) == 1
    assert shop.item_id(2) == 700
    assert type(shop.item_id(2)) is int
    assert shop.user_id(1) == "bob"
    assert shop.item_indices(["700", 7, "x", True, None, 7.0]).tolist() == [2, 0, -1, -1, -1, -1]
    assert shop.item_indices(np.array([70, 71])).tolist() == [1, -1]
    assert shop.item_indices(pa.array(["70", "070", "9" * 19])).tolist() == [1, -1, -1]
    assert shop.user_indices(pa.array(["eve", "Eve"]).dictionary_encode()).tolist() == [2, -1]


def test_truth_is_no_id(tmp_path):
    shop = make_set(tmp_path / "shop", [0, 1], [0, 0], user_ids=[0, 1])
    assert shop.user_indices([1, True, np.True_, False]).tolist() == [1, -1, -1, -1]
    with pytest.raises(UserError, match="user True is not in the data set"):
        shop.user_index(True)


def test_whole_numbers_find_text_ids(tmp_path):
    shop = make_set(tmp_path / "shop", [0, 1], [0, 0], user_ids=["7", "007"])
    assert shop.user_index(7) == shop.user_index("7") == 0
    assert shop.user_index("007") == 1
    assert shop.user_indices(np.array([7, 8])).tolist() == [0, -1]


@pytest.mark.parametrize(
    ("given_id", "message"),
    [
        ("Ann", "user 'Ann' is not in the data set shop; did you mean 'ann'?"),
        (" eve ", "did you mean 'eve'?"),
        ("bobb", "did you mean 'bob'?"),
        ("zzzzz", "its user ids look like 'ann'"),
    ],
)
def test_unknown_text_id_names_a_near_one(shop, given_id, message):
    with pytest.raises(UserError) as caught:
        shop.user_index(given_id)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given_id", "message"),
    [
        ("070", "item '070' is not in the data set shop; did you mean 70?"),
        ("71", "its item ids are whole numbers from 7 to 700"),
        (7.5, "item 7.5 is not in the data set shop"),
        (2**70, "is not in the data set shop"),
    ],
)
def test_unknown_number_says_what_there_is(shop, given_id, message):
    with pytest.raises(UserError) as caught:
        shop.item_index(given_id)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_index_out_of_range(shop):
    with pytest.raises(UserError, match="item index 3 is out of range: shop has 3 items"):
        shop.item_id(3)
    with pytest.raises(UserError, match="user index -1 is out of range"):
        shop.history(-1)
    with pytest.raises(UserError, match="user index 3 is out of range"):
        shop.history(3)


def test_titles_vectors_and_texts(shop):
    assert shop.item_titles == ["Seven", None, "Set"]
    assert [shop.item_text(item) for item in range(3)] == ["Seven", "70", "Set"]
    assert shop.item_vectors.dtype == np.float16
    assert shop.item_vectors.tolist() == np.eye(3, 4).tolist()
    assert shop.item_table["kind"].to_pylist() == ["a", "b", "c"]


def test_a_bare_set_has_no_time_ratings_titles_or_vectors(tmp_path):
    bare = make_set(tmp_path / "bare", [1, 0, 1], [2, 1, 0])
    assert bare.timestamps is None
    assert bare.ratings is None
    assert bare.item_titles is None
    assert bare.item_vectors is None
    assert bare.time_unit is None
    assert bare.ticks_per_second is None
    assert bare.history(1).tolist() == [2, 0]
    assert bare.item_text(0) == "500"


def test_time_unit_is_kept(tmp_path):
    shop = make_set(tmp_path / "shop", [0], [0], [5], time_unit="ms")
    assert shop.time_unit == "ms"
    assert shop.ticks_per_second == 1000
    assert shop.hash != make_set(tmp_path / "other", [0], [0], [5]).hash


def test_workers_get_the_files_not_a_copy(shop):
    sent = pickle.dumps(shop)
    assert len(sent) < 500
    assert pickle.loads(sent).items.tolist() == shop.items.tolist()


def test_the_hash_is_of_the_content(tmp_path):
    def make(name, **changes):
        columns = {
            "users": [0, 0, 1],
            "items": [0, 1, 1],
            "timestamps": [1, 2, 3],
            "ratings": [1, 1, 1],
        }
        return make_set(tmp_path / name, **(columns | changes)).hash

    base = make("base")
    assert make("again") == base
    assert len(base) == 64
    # the same events in another order of rows
    assert make("rows", users=[1, 0, 0], items=[1, 0, 1], timestamps=[3, 1, 2]) == base
    changed = [
        make("a", items=[0, 1, 0]),
        make("b", timestamps=[1, 2, 4]),
        make("c", ratings=[1, 1, 2]),
        make("d", timestamps=None),
        make("e", user_ids=["100", "101"]),
        make("f", item_ids=[500, 502]),
        make("g", item_vectors=np.ones((2, 2), np.float32)),
    ]
    assert len({base, *changed}) == len(changed) + 1


# -- paths and names


def test_data_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXREC_DATA_DIR", str(tmp_path / "mine"))
    assert data_dir() == tmp_path / "mine"
    monkeypatch.delenv("JAXREC_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_dir() == tmp_path / "cache" / "jaxrec" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_dir() == tmp_path / ".cache" / "jaxrec" / "data"
    assert dataset_dir("shop") == data_dir() / "shop"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "ü", "x" * 101, 7])
def test_names_that_are_refused(name):
    with pytest.raises(UserError, match="cannot name a data set"):
        dataset_dir(name)


def test_sets_are_found_by_name(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREC_DATA_DIR", str(tmp_path))
    assert open_prepared("shop").hash == shop.hash
    assert open_prepared("shop", data_dir=tmp_path).hash == shop.hash
    assert open_prepared(shop.path).hash == shop.hash
    assert open_prepared(str(shop.path)).hash == shop.hash
    (tmp_path / ".shop.new-x").mkdir()
    (tmp_path / "folder").mkdir()
    assert dataset_names() == ["shop"]


def test_unknown_set_says_what_there_is(shop, tmp_path):
    with pytest.raises(UserError) as caught:
        open_prepared("shp", data_dir=tmp_path)
    text = str(caught.value)
    assert "no data set 'shp'" in text
    assert "there are: shop" in text
    assert "did you mean 'shop'?" in text
    assert "jaxrec data import FILE --name shp" in text
    with pytest.raises(UserError, match="there are none yet"):
        open_prepared("shop", data_dir=tmp_path / "empty")
    with pytest.raises(UserError, match="not a prepared data set"):
        open_prepared(tmp_path)


# -- damage


def _edit_manifest(shop, **changes):
    """As a writer that meant it would have written it."""
    file = shop.path / "manifest.json"
    manifest = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(manifest | {"manifest_hash": manifest_hash(manifest)}))


def test_verify_passes_a_whole_set(shop):
    assert open_prepared(shop.path, verify=True).num_events == 6


@pytest.mark.parametrize(
    "file", ["items.npy", "offsets.npy", "timestamps.npy", "ratings.npy", "items.parquet"]
)
def test_a_missing_file_is_named(shop, file):
    (shop.path / file).unlink()
    with pytest.raises(UserError, match=f"{file}: the file is missing; import the set again"):
        open_prepared(shop.path)


def test_a_truncated_file_is_named(shop):
    file = shop.path / "items.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"items\.npy: truncated, 148 bytes where .* says 152"):
        open_prepared(shop.path)
    file.write_bytes(file.read_bytes() + b"12345678")
    with pytest.raises(UserError, match=r"items\.npy: altered"):
        open_prepared(shop.path)


@pytest.mark.parametrize("file", ["items.npy", "ratings.npy", "users.parquet"])
def test_an_altered_file_is_found_by_verify(shop, file):
    path = shop.path / file
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=f"{file}: altered, its hash is not the manifest's"):
        open_prepared(shop.path, verify=True)


def _replace(shop, column, values):
    """Swaps a column for another one and lets the manifest's file record agree."""
    np.save(shop.path / f"{column}.npy", values)
    size = (shop.path / f"{column}.npy").stat().st_size
    files = shop.manifest["files"]
    files[f"{column}.npy"] = {
        "bytes": size,
        "sha256": _store.sha256_file(shop.path / f"{column}.npy"),
    }
    _edit_manifest(shop, files=files)


def test_a_column_of_another_type_or_size_is_refused(shop):
    _replace(shop, "items", np.zeros(6, np.int64))
    with pytest.raises(UserError, match=r"items\.npy: holds int64\[6\], wanted int32\[6\]"):
        open_prepared(shop.path)
    _replace(shop, "items", np.zeros(5, np.int32))
    with pytest.raises(UserError, match=r"items\.npy: holds int32\[5\], wanted int32\[6\]"):
        open_prepared(shop.path)


def test_pickled_columns_are_refused(shop):
    _replace(shop, "items", np.array([print] * 6, object))
    with pytest.raises(UserError, match=r"items\.npy: cannot be read"):
        open_prepared(shop.path)


def test_offsets_that_do_not_fit_are_refused(shop):
    _replace(shop, "offsets", np.array([0, 3, 2, 6]))
    with pytest.raises(UserError, match=r"offsets\.npy: the offsets are not valid"):
        open_prepared(shop.path)


def test_times_decrease_within_a_user_alone(rng, monkeypatch):
    monkeypatch.setattr(prepared, "_EVENTS_AT_ONCE", 3)
    seen = set()
    for _ in range(200):
        # Users without events too.
        lengths = rng.integers(0, 4, 5)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        times = rng.integers(0, 3, offsets[-1])
        parts = [times[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        wanted = any(part != sorted(part) for part in parts)
        assert prepared._decrease(times, offsets) == wanted, (times, offsets)
        seen.add(wanted)
    assert seen == {True, False}


def test_verify_looks_at_ranges_order_and_hashes(shop):
    _replace(shop, "timestamps", np.array([20, 19, 5, 10, 10, 30]))
    with pytest.raises(UserError, match=r"manifest\.json: altered, its hashes disagree"):
        open_prepared(shop.path, verify=True)
    from jaxrec.data._manifest import content_hash

    def agree():
        manifest = json.loads((shop.path / "manifest.json").read_text())
        _edit_manifest(shop, hash=content_hash(manifest))

    agree()
    with pytest.raises(UserError, match=r"timestamps\.npy: times decrease"):
        open_prepared(shop.path, verify=True)
    # a fall between two users is none
    _replace(shop, "timestamps", np.array([20, 20, 5, 1, 10, 30]))
    agree()
    open_prepared(shop.path, verify=True)
    _replace(shop, "items", np.array([0, 1, 2, 0, 3, 1], np.int32))
    agree()
    with pytest.raises(UserError, match=r"items\.npy: item indices out of range"):
        open_prepared(shop.path, verify=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not the manifest of a prepared data set"),
        ('{"format": "other"}', "not the manifest of a prepared data set"),
    ],
)
def test_a_broken_manifest(shop, text, message):
    (shop.path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=rf"manifest\.json: {message}"):
        open_prepared(shop.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["counts"].update(users=4),
        lambda manifest: manifest.update(tie_order="another"),
        lambda manifest: manifest["source"].pop("kind"),
        lambda manifest: manifest.update(manifest_hash="0" * 64),
    ],
)
def test_a_manifest_whose_entries_were_changed(shop, change):
    file = shop.path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: altered, its entries are not"):
        open_prepared(shop.path)


def test_a_manifest_of_before_it_had_a_hash(shop):
    file = shop.path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["manifest_hash"]
    file.write_text(json.dumps(manifest))
    assert open_prepared(shop.path, verify=True).hash == shop.hash


@pytest.mark.parametrize("size", ["another", "the same"])
def test_a_folder_in_the_place_of_a_file(shop, size):
    file = shop.path / "users.parquet"
    file.unlink()
    file.mkdir()
    if size == "the same":
        records = shop.manifest["files"]
        records["users.parquet"]["bytes"] = file.stat().st_size
        _edit_manifest(shop, files=records)
    with pytest.raises(UserError, match=r"users\.parquet: not a file"):
        open_prepared(shop.path, verify=True)


def test_options_that_json_writes_otherwise_are_no_damage(tmp_path):
    made = make_set(tmp_path / "s", [0], [0], options={"ks": (1, 2), 3: 0.1, "é": None})
    assert open_prepared(made.path, verify=True).manifest["options"]["ks"] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2 is newer than this jaxrec's 1"),
        ({"schema_version": "x"}, "schema version x"),
        ({"counts": {"users": 3}}, "entries are missing"),
        ({"files": []}, "entries are missing"),
        ({"time_unit": "h"}, "entries are missing or of the wrong type"),
    ],
)
def test_a_manifest_of_another_make(shop, changes, message):
    _edit_manifest(shop, **changes)
    with pytest.raises(UserError, match=message):
        open_prepared(shop.path)


# -- writing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": [], "items": [], "timestamps": []}, "at least one event"),
        ({"items": [0, 1]}, "items has shape"),
        ({"users": [0, 1, 2]}, r"users must lie in \[0, 2\)"),
        ({"items": [0, -1, 1]}, r"items must lie in \[0, 2\)"),
        ({"users": [0.0, 1.0, 0.0]}, "users must be integers"),
        ({"timestamps": [1, -2, 3]}, "timestamps must be int64 and not negative"),
        ({"ratings": [1, np.nan, 3]}, "ratings must be finite"),
        ({"user_ids": [5, 5]}, "user_ids holds an id twice"),
        ({"item_ids": ["a", None]}, "item_ids has 1 missing"),
        ({"item_ids": [1.5, 2.5]}, "item_ids must be integers or strings"),
        ({"item_table": pa.table({"title": ["a"]})}, "item_table has 1 rows for 2 items"),
        ({"item_table": pa.table({"item_id": [1, 2]})}, "must not hold item_id"),
        ({"item_vectors": np.ones((3, 2), np.float32)}, "item_vectors has shape"),
        ({"item_vectors": np.ones((2, 2), int)}, "must be float16 or float32"),
        ({"time_unit": "h"}, "time_unit must be one of"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, message):
    columns = {
        "users": [0, 1, 1],
        "items": [0, 1, 1],
        "timestamps": [1, 2, 3],
        "ratings": [1, 2, 3],
        "user_ids": [1, 2],
        "item_ids": [3, 4],
    } | changes
    for column in ("users", "items"):
        values = np.asarray(columns[column])
        columns[column] = values.astype(int) if len(values) == 0 else values
    columns["timestamps"] = np.asarray(columns["timestamps"], np.int64)
    columns["ratings"] = np.asarray(columns["ratings"], float)[: len(columns["users"])]
    with pytest.raises(ValueError, match=message):
        write_prepared(tmp_path / "s", name="s", source={}, tie_order="", **columns)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_needs_overwrite(shop, tmp_path):
    with pytest.raises(UserError, match=r"shop: a data set of that name exists .*--overwrite"):
        make_set(tmp_path / "shop", [0], [0], overwrite=False)
    replaced = make_set(tmp_path / "shop", [0], [0], overwrite=True)
    assert replaced.num_events == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["shop"]


def test_a_folder_that_is_no_set_is_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is not a data set"):
        make_set(tmp_path / "notes", [0], [0], overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_what_fails_half_way_leaves_nothing_and_keeps_the_old(shop, tmp_path, monkeypatch, error):
    real, calls = np.save, []

    def fail_on_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise error
        real(*args, **kwargs)

    monkeypatch.setattr(np, "save", fail_on_third)
    wanted = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted) as caught:
        make_set(tmp_path / "shop", [0, 0], [0, 1], [1, 2], [1, 2])
    if wanted is UserError:
        assert "No space left" in str(caught.value)
    assert len(calls) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["shop"]
    assert open_prepared(shop.path, verify=True).hash == shop.hash


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"):
        make_set(tmp_path / "file" / "shop", [0], [0])


_KILLED = """
import os, signal, sys
import numpy as np
from jaxrec.data import prepared, _store
kind, path = sys.argv[1:]
if kind == "saving":
    np.save = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
else:
    from pathlib import Path
    real, calls = Path.rename, []
    def rename(self, target):
        calls.append(target)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, target)
    Path.rename = rename
prepared.write_prepared(path, name="shop", users=np.array([0]), items=np.array([0]),
    timestamps=None, ratings=None, user_ids=[1], item_ids=[1], source={}, tie_order="",
    overwrite=True)
"""


@pytest.mark.parametrize("kind", ["saving", "renaming"])
def test_what_a_killed_process_left_is_cleared_by_the_next(shop, tmp_path, kind):
    done = subprocess.run([sys.executable, "-c", _KILLED, kind, str(shop.path)], check=False)
    assert done.returncode == -9
    assert any(entry.name.startswith(".shop.") for entry in tmp_path.iterdir())
    if kind == "saving":
        assert open_prepared(shop.path).hash == shop.hash
    else:  # the narrowest gap there is: the old set is aside, the new one not yet in place
        assert not shop.path.exists()
    made = make_set(tmp_path / "shop", [0, 0], [0, 1])
    assert made.num_events == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["shop"]


def test_two_writers_at_once_do_not_disturb_each_other(tmp_path):
    """The leftovers of a process that is alive are not leftovers, and the first to end wins."""
    first = []

    def write_slowly():
        with _store.new_folder(tmp_path / "shop", overwrite=False) as folder:
            first.append(make_set(tmp_path / "shop", [0], [0], overwrite=False))
            assert folder.is_dir()

    with pytest.raises(UserError, match="a data set of that name exists"):
        write_slowly()
    assert open_prepared(first[0].path, verify=True).hash == first[0].hash
    assert [entry.name for entry in tmp_path.iterdir()] == ["shop"]


def test_importing_the_package_is_light():
    code = (
        "import sys, jaxrec.data; from jaxrec.data import data_dir; "
        "heavy = {'pyarrow', 'jax', 'flax', 'grain', 'pandas', 'tensorflow_datasets'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_public_names_resolve():
    import jaxrec.data

    for name in jaxrec.data.__all__:
        assert callable(getattr(jaxrec.data, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxrec.data.nothing
    assert set(jaxrec.data.__all__) <= set(dir(jaxrec.data))


def test_only_numbers_of_this_machine_count_as_processes():
    assert _store._is_alive(os.getpid())
