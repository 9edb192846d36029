"""The pages: search, person, deletion and login. They work without scripts."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import parse_qsl

from fastapi import APIRouter, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import Field

from upperson_console.access_log import AccessLog
from upperson_console.accounts import COOKIE, Access, Account
from upperson_console.api import PICTURE_HEADERS, picture_response
from upperson_console.bounds import BoundedRoute
from upperson_console.browse import browse, newest_by_camera
from upperson_console.clip_blur import can_blur_clips
from upperson_console.exports import export_response
from upperson_console.oversight import PURPOSE_COOKIE
from upperson_console.pictures import Size
from upperson_console.problems import ProblemError
from upperson_console.rendering import local_path, render
from upperson_console.reported import notice_text, problem_text
from upperson_console.results import match_of, run_search, timeline_hits
from upperson_console.search import MOST_BY_TIME, MOST_HITS, MOST_MARKS, PAGE_HITS, Search, read_id
from upperson_console.service import ConsoleService, span_of
from upperson_console.timeline import timeline_of, whereabouts
from upperson_console.translation import gettext, ngettext
from upperson_console.user_state import SavedSearch
from upperson_console.view_log import QuotaExceededError
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Hit, Item, TrackSpan

_LAST = 2**63 - 1
"""The largest id."""
_Ids: TypeAlias = list[Annotated[int, Field(ge=0, le=_LAST)]]
_AROUND_S = 300.0
_TIMES = ("since", "until")
_NO_MORE = {"command": None, "last": None, "also": None}


def page_routes(service: ConsoleService, access: Access) -> APIRouter:
    """Return the routes of the pages."""
    routes = APIRouter(
        include_in_schema=False, default_response_class=HTMLResponse, route_class=BoundedRoute
    )
    for add in (_search_pages, _person_pages, _delete_pages):
        add(routes, service, access)
    _login_pages(routes, access, service.access_log)
    return routes


def _search_pages(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    viewer, operator = access.needs("viewer"), access.needs("operator")

    @routes.get("/")
    def search_page(request: Request, account: Account = viewer) -> Response:
        problem, search = _searched(request)
        cursor = request.query_params.get("cursor")
        values: dict[str, Any] = dict.fromkeys(("result", "query_picture", "empty", "newest"))
        values |= {
            "problem": None if problem is None else problem_text(problem),
            "notes": [],
            "meant": None,
            "kept": {},
        }
        status = 200 if problem is None else 422
        if problem is None and not search.is_empty:
            try:
                if search.picture is not None:
                    values["query_picture"] = service.query_pictures.get(search.picture)
                result = run_search(service, account, search, PAGE_HITS, cursor)
            except QuotaExceededError:
                raise  # Its page says when to try again.
            except (UsageError, ProblemError) as error:
                values["problem"] = problem_text(error)
                status = getattr(error, "status", 422)
            else:
                notices = result.verdict.without_repeated(result.notices)
                notes = [notice_text(one) for one in notices if one.code != "did_you_mean"]
                values |= {"result": result, "notes": notes}
                meant = (one for one in notices if one.code == "did_you_mean")
                values["meant"] = next((one.fields["sentence"] for one in meant), None)
                kept = service.marks(account, search)
                shown = dict(search.marks)
                values["kept"] = {one: kept[one] for one in kept if shown.get(one) != kept[one]}
                if not result.page.hits:
                    values["empty"] = _nothing(service, account, search)
        elif problem is None:
            count = service.count(account, search.filter_at(time.time()))
            if not count:
                values["empty"] = _nothing(service, account, search)
            elif search.browses:
                page = browse(service, account, search, PAGE_HITS, cursor)
                values["result"] = {"page": page, "total": count}
            else:
                values["newest"] = newest_by_camera(service, account)
        times_wrong = problem is not None and problem.code in ("times_reversed", "time_skipped")
        given = {one: request.query_params.get(one, "") if times_wrong else "" for one in _TIMES}
        return render(
            "search",
            account,
            status,
            search=search,
            given=given,
            times_wrong=values["problem"] if times_wrong else None,
            cameras=service.cameras(account),
            saved=_saved(service, account),
            pictures=service.pictures,
            log_problem=service.log.problem,
            blur=service.blur,
            marked=_marked(service, search),
            **values,
        )

    @routes.post("/picture")
    def give(
        picture: Annotated[UploadFile, File()],
        address: Annotated[str, Form()] = "",
        account: Account = viewer,
    ) -> Response:
        search = _read(address)
        if not picture.size:
            raise UsageError("no picture was chosen: choose a file first", code="no_file_chosen")
        kept = service.query_pictures.add(picture.file)
        return _see(f"/?{search.address(picture=kept.id, like=None, marks=())}")

    @routes.get("/query-pictures/{id}")
    def query_picture(id: str, account: Account = viewer) -> Response:
        picture = service.query_pictures.get(id)
        return Response(picture.jpeg, media_type="image/jpeg", headers=PICTURE_HEADERS)

    @routes.post("/marks")
    def mark(
        address: Annotated[str, Form()],
        yes: Annotated[int | None, Form()] = None,
        no: Annotated[int | None, Form()] = None,
        each: Annotated[Literal["yes", "no"], Form()] = "yes",
        ids: Annotated[_Ids, Form(max_length=MOST_MARKS)] = [],  # noqa: B006
        undo: Annotated[str | None, Form()] = None,
        person: Annotated[int | None, Form(ge=0, le=_LAST)] = None,
        account: Account = operator,
    ) -> Response:
        search = _read(address)
        changes: dict[int, bool | None] = {}
        if undo is not None:
            shown = [id_ for id_, _ in search.marks]
            changes = dict.fromkeys(shown if undo == "all" else shown[-1:])
        for id_, right in ((yes, True), (no, False), *((one, each == "yes") for one in ids)):
            if id_ is not None:  # The same button again removes the mark.
                again = (id_, right) in search.marks and id_ not in ids
                changes[id_] = None if again else right
        kept = service.mark(account, search, changes)
        left = tuple(mark for mark in search.marks if mark[0] not in changes)
        search = replace(search, marks=left)
        if undo is None:  # Else marks of other pages would come to those that are left.
            search = search.with_marks(kept)
        if person is not None:
            return _see(f"/people/{person}?{search.address()}")
        # The browser goes on from the marked card, also without a script.
        place = f"#card-{next(iter(changes))}" if undo is None and changes else ""
        return _see(f"/?{search.address()}{place}")

    @routes.get("/timeline")
    def timeline(request: Request, account: Account = viewer) -> Response:
        problem, search = _searched(request)
        if problem is not None or search.is_empty:
            return HTMLResponse("")
        hits, is_calibrated = timeline_hits(service, account, search, MOST_BY_TIME)
        return render(
            "timeline",
            account,
            timeline=timeline_of(search, hits),
            is_calibrated=is_calibrated,
            most=MOST_BY_TIME,
        )

    @routes.post("/saved")
    def save(
        name: Annotated[str, Form()],
        address: Annotated[str, Form()],
        shared: Annotated[bool, Form()] = False,
        account: Account = viewer,
    ) -> Response:
        search = _read(address)
        service.require_allowed(account, search.sentence)
        service.user_state.save(account.name, name, search.address(), shared)
        return _see(f"/?{search.address()}")

    @routes.post("/saved/forget")
    def forget(saved: Annotated[int, Form(ge=1, le=_LAST)], account: Account = viewer) -> Response:
        service.user_state.forget_saved(account.name, saved)
        return _see("/")


def _marked(service: ConsoleService, search: Search) -> Callable[[Hit], tuple[int, bool | None]]:
    """Return what finds the mark of a hit: the marked picture, which may be another of its track.

    A mark moves the search, and with it the best picture of a track.
    """
    marks = dict(search.marks)
    items = service.gallery.get([*marks]) if search.by_track and marks else {}
    of_track = {(item.camera, item.track): id_ for id_, (item, _) in items.items()}

    def mark_of(hit: Hit) -> tuple[int, bool | None]:
        track = hit.item.camera, hit.item.track
        id_ = hit.id if hit.item.track is None else of_track.get(track, hit.id)
        return (hit.id, marks[hit.id]) if hit.id in marks else (id_, marks.get(id_))

    return mark_of


def _saved(service: ConsoleService, account: Account) -> list[SavedSearch]:
    """Return what an account saved, and what others share whose cameras it may see."""

    def is_visible(one: SavedSearch) -> bool:
        with suppress(UsageError):  # It was saved by an earlier release, and is not valid now.
            return all(map(account.sees, _read(one.address).where.cameras or ()))
        return False

    saved = service.user_state.saved(account.name)
    return [one for one in saved if one.user == account.name or is_visible(one)]


def _person_pages(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    viewer, operator = access.needs("viewer"), access.needs("operator")

    @routes.get("/people/{id}")
    def person(id: int, request: Request, account: Account = viewer) -> Response:
        _, search = _searched(request)
        found = service.person(account, id, search)
        elsewhere = service.elsewhere(account, found)
        span = span_of(found.views)
        return render(
            "person",
            account,
            person=found,
            measured={  # Attributes that cameras and detectors write.
                "frame": gettext("Frame"),
                "sharpness": gettext("Sharpness"),
                "score": gettext("Detector's score"),
            },
            match=match_of(service, account, search, id),
            span=span,
            around=_around(found.item.camera, span),
            elsewhere=elsewhere,
            line=None if elsewhere is None else whereabouts(found, elsewhere),
            frame=_frame_size(service, found.item),
            clip=service.pictures.clip(found.item),
            blur=service.blur,
            blurs_clips=can_blur_clips(),
            pictures=service.pictures,
            search=search,
        )

    @routes.get("/people/{id}/picture")
    def picture(
        id: int, size: Size = "view", reason: str = "", account: Account = viewer
    ) -> Response:
        return picture_response(service, account, id, size, reason)

    @routes.post("/export")
    def export(
        ids: Annotated[_Ids, Form(max_length=MOST_HITS)] = [],  # noqa: B006
        address: Annotated[str, Form()] = "",
        which: Annotated[Literal["these", "yes", "all", "likely"], Form()] = "these",
        reason: Annotated[str, Form()] = "",
        account: Account = operator,
    ) -> Response:
        search = _read(address)
        chosen = {"these": ids, "yes": search.yes}.get(which)
        more: dict[str, Any] = {"tracks": search.by_track, "reason": reason}
        return export_response(service, account, chosen, search, likely=which == "likely", **more)


def _delete_pages(routes: APIRouter, service: ConsoleService, access: Access) -> None:
    admin = access.needs("admin")

    @routes.get("/people/{id}/delete")
    def look(
        id: int, what: str = "picture", min_score: float = 0.9, account: Account = admin
    ) -> Response:
        item, _ = service.item(account, id)
        chosen: list[tuple[int, Item, float | None]]
        if what == "alike":
            hits = service.alike(account, id, min_score, "picture")
            chosen = [(hit.id, hit.item, hit.score) for hit in hits]
        elif what == "track" and item.track is not None:
            chosen = [(one, view, None) for one, view in service.person(account, id).views]
        else:
            what, chosen = "picture", [(id, item, None)]
            service.note_items(account, "view", [(id, item)], {"picture": str(id)})
        return render(
            "delete",
            account,
            id=id,
            item=item,
            what=what,
            chosen=chosen,
            min_score=min_score,
            pictures=service.pictures,
            bin=service.bin,
        )

    @routes.get("/delete")
    def look_at_selected(
        ids: Annotated[_Ids, Query(max_length=500)] = [],  # noqa: B006
        address: str = "",
        account: Account = admin,
    ) -> Response:
        if not ids:  # The address of a deletion, loaded again.
            return _see("/")
        chosen: dict[int, Item] = {}
        for id_, (item, _) in service.gallery.get(ids).items():
            whole = _read(address).by_track and item.track is not None
            of_track = service.track_ids(account, item.camera, item.track or "") if whole else [id_]
            chosen |= {one: found for one, (found, _) in service.gallery.get(of_track).items()}
        service.note_items(account, "view", chosen.items(), {"selected": len(ids)})
        views = [(one, item, None) for one, item in chosen.items()]
        more: dict[str, Any] = {"pictures": service.pictures, "bin": service.bin}
        return render("delete", account, id=None, what="selected", chosen=views, **more)

    @routes.post("/delete")
    def delete(
        ids: Annotated[str, Form(max_length=1 << 20)],
        reason: Annotated[str, Form()] = "",
        what: Annotated[str, Form()] = "picture",
        permanent: Annotated[bool, Form()] = False,
        account: Account = admin,
    ) -> Response:
        chosen = [read_id(one) for one in ids.split()]
        deleted = service.delete(account, chosen, reason, {"what": what}, permanent)
        keeps = not permanent and service.bin is not None
        return render(
            "deleted",
            account,
            deleted=deleted,
            chosen=len(chosen),
            restored=False,
            undo=ids if keeps else None,
            until=time.time() + service.bin_s,
        )


def _login_pages(routes: APIRouter, access: Access, access_log: AccessLog) -> None:
    @routes.get("/login")
    def form(next: str = "/") -> Response:
        return render("login", None, next=local_path(next), problem=None)

    @routes.post("/login")
    def login(
        request: Request, token: Annotated[str, Form()] = "", next: Annotated[str, Form()] = "/"
    ) -> Response:
        account = None if access.accounts is None else access.accounts.of_token(token.strip())
        access_log.note("login-failed" if account is None else "login", request, account)
        if account is None:
            why = gettext(
                "This token is not known: check it, or ask the administrator for a new one."
            )
            return render("login", None, 401, next=local_path(next), problem=why)
        answer = _see(local_path(next))
        access.set_cookie(answer, request, COOKIE, access.sessions.begin(token.strip()))
        answer.delete_cookie(PURPOSE_COOKIE)
        return answer

    @routes.post("/logout")
    def logout(request: Request) -> Response:
        access_log.note("logout", request, access.find(request))
        access.sessions.end(request.cookies.get(COOKIE, ""))
        answer = _see("/login")
        answer.delete_cookie(COOKIE)
        answer.delete_cookie(PURPOSE_COOKIE)
        return answer


def _frame_size(service: ConsoleService, item: Item) -> tuple[int, int] | None:
    """Return width and height of the whole frame of an item; None if it is not kept."""
    with suppress(InputError):
        made = service.pictures.jpeg(item, "frame")
        return None if made is None else made[1]
    return None


def _around(camera: str | None, span: TrackSpan) -> str | None:
    """Return the address of what a camera saw around the time of a track, by time."""
    if camera is None or span.first_time is None or span.last_time is None:
        return None
    since, until = span.first_time - _AROUND_S, span.last_time + _AROUND_S
    where = Filter(camera=(camera,), since=since, until=until)
    return Search(where=where, order="time").address()


def _nothing(service: ConsoleService, account: Account, search: Search) -> dict[str, Any]:
    """Describe why nothing was found, and what to do next."""
    cameras = service.cameras(account)
    count = service.count(account, Filter())
    if not count:
        return {
            **_message(
                gettext("The gallery is empty"),
                gettext("No pictures are in it yet. Add some, or let a camera do it:"),
                "/live",
                gettext("See whether a camera is watching"),
            ),
            "command": f"upperson-rt index PICTURES -g {account.path(service.gallery.location)}",
        }
    where = search.where
    for name in where.cameras or ():
        if name not in cameras:
            known = ", ".join(list(cameras)[:8]) or gettext("none that has a name")
            return _message(
                gettext("No pictures of the camera \u201c%(name)s\u201d", name=name),
                gettext("It may be written in another way. There are: %(names)s.", names=known),
                f"/?{search.address(where=Filter())}",
                gettext("Search in all cameras"),
            )
    if where.cameras and (search.last is not None or where.since is not None):
        timeless = search.address(where=replace(where, since=None, until=None), last=None)
        return {
            **_message(
                gettext("No picture in this time"),
                gettext("The newest picture of these cameras is older; a camera may have stopped."),
                f"/?{timeless}",
                gettext("Search without the time"),
            ),
            "last": {name: cameras[name].last_time for name in where.cameras},
            "also": "/live",
            "also_text": gettext("See whether the cameras are running"),
        }
    return _message(
        gettext("Nothing passes the filter"),
        ngettext(
            "There is %(num)s picture, and it does not pass.",
            "There are %(num)s pictures, and none passes.",
            count,
        ),
        f"/?{search.without_filter()}",
        gettext("Search without the filter"),
    )


def _message(title: str, text: str, link: str, link_text: str) -> dict[str, Any]:
    return {"title": title, "text": text, "link": link, "link_text": link_text, **_NO_MORE}


def _searched(request: Request) -> tuple[UsageError | None, Search]:
    """Return the problem of a page's address, or None, and its search."""
    pairs = [pair for pair in request.query_params.multi_items() if pair[0] != "cursor"]
    try:
        return None, Search.from_address(pairs)
    except UsageError as error:
        problem = error
    with suppress(UsageError):  # The form keeps all but the times, which the page shows as given.
        return problem, Search.from_address([one for one in pairs if one[0] not in _TIMES])
    return problem, Search(sentence=dict(pairs).get("q", "")[:200])


def _read(address: str) -> Search:
    return Search.from_address(parse_qsl(address.lstrip("?"), max_num_fields=500))


def _see(place: str) -> RedirectResponse:
    return RedirectResponse(place, 303)
