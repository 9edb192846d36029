"""What was found as a zip that stands by itself: pictures, facts, hashes, and a page to read it."""

import datetime
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import jinja2

from upperson_rt import __version__
from upperson_rt.errors import InputError
from upperson_rt.gallery import Item
from upperson_rt.serve.models import ItemOut
from upperson_rt.serve.pictures import Pictures
from upperson_rt.serve.problems import ProblemError

__all__ = ["write_evidence"]

_IN_MEMORY_BYTES = 8 << 20
_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}


def write_evidence(
    items: Sequence[tuple[int, Item]],
    pictures: Pictures,
    query: Mapping[str, Any],
    model: Mapping[str, Any],
    templates: jinja2.Environment,
) -> tuple[IO[bytes], str]:
    """Write a zip; return it, to be read from its beginning, and its SHA-256.

    Pictures are the files as they are kept, byte by byte. ``manifest.json`` has the SHA-256 of
    every other file.

    Args:
        items: What to export.
        pictures: Where their pictures are.
        query: What was asked, by whom and when.
        model: Fingerprint and variant of the model.
        templates: Have ``evidence.html.j2``.

    Raises:
        ProblemError: There is no room for it.
    """
    exported = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    hashes: dict[str, str] = {}
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES))
        stack.enter_context(_told())
        archive = stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED))

        def put(name: str, content: bytes) -> None:
            hashes[name] = hashlib.sha256(content).hexdigest()
            archive.writestr(
                zipfile.ZipInfo(name, datetime.datetime.now().timetuple()[:6]), content
            )

        rows = []
        for id_, item in items:
            content = _content(pictures, item)
            name = None
            if content is not None:
                suffix = next(
                    (s for start, s in _SUFFIXES.items() if content.startswith(start)), ".bin"
                )
                name = f"pictures/{id_}{suffix}"
                put(name, content)
            facts = ItemOut.of(id_, item, content is not None).model_dump(exclude={"picture"})
            rows.append({**facts, "file": name, "sha256": None if name is None else hashes[name]})
        facts = {
            "exported": exported,
            "program": f"upperson-rt {__version__}",
            "model": dict(model),
            "query": dict(query),
            "items": rows,
        }
        put("items.json", _json(facts))
        page = templates.get_template("evidence.html.j2").render(**facts)
        put("index.html", page.encode("utf-8"))
        archive.writestr("manifest.json", _json({"sha256": hashes}))
        archive.close()
        digest = hashlib.sha256()
        file.seek(0)
        while block := file.read(1 << 20):
            digest.update(block)
        file.seek(0)
        stack.pop_all()  # The caller closes it.
    return file, digest.hexdigest()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # Large ones lie on the disk until they are sent.
        raise ProblemError(507, f"cannot write the export: {error.strerror or error}") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode("ascii")


def _content(pictures: Pictures, item: Item) -> bytes | None:
    """Return a picture's file, or None if none is kept or it is no picture any more."""
    file: Path | None = pictures.file(item)
    if file is None:
        return None
    try:
        made = pictures.jpeg(item, "thumb")  # Refuses what does not decode.
    except InputError:
        return None
    return None if made is None else file.read_bytes()
