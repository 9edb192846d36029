"""Damages pictures of all formats at random, and has them read as `index` and the console do.

    python -m tests.helpers.picture_damage --trials 5000

A picture, or an error of ours in one line, is right; any other error, a program that is started, a
process that ends, more than `MOST_S` of its processor, or more memory than `MOST_BYTES` counts
against us.
"""

import io
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.damage import damage, in_child
from tests.helpers.trials import parse, tabulate
from upperson_console.pictures import read_upload
from upperson_machine.description import resident_bytes
from upperson_rt.errors import UppersonError
from upperson_rt.preprocess import capture_time, load_image, resize_image
from upperson_rt.printable import escape_for_display

MOST_BYTES, MOST_S = 300 << 20, 5.0
BAD = ("raw error", "program", "crash", "memory", "slow", "message")
KINDS = ("bit", "byte", "16 bytes", "sector of zeros", "cut", "swap", "number", "doubled")
_AT_A_TIME = 100
_SIZE = (180, 90, 3)
_STARTS = ("os.exec", "os.fork", "os.posix_spawn", "os.system", "subprocess.Popen")


def make_pictures() -> dict[str, bytes]:
    """Return files of the seven formats in the modes and codings that Pillow writes, by name."""
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, int(np.prod(_SIZE))).reshape(_SIZE)
    colour = Image.fromarray((smooth + rng.integers(0, 55, _SIZE)).astype(np.uint8))
    grey, bits, few = colour.convert("L"), colour.convert("1"), colour.quantize(32)
    clear = colour.convert("RGBA")
    wide = Image.fromarray((smooth[..., 0] * 300).astype(np.uint16))
    real = Image.fromarray(smooth[..., 0].astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9003] = "2026:11:24 14:00:00"
    with_exif = {"exif": exif.tobytes()}
    written = {}

    def write(name: str, image: Image.Image, kind: str, **options: object) -> None:
        target = io.BytesIO()
        image.save(target, kind, **options)
        written[name] = target.getvalue()

    write("plain.jpg", colour, "JPEG", **with_exif)
    write("progressive.jpg", colour, "JPEG", progressive=True)
    write("grey.jpg", grey, "JPEG", restart_marker_blocks=3)
    write("four.jpg", colour.convert("CMYK"), "JPEG", subsampling=0)
    write("plain.png", colour, "PNG", **with_exif)
    write("palette.png", few, "PNG", transparency=3)
    write("bits.png", bits, "PNG")
    write("clear.png", clear, "PNG")
    write("wide.png", wide, "PNG")
    write("plain.bmp", colour, "BMP")
    write("palette.bmp", few, "BMP")
    write("plain.gif", few, "GIF", comment=b"c" * 600)
    write("moving.gif", few, "GIF", save_all=True, append_images=[few.rotate(9), few.rotate(90)])
    write("plain.ppm", colour, "PPM")
    write("grey.pgm", grey, "PPM")
    write("wide.pgm", wide, "PPM")
    write("bits.pbm", bits, "PPM")
    for coding in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        write(f"{coding}.tif", colour, "TIFF", compression=coding, exif=exif)
    write("fax.tif", bits, "TIFF", compression="group4")
    write("wide.tif", wide, "TIFF")
    write("real.tif", real, "TIFF")
    write("clear.tif", clear, "TIFF", compression="tiff_lzw")
    write("lossy.webp", colour, "WEBP", **with_exif)
    write("lossless.webp", clear, "WEBP", lossless=True)
    write("moving.webp", colour, "WEBP", save_all=True, append_images=[colour.rotate(90)])
    return written


def damaged(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """Return a file with one to four damages; the beginning, which says most, gets half of them."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        head = len(changed) if rng.random() < 0.5 else min(len(changed), 256)
        if head < 32:
            break
        if kind == "number":  # Sizes, counts and offsets.
            at = int(rng.integers(head - 4))
            value = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF]))
            order = "big" if rng.random() < 0.5 else "little"
            changed[at : at + 4] = value.to_bytes(4, order)  # type: ignore[arg-type]
        elif kind == "doubled":
            at = int(rng.integers(head))
            changed[at:at] = changed[at : at + int(rng.integers(1, 200))]
        else:
            changed[:head] = damage(changed[:head], kind, rng)
    return bytes(changed)


def _read(path: Path) -> str:
    """Read a picture in every way; say how it ended."""
    _STARTED.clear()
    Path("/proc/self/clear_refs").write_text("5")  # Sets the peak back.
    before, began = _peak_bytes(), time.process_time()
    outcome = "a picture"
    try:
        capture_time(path)
        with suppress(UppersonError):  # The other way refuses it, too.
            read_upload(io.BytesIO(path.read_bytes()))
        resize_image(load_image(path), 384, 128)
    except UppersonError as error:
        outcome = "refused"
        if "\n" in escape_for_display(str(error)) or len(str(error)) > 2000:
            return f"message: {error}"
    except Exception as error:
        return f"raw error: {error!r}"
    seconds, size = time.process_time() - began, _peak_bytes() - before
    if _STARTED:
        return f"program: {_STARTED}"
    if seconds > MOST_S:
        return f"slow: {seconds:.1f} s"
    return f"memory: {size >> 20} MiB" if size > MOST_BYTES else f"{outcome} {size} {seconds}"


_STARTED: list[str] = []
"""Programs that were started while a picture was read."""


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event in _STARTS:
        _STARTED.append(f"{event} {arguments}")


def _peak_bytes() -> int:
    return resident_bytes("VmHWM") or 0


def trials(count: int, seed: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each damaged picture, and how reading it ended."""
    originals = make_pictures()
    names = sorted(originals)
    for first in range(0, count, _AT_A_TIME):
        files = {}
        for number in range(first, min(first + _AT_A_TIME, count)):
            rng = np.random.default_rng((seed, number))
            name = names[number % len(names)]
            kind = KINDS[int(rng.integers(len(KINDS)))]
            path = folder / f"{number} {kind} {name}"
            path.write_bytes(damaged(originals[name], kind, rng))
            files[path.name] = path
        said = in_child(lambda files=files: {key: _read(path) for key, path in files.items()})
        if "process" in said:
            said = dict.fromkeys(said, "crash") | {f"{first} and later": said["process"]}
        yield from said.items()
        for path in files.values():
            path.unlink()


def main() -> int:
    options = parse(__doc__, trials=5000, seed=0)
    sys.addaudithook(_watch)
    largest, longest = 0, 0.0
    results = []
    with tempfile.TemporaryDirectory() as name:
        for file, content in make_pictures().items():
            Path(name, file).write_bytes(content)
        sound = in_child(lambda: {path.name: _read(path) for path in Path(name).iterdir()})
        assert all(text.startswith("a picture") for text in sound.values()), sound
        for file, text in trials(options.trials, options.seed, Path(name)):
            outcome = next((bad for bad in BAD if text.startswith(bad)), text.rsplit(" ", 2)[0])
            if outcome in BAD:
                print(f"{file}: {text}", flush=True)
            else:
                _, size, seconds = text.rsplit(" ", 2)
                largest, longest = max(largest, int(size)), max(longest, float(seconds))
            results.append((Path(file).suffix, outcome))
    print(f"{largest >> 20} MiB and {longest:.1f} s of a processor at most")
    return tabulate(results, BAD)


if __name__ == "__main__":
    sys.exit(main())
