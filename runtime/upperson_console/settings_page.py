"""The page on which an account chooses its language and its time zone."""

from typing import Annotated

from fastapi import APIRouter, Form, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from upperson_console.accounts import Access, Account
from upperson_console.bounds import BoundedRoute
from upperson_console.problems import invalid
from upperson_console.rendering import render
from upperson_console.translation import LANGUAGES, zones
from upperson_console.user_state import UserState

_Chosen = Annotated[str, Form(max_length=100)]


def settings_routes(user_state: UserState, access: Access) -> APIRouter:
    """Return the routes of the page."""
    routes = APIRouter(
        include_in_schema=False, default_response_class=HTMLResponse, route_class=BoundedRoute
    )
    viewer = access.needs("viewer", purpose=False)

    @routes.get("/settings")
    def show(account: Account = viewer) -> Response:
        chosen = user_state.settings(account.name)
        return render("settings", account, chosen=chosen, languages=LANGUAGES, zones=zones())

    @routes.post("/settings")
    def choose(language: _Chosen = "", zone: _Chosen = "", account: Account = viewer) -> Response:
        if language not in ("", *LANGUAGES) or zone not in ("", *zones()):
            raise invalid("choose a language and a time zone of the lists", "settings_unknown")
        user_state.set_settings(account.name, language, zone)
        return RedirectResponse("/settings", 303)

    return routes
