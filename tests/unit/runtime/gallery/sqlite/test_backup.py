"""Backups: copies of a gallery in use, their updates, and their way back."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from tests.helpers.gallery_places import open_new, put, save, some_vectors
from tests.helpers.refused import refused
from upperson_maintenance import backup as module
from upperson_maintenance.backup import MANIFEST, back_up, restore
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.crops import name_with_hash
from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.locks import lock_until_closed

KILLS = int(os.environ.get("UPPERSON_TEST_KILLS", "4"))


def fill(gallery, start, stop):
    """Add items, each with a crop, and every tenth with a clip."""
    items = []
    for n in range(start, stop):
        content = f"picture {n}".encode()
        crop = f"gate/2026-11-30/{name_with_hash(f'{n:06d}', content)}"
        items.append(Item(key=f"k{n}", camera="gate", time=1e9 + n, track=f"t{n // 5}", crop=crop))
        save(gallery.crops_dir, crop, content=content)
        if n % 10 == 0:
            clip = f"{crop.removesuffix('.jpg')}.{n}-{n}.mp4"
            save(gallery.path / "clips", clip, content=b"clip " + content)
    gallery.add(items, some_vectors(stop - start, start), "int8")


def write_document(gallery, value):
    with gallery.outbox(write=True) as outbox:
        outbox.write("d", {"a": value})


def delete(gallery, *numbers):
    return gallery.delete([f"k{n}" for n in numbers])


def to_bin(gallery, *numbers):
    gallery.bin.add([f"k{n}" for n in numbers], "ada", "why")


def from_bin(gallery):
    gallery.bin.restore([entry.id for entry in gallery.bin.entries()])


def everything(folder):
    """Return all that a gallery holds: rows, the outbox, and files by name."""
    with Gallery.open(folder) as gallery:
        assert gallery.verify() == []
        rows = {
            item.key: (item, vector.tobytes())
            for items, vectors in gallery.vectors()
            for item, vector in zip(items, vectors, strict=True)
        }
        ids = gallery.ids(list(rows))
        with gallery.outbox() as outbox:
            document = outbox.document("d")
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(("gallery.", "backup."))
    }
    return rows, ids, document, files


@pytest.fixture(scope="session")
def gallery_of_60(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "gallery"
    with open_new(folder) as gallery:
        fill(gallery, 0, 60)
        write_document(gallery, 1)
    (folder / "scores.json").write_text("{}")
    return folder


@pytest.fixture
def made(gallery_of_60, tmp_path):
    """A gallery of 60 items, with an outbox and a file of its folder."""
    return shutil.copytree(gallery_of_60, tmp_path / "gallery")


@pytest.fixture
def copy(tmp_path):
    return tmp_path / "copy"


def test_a_copy_follows_its_gallery_and_comes_back(tmp_path, made, copy):
    back = tmp_path / "back"
    done = back_up(made, copy)
    assert (done.is_increment, done.rows_added, done.manifest.pictures) == (False, 60, 60)
    assert everything(copy) == everything(made)
    done = back_up(made, copy)
    assert done.is_increment
    assert (done.rows_added, done.rows_removed, done.files_copied, done.files_removed) == (0,) * 4

    with Gallery.open(made) as gallery:
        (gone,) = gallery.search(some_vectors(60)[7:8], 1)[0]
        crop = gone.item.crop
        delete(gallery, *range(20))
        put(gallery, [30], 9, camera="hall")  # Replaced.
        fill(gallery, 60, 90)
        write_document(gallery, 2)
    (made / "scores.json").write_text('{"new": 1}')
    expected = everything(made)
    done = back_up(made, copy)
    assert (done.is_increment, done.rows_added, done.rows_removed) == (True, 31, 21)
    assert done.files_copied == 30 + 3 + 1 + 2  # The log of erasures with its head, too.
    assert everything(copy) == expected
    stored = np.float16(some_vectors(60)[7]).tobytes()
    assert stored not in (copy / "gallery.sqlite").read_bytes(), "what was deleted is gone"
    assert not (copy / "crops" / crop).exists()
    assert not (copy / "gallery.sqlite-wal").exists()

    (made / "scores.json").unlink()
    back_up(made, copy)
    assert not (copy / "scores.json").exists()
    manifest = restore(copy, back)
    assert everything(back) == everything(made)
    assert manifest.pictures == 70
    assert not list(back.glob("backup.*"))
    back_up(back, copy)  # The gallery that came back has the same backup.
    with refused("unowned_files", InputError):
        restore(copy, back)
    assert everything(copy) == everything(back)


def test_the_first_deletion_and_the_first_alert_are_followed(tmp_path, copy):
    folder = tmp_path / "gallery"
    with open_new(folder) as gallery:
        fill(gallery, 0, 20)
        back_up(folder, copy)
        (copy / "gallery.index").write_bytes(b"made by a search of the copy")
        back_up(folder, copy)
        assert (copy / "gallery.index").exists()
        delete(gallery, 3)
        done = back_up(folder, copy)
        assert (done.is_increment, done.rows_added, done.rows_removed) == (True, 0, 1)
        assert not (copy / "gallery.index").exists(), "it has the vectors of deleted rows"
        write_document(gallery, 1)
        done = back_up(folder, copy)
        assert (done.is_increment, done.rows_added, done.rows_removed) == (True, 0, 0)
    restore(copy, tmp_path / "restored")
    assert everything(tmp_path / "restored") == everything(folder)


def test_each_copy_of_a_gallery_that_is_written_to_is_one_state(made, copy):
    stop = threading.Event()

    def write():
        with Gallery.open(made) as gallery:
            for step in range(6, 10_000):
                if stop.is_set():
                    return
                fill(gallery, 10 * step, 10 * step + 10)
                delete(gallery, *range(10 * step - 60, 10 * step - 50))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = set()
        while len(seen) < 3:
            done = back_up(made, copy)
            keys = sorted(int(key[1:]) for key in everything(copy)[0])
            assert keys == list(range(keys[0], keys[-1] + 1))
            assert (keys[0] % 10, keys[-1] % 10, done.manifest.missing_crops) == (0, 9, ())
            seen.add(keys[0])
    finally:
        stop.set()
        writer.join()
    back_up(made, copy)
    assert everything(copy)[0] == everything(made)[0]


def test_a_crop_that_goes_during_the_copy_takes_its_row_along(tmp_path, made, copy, monkeypatch):
    rounds, copy_crops = [], module.copy_crops

    def deleted_first(*arguments):
        with Gallery.open(made) as gallery:
            rounds.append(delete(gallery, len(rounds)) if len(rounds) < 2 else 0)
        return copy_crops(*arguments)

    monkeypatch.setattr(module, "copy_crops", deleted_first)
    done = back_up(made, copy)
    assert (rounds, done.manifest.missing_crops) == ([1, 1, 0], ())
    assert everything(copy) == everything(made)

    lost = sorted((made / "crops").rglob("*.jpg"))[5].relative_to(made / "crops").as_posix()
    (made / "crops" / lost).unlink()  # Missing in the gallery itself: no reason to refuse.
    shutil.rmtree(copy)
    assert back_up(made, copy).manifest.missing_crops == (lost,)
    restore(copy, tmp_path / "back")


def test_a_copy_has_an_empty_bin(tmp_path, made, copy, monkeypatch):
    stored = np.float16(some_vectors(60)[7]).tobytes()
    with Gallery.open(made) as gallery:
        to_bin(gallery, 7, 10)
        for is_increment in (False, True):
            assert back_up(made, copy).is_increment == is_increment
            assert stored not in (copy / "gallery.sqlite").read_bytes()
            assert not (copy / "bin").exists()
            to_bin(gallery, 20 + is_increment)
        back_up(made, copy)
        assert restore(copy, tmp_path / "back").pictures == 56
        with Gallery.open(tmp_path / "back") as restored:
            assert restored.bin.entries() == []
        with monkeypatch.context() as patched:  # Crops are on their way back from the bin.
            patched.setattr(type(gallery.bin), "_settle", lambda _: None)
            from_bin(gallery)
        done = back_up(made, copy)
        assert (done.is_increment, done.manifest.missing_crops) == (True, ())
        gallery.bin.tidy()
        back_up(made, copy)  # Clips come after the crops.
    assert everything(copy) == everything(made)


def test_copies_that_no_increment_leads_to_are_made_anew(tmp_path, made, copy, monkeypatch):
    earlier = tmp_path / "earlier"
    back_up(made, earlier)
    back_up(made, copy)
    with Gallery.open(made) as gallery:
        fill(gallery, 60, 70)
    back_up(made, copy)
    shutil.rmtree(made)  # An earlier state comes back, and goes another way.
    restore(earlier, made)
    with Gallery.open(made) as gallery:
        fill(gallery, 300, 320)
    assert not back_up(made, copy).is_increment
    assert everything(copy) == everything(made)

    monkeypatch.setattr(table, "_LOG_ENTRIES", 10)  # The log of changes does not reach back.
    with Gallery.open(made) as gallery:
        delete(gallery, *range(40))
        delete(gallery, 41)
    assert not back_up(made, copy).is_increment
    assert everything(copy) == everything(made)


@pytest.mark.timeout(max(120, 20 * KILLS))
def test_backups_of_killed_processes_are_the_earlier_or_the_new_one(tmp_path, made, copy):
    rng, back = np.random.default_rng(), tmp_path / "back"
    began = time.perf_counter()
    back_up(made, copy)
    took, states = time.perf_counter() - began, [everything(made)]
    killed = 0
    for n in range(KILLS):
        with Gallery.open(made) as gallery:
            fill(gallery, 1000 * (n + 1), 1000 * (n + 1) + 30)
            delete(gallery, *range(10 * n, 10 * n + 10))
        states.append(everything(made))
        child = os.fork()
        if not child:
            try:
                back_up(made, copy)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        in_place = everything(copy)
        restore(copy, back)
        found = everything(back)
        assert in_place[:3] == found[:3]
        shutil.rmtree(back)
        possible = [state for state in states if state[:3] == found[:3]]
        assert len(possible) == 1
        crops = {f"crops/{item.crop}" for item, _ in found[0].values()}
        assert {name for name in found[3] if name.startswith("crops/")} == crops
    back_up(made, copy)
    assert everything(copy) == states[-1]
    assert not list(copy.rglob(".*"))
    print(f"{killed} of {KILLS} backups were killed: each left the earlier or the new one, whole")


FULL = """
from upperson_maintenance.backup import back_up
copy = folder.parent / "copy"
for limit in (0, 100, 4096, 20_000, 60_000, 70_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for place in (copy, folder.parent / "new"):
        try:
            back_up(folder, place)
        except InputError as error:
            print(limit, error.code, flush=True)
"""


def test_a_full_disk_leaves_the_earlier_backup(tmp_path, made, copy, start):
    back_up(made, copy)
    before = everything(made)
    with Gallery.open(made) as gallery:
        delete(gallery, 0)
        fill(gallery, 60, 120)
    process = start(FULL, made)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "0 " in out
    restore(copy, tmp_path / "back")
    assert everything(tmp_path / "back")[0] in (before[0], everything(made)[0])
    for place in (copy, tmp_path / "new"):
        back_up(made, place)
        assert everything(place) == everything(made)


def test_refusals_change_nothing(tmp_path, made, copy):
    other = tmp_path / "other"
    back_up(made, copy)
    open_new(other).close()
    (tmp_path / "file").write_text("")
    before = everything(copy)
    for code, error, call in (
        ("backup_in_gallery", UsageError, lambda: back_up(made, made / "copy")),
        ("backup_in_gallery", UsageError, lambda: back_up(made, tmp_path)),
        ("backup_of_other_gallery", InputError, lambda: back_up(other, copy)),
        ("unowned_files", InputError, lambda: back_up(made, other)),
        ("no_folder", InputError, lambda: back_up(made, tmp_path / "file")),
        ("gallery_not_found", InputError, lambda: back_up(tmp_path / "none", copy)),
        ("not_a_backup", InputError, lambda: restore(other, tmp_path / "back")),
        ("unowned_files", InputError, lambda: restore(copy, other)),
    ):
        with refused(code, error):
            call()
    with open(copy / "backup.lock", "rb") as lock:
        lock_until_closed(lock.fileno())
        for call in (lambda: back_up(made, copy), lambda: restore(copy, tmp_path / "back")):
            with refused("backup_in_use", InputError, path=copy):
                call()
    assert everything(copy) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file", "gallery", "other"]


@pytest.mark.parametrize("part", ["crops", "clips", "scores.json", "gallery.sqlite", MANIFEST])
def test_damaged_backups_are_not_restored(tmp_path, made, copy, part):
    back_up(made, copy)
    place = copy / part
    file = place if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())[3]
    before = shutil.copytree(copy, tmp_path / "before")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    if part == MANIFEST:
        hostile = json.loads((before / MANIFEST).read_text()) | {"files": {"../x": ["0" * 64]}}
        file.write_text(json.dumps(hostile))
    with pytest.raises(IntegrityError):
        restore(copy, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "copy", "gallery"]


def test_a_damaged_gallery_does_not_replace_its_backup(made, copy):
    back_up(made, copy)
    before = everything(copy)
    with Gallery.open(made) as gallery:
        fill(gallery, 100, 200)
    content = bytearray((made / "gallery.sqlite").read_bytes())
    content[content.rindex(np.float16(some_vectors(100, 100)[50]).tobytes())] ^= 1
    (made / "gallery.sqlite").write_bytes(content)
    with pytest.raises(IntegrityError):
        back_up(made, copy)
    assert everything(copy)[0] == before[0]


@pytest.mark.parametrize("kind", ["crop", "folder", "name"])
def test_a_backup_of_others_brings_no_file_from_elsewhere(tmp_path, made, copy, kind):
    back_up(made, copy)
    secret = tmp_path / "secret"
    save(secret, "file", content=b"secret")
    crop, manifest = next((copy / "crops").rglob("*.jpg")), copy / MANIFEST
    if kind == "crop":
        crop.unlink()
        crop.symlink_to(secret / "file")
    elif kind == "folder":
        shutil.move(crop.parent, secret / "day")
        crop.parent.symlink_to(secret / "day")
    else:
        found = json.loads(manifest.read_text())
        found["files"]["gallery.sqlite-wal"] = [64 * "0"]
        manifest.write_text(json.dumps(found))
        save(copy, "gallery.sqlite-wal", content=b"")
    code = "backup_name" if kind == "name" else "backup_damaged"
    with refused(code, IntegrityError):
        restore(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- What lies in a destination or a backup may be anything


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
        if path.name != "backup.lock"
    }


LINKED = ["crops", "clips", "crops/gate", "clips/gate", "backup.lock", MANIFEST, "gallery.sqlite"]


@pytest.mark.parametrize("is_update", [False, True])
@pytest.mark.parametrize("name", LINKED)
def test_nothing_is_changed_through_a_link_in_a_destination(tmp_path, made, copy, name, is_update):
    victim, place = tmp_path / "victim", copy / name
    save(victim, "precious.jpg", "day/precious.jpg")
    if is_update:
        back_up(made, copy)
        place.rename(tmp_path / "before")
        with Gallery.open(made) as gallery:
            fill(gallery, 60, 70)
            delete(gallery, 10)
    place.parent.mkdir(parents=True, exist_ok=True)
    if name != "backup.lock":
        (copy / "backup.lock").touch()
    place.symlink_to(victim)
    before = contents(tmp_path)
    with refused("link_in_folder", InputError, path=str(place)):
        back_up(made, copy)
    now = contents(tmp_path)
    assert {path: now.get(path) for path in before if path.parts[0] == "victim"} == {
        path: content for path, content in before.items() if path.parts[0] == "victim"
    }
    if "/" not in name:
        assert now == before
        with refused("link_in_folder", InputError, path=str(place)):
            restore(copy, tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_the_folder_of_a_backup_itself_may_be_a_link(tmp_path, made, copy):
    (tmp_path / "disk").mkdir()
    copy.symlink_to("disk")
    (made / "crops").rename(tmp_path / "crops")  # Also a gallery that is only read.
    (made / "crops").symlink_to(tmp_path / "crops")
    assert back_up(made, copy).manifest.missing_crops == ()
    restore(copy, tmp_path / "back")
    assert everything(tmp_path / "back") == everything(copy)


@pytest.mark.parametrize("part", ["gallery.sqlite", MANIFEST])
def test_a_database_of_another_time_is_not_restored_and_is_copied_anew(tmp_path, made, copy, part):
    back_up(made, copy)
    shutil.copyfile(copy / part, tmp_path / part)
    with Gallery.open(made) as gallery:
        delete(gallery, *range(5))  # As many rows, and other ones.
        fill(gallery, 60, 65)
    assert back_up(made, copy).manifest.pictures == 60
    shutil.copyfile(tmp_path / part, copy / part)
    with refused("backup_mixed", IntegrityError, expected=60, found=60, path=copy):
        restore(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not back_up(made, copy).is_increment
    restore(copy, tmp_path / "back")
    assert everything(tmp_path / "back") == everything(made)


@pytest.mark.parametrize("is_increment", [True, False])
@pytest.mark.parametrize("stops", [(1, 2), (2, 1), (2, 2)])
def test_a_backup_that_ends_between_two_manifests_is_restored(
    tmp_path, made, copy, monkeypatch, is_increment, stops
):
    """The first manifest is written before the rows are, the second one after that."""
    back_up(made, copy)
    expected, write = everything(made)[0], module.write_atomically
    if not is_increment:
        monkeypatch.setattr(module, "_is_earlier", lambda *_: False)
    for start, last in zip((60, 70), stops, strict=True):
        with Gallery.open(made) as gallery:
            delete(gallery, start - 50)
            fill(gallery, start, start + 3)
        written = []

        def ending(path, content, written=written, last=last):
            written += [path] * (path.name == MANIFEST)
            if len(written) < 2:
                write(path, content)
            if len(written) == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(module, "write_atomically", ending)
            with pytest.raises(KeyboardInterrupt):
                back_up(made, copy)
        expected = everything(made)[0] if last == 2 else expected
        restore(copy, tmp_path / f"back-{start}")
        assert everything(tmp_path / f"back-{start}")[0] == expected
    monkeypatch.undo()
    assert back_up(made, copy).is_increment
    assert json.loads((copy / MANIFEST).read_text())["changing"] == []


@pytest.mark.parametrize(
    ("about", "code"),
    [
        ({"fingerprint": "f" * 64}, "backup_mixed"),
        ({"embed_dim": 3}, "backup_mixed"),
        ({"pictures": 59}, "backup_mixed"),
        ({"checksums": 1}, "backup_mixed"),
        ({"crops": 59}, "backup_damaged"),
        ({"crop_bytes": 1}, "backup_damaged"),
        ({"crop_bytes": 1 << 60}, "disk_full"),
        *(
            ({"files": {name: ["0" * 64]}}, "backup_name")
            for name in (
                "gallery.sqlite", "./gallery.sqlite-wal", "Gallery.sqlite", "backup.json",
                "backup.lock", "deliver-a.lock", ".hidden", "crops", "crops/a.jpg", "bin/a.jpg",
                "clips", "clips/../gallery.sqlite", "clips//a.mp4", "clips/./a.mp4", "/etc/passwd",
                "../a", "..", ".", "", "a/b", "a\0",
            )
        ),
    ],
)  # fmt: skip
def test_a_manifest_that_was_altered_is_refused(tmp_path, made, copy, about, code):
    back_up(made, copy)
    with Gallery.open(made) as gallery:
        delete(gallery, 1)
    manifest = copy / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | about))
    before = contents(copy)
    with refused(code):
        restore(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    if code == "backup_name":
        with refused(code, IntegrityError):
            back_up(made, copy)
        assert contents(copy) == before
    else:
        back_up(made, copy)
        restore(copy, tmp_path / "back")


def put_fifo(path):
    os.mkfifo(path)


def put_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # The address has 108 bytes at most.
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def put_sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


PARTS = ["crops", "clips", "scores.json", "backup.lock", MANIFEST, "gallery.sqlite"]
PARTS += ["gallery.sqlite-wal", "gallery.sqlite-mark", "gallery.sqlite-shm"]


@pytest.mark.parametrize("put_odd", [put_fifo, put_socket, put_sparse, os.mkdir])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_no_regular_file_is_neither_waited_for_nor_read(
    tmp_path, made, copy, part, put_odd
):
    back_up(made, copy)
    with Gallery.open(made) as gallery:
        fill(gallery, 60, 61)
    place = copy / part
    if part in ("crops", "clips"):
        place = sorted(path for path in place.rglob("*") if path.is_file())[3]
    place.unlink(missing_ok=True)
    put_odd(place)
    for use in (lambda: restore(copy, tmp_path / "back"), lambda: back_up(made, copy)):
        with suppress(InputError, IntegrityError):
            use()
    with suppress(InputError, IntegrityError), Gallery.open(copy) as gallery:
        gallery.verify()
        gallery.search(some_vectors(1), 1)


@pytest.mark.parametrize("put_odd", [put_fifo, put_socket, put_sparse])
@pytest.mark.parametrize("part", ["crops", "clips", "scores.json"])
def test_odd_files_of_a_gallery_do_not_hold_its_backup_up(made, copy, part, put_odd):
    place = made / part
    if place.is_dir():
        place = sorted(path for path in place.rglob("*") if path.is_file())[3]
    place.unlink()
    put_odd(place)
    if put_odd is put_sparse:
        with refused("file_too_large", InputError, path=str(place)):
            back_up(made, copy)
    else:
        assert len(back_up(made, copy).manifest.missing_crops) == (part == "crops")
