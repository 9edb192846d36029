"""HEIC and AVIF: decoded by a process of their own, which a hostile file may end."""

import base64
import gzip
import sys

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

HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAchtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAA"
    "AAAAAAAAADRpbG9jAAAAAERAAAIAAQAAAAAB7AABAAAAAAAAAHYAAgAAAAACYgABAAAAAAAAAFYAAAA4aWluZgAAAAAA"
    "AgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABB2lwcnAAAADm"
    "aXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAq"
    "QgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQAN"
    "AAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAACAAAAABAAAAMAAAAAH////gAAAAAv////AAAAACAAAAEHBp"
    "eGkAAAAAAwgICAAAAAlpcm90AwAAABlpcG1hAAAAAAAAAAEAAQaBAgMFhIYAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEA"
    "AQAAANRtZGF0AAAAcigBrwngPg6cPr+RtaYfvTKb9Bmi94znpf3s+ed9wWMc08cA7ibMveopnFXx6adqY1OCTrxy91eg"
    "BFtWKgtdqBuxGMYcyaDUb6+FAOldH82bmQSCZbh62lxQkJ9EJa92++FhkUWZ6rc3GbJyKSsUB9B1+AAAAAZFeGlmAABN"
    "TQAqAAAACAACARIAAwAAAAEABgAAh2kABAAAAAEAAAAmAAAAAAABkAMAAgAAABQAAAA4AAAAADIwMjY6MTE6MjQgMTQ6"
    "MDA6MDAA"
)
"""Of `gradient`, 32 wide and 48 high, to be turned by its EXIF; taken 2026-11-24 at 14:00."""
BOMB = gzip.decompress(
    base64.b64decode(
        "H4sIAAAAAAACA2NgYFBIK6ksSCzLTGMAAhCdm5lmmJuZmObraOgEFHqdm1qSyAABihkpOUVQNkNBZnIJAxrgK8gsyQWz"
        "GIFYLjMnPxnEcQHxGSGijMIMDNx3gWyNzMy8NLhaKSAnlQnKSywzMHTOz8kH25WVWVBUAKS9MwuS84G0SGZxQSrEOgco"
        "ZhAoyKzIBDGYOTg4gBRPYpmhc6M8D0hIODk/pygvOacCaDIvA1sDUEg8syAX5iegw1gYmZpZgK56mpuSWCLEwMUt/73+"
        "//+/i5ikeDmMTotLCBo+fDjToYlDfQLQsqjz5wLXaj6RunU0QTHe4M2KMwWaZycs1PT6r8nG17LIKqv5AscDZ/NUAe2m"
        "iHObz54+9W2G7QdtByOzeW8vF8/h8S+yWHPnYZ3h9EMpr6ck8QWtVv8Y+6HFTPwc29p4cYWY8+ciypk+P68LcZ9x3dHi"
        "7rWFG7WsW5d/3HB/YWzaLIOmf3HPWWPfbLR6NiM8+55OAsfnOYeE5dpey76303XZf13VspfD98Dx22nJ+i0nr2sckVka"
        "5v9o90OOHP05vFH79BxGTR81fdT0UdNHTR81fdT0UdNHTR81ffCZTlPDAQtSNrPwDAAA"
    )
)
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
    pixels = slice(HEIC.index(b"mdat") + 4, HEIC.index(b"Exif\0\0MM"))
    content = bytearray(HEIC)
    content[pixels] = bytes(pixels.stop - pixels.start)
    (tmp_path / "photo.heic").write_bytes(content)
    with refused("image_unreadable", InputError):
        load_image(tmp_path / "photo.heic")
    assert capture_time(tmp_path / "photo.heic") is not None


@needs_avif
def test_a_photo_beyond_the_bound_is_halved(tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / "photo.avif")
    monkeypatch.setattr(image_file, "_DECODED", image_file.MOST_BYTES // (48 * 32 // 2))
    assert load_image(tmp_path / "photo.avif").shape == (24, 16, 3)


@needs_avif
def test_what_would_take_a_gigabyte_is_refused(tmp_path):
    (tmp_path / "bomb.avif").write_bytes(BOMB)
    with refused("image_unreadable", InputError):
        load_image(tmp_path / "bomb.avif")


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


def test_a_photo_that_cannot_be_read_here_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(image_file, "obstacle_to", lambda kind: "pip install heif")
    (tmp_path / "photo.heic").write_bytes(HEIC)
    with refused("image_unreadable", InputError, found="heic") as found:
        load_image(tmp_path / "photo.heic")
    assert "pip install heif" in str(found.value)


@pytest.mark.parametrize(
    ("python", "code"),
    [("/bin/false", "image_unreadable"), ("/no/such/program", "photo_decoder_unusable")],
)
def test_a_decoder_that_dies_takes_one_picture_with_it(tmp_path, monkeypatch, python, code):
    monkeypatch.setattr(image_file, "obstacle_to", lambda kind: "")
    monkeypatch.setattr(image_file.sys, "executable", python)
    (tmp_path / "photo.heic").write_bytes(HEIC)
    with refused(code, InputError):
        load_image(tmp_path / "photo.heic")


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
