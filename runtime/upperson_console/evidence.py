"""An evidence package: a zip with a report, pictures, facts and hashes, signed by the site's key.

It needs nothing else to be read: ``index.html`` is the report, ``items.json`` has all facts,
``manifest.json`` the SHA-256 of each other file, ``manifest.sig`` signs all of them, and
``manifest.tsr`` is a time stamp of both. Pictures that are kept are copied byte by byte.
`evidence_check` verifies it.
"""

import datetime
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from upperson_console.accounts import Account
from upperson_console.evidence_check import (
    DATE,
    KIND,
    MANIFEST,
    SIGNATURE,
    STAMP,
    SYSTEM,
    VERSION,
    Seal,
    digest_of,
    stamped_content,
)
from upperson_console.limits import BusyError
from upperson_console.models import ItemOut, iso_time, item_fields
from upperson_console.pictures import PIECE_BYTES, GalleryPictures
from upperson_console.problems import ProblemError
from upperson_console.rendering import templates
from upperson_console.translation import reader
from upperson_rt import __version__
from upperson_rt.errors import BackendError, InputError
from upperson_rt.gallery import Item
from upperson_rt.gallery.clips import ClipFile
from upperson_rt.gallery.crops import read_crop
from upperson_rt.image_file import MOST_FILE_BYTES
from upperson_signature.signature import sign_files

_IN_MEMORY_BYTES = 8 << 20
_MOST_EXPORT_BYTES = 2 << 30
_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}


def write_package(
    account: Account,
    items: Sequence[tuple[int, Item]],
    pictures: GalleryPictures,
    facts: Mapping[str, Any],
    query: Mapping[str, Any],
    matches: Mapping[int, Mapping[str, Any]],
    seal: Seal,
    *,
    query_jpeg: bytes | None = None,
    hide: Callable[[Item, ClipFile], bytes] | None = None,
    left_out: int = 0,
) -> tuple[IO[bytes], str, dict[str, Any]]:
    """Write a package of items; return its file at its beginning, its SHA-256, and its facts.

    ``matches`` has fields of those that were hits, by id; ``left_out`` is the number of further
    hits. With ``hide``, which returns a clip that shows its item alone, frames are pixelated, too.
    """
    now = datetime.datetime.now().astimezone(reader().zone)
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES))
        stack.enter_context(_disk_errors())
        package = _Package(stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)))
        rows = [
            {**_row(account, package, pictures, id_, item, hide), "hit": matches.get(id_)}
            for id_, item in items
        ]
        folders = [name.partition("/")[0] for name in package.sha256]
        facts = {
            "schema_version": VERSION,
            "kind": KIND,
            "exported": now.isoformat(timespec="seconds"),
            "zone": str(reader().zone or "the server's time"),
            "program": f"upperson-rt {__version__}",
            **facts,
            **{f"bundle_{name}": value for name, value in seal.bundle.items()},
            "sentence": query["sentence"],
            "verdict": (query["verdict"] or {}).get("text"),
            "blurred": hide is not None,
            "entries": len(rows),
            "pictures": sum(row["file"] is not None for row in rows),
            "missing": [row["id"] for row in rows if row["file"] is None],
            **{kind: folders.count(kind) for kind in ("frames", "clips")},
            "left_out": left_out,
        }
        if query_jpeg is not None:
            package.put("query.jpg", query_jpeg)
        shown = {"has_picture": query_jpeg is not None, "is_signed": seal.key is not None}

        def last(more: Mapping[str, Any]) -> dict[str, bytes]:
            """Return the last members by name, with more facts."""
            stated = {**facts, **more}
            page = templates().get_template("evidence.html.j2")
            html = page.render(facts=stated, query=query, items=rows, **shown)
            made = {"items.json": _json({**stated, "query": query, "items": rows})}
            made["index.html"] = html.encode("utf-8")
            sha256 = {name: hashlib.sha256(one).hexdigest() for name, one in made.items()}
            sha256 = package.sha256 | sha256
            made[MANIFEST] = _json({**stated, "sha256": sha256})
            if seal.key is not None:
                sha256[MANIFEST] = hashlib.sha256(made[MANIFEST]).hexdigest()
                files, unsigned = dict(sorted(sha256.items())), [SIGNATURE, STAMP]
                made[SIGNATURE] = sign_files(files, seal.key, KIND, unsigned).encode("ascii")
            return made

        members, stamped = _stamped(seal, last)
        facts |= stamped
        for name, content in members.items():
            package.put(name, content)
        package.archive.close()
        file.seek(0)
        digest = digest_of(file)
        file.seek(0)
        stack.pop_all()  # The caller closes it.
    return file, digest, facts


