"""Items and filters as rows and expressions of a Milvus collection.

Milvus 2.3 knows no null, so an absent text is "", an empty text one `_PAD`, and an absent time the
lowest number there is.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.gallery.records import Filter, Item, Track, attributes_as_json

METADATA = ("key", "source", "camera", "track", "crop", "time", "box", "attributes")
"""Fields of a row from which `item_from_row` makes the item."""
TEXT_LIMIT = 65_535
"""Most bytes of a text; the server's limit for VARCHAR, and one less than that for JSON."""
MOST_ATTRIBUTES = 4096
"""The server's limit for elements of an array."""
HASH_LENGTH = 32

_PAD = "\x01"
_NO_TIME = -sys.float_info.max
_EDGES = ("x0", "y0", "x1", "y1")
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"})
_NOTHING = "id in []"


def id_of(key: str) -> int:
    """Return the primary key: 63 bits of a hash of the item's key.

    So two machines that add one key at the same time cannot make two rows of it.
    """
    return int.from_bytes(blake2b(key.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def hashes_of(attributes: Mapping[str, Any]) -> list[str]:
    """Return one hash for each attribute that a filter can select by, of its name and value.

    Hashes need no escapes in an expression. Milvus 2.3 cannot express some names.
    """
    return [
        _hash(name, value)
        for name, value in attributes.items()
        if isinstance(value, str | int | float)
    ]


def _hash(name: str, value: str | int | float) -> str:
    if isinstance(value, (bool, str)):
        same: object = value
    else:  # 1 and 1.0 are the same number.
        same = ["number", str(int(value)) if value == int(value) else repr(float(value))]
    text = json.dumps([name, same])
    return blake2b(text.encode("ascii"), digest_size=HASH_LENGTH // 2).hexdigest()


def row_from_item(item: Item) -> dict[str, Any]:
    """Return the fields `METADATA`, and those that filters look at."""
    text = attributes_as_json(item)
    attributes, size = json.loads(text), len(text.encode("utf-8"))
    hashes = hashes_of(attributes)
    if size > TEXT_LIMIT or len(hashes) > MOST_ATTRIBUTES:
        raise InputError(
            f"item {item.key}: Milvus takes up to {MOST_ATTRIBUTES} attributes and {TEXT_LIMIT} "
            f"bytes of them as JSON, found {len(hashes)} and {size}",
            code="item_too_large",
        )
    texts = {
        name: encode_text(getattr(item, name), f"item {item.key[:200]}: {name}")
        for name in ("key", "source", "camera", "track", "crop")
    }
    box = {} if item.box is None else dict(zip(_EDGES, map(int, item.box), strict=True))
    time = _NO_TIME if item.time is None else float(item.time)
    return {**texts, "time": time, "box": box, "attributes": attributes, "hashes": hashes}


def item_from_row(row: Mapping[str, Any]) -> Item:
    """Read the fields `METADATA`."""
    box = row["box"]
    edges = [int(box[name]) for name in _EDGES] if box else None
    return Item(
        key=decode_text(row["key"]) or "",
        source=decode_text(row["source"]),
        camera=decode_text(row["camera"]),
        track=decode_text(row["track"]),
        crop=decode_text(row["crop"]),
        time=decode_time(row["time"]),
        box=None if edges is None else (edges[0], edges[1], edges[2], edges[3]),
        attributes=dict(row["attributes"]),
    )


def encode_text(text: str | None, name: str) -> str:
    """Return a text for a VARCHAR field."""
    if text is None:
        return ""
    stored = text + _PAD if not text.strip(_PAD) else text
    try:
        size = len(stored.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode: {text!r}") from error
    if size > TEXT_LIMIT:
        raise InputError(
            f"{name} has {size} bytes, Milvus takes up to {TEXT_LIMIT}",
            code="item_too_large",
            found=size,
        )
    return stored


def decode_text(stored: str) -> str | None:
    """Undo `encode_text`."""
    return stored if stored.strip(_PAD) else (stored[:-1] if stored else None)


def decode_time(stored: float) -> float | None:
    """Return unix seconds, or None."""
    return None if stored == _NO_TIME else stored


def encode_vectors(vectors: NDArray[np.float32], kind: str) -> list[NDArray[Any]]:
    """Return the rows of (N, D) as a field of ``float32`` or ``float16`` takes them."""
    return list(vectors.astype(kind))


def decode_vectors(stored: Sequence[Any], kind: str, embed_dim: int) -> NDArray[np.float32]:
    """Return (N, D) of what was read from such a field: lists of numbers, or bytes."""
    rows = []
    for row in stored:
        content = row[0] if isinstance(row, list) and len(row) == 1 else row
        rows.append(np.frombuffer(content, kind) if isinstance(content, bytes) else row)
    return np.array(rows, dtype=np.float32).reshape(len(rows), embed_dim)


def quoted(text: str) -> str:
    """Return a text as a literal of an expression; nothing in it can end the literal."""
    return f'"{text.translate(_ESCAPES)}"'


def expression_of_ids(ids: Iterable[int]) -> str:
    """Return the expression for rows with one of these ids."""
    return f"id in [{', '.join(map(str, ids))}]"


def expression_of_tracks(tracks: Iterable[Track]) -> str:
    """Return the expression for rows of one of these cameras and tracks; "" for none."""
    by_camera: dict[str | None, list[str]] = {}
    for camera, track in tracks:
        by_camera.setdefault(camera, []).append(quoted(encode_text(track, "a track")))
    return " or ".join(
        f"(camera == {quoted(encode_text(camera, 'a camera'))} and track in [{', '.join(names)}])"
        for camera, names in by_camera.items()
    )


def expression_of_filter(where: Filter | None) -> str:
    """Return the expression for a filter; "" where everything passes."""
    if where is None:
        return ""
    parts = []
    if where.cameras is not None:
        names = (quoted(encode_text(name, "the camera of a filter")) for name in where.cameras)
        parts.append(f"camera in [{', '.join(names)}]")
    if where.track is not None:
        parts.append(f"track == {quoted(encode_text(where.track, 'the track of a filter'))}")
    if where.since is not None or where.until is not None:
        parts.append(f"time > {_NO_TIME!r}")
    if where.since is not None and where.since > _NO_TIME:
        parts.append(_NOTHING if where.since == np.inf else f"time >= {float(where.since)!r}")
    if where.until is not None and where.until <= sys.float_info.max:
        parts.append(_NOTHING if where.until == -np.inf else f"time < {float(where.until)!r}")
    parts += [
        f'array_contains(hashes, "{_hash(name, value)}")'
        for name, value in where.attributes.items()
    ]
    return " and ".join(parts)
