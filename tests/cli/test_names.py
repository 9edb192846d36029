"""Names with control characters, and times of no calendar."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command_line import run_program
from tests.helpers.invoke import run_rt as run
from upperson_rt.bundle import read_manifest
from upperson_rt.gallery import Gallery, Item, protocol

HOSTILE = "\x1b]0;owned\x07\x1b[2J\n\u202egpj[red]"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\n\u202egpj[red]"


@pytest.fixture
def work(enter, bundle_and_crops):
    """A working folder with ./bundle and ./crops."""
    return enter(bundle_and_crops)


def fill_gallery(item):
    model = read_manifest(Path("bundle"))
    with Gallery.open("gallery", model.fingerprint, model.model.embed_dim, create=True) as gallery:
        gallery.add([item], np.eye(1, gallery.embed_dim, dtype=np.float32), variant=HOSTILE)


def test_hostile_names_are_escaped_in_results_and_in_refusals(work, monkeypatch):
    fill_gallery(Item(key=HOSTILE, camera=HOSTILE, track=HOSTILE, source=HOSTILE, time=1e9))
    for code, *arguments in (
        (0, "query", "red"),
        (0, "query", "red", "--by-track"),
        (0, "gallery", "info"),
        (0, "gallery", "verify"),
        (0, "doctor", "--bundle", "bundle"),
        (0, "gallery", "delete", "--dry-run", "--camera", HOSTILE),
        (0, "query", "red", "--camera", f"no{HOSTILE}"),
        (2, "query", "red", f"--{HOSTILE}"),
        (2, "gallery", HOSTILE),
        (3, "query", "red", "-b", HOSTILE, "--debug"),
        (3, "query", "red", "-g", HOSTILE),
        (2, "query", "red", "--variant", HOSTILE),
        (2, "query", "red", "--attribute", HOSTILE),
        (3, "query", "--image", HOSTILE),
        (3, "index", HOSTILE),
        (3, "watch", HOSTILE),
    ):
        result = run(*arguments)
        assert result.exit_code == code, result.stderr
        printed = result.stdout + result.stderr
        assert all(one.isprintable() or one == "\n" for one in printed), arguments
        assert ("Traceback" in printed) == ("--debug" in arguments)
        if code:
            assert r"\x1b]0;owned" in result.stderr, arguments
        elif arguments[0] == "query" or arguments[1] == "info":
            assert ESCAPED in printed, arguments
    result = run("query", "red", "--json")
    assert result.stdout.isascii()
    (hit,) = json.loads(result.stdout)["hits"]
    assert (hit["key"], hit["camera"], hit["track"]) == (HOSTILE, HOSTILE, HOSTILE)
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")  # A terminal without Unicode.
    done = run_program("upperson-rt", "query", "red", "--camera", "門")
    assert done.returncode == 0, done.stderr
    assert r"'\u9580'" in done.stderr


def test_a_time_beyond_every_calendar_breaks_nothing(work, monkeypatch):
    """Such as in a gallery from before times were checked."""
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "check_new", list)
        fill_gallery(Item(key="a", time=1e20, track="t"))
    for arguments in (
        ("query", "red", "--by-track"),
        ("query", "red", "--json", "--sheet", "found.png"),
        ("gallery", "info"),
        ("gallery", "export", "out"),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
