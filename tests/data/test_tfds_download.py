"""The download path, against a server on this machine: what users meet, and what stays behind."""

import dataclasses
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tfds_archives import (
    RATINGS,
    REVIEWS,
    Server,
    everything_below,
    products_bytes,
    reviews_bytes,
    serving,
    write_movielens,
)

from jaxrec.data.tfds import builder, catalogue, download, find, prepare
from jaxrec.errors import UserError


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between the test and 127.0.0.1."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A tiny ml-1m.zip that the catalogue takes for the publisher's."""
    content = write_movielens(tmp_path / "made.zip", "1m").read_bytes()
    (tmp_path / "made.zip").unlink()
    entry = catalogue.CATALOGUE["movielens-1m"]
    known = catalogue.Archive("ml-1m.zip", len(content), hashlib.sha256(content).hexdigest())
    tiny = dataclasses.replace(entry, ratings=known, events=len(RATINGS))
    monkeypatch.setattr(catalogue, "CATALOGUE", {**catalogue.CATALOGUE, tiny.name: tiny})
    return content


@pytest.fixture
def server(archive: bytes) -> Iterator[Server]:
    files = {
        "ml-1m.zip": archive,
        "reviews_Beauty_5.json.gz": reviews_bytes(),
        "meta_Beauty.json.gz": products_bytes(),
    }
    with serving(files) as offer:
        yield offer


def _quiet(_: str) -> None:
    pass


def _refused(server_url: str, data: Path, dataset: str = "movielens-1m") -> str:
    """What the user is told; the data folder must hold nothing afterwards."""
    with pytest.raises(UserError) as caught:
        prepare(dataset, data_dir=data, base_url=server_url, notice=_quiet)
    message = str(caught.value)
    assert "\n" not in message
    left = everything_below(data) if data.exists() else set()
    assert left <= {".downloads"}
    return message


def test_downloads_once_checks_and_prepares(server: Server, tmp_path: Path) -> None:
    told: list[str] = []
    seen: list[tuple[str, float]] = []
    made = prepare(
        "movielens-1m",
        data_dir=tmp_path / "data",
        base_url=server.url,
        notice=told.append,
        progress=lambda what, share: seen.append((what, share)),
    )
    assert made.num_events == len(RATINGS)
    assert len(told) == 1
    assert "research use only" in told[0]
    assert ("downloading ml-1m.zip", 1.0) in seen
    (file,) = made.manifest["source"]["files"]
    assert file["as_published"] is True
    assert file["url"] == f"{server.url}/ml-1m.zip"
    kept = tmp_path / "data" / ".downloads" / "ml-1m.zip"
    assert kept.read_bytes() == server.files["/pub/ml-1m.zip"]
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".downloads", "movielens-1m"}
    assert everything_below(kept.parent) == {"ml-1m.zip"}
    assert [method for method, _ in server.requests] == ["HEAD", "GET"]

    prepare("movielens-1m", "again", data_dir=tmp_path / "data", base_url=server.url)
    assert len(server.requests) == 2


def test_notice_comes_before_the_first_request(server: Server, tmp_path: Path) -> None:
    order: list[int] = []
    prepare(
        "movielens-1m",
        data_dir=tmp_path,
        base_url=server.url,
        notice=lambda _: order.append(len(server.requests)),
    )
    assert order == [0]


def test_terms_may_be_declined(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="terms were not accepted"):
        prepare(
            "movielens-1m",
            data_dir=tmp_path / "data",
            base_url=server.url,
            notice=_quiet,
            accept_licence=lambda entry: entry.family != "movielens",
        )
    assert not server.requests
    assert not (tmp_path / "data").exists()


def test_amazon_fetches_reviews_and_metadata(server: Server, tmp_path: Path) -> None:
    made = prepare("amazon-2014-beauty", data_dir=tmp_path, base_url=server.url, notice=_quiet)
    assert made.num_events == len(REVIEWS)
    assert made.item_titles is not None
    assert made.item_titles[2] == "Rinse and Shine"
    # Both are asked for before either is fetched.
    assert [method for method, _ in server.requests] == ["HEAD", "HEAD", "GET", "GET"]
    assert "as_published" not in made.manifest["source"]["files"][0]
    assert len(made.manifest["source"]["files"][0]["sha256"]) == 64


