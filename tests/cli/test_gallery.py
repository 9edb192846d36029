"""`upperson-rt gallery ...`."""

import csv
import json
import os
import shutil
import time
from functools import partial

import numpy as np
import pytest

from tests.helpers.command_line import run_at_terminal
from tests.helpers.gallery_places import some_vectors
from tests.helpers.invoke import refusal, run_rt, run_rt_json
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.snapshots import SNAPSHOTS, Snapshot, write_snapshot
from upperson_rt.ingest.files import index_images

D = 8
run = partial(run_rt, "gallery")
run_json = partial(run_rt_json, "gallery")


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
            some_vectors(6, dim=D),
        )  # fmt: skip
    return tmp_path


def left():
    with Gallery.open("gallery") as gallery:
        return sorted(os.path.basename(item.key) for item in gallery.items())


def test_info(work):
    found = run_json("info")
    assert (found["items"], found["tracks"], found["schema_version"]) == (6, 2, 4)
    assert found["cameras"] == {"gate": 4, "hall": 1}
    assert found["index"] == {
        "kind": "exact", "rows": 6, "beside": 0, "parameters": {}, "recall_at_10": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected", "gone"),
    [
        (["a", "nobody", "f"], "bcde", 2),
        (["--attribute", "colour=red", "--attribute", "n=2"], "abdef", 1),
        (["--since", "8.5h", "--camera", "gate"], "abef", 2),
    ],
)
def test_delete(work, arguments, expected, gone):
    plan = {"gallery": "gallery", "dry_run": True, "matching": gone, "deleted": 0, "items": 6}
    assert run_json("delete", *arguments, "--dry-run", "--yes") == plan
    assert left() == list("abcdef")
    done = plan | {"dry_run": False, "deleted": gone, "items": 6 - gone}
    assert run_json("delete", *arguments, "--yes") == done
    assert left() == list(expected)
    crops = sorted(path.stem for path in (work / "gallery" / "crops").iterdir())
    assert crops == sorted(set("abcd") & set(expected))


def test_delete_takes_the_frame_of_a_camera_that_has_no_picture(work):
    frame = Snapshot(camera="yard", time=0.0, width=4, height=4)
    write_snapshot(work / "gallery" / SNAPSHOTS, frame, b"")
    dry = run("delete", "--camera", "yard", "--dry-run")
    assert "the newest frame of 1 camera" in dry.stderr
    assert len(list((work / "gallery" / SNAPSHOTS).iterdir())) == 2
    result = run_at_terminal("y", "gallery", "delete", "--camera", "yard")
    assert "delete 0 pictures and the newest frame of 1 camera from" in result.stderr
    assert list((work / "gallery" / SNAPSHOTS).iterdir()) == []
    assert left() == list("abcdef")


def test_a_key_of_no_picture_is_named(work):
    for keys, is_named in ((["a", "typo"], True), (["a"], False)):
        assert ("'typo'" in run("delete", *keys, "--dry-run").stderr) == is_named


def test_delete_and_prune_are_final_also_in_the_bin(work):
    with Gallery.open("gallery") as gallery:
        gallery.bin.add(["a", "b", "c"], "Ada", "by mistake")
    assert run_json("delete", "a", "--dry-run")["deleted"] == 0
    assert run_json("delete", "a", "--yes")["deleted"] == 1
    run("prune", "--older-than", "8.5h")
    with Gallery.open("gallery") as gallery:
        assert [entry.item.key for entry in gallery.bin.entries()] == ["c"]
    assert run_json("info")["items"] == 3
    assert run_json("verify")["problems"] == []


def test_delete_takes_relative_paths(work):
    (work / "picture.jpg").touch()
    with Gallery.open("gallery") as gallery:
        gallery.add([Item(key=str(work / "picture.jpg"))], some_vectors(1, dim=D))
    result = run("delete", "picture.jpg", "--yes")
    assert result.stdout == "deleted 1 picture; gallery 'gallery' now holds 6\n"


