"""`upperson-rt gallery ...`."""

import csv
import json
import time
from functools import partial

import numpy as np
import pytest

from tests.helpers.command_line import run_at_terminal
from tests.helpers.invoke import run_rt
from upperson_rt.gallery import Gallery, Item

D = 8
COMMANDS = ["info", "delete", "prune", "verify", "rebuild", "export"]


run = partial(run_rt, "gallery")


def run_json(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


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
    assert (found["items"], found["tracks"], found["schema_version"]) == (6, 2, 3)
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
    ("arguments", "code", "message"),
    [
        (["delete"], 2, "name keys, a filter such as --camera gate, or"),
        (["delete", "a", "--camera", "gate"], 2, "keys go alone"),
        (["delete", "--camera", "gate"], 2, "delete 4 pictures from gallery 'gallery'? Add --yes"),
        (["delete", "--where", "red", "--yes"], 2, "--where red is not KEY=VALUE"),
        (["delete", "--since", "5", "--until", "5", "--yes"], 2, "since must be earlier"),
        (["prune"], 2, "needs an age (--older-than), a number of pictures"),
        (["prune", "--older-than", "30"], 2, "'30' is no age"),
        (["prune", "--older-than", "-3d"], 2, "'-3d' is no age"),
        (["prune", "--keep", "-1"], 2, "Invalid value"),
        (["export"], 2, "Missing argument"),
        (["export", "gallery"], 3, "is not an earlier result"),
        *(([name, *(["out"] if name == "export" else []), "-g", "none",
            *(["--keep", "1"] if name == "prune" else []),
            *(["x", "-y"] if name == "delete" else [])], 3, "no gallery at none")
          for name in COMMANDS),
    ],
)  # fmt: skip
def test_errors(work, arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert left() == "abcdef"


def test_an_unknown_camera_is_told(work):
    result = run("delete", "--camera", "gat", "--yes")
    assert "no picture of the camera 'gat'; the gallery's cameras are: gate, hall" in result.stderr
    assert "no picture matches" in result.stderr
    assert result.exit_code == 0


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
    assert "content of 4 crops cannot be checked" in run("verify").stderr
    (work / "gallery" / "crops" / "b.jpg").unlink()
    result = run("verify")
    assert result.exit_code == 6
    assert "item b: its crop b.jpg is missing" in result.stderr
    monkeypatch.setattr("upperson_rt.gallery.sqlite.index.APPROXIMATE_FROM", 5)
    assert "ivf-sq8, 6 pictures" in run("rebuild").stdout
    assert "recall@10 1.000 when it was made" in run("info").stdout
    (work / "gallery" / "gallery.index").unlink()
    assert "none yet: the next search or" in run("info").stdout


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
