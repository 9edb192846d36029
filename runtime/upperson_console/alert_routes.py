"""Text alerts: routes of the API and pages."""

from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Form, Path, Query, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from upperson_alerts.alerts import AlertReport
from upperson_alerts.promise import show_rate
from upperson_console import models
from upperson_console.accounts import Access, Account
from upperson_console.alerts import MOST_RAISED, AlertMessage, Change, ConsoleAlerts, Verdict
from upperson_console.api import PROBLEM
from upperson_console.bounds import BoundedRoute
from upperson_console.rendering import render
from upperson_console.reported import problem_text
from upperson_console.search import LONGEST_SENTENCE
from upperson_console.times import read_time
from upperson_rt.errors import InputError, UsageError

_AlertId: TypeAlias = Annotated[str, Path(pattern="^[0-9a-f]{8}$", examples=["fa568753"])]
_MessageId: TypeAlias = Annotated[
    str, Path(pattern="^[0-9a-f]{16}$", examples=["8f13e24a400a22f0"])
]
_OfAlert: TypeAlias = Annotated[
    str | None, Query(pattern="^[0-9a-f]{8}$", description="Only of this alert.")
]
_MOST_MESSAGES = 48
_WEEK = 7.0


def alert_routes(alerts: ConsoleAlerts, access: Access) -> list[APIRouter]:
    """Return the routes of the API and of the pages."""
    api = APIRouter(
        prefix="/api/v1/alerts", responses=PROBLEM, route_class=BoundedRoute, tags=["alerts"]
    )
    pages = APIRouter(
        prefix="/alerts",
        include_in_schema=False,
        default_response_class=HTMLResponse,
        route_class=BoundedRoute,
    )
    _add_api(api, alerts, access)
    _add_pages(pages, alerts, access)
    return [api, pages]


