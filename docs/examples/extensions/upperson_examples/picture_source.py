"""A camera source: pictures that a camera uploads into a folder, such as by FTP.

upperson-rt watch gate=pictures:///srv/uploads/gate

Sources of extensions are live: when one ends or fails, it is opened again after a while. A file
must get its name when it is complete.
"""

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upperson_camera.source import Reader, Source
from upperson_rt.errors import InputError
from upperson_rt.preprocess import load_image

_POLL_S = 0.1
_KNOWN: defaultdict[Path, set[str]] = defaultdict(set)
"""Names that were read, by folder: the next reader goes on behind them."""


class PictureReader(Reader):
    """Called with the source, and the seconds that opening and reading may take."""

    def __init__(self, source: Source, timeout_s: float) -> None:
        """Open a folder.

        Raises:
            InputError: There is none.
        """
        self._folder = Path(source.address.partition("://")[2]).absolute()
        if not self._folder.is_dir():
            raise InputError(f"no folder {self._folder}: make it, or name another one")
        self._timeout_s = timeout_s

    def read(self) -> NDArray[np.generic] | None:
        """Return the next picture, BGR [H, W, 3]; None if none has come in time.

        One that cannot be read is an array without pixels, which is counted.
        """
        known, until = _KNOWN[self._folder], time.monotonic() + self._timeout_s
        while not (new := sorted({file.name for file in self._folder.iterdir()} - known)):
            if time.monotonic() > until:
                return None
            time.sleep(_POLL_S)
        known.add(new[0])
        try:
            return load_image(self._folder / new[0])[:, :, ::-1]
        except InputError:
            return np.empty((0, 0, 3), np.uint8)

    def close(self) -> None:
        """Nothing is open between two pictures."""
