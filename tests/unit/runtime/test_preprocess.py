import datetime
import os
import struct
from collections import Counter
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.helpers.refused import refused
from upperson_rt import image_file, preprocess
from upperson_rt.bundle import read_manifest
from upperson_rt.errors import InputError
from upperson_rt.preprocess import (
    TimeSource,
    capture_time,
    iter_image_files,
    load_image,
    prepare_image,
    resize_image,
)


def gradient(height=12, width=9):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 20, columns * 25, rows + columns], axis=-1).astype(np.uint8)


def test_file_image_and_array_give_the_same(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(gradient()).save(path)
    for source in (path, str(path), Image.fromarray(gradient()), gradient()):
        np.testing.assert_array_equal(load_image(source), gradient())
    for grey in (np.full((3, 2), 9, np.uint8), np.full((3, 2, 1), 9, np.uint8)):
        np.testing.assert_array_equal(load_image(grey, "bgr"), np.full((3, 2, 3), 9))


def test_transparency_lies_over_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0] = (10, 20, 30, 255)
    expected = np.full((2, 2, 3), 255, np.uint8)
    expected[0] = (10, 20, 30)
    np.testing.assert_array_equal(load_image(rgba), expected)
    np.testing.assert_array_equal(load_image(rgba[..., [2, 1, 0, 3]], "bgr"), expected)
    np.testing.assert_array_equal(load_image(Image.fromarray(rgba)), expected)

    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.info["transparency"] = 0
    np.testing.assert_array_equal(load_image(palette), np.full((2, 2, 3), 255))


def test_every_mode_becomes_rgb_and_sixteen_bits_keep_the_upper_ones(tmp_path):
    grey = Image.new("L", (5, 7), 204)  # In the web palette.
    for mode in ("1", "LA", "P", "CMYK", "YCbCr", "F", "I", "RGBA"):
        direct = mode in ("1", "L", "LA", "F", "I")
        pixels = load_image((grey if direct else grey.convert("RGB")).convert(mode))
        assert (pixels.shape, pixels.dtype) == ((7, 5, 3), np.uint8)
        if mode not in ("1", "P"):  # These two dither.
            assert np.abs(pixels.astype(int) - 204).max() <= 3
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 255]


def test_unreadable_files_are_named(tmp_path):
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(5)
    (tmp_path / "text.jpg").write_bytes(b"not a picture")
    (tmp_path / "header.png").write_bytes(header)
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    halves = [tmp_path / f"a.{suffix}" for suffix in ("jpg", "png", "webp", "bmp", "tiff")]
    for path in halves:
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name in ("text.jpg", "header.png", "missing.png", ".", *halves):
        with refused("image_unreadable", InputError, path=str(tmp_path / name)):
            load_image(tmp_path / name)


def save_left_red(path, size, **options):
    image = Image.new("RGB", size, (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1]))
    image.save(path, **options)
    return path


def test_a_jpeg_above_the_limit_is_reduced_until_it_fits_and_others_are_refused(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(image_file._BUDGET, "each", 8_200)  # What 1,000 pixels take.
    for size, shape in (((30, 30), (30, 30)), ((48, 40), (20, 24)), ((160, 160), (20, 20))):
        pixels = load_image(save_left_red(tmp_path / "large.jpg", size))
        assert pixels.shape == (*shape, 3)
        assert pixels[:, 0].mean(axis=0) == pytest.approx([254, 0, 0], abs=4)
        assert pixels[:, -1].mean(axis=0) == pytest.approx([255, 255, 255], abs=4)
    for name, size, options in (
        ("a.png", (40, 40), {}),
        ("a.jpg", (300, 300), {}),  # Too large even at an eighth.
        ("a.jpg", (60, 60), {"progressive": True}),
    ):
        path = save_left_red(tmp_path / name, size, **options)
        with refused("image_too_large", InputError, path=str(path)):
            load_image(path)


def test_the_first_picture_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (4, 6), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        path = tmp_path / name
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with Image.open(path) as image:
            assert image.n_frames == 3
        assert load_image(path)[3, 2].tolist() == pytest.approx([255, 0, 0], abs=5)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "CMYK", "F", "I", "I;16", "RGB"])
