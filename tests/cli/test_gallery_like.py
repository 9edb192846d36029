"""`upperson-rt gallery delete --like`."""

import json
import os
from functools import partial

import pytest

from tests.helpers.command_line import run_at_terminal
from tests.helpers.invoke import refusal, run_rt
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery
from upperson_rt.ingest.files import index_images


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("like")
    encoder = open_encoder(make_toy_bundle(folder / "bundle"), threads=1)
    files = [draw_person(folder / f"{colour}.png", colour) for colour in COLOURS]
    with Gallery.open(
        folder / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
    ) as gallery:
        index_images(encoder, gallery, [*files, draw_person(folder / "r2.png", "red")], "gate")
        index_images(encoder, gallery, [draw_person(folder / "r3.png", "red", seed=3)], "hall")
    return folder


@pytest.fixture
def work(enter, original):
    """./gallery of each colour and a copy of red at the gate, and another red in the hall."""
    return enter(original)


run = partial(run_rt, "gallery", "delete")


def left():
    with Gallery.open("gallery") as gallery:
        return sorted(os.path.basename(item.key) for item in gallery.items())


ALIKE = ["--like", "red.png", "--min-score", "0.9"]
ALL = sorted([*(f"{colour}.png" for colour in COLOURS), "r2.png", "r3.png"])


@pytest.mark.parametrize("more", [[], ["--yes"]])
def test_a_dry_run_shows_what_would_go(work, more):
    result = run(*ALIKE, "--dry-run", *more)
    assert result.exit_code == 0, result.output
    *table, last = result.stdout.splitlines()
    assert last == "would delete 3 of 8 pictures of gallery 'gallery'"
    assert table[0].split() == ["rank", "score", "camera", "picture"]
    assert [line.split()[-1].rsplit("/", 1)[-1] for line in table[1:3]] == ["red.png", "r2.png"]
    assert "1.000" in table[1]
    assert "backend: " in result.stderr
    assert left() == ALL


def test_what_looks_alike_goes(work):
    result = run(*ALIKE, "--camera", "gate", "--yes", "--json", "--query-log", "asked.log")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    hits = found.pop("hits")
    assert found == {
        "gallery": "gallery", "dry_run": False, "matching": 2, "deleted": 2, "items": 6,
    }  # fmt: skip
    assert [os.path.basename(hit["key"]) for hit in hits] == ["red.png", "r2.png"]
    assert left() == sorted(set(ALL) - {"red.png", "r2.png"})
    (line,) = (work / "asked.log").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["action"], entry["ids"]) == ("delete_like", [hit["id"] for hit in hits])
    result = run(*ALIKE, "--yes")
    assert result.stdout.endswith("deleted 1 picture; gallery 'gallery' now holds 5\n")
    result = run(*ALIKE, "--yes")
    assert result.stdout == "deleted 0 pictures; gallery 'gallery' now holds 5\n"
    assert "no picture matches" in result.stderr


@pytest.mark.parametrize("typed", ["y", "n"])
def test_a_terminal_sees_them_and_is_asked(work, typed):
    result = run_at_terminal(typed, "gallery", "delete", *ALIKE)
    assert "delete 3 pictures from gallery 'gallery'? [y/N]" in result.stderr
    assert "r2.png" in result.stdout
    assert result.returncode == 0
    assert ("deleted 3 pictures" in result.stdout) == (typed == "y")
    assert ("nothing deleted" in result.stdout) == (typed == "n")
    assert len(left()) == (5 if typed == "y" else 8)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (ALIKE, 2, "confirmation_missing"),
        (["--like", "none.png", "--min-score", "0", "-y"], 3, None),
        ([*ALIKE, "-y", "-b", "nowhere"], 3, None),
        ([*ALIKE, "-y", "--query-log", "no/log"], 3, None),
        ([*ALIKE, "-y", "-b", "other"], 6, None),
    ],
)
def test_mistakes_delete_nothing(work, arguments, exit_code, code):
    make_toy_bundle(work / "other", seed=1)
    refusal(run(*arguments, "--json"), exit_code, code)
    assert left() == ALL