def _add_api(routes: APIRouter, alerts: ConsoleAlerts, access: Access) -> None:
    viewer, operator = access.needs("viewer"), access.needs("operator")

    @routes.get("", summary="The alerts, and how each has fared")
    def list_all(account: Account = viewer) -> list[models.AlertOut]:
        return [_alert_out(one) for one in alerts.reports(account)]

    @routes.post("", status_code=201, summary="Add an alert")
    def add(request: models.AlertIn, account: Account = operator) -> models.AlertAddedOut:
        report, notices = alerts.add(
            account, request.sentence, request.rate, request.cameras, request.name, request.cap
        )
        found = [models.NoticeOut.model_validate(one.as_json()) for one in notices]
        return models.AlertAddedOut.model_validate(_fields(report) | {"notices": found})

    @routes.get("/messages", summary="Messages of the alerts, newest first")
    def messages(
        alert: _OfAlert = None,
        state: Annotated[
            Literal["ready", "review"] | None, Query(description="Null for both.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
        account: Account = viewer,
    ) -> list[models.AlertMessageOut]:
        found = alerts.messages(account, alert, state, limit)
        return [_message_out(alerts, account, one) for one in found]

    @routes.post("/messages/{id}/{verdict}", summary="Mark a message as right or false alarm")
    def judge(id: _MessageId, verdict: Verdict, account: Account = operator) -> models.AlertOut:
        return _alert_out(alerts.judge(account, id, verdict))

    @routes.post(
        "/{id}/{change}", summary="Pause an alert, or resume it: its promise counts from then"
    )
    def change(
        id: _AlertId, change: Literal["pause", "resume"], account: Account = operator
    ) -> models.AlertOut:
        alerts.change(account, id, change)
        return _alert_out(alerts.report(account, id))

    @routes.delete("/{id}", status_code=204, summary="Remove an alert and its messages")
    def remove(id: _AlertId, account: Account = operator) -> None:
        alerts.change(account, id, "remove")

    @routes.get("/{id}/test", summary="What an alert would have raised")
    def test(
        id: _AlertId,
        days: Annotated[float, Query(gt=0, le=3650, description="Before now.")] = _WEEK,
        account: Account = viewer,
    ) -> models.AlertTestOut:
        report, replay, since = alerts.test(account, id, days)
        raised, best = (
            [vars(one) | alerts.service.fields(account, one.picture, one.item) for one in visits]
            for visits in (replay.raised[-MOST_RAISED:], replay.best)
        )
        found = vars(replay) | {"alert": _alert_out(report), "since": since, "raised": raised}
        return models.AlertTestOut.model_validate(
            found | {"best": best, "count": len(replay.raised)}
        )


def _alert_out(report: AlertReport) -> models.AlertOut:
    return models.AlertOut.model_validate(_fields(report))


def _fields(report: AlertReport) -> dict[str, Any]:
    standing = {"visits": report.standing.visits, "visits_per_day": report.standing.per_day}
    rate = {"rate": show_rate(report.alert.rate)}
    return vars(report.alert) | vars(report) | standing | rate


def _message_out(
    alerts: ConsoleAlerts, account: Account, one: AlertMessage
) -> models.AlertMessageOut:
    message, picture = one
    return models.AlertMessageOut.model_validate(
        {
            **message.body["data"],
            "type": message.body["type"],
            "alert": message.topic,
            "name": message.body["data"]["alert"]["name"],
            "raised": message.time,
            "state": message.state,
            "verdict": message.label or None,
            "item": None if picture is None else alerts.service.fields(account, *picture),
        }
    )


def _add_pages(routes: APIRouter, alerts: ConsoleAlerts, access: Access) -> None:
    viewer, operator = access.needs("viewer"), access.needs("operator")

    def page(account: Account, of: str | None = None, status: int = 200, **given: Any) -> Response:
        has_outbox = alerts.obstacle != "outbox_unsupported"
        values = {"sentence": "", "chosen": [], "count": 1.0, "period": "day"}
        values |= {"problem": None, "added": None, "notices": [], **given}
        return render(
            "alerts",
            account,
            status,
            obstacle=alerts.obstacle,
            reports=alerts.reports(account) if has_outbox else [],
            messages=alerts.messages(account, of, None, _MOST_MESSAGES) if has_outbox else [],
            of=of,
            cameras=list(alerts.service.cameras(account)),
            pictures=alerts.service.pictures,
            taken=lambda data: read_time(data.get("time"), "time"),
            **values,
        )

    @routes.get("")
    def show(
        q: Annotated[str, Query(max_length=LONGEST_SENTENCE)] = "",
        camera: Annotated[list[models.Name] | None, Query(max_length=100)] = None,
        of: _OfAlert = None,
        account: Account = viewer,
    ) -> Response:
        return page(account, of, sentence=q, chosen=camera or [])

    @routes.post("")
    def add(
        sentence: Annotated[str, Form(max_length=LONGEST_SENTENCE)] = "",
        camera: Annotated[list[models.Name] | None, Form(max_length=100)] = None,
        count: Annotated[float, Form(gt=0, le=10_000)] = 1.0,
        period: Annotated[Literal["day", "week", "month"], Form()] = "day",
        account: Account = operator,
    ) -> Response:
        given: dict[str, Any] = {"sentence": sentence, "chosen": camera or []}
        given |= {"count": count, "period": period}
        try:
            rate = f"{count:.6f}".rstrip("0").rstrip(".")
            added, notices = alerts.add(account, sentence, f"{rate}/{period}", camera or [])
        except (InputError, UsageError) as error:
            return page(account, status=422, problem=problem_text(error), **given)
        return page(account, added=added, notices=notices)

    @routes.post("/{id}/{change}")
    def change(id: _AlertId, change: Change, account: Account = operator) -> Response:
        alerts.change(account, id, change)
        return RedirectResponse("/alerts", 303)

    @routes.post("/messages/{id}/{verdict}")
    def judge(
        id: _MessageId,
        verdict: Verdict,
        of: Annotated[str, Form(pattern="^([0-9a-f]{8})?$")] = "",
        account: Account = operator,
    ) -> Response:
        alerts.judge(account, id, verdict)
        return RedirectResponse(f"/alerts{f'?of={of}' if of else ''}#m{id}", 303)

    @routes.get("/{id}/test")
    def test(id: _AlertId, account: Account = viewer) -> Response:
        report, replay, since = alerts.test(account, id, _WEEK)
        return render(
            "alert_test",
            account,
            report=report,
            replay=replay,
            since=since,
            visits=replay.raised[-MOST_RAISED:][::-1] or replay.best,
            pictures=alerts.service.pictures,
        )
