"""The page on which administrators create, change and revoke accounts of the token file."""

import os
import threading
import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Form, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from upperson_console.accounts import (
    ROLES,
    Access,
    Account,
    Accounts,
    Role,
    Token,
    check_account,
    new_token,
)
from upperson_console.bounds import BoundedRoute
from upperson_console.problems import invalid, missing
from upperson_console.rendering import render
from upperson_console.search import read_time
from upperson_console.service import ConsoleService

_Name = Annotated[str, Form(max_length=100)]
_Role = Annotated[Role, Form()]
_Cameras = Annotated[list[str] | None, Form(max_length=100)]
_Expires = Annotated[str, Form(max_length=40)]


def account_routes(service: ConsoleService, access: Access, accounts: Accounts) -> APIRouter:
    """Return the routes of the page; a change counts from the next request on."""
    routes = APIRouter(
        prefix="/accounts",
        include_in_schema=False,
        default_response_class=HTMLResponse,
        route_class=BoundedRoute,
    )
    admin, lock = access.needs("admin", purpose=False), threading.Lock()

    def page(account: Account, **more: Any) -> Response:
        entries = sorted(Accounts.read(accounts.path), key=lambda one: one.name)
        return render(
            "accounts",
            account,
            entries=entries,
            cameras=sorted(service.cameras(account)),
            roles=ROLES,
            may_change=os.access(accounts.path.parent, os.W_OK),
            file=accounts.path,
            **{"owner": None, "token": None, **more},
        )

    def found(account: Account, name: str) -> Token:
        """Return the entry of another account."""
        if name == account.name:
            what = "nobody changes their own account here: ask another administrator"
            raise invalid(f"{what}, or use  upperson-rt token", "own_account")
        for entry in Accounts.read(accounts.path):
            if entry.name == name:
                return entry
        raise missing("there is no such account; it may have been revoked", "account_not_found")

    def note(account: Account, action: str, entry: Token) -> None:
        """Log a change before it is made."""
        about = {"role": entry.role, "cameras": entry.cameras, "expires": entry.expires}
        service.note(account, f"account-{action}", [], {"account": entry.name, **about})

    @routes.get("")
    def show(account: Account = admin) -> Response:
        return page(account)

    @routes.post("")
    def create(
        name: _Name,
        role: _Role = "viewer",
        camera: _Cameras = None,
        expires: _Expires = "",
        account: Account = admin,
    ) -> Response:
        entry, token = new_token(name.strip(), role, _chosen(camera), _time(expires))
        with lock:
            if any(one.name == entry.name for one in Accounts.read(accounts.path)):
                what = "there is an account of this name: change it, or give it a new token"
                raise invalid(what, "account_exists")
            note(account, "create", entry)
            Accounts.put(accounts.path, entry)
        return page(account, owner=entry.name, token=token)

    @routes.post("/change")
    def change(
        name: _Name,
        role: _Role,
        camera: _Cameras = None,
        expires: _Expires = "",
        account: Account = admin,
    ) -> Response:
        with lock:
            entry = replace(
                found(account, name), role=role, cameras=_chosen(camera), expires=_time(expires)
            )
            check_account(entry)
            note(account, "change", entry)
            Accounts.put(accounts.path, entry)
        return RedirectResponse("/accounts", 303)

    @routes.post("/renew")
    def renew(name: _Name, account: Account = admin) -> Response:
        with lock:
            known = found(account, name)
            entry, token = new_token(name, known.role, known.cameras, known.expires)
            note(account, "renew", entry)
            Accounts.put(accounts.path, entry)
        return page(account, owner=name, token=token)

    @routes.post("/revoke")
    def revoke(name: _Name, account: Account = admin) -> Response:
        with lock:
            note(account, "revoke", found(account, name))
            Accounts.revoke(accounts.path, name)
        return RedirectResponse("/accounts", 303)

    return routes


def _chosen(cameras: list[str] | None) -> tuple[str, ...] | None:
    """Return the cameras of a form, of which a text field may be empty; None for all."""
    return tuple(dict.fromkeys(filter(None, cameras or ()))) or None


def _time(text: str) -> float | None:
    expires = read_time(text.strip() or None, "expires")
    if expires is not None and expires <= time.time():
        raise invalid("'expires' must be in the future: revoke the account instead", "expires_past")
    return expires
