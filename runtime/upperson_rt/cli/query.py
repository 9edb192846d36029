"""`upperson-rt query`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.options import (
    BackendOption,
    BundleOption,
    Debug,
    DeviceOption,
    GalleryOption,
    Json,
    Since,
    Threads,
    Until,
    VariantOption,
    default_bundle,
    default_gallery,
)
from upperson_rt.cli.output import (
    backend_line,
    local_time,
    new_table,
    print_json,
    print_note,
    print_table,
    print_warning,
    short_path,
)
from upperson_rt.errors import UsageError

if TYPE_CHECKING:
    from upperson_rt.gallery import Hit

__all__ = ["query"]


def query(
    sentence: Annotated[
        str, typer.Argument(metavar="SENTENCE", help="What the person looks like.")
    ],
    bundle: BundleOption = default_bundle,
    gallery: GalleryOption = default_gallery,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Pictures to return.")] = 10,
    camera: Annotated[
        str | None, typer.Option("--camera", help="Only pictures of this camera.")
    ] = None,
    since: Since = None,
    until: Until = None,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE.png", help="Also write a contact sheet."),
    ] = None,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the pictures that a sentence describes, best match first.

    Scores are cosines; compare them within one query only.

    Example: `upperson-rt query "woman in red coat" -k 5 --camera gate --sheet found.png`
    """
    if not sentence.strip():
        raise UsageError("the sentence is empty: describe the person in a few words")
    from upperson_rt.bundle import Bundle
    from upperson_rt.gallery import Filter, Gallery
    from upperson_rt.retriever import Retriever

    where = Filter(camera=camera, since=since, until=until)
    opened = Bundle.open(bundle, variant, backend, device, threads=threads)
    encoder = opened.encoder()
    with Gallery.open(gallery, encoder.fingerprint, encoder.embed_dim) as store:
        running = opened.backend("text")
        print_note(backend_line(running.name, running.version, running.device, backend))
        truncated = bool(encoder.tokenizer.encode([sentence]).truncated)
        hits = Retriever(encoder, store).query(sentence, k, where)
        total = store.count()
    if truncated:
        print_warning(
            f"the sentence is longer than the model's {encoder.tokenizer.context_length} tokens; "
            "its end was cut off"
        )
    if sheet is not None:
        from upperson_rt.sheet import save_sheet

        save_sheet(sheet, sentence, hits)
        print_note(f"contact sheet: {sheet}")
    if json:
        print_json(
            {
                "query": sentence,
                "truncated": truncated,
                "hits": [_json_from_hit(rank, hit) for rank, hit in enumerate(hits, start=1)],
                "gallery": str(gallery),
                "items": total,
                "sheet": None if sheet is None else str(sheet),
                "bundle": str(bundle),
                "variant": opened.variant,
                "backend": running.name,
                "device": running.device,
            }
        )
    elif hits:
        _print_hits(hits)
    else:
        print_note(
            f"nothing found: none of the {total} pictures passes --camera, --since and --until"
            if total
            else f"nothing found: gallery {gallery} is empty"
        )


def _print_hits(hits: "list[Hit]") -> None:
    """Print a table; a column that is empty for all hits is left out."""
    columns: dict[str, list[Any]] = {
        "rank": [str(rank) for rank in range(1, len(hits) + 1)],
        "score": [f"{hit.score:.3f}" for hit in hits],
        "camera": [hit.item.camera or "" for hit in hits],
        "time": [local_time(hit.item.time) for hit in hits],
        "track": [hit.item.track or "" for hit in hits],
        "picture": [short_path(hit.item.source or hit.item.key) for hit in hits],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table = new_table(*shown, right=("rank", "score"))
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    print_table(table)


def _json_from_hit(rank: int, hit: "Hit") -> dict[str, Any]:
    item = hit.item
    return {
        "rank": rank,
        "score": hit.score,
        "id": hit.id,
        "key": item.key,
        "source": item.source,
        "camera": item.camera,
        "time": item.time,
        "track": item.track,
        "box": item.box,
        "attributes": dict(item.attributes),
    }
