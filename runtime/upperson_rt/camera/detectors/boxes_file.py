"""Boxes that are known beforehand, from a file."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError

__all__ = ["BoxesFile"]


class BoxesFile:
    """Boxes from a file instead of a detector: for videos whose people are known.

    The file is what  upperson data synthesize-video  writes beside a video: a JSON object whose
    ``frames`` holds for each frame a list of objects with a ``box``.
    """

    def __init__(self, path: Path) -> None:
        try:
            frames = json.loads(path.read_text("utf-8"))["frames"]
            self._frames = [[person["box"] for person in frame] for frame in frames]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"cannot read boxes from {path} ({type(error).__name__}: {error}): expected the "
                "JSON file that  upperson data synthesize-video  writes beside a video"
            ) from error

    def boxes_at(self, index: int) -> list[list[float]]:
        """Return the boxes of a frame by its number."""
        return self._frames[index] if index < len(self._frames) else []

    def __call__(self, frame: NDArray[np.uint8]) -> list[list[float]]:
        """Refuse: a file of boxes goes by the number of the frame."""
        raise InputError(
            "boxes from a file belong to the frames of one video, by their number: try them with  "
            "upperson-rt watch VIDEO --detector FILE.json"
        )
