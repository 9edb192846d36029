"""The pages of oversight: stating a purpose, and deciding requests for approval."""

from typing import Annotated, Any, TypeAlias
from urllib.parse import parse_qsl

from fastapi import APIRouter, Form, Header, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from upperson_alerts.promise import read_rate
from upperson_console.accounts import Access, Account
from upperson_console.alerts import ConsoleAlerts
from upperson_console.approvals import ROLES, Approval, Decision
from upperson_console.bounds import BoundedRoute
from upperson_console.exports import MOST_EXPORTED, export_response
from upperson_console.oversight import PURPOSE_COOKIE, Context, Stated, cookie_of
from upperson_console.problems import ProblemError
from upperson_console.rendering import local_path, render
from upperson_console.reported import problem_text
from upperson_console.search import Search
from upperson_console.service import ConsoleService
from upperson_console.times import local_time, read_time
from upperson_console.translation import word
from upperson_rt.printable import visible_text

_ID = "^[0-9a-f]{16}$"
_Text: TypeAlias = Annotated[str, Form(max_length=200)]
_Id: TypeAlias = Annotated[str, Path(pattern=_ID)]
_MOST_SHOWN = 50
_FIRST_PICTURES = 12
_PICTURES = 48
"""On a page of one request."""


def oversight_routes(service: ConsoleService, alerts: ConsoleAlerts, access: Access) -> APIRouter:
    """Return the routes of the pages."""
    routes = APIRouter(
        include_in_schema=False, default_response_class=HTMLResponse, route_class=BoundedRoute
    )
    _purpose_page(routes, access)
    _approval_pages(routes, service, alerts, access)
    return routes


def _purpose_page(routes: APIRouter, access: Access) -> None:
    viewer = access.needs("viewer", purpose=False)
    oversight = access.oversight

    def page(account: Account, next: str, given: Context | Stated, *lacks: str) -> Response:
        status, place = 422 if lacks else 200, local_path(next)
        wrong = [word("stated", one) for one in lacks]
        more = {"oversight": oversight, "next": place, "given": given, "lacks": wrong}
        return render("purpose", account, status, **more)

    @routes.get("/purpose")
    def form(
        next: str = "", referer: Annotated[str, Header()] = "", account: Account = viewer
    ) -> Response:
        return page(account, next or "/" + "/".join(referer.split("/")[3:]), account.context)

    @routes.post("/purpose")
    def state(
        request: Request,
        purpose: _Text = "",
        case: _Text = "",
        next: Annotated[str, Form()] = "/",
        account: Account = viewer,
    ) -> Response:
        purpose, case = visible_text(purpose), visible_text(case)
        given = Stated(purpose=purpose or None, case=case or None)
        if lacks := oversight.lacks(given):
            return page(account, next, given, *lacks)
        answer = RedirectResponse(local_path(next), 303)
        access.set_cookie(answer, request, PURPOSE_COOKIE, cookie_of(purpose, case))
        return answer


def _search_text(address: str) -> str:
    """Return an address in words, with times as the reader's."""
    pairs = [
        (name, local_time(read_time(value, name)) if name in ("since", "until") else value)
        for name, value in parse_qsl(address)
    ]
    return ", ".join(" ".join(pair).removeprefix("q ") for pair in pairs)


def _approval_pages(
    routes: APIRouter, service: ConsoleService, alerts: ConsoleAlerts, access: Access
) -> None:
    operator, approvals = access.needs("operator"), service.approvals

    def page(account: Account, of: str | None, start: int, problem: str = "") -> Response:
        requests = approvals.visible(account)[:_MOST_SHOWN]
        if of is not None:
            requests = [approvals.find(account, of)]
        most = _FIRST_PICTURES if of is None else _PICTURES
        found: dict[str, list[Any]] = {}
        for one in requests:
            if one.state == "pending":
                ids = one.arguments.get("ids", [])[start : start + most]
                if one.about.get("from_bin"):
                    found[one.id] = [(id_, entry.item) for id_, entry in service.binned(ids)]
                else:
                    items = service.gallery.get(ids)
                    found[one.id] = [(id_, item) for id_, (item, _) in items.items()]
        if pictures := [picture for items in found.values() for picture in items]:
            service.note_items(account, "view", pictures, {"approvals": "pending"})
        return render(
            "approvals",
            account,
            422 if problem else 200,
            requests=requests,
            of=of,
            start=start,
            most=most,
            problem=problem,
            found=found,
            pictures=service.pictures,
            binned=service.current.last.binned,
            search_of=_search_text,
            roles=ROLES,
            read_rate=read_rate,
        )

    @routes.get("/approvals")
    def show(
        of: Annotated[str | None, Query(pattern=_ID)] = None,
        start: Annotated[int, Query(ge=0, le=MOST_EXPORTED)] = 0,
        account: Account = operator,
    ) -> Response:
        return page(account, of, start)

    @routes.post("/approvals/{id}/{decision}")
    def decide(
        id: _Id,
        decision: Decision,
        reason: Annotated[str, Form(max_length=500)] = "",
        account: Account = operator,
    ) -> Response:
        def perform(one: Approval) -> None:
            requester = one.requester(access.of_name(one.user))
            if one.action == "alert":
                alerts.add(requester, **one.arguments)
            elif one.action == "export":
                count = len(service.seen(requester, one.arguments["ids"]))
                approvals.require(requester, "export", count, **one.arguments)
            elif "ids" in one.arguments:
                service.delete(requester, **one.arguments)
            else:
                service.prune(requester, **one.arguments, dry_run=False)

        try:
            approvals.decide(account, id, decision, reason, perform)
        except ProblemError as problem:
            if problem.code != "reason_missing":
                raise
            return page(account, id, 0, problem_text(problem))
        return RedirectResponse("/approvals", 303)

    @routes.get("/api/v1/approvals/{id}/export")
    def export(id: _Id, account: Account = operator) -> Response:
        one = approvals.granted_export(account, id)
        one.require_approver(access.of_name(one.by))
        search = Search.from_address(parse_qsl(one.arguments["address"]))
        ids, reason = one.arguments["ids"], one.arguments["reason"]
        return export_response(service, one.requester(account), ids, search, reason=reason)
