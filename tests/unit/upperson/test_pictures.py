"""The cache of pictures: the same bytes as the files, or an error."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from upperson.data import pictures
from upperson.data.pictures import Pictures, cached_pictures, pixels_of
from upperson_rt import files as files_module
from upperson_rt.errors import InputError, IntegrityError

SIZE = (24, 16)


@pytest.fixture
def splits(tmp_path):
    """Two splits of five and three pictures, which are all different; one is in both."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    files = [tmp_path / f"data/{index}.png" for index in range(7)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(file)
    return [files[:5], files[4:]]


def build(tmp_path, splits, reported):
    def note(done, total):
        reported.append((done, total))

    return [*cached_pictures(tmp_path / "cache", tmp_path / "data", splits, SIZE, note)]


def never(done, total):
    pytest.fail(f"picture {done} of {total} was made again")


def assert_like_files(found, splits):
    for cached, files in zip(found, splits, strict=True):
        places = np.array([2, 0, 2])
        assert len(cached) == len(files)
        expected = Pictures(files, SIZE).read(places)
        np.testing.assert_array_equal(cached.read(places), expected)
        handed = pickle.dumps(cached.for_batch(places))
        assert len(handed) < 1000  # Bytes would pass through shared memory.
        np.testing.assert_array_equal(pixels_of(pickle.loads(handed)).numpy(), expected)


def test_a_cache_gives_the_bytes_of_the_files(tmp_path, splits):
    reported = []
    found = build(tmp_path, splits, reported)
    assert_like_files(found, splits)
    assert reported == [(done, 7) for done in range(1, 8)]
    again = build(tmp_path, splits, reported)
    assert len(reported) == 7
    pickled = pickle.dumps(again[0])
    assert len(pickled) < 2000
    assert_like_files([pickle.loads(pickled), again[1]], splits)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = [[tmp_path / "moved" / file.name for file in files] for files in splits]
    cached_pictures(tmp_path / "cache", tmp_path / "moved", moved, SIZE, never)


def test_building_goes_on_where_it_stopped(tmp_path, splits, monkeypatch):
    monkeypatch.setattr(pictures, "_SYNC_BYTES", 1)
    content = splits[0][3].read_bytes()
    splits[0][3].write_bytes(b"broken")
    reported = []
    with pytest.raises(InputError, match=r"cannot read image .*3\.png"):
        build(tmp_path, splits, reported)
    assert reported == [(1, 7), (2, 7), (3, 7)]
    splits[0][3].write_bytes(content)
    assert_like_files(build(tmp_path, splits, reported), splits)
    assert reported == [(done, 7) for done in range(1, 8)]


def test_a_picture_that_changed_is_made_again(tmp_path, splits):
    reported = []
    build(tmp_path, splits, reported)
    changed = splits[1][2]
    Image.fromarray(np.full((50, 30, 3), 7, dtype=np.uint8)).save(changed)
    assert_like_files(build(tmp_path, splits, reported), splits)
    assert reported[7:] == [(7, 7)]
    os.utime(changed, (1, 1))  # Another of the same size.
    build(tmp_path, splits, reported)
    assert reported[8:] == [(7, 7)]


def test_a_picture_is_stamped_when_it_is_on_disk(tmp_path, splits, monkeypatch):
    calls, write, sync = [], os.pwrite, os.fsync

    def note(name, real):
        def call(handle, *rest):
            number = handle if isinstance(handle, int) else handle.fileno()
            file = Path(os.readlink(f"/proc/self/fd/{number}")).name
            calls.append((name, file))
            return real(handle, *rest)

        return call

    monkeypatch.setattr(os, "pwrite", note("write", write))
    monkeypatch.setattr(os, "fsync", note("sync", sync))
    build(tmp_path, splits, [])
    last = max(place for place, call in enumerate(calls) if call == ("write", "pixels.u8"))
    stamped = calls.index(("write", "stamps.i64"))
    assert ("sync", "pixels.u8") in calls[last:stamped]
    assert ("sync", "stamps.i64") in calls[stamped:]


def test_a_cache_of_other_pictures_or_of_another_size_is_refused(tmp_path, splits):
    build(tmp_path, splits, [])
    for others in ([splits[0], splits[1][:2]], [splits[1], splits[0]]):
        with refused("cache_of_other_pictures", InputError):
            build(tmp_path, others, [])
    with refused("cache_of_other_pictures", InputError, setting="height_px", expected=25, found=24):
        cached_pictures(tmp_path / "cache", tmp_path / "data", splits, (25, 16), never)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine", "utf-8")
    with refused("not_a_cache", InputError, found="notes.txt"):
        cached_pictures(tmp_path / "full", tmp_path / "data", splits, SIZE, lambda *_: None)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_cache_that_was_cut_short_is_an_error(tmp_path, splits):
    for name in ("pixels.u8", "stamps.i64"):
        found, _ = build(tmp_path, splits, [])
        file = tmp_path / "cache" / name
        whole = file.read_bytes()
        os.truncate(file, len(whole) - 5)
        with refused("cache_cut_short", IntegrityError, path=file):
            build(tmp_path, splits, [])
        file.unlink()
        with refused("cache_cut_short", IntegrityError, path=file, found=0):
            build(tmp_path, splits, [])
        file.write_bytes(whole)
    # Also while it is read.
    handed = found.for_batch([4, 0])
    pixels = tmp_path / "cache/pixels.u8"
    os.truncate(pixels, 4 * SIZE[0] * SIZE[1] * 3 + 5)
    with refused("cache_cut_short", IntegrityError, path=pixels):
        pixels_of(handed)
    pixels.unlink()
    with refused("cache_unreadable", IntegrityError, path=pixels):
        found.read([0])


def test_a_list_that_is_none_is_damage_but_not_one_that_may_not_be_read(
    tmp_path, splits, monkeypatch
):
    build(tmp_path, splits, [])
    for text in ("{", "[" * 100_000):
        (tmp_path / "cache/pictures.json").write_text(text, "utf-8")
        with refused("cache_damaged", IntegrityError):
            build(tmp_path, splits, [])
    (tmp_path / "cache/pictures.json").write_text(json.dumps([]), "utf-8")
    with refused("cache_of_other_pictures", InputError, setting="format", expected=1):
        build(tmp_path, splits, [])

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files_module, "open", refuse, raising=False)
    with pytest.raises(InputError, match=r"cannot read .*pictures\.json: Permission denied$"):
        build(tmp_path, splits, [])


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_says_what_is_needed_and_the_cache_goes_on(tmp_path, splits, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with refused("cache_not_written", InputError, reason="No space left on device"):
            build(tmp_path, splits, [])
    assert_like_files(build(tmp_path, splits, []), splits)


def test_several_processes_build_one_cache_once(tmp_path, splits):
    start = multiprocessing.get_context("fork")
    counts = start.SimpleQueue()
    together = start.Barrier(3)

    def join():
        reported = []
        together.wait()
        assert_like_files(build(tmp_path, splits, reported), splits)
        counts.put(len(reported))

    processes = [start.Process(target=join) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(counts.get() for _ in processes) == [0, 0, 7]


def test_no_pictures_need_no_cache(tmp_path):
    assert [len(pictures) for pictures in build(tmp_path, [[], []], [])] == [0, 0]
    assert not (tmp_path / "cache").exists()