def test_pictures_are_converted_in_blocks(monkeypatch, mode):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (11, 13, 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (11, 13), dtype=np.uint16))
    elif mode in ("F", "I"):  # Only one pixel says that the values have 16 bits.
        wide = rng.integers(-9, 250, (11, 13))
        wide[10, 3] = 9_999
        image = Image.fromarray(wide.astype(np.float32 if mode == "F" else np.int32))
    else:
        image = noise.convert("LA").convert("L" if mode == "1" else "LA").convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    tags = Image.Exif()
    for orientation in range(1, 9):
        tags[0x0112] = orientation
        image.info["exif"] = tags.tobytes()
        image.getexif().load(tags.tobytes())
        whole = load_image(image)
        turned = load_image(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(whole, turned)
        for most in (1, 10, 50):
            monkeypatch.setattr(preprocess, "_BLOCK_PIXELS", most)
            np.testing.assert_array_equal(load_image(image), whole)
        monkeypatch.undo()


def test_resize_is_pillow_bilinear_with_antialias():
    image = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    resized = resize_image(image, height_px=24, width_px=8)
    expected = Image.fromarray(image).resize((8, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized, np.asarray(expected))
    np.testing.assert_array_equal(prepare_image(image, 24, 8), resized)
    np.testing.assert_array_equal(load_image(image[..., ::-1], "bgr"), image)
    assert resized.dtype == np.uint8
    # Antialiased: shrinking a fine checkerboard gives grey, not one of its two colours.
    board = ((np.indices((64, 64)).sum(axis=0) % 2) * 255).astype(np.uint8)
    grey = resize_image(np.stack([board] * 3, axis=-1), 8, 8)
    assert 120 < grey.min() <= grey.max() < 135


def test_folders_are_read_in_order_and_nothing_twice(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt", ".hidden.png", ".git/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = list(iter_image_files([tmp_path, tmp_path / "a.JPG", tmp_path / "notes.txt"]))
    relative = [path.relative_to(tmp_path).as_posix() for path in found]
    assert relative == ["a.JPG", "b.png", "sub/c.webp", "notes.txt"]


def test_other_files_of_folders_are_counted_by_kind(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(preprocess, "obstacle_to", lambda kind: "needs another package")
    for name in ("a.png", "b.HEIC", "c.heic", "sub/d.zip", "e", "f.txt", "g.%$x", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    others = Counter()
    assert [file.name for file in iter_image_files([tmp_path], others)] == ["a.png"]
    assert others == {"heic": 2, "zip": 1, "txt": 1, "other": 2}
    assert not caplog.messages
    assert [file.name for file in iter_image_files([tmp_path])] == ["a.png"]
    (warning,) = caplog.messages
    assert "2 heic (" in warning
    (tmp_path / "a.png").unlink()
    with refused("no_images", InputError, others=dict(others)):
        list(iter_image_files([tmp_path]))
    with refused("path_missing", InputError):
        list(iter_image_files([tmp_path / "nowhere"]))
    archive = tmp_path / "crops"
    archive.write_bytes(b"PK\3\4rest")
    for read in (lambda: list(iter_image_files([archive])), lambda: read_manifest(archive)):
        with refused("archive", InputError, path=str(archive), kind="zip"):
            read()


# --- When a picture was taken

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
        ({"original": "2026:11:24 14:00:05", "fraction": "x"}, LOCAL),
        ({"original": "0000:00:00 00:00:00"}, None),
        ({}, None),
    ],
)
def test_exif(tmp_path, tags, expected):
    for suffix in (".jpg", ".png", ".tiff", ".webp"):
        path = picture(tmp_path / f"a{suffix}", **tags)
        os.utime(path, (1e9, 1e9 + 0.5))
        found = capture_time(path)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))
        assert (capture_time(path, "mtime"), capture_time(path, "none")) == (1e9 + 0.5, None)


def test_names():
    for name, expected in {
        "gate_20261124_140005.jpg": LOCAL,
        "cam1 2026-11-24 14.00.05.jpg": LOCAL,
        "cam12_20261124_140005_250.jpg": LOCAL + 0.25,
        "20261124T140005Z.jpg": UTC,
        "gate_1790000000_003.jpg": 1_790_000_000.0,
        "1790000000250.jpg": 1_790_000_000.25,
        "20261332_140005.jpg": None,
        "12345678901234567890.jpg": None,
    }.items():
        found = capture_time(f"/20251224_120000/{name}", "name")
        assert found == (expected and pytest.approx(expected, abs=1e-6)), name


@pytest.mark.parametrize("source", get_args(TimeSource))
def test_what_cannot_be_read_has_no_time(tmp_path, source):
    (tmp_path / "junk.jpg").write_bytes(b"\xff\xd8\xffjunk")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("gone.jpg", *(("junk.jpg", "pipe.jpg") if source != "mtime" else ())):
        assert capture_time(tmp_path / name, source) is None
