"""Hits as a table for people and as JSON for programs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from upperson_rt.cli.output import local_time, new_table, print_table, short_path

if TYPE_CHECKING:
    from upperson_rt.gallery import Hit, Item

__all__ = ["json_from_hit", "print_hits"]


def print_hits(hits: "Sequence[Hit]") -> None:
    """Print a table; a column that is empty for all hits is left out."""
    columns: dict[str, list[Any]] = {
        "rank": [str(rank) for rank in range(1, len(hits) + 1)],
        "score": [f"{hit.score:.3f}" for hit in hits],
        "camera": [hit.item.camera or "" for hit in hits],
        "time": [local_time(hit.item.time) for hit in hits],
        "track": [hit.item.track or "" for hit in hits],
        "pictures": ["" if hit.span is None else str(hit.span.pictures) for hit in hits],
        "from": [local_time(hit.span.first_time) if hit.span else "" for hit in hits],
        "to": [local_time(hit.span.last_time) if hit.span else "" for hit in hits],
        "picture": [short_path(_picture(hit.item)) for hit in hits],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table = new_table(*shown, right=("rank", "score", "pictures"))
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    print_table(table)


def json_from_hit(rank: int, hit: "Hit") -> dict[str, Any]:
    """Return all that is known of a hit as plain values."""
    item, span = hit.item, hit.span
    return {
        "rank": rank,
        "score": hit.score,
        "id": hit.id,
        "key": item.key,
        "source": item.source,
        "camera": item.camera,
        "time": item.time,
        "track": item.track,
        "span": None
        if span is None
        else {
            "first_time": span.first_time,
            "last_time": span.last_time,
            "pictures": span.pictures,
        },
        "box": item.box,
        "crop": item.crop,
        "attributes": dict(item.attributes),
    }


def _picture(item: "Item") -> str:
    return item.crop or item.source or item.key
