"""The API under /api/v1: thin routes over the console's use cases."""

import base64
import binascii
import re
from collections.abc import Collection
from dataclasses import replace
from io import BytesIO
from typing import IO, Annotated, Any

import numpy as np
from fastapi import APIRouter, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from pydantic import ValidationError

from upperson_console import models
from upperson_console.accounts import Access, Account
from upperson_console.bounds import BoundedRoute, check_json
from upperson_console.exports import export_response
from upperson_console.models import Id, Name, SearchIn, SearchOut
from upperson_console.pictures import PIECE_BYTES, Size
from upperson_console.problems import MEDIA_TYPE, ProblemError, invalid, missing
from upperson_console.ranges import bytes_response, file_response
from upperson_console.rendering import server_metrics
from upperson_console.results import ConsoleResult, run_search
from upperson_console.search import LONGEST_SENTENCE, Search
from upperson_console.service import ConsoleService, span_of
from upperson_console.view_log import Part
from upperson_rt import __version__
from upperson_rt.errors import UppersonError

PICTURE_HEADERS = {
    "cache-control": "private, max-age=3600",
    "vary": "Cookie, Authorization",  # Another login at this browser does not reuse it.
}
"""Of a picture: browsers cache it for an hour, for one account."""

UNCACHED_HEADERS = {**PICTURE_HEADERS, "cache-control": "no-store"}
"""Of a picture that shows others, too: it is requested each time."""

CLIP_TYPES = {".mp4": "video/mp4", ".mkv": "video/x-matroska"}
"""Media types of clips, by the ending of their files."""

_PARTS: dict[Size, Part] = {"thumb": "thumbnail", "view": "picture", "frame": "frame"}

_Reason = Annotated[str, Query(min_length=1, max_length=500, description="Why; stands in the log.")]
_Unblurred = Annotated[
    str,
    Query(max_length=500, description="With `serve --blur`: why others must be seen; is logged."),
]
_BINARY = {"format": "binary"}
"""Of a file: generators of clients do not know ``contentMediaType``."""
PROBLEM: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What went wrong, as problem+json.",
        "model": models.ProblemOut,
        "content": {MEDIA_TYPE: {}},
    }
}
"""Response of each route of the API that goes wrong."""


def api_routes(service: ConsoleService, access: Access) -> list[APIRouter]:
    """Return the routes of /api/v1 and /v1."""
    routes = APIRouter(prefix="/api/v1", responses=PROBLEM, route_class=BoundedRoute)
    for add in (_searching, _looking, _deleting, _watching):
        add(routes, service, access)
    openai = APIRouter(
        prefix="/v1", responses=PROBLEM, tags=["embeddings"], route_class=BoundedRoute
    )
    _embedding(openai, service, access)
    return [routes, openai]