def test_errors(work):
    for exit_code, code, *arguments in (
        (2, "selection_missing", "delete"),
        (2, "selections_conflict", "delete", "a", "--camera", "gate"),
        (2, "min_score_missing", "delete", "--like", "red.png"),
        (2, "min_score_missing", "delete", "--min-score", "0.9"),
        (2, "selections_conflict", "delete", "a", "--like", "red.png", "--min-score", "0.9"),
        (2, "confirmation_missing", "delete", "--camera", "gate"),
        (2, None, "delete", "--attribute", "red", "--yes"),
        (2, "filter_invalid", "delete", "--since", "1790000000", "--until", "1790000000"),
        (2, None, "delete", "--like", "red.png", "--min-score", "1.5"),
        (2, None, "prune"),
        (2, "age_malformed", "prune", "--older-than", "-3d"),
        (2, None, "prune", "--keep", "-1"),
        (2, None, "export"),
        (3, None, "export", "gallery"),
        (3, None, "info", "-g", "none"),
        (3, None, "delete", "x", "-y", "-g", "none"),
    ):
        refusal(run(*arguments, "--json"), exit_code, code)
    assert left() == list("abcdef")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--older-than", "510m"], "cdef"),
        (["--older-than", "9.5h", "--keep", "4"], "bcde"),
        (["--keep", "2", "--camera", "gate"], "cdef"),
    ],
)
def test_prune(work, arguments, expected):
    gone = 6 - len(expected)
    result = run("prune", *arguments, "--dry-run")
    assert result.stdout == f"would delete {gone} of 6 pictures of gallery 'gallery'\n"
    assert left() == list("abcdef")
    found = run_json("prune", *arguments)
    assert (found["matching"], found["deleted"], found["items"]) == (gone, gone, len(expected))
    assert left() == list(expected)


def test_rebuild_and_verify(work, monkeypatch):
    found = run_json("verify")
    assert (found["ok"], found["crops_without_hash"]) == (True, 4)
    (work / "gallery" / "crops" / "b.jpg").unlink()
    result = run("verify", "--json")
    assert result.exit_code == 6
    assert "b.jpg" in json.loads(result.stdout)["problems"][0]
    monkeypatch.setattr("upperson_rt.gallery.sqlite.index.APPROXIMATE_FROM", 5)
    monkeypatch.setattr("upperson_rt.gallery.sqlite.list_files.SEAL_ROWS", 5)
    index = run_json("rebuild")["index"]
    assert (index["kind"], index["rows"]) == ("ivf-rabitq", 6)


def test_export(work):
    found = run_json("export", "out", "--camera", "gate", "--attribute", "colour=red")
    assert found["items"] == 3
    assert {"vectors.npy", "items.csv", "gallery.json"} <= set(found["files"])
    assert np.load("out/vectors.npy").shape == (3, D)
    with open("out/items.csv", encoding="utf-8", newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == ["b", "c", "d"]


def test_a_location_of_a_server_stays_whole(work, monkeypatch):
    seen = []
    monkeypatch.setattr(Gallery, "open", lambda location, *_, **__: seen.append(location) or 1 / 0)
    run("prune", "--keep=1", "-g", "milvus://127.0.0.1:19530/people")
    assert seen == ["milvus://127.0.0.1:19530/people"]


# Deletes what looks like a picture


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("like")
    encoder = open_encoder(make_toy_bundle(folder / "bundle"), threads=1)
    make_toy_bundle(folder / "other", seed=1)
    files = [draw_person(folder / f"{colour}.png", colour) for colour in COLOURS]
    with Gallery.open(
        folder / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
    ) as gallery:
        index_images(encoder, gallery, [*files, draw_person(folder / "r2.png", "red")], "gate")
        index_images(encoder, gallery, [draw_person(folder / "r3.png", "red", seed=3)], "hall")
    return folder


@pytest.fixture
def alike(enter, pictures):
    """./gallery of each colour and a copy of red at the gate, and another red in the hall."""
    return enter(pictures)


ALIKE = ["delete", "--like", "red.png", "--min-score", "0.9"]
ALL = sorted([*(f"{colour}.png" for colour in COLOURS), "r2.png", "r3.png"])


def test_what_looks_alike_goes_after_a_dry_run(alike):
    for more in ([], ["--yes"]):
        result = run(*ALIKE, "--dry-run", *more)
        *table, last = result.stdout.splitlines()
        assert last == "would delete 3 of 8 pictures of gallery 'gallery'"
        assert [line.split()[-1].rsplit("/", 1)[-1] for line in table[1:3]] == ["red.png", "r2.png"]
        assert left() == ALL
    found = run_json(*ALIKE, "--camera", "gate", "--yes", "--query-log", "asked.log")
    hits = found.pop("hits")
    assert found == {
        "gallery": "gallery", "dry_run": False, "matching": 2, "deleted": 2, "items": 6,
    }  # fmt: skip
    assert [os.path.basename(hit["key"]) for hit in hits] == ["red.png", "r2.png"]
    assert left() == sorted(set(ALL) - {"red.png", "r2.png"})
    (line,) = (alike / "asked.log").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["action"], entry["ids"]) == ("delete_like", [hit["id"] for hit in hits])
    result = run(*ALIKE, "--yes")
    assert result.stdout.endswith("deleted 1 picture; gallery 'gallery' now holds 5\n")