def test_amazon_without_titles_fetches_the_reviews_alone(server: Server, tmp_path: Path) -> None:
    made = prepare(
        "amazon-2014-beauty", data_dir=tmp_path, base_url=server.url, notice=_quiet, titles=False
    )
    assert made.item_titles is None
    assert {path for _, path in server.requests} == {"/pub/reviews_Beauty_5.json.gz"}


def test_missing_metadata_is_known_before_the_reviews_are_fetched(
    server: Server, tmp_path: Path
) -> None:
    del server.files["/pub/meta_Beauty.json.gz"]
    message = _refused(server.url, tmp_path / "data", "amazon-2014-beauty")
    assert "meta_Beauty.json.gz answered HTTP 404" in message
    assert "--no-titles" in message
    assert {method for method, _ in server.requests} == {"HEAD"}


def test_a_server_that_does_not_offer_head_is_no_obstacle(server: Server, tmp_path: Path) -> None:
    server.head_status = 405
    made = prepare("movielens-1m", data_dir=tmp_path, base_url=server.url, notice=_quiet)
    assert made.num_events == len(RATINGS)


def test_no_network_ends_within_seconds_in_one_line(archive: bytes, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.monotonic()
    message = _refused(f"http://127.0.0.1:{port}", tmp_path / "data")
    assert time.monotonic() - started < 5
    assert f"http://127.0.0.1:{port}/ml-1m.zip cannot be reached (connection refused)" in message
    assert "--archive FILE" in message


def test_an_unknown_host_is_named(archive: bytes, tmp_path: Path) -> None:
    started = time.monotonic()
    message = _refused("http://no-such-host.invalid", tmp_path / "data")
    assert time.monotonic() - started < download.PROBE_SECONDS + 3
    assert "http://no-such-host.invalid/ml-1m.zip cannot be reached" in message


def test_a_host_that_never_answers_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.3)
    server.silent = True
    assert "no answer within 0.3 s" in _refused(server.url, tmp_path / "data")


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_refusals_are_told_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    started = time.monotonic()
    message = _refused(server.url, tmp_path / "data")
    assert time.monotonic() - started < 5
    assert f"/ml-1m.zip answered HTTP {status}" in message


@pytest.mark.parametrize(("status", "said"), [(404, "HTTP code: 404"), (503, "keeps answering")])
def test_refusals_of_the_download_itself_end_soon(
    server: Server, tmp_path: Path, status: int, said: str
) -> None:
    server.status, server.head_status = status, 200
    started = time.monotonic()
    message = _refused(server.url, tmp_path / "data")
    assert time.monotonic() - started < 10
    assert said in message
    assert "--archive FILE" in message


def test_a_web_page_is_not_taken_for_an_archive(server: Server, tmp_path: Path) -> None:
    server.content_type = "text/html; charset=utf-8"
    assert "answered with a web page" in _refused(server.url, tmp_path / "data")
    assert [method for method, _ in server.requests] == ["HEAD"]


@pytest.mark.parametrize("dataset", ["movielens-20m", "amazon-2014-beauty"])
def test_a_web_page_that_calls_itself_data_is_recognised(
    server: Server, tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = b"<!DOCTYPE html>\n<html><title>Sign in</title></html>"
    entry = dataclasses.replace(
        catalogue.CATALOGUE[dataset],
        ratings=catalogue.Archive(catalogue.CATALOGUE[dataset].ratings.filename),
    )
    monkeypatch.setattr(catalogue, "CATALOGUE", {**catalogue.CATALOGUE, dataset: entry})
    server.files[f"/pub/{entry.ratings.filename}"] = page
    assert "answered with a web page" in _refused(server.url, tmp_path / "data", dataset)


def test_another_file_than_the_published_one_is_refused(server: Server, tmp_path: Path) -> None:
    server.files["/pub/ml-1m.zip"] = server.files["/pub/ml-1m.zip"].replace(b"read me", b"READ ME")
    server.files["/pub/ml-1m.zip"] += b"\0"
    message = _refused(server.url, tmp_path / "data")
    assert "not the file that was published" in message


def test_a_download_that_is_cut_off_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.cut_at = 200
    message = _refused(server.url, tmp_path / "data")
    assert "broke off" in message
    assert "--archive FILE" in message


def test_a_server_that_falls_silent_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "READ_SECONDS", 0.5)
    server.stall_at = 200
    started = time.monotonic()
    message = _refused(server.url, tmp_path / "data")
    assert time.monotonic() - started < 10
    assert "broke off" in message