def _searching(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    viewer, operator = access.needs("viewer"), access.needs("operator")

    def results_of(account: Account, request: SearchIn) -> SearchOut:
        found = run_search(service, account, request.as_search(), request.limit, request.cursor)
        judged = zip(found.page.hits, found.likelihoods, found.labels, strict=True)
        return SearchOut(
            hits=[
                models.HitOut.model_validate(
                    service.fields(account, hit.id, hit.item)
                    | {"rank": rank, "score": hit.score, "span": hit.span}
                    | {"likelihood": likelihood and round(likelihood, 4), "match": label}
                )
                for rank, (hit, likelihood, label) in enumerate(judged, found.page.first)
            ],
            verdict=models.VerdictOut.model_validate(found.verdict.as_json()),
            next=found.page.cursor,
            total=found.total,
            notes=notes_of(found),
            notices=[models.NoticeOut.model_validate(one.as_json()) for one in found.notices],
        )

    @routes.post("/search", tags=["search"], summary="Search by sentence, picture or both")
    def search(request: SearchIn, account: Account = viewer) -> SearchOut:
        return results_of(account, request)

    @routes.post("/pictures", tags=["search"], status_code=201, summary="Send a query picture")
    def give(
        picture: Annotated[
            UploadFile,
            File(
                description="AVIF, BMP, GIF, HEIC, JPEG, PNG, PPM, TIFF or WebP.",
                json_schema_extra=_BINARY,
            ),
        ],
        account: Account = viewer,
    ) -> models.PictureOut:
        kept = service.query_pictures.add(picture.file)
        return models.PictureOut(
            picture=kept.id, sha256=kept.sha256, width=kept.size[0], height=kept.size[1]
        )

    @routes.post("/search/picture", tags=["search"], summary="Send a picture and search with it")
    def search_picture(
        picture: Annotated[
            UploadFile, File(description="As for /pictures.", json_schema_extra=_BINARY)
        ],
        search: Annotated[
            str, Form(description="JSON as for /search, without `picture`.", max_length=1 << 20)
        ] = "{}",
        account: Account = viewer,
    ) -> SearchOut:
        check_json(search.encode("utf-8", "surrogatepass"))
        try:
            request = SearchIn.model_validate_json(search)
        except ValidationError as error:
            raise ProblemError(422, f"search: {error.errors()[0]['msg']}") from error
        if request.picture is not None:
            raise ProblemError(422, "search: leave 'picture' out, it was sent")
        kept = service.query_pictures.add(picture.file)
        return results_of(account, request.model_copy(update={"picture": kept.id}))

    @routes.put("/marks", tags=["search"], summary="Set and remove marks of a search")
    def mark(request: models.MarksIn, account: Account = operator) -> models.MarksOut:
        search = request.as_search()
        removed: dict[int, bool | None] = {int(id_): None for id_ in request.remove}
        kept = service.mark(account, search, removed | dict(search.marks))
        yes, no = ([str(one) for one in kept if kept[one] is right] for right in (True, False))
        return models.MarksOut(yes=yes, no=no)

    @routes.post(
        "/export",
        tags=["search"],
        summary="Pictures, facts and hashes as an evidence package (zip)",
        response_class=StreamingResponse,
        responses={200: {"content": _file("application/zip"), "description": "The zip."}},
    )
    def export(request: models.ExportIn, account: Account = operator) -> Response:
        search = Search() if request.search is None else request.search.as_search()
        ids = [int(one) for one in request.ids]
        tracks, reason = request.tracks, request.reason
        return export_response(service, account, ids, search, tracks=tracks, reason=reason)


def _looking(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    viewer = access.needs("viewer")

    @routes.get("/items/{id}", tags=["items"], summary="A picture's facts")
    def item(id: Id, account: Account = viewer) -> models.ItemOut:
        found, _ = service.item(account, int(id))
        service.note_view(account, int(id), found, "picture")
        return models.ItemOut.model_validate(service.fields(account, int(id), found))

    @routes.get(
        "/items/{id}/picture",
        tags=["items"],
        summary="The picture as JPEG",
        response_class=Response,
        responses={200: {"content": _file("image/jpeg"), "description": "The picture."}},
    )
    def picture(
        id: Id, size: Size = "view", reason: _Unblurred = "", account: Account = viewer
    ) -> Response:
        return picture_response(service, account, int(id), size, reason)

    @routes.get(
        "/items/{id}/clip",
        tags=["items"],
        summary="The clip around the picture",
        response_class=FileResponse,
        responses={
            200: {
                "content": _file(*CLIP_TYPES.values()),
                "description": "The clip; with a Range header a part of it (206).",
            }
        },
    )
    def clip(
        id: Id, request: Request, reason: _Unblurred = "", account: Account = viewer
    ) -> Response:
        return clip_response(service, account, int(id), request, reason)

    @routes.get("/tracks", tags=["items"], summary="All views of a track")
    def track(
        track: Name, camera: Name | None = None, account: Account = viewer
    ) -> models.TrackOut:
        person = service.track(account, camera, track)
        span = replace(span_of(person.views), pictures=person.total)
        views = [
            models.ItemOut.model_validate(service.fields(account, *view)) for view in person.views
        ]
        return models.TrackOut(
            camera=person.item.camera,
            track=person.item.track or "",
            span=models.SpanOut.model_validate(span),
            views=views,
        )

    @routes.get("/cameras", tags=["items"], summary="Cameras and their pictures")
    def cameras(account: Account = viewer) -> list[models.CameraOut]:
        return [
            models.CameraOut.model_validate({"name": name, **vars(info)})
            for name, info in service.cameras(account).items()
        ]


def _deleting(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    admin = access.needs("admin")

    @routes.delete("/items/{id}", tags=["delete"], summary="Delete a picture")
    def delete_item(id: Id, reason: _Reason, account: Account = admin) -> models.DeletedOut:
        service.item(account, int(id))
        return models.DeletedOut(deleted=service.delete(account, [int(id)], reason, {}))

    @routes.delete("/tracks", tags=["delete"], summary="Delete a track")
    def delete_track(
        track: Name, reason: _Reason, camera: Name | None = None, account: Account = admin
    ) -> models.DeletedOut:
        ids = service.track_ids(account, camera, track)
        return models.DeletedOut(deleted=service.delete(account, ids, reason, {"track": track}))

    @routes.delete(
        "/items/{id}/alike", tags=["delete"], summary="Delete all pictures that look like one"
    )
    def delete_alike(
        id: Id,
        min_score: Annotated[
            float, Query(ge=-1, le=1, description="Cosine; count with dry_run first.")
        ],
        reason: Annotated[str, Query(max_length=500, description="Why; needed to delete.")] = "",
        dry_run: Annotated[bool, Query(description="Only count.")] = True,
        account: Account = admin,
    ) -> models.DeletedOut:
        hits = service.alike(account, int(id), min_score)
        if dry_run:
            return models.DeletedOut(deleted=len(hits), dry_run=True)
        details = {"like": id, "min_score": min_score}
        deleted = service.delete(account, [hit.id for hit in hits], reason, details)
        return models.DeletedOut(deleted=deleted)

    @routes.post("/prune", tags=["delete"], summary="Delete old pictures, or all but the newest")
    def prune(request: models.PruneIn, account: Account = admin) -> models.DeletedOut:
        before = None if request.older_than is None else request.older_than.timestamp()
        count = service.prune(
            account, before, request.keep_newest, request.camera, request.reason, request.dry_run
        )
        return models.DeletedOut(deleted=count, dry_run=request.dry_run)


def _watching(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    viewer = access.needs("viewer", purpose=False)

    @routes.get("/info", tags=["server"], summary="The model and gallery of this server")
    def info(account: Account = viewer) -> models.InfoOut:
        encoder = service.encoder
        sees_all = account.cameras is None
        index = service.current.now().info().index if sees_all else None
        counted = (info.pictures for info in service.cameras(account).values())
        return models.InfoOut(
            version=__version__,
            model=encoder.fingerprint,
            variant=encoder.variant,
            embed_dim=encoder.embed_dim,
            pictures=service.gallery.count() if sees_all else sum(counted),
            index="" if index is None else index.kind,
            user=account.name,
            role=account.role,
            log_problem=service.log.problem,
        )

    @routes.get("/health", tags=["server"], summary="Whether the server answers")
    async def health() -> models.HealthOut:
        return models.HealthOut()

    @routes.get("/ready", tags=["server"], summary="Whether searches can be answered")
    def ready(request: Request) -> models.HealthOut:
        try:
            service.check_ready()
        except UppersonError as error:
            known = access.find(request) is not None
            why = str(error) if known else "searches cannot be answered: log in to see why"
            raise ProblemError(503, why, code=error.code) from error
        return models.HealthOut()

    @routes.get(
        "/metrics",
        tags=["server"],
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
    )
    def metrics(account: Account = viewer) -> PlainTextResponse:
        text = server_metrics(service, account)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _embedding(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    viewer = access.needs("viewer")

    @routes.post("/embeddings", summary="Embed sentences and pictures")
    def embeddings(request: models.EmbeddingsIn, account: Account = viewer) -> models.EmbeddingsOut:
        inputs = [request.input] if isinstance(request.input, str) else request.input
        decoded = [_picture_or_sentence(place, one) for place, one in enumerate(inputs)]
        sentences = [one for one in decoded if isinstance(one, str)]
        for sentence in sentences:
            service.require_allowed(account, sentence)
        counts = {"sentences": len(sentences), "pictures": len(decoded) - len(sentences)}
        service.note(account, "embed", [], counts)
        embeds_ND = service.query_pictures.embed(decoded).astype("<f4")
        tokens = service.encoder.tokenizer.count(sentences)
        return models.EmbeddingsOut(
            data=[
                models.EmbeddingOut(
                    index=index,
                    embedding=base64.b64encode(row.tobytes()).decode()
                    if request.encoding_format == "base64"
                    else row.astype(np.float64).tolist(),
                )
                for index, row in enumerate(embeds_ND)
            ],
            model=service.encoder.fingerprint,
            usage=models.UsageOut(prompt_tokens=tokens, total_tokens=tokens),
        )


def _file(*types: str) -> dict[str, Any]:
    """Return the content of a response that is a file of one of these media types.

    No response has the last one: openapi-python-client knows no other type of files.
    """
    content = {"schema": {"type": "string", **_BINARY}}
    return dict.fromkeys((*types, "application/octet-stream"), content)


def notes_of(found: ConsoleResult, without: Collection[str] = ()) -> list[str]:
    """Return the notices of a search as sentences, but for some codes."""
    texts = [one.text for one in found.notices if one.code not in without]
    return [f"{text[:1].upper()}{text[1:]}{'' if text.endswith('?') else '.'}" for text in texts]


def picture_response(
    service: ConsoleService, account: Account, id_: int, size: Size, reason: str = ""
) -> Response:
    """Return an item's picture, which browsers cache for an hour, or its frame.

    With blur, a frame shows others only for a reason, which is logged.
    """
    item, _ = service.item(account, id_)
    shows_all = size != "frame" or service.shows_all(account, reason)
    made = service.pictures.jpeg(item, size, not shows_all)
    if made is None:
        what = "frame" if size == "frame" else "picture"
        raise missing(f"no {what} of {id_} is kept", f"{what}_not_kept")
    if size == "frame" and service.blur and shows_all:
        details = {"frame": str(id_), "reason": reason}
        service.note_items(account, "unblur", [(id_, item)], details, "frame")
    else:
        service.note_view(account, id_, item, _PARTS[size])
    headers = UNCACHED_HEADERS if size == "frame" else PICTURE_HEADERS
    return Response(made[0], media_type="image/jpeg", headers=headers)


def clip_response(
    service: ConsoleService, account: Account, id_: int, request: Request, reason: str = ""
) -> Response:
    """Return an item's clip, or the part of it that is asked for, and log the view.

    With blur, it shows others only for a reason, which is logged.
    """
    item, _ = service.item(account, id_)
    shows_all = service.shows_all(account, reason)
    clip = service.pictures.clip(item)
    try:
        found = None if clip is None else clip.path.stat()
    except OSError:  # It was deleted meanwhile.
        found = None
    if clip is None or found is None:
        raise missing(f"no clip of {id_} is kept", "clip_not_kept")
    suffix = clip.path.suffix if shows_all else ".mp4"
    named = CLIP_TYPES[suffix], f"clip-{id_}{suffix}"
    response: Response
    if shows_all:
        response = file_response(request, clip.path, found, *named)
    else:
        response = bytes_response(request, service.blurred_clip(account, item, clip), *named)
    service.note_clip(account, id_, item, reason)
    return response


def _picture_or_sentence(place: int, text: str) -> str | IO[bytes]:
    if not text.startswith("data:"):
        if len(text) > LONGEST_SENTENCE:
            raise invalid(
                f"input {place} has {len(text):,} letters, at most {LONGEST_SENTENCE:,} are "
                "taken: shorten the sentence",
                "sentence_too_long",
            )
        return text
    start = text.find(",") + 1
    try:
        if not re.fullmatch(r"data:image/[^,]{0,100};base64,", text[: min(start, 200)]):
            raise ValueError
        return _decoded(text, start)
    except (binascii.Error, ValueError) as error:
        raise invalid(
            "a picture must be a data URL such as data:image/jpeg;base64,/9j/...",
            "data_url_malformed",
        ) from error


def _decoded(text: str, start: int) -> IO[bytes]:
    """Decode base64 in pieces, between which other threads run; raises ValueError."""
    file = BytesIO()
    for at in range(start, len(text), PIECE_BYTES):
        piece = base64.b64decode(text[at : at + PIECE_BYTES], validate=True)
        if len(piece) < PIECE_BYTES // 4 * 3 and at + PIECE_BYTES < len(text):
            raise ValueError("padding in the middle")
        file.write(piece)
    file.seek(0)
    return file
