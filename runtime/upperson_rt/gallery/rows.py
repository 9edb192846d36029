"""Items and filters as rows and conditions of the table `items`."""

import json
from collections.abc import Sequence
from typing import Any

from upperson_rt.errors import InputError
from upperson_rt.gallery.records import Filter, Item

__all__ = ["COLUMNS", "UPSERT", "item_from_row", "row_from_item", "sql_from_filter"]

COLUMNS = "key, source, camera, time, track, box, attributes"
"""The metadata of an item, in the order of `row_from_item` and `item_from_row`."""
UPSERT = f"""
    INSERT INTO items ({COLUMNS}, variant, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET
        source = excluded.source, camera = coalesce(excluded.camera, camera), time = excluded.time,
        track = excluded.track, box = excluded.box, attributes = excluded.attributes,
        variant = excluded.variant, vector = excluded.vector
"""
"""Adds a row, or replaces the one with the same key and keeps its id."""


def sql_from_filter(where: Filter | None) -> tuple[str, list[object]]:
    """Return a condition with placeholders, and their values."""
    if where is None:
        return "1", []
    conditions = {
        "camera = ?": where.camera,
        "time >= ?": where.since,
        "time < ?": where.until,
        "track = ?": where.track,
    }
    used = {sql: value for sql, value in conditions.items() if value is not None}
    return " AND ".join(used) or "1", list(used.values())


def row_from_item(item: Item) -> tuple[object, ...]:
    """Return the values of `COLUMNS`.

    Raises:
        InputError: The attributes are not JSON.
    """
    try:
        attributes = json.dumps(dict(item.attributes), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"item {item.key}: attributes are not JSON: {error}") from error
    box = None if item.box is None else ",".join(str(int(edge)) for edge in item.box)
    return (item.key, item.source, item.camera, item.time, item.track, box, attributes)


def item_from_row(columns: Sequence[Any]) -> Item:
    """Read the values of `COLUMNS`.

    Raises:
        ValueError, TypeError, InputError: The row is damaged.
    """
    key, source, camera, time, track, box, attributes = columns
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
        attributes=json.loads(attributes),
    )
