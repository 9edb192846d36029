import datetime
import os
from typing import get_args

import pytest
from PIL import Image

from upperson_rt.preprocess import TimeSource, capture_time

LOCAL = datetime.datetime(2026, 11, 24, 14, 0, 5).timestamp()
UTC = datetime.datetime(2026, 11, 24, 14, 0, 5, tzinfo=datetime.timezone.utc).timestamp()


def picture(path, **tags):
    exif = Image.Exif()
    names = {"original": 0x9003, "offset": 0x9011, "fraction": 0x9291}
    if tags:
        exif[0x8769] = {names[name]: value for name, value in tags.items()}
    read_back = Image.Exif()  # What a TIFF can be written with.
    read_back.load(exif.tobytes())
    Image.new("RGB", (4, 6)).save(path, exif=read_back)
    return path


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"original": "2026:11:24 14:00:05"}, LOCAL),
        ({"original": "2026-11-24 14:00:05"}, LOCAL),
        ({"original": "2026:11:24 14:00:05", "offset": "+00:00"}, UTC),
        ({"original": "2026:11:24 14:00:05", "offset": "-05:30"}, UTC + 5.5 * 3600),
        ({"original": "2026:11:24 14:00:05", "offset": "", "fraction": "250"}, LOCAL + 0.25),
        ({"original": "2026:11:24 14:00:05", "fraction": "5"}, LOCAL + 0.5),
        ({"original": "2026:11:24 14:00:05", "fraction": "x"}, LOCAL),
        ({"original": "0000:00:00 00:00:00"}, None),
        ({"original": "2026:13:24 14:00:05"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_exif(tmp_path, tags, expected, suffix):
    found = capture_time(picture(tmp_path / f"a{suffix}", **tags))
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gate_20261124_140005.jpg", LOCAL),
        ("IMG-2026-11-24T14-00-05.jpg", LOCAL),
        ("cam1 2026-11-24 14.00.05.jpg", LOCAL),
        ("cam12_20261124_140005_250.jpg", LOCAL + 0.25),
        ("20261124T140005Z.jpg", UTC),
        ("gate_1790000000_003.jpg", 1_790_000_000.0),
        ("1790000000250.jpg", 1_790_000_000.25),
        ("20261332_140005.jpg", None),
        ("000123.jpg", None),
        ("12345678901234567890.jpg", None),
    ],
)
def test_names(name, expected):
    found = capture_time(f"/20251224_120000/{name}", "name")
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_mtime_and_none(tmp_path):
    path = picture(tmp_path / "20261124_140005.jpg", original="2026:11:24 14:00:05")
    os.utime(path, (1e9, 1e9 + 0.5))
    assert capture_time(path, "mtime") == 1e9 + 0.5
    assert capture_time(path, "none") is None


@pytest.mark.parametrize("source", get_args(TimeSource))
def test_what_cannot_be_read_has_no_time(tmp_path, source):
    (tmp_path / "junk.jpg").write_bytes(b"\xff\xd8\xffjunk")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert capture_time(tmp_path / "gone.jpg", source) is None
    if source != "mtime":
        assert capture_time(tmp_path / "junk.jpg", source) is None
        assert capture_time(tmp_path / "pipe.jpg", source) is None
