"""Who sends a request: by a token, by a session's cookie, or whoever sits at this machine."""

from typing import Any

from fastapi import Depends, Request

from upperson_rt.serve.accounts import Account, Accounts, Role, Sessions
from upperson_rt.serve.problems import ProblemError

__all__ = ["COOKIE", "Access"]

COOKIE = "upperson_session"


class Access:
    """Tells whose request it is."""

    def __init__(self, accounts: Accounts | None, local: Account) -> None:
        """Ask for tokens.

        Args:
            accounts: Those who have one; None asks for none.
            local: Who it is then.
        """
        self.accounts = accounts
        self.sessions = Sessions()
        self._local = local

    def find(self, request: Request) -> Account | None:
        """Return whose request it is, or None for nobody's."""
        if self.accounts is None:
            return self._local
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.accounts.of_token(token.strip())
        value = request.cookies.get(COOKIE)
        return None if value is None else self.sessions.find(value)

    def needs(self, role: Role) -> Any:
        """Return the default of a route's account: one that may do what a role may."""

        async def account(request: Request) -> Account:  # No thread is waited for.
            found = self.find(request)
            if found is None:
                raise ProblemError(
                    401,
                    "log in, or send a token:  Authorization: Bearer TOKEN",
                    {"WWW-Authenticate": "Bearer"},
                )
            if not found.may(role):
                raise ProblemError(403, f"this needs the role {role}; {found.name} is {found.role}")
            return found

        return Depends(account)
