"""The page on which administrators create, change and revoke accounts of the token file."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    check_new_name,
    new_token,
)
from upperson_console.bounds import BoundedRoute
from upperson_console.problems import ProblemError, invalid, missing
from upperson_console.rendering import render
from upperson_console.service import ConsoleService
from upperson_console.times import read_time
from upperson_console.translation import reader

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

    @contextmanager
    def changing(account: Account) -> Iterator[None]:
        """Change accounts in turn, while the account is an admin: one of two remains."""
        with lock:
            admins = (one for one in Accounts.read(accounts.path) if one.role == "admin")
            if not any(one.name == account.name and not one.has_expired() for one in admins):
                what = f"{account.name} is not an administrator any more"
                raise ProblemError(403, what, code="role_missing")
            yield

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
        with changing(account):
            known = Accounts.read(accounts.path)
            check_new_name(entry.name, known)
            if any(one.name == entry.name for one in known):
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
        with changing(account):
            entry = replace(
                found(account, name), role=role, cameras=_chosen(camera), expires=_time(expires)
            )
            check_account(entry)
            note(account, "change", entry)
            Accounts.put(accounts.path, entry)
        return RedirectResponse("/accounts", 303)

    @routes.post("/renew")
    def renew(name: _Name, account: Account = admin) -> Response:
        with changing(account):
            known = found(account, name)
            if known.has_expired():
                what = "the account has expired: change when it expires before"
                raise invalid(what, "account_expired")
            entry, token = new_token(name, known.role, known.cameras, known.expires)
            note(account, "renew", entry)
            Accounts.put(accounts.path, entry)
        return page(account, owner=name, token=token)

    @routes.post("/revoke")
    def revoke(name: _Name, account: Account = admin) -> Response:
        with changing(account):
            note(account, "revoke", found(account, name))
            Accounts.revoke(accounts.path, name)
        return RedirectResponse("/accounts", 303)

    return routes


def _chosen(cameras: list[str] | None) -> tuple[str, ...] | None:
    """Return the cameras of a form, of which a text field may be empty; None for all."""
    return tuple(dict.fromkeys(filter(None, cameras or ()))) or None


def _time(text: str) -> float | None:
    expires = read_time(text.strip() or None, "expires", reader().zone)
    if expires is not None and expires <= time.time():
        raise invalid("'expires' must be in the future: revoke the account instead", "expires_past")
    return expires
