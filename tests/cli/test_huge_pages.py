"""A process that computes starts once more where that gives it huge pages, and only there."""

import os
import subprocess
import sys

import pytest

from jaxrec.cli import huge_pages, main
from jaxrec.cli.huge_pages import environment_for_huge_pages

PROGRAM = """
import os, sys
from jaxrec.cli.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.fixture
def linux(monkeypatch, tmp_path):
    switch = tmp_path / "enabled"
    switch.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_SWITCH", switch)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    return switch


def test_they_are_asked_for(linux):
    found = environment_for_huge_pages({"HOME": "/here"})
    assert found == {"HOME": "/here", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("switch", ["[always] madvise never", "always madvise [never]", "\xff"])
def test_not_where_the_system_gives_them_to_all_or_none(linux, switch):
    linux.write_text(switch)
    assert environment_for_huge_pages({}) is None


def test_not_where_the_system_does_not_tell(linux):
    linux.unlink()
    assert environment_for_huge_pages({}) is None


@pytest.mark.parametrize("value", ["", "glibc.malloc.check=1"])
def test_a_setting_of_the_user_stays(linux, value):
    assert environment_for_huge_pages({"GLIBC_TUNABLES": value}) is None


@pytest.mark.parametrize("version", [("glibc", "2.34"), ("musl", "1.2"), ("", "")])
def test_not_with_another_c_library(linux, monkeypatch, version):
    monkeypatch.setattr("platform.libc_ver", lambda: version)
    assert environment_for_huge_pages({}) is None


def test_not_on_another_system(linux, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert environment_for_huge_pages({}) is None


def test_the_process_goes_on_as_it_was_started(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, str(program), "a word", "--more"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = (environment_for_huge_pages(environment) or {}).get("GLIBC_TUNABLES")
    assert done.stdout.strip() == f"{expected} ['a word', '--more']"


@pytest.mark.parametrize(
    ("words", "restarted"), [(["train", "--help"], True), (["data", "list"], False), ([], False)]
)
def test_only_commands_that_compute_start_again(monkeypatch, words, restarted):
    calls = []
    monkeypatch.setattr(main, "restart_with_huge_pages", lambda: calls.append(1))
    monkeypatch.setattr(main, "main", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["jaxrec", *words])
    assert main.console() == 0
    assert bool(calls) == restarted
