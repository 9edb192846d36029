"""Decode one HEIC or AVIF photo, in a process of its own: run by `process`.

The decoders are large and written in C, and a file may say another size than its pictures have. So
this process may take so much memory and time and no more, and if it dies it takes no other with
it. It reads the file from stdin and writes a PNG without compression to stdout, with the EXIF, and
with a text ``shrink`` that says how much smaller each side is; for the EXIF alone a PNG of one
pixel, without decoding.
"""

import io
import sys
from collections.abc import Callable
from typing import Any

SETUP_FAILED = 70
"""Exit code where the limits cannot be set or a package cannot be imported; stderr says why."""

_MEMORY_BYTES = 1 << 30
_CPU_S = 60


def _set_up(kind: str) -> Callable[[io.BytesIO], Any]:
    """Limit this process and return what opens a photo."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if kind == "avif":
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # Each has a stack, which counts as memory.
        return AvifImagePlugin.AvifImageFile
    import pi_heif

    pi_heif.options.DECODE_THREADS = 1
    opener: Callable[[io.BytesIO], Any] = pi_heif.HeifImageFile
    return opener


def main() -> None:
    """Decode stdin.

    The arguments are ``heic`` or ``avif``, the most pixels of the PNG (0 for the EXIF alone), and
    the folders that Python imports from.
    """
    kind, most_pixels = sys.argv[1], int(sys.argv[2])
    sys.path[:] = sys.argv[3:]
    try:
        open_photo = _set_up(kind)
    except (ImportError, OSError, ValueError) as error:  # ValueError: above the hard limit.
        sys.stderr.write(" ".join(str(error).split()))
        sys.exit(SETUP_FAILED)
    from PIL.PngImagePlugin import PngInfo

    image = open_photo(io.BytesIO(sys.stdin.buffer.read()))
    exif = image.info.get("exif") or b""
    shrink = 1
    if most_pixels:
        has_alpha = "A" in image.mode or "transparency" in image.info
        picture = image.convert("RGBA" if has_alpha else "RGB")
        image.close()
        while picture.width * picture.height > most_pixels:
            picture = picture.reduce(2)
            shrink *= 2
    else:
        from PIL import Image

        picture = Image.new("L", (1, 1))
    facts = PngInfo()
    facts.add_text("shrink", str(shrink))
    picture.save(sys.stdout.buffer, "PNG", compress_level=0, exif=exif, pnginfo=facts)


if __name__ == "__main__":
    main()
