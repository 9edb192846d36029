"""The pages around the search: live state, the frame of a picture, records, and settings."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Depends, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from upperson_console.accounts import Access, Account
from upperson_console.api import UNCACHED_HEADERS
from upperson_console.bounds import BoundedRoute
from upperson_console.live import Live
from upperson_console.log_view import ACTIONS, LogFilter, passing_lines, read_page
from upperson_console.pictures import as_jpeg, blurred_jpeg
from upperson_console.problems import ProblemError, invalid, missing
from upperson_console.rendering import render, templates
from upperson_console.service import ConsoleService
from upperson_console.translation import LANGUAGES, zones
from upperson_log.chain import SOON_BYTES, open_log, verify_log
from upperson_rt.gallery import Filter, Item
from upperson_rt.preprocess import use_image

EVENTS = "/live/events"
"""Path of the stream of the live page."""
_RENEWED_S = 2.0
_POLLED_S = 0.5
"""Interval at which a stream checks whether the server ends."""
_MOST_STREAMS = 20
_MOST_STREAMS_EACH = 4
"""Of one account."""
_ALL_LINES = LogFilter()
_Filter: TypeAlias = Annotated[LogFilter, Depends()]
_Chosen: TypeAlias = Annotated[str, Form(max_length=100)]


def side_routes(service: ConsoleService, access: Access, live: Live) -> APIRouter:
    """Return the routes of these pages."""
    routes = APIRouter(
        include_in_schema=False, default_response_class=HTMLResponse, route_class=BoundedRoute
    )
    _live_pages(routes, service, access, live)
    _record_pages(routes, service, access)
    viewer, reader = access.needs("viewer"), access.needs("viewer", purpose=False)

    @routes.get("/people/{id}/frame")
    def frame(id: int, reason: str = "", account: Account = viewer) -> Response:
        item, _ = service.item(account, id)
        shows_all = service.shows_all(account, reason)
        made = service.pictures.jpeg(item, "frame", not shows_all)
        if made is None:
            raise missing(f"no frame of picture {id} is kept", "frame_not_found")
        items: list[tuple[int, Item]] = [(id, item)]
        service.note_items(account, "view", items, {"frame": str(id)}, "frame")
        more = {"blurred": not shows_all, "reason": reason}
        return render("frame", account, 200, id=id, item=item, size=made[1], **more)

    @routes.get("/settings")
    def settings(saved: bool = False, account: Account = reader) -> Response:
        chosen = service.user_state.settings(account.name)
        more: dict[str, Any] = {
            "chosen": chosen,
            "languages": LANGUAGES,
            "zones": zones(),
            "saved": saved,
        }
        return render("settings", account, **more)

    @routes.post("/settings")
    def choose(language: _Chosen = "", zone: _Chosen = "", account: Account = reader) -> Response:
        if language not in ("", *LANGUAGES) or zone not in ("", *zones()):
            raise invalid("choose a language and a time zone of the lists", "settings_unknown")
        service.user_state.set_settings(account.name, language, zone)
        return RedirectResponse("/settings?saved=true", 303)

    return routes


def _live_pages(routes: APIRouter, service: ConsoleService, access: Access, live: Live) -> None:
    viewer = access.needs("viewer")
    streams: list[str] = []  # The account of each.

    def is_full(account: Account) -> bool:
        each = streams.count(account.name)
        return len(streams) >= _MOST_STREAMS or each >= _MOST_STREAMS_EACH

    def values(account: Account) -> dict[str, Any]:
        processes, cameras = live.now(service, account)
        service.note_live(account, [one for camera in cameras for one in camera.newest])
        return {
            "account": account,
            "processes": processes,
            "cameras": cameras,
            "pictures": service.pictures,
            "gallery": account.path(service.gallery.location),
        }

    @routes.get("/live")
    def page(account: Account = viewer) -> Response:
        return render("live", **values(account))

    @routes.get("/live/camera")
    def camera(name: str, reason: str = "", account: Account = viewer) -> Response:
        found, _ = service.snapshot(account, name)
        blurred = not service.shows_all(account, reason)
        service.note_snapshot(account, found)
        return render("camera", account, snapshot=found, blurred=blurred, reason=reason)

    @routes.get("/live/camera/picture")
    def camera_picture(name: str, reason: str = "", account: Account = viewer) -> Response:
        found, file = service.snapshot(account, name)
        if not service.shows_all(account, reason):
            jpeg, _ = blurred_jpeg(file, None)
            service.note_snapshot(account, found)
        else:
            jpeg, _ = use_image(file, lambda pixels: as_jpeg(pixels, "frame"))
            if service.blur:
                details = {"snapshot": name, "reason": reason}
                service.note(account, "unblur", [], details, Filter(camera=name))
            else:
                service.note_snapshot(account, found)
        return Response(jpeg, media_type="image/jpeg", headers=UNCACHED_HEADERS)

    @routes.get(EVENTS)
    async def events(request: Request, account: Account = viewer) -> Response:
        if is_full(account):
            raise ProblemError(
                429, "too many live pages are open: close some", {"Retry-After": "30"}
            )

        def part() -> str:
            html = templates().get_template("_live.html.j2").render(**values(account))
            return "".join(f"data: {line}\n" for line in html.splitlines() if line) + "\n"

        async def stream() -> AsyncIterator[str]:
            if is_full(account):  # Others began meanwhile.
                return
            streams.append(account.name)  # Here: a response that never begins runs no `finally`.
            waited = 0.0
            try:
                while not live.has_ended:
                    await asyncio.sleep(_POLLED_S)
                    waited += _POLLED_S
                    if waited < _RENEWED_S:
                        continue
                    waited = 0.0
                    if access.find(request) != account:
                        break  # The token was revoked or changed, or has expired.
                    try:
                        html = await run_in_threadpool(part)
                    except ProblemError:
                        break  # What it would show cannot be logged.
                    yield html
            finally:
                streams.remove(account.name)

        return StreamingResponse(stream(), media_type="text/event-stream")


def _record_pages(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    admin, reader = access.needs("admin"), access.needs("admin", purpose=False)

    def page(
        account: Account,
        check: bool = False,
        where: LogFilter = _ALL_LINES,
        before: int | None = None,
        **more: Any,
    ) -> Response:
        try:
            with open_log(service.log.path) as log:
                size = log.total_bytes
            lines, older = read_page(service.log.path, where, before)
        except OSError as error:
            raise ProblemError(
                503, f"the query log {service.log.path} cannot be read: {error.strerror}"
            ) from error
        given = {"count": None, "dry": True, "days": None, "camera": "", **more}
        return render(
            "records",
            account,
            info=service.current.now().info(),
            cameras=list(service.cameras(account)),
            report=verify_log(service.log.path) if check or size <= SOON_BYTES else None,
            megabytes=round(size / 1e6),
            log_problem=service.log.problem,
            view_log=service.view_log,
            lines=lines,
            older=older,
            before=before,
            where=where,
            actions=ACTIONS,
            **given,
        )

    @routes.get("/records")
    def records(
        check: bool = False,
        before: Annotated[int | None, Query(ge=0)] = None,
        where: _Filter = _ALL_LINES,
        account: Account = reader,
    ) -> Response:
        return page(account, check, where, before)

    @routes.get("/records/lines")
    def lines(where: _Filter = _ALL_LINES, account: Account = reader) -> Response:
        service.note(account, "log-export", [], {"filter": where.address})
        headers = {"content-disposition": 'attachment; filename="upperson-log.jsonl"'}
        found = passing_lines(service.log.path, where)
        return StreamingResponse(found, media_type="application/jsonl", headers=headers)

    @routes.post("/records/prune")
    def prune(
        days: Annotated[float, Form(ge=0, le=36500, allow_inf_nan=False)],
        act: Annotated[str, Form()],
        camera: Annotated[str, Form()] = "",
        reason: Annotated[str, Form(max_length=500)] = "",
        account: Account = admin,
    ) -> Response:
        dry = act != "delete"
        before = time.time() - days * 86400
        count = service.prune(account, before, None, camera or None, reason, dry)
        return page(account, count=count, dry=dry, days=f"{days:g}", camera=camera)
