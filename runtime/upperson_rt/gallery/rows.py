"""Items and filters as rows and conditions of the table `items`."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from upperson_rt.errors import InputError
from upperson_rt.gallery.records import Filter, Item

__all__ = [
    "COLUMNS",
    "UPSERT",
    "attribute_equals",
    "item_from_row",
    "row_from_item",
    "sql_from_filter",
]

COLUMNS = "key, source, camera, time, track, box, crop, attributes"
"""The metadata of an item, in the order of `row_from_item` and `item_from_row`."""
UPSERT = f"""
    INSERT INTO items ({COLUMNS}, variant, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET
        source = excluded.source, camera = coalesce(excluded.camera, camera), time = excluded.time,
        track = excluded.track, box = excluded.box, crop = excluded.crop,
        attributes = excluded.attributes, variant = excluded.variant, vector = excluded.vector
"""
"""Adds a row, or replaces the one with the same key and keeps its id."""

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_ .:-]+", re.ASCII)
"""Keys that need no escapes in a JSON path; all others are compared in Python, never as SQL."""
_encode: Callable[[Any], str] = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode


def sql_from_filter(where: Filter | None) -> tuple[str, list[object]]:
    """Return a condition with placeholders, and their values; "1" where everything passes.

    Needs the SQL function `attribute_equals`.
    """
    if where is None:
        return "1", []
    conditions: list[str] = []
    values: list[object] = []
    if where.cameras is not None:
        conditions.append(f"camera IN ({', '.join('?' * len(where.cameras))})")
        values += where.cameras
    for sql, value in {
        "time >= ?": where.since,
        "time < ?": where.until,
        "track = ?": where.track,
    }.items():
        if value is not None:
            conditions.append(sql)
            values.append(value)
    for key, value in where.attributes.items():
        if _PLAIN_KEY.fullmatch(key):
            path = f'$."{key}"'
            kinds = "('integer', 'real')"
            if isinstance(value, bool):
                kinds = f"('{_encode(value)}')"
            elif isinstance(value, str):
                kinds = "('text')"
            conditions.append(
                "CASE WHEN json_valid(attributes) THEN json_type(attributes, ?) IN "
                f"{kinds} AND json_extract(attributes, ?) = ? ELSE 0 END"
            )
            values += (path, path, value)
        else:
            conditions.append("attribute_equals(attributes, ?, ?)")
            values += (key, _encode(value))
    return " AND ".join(conditions) or "1", values


def attribute_equals(attributes: str, key: str, value: str) -> bool:
    """Tell whether a row's attributes have this value under this key; both values are JSON.

    The key never becomes part of a statement or of a JSON path, so it may be anything.
    """
    wanted = json.loads(value)
    try:
        found = json.loads(attributes).get(key)
    except (ValueError, AttributeError):  # Damaged: `Gallery.verify` tells.
        return False
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)


def row_from_item(item: Item) -> tuple[object, ...]:
    """Return the values of `COLUMNS`.

    Raises:
        InputError: The attributes are not JSON.
    """
    try:
        attributes = _encode(dict(item.attributes)) if item.attributes else "{}"
        attributes.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise InputError(f"item {item.key}: attributes are not JSON: {error}") from error
    box = None if item.box is None else ",".join(str(int(edge)) for edge in item.box)
    time = None if item.time is None else float(item.time)
    return (item.key, item.source, item.camera, time, item.track, box, item.crop, attributes)


def item_from_row(columns: Sequence[Any]) -> Item:
    """Read the values of `COLUMNS`.

    Raises:
        ValueError, TypeError, InputError: The row is damaged.
    """
    key, source, camera, time, track, box, crop, attributes = columns
    edges = None if box is None else [int(edge) for edge in box.split(",")]
    if edges is not None and len(edges) != 4:
        raise ValueError(f"box '{box}' has {len(edges)} edges")
    return Item(
        key=key,
        source=source,
        camera=camera,
        time=time,
        track=track,
        box=None if edges is None else (edges[0], edges[1], edges[2], edges[3]),
        crop=crop,
        attributes={} if attributes == "{}" else json.loads(attributes),
    )
