"""Names with control characters, and times of no calendar."""

import json

import numpy as np
import pytest

from tests.helpers.command_line import run_program
from tests.helpers.invoke import run_rt as run
from upperson_rt.bundle import read_manifest
from upperson_rt.gallery import Gallery, Item, protocol

HOSTILE = "\x1b]0;owned\x07\x1b[2J\n\u202egpj[red]"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\n\u202egpj[red]"


def is_clean(result):
    printed = result.stdout + result.stderr
    return all(one.isprintable() or one == "\n" for one in printed) and "Traceback" not in printed


@pytest.fixture
def work(enter, bundle_and_crops):
    """A working folder with ./bundle, ./crops and ./gallery, all of whose names are hostile."""
    work = enter(bundle_and_crops)
    model = read_manifest(work / "bundle")
    with Gallery.open("gallery", model.fingerprint, model.model.embed_dim, create=True) as gallery:
        vector = np.zeros((1, gallery.embed_dim), np.float32)
        vector[0, 0] = 1
        item = Item(key=HOSTILE, camera=HOSTILE, track=HOSTILE, source=HOSTILE, time=1e9)
        gallery.add([item], vector, variant=HOSTILE)
    return work


@pytest.mark.parametrize(
    "arguments",
    [
        ("query", "red"),
        ("query", "red", "--by-track"),
        ("gallery", "info"),
        ("gallery", "verify"),
        ("doctor", "--bundle", "bundle"),
        ("gallery", "delete", "--dry-run", "--camera", HOSTILE),
    ],
)
def test_what_a_gallery_holds_is_shown(work, arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert is_clean(result)
    if arguments[0] == "query" or arguments[1] == "info":
        assert SHOWN in result.stdout


def test_json_is_exact_and_in_ascii(work):
    result = run("query", "red", "--json")
    assert result.stdout.isascii()
    (hit,) = json.loads(result.stdout)["hits"]
    assert (hit["key"], hit["camera"], hit["track"]) == (HOSTILE, HOSTILE, HOSTILE)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("query", "red", "--camera", f"no{HOSTILE}"), 0),
        (("query", "red", "--since", HOSTILE), 2),
        (("query", "red", f"--{HOSTILE}"), 2),
        ((HOSTILE,), 2),
        (("gallery", HOSTILE), 2),
        (("query", "red", "-b", HOSTILE), 3),
        (("query", "red", "-g", HOSTILE), 3),
        (("query", "red", "--variant", HOSTILE), 2),
        (("query", "red", "--where", HOSTILE), 2),
        (("query", "--image", HOSTILE), 3),
        (("index", HOSTILE), 3),
        (("watch", HOSTILE), 3),
    ],
)
def test_what_is_refused_is_shown(work, arguments, code):
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert is_clean(result)
    assert r"\x1b]0;owned" in result.stderr


def test_escapes_in_tracebacks_and_for_terminals_without_unicode(work, monkeypatch):
    result = run("query", "red", "-b", HOSTILE, "--debug")
    assert "Traceback" in result.stderr
    assert all(one.isprintable() or one == "\n" for one in result.stderr)
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = run_program("upperson-rt", "query", "red", "--camera", "門")
    assert done.returncode == 0, done.stderr
    assert r"'\u9580'" in done.stderr


@pytest.fixture
def long_ago(enter, bundle_and_crops, monkeypatch):
    """A gallery from before times were checked: one of its items is of the year 3 billion."""
    work = enter(bundle_and_crops)
    model = read_manifest(work / "bundle")
    monkeypatch.setattr(protocol, "check_new", list)
    with Gallery.open("gallery", model.fingerprint, model.model.embed_dim, create=True) as gallery:
        vector = np.eye(1, gallery.embed_dim, dtype=np.float32)
        gallery.add([Item(key="a", time=1e20, track="t")], vector)
    monkeypatch.undo()
    monkeypatch.chdir(work)


@pytest.mark.parametrize(
    "arguments",
    [
        ("query", "red"),
        ("query", "red", "--by-track"),
        ("query", "red", "--json", "--sheet", "found.png"),
        ("gallery", "info"),
        ("gallery", "verify"),
        ("gallery", "export", "out"),
    ],
)
def test_a_time_beyond_every_calendar_breaks_nothing(long_ago, arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    if arguments in (("query", "red"), ("gallery", "info")):
        assert "1e+20 s" in result.stdout
