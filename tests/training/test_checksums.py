"""The record of a checkpoint's files: what is whole passes, anything else is named."""

import json
import zlib

import pytest

from jaxrec.training.checksums import CHECKSUMS, Damaged, check_checksums, write_checksums


@pytest.fixture
def step(tmp_path):
    folder = tmp_path / "12"
    for name, content in {
        "state/d/a": b"123456789",
        "state/b": b"",
        "metrics/metrics": b"{}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "_METADATA").write_text("of Orbax, which writes it later")
    write_checksums(folder, 12)
    return folder


def test_what_was_written_passes(step):
    (step / "_METADATA").write_text("written")
    (step / "commit_success.txt").write_text("committed")
    check_checksums(step, 12)
    record = json.loads((step / CHECKSUMS).read_text())
    assert record["step"] == 12
    assert record["files"].keys() == {"state/d/a", "state/b", "metrics/metrics"}
    # The check value of CRC-32 and of nothing.
    assert record["files"]["state/d/a"] == {"bytes": 9, "crc32": "cbf43926"}
    assert record["files"]["state/b"] == {"bytes": 0, "crc32": "00000000"}


def test_of_several_blocks(tmp_path):
    (tmp_path / "1" / "state").mkdir(parents=True)
    content = bytes(range(256)) * 12345
    (tmp_path / "1" / "state" / "a").write_bytes(content)
    write_checksums(tmp_path / "1", 1)
    record = json.loads((tmp_path / "1" / CHECKSUMS).read_text())
    assert record["files"]["state/a"]["crc32"] == f"{zlib.crc32(content):08x}"


def write(name, content):
    return lambda step: (step / name).write_bytes(content)


def record(**changes):
    def change(step):
        values = json.loads((step / CHECKSUMS).read_text())
        (step / CHECKSUMS).write_text(json.dumps(values | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("state/d/a", b"123456788"), "state/d/a was altered"),
        (write("state/d/a", b"12"), "state/d/a has 2 bytes, not 9"),
        (lambda step: (step / "state/b").unlink(), "state/b is missing"),
        (write("state/c", b""), "state/c was added"),
        (lambda step: (step / CHECKSUMS).unlink(), "checksums.json cannot be read"),
        (write(CHECKSUMS, b"["), "checksums.json cannot be read"),
        (write(CHECKSUMS, b"[]"), "checksums.json cannot be read"),
        (record(step=13), "it is of step 13"),
        (record(files=[]), "checksums.json is damaged"),
        (record(files={"state/d/a": {}, "state/b": 1, "metrics/metrics": {}}), "is damaged"),
    ],
)
def test_anything_else_is_named(step, damage, message):
    damage(step)
    with pytest.raises(Damaged, match=message):
        check_checksums(step, 12)


def test_one_item_alone(step):
    write("state/d/a", b"x")(step)
    check_checksums(step, 12, item="metrics")
    write("metrics/metrics", b"[]")(step)
    with pytest.raises(Damaged, match="metrics/metrics was altered"):
        check_checksums(step, 12, item="metrics")


def test_not_a_folder(tmp_path):
    (tmp_path / "12").write_text("")
    with pytest.raises(Damaged, match="not a folder"):
        check_checksums(tmp_path / "12", 12)
