"""The ASGI application: API, pages and static files behind the guard, and error responses."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upperson_console.access_log import AccessLog
from upperson_console.accounts import Access, is_of_programs, login_place
from upperson_console.accounts_page import account_routes
from upperson_console.alert_routes import alert_routes
from upperson_console.alerts import ConsoleAlerts
from upperson_console.api import api_routes
from upperson_console.bin import bin_routes
from upperson_console.bounds import LARGE_BODIES
from upperson_console.guard import BodyRefusedError, Guard
from upperson_console.limits import BusyError
from upperson_console.live import Live
from upperson_console.oversight_pages import oversight_routes
from upperson_console.pages import page_routes
from upperson_console.problems import MEDIA_TYPE, ProblemError, problem_of
from upperson_console.rendering import STATIC, WAITING, render
from upperson_console.service import ConsoleService
from upperson_console.side_pages import EVENTS, side_routes
from upperson_console.translation import LOCALE, Locale
from upperson_rt import __version__
from upperson_rt.errors import UppersonError
from upperson_rt.printable import error_text, get_logger, one_line

_LOG = get_logger(__name__)
_FILES = "/static"
_CACHED = {"cache-control": "private, max-age=31536000, immutable"}


def make_app(
    service: ConsoleService,
    access: Access,
    names: Iterable[str] = (),
    live: Live | None = None,
) -> Guard:
    """Return the console as an ASGI application; ``names`` are host names, see `Guard`."""
    app = FastAPI(
        title="UP-Person Edge",
        version=__version__,
        summary="Find a person's pictures from a sentence or a picture.",
        docs_url=None,  # It would load scripts from another site.
        redoc_url=None,
        openapi_url=None,
    )
    alerts = ConsoleAlerts(service)
    made = *api_routes(service, access), *alert_routes(alerts, access)
    for routes in (*made, *bin_routes(service, access)):
        app.include_router(routes)
    document = cache(lambda: _openapi(app, access))  # Made when it is first requested.

    @app.get("/api/v1/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:
        return JSONResponse(document())

    app.include_router(page_routes(service, access))
    app.include_router(oversight_routes(service, alerts, access))
    app.include_router(side_routes(service, access, live or Live(())))
    if access.accounts is not None:
        app.include_router(account_routes(service, access, access.accounts))
    app.mount(_FILES, _Static(directory=STATIC))
    _handle_problems(app, access, service.access_log)

    def sender(scope: Scope) -> str | None:
        request = Request(scope)
        found = access.find(request)
        name = None if found is None else found.name
        accepted = request.headers.get("accept-language", "")

        def locale() -> Locale:  # Called where a page needs it, as it reads the user state.
            chosen = "", ""
            with suppress(UppersonError):  # A page reports it.
                chosen = chosen if name is None else service.user_state.settings(name)
            return Locale.of(*chosen, accepted)

        def waiting() -> int:
            with suppress(UppersonError):
                if found is not None and found.sees_approvals:
                    return service.approvals.waiting(found)
            return 0

        LOCALE.set(cache(locale))
        WAITING.set(waiting)
        return name

    return Guard(_answering_heads(app), names, sender, large=LARGE_BODIES)


def _has_head(path: str) -> bool:
    return not path.startswith(EVENTS)  # It never ends.


def _answering_heads(app: ASGIApp) -> ASGIApp:
    """Answer HEAD as GET: the server leaves the body out."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and _has_head(scope["path"]):
            scope = {**scope, "method": "GET"}
        await app(scope, receive, send)

    return answer


def _allowed(app: FastAPI, path: str) -> str:
    """Return the methods of a path; a route's own error names those of one route."""

    def is_answered(method: str) -> bool:
        scope = {"type": "http", "path": path, "root_path": "", "method": method}
        return any(route.matches({**scope})[0] is Match.FULL for route in app.routes)

    methods = ("DELETE", "GET", "POST", "PUT") if not path.startswith(_FILES) else ("GET",)
    found = [one for one in methods if is_answered(one)]
    return ", ".join([*found, *(["HEAD"] if "GET" in found and _has_head(path) else [])])


class _Defects:
    """Answers defects; Starlette would raise them again, with a traceback in the log."""

    def __init__(self, app: ASGIApp, respond: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except BodyRefusedError:
            raise
        except ClientDisconnect:  # No client receives a response.
            return
        except Exception as error:
            response = self._respond(Request(scope), error)
            if not started:
                await response(scope, receive, send)


class _Static(StaticFiles):
    """Static files, whose addresses change with their content."""

    def file_response(self, *args: Any, **named: Any) -> Response:
        """Return a file that browsers cache for a year."""
        response = super().file_response(*args, **named)
        response.headers.update(_CACHED)
        return response


def _openapi(app: FastAPI, access: Access) -> dict[str, Any]:
    """Return the OpenAPI document, with the security scheme if tokens are needed."""
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours are problems.
            if "default" in operation["responses"]:
                schema = {"$ref": "#/components/schemas/ProblemOut"}
                operation["responses"]["default"]["content"] = {MEDIA_TYPE: {"schema": schema}}
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if access.accounts is not None:
        document["components"]["securitySchemes"] = {
            "token": {"type": "http", "scheme": "bearer", "description": "From upperson-rt token."}
        }
        for path, operations in document["paths"].items():
            if path not in ("/api/v1/health", "/api/v1/ready"):
                for operation in operations.values():
                    operation["security"] = [{"token": []}]
    return document


def _handle_problems(app: FastAPI, access: Access, access_log: AccessLog) -> None:
    def response_to(request: Request, problem: ProblemError) -> Response:
        if is_of_programs(request):
            content, headers = problem.as_dict(), problem.headers
            return JSONResponse(content, problem.status, headers, media_type=MEDIA_TYPE)
        if problem.status == 401 or problem.code == "purpose_missing":
            form = "/login" if problem.status == 401 else "/purpose"
            return RedirectResponse(login_place(request, form), 303)
        if problem.code == "approval_pending":
            return RedirectResponse("/approvals", 303)
        page = render("problem", access.find(request), problem.status, problem=problem)
        page.headers.update(problem.headers)
        return page

    async def of_upperson(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        assert problem is not None
        if problem.status in (401, 403):
            note = access_log.note_problem
            await run_in_threadpool(note, request, access.find(request), problem)
        return response_to(request, problem)

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "request"
        what = f"{place}: {one_line(first['msg'])}"
        if first["type"] == "json_invalid":  # The place is a number.
            what = f"the body is no JSON: {one_line(first['ctx']['error'])} at character {place}"
        return response_to(request, ProblemError(422, what, code="request_invalid"))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = "there is nothing at this address" if error.status_code == 404 else error.detail
        headers = error.headers
        if error.status_code == 405 and request.method == "GET" and not is_of_programs(request):
            first, _, rest = request.url.path[1:].partition("/")  # The address of a form, reloaded.
            return RedirectResponse(f"/{first if rest else ''}", 303)
        if error.status_code == 405:
            headers = {"Allow": _allowed(app, request.url.path)}
        return response_to(request, ProblemError(error.status_code, what, headers))

    def defect(request: Request, error: Exception) -> Response:
        _LOG.error("internal error at %s: %s", request.url.path, error_text(error))
        what = f"internal error: {type(error).__name__}; the server's log says more"
        return response_to(request, ProblemError(500, what))

    for kind in (UppersonError, BusyError, ProblemError):
        app.add_exception_handler(kind, of_upperson)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, of_http)
    app.add_middleware(_Defects, respond=defect)
