"""Pictures that want to run something, or more memory or time than a picture may have."""

import io
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import run_code
from tests.helpers.refused import refused
from upperson_rt import image_file
from upperson_rt.errors import InputError
from upperson_rt.image_file import MOST_BYTES, open_image
from upperson_rt.preprocess import capture_time, load_image, prepare_image

MEGABYTE = 1_000_000

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n"


def saved(size, name, **options):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(file, name, **options)
    return file.getvalue()


def zeros_deflated(count):
    """Deflate a number of zeros in no time: a flushed block over and over, without the checksum."""
    packer = zlib.compressobj(9)
    first, block = (
        packer.compress(bytes(MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    return first + block * (-(-count // MEGABYTE) - 1)


def chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(width, height, colour=2, depth=8, before=b"", after=b""):
    channels = {0: 1, 2: 3, 6: 4}[colour]
    pixels = zeros_deflated(height * (1 + width * channels * depth // 8))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after)
    ) + chunk(b"IEND", b"")


def tiff(tags, pixels):
    """Make a TIFF file; a value of bytes lies behind the directory, None stands for the pixels."""
    start = 8 + 2 + 12 * len(tags) + 4
    long_values = b"".join(value for _, _, value in tags.values() if isinstance(value, bytes))
    directory = struct.pack("<H", len(tags))
    place = start
    for tag, (kind, count, value) in sorted(tags.items()):
        if isinstance(value, bytes):
            value, place = place, place + len(value)
        elif value is None:
            value = start + len(long_values)
        directory += struct.pack("<HHII", tag, kind, count, value)
    return b"II*\0\x08\0\0\0" + directory + bytes(4) + long_values + pixels


def tiled_tiff(tile):
    pixels = zeros_deflated(tile * tile)
    tags = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    tags |= {324: None, 325: len(pixels)}
    return tiff({tag: (4, 1, value) for tag, value in tags.items()}, pixels)


def animated_webp(canvas):
    def number(value):
        return value.to_bytes(3, "little")

    frame = saved((16, 16), "WEBP", lossless=True)[12:]
    shown = number(0) * 2 + number(15) * 2 + number(100) + b"\0" + frame
    parts = [(b"VP8X", b"\2\0\0\0" + number(canvas - 1) * 2), (b"ANIM", bytes(6))]
    parts += [(b"ANMF", shown)] * 2
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(part)) + part + bytes(len(part) % 2) for name, part in parts
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_of_many_codes(side):
    """The header of a lossless picture, and room for five codes of each 4 x 4 pixels."""
    content = (0x2F | side - 1 << 8 | side - 1 << 22).to_bytes(5, "little")
    content += bytes(20 * side * side // 16 // 8)
    body = b"WEBPVP8L" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(size=(64, 64), claimed=None, **options):
    content = bytearray(saved(size, "JPEG", **options))
    if claimed:
        at = content.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", claimed[1], claimed[0])
    return bytes(content)


def segment(marker, content):
    return marker + struct.pack(">H", 2 + len(content)) + content


def crowded_directory(size_bytes):
    """Make an EXIF block whose tags all name the same large bytes."""
    count = size_bytes // 24
    entry = (7, size_bytes - 12 * count - 20, 12 * count + 14)
    entries = b"".join(struct.pack("<HHII", 1000 + i, *entry) for i in range(count))
    start = b"II*\0\x08\0\0\0" + struct.pack("<H", count)
    return (start + entries + bytes(4)).ljust(size_bytes, b"\0")


def test_no_program_is_started_whatever_a_file_is_called(tmp_path, monkeypatch):
    marker = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c", "djpeg", "xv", "convert"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {marker}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    path = tmp_path / "person.jpg"
    Image.init()
    others = EPS, b"P7\n", *(saved((16, 16), name) for name in ("ICO", "PCX", "SGI"))
    for content, found in (
        (b"%PDF-1.4\n", "a PDF"),
        (b"<svg/>", "HTML, SVG or other XML"),
        (b"RIFF\4\0\0\0AVI ", "a video"),
        (b"", "an empty file"),
        *((content, "another kind of file") for content in others),
    ):
        path.write_bytes(content)
        with refused("image_unreadable", InputError, found=found) as caught:
            load_image(path)
        assert "\n" not in str(caught.value)
        assert capture_time(path) is None
    assert not marker.exists()


LIMIT = MOST_BYTES // 4
"""Of a picture while memory is measured: smaller ones will do, which take less time."""
HUNGRY = {
    "several.jpg": lambda: jpeg((2_950, 2_950)),  # Within the bound.
    "tile.tif": lambda: tiled_tiff(10_000),
    "canvas.webp": lambda: animated_webp(4_700),
    "clear.png": lambda: png(2_250, 2_250, colour=6),  # Within the bound.
    "large.jpg": lambda: jpeg(claimed=(6_000, 6_000)),  # Within the bound, at a quarter.
    "trailer.png": lambda: png(64, 64, after=chunk(b"prVt", bytes(25 * MEGABYTE))),
}

MEASURE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from upperson_rt.errors import InputError
from upperson_rt.image_file import MOST_BYTES, limit_memory
from upperson_rt.preprocess import prepare_image

limit_memory(MOST_BYTES // 2)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

prepare_image(sys.argv[1], 384, 128)
for path in sys.argv[2:]:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # The peak counts anew.
    idle = status("VmRSS")
    try:
        shape = prepare_image(path, 384, 128).shape
    except InputError as error:
        shape = str(error)
    print(status("VmHWM") - idle, shape)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
idle, ready = status("VmRSS"), Barrier(4)

def work(path):
    ready.wait()
    for _ in range(2):
        prepare_image(path, 384, 128)

with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, [sys.argv[2]] * 4))
print(status("VmHWM") - idle, "taken by threads")
print(status("VmRSS") - idle, "left by threads")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.timeout(90)  # It decodes large pictures.
def test_no_picture_takes_more_than_its_share_of_memory(tmp_path):
    (tmp_path / "first.png").write_bytes(png(8, 8))
    for name, content in HUNGRY.items():
        (tmp_path / name).write_bytes(content())
    paths = [str(tmp_path / name) for name in ("first.png", *HUNGRY)]
    for _ in range(3):  # A thread that has to wait for its turn may trim its heap a moment late.
        done = run_code(MEASURE, *paths)
        assert done.returncode == 0, done.stderr
        lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
        sizes, outcomes = zip(*lines, strict=True)
        *peaks, taken, left = map(int, sizes)
        if taken < 2 * LIMIT + 32 * MEGABYTE:
            break
    assert max(peaks) < 1.2 * LIMIT, done.stdout
    assert taken < 2 * LIMIT + 32 * MEGABYTE, done.stdout
    assert left < 32 * MEGABYTE, done.stdout
    too_large = [name for name, said in zip(HUNGRY, outcomes, strict=False) if "image" in said]
    assert too_large == ["tile.tif", "canvas.webp", "trailer.png"]
    assert peaks[list(HUNGRY).index("clear.png")] > 25 * MEGABYTE, "the measure measures"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lambda: png(7_000, 7_000), "7000x7000 pixels in its format take 328 MiB to decode"),
        (lambda: jpeg(claimed=(65_500, 65_500)), "65500x65500 pixels"),
        (lambda: jpeg(claimed=(12_000, 12_000), progressive=True), "12000x12000 pixels"),
        (lambda: b"P3 2001 2000 255\n", "2001x2000 pixels as text"),
        (lambda: animated_webp(16_383), "16383x16383 pixels"),
        (lambda: webp_of_many_codes(1024), "1024x1024 pixels"),
        (lambda: tiled_tiff(30_000), "100x100 pixels"),
        (lambda: jpeg()[:2] + segment(b"\xff\xe2", bytes(65_000)) * 300 + jpeg()[2:], "header"),
        (lambda: png(8, 8, before=chunk(b"prVt", bytes(20 * MEGABYTE))), "header"),
        (lambda: png(8, 8, after=chunk(b"tEXt", bytes(90 * MEGABYTE))), "8x8 pixels"),
        (lambda: b"GIF89a\4\0\4\0\0\0\0" + b"!\xfe" + b"\xff" * 18 * MEGABYTE, "header"),
    ],
)
def test_what_would_take_too_much_is_refused_from_the_header(tmp_path, content, found):
    path = tmp_path / "person.jpg"
    path.write_bytes(content())
    with refused("image_too_large", InputError, path=str(path)) as caught:
        load_image(path)
    assert found in str(caught.value)
    assert capture_time(path) is None


def jpeg_of_scans(count):
    """Every scan is a pass over the whole picture: 400 of them took 25 seconds."""
    content = jpeg(progressive=True)
    at = content.rindex(b"\xff\xda")
    return content[:at] + content[at:-2] * count + b"\xff\xd9"


def tiff_of_strips(count):
    """Pillow makes several objects for each of them."""
    tags = {256: 1, 257: count, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
    tags = {tag: (4, 1, value) for tag, value in tags.items()}
    strips = {273: (4, count, struct.pack("<I", 8) * count), 279: (4, 1, 1)}
    return tiff(tags | strips, b"")


def jpeg_of_exif(size_bytes):
    """It comes in segments, and is parsed again with each of them."""
    start = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x927C, 7, size_bytes, 26)
    return with_exif(start + bytes(4) + bytes(size_bytes))


def with_exif(block):
    parts = [block[at : at + 65_000] for at in range(0, len(block), 65_000)]
    exif = b"".join(segment(b"\xff\xe1", b"Exif\0\0" + part) for part in parts)
    return jpeg()[:2] + exif + jpeg()[20:]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the first part of a directory.
@pytest.mark.parametrize(
    ("make", "few", "many", "shape"),
    [
        (jpeg_of_scans, 80, 120, (64, 64, 3)),
        (tiff_of_strips, 1_000, 200_000, (1_000, 1, 3)),
        (jpeg_of_exif, 200_000, 300_000, (64, 64, 3)),
    ],
)
def test_too_many_parts_are_refused(tmp_path, make, few, many, shape):
    path = tmp_path / "person"
    path.write_bytes(make(few))
    assert load_image(path).shape == shape
    path.write_bytes(make(many))
    with refused("image_too_large", InputError, path=str(path)):
        load_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what is wrong with the files.
def test_directories_may_not_read_the_same_bytes_again_and_again(tmp_path, monkeypatch):
    crowded, most = crowded_directory(200_000), []
    read = image_file._Metered.read

    def counted(self, size=-1):
        content = read(self, size)
        most.append(image_file._HEADER_BYTES - self._bytes_left)
        return content

    monkeypatch.setattr(image_file._Metered, "read", counted)
    for content in (with_exif(crowded), png(8, 8, before=chunk(b"eXIf", crowded)), crowded):
        path = tmp_path / "person"
        path.write_bytes(content)
        with suppress(InputError), open_image(path) as image:
            image.getexif()
        # Pillow of today reads no more than the file is long, others up to the bound.
        assert max(n for n in most if n != float("-inf")) < 2 * image_file._HEADER_BYTES


@pytest.fixture
def budget(monkeypatch):
    class Spy(image_file._Budget):
        taken = 0
        most = 0
        lock = threading.Lock()

        @contextmanager
        def share(self, size_bytes):
            with super().share(size_bytes):
                with self.lock:
                    self.taken += size_bytes
                    self.most = max(self.most, self.taken)
                try:
                    yield
                finally:  # Before another thread may have the share.
                    with self.lock:
                        self.taken -= size_bytes

    spy = Spy(10 * MEGABYTE)
    monkeypatch.setattr(image_file, "_BUDGET", spy)
    return spy


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_threads_share_the_memory(tmp_path, budget, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.zeros((600, 400, 3), np.uint8)).save(path)
    with open_image(path):
        alone = budget.taken
    assert alone >= 600 * 400 * 7
    budget._free = 2 * alone + 1
    barrier = threading.Barrier(6)
    shapes = []

    def work(read):
        barrier.wait()
        shapes.extend(read() for _ in range(5))

    reads = [
        lambda: load_image(path).shape,
        lambda: prepare_image(path, 600, 400).shape,
        lambda: capture_time(path) or (600, 400, 3),
    ]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, reads * 2))
    assert shapes == [(600, 400, 3)] * 30
    assert alone <= budget.most <= 2 * alone
    assert budget._free == 2 * alone + 1, "all of it is given back"


def test_shares_are_given_back_and_a_thread_does_not_wait_for_its_own(tmp_path, budget):
    path = tmp_path / "cut.png"
    path.write_bytes(png(200, 200)[:60])
    with refused("image_unreadable", InputError, path=str(path)):
        load_image(path)
    with pytest.raises(KeyboardInterrupt), open_image(path):
        raise KeyboardInterrupt
    assert budget.most > 0
    assert budget._free == 10 * MEGABYTE
    path.write_bytes(png(600, 400))
    with open_image(path):
        budget._free = 0
        assert load_image(path).shape == (400, 600, 3)
    with open_image(path):
        assert budget._free == 0, "all was given back, and a first one waits again"


def test_any_one_picture_may_take_all_that_a_picture_may():
    with image_file._BUDGET.share(MOST_BYTES), image_file._BUDGET.share(MOST_BYTES):
        assert image_file._BUDGET._free == 0
