"""Requests for approval: routes of the API and the page."""

from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Form, Path, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse

from upperson_console.accounts import Access, Account
from upperson_console.alerts import ConsoleAlerts
from upperson_console.api import PROBLEM, zip_response
from upperson_console.approvals import ROLES, Approval, Decision
from upperson_console.bounds import BoundedRoute
from upperson_console.models import ApprovalOut, DecisionIn
from upperson_console.problems import ProblemError
from upperson_console.rendering import render
from upperson_console.service import ConsoleService

_Id: TypeAlias = Annotated[str, Path(pattern="^[0-9a-f]{16}$", examples=["8f13e24a400a22f0"])]
_ZIP: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The zip.",
        "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_MOST_SHOWN = 50
_MOST_PICTURES = 12


def approval_routes(
    service: ConsoleService, alerts: ConsoleAlerts, access: Access
) -> list[APIRouter]:
    """Return the routes of the API and of the page."""
    api = APIRouter(
        prefix="/api/v1/approvals", responses=PROBLEM, route_class=BoundedRoute, tags=["approvals"]
    )
    pages = APIRouter(
        prefix="/approvals",
        include_in_schema=False,
        default_response_class=HTMLResponse,
        route_class=BoundedRoute,
    )
    operator, approvals = access.needs("operator"), service.approvals

    def decide(account: Account, id_: str, decision: Decision, reason: str) -> Approval:
        """Decide a request; an approved deletion or alert is carried out at once."""
        asked = approvals.find(account, id_)
        is_prune = asked.action == "delete" and "older_than" in asked.asked
        if is_prune and decision == "approve":
            count = service.prune(asked.requester, **asked.asked, dry_run=True)
            if count != asked.count:
                what = f"{count} pictures would go now, {asked.count} were asked for: ask again"
                raise ProblemError(409, what, code="approval_outdated")

        def perform(one: Approval) -> None:
            if one.action == "alert":
                alerts.add(one.requester, **one.asked)
            elif is_prune:
                service.prune(one.requester, **one.asked, dry_run=False)
            elif one.action == "delete":
                service.delete(one.requester, **one.asked)

        return approvals.decide(account, id_, decision, reason, perform)

    @api.get("", summary="Requests for approval, newest first")
    def list_all(account: Account = operator) -> list[ApprovalOut]:
        return [_out(one) for one in approvals.visible(account)]

    @api.post("/{id}/{decision}", summary="Approve or refuse another account's request")
    def judge(
        id: _Id, decision: Decision, request: DecisionIn, account: Account = operator
    ) -> ApprovalOut:
        return _out(decide(account, id, decision, request.reason))

    def export(id: _Id, account: Account = operator) -> Response:
        one = approvals.granted_export(account, id)
        return zip_response(service, one.requester, **one.asked)

    summary = "Download an export that was approved"
    api.get("/{id}/export", summary=summary, response_class=StreamingResponse, responses=_ZIP)(
        export
    )
    pages.get("/{id}/export")(export)

    @pages.get("")
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

    @pages.post("/{id}/{decision}")
    def judge_page(
        id: _Id,
        decision: Decision,
        reason: Annotated[str, Form(max_length=500)] = "",
        account: Account = operator,
    ) -> Response:
        decide(account, id, decision, reason)
        return RedirectResponse("/approvals", 303)

    return [api, pages]


def _out(one: Approval) -> ApprovalOut:
    fields = {"state": one.state, "about": one.about}
    return ApprovalOut.model_validate(vars(one) | vars(one.context) | fields)
