"""`upperson-rt query`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.opening import open_retriever, read_filter, warn_of_unknown_cameras
from upperson_rt.cli.options import (
    Attributes,
    BackendOption,
    BundleOption,
    Cameras,
    Debug,
    DeviceOption,
    GalleryOption,
    Json,
    QueryLogOption,
    Since,
    Threads,
    Track,
    TrustOption,
    Until,
    VariantOption,
    default_bundle,
    default_gallery,
    require_sheet,
)
from upperson_rt.cli.output import json_from_hit, print_hits, print_json, print_note, print_warning
from upperson_rt.errors import UsageError
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter

__all__ = ["query"]


def query(
    sentence: Annotated[
        str | None, typer.Argument(metavar="SENTENCE", help="What the person looks like.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image", metavar="FILE", help="Search with a picture of the person instead."
        ),
    ] = None,
    bundle: BundleOption = default_bundle,
    trust: TrustOption = None,
    gallery: GalleryOption = default_gallery,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Hits to return.")] = 10,
    by_track: Annotated[
        bool,
        typer.Option("--by-track", help="One hit a track, with its best picture and its period."),
    ] = False,
    camera: Cameras = None,
    since: Since = None,
    until: Until = None,
    track: Track = None,
    where: Attributes = None,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE.png", help="Also write a contact sheet."),
    ] = None,
    query_log: QueryLogOption = None,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the pictures that a sentence describes, best match first.

    Scores are cosines; compare them within one query only. Those of --image are higher than those
    of sentences.

    Example: `upperson-rt query "woman in red coat" -k 5 --camera gate --since 24h`
    """
    asked = _one_of(sentence, image)
    if sheet is not None:
        require_sheet(sheet)
    conditions = read_filter(camera, since, until, track, where)
    with open_retriever(
        bundle,
        gallery,
        "text" if isinstance(asked, str) else "image",
        query_log,
        trust=trust,
        variant=variant,
        backend=backend,
        device=device,
        threads=threads,
    ) as (opened, running, retriever):
        store, tokenizer = retriever.gallery, retriever.encoder.tokenizer
        warn_of_unknown_cameras(store, conditions)
        truncated = isinstance(asked, str) and bool(tokenizer.encode([asked]).truncated)
        hits = retriever.query(asked, k, conditions, by_track)
        total = store.count()
        crops_dir = store.crops_dir
    if truncated:
        print_warning(
            f"the sentence is longer than the model's {tokenizer.context_length} tokens; "
            "its end was cut off"
        )
    if sheet is not None:
        from upperson_rt.sheet import save_sheet

        title = asked if isinstance(asked, str) else f"like {asked.name}"
        save_sheet(sheet, title, hits, crops_dir=crops_dir)
        print_note(f"contact sheet: {sheet}")
    if as_json:
        print_json(
            {
                "query": sentence,
                "image": None if image is None else str(image),
                "truncated": truncated,
                "by_track": by_track,
                "filter": _json_from_filter(conditions),
                "hits": [
                    json_from_hit(rank, hit, crops_dir) for rank, hit in enumerate(hits, start=1)
                ],
                "gallery": gallery,
                "items": total,
                "sheet": None if sheet is None else str(sheet),
                "query_log": None if query_log is None else str(query_log),
                "bundle": str(bundle),
                "variant": opened.variant,
                "backend": running.name,
                "device": running.device,
            }
        )
    elif hits:
        print_hits(hits, crops_dir)
    else:
        print_note(
            f"nothing found: of {count_of(total, 'picture')} none passes --camera, --since, "
            "--until, --track and --where"
            if total
            else f"nothing found: gallery '{gallery}' is empty"
        )


def _one_of(sentence: str | None, image: Path | None) -> str | Path:
    if sentence is not None and image is not None:
        raise UsageError("a sentence and --image exclude each other: give one of them")
    if image is not None:
        return image
    if sentence is None:
        raise UsageError(
            'describe the person, such as  upperson-rt query "woman in red coat" , or name a '
            "picture with  --image FILE"
        )
    if not sentence.strip():
        raise UsageError("the sentence is empty: describe the person in a few words")
    return sentence


def _json_from_filter(where: "Filter") -> dict[str, Any]:
    cameras = where.cameras
    return {
        "cameras": None if cameras is None else list(cameras),
        "since": where.since,
        "until": where.until,
        "track": where.track,
        "attributes": dict(where.attributes),
    }
