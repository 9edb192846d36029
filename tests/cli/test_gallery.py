"""`upperson-rt gallery ...`."""

import csv
import json
import time
from functools import partial

import numpy as np
import pytest

from tests.helpers.command_line import run_at_terminal
from tests.helpers.invoke import refusal, run_rt, run_rt_json
from upperson_rt.gallery import Gallery, Item

D = 8


run = partial(run_rt, "gallery")


run_json = partial(run_rt_json, "gallery")


def unit(count, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with ./gallery: a to d of camera gate, hours old, and e of hall, new."""
    monkeypatch.chdir(tmp_path)
    now = time.time()
    with Gallery.open("gallery", "sha256:a", D, create=True) as gallery:
        gallery.crops_dir.mkdir()
        for key in "abcd":
            (gallery.crops_dir / f"{key}.jpg").write_bytes(b"picture")
        gallery.add(
            [
                Item(
                    key=key, camera="gate", time=now - 3600 * (10 - i), crop=f"{key}.jpg",
                    track=f"t{i // 2}", attributes={"colour": "red" if i else "blue", "n": i},
                )
                for i, key in enumerate("abcd")
            ]
            + [Item(key="e", camera="hall", time=now), Item(key="f")],
            unit(6),
        )  # fmt: skip
    return tmp_path


def left():
    with Gallery.open("gallery") as gallery:
        return "".join(item.key for item in gallery.items())


def test_info(work):
    found = run_json("info")
    assert (found["items"], found["tracks"], found["schema_version"]) == (6, 2, 4)
    assert found["cameras"] == {"gate": 4, "hall": 1}
    assert found["index"] == {
        "kind": "exact", "rows": 6, "beside": 0, "parameters": {}, "recall_at_10": 1.0,
    }  # fmt: skip
    text = run("info").stdout
    assert "exact, 6 pictures" in text
    assert "gate (4), hall (1)" in text


@pytest.mark.parametrize(
    ("arguments", "expected", "gone"),
    [
        (["a", "nobody", "f"], "bcde", 2),
        (["--camera", "gate"], "ef", 4),
        (["--camera", "gate", "--camera", "hall"], "f", 5),
        (["--track", "t1"], "abef", 2),
        (["--where", "colour=red", "--where", "n=2"], "abdef", 1),
        (["--where", 'n="2"'], "abcdef", 0),
        (["--until", "8.5h"], "cdef", 2),
        (["--since", "8.5h", "--camera", "gate"], "abef", 2),
        (["--camera", "nowhere"], "abcdef", 0),
    ],
)
def test_delete(work, arguments, expected, gone):
    found = run_json("delete", *arguments, "--dry-run")
    assert found == {
        "gallery": "gallery", "dry_run": True, "matching": gone, "deleted": 0, "items": 6,
    }  # fmt: skip
    assert left() == "abcdef"
    found = run_json("delete", *arguments, "--yes")
    assert found == {
        "gallery": "gallery", "dry_run": False, "matching": gone, "deleted": gone,
        "items": 6 - gone,
    }  # fmt: skip
    assert left() == expected
    crops = sorted(path.stem for path in (work / "gallery" / "crops").iterdir())
    assert crops == sorted(set("abcd") & set(expected))


def test_delete_takes_relative_paths(work):
    (work / "picture.jpg").touch()
    with Gallery.open("gallery") as gallery:
        gallery.add([Item(key=str(work / "picture.jpg"))], unit(1))
    result = run("delete", "picture.jpg", "--yes")
    assert result.stdout == "deleted 1 picture; gallery 'gallery' now holds 6\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (["delete"], 2, "selection_missing"),
        (["delete", "a", "--camera", "gate"], 2, "selections_conflict"),
        (["delete", "--like", "red.png"], 2, "min_score_missing"),
        (["delete", "--min-score", "0.9"], 2, "min_score_missing"),
        (["delete", "a", "--like", "red.png", "--min-score", "0.9"], 2, "selections_conflict"),
        (["delete", "--camera", "gate"], 2, "confirmation_missing"),
        (["delete", "--where", "red", "--yes"], 2, None),
        (["delete", "--since", "5", "--until", "5", "--yes"], 2, None),
        (["delete", "--like", "red.png", "--min-score", "1.5"], 2, None),
        (["prune"], 2, None),
        (["prune", "--older-than", "30"], 2, None),
        (["prune", "--older-than", "-3d"], 2, None),
        (["prune", "--keep", "-1"], 2, None),
        (["export"], 2, None),
        (["export", "gallery"], 3, None),
        *(([*words, "-g", "none"], 3, None) for words in (
            ["info"], ["delete", "x", "-y"], ["prune", "--keep=1"], ["verify"], ["rebuild"],
            ["export", "out"],
        )),
    ],
)  # fmt: skip
def test_errors(work, arguments, exit_code, code):
    refusal(run(*arguments, "--json"), exit_code, code)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert left() == "abcdef"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--older-than", "8.5h"], "cdef"),
        (["--older-than", "510m"], "cdef"),
        (["--older-than", "3d"], "abcdef"),
        (["--keep", "2"], "de"),
        (["--keep", "2", "--camera", "gate"], "cdef"),
        (["--older-than", "9.5h", "--keep", "4"], "bcde"),
        (["--keep", "0"], ""),
    ],
)
def test_prune(work, arguments, expected):
    gone = 6 - len(expected)
    result = run("prune", *arguments, "--dry-run")
    assert result.stdout == f"would delete {gone} of 6 pictures of gallery 'gallery'\n"
    assert left() == "abcdef"
    found = run_json("prune", *arguments)
    assert (found["matching"], found["deleted"], found["items"]) == (gone, gone, len(expected))
    assert left() == expected


@pytest.mark.parametrize(("typed", "expected"), [("y", "abef"), ("n", "abcdef")])
def test_a_terminal_is_asked(work, typed, expected):
    result = run_at_terminal(typed, "gallery", "delete", "--track", "t1")
    assert "delete 2 pictures from gallery 'gallery'?" in result.stderr
    assert result.returncode == 0
    deleted = "deleted 2 pictures; gallery 'gallery' now holds 4\n"
    assert result.stdout == (deleted if typed == "y" else "nothing deleted\n")
    assert left() == expected


def test_rebuild_and_verify(work, monkeypatch):
    result = run("rebuild")
    assert result.exit_code == 0
    assert "exact, 6 pictures" in result.stdout
    assert run_json("rebuild")["index"]["rows"] == 6
    assert run_json("verify")["ok"]
    assert run_json("verify")["crops_without_hash"] == 4
    (work / "gallery" / "crops" / "b.jpg").unlink()
    result = run("verify", "--json")
    assert result.exit_code == 6
    assert "b.jpg" in json.loads(result.stdout)["problems"][0]
    monkeypatch.setattr("upperson_rt.gallery.sqlite.index.APPROXIMATE_FROM", 5)
    assert "ivf-sq8, 6 pictures" in run("rebuild").stdout
    assert "recall@10 1.000" in run("info").stdout
    (work / "gallery" / "gallery.index").unlink()
    assert run_json("info")["index"] is None


def test_export(work):
    found = run_json("export", "out", "--camera", "gate", "--where", "colour=red")
    assert found["items"] == 3
    assert {"vectors.npy", "items.csv", "gallery.json"} <= set(found["files"])
    assert np.load("out/vectors.npy").shape == (3, D)
    with open("out/items.csv", encoding="utf-8", newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == ["b", "c", "d"]
    assert "exported 6 pictures to out: " in run("export", "out").stdout


def test_a_location_of_a_server_stays_whole(work, monkeypatch):
    seen = []
    monkeypatch.setattr(Gallery, "open", lambda location, *_, **__: seen.append(location) or 1 / 0)
    for arguments in (["info"], ["verify"], ["rebuild"], ["export", "out"], ["prune", "--keep=1"]):
        run(*arguments, "-g", "milvus://127.0.0.1:19530/people")
    assert seen == ["milvus://127.0.0.1:19530/people"] * 5
