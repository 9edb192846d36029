"""The pages of oversight: stating a purpose, and deciding requests for approval."""

from typing import Annotated, Any, TypeAlias
from urllib.parse import parse_qsl

from fastapi import APIRouter, Form, Header, Path, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from upperson_console.accounts import Access, Account
from upperson_console.alerts import ConsoleAlerts
from upperson_console.approvals import ROLES, Approval, Decision
from upperson_console.bounds import BoundedRoute
from upperson_console.exports import export_response
from upperson_console.oversight import PURPOSE_COOKIE, Stated, cookie_of
from upperson_console.problems import ProblemError
from upperson_console.rendering import local_path, render
from upperson_console.search import Search
from upperson_console.service import ConsoleService

_Text: TypeAlias = Annotated[str, Form(max_length=200)]
_Id: TypeAlias = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]
_MOST_SHOWN = 50
_MOST_PICTURES = 12


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

    @routes.get("/purpose")
    def form(
        next: str = "",
        account: Account = viewer,
        status: int = 200,
        problem: str = "",
        referer: Annotated[str, Header()] = "",
    ) -> Response:
        next = local_path(next or "/" + "/".join(referer.split("/")[3:]))
        return render("purpose", account, status, oversight=oversight, next=next, problem=problem)

    @routes.post("/purpose")
    def state(
        request: Request,
        purpose: _Text = "",
        case: _Text = "",
        next: Annotated[str, Form()] = "/",
        account: Account = viewer,
    ) -> Response:
        purpose, case = purpose.strip(), case.strip()
        try:
            oversight.require_purpose(Stated(purpose=purpose or None, case=case or None))
        except ProblemError as problem:
            return form(next, account, 422, problem.detail)
        answer = RedirectResponse(local_path(next), 303)
        access.set_cookie(answer, request, PURPOSE_COOKIE, cookie_of(purpose, case))
        return answer


def _approval_pages(
    routes: APIRouter, service: ConsoleService, alerts: ConsoleAlerts, access: Access
) -> None:
    operator, approvals = access.needs("operator"), service.approvals

    @routes.get("/approvals")
    def show(account: Account = operator) -> Response:
        requests = approvals.visible(account)[:_MOST_SHOWN]
        found: dict[str, list[Any]] = {}
        for one in requests:
            if one.state == "pending":
                items = service.gallery.get(one.asked.get("ids", [])[:_MOST_PICTURES])
                found[one.id] = [(id_, item) for id_, (item, _) in items.items()]
        if pictures := [picture for items in found.values() for picture in items]:
            service.note_items(account, "view", pictures, {"approvals": "pending"})
        return render(
            "approvals",
            account,
            requests=requests,
            found=found,
            pictures=service.pictures,
            roles=ROLES,
        )

    @routes.post("/approvals/{id}/{decision}")
    def decide(
        id: _Id,
        decision: Decision,
        reason: Annotated[str, Form(max_length=500)] = "",
        account: Account = operator,
    ) -> Response:
        def perform(one: Approval) -> None:
            if one.action == "alert":
                alerts.add(one.requester, **one.asked)
            elif "ids" in one.asked and one.action == "delete":
                service.delete(one.requester, **one.asked)
            elif one.action == "delete":
                service.prune(one.requester, **one.asked, dry_run=False)

        approvals.decide(account, id, decision, reason, perform)
        return RedirectResponse("/approvals", 303)

    @routes.get("/api/v1/approvals/{id}/export")
    def export(id: _Id, account: Account = operator) -> Response:
        one = approvals.granted_export(account, id)
        search = Search.from_address(parse_qsl(one.asked["address"]))
        ids, reason = one.asked["ids"], one.asked["reason"]
        return export_response(service, one.requester, ids, search, reason=reason)
