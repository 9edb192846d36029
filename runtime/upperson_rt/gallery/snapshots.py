"""The newest frame of a camera with its zones and masks, beside a gallery in a folder.

``FOLDER/cameras`` holds a JPEG and a JSON file for each camera that has one, named after the hash
of its name. One replaces the other: there is no history.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import TypeAlias

from upperson_rt.arguments import is_finite
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.files import read_bounded, require_no_links, sweep, sync_folder, write_atomically
from upperson_rt.gallery.protocol import Gallery
from upperson_rt.gallery.records import Filter
from upperson_rt.printable import get_logger
from upperson_rt.strict import Positive, parse_json, read_fields

_LOG = get_logger(__name__)

Polygons: TypeAlias = tuple[tuple[tuple[float, ...], ...], ...]
"""Of corners x and y, 0 to 1 in shares of width and height."""

SNAPSHOTS = "cameras"
"""Name of the folder."""
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is known of the frame of a camera.

    Raises:
        InputError: On construction, if a polygon is malformed.
    """

    camera: str
    time: float
    """When it was taken, unix seconds."""
    width: Positive
    """Pixels of the frame; the picture may be smaller."""
    height: Positive
    zones: Polygons = ()
    masks: Polygons = ()

    def __post_init__(self) -> None:
        corners = [corner for polygon in (*self.zones, *self.masks) for corner in polygon]
        if not all(len(corner) == 2 and all(map(_is_share, corner)) for corner in corners):
            raise InputError("expected corners x and y from 0 to 1", code="polygon_malformed")


def _is_share(value: float) -> bool:
    return is_finite(value) and 0 <= value <= 1


def snapshot_folder(gallery: Gallery) -> Path | None:
    """Return where the snapshots of a gallery are; None if it keeps no pictures."""
    crops_dir = getattr(gallery, "crops_dir", None)  # A program's own gallery may be any object.
    return None if crops_dir is None else Path(crops_dir).parent / SNAPSHOTS


def picture_path(folder: Path, camera: str) -> Path:
    """Return the JPEG file of a camera, also where there is none."""
    digest = hashlib.sha256(camera.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / f"{digest[:32]}.jpg"


def write_snapshot(folder: Path, snapshot: Snapshot, jpeg: bytes) -> None:
    """Replace the snapshot of a camera; raises InputError if it cannot be written."""
    require_no_links(folder.parent, folder.name)
    path = picture_path(folder, snapshot.camera)
    write_atomically(path, jpeg)
    write_atomically(path.with_suffix(".json"), dumps(asdict(snapshot)))


def read_snapshots(folder: Path) -> dict[str, Snapshot]:
    """Return the snapshots by camera; one that is damaged is left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            text = read_bounded(path, _MOST_BYTES).decode("utf-8")
            snapshot = read_fields(Snapshot, parse_json(text, str(path)), str(path))
        except (UppersonError, UnicodeDecodeError):  # Or it went meanwhile.
            continue
        if picture_path(folder, snapshot.camera).with_suffix(".json") == path:
            found[snapshot.camera] = snapshot
    return found


def remove_snapshot(folder: Path, camera: str) -> None:
    """Remove the snapshot of a camera durably; raises OSError, or InputError behind a link."""
    require_no_links(folder.parent, folder.name)
    path = picture_path(folder, camera)
    for file in (path, path.with_suffix(".json")):
        file.unlink(missing_ok=True)
    if folder.is_dir():
        sync_folder(folder)


def snapshots_passing(folder: Path, where: Filter) -> list[str]:
    """Return the cameras whose snapshots pass a filter; none pass one by track or attributes.

    A filter by camera alone also names cameras whose snapshot is damaged.
    """
    if where.track is not None or where.attributes:
        return []
    first, end = (-math.inf if where.since is None else where.since), where.until
    found = {
        name
        for name, snapshot in read_snapshots(folder).items()
        if (where.cameras is None or name in where.cameras)
        and first <= snapshot.time < (math.inf if end is None else end)
    }
    if where.since is None and where.until is None:
        found.update(name for name in where.cameras or () if picture_path(folder, name).exists())
    return sorted(found)


def remove_snapshots(folder: Path, where: Filter) -> None:
    """Remove the snapshots that pass a filter, and unfinished ones; failures are logged."""
    sweep(folder, "*")
    for camera in snapshots_passing(folder, where):
        path = picture_path(folder, camera)
        try:
            remove_snapshot(folder, camera)
        except (OSError, InputError) as error:
            _LOG.warning("frame %s could not be removed: %s", path, error)