def test_mistakes_delete_nothing(alike):
    for exit_code, code, *arguments in (
        (2, "confirmation_missing", *ALIKE),
        (3, None, "delete", "--like", "none.png", "--min-score", "0", "-y"),
        (3, None, *ALIKE, "-y", "-b", "nowhere"),
        (3, None, *ALIKE, "-y", "--query-log", "no/log"),
        (6, None, *ALIKE, "-y", "-b", "other"),
    ):
        refusal(run(*arguments, "--json"), exit_code, code)
    assert left() == ALL


def test_a_terminal_is_asked(alike):
    """About pictures that look alike it sees a table of them before."""
    for typed, printed in (("n", "nothing deleted\n"), ("y", "deleted 3 pictures; ")):
        result = run_at_terminal(typed, "gallery", *ALIKE)
        assert "delete 3 pictures from gallery 'gallery'? [y/N]" in result.stderr
        assert result.returncode == 0
        assert "r2.png" in result.stdout
        assert printed in result.stdout
        assert len(left()) == (5 if typed == "y" else 8)


def test_prune_by_camera_and_by_bytes(work):
    assert run_json("prune", "--older-than", "gate=1s", "--dry-run")["matching"] > 0
    for arguments, code in (
        (["--older-than", "gate=1s", "--keep", "1"], "limits_conflict"),
        (["--keep-bytes", "1G", "--camera", "gate"], "limits_conflict"),
        (["--older-than", "gate=1s", "--older-than", "gate=2s"], "age_given_twice"),
        (["--keep-bytes", "much"], "size_malformed"),
    ):
        refusal(run("prune", *arguments, "--json"), 2, code)
    assert "gaet" in run("prune", "--older-than", "gaet=1s").stderr
    done = run_json("prune", "--older-than", "gate=1s", "--keep-bytes", "1T")
    assert done["deleted"] > 0
    assert "gate" not in run_json("info")["cameras"]
    assert run_json("prune", "--keep-bytes", "1")["items"] == 0


def test_erase_proof(work):
    refusal(run("erase-proof", "-g", "milvus://127.0.0.1:1/x", "--json"), 2, "gallery_not_a_folder")
    (work / "copy").mkdir()
    shutil.copytree("gallery", "copy/one")
    run_json("delete", "a", "--yes")
    result = run("erase-proof", "a")
    assert result.exit_code == 0
    assert "search index" in result.stdout
    assert "not proven" in result.stderr
    assert run_json("erase-proof")["left"] == 0
    assert run("erase-proof", "--erasure", "x", "--camera", "gate").exit_code == 2
    result = run("erase-proof", "a", "--backup", "copy", "--json")
    assert (result.exit_code, json.loads(result.stdout)["left"]) == (6, 1)
    verified = run_rt("log", "verify", "gallery/erasures.log")
    assert verified.exit_code == 0


def test_backup_and_restore(work):
    with Gallery.open("gallery") as gallery, gallery.outbox(write=True):
        pass  # The first deletion makes these tables, after which a backup copies all once.
    first = run_json("backup", "copy")
    assert first == {
        "gallery": "gallery", "destination": "copy", "pictures": 6, "crops": 4, "missing_crops": 0,
        "is_increment": False, "rows_added": 6, "rows_removed": 0, "files_copied": 4,
        "bytes_copied": 28, "files_removed": 0, "pictures_without_crop": 2,
    }  # fmt: skip
    run("delete", "a", "--yes")
    again = run_json("backup", "copy")
    assert (again["is_increment"], again["rows_removed"], again["files_removed"]) == (True, 1, 1)
    assert run_json("verify", "-g", "copy")["ok"]
    assert run_json("restore", "copy", "-g", "restored")["pictures"] == 5
    refusal(run("restore", "copy", "-g", "restored", "--json"), 3, "unowned_files")
    for arguments in (["backup", "copy"], ["restore", "copy"]):
        address = ["-g", "milvus://127.0.0.1:1/c", "--json"]
        refusal(run(*arguments, *address), 2, "gallery_not_a_folder")
