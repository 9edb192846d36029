"""HEIC and AVIF: decoded by a process of their own, which a hostile file may end."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.helpers.fuzzing import refused_well
from tests.helpers.refused import refused
from upperson_rt import image_file, preprocess
from upperson_rt.errors import InputError
from upperson_rt.image_file import obstacle_to
from upperson_rt.preprocess import capture_time, iter_image_files, load_image

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no process can be limited there")
needs_heif = pytest.mark.skipif(bool(obstacle_to("heic")), reason="needs pi-heif")
needs_avif = pytest.mark.skipif(bool(obstacle_to("avif")), reason="needs Pillow with AVIF")

HEIC = Path(__file__).with_name("photo.heic").read_bytes()
"""Of `gradient`, 32 wide and 48 high, to be turned by its EXIF; taken 2026-11-24 at 14:00."""
BOMB = gzip.decompress(Path(__file__).with_name("bomb.avif.gz").read_bytes())
"""An AVIF of one colour, 16,384 x 16,384."""


def gradient():
    y, x = np.mgrid[0:48, 0:32]
    return np.stack([x * 7, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)


@needs_heif
def test_a_heic_photo_is_read_upright_with_its_time(tmp_path):
    file = tmp_path / "photo.heic"
    file.write_bytes(HEIC)
    found = load_image(file)
    assert found.shape == (32, 48, 3)
    assert np.abs(found.astype(int) - np.rot90(gradient(), -1)).mean() < 4
    assert capture_time(file) == preprocess._seconds(["2026", "11", "24", "14", "00", "00"], "", "")
    assert [*iter_image_files([tmp_path])] == [file]


@needs_avif
def test_an_avif_photo_is_read_with_its_transparency_and_time(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[0x9003] = "2026:11:24 14:00:00"
    alpha = np.full((48, 32, 1), 255, np.uint8)
    alpha[:24] = 0
    image = Image.fromarray(np.concatenate([gradient(), alpha], axis=-1))
    image.save(tmp_path / "photo.avif", quality=95, exif=exif.tobytes())
    found = load_image(tmp_path / "photo.avif")
    assert found[:20].min() > 240  # Laid over white.
    assert np.abs(found[28:].astype(int) - gradient()[28:]).mean() < 6
    assert capture_time(tmp_path / "photo.avif") is not None
    content = (tmp_path / "photo.avif").read_bytes()
    with image_file.open_image("sent", content) as opened:
        assert opened.size == (32, 48)


@needs_heif
def test_the_time_of_a_heic_photo_is_read_without_its_pixels(tmp_path):
    first, last = HEIC.index(b"mdat") + 4, HEIC.index(b"Exif\0\0MM")
    (tmp_path / "photo.heic").write_bytes(HEIC[:first] + bytes(last - first) + HEIC[last:])
    with refused("image_unreadable", InputError):
        load_image(tmp_path / "photo.heic")
    assert capture_time(tmp_path / "photo.heic") is not None


@needs_avif
def test_a_photo_beyond_the_bound_is_halved_and_one_of_a_gigabyte_refused(tmp_path, monkeypatch):
    (tmp_path / "bomb.avif").write_bytes(BOMB)
    with refused("image_unreadable", InputError):
        load_image(tmp_path / "bomb.avif")
    Image.fromarray(gradient()).save(tmp_path / "photo.avif")
    monkeypatch.setattr(image_file, "_DECODED", image_file.MOST_BYTES // (48 * 32 // 2))
    assert load_image(tmp_path / "photo.avif").shape == (24, 16, 3)


@needs_heif
def test_damaged_photos_are_refused_or_read(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "photo.heic"
    for number in range(6):
        content = bytearray(HEIC[: 200 + 120 * number] if number % 2 else HEIC)
        for place in rng.integers(12, len(content), 3 * (number % 3)):
            content[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        found = refused_well(load_image, file)
        assert isinstance(found, np.ndarray | InputError)


@pytest.mark.parametrize(
    ("obstacle", "python", "code", "said"),
    [
        ("pip install heif", sys.executable, "image_unreadable", "pip install heif"),
        ("", "/bin/false", "image_unreadable", "its decoder failed"),
        ("", "/no/such/program", "photo_decoder_unusable", "/no/such/program"),
    ],
)
def test_a_decoder_that_is_missing_or_dies_takes_one_picture_with_it(
    tmp_path, monkeypatch, obstacle, python, code, said
):
    monkeypatch.setattr(image_file, "obstacle_to", lambda kind: obstacle)
    monkeypatch.setattr(image_file.sys, "executable", python)
    (tmp_path / "photo.heic").write_bytes(HEIC)
    with refused(code, InputError) as found:
        load_image(tmp_path / "photo.heic")
    assert said in str(found.value)


@needs_avif
def test_a_decoder_has_the_import_path_of_its_parent_and_says_why_it_cannot_start(
    tmp_path, monkeypatch
):
    name, content = "PIL.py", "raise ImportError('only here')"  # As in a folder of PYTHONPATH.
    Image.fromarray(gradient()).save(tmp_path / "photo.avif")
    (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with refused("photo_decoder_unusable", InputError, path=str(tmp_path / "photo.avif")) as found:
        load_image(tmp_path / "photo.avif")
    assert "only here" in str(found.value)