def _stamped(
    seal: Seal, last: Callable[[Mapping[str, Any]], dict[str, bytes]]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the last members with a time stamp, and facts about it, which may be its absence."""
    if seal.timestamps is None:
        return last({}), {}
    members = last({"timestamp_by": seal.timestamps.host})
    try:
        answer, stamp = seal.timestamps.stamp(stamped_content(members))
    except BackendError as error:
        if seal.timestamps.is_required:
            raise
        facts = {"timestamp_missing": str(error)}
        return last(facts), facts
    return {**members, STAMP: answer}, {"timestamp": asdict(stamp)}


class _Package:
    """A zip that is being written, with the SHA-256 of each file."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.sha256: dict[str, str] = {}
        self._bytes = 0
        self._shared: dict[tuple[int, int], str] = {}

    def put(self, name: str, content: bytes) -> str:
        """Add a file; return its name."""
        return self.copy(io.BytesIO(content), *os.path.splitext(name))

    def copy(self, source: IO[bytes], stem: str, suffix: str | None = None) -> str:
        """Copy a file; return its name, by default with the ending of its kind of picture."""
        left = min(source.seek(0, io.SEEK_END), MOST_FILE_BYTES)
        source.seek(0)
        self._bytes += left
        if self._bytes > _MOST_EXPORT_BYTES:
            raise ProblemError(
                413,
                f"the export has more than {_MOST_EXPORT_BYTES >> 30} GiB: export fewer pictures",
                code="export_too_large",
            )
        digest, piece = hashlib.sha256(), source.read(min(left, PIECE_BYTES))
        known = (end for start, end in _SUFFIXES.items() if piece.startswith(start))
        name = stem + (suffix or next(known, ".bin"))
        entry = zipfile.ZipInfo(name, DATE)
        entry.create_system = SYSTEM
        with self.archive.open(entry, "w") as copied:
            while piece:
                left -= len(piece)
                digest.update(piece)
                copied.write(piece)
                piece = source.read(min(left, PIECE_BYTES))
        self.sha256[name] = digest.hexdigest()
        return name

    def share(self, path: Path, stem: str) -> str | None:
        """Copy a file of the disk once, also for several items; None if it went meanwhile."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        with file:
            found = os.fstat(file.fileno())
            key = found.st_dev, found.st_ino
            if key not in self._shared:
                self._shared[key] = self.copy(file, stem, path.suffix.lower())
        return self._shared[key]

    def named(self, name: str | None) -> dict[str, Any]:
        """Return the fields of a row that name a file."""
        return {"file": name, "sha256": None if name is None else self.sha256[name]}


def _row(
    account: Account,
    package: _Package,
    pictures: GalleryPictures,
    id_: int,
    item: Item,
    hide: Callable[[Item, ClipFile], bytes] | None,
) -> dict[str, Any]:
    """Copy picture, frame and clip of an item; return its facts."""
    fields = item_fields(account, id_, item, has_picture=False)
    facts = ItemOut.model_validate(fields).model_dump(exclude={"picture"})
    name = None
    if (picture := _opened(pictures, item)) is not None:
        with picture:
            name = package.copy(picture, f"pictures/{id_}")
    clip, copied, withheld = pictures.clip(item), None, {}
    if clip is not None and hide is None:
        copied = package.share(clip.path, f"clips/{id_}")
    elif clip is not None and hide is not None:
        try:
            copied = package.put(f"clips/{id_}.mp4", hide(item, clip))
        except (ProblemError, BusyError) as problem:
            withheld["clip_withheld"] = str(problem)
    return {
        **facts,
        **package.named(name),
        "frame": _frame(package, pictures, id_, item, hide is not None),
        **withheld,
        "clip": None
        if clip is None or copied is None
        else {**package.named(copied), "begin": iso_time(clip.begin), "end": iso_time(clip.end)},
    }


def _frame(
    package: _Package, pictures: GalleryPictures, id_: int, item: Item, blurred: bool
) -> dict[str, Any] | None:
    file, saved = pictures.frame(item), pictures.saved_frame(item)
    if file is None:
        return None
    try:
        shown = pictures.jpeg(item, "frame", blurred)
    except InputError:
        return None
    if shown is None:
        return None
    stem = f"frames/{id_}"
    name = package.put(f"{stem}.jpg", shown[0]) if blurred else package.share(file, stem)
    time = item.time if saved is None else saved.begin
    size = {"width": shown[1][0], "height": shown[1][1]}
    return None if name is None else {**package.named(name), "time": iso_time(time), **size}


def _opened(pictures: GalleryPictures, item: Item) -> IO[bytes] | None:
    """Open a picture's file; None if it is missing or damaged."""
    file, is_cut = pictures.file(item), pictures.is_cut(item)
    try:  # Decoding it refuses damaged and overlong files.
        made = None if file is None else pictures.jpeg(item, "view" if is_cut else "thumb")
    except InputError:
        return None
    if file is None or made is None:
        return None
    if is_cut:  # The file shows others, too.
        return io.BytesIO(made[0])
    crop = read_crop(file)  # Read again: the cache may have answered.
    return file.open("rb") if crop is None else io.BytesIO(crop)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # Large ones are on disk until they are sent.
        raise ProblemError(507, f"cannot write the export: {error.strerror or error}") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode("ascii")
