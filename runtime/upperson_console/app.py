"""The application: API, pages and files behind the guard, and what errors look like."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upperson_console.accounts import Access
from upperson_console.api import api_routes
from upperson_console.bounds import LARGE_BODIES
from upperson_console.desk import Desk
from upperson_console.guard import Guard, RefusedError
from upperson_console.live import Live
from upperson_console.onvif.routes import PATH, OnvifRoutes
from upperson_console.pages import page_routes
from upperson_console.problems import MEDIA_TYPE, ProblemError, problem_of
from upperson_console.rendering import STATIC, render
from upperson_console.side_pages import side_routes
from upperson_console.turns import BusyError
from upperson_rt import __version__
from upperson_rt.errors import UppersonError
from upperson_rt.printable import error_text, get_logger, one_line

__all__ = ["make_app"]

_LOG = get_logger(__name__)
_KEEPS = {"cache-control": "private, max-age=31536000, immutable"}


def make_app(
    desk: Desk,
    access: Access,
    names: Iterable[str] = (),
    live: Live | None = None,
    onvif: OnvifRoutes | None = None,
) -> Guard:
    """Return the console as an application of ASGI.

    Args:
        desk: What it can do.
        access: Who may do it.
        names: By which the server is called, see `Guard`.
        live: Reads what cameras do; by default the gallery alone tells.
        onvif: Answers searches by ONVIF; by default nobody does.
    """
    app = FastAPI(
        title="UP-Person Edge",
        version=__version__,
        summary="Find a person's pictures from a sentence or a picture.",
        docs_url=None,  # It would load its parts from elsewhere.
        redoc_url=None,
        openapi_url=None,
    )
    for routes in api_routes(desk, access):
        app.include_router(routes)
    document = cache(lambda: _document(app, access))  # It takes a while, and few ask.

    @app.get("/api/v1/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:
        return JSONResponse(document())

    app.include_router(page_routes(desk, access))
    app.include_router(side_routes(desk, access, live or Live(())))
    if onvif is not None:
        app.include_router(onvif.router)
    app.mount("/static", _Static(directory=STATIC))
    _tell_problems(app, access)
    apart = None if onvif is None else PATH

    def sender(scope: Scope) -> str | None:
        found = access.find(Request(scope))
        return None if found is None else found.name

    return Guard(app, names, sender, apart=apart, large=LARGE_BODIES)


class _Defects:
    """Answers defects: Starlette would raise them again, and the log would have the whole trace."""

    def __init__(self, app: ASGIApp, told: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except RefusedError:
            raise
        except Exception as error:
            response = self._told(Request(scope), error)
            if not started:
                await response(scope, receive, send)


class _Static(StaticFiles):
    """Files whose addresses change with their content."""

    def file_response(self, *args: Any, **named: Any) -> Response:
        """Return a file that browsers keep."""
        response = super().file_response(*args, **named)
        response.headers.update(_KEEPS)
        return response


def _document(app: FastAPI, access: Access) -> dict[str, Any]:
    """Return the description of the API, with how to log in where that is asked for."""
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours are problems.
            default = operation["responses"].get("default")
            if default is not None:
                default["content"] = {
                    MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}
                }
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


def _tell_problems(app: FastAPI, access: Access) -> None:
    def told(request: Request, problem: ProblemError) -> Response:
        if request.url.path.startswith(("/api/", "/v1/", f"{PATH}/")):
            return JSONResponse(
                problem.as_dict(), problem.status, problem.headers, media_type=MEDIA_TYPE
            )
        if problem.status == 401 and request.method == "GET":
            place = f"{request.url.path}?{request.url.query}".rstrip("?")
            return RedirectResponse(
                str(request.url_for("form").include_query_params(next=place)), 303
            )
        page = render("problem", access.find(request), problem.status, problem=problem)
        page.headers.update(problem.headers)
        return page

    async def ours(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        assert problem is not None
        return told(request, problem)

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "request"
        what = f"{place}: {one_line(first['msg'])}"
        if first["type"] == "json_invalid":  # The place is a number.
            what = f"the body is no JSON: {one_line(first['ctx']['error'])} at character {place}"
        return told(request, ProblemError(422, what))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = "there is nothing at this address" if error.status_code == 404 else error.detail
        return told(request, ProblemError(error.status_code, what, error.headers))

    def defect(request: Request, error: Exception) -> Response:
        _LOG.error("internal error at %s: %s", request.url.path, error_text(error))
        name = type(error).__name__
        return told(
            request, ProblemError(500, f"internal error: {name}; the server's log says more")
        )

    for kind in (UppersonError, BusyError, ProblemError):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, of_http)
    app.add_middleware(_Defects, told=defect)
