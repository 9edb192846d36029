"""Chosen views as gallery items and JPEG files."""

import datetime
import hashlib
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from upperson_rt.camera.frames import Crop, View
from upperson_rt.camera.source import import_cv2
from upperson_rt.camera.unfinished import Unfinished
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.files import write_atomically
from upperson_rt.gallery import Item

__all__ = ["CropFolder", "CropMaker", "safe_folder_name"]

_log = logging.getLogger(__name__)

_LONGEST_NAME = 60
_WRITERS = 8


def safe_folder_name(camera: str) -> str:
    """Return a name for a camera's folder that any file system takes; differs for each camera."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", camera)[:_LONGEST_NAME]
    if plain == camera:
        return plain
    # Two cameras must not share a folder only because their names differ in what was replaced.
    return f"{plain}-{hashlib.sha256(camera.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class CropMaker:
    """Turns the views of one camera into crops."""

    def __init__(
        self,
        encoder: Encoder,
        camera: str,
        shown_source: str | None,
        *,
        is_file: bool,
        jpeg_quality: int | None,
    ) -> None:
        """Put a maker together.

        Args:
            encoder: Knows the size that the image tower wants.
            camera: Name of the camera.
            shown_source: Where its pictures come from, without secrets; None if unknown.
            is_file: Whether that is a file, whose frames can be found again by number.
            jpeg_quality: 1 to 100; None makes no JPEG files.
        """
        self._encoder = encoder
        self._camera = camera
        self._folder = safe_folder_name(camera)
        self._source = shown_source
        self._is_file = is_file
        self._jpeg_quality = jpeg_quality

    def make(self, view: View, now: float) -> Crop:
        """Return the crop of a view.

        A frame of a file has the same key each time the file is read, so that a second run replaces
        the rows of the first one. Frames of live cameras have keys of their own track.

        Raises:
            InputError: The view cannot be encoded as JPEG.
        """
        box = ",".join(map(str, view.box))
        stamp = datetime.datetime.fromtimestamp(view.time, datetime.timezone.utc)
        if self._is_file:
            place = f"{self._source}#frame={view.index}"
            key = f"{self._camera}|{place}|{box}"
        else:
            moment = stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            place = f"{self._source or self._camera}#time={moment}"
            key = f"{self._camera}|{view.track}|{view.index}|{box}"
        name, jpeg = None, None
        if self._jpeg_quality is not None:
            jpeg = self._jpeg(view, self._jpeg_quality)
            local = stamp.astimezone()
            unique = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            file = f"{local:%H%M%S}-{local.microsecond // 1000:03d}-{unique}.jpg"
            name = f"{self._folder}/{local:%Y-%m-%d}/{file}"
        attributes = {"frame": view.index, "sharpness": round(view.sharpness, 1)}
        if view.score is not None:
            attributes["score"] = round(view.score, 4)
        return Crop(
            item=Item(
                key=key,
                source=place,
                camera=self._camera,
                time=view.time,
                track=view.track,
                box=view.box,
                attributes=attributes,
                crop=name,
            ),
            camera=self._camera,
            pixels=self._encoder.prepare_image(np.ascontiguousarray(view.image[:, :, ::-1])),
            jpeg=jpeg,
            arrived=view.arrived,
            chosen=now,
        )

    def _jpeg(self, view: View, quality: int) -> bytes:
        cv2 = import_cv2()
        try:
            ok, data = cv2.imencode(".jpg", view.image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        except cv2.error:
            ok = False
        if not ok:
            height, width = view.image.shape[:2]
            raise InputError(
                f"camera {self._camera}: {width} x {height} pixels cannot be written as JPEG"
            )
        return bytes(data)


class CropFolder:
    """Where the pictures of crops are saved, several at a time: each waits for the disk."""

    def __init__(self, folder: Path, run_name: str) -> None:
        """Make the folder.

        Raises:
            InputError: It cannot be written to.
        """
        self.folder = folder
        self._unfinished = Unfinished(folder, run_name)
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="save")

    @contextmanager
    def saved(self, crops: list[Crop]) -> Iterator[None]:
        """Write the pictures of crops; each appears complete or not at all.

        Those that were not there before are removed again after an error, also one of what is done
        in the context: it commits their rows.

        Raises:
            InputError: A file cannot be written.
        """
        pictures = {
            self.folder / crop.item.crop: crop.jpeg
            for crop in crops
            if crop.jpeg is not None and crop.item.crop is not None
        }
        new = [path for path in pictures if not path.exists()]
        with self._unfinished.noted([crop.item for crop in crops]):
            writes = [self._pool.submit(write_atomically, *picture) for picture in pictures.items()]
            wait(writes)
            try:
                for write in writes:
                    write.result()
                yield
            except BaseException:
                for path in new:
                    _remove(path)
                raise

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        self._unfinished.close()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error.strerror)