def test_a_truncated_file_of_unknown_hash_is_not_kept(server: Server, tmp_path: Path) -> None:
    whole = reviews_bytes(REVIEWS * 100)
    server.files["/pub/reviews_Beauty_5.json.gz"] = whole[: len(whole) // 2]
    message = _refused(server.url, tmp_path / "data", "amazon-2014-beauty")
    assert "truncated or damaged" in message
    server.files["/pub/reviews_Beauty_5.json.gz"] = whole
    made = prepare(
        "amazon-2014-beauty", data_dir=tmp_path / "data", base_url=server.url, notice=_quiet
    )
    assert made.num_events == 100 * len(REVIEWS)


def test_a_kept_file_that_was_altered_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    downloads = tmp_path / "mine"
    downloads.mkdir()
    (downloads / "ml-1m.zip").write_bytes(b"PK not the archive")
    made = prepare(
        "movielens-1m",
        data_dir=tmp_path / "data",
        download_dir=downloads,
        base_url=server.url,
        notice=_quiet,
    )
    assert made.num_events == len(RATINGS)
    assert (downloads / "ml-1m.zip").read_bytes() == server.files["/pub/ml-1m.zip"]
    assert not (tmp_path / "data" / ".downloads").exists()


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell's background jobs begin with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_ends_the_transfer_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    content = server.files["/pub/ml-1m.zip"]
    server.files["/pub/reviews_Beauty_5.json.gz"] = content + bytes(4_000_000)
    server.drip_seconds = 0.02
    begun = threading.Event()

    def interrupt() -> None:
        begun.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        prepare(
            "amazon-2014-beauty",
            data_dir=tmp_path / "data",
            base_url=server.url,
            notice=_quiet,
            progress=lambda *_: begun.set(),
        )
    assert everything_below(tmp_path / "data") <= {".downloads"}
    assert server.broken_pipe.wait(5), "the transfer went on after the interrupt"


def test_settings_of_the_download_manager_are_put_back(server: Server, tmp_path: Path) -> None:
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.utils import tqdm_utils

    before = (downloader._open_url, downloader.MAX_RETRIES, tqdm_utils._active)
    server.cut_at = 10
    _refused(server.url, tmp_path / "data")
    assert (downloader._open_url, downloader.MAX_RETRIES, tqdm_utils._active) == before


def test_what_a_killed_process_left_is_removed(server: Server, tmp_path: Path) -> None:
    host, dead = socket.gethostname(), 2**22 + 1  # above the kernel's highest process id
    stale = [
        tmp_path / ".downloads" / f".ml-1m.zip.new-{host}-{dead}-abcd",
        tmp_path / f".movielens-1m.new-{host}-{dead}-abcd",
    ]
    for folder in stale:
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"x")
    prepare("movielens-1m", data_dir=tmp_path, base_url=server.url, notice=_quiet)
    assert not any(folder.exists() for folder in stale)


def test_the_builder_downloads_by_itself(server: Server, tmp_path: Path) -> None:
    made = builder("movielens-1m", base_url=server.url, data_dir=tmp_path)
    made.download_and_prepare(download_dir=tmp_path / "downloads", file_format="array_record")
    (record,) = list(made.as_data_source("ratings"))
    assert record["user"].tolist() == [user for user, _, _, _ in RATINGS]
    assert find("movielens-1m").ratings.size == len(server.files["/pub/ml-1m.zip"])
