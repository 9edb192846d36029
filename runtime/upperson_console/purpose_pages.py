"""The page on which users state the purpose and the case number of their searches."""

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from upperson_console.accounts import Access, Account
from upperson_console.bounds import BoundedRoute
from upperson_console.oversight import PURPOSE_COOKIE, Stated, cookie_of
from upperson_console.problems import ProblemError
from upperson_console.rendering import local_path, render

_Text = Annotated[str, Form(max_length=200)]


def purpose_routes(access: Access) -> APIRouter:
    """Return the routes of the page."""
    routes = APIRouter(
        include_in_schema=False, default_response_class=HTMLResponse, route_class=BoundedRoute
    )
    viewer = access.needs("viewer", purpose=False)
    oversight = access.oversight

    def page(account: Account, next: str, status: int = 200, problem: str = "") -> Response:
        return render(
            "purpose", account, status, oversight=oversight, next=local_path(next), problem=problem
        )

    @routes.get("/purpose")
    def form(next: str = "/", account: Account = viewer) -> Response:
        return page(account, next)

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
            return page(account, next, 422, problem.detail)
        answer = RedirectResponse(local_path(next), 303)
        answer.set_cookie(
            PURPOSE_COOKIE,
            cookie_of(purpose, case),
            max_age=access.sessions.lasts_s,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    return routes
